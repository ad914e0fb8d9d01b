//! When a replica rests: write-protected here, so that flushes need not compare it.
//!
//! What of a replica has changed can't be had from the hardware, as every walk may count as a write, so flushes compare
//! them, hundreds of times a second. One that nobody here walks or writes needs no comparing once a write to it
//! would fault. That fault ends its rest and is over at once, without a message; but it costs as much as some hundred
//! comparisons. So a replica rests after so many flushes without a change that comparing it has cost as much, and has to
//! wait twice as long each time it turned out that its rest was not worth it. A table that is always walked is hardly ever
//! protected; one that is not costs nothing. After a long rest it is given up: nobody has to be told of changes to a table
//! that only others walk, and if that is one node alone, it is no replica any more.

use serde::{Deserialize, Serialize};

/// Flushes without a change after which a replica rests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Patience {
    /// At first. With 0 no replica ever rests.
    pub first: u32,
    /// After many rests that were too short.
    pub most: u32,
    /// Flushes and merges during a rest after which the replica is given up. With 0 none ever is.
    pub leave: u32,
}

/// How a replica came to rest, or is on its way to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Rest {
    /// Flushes in a row that found it unchanged.
    unchanged: u32,
    /// How many there have to be.
    needed: u32,
    /// It rests: the number of the flush at which that began.
    since: Option<u64>,
    /// The number of the flush at which it began, or at which it was last found that it has to stay.
    looked_at: u64,
}

impl Rest {
    pub fn new(patience: Patience) -> Self {
        Rest { unchanged: 0, needed: patience.first, since: None, looked_at: 0 }
    }

    pub fn is_resting(&self) -> bool {
        self.since.is_some()
    }

    /// Whether it may be protected at this flush.
    pub fn is_due(&self) -> bool {
        self.needed > 0 && self.unchanged >= self.needed
    }

    /// A flush compared it.
    pub fn compared(&mut self, changed: bool) {
        self.unchanged = if changed { 0 } else { self.unchanged.saturating_add(1).min(self.needed) };
    }

    /// Since when it might leave, if it rests.
    pub fn queued(&self) -> Option<u64> {
        self.since.map(|_| self.looked_at)
    }

    /// It has to stay at flush number `flush`.
    pub fn stay(&mut self, flush: u64) {
        self.looked_at = flush;
    }

    /// It rests from flush number `flush` on.
    pub fn begin(&mut self, flush: u64) {
        (self.unchanged, self.since, self.looked_at) = (0, Some(flush), flush);
    }

    /// Its rest is over at flush number `flush`: for somebody here who walks or writes it (`touched`), or because it is to be a
    /// replica no longer. Whether it rested.
    pub fn end(&mut self, flush: u64, touched: bool, patience: Patience) -> bool {
        let Some(since) = self.since.take() else { return false };
        if touched {
            let worth_it = flush.saturating_sub(since) >= u64::from(self.needed);
            self.needed = if worth_it { patience.first } else { self.needed.saturating_mul(2).min(patience.most).max(patience.first) };
        }
        true
    }

    /// Forgets when its rest began; it is looked at in the order of `since`.
    #[cfg(test)]
    pub fn forget_history(&mut self, since: u64) {
        (self.since, self.looked_at) = (self.since.map(|_| 0), since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience { first: 3, most: 10, leave: 0 };

    fn rested(rest: &mut Rest, flush: u64) -> u32 {
        let mut flushes = 0;
        while !rest.is_due() {
            rest.compared(false);
            flushes += 1;
        }
        rest.begin(flush);
        flushes
    }

    #[test]
    fn a_change_begins_the_count_anew() {
        let mut rest = Rest::new(PATIENCE);
        for changed in [false, false, true, false, false] {
            rest.compared(changed);
            assert!(!rest.is_due());
        }
        rest.compared(false);
        assert!(rest.is_due());
    }

    #[test]
    fn short_rests_are_waited_for_ever_longer_and_a_long_one_ends_that() {
        let mut rest = Rest::new(PATIENCE);
        let mut flush = 0;
        for needed in [3, 6, 10, 10] {
            assert_eq!(rested(&mut rest, flush), needed);
            flush += 2;
            assert!(rest.end(flush, true, PATIENCE));
        }
        assert_eq!(rested(&mut rest, flush), 10);
        assert!(rest.end(flush + 10, true, PATIENCE));
        assert_eq!(rested(&mut rest, flush), 3);
    }

    #[test]
    fn a_change_from_elsewhere_says_nothing_of_this_node() {
        let mut rest = Rest::new(PATIENCE);
        rested(&mut rest, 0);
        assert!(rest.is_resting() && rest.end(1, false, PATIENCE) && !rest.is_resting());
        assert_eq!(rested(&mut rest, 1), 3);
        assert!(rest.end(2, true, PATIENCE) && !rest.end(2, true, PATIENCE), "once");
    }

    #[test]
    fn without_patience_nothing_rests() {
        let mut rest = Rest::new(Patience::default());
        (0..1000).for_each(|_| rest.compared(false));
        assert!(!rest.is_due());
    }
}
