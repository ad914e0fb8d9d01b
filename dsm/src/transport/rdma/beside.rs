//! The TCP connection that the ends of a peer were described over. Nothing is sent on it any more; it ends with
//! the peer's process, which shows that end at once.

use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::errno::Errno;
use crate::transport::LostReason;

/// It, beside all links to the peer.
#[derive(Debug)]
pub struct Beside {
    stream: TcpStream,
    /// Links whose writers still send.
    sending: AtomicUsize,
}

impl Beside {
    /// Beside so many links.
    pub fn new(stream: TcpStream, links: usize) -> Self {
        Self {
            stream,
            sending: AtomicUsize::new(links),
        }
    }

    /// One link's writer is through. After the last the peer is shown the end: it has everything by then, or
    /// never will.
    pub fn through(&self) {
        if self.sending.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Fails if the stream is gone, which shows the end, too.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Ends it both ways, which wakes all receivers.
    pub fn end(&self) {
        // Fails if the stream is gone, which is what we want.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// How it has ended, if it has.
    pub fn ended(&self) -> Option<LostReason> {
        match self.stream.peek(&mut [0]) {
            Ok(0) => Some(LostReason::Closed),
            // Nothing is due there.
            Ok(_) => Some(LostReason::Broken(Errno(libc::EPROTO))),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => None,
            Err(error) => Some(LostReason::Broken(Errno::of(&error))),
        }
    }
}

impl AsRawFd for Beside {
    /// Readable when it has ended.
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// As of a connection just described over.
    fn beside(stream: TcpStream) -> Beside {
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        Beside::new(stream, 2)
    }

    #[test]
    fn the_peer_is_shown_the_end_when_the_last_writer_is_through() {
        let (near, far) = pair();
        let (near, far) = (beside(near), beside(far));
        near.through();
        assert_eq!(far.ended(), None);
        near.through();
        assert_eq!(far.ended(), Some(LostReason::Closed));
        // The other way is still open.
        assert_eq!(near.ended(), None);
        far.end();
        assert_eq!(near.ended(), Some(LostReason::Closed));
    }

    #[test]
    fn bytes_that_nobody_is_to_send_break_it() {
        let (near, far) = pair();
        std::io::Write::write_all(&mut &far, b"x").unwrap();
        assert_eq!(beside(near).ended(), Some(LostReason::Broken(Errno(libc::EPROTO))));
    }
}
