//! What a way of its own between two nodes on one host could bring: round trips with a page over loopback TCP, over a
//! Unix socket, and through shared memory with a futex, where the copies and the waking of a thread are all there is.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use krg_dsm::memory::PAGE_SIZE;

use super::Bench;
use super::figures::Times;
use super::floor::{prepared, raise};

/// As long as a request for a page with its frame.
const REQUEST: usize = 16;
/// In each round.
const TRIPS: usize = 1000;

/// One of the two ends: sends and receives so many bytes.
trait End: Send {
    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()>;
    fn receive(&mut self, bytes: &mut [u8]) -> std::io::Result<()>;
}

impl<S: Read + Write + Send> End for S {
    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.write_all(bytes)
    }

    fn receive(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        self.read_exact(bytes)
    }
}

/// Memory that both ends have, for one message at a time; whose turn it is to read it is what they wait for.
struct Shared {
    turn: AtomicU32,
    words: Vec<std::sync::atomic::AtomicU64>,
}

struct SharedEnd<'a> {
    shared: &'a Shared,
    me: u32,
}

impl SharedEnd<'_> {
    fn futex(&self, operation: i32, value: u32) {
        // SAFETY: the word outlives the call; without a timeout the other arguments are not looked at.
        unsafe { libc::syscall(libc::SYS_futex, self.shared.turn.as_ptr(), operation, value, std::ptr::null::<libc::timespec>()) };
    }
}

impl End for SharedEnd<'_> {
    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        for (word, bytes) in self.shared.words.iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().unwrap_or_default()), Ordering::Relaxed);
        }
        self.shared.turn.store(1 - self.me, Ordering::Release);
        self.futex(libc::FUTEX_WAKE, 1);
        Ok(())
    }

    fn receive(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        while self.shared.turn.load(Ordering::Acquire) != self.me {
            self.futex(libc::FUTEX_WAIT, 1 - self.me);
        }
        for (word, bytes) in self.shared.words.iter().zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }
}

/// [`TRIPS`] times: a small request, a page as the answer; each end has a thread of its own.
fn between(mut near: impl End, mut far: impl End, times: &mut Times) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        scope.spawn(move || {
            raise();
            let mut request = [0; REQUEST];
            (0..TRIPS).try_for_each(|_| far.receive(&mut request).and_then(|()| far.send(&[7; PAGE_SIZE])))
        });
        let asking = scope.spawn(move || {
            raise();
            let mut page = [0; PAGE_SIZE];
            (0..TRIPS).try_for_each(|_| {
                let begun = Instant::now();
                near.send(&[1; REQUEST]).and_then(|()| near.receive(&mut page))?;
                times.took(begun.elapsed());
                Ok(())
            })
        });
        Ok(asking.join().unwrap_or_else(|_| Err(std::io::Error::other("the measuring thread panicked")))?)
    })
}

fn loopback() -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    Ok((prepared(near)?, prepared(far)?))
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let mut times = [(); 3].map(|()| Times::new());
    for _ in 0..bench.rounds {
        let (near, far) = loopback()?;
        between(near, far, &mut times[0])?;
        let (near, far) = UnixStream::pair()?;
        between(near, far, &mut times[1])?;
        let words = (0..PAGE_SIZE / 8).map(|_| Default::default()).collect();
        let shared = Shared { turn: AtomicU32::new(0), words };
        let [near, far] = [0, 1].map(|me| SharedEnd { shared: &shared, me });
        between(near, far, &mut times[2])?;
    }
    let figures = &bench.figures;
    figures.section("Round trip with a page between two threads of this host; the floor is shared memory");
    let floor = times[2].three();
    for (name, times) in ["loopback TCP", "Unix socket"].into_iter().zip(&times) {
        figures.times(name, times, Some(floor));
    }
    figures.times("shared memory and a futex", &times[2], None);
    Ok(())
}
