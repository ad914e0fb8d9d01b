//! The receiving side of one of the queue pairs to a peer: a thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::credits;
use super::link::{self, Link};
use super::patience::Patience;
use super::verbs::Completion;
use crate::errno::Errno;
use crate::transport::ends::Ends;
use crate::transport::frame::{Decoder, HEADER, HEARTBEAT, Malformed};
use crate::transport::{Handler, LostReason, PeerEvent};

/// As for TCP: silence is counted in steps, so that a host that stood still itself does not take that
/// for silence of its peers.
const STEPS: u32 = 9;
/// Messages taken from the device at once.
const BATCH: usize = 16;

/// What a receiver thread has.
pub struct Receiver {
    pub peer: usize,
    /// 0: the queue pair with the messages.
    pub number: usize,
    pub link: Arc<Link>,
    pub ends: Arc<Ends<Link>>,
    pub handler: Arc<dyn Handler>,
    pub stopping: Arc<AtomicBool>,
    pub silence: Duration,
}

/// What waiting came to.
enum Wait {
    /// Look for messages again.
    Look,
    /// Nothing for a step.
    Nothing,
    /// The connection beside has ended, or this node has ended the link.
    Ended(LostReason),
}

impl Receiver {
    /// Hands frames on until the stream ends, and then tells how it did, if it is the peer's last.
    pub fn run(&self) {
        crate::priority::raise();
        let event = self.receive();
        let last = self.ends.end(self.number, event, self.silence);
        if let Some(event) = last.filter(|_| !self.stopping.load(Ordering::SeqCst)) {
            self.handler.event(event);
        }
    }

    fn receive(&self) -> PeerEvent {
        let mut decoder = Decoder::new();
        let mut patience = match self.number {
            0 => Patience::new(std::thread::available_parallelism().map_or(1, usize::from)),
            _ => Patience::none(),
        };
        let mut batch = [Completion::default(); BATCH];
        let mut silent_steps = 0;
        let mut idle_since = None;
        let mut ended = None;
        let mut armed = false;
        loop {
            let count = match self.link.end.poll_received(&mut batch) {
                Ok(count) => count,
                Err(errno) => return self.lost(LostReason::Broken(errno)),
            };
            if count > 0 {
                (silent_steps, armed) = (0, false);
                if let Some(since) = idle_since.take() {
                    patience.waited(Instant::elapsed(&since));
                }
                for completion in &batch[..count] {
                    if let Err(event) = self.take(completion, &mut decoder) {
                        return event;
                    }
                }
                self.link.advance();
                continue;
            }
            if let Some(reason) = ended {
                return self.lost(reason);
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            if since.elapsed() < patience.look() {
                std::hint::spin_loop();
                continue;
            }
            if !armed {
                if let Err(errno) = self.link.end.arm() {
                    return self.lost(LostReason::Broken(errno));
                }
                // Messages that came before tell of themselves to nobody: look once more.
                armed = true;
                continue;
            }
            armed = false;
            match self.sleep() {
                Ok(Wait::Look) => {}
                Ok(Wait::Nothing) => {
                    silent_steps += 1;
                    if silent_steps >= STEPS {
                        return self.lost(LostReason::Silent {
                            millis: self.silence.as_millis() as u64,
                        });
                    }
                }
                // What the peer sent before it ended has come, since it waited for that.
                Ok(Wait::Ended(reason)) => ended = Some(reason),
                Err(errno) => return self.lost(LostReason::Broken(errno)),
            }
        }
    }

    /// A message: its bytes are copied out, its slot given back, its frames handed on.
    fn take(&self, completion: &Completion, decoder: &mut Decoder) -> Result<(), PeerEvent> {
        let peer = self.peer;
        if let Some(failure) = completion.failure {
            return Err(self.lost(self.link.cause().unwrap_or_else(|| link::reason(failure))));
        }
        let malformed = |reason| PeerEvent::Malformed { peer, reason };
        let (len, count) = credits::parse(completion.immediate).map_err(malformed)?;
        let slot = self.link.next_slot();
        let mut at = 0;
        while at < len {
            let space = decoder.space();
            let now = space.len().min(len - at);
            self.link.end.landed(slot, at, &mut space[..now]);
            at += now;
            decoder.filled(now);
            if at < len {
                // No room for the rest before what is there has been handed on.
                self.hand_on(decoder).map_err(malformed)?;
            }
        }
        self.link
            .end
            .post_receive()
            .map_err(|errno| self.lost(LostReason::Broken(errno)))?;
        self.link.taken(count).map_err(malformed)?;
        self.hand_on(decoder).map_err(malformed)
    }

    fn hand_on(&self, decoder: &mut Decoder) -> Result<(), Malformed> {
        while let Some((class, payload)) = decoder.next()? {
            self.link.counters.received(class, HEADER + payload.len());
            if class != HEARTBEAT && !self.stopping.load(Ordering::SeqCst) {
                self.handler.frame(self.peer, class, payload);
            }
        }
        Ok(())
    }

    /// Sleeps until the armed device has a message, the connection beside or the link ends, or a step is over.
    fn sleep(&self) -> Result<Wait, Errno> {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut entries = [
            entry(self.link.end.event_fd().as_raw_fd()),
            entry(self.link.beside.as_raw_fd()),
            entry(self.link.over.as_raw_fd()),
        ];
        // Zero would mean no wait.
        let step = (self.silence / STEPS).max(Duration::from_millis(1)).as_millis();
        let count = entries.len() as libc::nfds_t;
        // SAFETY: the pointer and the count describe the entries, whose descriptors are open.
        let ready = unsafe { libc::poll(entries.as_mut_ptr(), count, i32::try_from(step).unwrap_or(i32::MAX)) };
        if ready == 0 {
            return Ok(Wait::Nothing);
        }
        if ready < 0 {
            let errno = Errno::last();
            return if errno.0 == libc::EINTR {
                Ok(Wait::Look)
            } else {
                Err(errno)
            };
        }
        if entries[0].revents != 0 {
            self.link.end.clear_events();
        }
        // Whoever ended the link knows why: `lost`, or the receiver of the other one.
        let over = (entries[2].revents != 0).then_some(LostReason::Closed);
        let beside = || {
            if entries[1].revents != 0 {
                self.link.beside.ended()
            } else {
                None
            }
        };
        Ok(over.or_else(beside).map_or(Wait::Look, Wait::Ended))
    }

    /// The first reason counts.
    fn lost(&self, reason: LostReason) -> PeerEvent {
        PeerEvent::Lost {
            peer: self.peer,
            reason: self.link.lost.get().cloned().unwrap_or(reason),
        }
    }
}
