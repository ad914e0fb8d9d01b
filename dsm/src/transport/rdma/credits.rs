//! Who may write how many slots of whose landing ring.
//!
//! Each direction has a ring of slots, used in order. A slot may be written again once the
//! receiver has copied it out, which it tells by a count in every message that goes back. Where none
//! goes back, an *update*, a message without content, carries the count.
//!
//! The last free slot is for updates alone, so that both sides can't wait for each other: at the moment
//! both had no slot left and nothing was under way, each side's last message would have been sent after
//! the other's last had come (without what that told, it would have had one slot less), which is a circle.
//! With one slot left, a side that waits has everything of its own copied out over there, so the other
//! side owes an update and sends it, or has no slot itself, and then gets an update from here.

use crate::transport::Malformed;

/// Bytes of a slot: a page with its header, or many small messages, fit.
pub const SLOT: usize = 16 << 10;

/// Both directions' counts, of messages since the start.
#[derive(Clone, Debug)]
pub struct Credits {
    /// Of either ring.
    slots: u64,
    sent: u64,
    /// Of `sent`, copied out by the peer as far as it has told.
    taken: u64,
    received: u64,
    /// Of `received`, as far as the peer was told.
    told: u64,
}

impl Credits {
    /// For rings of so many slots, both of them empty.
    pub fn new(slots: u16) -> Self {
        debug_assert!(slots >= 4);
        Self {
            slots: u64::from(slots),
            sent: 0,
            taken: 0,
            received: 0,
            told: 0,
        }
    }

    /// Whether a message with content may be sent.
    pub fn may_send(&self) -> bool {
        self.sent - self.taken < self.slots - 1
    }

    /// Whether an update may be sent.
    pub fn may_update(&self) -> bool {
        self.sent - self.taken < self.slots
    }

    /// Whether the peer should be told what was copied out: a quarter of the ring.
    pub fn update_due(&self) -> bool {
        self.received - self.told >= self.slots / 4
    }

    /// A message leaves: its slot, and the count it has to carry.
    pub fn send(&mut self) -> (usize, u16) {
        debug_assert!(self.may_update());
        let slot = self.next_to_send();
        self.sent += 1;
        self.told = self.received;
        (slot, self.received as u16)
    }

    /// Messages sent so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The slot that the next message to be sent goes into.
    pub fn next_to_send(&self) -> usize {
        (self.sent % self.slots) as usize
    }

    /// The slot that the next message to come is in.
    pub fn next_slot(&self) -> usize {
        (self.received % self.slots) as usize
    }

    /// A message that carried `count` was copied out of its slot.
    ///
    /// # Errors
    /// A count of more than was sent: the peer is broken.
    pub fn receive(&mut self, count: u16) -> Result<(), Malformed> {
        let more = u64::from(count.wrapping_sub(self.taken as u16));
        if more > self.sent - self.taken {
            return Err(Malformed::Count);
        }
        self.taken += more;
        self.received += 1;
        Ok(())
    }
}

/// The immediate of a message: its length and the count.
pub fn immediate(len: usize, count: u16) -> u32 {
    debug_assert!(len <= SLOT);
    u32::from(count) << 16 | len as u32
}

/// Length and count out of the immediate of a message that came; without one it is none of ours.
///
/// # Errors
/// A message that can't be.
pub fn parse(immediate: Option<u32>) -> Result<(usize, u16), Malformed> {
    let immediate = immediate.ok_or(Malformed::Bare)?;
    let (len, count) = ((immediate & 0xffff) as usize, (immediate >> 16) as u16);
    if len > SLOT {
        Err(Malformed::Message { len })
    } else {
        Ok((len, count))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Two sides that always have something to say, and the messages between them.
    struct World {
        slots: u16,
        credits: [Credits; 2],
        wires: [VecDeque<(usize, u16)>; 2],
        content: [u64; 2],
    }

    impl World {
        fn new(slots: u16) -> Self {
            Self {
                slots,
                credits: [Credits::new(slots), Credits::new(slots)],
                wires: Default::default(),
                content: [0; 2],
            }
        }

        fn send(&mut self, side: usize) -> bool {
            let content = self.credits[side].may_send();
            if content {
                self.wires[side].push_back(self.credits[side].send());
                self.content[side] += 1;
                assert!(self.wires[side].len() <= usize::from(self.slots));
            }
            content
        }

        fn update(&mut self, side: usize) -> bool {
            let due = self.credits[side].update_due() && self.credits[side].may_update();
            if due {
                self.wires[side].push_back(self.credits[side].send());
            }
            due
        }

        /// Side `side` takes a message in, if there is one.
        fn take(&mut self, side: usize) -> bool {
            let Some((slot, count)) = self.wires[1 - side].pop_front() else {
                return false;
            };
            assert_eq!(slot, self.credits[side].next_slot());
            self.credits[side].receive(count).unwrap();
            true
        }
    }

    #[test]
    fn whatever_the_order_nobody_waits_for_ever() {
        // Also with counts that wrap around.
        for seed in 0..200u64 {
            let mut world = World::new([4, 32, 128][seed as usize / 2 % 3]);
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut idle = 0;
            while world.content[0] < 2000 || world.content[1] < 2000 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let side = (random >> 8 & 1) as usize;
                // Some worlds mostly send, in others one side does not listen for long.
                let moved = match random >> 16 & 7 {
                    0 => world.update(side),
                    1 if seed % 3 != 0 => world.take(side),
                    2 if seed % 5 != 1 || side == 0 => world.take(side),
                    _ => world.send(side),
                };
                idle = if moved { 0 } else { idle + 1 };
                if idle > 1000 {
                    // Nothing goes on by chance: then it has to by taking everything in.
                    while world.take(0) | world.take(1) {}
                    let moved = world.update(0) | world.update(1) | world.take(0) | world.take(1);
                    assert!(
                        moved | world.send(0) | world.send(1),
                        "seed {seed}: {:?}",
                        world.credits
                    );
                    idle = 0;
                }
            }
        }
    }

    #[test]
    fn both_use_their_last_slot_and_still_go_on() {
        let mut world = World::new(32);
        for round in 0..1000 {
            for side in 0..2 {
                while world.send(side) {}
            }
            // Nobody listens until nobody can send, not even updates.
            while world.take(0) {}
            assert!(world.update(0), "round {round}");
            while world.take(1) {}
            assert!(world.send(1) || world.update(1), "round {round}");
        }
    }

    #[test]
    fn a_peer_that_counts_more_than_was_sent_is_found_out() {
        let mut credits = Credits::new(32);
        credits.send();
        assert_eq!(credits.clone().receive(2), Err(Malformed::Count));
        assert_eq!(credits.receive(1), Ok(()));
        // Going back is counting too much, too.
        assert_eq!(credits.receive(0), Err(Malformed::Count));
    }

    #[test]
    fn immediates() {
        assert_eq!(parse(Some(immediate(SLOT, 0xfffe))), Ok((SLOT, 0xfffe)));
        assert_eq!(parse(Some(immediate(0, 1))), Ok((0, 1)));
        assert_eq!(parse(Some(SLOT as u32 + 1)), Err(Malformed::Message { len: SLOT + 1 }));
        assert_eq!(parse(None), Err(Malformed::Bare));
    }
}
