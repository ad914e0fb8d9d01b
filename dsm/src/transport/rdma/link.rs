//! The sending side of one of the queue pairs to a peer.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::beside::Beside;
use super::credits::{self, Credits, SLOT};
use super::verbs::{Completion, Endpoint, Failure, VerbsError};
use crate::errno::Errno;
use crate::transport::counters::{Counters, PeerCount};
use crate::transport::ends;
use crate::transport::frame::{self, HEADER, HEARTBEAT, MAX_PAYLOAD, Malformed};
use crate::transport::queue::{Body, Queue, part_of};
use crate::transport::{Config, LostReason, SendError};

/// A queue larger than this gives its memory back when it has drained.
const KEEP: usize = 4 << 20;
/// Slots filled with the lock held at most, so that who sends does not wait long for it.
const AT_ONCE: usize = 4;
/// How often the writer looks whether a queue that waits for the device has moved. What waits for the
/// peer is sent by the receiver, which hears of the room first.
const LOOK: Duration = Duration::from_millis(5);

/// A queue pair with its outbound queue.
#[derive(Debug)]
pub struct Link {
    peer: usize,
    /// This end.
    pub end: Endpoint,
    /// The connection beside all of the peer's links.
    pub beside: Arc<Beside>,
    /// Readable once nothing is sent any more, for the receiver.
    pub over: EventFd,
    /// What went over the link.
    pub counters: Counters,
    /// Why we gave it up; the receiver reports it.
    pub lost: OnceLock<LostReason>,
    outbound: Mutex<Outbound>,
    changed: Condvar,
    config: Config,
}

#[derive(Debug)]
struct Outbound {
    credits: Credits,
    /// Messages that the device is through with: their staging slots are free.
    retired: u64,
    /// Bytes of frames that found no slot, or that the writer is to send. While there are any, new frames go
    /// behind them.
    queue: Queue,
    /// Something was sent since the last look.
    active: bool,
    /// No more frames: send what is queued until this moment, then end the stream.
    flush_until: Option<Instant>,
    ended: bool,
}

/// Staged bytes of a message that is not sent yet. It never outlives the lock on the queue.
#[derive(Default)]
struct Open(usize);

impl Outbound {
    fn new(slots: u16) -> Self {
        Self {
            credits: Credits::new(slots),
            retired: 0,
            queue: Queue::default(),
            active: false,
            flush_until: None,
            ended: false,
        }
    }

    /// Staging slots that the device still needs.
    fn under_way(&self) -> u64 {
        self.credits.sent() - self.retired
    }
}

impl Link {
    /// Over `end`, which is connected.
    ///
    /// # Errors
    /// No event descriptor.
    pub fn new(peer: usize, end: Endpoint, beside: Arc<Beside>, config: Config) -> Result<Self, VerbsError> {
        let over = EventFd::new(EFD_NONBLOCK).map_err(|error| VerbsError::Call {
            call: "eventfd",
            errno: Errno::of(&error),
        })?;
        let outbound = Mutex::new(Outbound::new(end.slots()));
        Ok(Self {
            peer,
            end,
            beside,
            over,
            counters: Counters::new(),
            lost: OnceLock::new(),
            outbound,
            changed: Condvar::new(),
            config,
        })
    }

    /// See [`crate::transport::Transport::send`].
    pub fn send(&self, class: u8, parts: &[&[u8]]) -> Result<(), SendError> {
        self.check(class, parts.iter().map(|part| part.len()).sum())?;
        self.enter(|outbound, open| self.put_frame(outbound, open, class, parts))
    }

    /// See [`crate::transport::Transport::send_together`].
    pub fn send_together(&self, class: u8, frames: &[Vec<u8>]) -> Result<(), SendError> {
        frames.iter().try_for_each(|frame| self.check(class, frame.len()))?;
        self.enter(|outbound, open| {
            frames
                .iter()
                .try_for_each(|frame| self.put_frame(outbound, open, class, &[frame]))
        })
    }

