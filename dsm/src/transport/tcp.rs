//! The transport over TCP: two streams per peer, each with a receiver and a writer thread. Frames that may take long
//! have a stream of their own, so that no other waits behind them: neither in a queue, nor in a socket's buffer, nor
//! for a lost packet, nor for the thread that takes them in.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::errno::Errno;
use crate::transport::counters::PeerCount;
use crate::transport::ends::Ends;
use crate::transport::frame::{Decoder, HEADER, HEARTBEAT};
use crate::transport::link::Link;
use crate::spin::Spin;
use crate::transport::threads::{FLUSH, LINGER, join, spawn};
use crate::transport::{Body, Handler, LostReason, PeerEvent, SendError, Transport, TransportError, socket};

/// Silence is counted in this many steps, so that a host that stood still for a while itself (a
/// debugger, a paused virtual host) does not take that for silence of its peers.
const STEPS: u32 = 9;

/// Times and limits of a transport. All nodes should have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// A heartbeat goes out after at most this long without a frame.
    pub heartbeat: Duration,
    /// A peer that was not heard of for this long is lost. Several times the heartbeat, and
    /// longer than a network may fail.
    pub silence: Duration,
    /// Bytes that may wait for a peer before it counts as lost.
    pub queue_limit: usize,
}

impl Default for Config {
    /// 500 ms, 4.2 s, 1 GiB: a network that fails for 2 s only stalls the machine.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(500),
            silence: Duration::from_millis(4200),
            queue_limit: 1 << 30,
        }
    }
}

/// The streams to one peer.
#[derive(Debug)]
pub struct Streams {
    /// For all frames in their order.
    pub messages: TcpStream,
    /// For those of [`Transport::send_from`]; without it they go among the others.
    pub blocks: Option<TcpStream>,
}

impl From<TcpStream> for Streams {
    fn from(messages: TcpStream) -> Self {
        Streams { messages, blocks: None }
    }
}

/// TCP streams to all peers.
///
/// The threads keep the [`Handler`] alive until [`Transport::shutdown`], which has to be called if
/// the handler owns this transport.
#[derive(Debug)]
pub struct TcpTransport {
    peers: Vec<Option<Peer>>,
    config: Config,
    stopping: Arc<AtomicBool>,
    threads: Mutex<Threads>,
}

#[derive(Debug)]
struct Peer {
    messages: Arc<Link>,
    blocks: Option<Arc<Link>>,
    ends: Arc<Ends>,
}

impl Peer {
    fn new(peer: usize, streams: Streams, config: Config) -> Result<Self, TransportError> {
        // Zero would mean no timeout.
        let step = (config.silence / STEPS).max(Duration::from_millis(1));
        let link = |stream: TcpStream| {
            socket::prepare(&stream, step).map_err(|(option, errno)| TransportError::Option { peer, option, errno })?;
            Ok(Arc::new(Link::new(peer, stream, config)))
        };
        let (messages, blocks) = (link(streams.messages)?, streams.blocks.map(link).transpose()?);
        let ends = Arc::new(Ends::new(std::iter::once(&messages).chain(&blocks).cloned().collect()));
        Ok(Peer { messages, blocks, ends })
    }

    /// The one with the messages first.
    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        std::iter::once(&self.messages).chain(&self.blocks)
    }
}

#[derive(Debug, Default)]
struct Threads {
    started: bool,
    writers: Vec<JoinHandle<()>>,
    receivers: Vec<JoinHandle<()>>,
}

impl TcpTransport {
    /// Takes over connected, authenticated streams: `peers[i]` leads to node `i`; `None` at this
    /// node's own place. Frames can be sent at once; they are received after [`Transport::start`].
    ///
    /// # Errors
    /// A stream that refuses an option.
    pub fn new<S: Into<Streams>>(peers: Vec<Option<S>>, config: Config) -> Result<Self, TransportError> {
        let peers = peers.into_iter().enumerate();
        let peers = peers.map(|(peer, streams)| streams.map(|streams| Peer::new(peer, streams.into(), config)).transpose());
        Ok(Self {
            peers: peers.collect::<Result<_, _>>()?,
            config,
            stopping: Arc::default(),
            threads: Mutex::default(),
        })
    }

