//! The transport over TCP: two streams per peer, each with a receiver and a writer thread. Frames that may take long
//! have a stream of their own, so that no other waits behind them: neither in a queue, nor in a socket's buffer, nor
//! for a lost packet, nor for the thread that takes them in.

use std::io::{self, ErrorKind, Read};
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
/// Read at once between frames that are put where they belong while they come: as little of these as pays.
const AHEAD: usize = 1024;
/// The reader of such a frame is woken once so much of it is there, or all.
const AT_ONCE: usize = 256 << 10;

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
        let (peer, long) = (self.peer, self.stream > 0);
        let mut decoder = if long { Decoder::reading(AHEAD) } else { Decoder::new() };
        let mut spin = Spin::new();
        loop {
            // Blocks nobody waits for that urgently.
            let looked = if long { None } else { spin.look(|| socket::receive_now(&self.link.stream, decoder.space())) };
            let received = looked.map(|looked| self.received(looked)).unwrap_or_else(|| {
                let received = self.wait(decoder.space());
                spin.woken();
                received
            });
            match received {
                Ok(Some(count)) => decoder.filled(count),
                Ok(None) => continue,
                Err(event) => return event,
            }
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
            if long {
                if let Err(event) = self.receive_long(&mut decoder) {
                    return event;
                }
            }
        }
    }

    /// If a frame has begun to come: has the handler read the rest of it.
    fn receive_long(&self, decoder: &mut Decoder) -> Result<(), PeerEvent> {
        let peer = self.peer;
        let Some((class, len)) = decoder.open().map_err(|reason| PeerEvent::Malformed { peer, reason })? else { return Ok(()) };
        let mut payload = Payload { receiver: self, decoder, left: len, ended: None };
        // An error is kept in `payload`.
        if !self.stopping.load(Ordering::SeqCst) {
            let _ = self.handler.long_frame(peer, class, len, &mut payload);
        }
        if payload.ended.is_none() {
            let _ = io::copy(&mut payload, &mut io::sink());
        }
        socket::wake_at(&self.link.stream, 1);
        if let Some(event) = payload.ended {
            return Err(event);
        }
        self.link.counters.received(class, HEADER + len);
        Ok(())
    }

    /// Waits for bytes of the stream. Its end is an error, and so is silence.
    fn wait(&self, into: &mut [u8]) -> Result<Option<usize>, PeerEvent> {
        for _ in 0..STEPS {
            let received = (&self.link.stream).read(into);
            match received {
                // The receive timeout.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return self.received(other),
            }
        }
        Err(self.silent())
    }

    /// The same for `into`, of which all is going to come: woken once enough is there.
    fn wait_for(&self, into: &mut [u8]) -> Result<Option<usize>, PeerEvent> {
        let stream = &self.link.stream;
        socket::wake_at(stream, into.len().min(AT_ONCE));
        for _ in 0..STEPS {
            socket::wait_readable(stream, self.silence / STEPS);
            // After all that time less is something, too.
            if let Some(result) = socket::receive_now(stream, into) {
                return self.received(result);
            }
        }
        Err(self.silent())
    }

    fn silent(&self) -> PeerEvent {
        self.lost(LostReason::Silent { millis: self.silence.as_millis() as u64 })
    }

    /// What came of reading: bytes, or `None` if it is to be tried again.
    fn received(&self, result: io::Result<usize>) -> Result<Option<usize>, PeerEvent> {
        match result {
            Ok(0) => Err(self.lost(LostReason::Closed)),
            Ok(count) => Ok(Some(count)),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => Ok(None),
            Err(error) => Err(self.lost(LostReason::Broken(Errno::of(&error)))),
        }
    }

    fn lost(&self, reason: LostReason) -> PeerEvent {
        let reason = self.link.lost.get().cloned().unwrap_or(reason);
        PeerEvent::Lost { peer: self.peer, reason }
    }
}

/// The payload of a frame that is still coming.
struct Payload<'a> {
    receiver: &'a Receiver,
    /// What has come already is in here.
    decoder: &'a mut Decoder,
    left: usize,
    ended: Option<PeerEvent>,
}

impl Read for Payload<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len().min(self.left);
        let into = &mut into[..most];
        let mut count = self.decoder.take(into);
        while count == 0 && most > 0 {
            match self.receiver.wait_for(into) {
                Ok(some) => count = some.unwrap_or(0),
                Err(event) => {
                    self.ended = Some(event);
                    return Err(ErrorKind::UnexpectedEof.into());
                }
            }
        }
        self.left -= count;
        Ok(count)
    }
}