    /// See [`crate::transport::Transport::send_from`]: the writer thread copies the body into the ring, and the
    /// receiver what finds room later.
    pub fn send_from(&self, class: u8, head: &[u8], body: &Body, part: Range<usize>) -> Result<(), SendError> {
        let part = part_of(body, part);
        let len = head.len() + part.len();
        self.check(class, len)?;
        self.enter(|outbound, _| {
            let was_empty = outbound.queue.is_empty();
            outbound.queue.copy(&frame::header(class, len));
            outbound.queue.copy(head);
            outbound.queue.lend(body.clone(), part);
            self.accepted(outbound, was_empty, class, len)
        })
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

    /// Puts frames with the queue locked, and sends off the last message; an error ends the stream.
    fn enter(&self, put: impl FnOnce(&mut Outbound, &mut Open) -> Result<(), LostReason>) -> Result<(), SendError> {
        let peer = self.peer;
        let mut outbound = self.lock();
        if outbound.ended || outbound.flush_until.is_some() {
            return Err(SendError::Gone { peer });
        }
        let mut open = Open::default();
        let result = put(&mut outbound, &mut open).and_then(|()| self.close(&mut outbound, &mut open));
        result.map_err(|reason| {
            self.give_up(&mut outbound, reason);
            SendError::Gone { peer }
        })
    }

    fn put_frame(
        &self,
        outbound: &mut Outbound,
        open: &mut Open,
        class: u8,
        parts: &[&[u8]],
    ) -> Result<(), LostReason> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let header = frame::header(class, len);
        let was_empty = outbound.queue.is_empty();
        for part in std::iter::once(&header[..]).chain(parts.iter().copied()) {
            let rest = if outbound.queue.is_empty() {
                self.put(outbound, open, part)?
            } else {
                part
            };
            outbound.queue.copy(rest);
        }
        self.accepted(outbound, was_empty, class, len)
    }

    /// A frame is in slots and, as far as those did not do, in the queue, which `was_empty` before.
    fn accepted(&self, outbound: &mut Outbound, was_empty: bool, class: u8, len: usize) -> Result<(), LostReason> {
        if outbound.queue.len() > self.config.queue_limit {
            return Err(LostReason::Overrun {
                bytes: outbound.queue.len(),
            });
        }
        if was_empty && !outbound.queue.is_empty() {
            self.changed.notify_one();
        }
        outbound.active = true;
        self.counters.sent(class, HEADER + len);
        Ok(())
    }

