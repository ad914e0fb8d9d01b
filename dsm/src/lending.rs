//! Which blocks stay for a while with who has them, instead of going whole to who wants them next. Pure: time is
//! told. This node, their home, decides that when another asks it for a block, and when it wants one back itself.
//!
//! A block given to a reader is lost to who had it. So a block that is wanted back soon after it went stays for a
//! while the next time, and goes by the page; longer each time. Soon is different for reads and writes: had the
//! reader been given copies, the other would read on without a fault, but its writes would be faults in any case; and
//! who writes all of a block would have taken it from the other in any case, page by page. A block that only goes from
//! reader to reader stays the second time, however late that is: with copies of their own both read on.

use std::collections::BTreeMap;

/// A read this soon (us) tells that home still uses what it gave.
const READ_SOON: u64 = 1_000_000;
/// A write this soon.
const WRITE_SOON: u64 = 5_000;
/// How long a block stays after the first time (us), and how often that doubles.
const STAY: u64 = 1_000_000;
const DOUBLINGS: u8 = 6;
/// Blocks remembered; the one given the longest time ago is forgotten.
const MOST: usize = 1024;

/// What happened to blocks that were given whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LendingCounters {
    /// Given whole.
    pub given: u64,
    /// Asked back whole.
    pub taken_back: u64,
    /// Of all these, wanted back at all.
    pub wanted_back: u64,
    /// Of those, wanted back soon.
    pub contested: u64,
    /// Blocks that were wanted and stayed because of that.
    pub kept: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Lent {
    at: u64,
    to: usize,
    /// To be written.
    write: bool,
    /// It was given to a reader when it was wanted by another reader.
    read_by_both: bool,
    /// Somebody has wanted a page of it since.
    back: bool,
    times: u8,
    until: u64,
}

/// Blocks that went whole, by number.
#[derive(Debug, Default)]
pub struct Lending {
    blocks: BTreeMap<u32, Lent>,
    counters: LendingCounters,
}

impl Lending {
    /// The block was given whole to node `to` at `now` (us), for it to write or to read.
    pub fn given(&mut self, block: u32, to: usize, write: bool, now: u64) {
        self.counters.given += 1;
        self.went(block, to, write, now);
    }

    /// The same, to home, which is node `me`.
    pub fn taken_back(&mut self, block: u32, me: usize, write: bool, now: u64) {
        self.counters.taken_back += 1;
        self.went(block, me, write, now);
    }

    fn went(&mut self, block: u32, to: usize, write: bool, now: u64) {
        if self.blocks.len() >= MOST && !self.blocks.contains_key(&block) {
            let oldest = self.blocks.iter().min_by_key(|(_, lent)| lent.at).map(|(block, _)| *block);
            oldest.map(|block| self.blocks.remove(&block));
        }
        let lent = self.blocks.entry(block).or_default();
        (lent.at, lent.to, lent.write, lent.back) = (now, to, write, false);
    }

    /// Node `by` wants a page of the block that who has it must give up or share.
    pub fn wanted(&mut self, block: u32, by: usize, write: bool, now: u64) {
        let Some(lent) = self.blocks.get_mut(&block).filter(|lent| !lent.back) else { return };
        lent.back = true;
        self.counters.wanted_back += 1;
        // Who had it has it no more: that somebody wanted it was not seen here, and how soon is not known.
        if by == lent.to {
            return;
        }
        let both_read = !write && !lent.write;
        let again = both_read && lent.read_by_both;
        lent.read_by_both = both_read;
        if !again && now.saturating_sub(lent.at) >= if both_read { READ_SOON } else { WRITE_SOON } {
            lent.times = 0;
            return;
        }
        self.counters.contested += 1;
        lent.until = now.saturating_add(STAY << lent.times);
        lent.times = (lent.times + 1).min(DOUBLINGS);
    }

    /// Whether the block stays, although somebody wants it.
    pub fn keeps(&mut self, block: u32, now: u64) -> bool {
        let keeps = self.blocks.get(&block).is_some_and(|lent| now < lent.until);
        self.counters.kept += u64::from(keeps);
        keeps
    }

