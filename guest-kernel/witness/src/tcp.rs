//! One TCP connection that has to live: everything that is sent comes back as it was.

use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Bytes of an exchange: several segments.
const BLOCK: usize = 4000;
/// Spreads consecutive numbers over all bits.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// Between two exchanges.
const PAUSE: Duration = Duration::from_millis(20);

/// What was exchanged.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    exchanges: u64,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "one connection, {} blocks of {BLOCK} bytes there and back", self.exchanges)
    }
}

/// Block number `number`.
fn block(number: u64) -> Vec<u8> {
    let words = (number * BLOCK as u64 / 8..).map(|n| n.wrapping_mul(SPREAD).to_le_bytes());
    words.flatten().take(BLOCK).collect()
}

/// Exchanges blocks with `server` until it is `over`; at least one.
pub fn exchange(server: SocketAddr, over: &AtomicBool) -> Result<Told, String> {
    let mut stream = TcpStream::connect(server).map_err(|e| format!("{server}: {e}"))?;
    let mut told = Told::default();
    let mut back = vec![0; BLOCK];
    while told.exchanges == 0 || !over.load(Ordering::Relaxed) {
        let sent = block(told.exchanges);
        let failed = |what: &str, e: std::io::Error| format!("{server}: {what} block {}: {e}", told.exchanges);
        stream.write_all(&sent).map_err(|e| failed("sending", e))?;
        stream.read_exact(&mut back).map_err(|e| failed("receiving", e))?;
        if back != sent {
            return Err(format!("{server}: block {} came back changed", told.exchanges));
        }
        told.exchanges += 1;
        std::thread::sleep(PAUSE);
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Exchanges with a server that spoils one byte of block `spoilt`.
    fn with_server(spoilt: Option<usize>) -> Result<Told, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = vec![0; BLOCK];
                for number in 0.. {
                    if stream.read_exact(&mut bytes).is_err() {
                        return;
                    }
                    bytes[17] ^= u8::from(spoilt == Some(number));
                    over.store(number >= 4, Ordering::SeqCst);
                    stream.write_all(&bytes).unwrap();
                }
            });
            exchange(server, &over)
        })
    }

    #[test]
    fn a_changed_byte_is_seen() {
        assert_eq!(with_server(None), Ok(Told { exchanges: 5 }));
        assert!(with_server(Some(2)).is_err_and(|error| error.contains("block 2 came back changed")));
        assert_ne!(block(0), block(1));
    }
}