    /// Puts bytes into slots, sending off those that are full, as far as there are slots: the rest.
    fn put<'a>(&self, outbound: &mut Outbound, open: &mut Open, mut bytes: &'a [u8]) -> Result<&'a [u8], LostReason> {
        while !bytes.is_empty() && self.has_slot(outbound)? {
            let (now, later) = bytes.split_at(bytes.len().min(SLOT - open.0));
            self.end.stage(outbound.credits.next_to_send(), open.0, now);
            open.0 += now.len();
            bytes = later;
            if open.0 == SLOT {
                self.close(outbound, open)?;
            }
        }
        Ok(bytes)
    }

    /// Sends off what is staged, if anything is.
    fn close(&self, outbound: &mut Outbound, open: &mut Open) -> Result<(), LostReason> {
        if open.0 > 0 {
            self.post(outbound, std::mem::take(&mut open.0))?;
        }
        Ok(())
    }

    /// Whether the next slot is free, here and at the peer.
    fn has_slot(&self, outbound: &mut Outbound) -> Result<bool, LostReason> {
        let slots = u64::from(self.end.slots());
        if outbound.under_way() >= slots / 2 {
            self.retire(outbound)?;
        }
        Ok(outbound.credits.may_send() && outbound.under_way() < slots)
    }

    fn post(&self, outbound: &mut Outbound, len: usize) -> Result<(), LostReason> {
        let (slot, count) = outbound.credits.send();
        self.end
            .post_write(slot, len, credits::immediate(len, count))
            .map_err(LostReason::Broken)
    }

    /// Takes note of what the device is through with.
    fn retire(&self, outbound: &mut Outbound) -> Result<(), LostReason> {
        let mut completions = [Completion::default(); 16];
        loop {
            let count = self.end.poll_sent(&mut completions).map_err(LostReason::Broken)?;
            if let Some(failure) = completions[..count].iter().find_map(|completion| completion.failure) {
                return Err(reason(failure));
            }
            outbound.retired += count as u64;
            if count < completions.len() {
                return Ok(());
            }
        }
    }

    /// The receiver has copied a message out of its slot and will take one more; `count` came with it.
    ///
    /// # Errors
    /// A count that can't be.
    pub fn taken(&self, count: u16) -> Result<(), Malformed> {
        self.lock().credits.receive(count)
    }

    /// The slot that the next message to come is in.
    pub fn next_slot(&self) -> usize {
        self.lock().credits.next_slot()
    }

    /// Sends what has found room, and tells the peer of its own, if it should know. The receiver calls this
    /// when it has handed on what came, and so do those who wait.
    pub fn advance(&self) {
        let mut outbound = self.lock();
        let result = loop {
            if outbound.ended {
                return;
            }
            match self.drain(&mut outbound) {
                Ok(true) => outbound = self.let_others(outbound),
                other => break other,
            }
        };
        let result = result.and_then(|_| {
            if outbound.credits.update_due() && self.may_update(&mut outbound)? {
                self.post(&mut outbound, 0)?;
                outbound.active = true;
            }
            Ok(())
        });
        if let Err(reason) = result {
            self.give_up(&mut outbound, reason);
        }
    }

    fn may_update(&self, outbound: &mut Outbound) -> Result<bool, LostReason> {
        self.retire(outbound)?;
        Ok(outbound.credits.may_update() && outbound.under_way() < u64::from(self.end.slots()))
    }

    /// Lets go of the lock for a moment.
    fn let_others<'a>(&'a self, outbound: MutexGuard<'a, Outbound>) -> MutexGuard<'a, Outbound> {
        drop(outbound);
        thread::yield_now();
        self.lock()
    }

    /// Fills free slots with what is queued: [`AT_ONCE`]. Whether there is more to do, with the lock taken anew.
    fn drain(&self, outbound: &mut Outbound) -> Result<bool, LostReason> {
        let (mut open, mut filled) = (Open::default(), 0);
        while !outbound.queue.is_empty() && self.has_slot(outbound)? {
            if filled == AT_ONCE {
                return Ok(true);
            }
            let (slot, begin) = (outbound.credits.next_to_send(), open.0);
            for bytes in outbound.queue.front(SLOT - begin) {
                self.end.stage(slot, open.0, &bytes);
                open.0 += bytes.len();
            }
            outbound.queue.sent(open.0 - begin, KEEP);
            outbound.active = true;
            if open.0 == SLOT {
                self.close(outbound, &mut open)?;
                filled += 1;
            }
        }
        self.close(outbound, &mut open)?;
        Ok(false)
    }

    /// Sends the peer a first message without content, to see whether the way is open.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn greet(&self) -> Result<(), LostReason> {
        self.post(&mut self.lock(), 0)
    }

    /// Sends heartbeats, and queued frames at the end of the stream: the writer thread's work.
    pub fn write_loop(&self) {
        crate::priority::raise();
        // Looking twice an interval keeps the gap between two frames below one interval.
        let interval = self.config.heartbeat / 2;
        let mut next_look = Instant::now() + interval;
        let mut outbound = self.lock();
        while !outbound.ended {
            let now = Instant::now();
            let flushing = outbound.flush_until.is_some();
            let result = if now >= next_look || flushing || !outbound.queue.is_empty() {
                // An error of the device shows in what was sent.
                self.retire(&mut outbound).and_then(|()| self.drain(&mut outbound))
            } else {
                Ok(false)
            };
            let more = match result {
                Ok(more) => more,
                Err(reason) => {
                    self.give_up(&mut outbound, reason);
                    break;
                }
            };
            if let Some(until) = outbound.flush_until {
                let through = outbound.queue.is_empty() && outbound.under_way() == 0;
                if through || now >= until {
                    break;
                }
            }
            if more {
                outbound = self.let_others(outbound);
                continue;
            }
            if now >= next_look {
                next_look = now + interval;
                if !std::mem::take(&mut outbound.active) && !flushing {
                    let mut open = Open::default();
                    let result = self
                        .put_frame(&mut outbound, &mut open, HEARTBEAT, &[])
                        .and_then(|()| self.close(&mut outbound, &mut open));
                    if let Err(reason) = result {
                        self.give_up(&mut outbound, reason);
                        break;
                    }
                    outbound.active = false;
                }
            }
            let busy = flushing || !outbound.queue.is_empty();
            let wait = if busy {
                LOOK.min(interval)
            } else {
                next_look.saturating_duration_since(now)
            };
            outbound = self
                .changed
                .wait_timeout(outbound, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        outbound.ended = true;
        self.beside.through();
    }

    /// Ends the stream because of an error. The first reason counts. The receiver, which this wakes, reports it:
    /// the caller may hold locks that the handler needs.
    fn give_up(&self, outbound: &mut Outbound, reason: LostReason) {
        let _ = self.lost.set(reason);
        self.finish(outbound);
    }

    fn finish(&self, outbound: &mut Outbound) {
        outbound.ended = true;
        outbound.queue = Queue::default();
        self.changed.notify_one();
        // Fails if it is more than readable already.
        let _ = self.over.write(1);
    }

    /// Why the device broke the connection, as what was sent tells; to be asked when something failed.
    pub fn cause(&self) -> Option<LostReason> {
        let mut outbound = self.lock();
        if outbound.ended {
            None
        } else {
            self.retire(&mut outbound).err()
        }
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

impl ends::Link for Link {
    fn end(&self) {
        self.finish(&mut self.lock());
        // The peer has to see it, too.
        self.beside.end();
    }
}

/// What a failed request says of the peer.
pub fn reason(failure: Failure) -> LostReason {
    LostReason::Broken(match failure {
        Failure::Unanswered => Errno(libc::ETIMEDOUT),
        Failure::Flushed => Errno(libc::ENOTCONN),
        Failure::Other(_) => Errno(libc::EIO),
    })
}