    /// What happened so far.
    pub fn counters(&self) -> LendingCounters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_back_soon_stays_longer_each_time() {
        let mut lending = Lending::default();
        let mut now = 1_000_000_000;
        for stay in [1, 2, 4, 8, 16, 32, 64, 64].map(|times| times * STAY) {
            assert!(!lending.keeps(7, now));
            lending.given(7, 2, false, now);
            lending.wanted(7, 0, false, now + READ_SOON - 1);
            // Only the first tells how soon it was.
            lending.wanted(7, 0, true, now + READ_SOON - 1);
            now += READ_SOON - 1;
            assert!(lending.keeps(7, now + stay - 1) && !lending.keeps(8, now));
            now += stay;
        }
        assert!(!lending.keeps(7, now));
        lending.given(7, 2, false, now);
        lending.wanted(7, 0, true, now + WRITE_SOON);
        assert!(!lending.keeps(7, now + WRITE_SOON));
        lending.given(7, 2, false, now);
        lending.wanted(7, 0, false, now + 1);
        assert!(lending.keeps(7, now + STAY) && !lending.keeps(7, now + 1 + STAY), "forgiven");
        let expected = LendingCounters { given: 10, wanted_back: 10, contested: 9, kept: 9, taken_back: 0 };
        assert_eq!(lending.counters(), expected);
    }

    #[test]
    fn who_writes_it_all_would_have_taken_it_in_any_case() {
        let mut lending = Lending::default();
        lending.taken_back(1, 0, true, 0);
        lending.wanted(1, 2, false, WRITE_SOON);
        assert!(!lending.keeps(1, WRITE_SOON));
        lending.taken_back(1, 0, false, WRITE_SOON);
        lending.wanted(1, 2, false, 2 * WRITE_SOON);
        assert!(lending.keeps(1, 2 * WRITE_SOON));
        assert_eq!(lending.counters(), LendingCounters { taken_back: 2, wanted_back: 2, contested: 1, kept: 1, given: 0 });
    }

    #[test]
    fn what_goes_from_reader_to_reader_stays_the_second_time() {
        let mut lending = Lending::default();
        lending.given(1, 2, false, 0);
        lending.wanted(1, 0, false, 10 * READ_SOON);
        assert!(!lending.keeps(1, 10 * READ_SOON), "it may be the last who reads it");
        lending.taken_back(1, 0, false, 10 * READ_SOON);
        lending.wanted(1, 2, false, 20 * READ_SOON);
        assert!(lending.keeps(1, 20 * READ_SOON) && !lending.keeps(1, 20 * READ_SOON + STAY));
        lending.given(1, 2, false, 30 * READ_SOON);
        lending.wanted(1, 0, false, 40 * READ_SOON);
        assert!(lending.keeps(1, 40 * READ_SOON + STAY), "for longer");
    }

    #[test]
    fn a_write_may_come_sooner_than_a_read() {
        let mut lending = Lending::default();
        lending.given(1, 2, false, 0);
        lending.wanted(1, 0, true, WRITE_SOON);
        assert!(!lending.keeps(1, WRITE_SOON));
        lending.given(1, 2, false, WRITE_SOON);
        lending.wanted(1, 0, true, 2 * WRITE_SOON - 1);
        assert!(lending.keeps(1, 2 * WRITE_SOON));
    }

    #[test]
    fn who_has_a_block_and_asks_for_a_page_of_it_says_nothing_of_the_others() {
        let mut lending = Lending::default();
        lending.given(1, 2, false, 0);
        lending.wanted(1, 2, false, 1);
        lending.wanted(1, 0, false, 2);
        assert!(!lending.keeps(1, 3));
        lending.given(1, 2, false, 4);
        lending.wanted(1, 3, false, 5);
        assert!(lending.keeps(1, 6));
        assert_eq!(lending.counters(), LendingCounters { given: 2, wanted_back: 2, contested: 1, kept: 1, taken_back: 0 });
    }

    #[test]
    fn few_are_remembered() {
        let mut lending = Lending::default();
        for block in 0..2 * MOST as u32 {
            lending.given(block, 2, false, u64::from(block));
            lending.wanted(block, 0, false, u64::from(block));
        }
        assert_eq!(lending.blocks.len(), MOST);
        assert!(!lending.keeps(0, 0) && lending.keeps(2 * MOST as u32 - 1, 0));
    }
}