    fn peer(&self, number: usize) -> Result<&Peer, SendError> {
        self.peers.get(number).and_then(Option::as_ref).ok_or(SendError::NoPeer { peer: number })
    }

    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.peers.iter().flatten().flat_map(Peer::links)
    }

    fn start_threads(&self, threads: &mut Threads, handler: &Arc<dyn Handler>) -> Result<(), TransportError> {
        for (number, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            for (stream, link) in peer.links().enumerate() {
                let writer = Arc::clone(link);
                let name = |what: &str| format!("dsm-{what}-{number}{}", ["", "b"][stream]);
                threads.writers.push(spawn(name("send"), move || writer.write_loop())?);
                let receiver = Receiver {
                    peer: number,
                    stream,
                    link: Arc::clone(link),
                    ends: Arc::clone(&peer.ends),
                    handler: Arc::clone(handler),
                    stopping: Arc::clone(&self.stopping),
                    silence: self.config.silence,
                };
                threads.receivers.push(spawn(name("recv"), move || receiver.run())?);
            }
        }
        Ok(())
    }
}

impl Transport for TcpTransport {
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
        let peer = self.peer(to)?;
        peer.blocks.as_ref().unwrap_or(&peer.messages).send_from(class, head, body, part)
    }

    fn count(&self, peer: usize) -> PeerCount {
        let links = self.peers.get(peer).into_iter().flatten().flat_map(Peer::links);
        links.map(|link| link.count()).reduce(PeerCount::plus).unwrap_or_default()
    }

    fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let mut threads = {
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
        threads.writers.drain(..).for_each(join);
        // Closing with bytes unread would reset the connection under the last frames of ours that
        // the peer has not read: read on until it ends, too.
        let me = thread::current().id();
        threads.receivers.retain(|thread| thread.thread().id() != me);
        let until = Instant::now() + LINGER;
        while Instant::now() < until && threads.receivers.iter().any(|thread| !thread.is_finished()) {
            thread::sleep(Duration::from_millis(2));
        }
        for peer in self.peers.iter().flatten() {
            peer.ends.over();
            for link in peer.links() {
                // Fails if the stream is gone; otherwise it wakes the receiver.
                let _ = link.stream.shutdown(Shutdown::Both);
            }
        }
        threads.receivers.drain(..).for_each(join);
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}

struct Receiver {
    peer: usize,
    /// 0: the one with the messages.
    stream: usize,
    link: Arc<Link>,
    ends: Arc<Ends>,
    handler: Arc<dyn Handler>,
    stopping: Arc<AtomicBool>,
    silence: Duration,
}

impl Receiver {
    fn run(&self) {
        crate::priority::raise();
        let event = self.receive();
        let last = self.ends.end(self.stream, event, self.silence);
        if let Some(event) = last.filter(|_| !self.stopping.load(Ordering::SeqCst)) {
            self.handler.event(event);
        }
    }

    /// Hands frames on until the stream ends.
    fn receive(&self) -> PeerEvent {
        let peer = self.peer;
        let lost = |reason| PeerEvent::Lost {
            peer,
            reason: self.link.lost.get().cloned().unwrap_or(reason),
        };
        let mut decoder = Decoder::new();
        let mut silent_steps = 0;
        let mut spin = Spin::new();
        loop {
            // Blocks nobody waits for that urgently.
            let looked = if self.stream == 0 { spin.look(|| socket::receive_now(&self.link.stream, decoder.space())) } else { None };
            let received = looked.unwrap_or_else(|| {
                let received = (&self.link.stream).read(decoder.space());
                spin.woken();
                received
            });
            match received {
                Ok(0) => return lost(LostReason::Closed),
                Ok(count) => decoder.filled(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // The receive timeout.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    silent_steps += 1;
                    if silent_steps >= STEPS {
                        let millis = self.silence.as_millis() as u64;
                        return lost(LostReason::Silent { millis });
                    }
                    continue;
                }
                Err(error) => return lost(LostReason::Broken(Errno::of(&error))),
            }
            silent_steps = 0;
            loop {
                match decoder.next() {
                    Ok(None) => break,
                    Ok(Some((class, payload))) => {
                        self.link.counters.received(class, HEADER + payload.len());
                        if class != HEARTBEAT && !self.stopping.load(Ordering::SeqCst) {
                            self.handler.frame(peer, class, payload);
                        }
                    }
                    Err(reason) => return PeerEvent::Malformed { peer, reason },
                }
            }
        }
    }
}
