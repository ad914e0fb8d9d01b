//! The transport over RDMA (RoCE version 2): two reliable connections per peer. Frames that may take long have a
//! queue pair of their own, with rings, credits and threads of its own, so that no other waits behind them.
//!
//! The frames on either are a stream of bytes, as over TCP. The stream goes in messages of up to a slot
//! ([`credits::SLOT`]), each an RDMA write with immediate from a registered staging ring here straight into
//! the landing ring over there; small ones are handed to the device together with the request. The
//! receiver, woken by the immediate, copies the message out *before* it looks at it: the peer may write
//! into the ring at any time. Nothing is registered after the connection is made.
//!
//! Whatever the peer sends is checked: the length against the slot, the count against what was sent, the
//! frames as those of any stream. The slot itself follows from the order, so no address comes from a peer.
//!
//! The TCP connection over which the ends were described stays open beside both: it ends with the peer's
//! process, which shows its end at once.

mod abi;
mod beside;
mod connect;
mod credits;
mod device;
mod exchange;
mod link;
mod patience;
mod receive;
mod ring;
mod verbs;

use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use connect::RdmaError;
pub use device::RdmaPort;
pub use exchange::BadDescription;
pub use verbs::VerbsError;

use crate::transport::counters::PeerCount;
use crate::transport::ends::Ends;
use crate::transport::threads::{self, FLUSH, LINGER};
use crate::transport::{Body, Config, Handler, SendError, Transport, TransportError};
use beside::Beside;
use link::Link;
use receive::Receiver;
use verbs::Endpoint;

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
    peers: Vec<Option<Peer>>,
    config: Config,
    stopping: Arc<AtomicBool>,
    threads: Mutex<Threads>,
}

#[derive(Debug)]
struct Peer {
    /// For all frames in their order.
    messages: Arc<Link>,
    /// For those of [`Transport::send_from`].
    blocks: Arc<Link>,
    beside: Arc<Beside>,
    ends: Arc<Ends<Link>>,
}

impl Peer {
    /// Of connected ends, for messages and blocks, that were described over `stream`.
    fn new(number: usize, stream: TcpStream, ends: [Endpoint; 2], config: Config) -> Result<Self, VerbsError> {
        let beside = Arc::new(Beside::new(stream, ends.len()));
        let link = |end| Ok(Arc::new(Link::new(number, end, Arc::clone(&beside), config)?));
        let [messages, blocks] = ends;
        let (messages, blocks) = (link(messages)?, link(blocks)?);
        let ends = Arc::new(Ends::new(vec![Arc::clone(&messages), Arc::clone(&blocks)]));
        Ok(Self {
            messages,
            blocks,
            beside,
            ends,
        })
    }

    /// The one with the messages first.
    fn links(&self) -> [&Arc<Link>; 2] {
        [&self.messages, &self.blocks]
    }
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
        Ok(Self {
            peers: connect::connect(peers, config)?,
            config,
            stopping: Arc::default(),
            threads: Mutex::default(),
        })
    }

    fn peer(&self, number: usize) -> Result<&Peer, SendError> {
        self.peers
            .get(number)
            .and_then(Option::as_ref)
            .ok_or(SendError::NoPeer { peer: number })
    }

    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.peers.iter().flatten().flat_map(Peer::links)
    }

    fn start_threads(&self, threads: &mut Threads, handler: &Arc<dyn Handler>) -> Result<(), TransportError> {
        for (number, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            for (pair, link) in peer.links().into_iter().enumerate() {
                let name = |what: &str| format!("rdma-{what}-{number}{}", ["", "b"][pair]);
                let writer = Arc::clone(link);
                threads
                    .writers
                    .push(threads::spawn(name("send"), move || writer.write_loop())?);
                let receiver = Receiver {
                    peer: number,
                    number: pair,
                    link: Arc::clone(link),
                    ends: Arc::clone(&peer.ends),
                    handler: Arc::clone(handler),
                    stopping: Arc::clone(&self.stopping),
                    silence: self.config.silence,
                };
                threads
                    .receivers
                    .push(threads::spawn(name("recv"), move || receiver.run())?);
            }
        }
        Ok(())
    }
}

impl Transport for RdmaTransport {
    fn start(&self, handler: Arc<dyn Handler>) -> Result<(), TransportError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut threads.started, true) {
            return Err(TransportError::Started);
        }
        let result = self.start_threads(&mut threads, &handler);
        drop(threads);
        if result.is_err() {
            self.shutdown();
        }
        result
    }

    fn send(&self, to: usize, class: u8, parts: &[&[u8]]) -> Result<(), SendError> {
        self.peer(to)?.messages.send(class, parts)
    }

    fn send_together(&self, to: usize, class: u8, frames: &[Vec<u8>]) -> Result<(), SendError> {
        self.peer(to)?.messages.send_together(class, frames)
    }

    fn send_from(&self, to: usize, class: u8, head: &[u8], body: &Body, part: Range<usize>) -> Result<(), SendError> {
        self.peer(to)?.blocks.send_from(class, head, body, part)
    }

    fn count(&self, peer: usize) -> PeerCount {
        let links = self.peers.get(peer).into_iter().flatten().flat_map(Peer::links);
        links
            .map(|link| link.count())
            .reduce(PeerCount::plus)
            .unwrap_or_default()
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
        for peer in self.peers.iter().flatten() {
            peer.ends.over();
            peer.beside.end();
        }
        receivers.drain(..).for_each(threads::join);
    }
}

impl Drop for RdmaTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}
