//! The transport over RDMA (RoCE version 2): a reliable connection per peer.
//!
//! The frames to a peer are a stream of bytes, as over TCP. The stream goes in messages of up to a slot
//! ([`credits::SLOT`]), each an RDMA write with immediate from a registered staging ring here straight into
//! the landing ring over there; small ones are handed to the device together with the request. The
//! receiver, woken by the immediate, copies the message out *before* it looks at it: the peer may write
//! into the ring at any time. Nothing is registered after the connection is made.
//!
//! Whatever the peer sends is checked: the length against the slot, the count against what was sent, the
//! frames as those of any stream. The slot itself follows from the order, so no address comes from a peer.
//!
//! The TCP connection over which the ends were described stays open beside it: it ends with the peer's
//! process, which shows its end at once.

mod abi;
mod credits;
mod device;
mod exchange;
mod link;
mod patience;
mod receive;
mod ring;
mod verbs;

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use device::RdmaPort;
pub use exchange::BadDescription;
pub use verbs::VerbsError;

use crate::errno::Errno;
use crate::transport::counters::PeerCount;
use crate::transport::threads::{self, FLUSH, LINGER};
use crate::transport::{Config, Handler, LostReason, SendError, Transport, TransportError};
use exchange::Description;
use link::Link;
use receive::Receiver;
use verbs::{Completion, Endpoint};

/// How long a peer may take to describe its end: it may still be busy with its memory.
const DESCRIBE: Duration = Duration::from_secs(20);
/// How long the first message may take once both ends are connected.
const GREET: Duration = Duration::from_secs(3);
/// What a node says when its end can receive.
const READY: u8 = b'R';

/// Why no RDMA connection to a peer came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RdmaError {
    /// No port at the address.
    #[error("this host has no RDMA device at {0}")]
    NoPort(std::net::IpAddr),
    /// This host's device or library.
    #[error("{0}")]
    Verbs(#[from] VerbsError),
    /// The connection to talk about it.
    #[error("talking about RDMA failed with {0}")]
    Stream(Errno),
    /// The peer gave up.
    #[error("the peer gave up")]
    GaveUp,
    /// The peer's description.
    #[error("{0}")]
    Description(#[from] BadDescription),
    /// Connected, but nothing gets through.
    #[error(
        "nothing gets through by RDMA within {} s; is UDP port 4791 open between the hosts?",
        GREET.as_secs()
    )]
    NoWay,
    /// The first message failed.
    #[error("the first message by RDMA: {0}")]
    First(LostReason),
}

/// Says why RDMA can't be used at all on this host: the library is missing.
///
/// # Errors
/// One line.
pub fn available() -> Result<(), VerbsError> {
    verbs::available()
}

/// RDMA connections to all peers.
///
/// The threads keep the [`Handler`] alive until [`Transport::shutdown`], which has to be called if the
/// handler owns this transport.
#[derive(Debug)]
pub struct RdmaTransport {
    links: Vec<Option<Arc<Link>>>,
    config: Config,
    stopping: Arc<AtomicBool>,
    threads: Mutex<Threads>,
}

#[derive(Debug, Default)]
struct Threads {
    started: bool,
    writers: Vec<JoinHandle<()>>,
    receivers: Vec<JoinHandle<()>>,
}

impl RdmaTransport {
    /// Makes RDMA connections beside connected, authenticated streams: `peers[i]` leads to node `i`; `None`
    /// at this node's own place. All nodes have to do this at about the same time. The port is the one whose
    /// address the stream has here. Frames can be sent at once; they are received after the start.
    ///
    /// # Errors
    /// A host without RDMA, resources that are missing, a peer that doesn't do the same, or a network that
    /// does not carry it.
    pub fn connect(peers: Vec<Option<TcpStream>>, config: Config) -> Result<Self, TransportError> {
        let ports = RdmaPort::of_this_host();
        let random = RandomState::new();
        let mut opened = Vec::with_capacity(peers.len());
        // Everybody describes all ends before anybody waits for a description: nobody waits in a circle.
        for (peer, stream) in peers.into_iter().enumerate() {
            let open = |stream: TcpStream| {
                let address = stream.local_addr().map_err(stream_error)?.ip();
                let port = RdmaPort::at(&ports, address).ok_or(RdmaError::NoPort(address))?;
                let end = Endpoint::open(port, random.hash_one(peer) as u32)?;
                stream.set_nonblocking(false).map_err(stream_error)?;
                stream.set_nodelay(true).map_err(stream_error)?;
                stream.set_read_timeout(Some(DESCRIBE)).map_err(stream_error)?;
                (&stream).write_all(&end.describe().encode()).map_err(stream_error)?;
                Ok((stream, end))
            };
            opened.push(
                stream
                    .map(open)
                    .transpose()
                    .map_err(|error| TransportError::Rdma { peer, error })?,
            );
        }
        for (peer, pair) in opened.iter_mut().enumerate() {
            let Some((stream, end)) = pair else { continue };
            let mut connect = || {
                let mut description = [0; exchange::SIZE];
                stream.read_exact(&mut description).map_err(stream_error)?;
                end.connect(&Description::decode(&description)?)?;
                stream.write_all(&[READY]).map_err(stream_error)
            };
            connect().map_err(|error| TransportError::Rdma { peer, error })?;
        }
        let mut links = Vec::with_capacity(opened.len());
        for (peer, pair) in opened.into_iter().enumerate() {
            let Some((mut stream, end)) = pair else {
                links.push(None);
                continue;
            };
            let mut greet = || {
                let mut ready = [0];
                stream.read_exact(&mut ready).map_err(stream_error)?;
                if ready != [READY] {
                    Err(BadDescription::Magic.into())
                } else {
                    Ok(())
                }
            };
            greet().map_err(|error| TransportError::Rdma { peer, error })?;
            let link = Link::new(peer, end, stream, config);
            link.greet().map_err(|reason| TransportError::Rdma {
                peer,
                error: RdmaError::First(reason),
            })?;
            links.push(Some(Arc::new(link)));
        }
        for (peer, link) in links.iter().enumerate() {
            let Some(link) = link else { continue };
            await_greeting(link).map_err(|error| TransportError::Rdma { peer, error })?;
        }
        Ok(Self {
            links,
            config,
            stopping: Arc::default(),
            threads: Mutex::default(),
        })
    }

    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.links.iter().flatten()
    }
}

