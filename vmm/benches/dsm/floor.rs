//! What a fault is measured against: the network alone, with the socket options and the priority that
//! the shared memory's own threads have.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::frames;
use super::node::Kind;

use krg_dsm::memory::PAGE_SIZE;
use krg_dsm::transport;

/// As long as a request for a page with its frame.
const REQUEST: usize = 16;
/// Written and read at once when bandwidth is measured.
pub const CHUNK: usize = 256 << 10;
/// Memory that a stream comes from and goes to, at most: as much as is read from another node's memory. A stream that
/// uses the same few bytes again and again is another thing, since they are in some cache.
const MEMORY: usize = 128 << 20;

/// What a stream is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// As much memory as there are bytes, from its beginning to its end.
    Memory,
    /// The same [`CHUNK`] again and again.
    Chunk,
}

impl Of {
    /// Of so many bytes.
    fn len(self, bytes: usize) -> usize {
        match self {
            Of::Memory => bytes.clamp(CHUNK, MEMORY),
            Of::Chunk => CHUNK,
        }
    }
}

/// Makes the calling thread real-time, as the threads are that answer faults. Without the right to
/// do so both stay as they are.
pub fn raise() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure is initialised and outlives the call; 0 names the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameters) };
}

/// A request for so many bytes.
pub fn request(bytes: u64) -> [u8; REQUEST] {
    request_of(bytes, Of::Chunk)
}

fn request_of(bytes: u64, of: Of) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[..8].copy_from_slice(&bytes.to_le_bytes());
    request[8] = u8::from(of == Of::Memory);
    request
}

/// With the options that the shared memory's connections have.
pub fn prepared(stream: TcpStream) -> io::Result<TcpStream> {
    // No silence is too long: other things are measured meanwhile.
    transport::prepare(&stream, Duration::from_secs(3600))
        .map_err(|(option, errno)| io::Error::other(format!("{option}: {errno}")))?;
    Ok(stream)
}

/// Answers a peer's requests until it is gone: each with as many bytes as it asks for.
pub fn serve(kind: Kind, stream: TcpStream) -> anyhow::Result<()> {
    match kind {
        Kind::Tcp => Ok(serve_stream(stream)?),
        Kind::Rdma => frames::serve(stream),
    }
}

fn serve_stream(stream: TcpStream) -> io::Result<()> {
    raise();
    let mut stream = prepared(stream)?;
    let (mut request, mut memory) = ([0; REQUEST], Vec::new());
    while stream.read_exact(&mut request).is_ok() {
        let left = u64::from_le_bytes(request[..8].try_into().unwrap_or_default());
        let of = if request[8] == 0 { Of::Chunk } else { Of::Memory };
        let (left, len) = (left as usize, of.len(left as usize));
        if memory.len() < len {
            memory.resize(len, 7);
        }
        for at in (0..left).step_by(CHUNK) {
            let from = at % len;
            let to = len.min(from + CHUNK.min(left - at));
            stream.write_all(&memory[from..to])?;
        }
    }
    Ok(())
}

/// What is done with a page that has come.
pub type Then = Box<dyn FnOnce(&[u8]) + Send>;

/// The asking side.
pub enum Bare {
    Tcp(BareStream),
    Rdma(frames::Asking),
}

impl Bare {
    pub fn new(kind: Kind, stream: TcpStream) -> anyhow::Result<Self> {
        Ok(match kind {
            Kind::Tcp => Bare::Tcp(BareStream {
                stream: prepared(stream)?,
                buffer: vec![1; CHUNK],
            }),
            Kind::Rdma => Bare::Rdma(frames::Asking::new(stream)?),
        })
    }

    /// `count` times: a small request, a page as the answer, one after the other.
    pub fn round_trips(&mut self, count: usize) -> anyhow::Result<Vec<Duration>> {
        match self {
            Bare::Tcp(stream) => Ok(stream.round_trips(count)?),
            Bare::Rdma(asking) => asking.round_trips(count),
        }
    }

    /// Asks for a page. `then` is called with it: by RDMA later, on the thread that receives.
    pub fn fetch(&mut self, then: Then) -> anyhow::Result<()> {
        match self {
            Bare::Tcp(stream) => Ok(stream.fetch(then)?),
            Bare::Rdma(asking) => {
                asking.fetch(then);
                Ok(())
            }
        }
    }

    /// How long `bytes` take that the peer sends as fast as it can. RDMA has all of it go through its rings.
    pub fn stream(&mut self, bytes: u64, of: Of) -> anyhow::Result<Duration> {
        match self {
            Bare::Tcp(stream) => Ok(stream.stream(bytes, of)?),
            Bare::Rdma(asking) => asking.stream(bytes),
        }
    }
}

/// The asking side over TCP.
pub struct BareStream {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl BareStream {
    fn ask(&mut self, bytes: u64, of: Of) -> io::Result<()> {
        self.stream.write_all(&request_of(bytes, of))
    }

    fn round_trips(&mut self, count: usize) -> io::Result<Vec<Duration>> {
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                raise();
                (0..count)
                    .map(|_| {
                        let begun = Instant::now();
                        self.ask(PAGE_SIZE as u64, Of::Chunk)?;
                        self.stream.read_exact(&mut self.buffer[..PAGE_SIZE])?;
                        Ok(begun.elapsed())
                    })
                    .collect()
            });
            work.join()
                .unwrap_or_else(|_| Err(io::Error::other("the measuring thread panicked")))
        })
    }

    fn fetch(&mut self, then: Then) -> io::Result<()> {
        self.ask(PAGE_SIZE as u64, Of::Chunk)?;
        self.stream.read_exact(&mut self.buffer[..PAGE_SIZE])?;
        then(&self.buffer[..PAGE_SIZE]);
        Ok(())
    }

    fn stream(&mut self, bytes: u64, of: Of) -> io::Result<Duration> {
        let (mut got, len) = (0, of.len(bytes as usize));
        if self.buffer.len() < len {
            self.buffer.resize(len, 1);
            // There the memory is new, too: that shall not count.
            self.stream(bytes, of)?;
        }
        let begun = Instant::now();
        self.ask(bytes, of)?;
        let bytes = bytes as usize;
        while got < bytes {
            let from = got % len;
            let to = len.min(from + CHUNK.min(bytes - got));
            match self.stream.read(&mut self.buffer[from..to])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                some => got += some,
            }
        }
        Ok(begun.elapsed())
    }
}
