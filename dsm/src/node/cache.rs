//! The copies of other nodes' pages here: how many there may be, and which go when there are more.
//!
//! A clock: the hand goes round the pages, takes a chance from each copy it meets and evicts those that
//! had none left. A copy comes with one chance, and with more if the page was evicted before: it was
//! wanted again.

use std::ops::Range;

/// Most chances of a page.
const MOST_CHANCES: u8 = 4;

/// The copies of other nodes' pages at a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copies {
    /// Pages now.
    pub pages: u32,
    /// Most there ever were.
    pub peak: u32,
    /// Pages there may be.
    pub limit: u32,
    /// Faults that found no room, waited for it in vain and went on.
    pub overruns: u64,
}

/// The clock over the pages whose home is another node.
#[derive(Debug)]
pub(super) struct Cache {
    /// Copies there may be.
    limit: u32,
    /// Pages whose home is this node: no copies.
    home: Range<u32>,
    hand: u32,
    chances: Vec<u8>,
    evicted: Vec<u8>,
    peak: u32,
    /// See [`Copies::overruns`].
    pub(super) overruns: u64,
}

impl Cache {
    pub(super) fn new(pages: u32, home: Range<u32>, limit: u32) -> Self {
        let pages = pages as usize;
        Cache { limit, home, hand: 0, chances: vec![0; pages], evicted: vec![0; pages], peak: 0, overruns: 0 }
    }

    /// The pages whose home is here.
    pub(super) fn home(&self) -> Range<u32> {
        self.home.clone()
    }

    /// There are so many copies.
    pub(super) fn note(&mut self, copies: u32) {
        self.peak = self.peak.max(copies);
    }

    /// Figures, with so many copies now.
    pub(super) fn copies(&self, pages: u32) -> Copies {
        Copies { pages, peak: self.peak.max(pages), limit: self.limit, overruns: self.overruns }
    }

    /// Copies there may be.
    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    /// Beyond the limit evicting goes on until so many are left.
    pub(super) fn low(&self) -> u32 {
        self.limit - self.limit / 16
    }

    /// With more copies than this, faults wait for evictions.
    pub(super) fn most(&self) -> u32 {
        self.limit.saturating_add(self.limit / 16).saturating_add(64)
    }

    /// Whether a copy of the page counts.
    pub(super) fn counts(&self, page: u32) -> bool {
        !self.home.contains(&page)
    }

    /// Pages that exist came.
    pub(super) fn came(&mut self, pages: Range<u32>) {
        let pages = pages.start as usize..pages.end as usize;
        for (chances, evicted) in self.chances[pages.clone()].iter_mut().zip(&self.evicted[pages]) {
            *chances = (1 + evicted).min(MOST_CHANCES);
        }
    }

    /// Moves the hand until it has found `count` pages to evict, or been round often enough to find any.
    /// `here` says whether a copy of a page is here.
    pub(super) fn choose(&mut self, count: usize, here: impl Fn(u32) -> bool) -> Vec<u32> {
        let pages = self.chances.len() as u32;
        let mut chosen = Vec::new();
        let mut moves = u64::from(pages) * u64::from(MOST_CHANCES + 1);
        while chosen.len() < count && moves > 0 {
            moves -= 1;
            let page = self.hand;
            self.hand = (page + 1) % pages;
            if page == self.home.start && !self.home.is_empty() {
                self.hand = self.home.end % pages;
                continue;
            }
            if !here(page) || chosen.contains(&page) {
                continue;
            }
            let chances = &mut self.chances[page as usize];
            if *chances > 0 {
                *chances -= 1;
                continue;
            }
            // If home is busy with it, it stays, and is not asked for again at once.
            *chances = MOST_CHANCES;
            let evicted = &mut self.evicted[page as usize];
            *evicted = evicted.saturating_add(1);
            chosen.push(page);
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_gets_a_chance_and_what_came_back_more() {
        let mut cache = Cache::new(8, 2..4, 100);
        for page in [0, 1, 5] {
            cache.came(page..page + 1);
        }
        let here = |page: u32| [0, 1, 2, 5].contains(&page);
        assert_eq!(cache.choose(1, here), [0], "the first whose chance was taken");
        cache.came(0..1);
        assert_eq!(cache.choose(2, here), [1, 5], "page 0 has two chances now");
        assert_eq!(cache.choose(2, |page| page == 0), [0], "once");
        assert_eq!(cache.choose(1, |_| false), [0; 0], "nothing is here: an end");
    }

    #[test]
    fn pages_at_home_are_no_copies() {
        let mut cache = Cache::new(6, 0..6, 100);
        assert_eq!(cache.choose(3, |_| true), [0; 0]);
        let mut cache = Cache::new(6, 3..6, 100);
        assert_eq!(cache.choose(4, |_| true), [0, 1, 2]);
        assert!(cache.counts(2) && !cache.counts(3));
        assert!((cache.low(), cache.limit(), cache.most()) == (94, 100, 170));
    }
}