fn stream_error(error: std::io::Error) -> RdmaError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => RdmaError::GaveUp,
        std::io::ErrorKind::WouldBlock => RdmaError::Stream(Errno(libc::ETIMEDOUT)),
        _ => RdmaError::Stream(Errno::of(&error)),
    }
}

/// Waits for the peer's first message, which has no content, and takes no other.
fn await_greeting(link: &Link) -> Result<(), RdmaError> {
    let until = Instant::now() + GREET;
    let broken = |errno| RdmaError::First(LostReason::Broken(errno));
    let mut first = [Completion::default()];
    while link.end.poll_received(&mut first).map_err(broken)? == 0 {
        if Instant::now() >= until {
            return Err(RdmaError::NoWay);
        }
        thread::sleep(Duration::from_micros(200));
    }
    if let Some(failure) = first[0].failure {
        return Err(RdmaError::First(link.cause().unwrap_or_else(|| link::reason(failure))));
    }
    link.end.post_receive().map_err(broken)?;
    match credits::parse(first[0].immediate).and_then(|(len, count)| link.taken(count).map(|()| len)) {
        Ok(0) => Ok(()),
        _ => Err(BadDescription::Values.into()),
    }
}

impl Transport for RdmaTransport {
    fn start(&self, handler: Arc<dyn Handler>) -> Result<(), TransportError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut threads.started, true) {
            return Err(TransportError::Started);
        }
        let result = self.links.iter().enumerate().try_for_each(|(peer, link)| {
            let Some(link) = link else { return Ok(()) };
            let writer = Arc::clone(link);
            threads
                .writers
                .push(threads::spawn(format!("rdma-send-{peer}"), move || {
                    writer.write_loop()
                })?);
            let receiver = Receiver {
                peer,
                link: Arc::clone(link),
                handler: Arc::clone(&handler),
                stopping: Arc::clone(&self.stopping),
                silence: self.config.silence,
            };
            threads
                .receivers
                .push(threads::spawn(format!("rdma-recv-{peer}"), move || receiver.run())?);
            Ok(())
        });
        drop(threads);
        if result.is_err() {
            self.shutdown();
        }
        result
    }

    fn send(&self, to: usize, class: u8, parts: &[&[u8]]) -> Result<(), SendError> {
        match self.links.get(to) {
            Some(Some(link)) => link.send(class, parts),
            _ => Err(SendError::NoPeer { peer: to }),
        }
    }

    fn send_together(&self, to: usize, class: u8, frames: &[Vec<u8>]) -> Result<(), SendError> {
        match self.links.get(to) {
            Some(Some(link)) => link.send_together(class, frames),
            _ => Err(SendError::NoPeer { peer: to }),
        }
    }

    fn count(&self, peer: usize) -> PeerCount {
        self.links
            .get(peer)
            .and_then(Option::as_ref)
            .map_or_else(PeerCount::default, |link| link.count())
    }

    fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let Threads {
            mut writers,
            mut receivers,
            ..
        } = {
            let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(
                &mut *threads,
                Threads {
                    started: true,
                    ..Threads::default()
                },
            )
        };
        let until = Instant::now() + FLUSH;
        self.links().for_each(|link| link.flush(until));
        writers.drain(..).for_each(threads::join);
        // The peer may still be sending its last: taking it in spares it errors.
        let me = thread::current().id();
        receivers.retain(|thread| thread.thread().id() != me);
        let until = Instant::now() + LINGER;
        while Instant::now() < until && receivers.iter().any(|thread| !thread.is_finished()) {
            thread::sleep(Duration::from_millis(2));
        }
        for link in self.links() {
            // Fails if the stream is gone; otherwise it wakes the receiver.
            let _ = link.stream.shutdown(Shutdown::Both);
        }
        receivers.drain(..).for_each(threads::join);
    }
}

impl Drop for RdmaTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}
