//! The sending side of the stream to one peer.

use std::io::{ErrorKind, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::errno::Errno;
use crate::transport::counters::{Counters, PeerCount};
use crate::transport::frame::{self, HEADER, HEARTBEAT, MAX_PAYLOAD};
use crate::transport::queue::{Body, Queue, part_of};
use crate::transport::{Config, LostReason, SendError, socket};

/// Parts of a frame that are sent without gathering them first.
const PARTS: usize = 8;
/// Sent with the lock held at most, so that callers do not wait long for it.
const CHUNK: usize = 256 << 10;
/// A queue larger than this gives its memory back when it has drained.
const KEEP: usize = 4 << 20;
/// How often a writer that waits for the network looks around.
const LOOK: Duration = Duration::from_millis(100);
/// Waited before a network that had room and took nothing is tried again.
const SHORT_OF_MEMORY: Duration = Duration::from_millis(1);

/// One peer's stream with its outbound queue.
#[derive(Debug)]
pub struct Link {
    peer: usize,
    /// The connection; the receiver reads from it.
    pub stream: TcpStream,
    /// What went over it.
    pub counters: Counters,
    /// Why we gave the stream up; the receiver reports it.
    pub lost: OnceLock<LostReason>,
    outbound: Mutex<Outbound>,
    changed: Condvar,
    config: Config,
}

#[derive(Debug, Default)]
struct Outbound {
    /// Bytes the network did not take yet. While there are any, new frames go behind them.
    queue: Queue,
    /// Something was sent since the last look.
    active: bool,
    /// No more frames: send what is queued until this moment, then end the stream.
    flush_until: Option<Instant>,
    ended: bool,
}

impl Link {
    pub fn new(peer: usize, stream: TcpStream, config: Config) -> Self {
        Self {
            peer,
            stream,
            counters: Counters::new(),
            lost: OnceLock::new(),
            outbound: Mutex::default(),
            changed: Condvar::new(),
            config,
        }
    }

    /// See [`crate::transport::Transport::send`].
    pub fn send(&self, class: u8, parts: &[&[u8]]) -> Result<(), SendError> {
        self.check(class, parts.iter().map(|part| part.len()).sum())?;
        self.enter(|outbound| self.push(outbound, class, parts, 0))
    }

    /// See [`crate::transport::Transport::send_together`].
    pub fn send_together(&self, class: u8, frames: &[Vec<u8>]) -> Result<(), SendError> {
        frames.iter().try_for_each(|frame| self.check(class, frame.len()))?;
        self.enter(|outbound| {
            frames.iter().enumerate().try_for_each(|(n, frame)| {
                // The network may wait for the rest before it sends a packet.
                let more = if n + 1 < frames.len() { libc::MSG_MORE } else { 0 };
                self.push(outbound, class, &[frame], more)
            })
        })
    }

    /// See [`crate::transport::Transport::send_from`]: the writer thread sends all of it.
    pub fn send_from(&self, class: u8, head: &[u8], body: &Body, part: Range<usize>) -> Result<(), SendError> {
        let part = part_of(body, part);
        let len = head.len() + part.len();
        self.check(class, len)?;
        self.enter(|outbound| {
            self.make_room(outbound, HEADER + len)?;
            outbound.queue.copy(&frame::header(class, len));
            outbound.queue.copy(head);
            outbound.queue.lend(body.clone(), part);
            outbound.active = true;
            self.counters.sent(class, HEADER + len);
            Ok(())
        })
    }

    /// That many bytes are going to be queued.
    fn make_room(&self, outbound: &Outbound, more: usize) -> Result<(), LostReason> {
        let bytes = outbound.queue.len() + more;
        if bytes > self.config.queue_limit {
            return Err(LostReason::Overrun { bytes });
        }
        if outbound.queue.is_empty() {
            self.changed.notify_one();
        }
        Ok(())
    }

    fn check(&self, class: u8, len: usize) -> Result<(), SendError> {
        let peer = self.peer;
        if len > MAX_PAYLOAD {
            return Err(SendError::TooLong { peer, len });
        }
        if class == HEARTBEAT {
            return Err(SendError::Reserved { peer });
        }
        Ok(())
    }

    /// Pushes with the queue locked; an error ends the stream.
    fn enter(&self, push: impl FnOnce(&mut Outbound) -> Result<(), LostReason>) -> Result<(), SendError> {
        let peer = self.peer;
        let mut outbound = self.lock();
        if outbound.ended || outbound.flush_until.is_some() {
            return Err(SendError::Gone { peer });
        }
        push(&mut outbound).map_err(|reason| {
            self.give_up(&mut outbound, reason);
            SendError::Gone { peer }
        })
    }

    /// Sends a frame as far as the network takes it at once and queues the rest.
    fn push(&self, outbound: &mut Outbound, class: u8, parts: &[&[u8]], flags: i32) -> Result<(), LostReason> {
        let len = parts.iter().map(|part| part.len()).sum();
        let header = frame::header(class, len);
        let mut sent = 0;
        if outbound.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS + 1];
            slices[0] = IoSlice::new(&header);
            // More parts than that are left to the queue.
            for (slice, part) in slices[1..].iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
            }
            sent = self.transmit(&slices[..parts.len().min(PARTS) + 1], flags)?;
        }
        outbound.active = true;
        if sent < HEADER + len {
            self.make_room(outbound, HEADER + len - sent)?;
            for part in std::iter::once(&header[..]).chain(parts.iter().copied()) {
                outbound.queue.copy(&part[sent.min(part.len())..]);
                sent -= sent.min(part.len());
            }
        }
        self.counters.sent(class, HEADER + len);
        Ok(())
    }

    /// Bytes the network took without waiting. `flags` of send(2) beside the ones that always hold.
    fn transmit(&self, slices: &[IoSlice<'_>], flags: i32) -> Result<usize, LostReason> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | flags;
        loop {
            match SockRef::from(&self.stream).send_vectored_with_flags(slices, flags) {
                Ok(sent) => return Ok(sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // ENOBUFS and ENOMEM: the host is short of memory for a moment; TCP goes on.
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock
                        || matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) =>
                {
                    return Ok(0);
                }
                Err(error) => return Err(LostReason::Broken(Errno::of(&error))),
            }
        }
    }

    /// Sends queued bytes and heartbeats until the stream ends: the writer thread's work.
    pub fn write_loop(&self) {
        crate::priority::raise();
        // Looking twice an interval keeps the gap between two frames below one interval.
        let interval = self.config.heartbeat / 2;
        let mut next_look = Instant::now() + interval;
        let mut refused = false;
        let mut outbound = self.lock();
        while !outbound.ended {
            if !outbound.queue.is_empty() {
                let now = Instant::now();
                if outbound.flush_until.is_some_and(|until| now >= until) {
                    break;
                }
                // What is lent is sent without the lock: nobody else sends while something is queued.
                let drained = match outbound.queue.lent() {
                    Some((head, body, range)) => {
                        drop(outbound);
                        let bytes = (*body).as_ref().get(range).unwrap_or_default();
                        let sent = self.transmit(&[IoSlice::new(&head), IoSlice::new(&bytes[..bytes.len().min(CHUNK)])], 0);
                        outbound = self.lock();
                        // If the stream has ended meanwhile, the queue is another one.
                        sent.map(|sent| if outbound.ended { 0 } else { Self::drained(&mut outbound, sent) })
                    }
                    None => self.drain(&mut outbound),
                };
                match drained {
                    Ok(sent) => {
                        drop(outbound);
                        if sent == 0 {
                            // A host short of memory refuses what poll(2) says there is room for.
                            if std::mem::replace(&mut refused, true) {
                                std::thread::sleep(SHORT_OF_MEMORY);
                            }
                            socket::wait_writable(&self.stream, LOOK);
                        } else {
                            refused = false;
                        }
                        outbound = self.lock();
                    }
                    Err(reason) => self.give_up(&mut outbound, reason),
                }
                continue;
            }
            if outbound.flush_until.is_some() {
                break;
            }
            let now = Instant::now();
            if now >= next_look {
                next_look = now + interval;
                if !std::mem::take(&mut outbound.active) {
                    if let Err(reason) = self.push(&mut outbound, HEARTBEAT, &[], 0) {
                        self.give_up(&mut outbound, reason);
                    }
                    outbound.active = false;
                }
                continue;
            }
            let wait = self.changed.wait_timeout(outbound, next_look - now);
            outbound = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        outbound.ended = true;
        // The peer reads what is under way, then sees the end. Fails if the stream is gone.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn drain(&self, outbound: &mut Outbound) -> Result<usize, LostReason> {
        let sent = self.transmit(&outbound.queue.front(CHUNK), 0)?;
        Ok(Self::drained(outbound, sent))
    }

    fn drained(outbound: &mut Outbound, sent: usize) -> usize {
        outbound.queue.sent(sent, KEEP);
        outbound.active |= sent > 0;
        sent
    }

    /// Ends the stream because of an error. The first reason counts. The receiver, woken by the
    /// end of the stream, reports it: the caller may hold locks that the handler needs.
    fn give_up(&self, outbound: &mut Outbound, reason: LostReason) {
        let _ = self.lost.set(reason);
        outbound.ended = true;
        outbound.queue = Queue::default();
        self.changed.notify_one();
        // Fails if the stream is gone; then the receiver is awake already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The receiver has seen the end: no more sending.
    pub fn end(&self) {
        let mut outbound = self.lock();
        outbound.ended = true;
        outbound.queue = Queue::default();
        self.changed.notify_one();
        // Fails if the stream is gone, which is what we want.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Refuses new frames, and lets the writer end the stream after what is queued, or at `until`.
    pub fn flush(&self, until: Instant) {
        self.lock().flush_until = Some(until);
        self.changed.notify_one();
    }

    /// The counters' present values.
    pub fn count(&self) -> PeerCount {
        self.counters.get(self.lock().queue.len())
    }

    fn lock(&self) -> MutexGuard<'_, Outbound> {
        // Nothing in here leaves the queue half changed.
        self.outbound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
