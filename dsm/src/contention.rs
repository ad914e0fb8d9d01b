//! Which pages hosts fight for, and who fights for them here.
//!
//! A page *bounces* when it is taken away soon after it came. Pages that bounce most are told, with the
//! threads that faulted on them: whoever places vCPUs can bring those together.
//!
//! Pure: times come in as microseconds since some start.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use crate::protocol::NodeId;

/// Taken away sooner than this after it came, in microseconds, a page has bounced.
const BOUNCE: u64 = 20_000;
/// Pages that are remembered; the least contended are forgotten first.
const REMEMBERED: usize = 4096;
/// Threads that are remembered for one page.
const THREADS: usize = 4;

/// What is known of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Page {
    faults: u32,
    bounces: u32,
    arrived: Option<u64>,
    /// How long it was here the last time.
    stay: Option<u64>,
    /// (thread, faults), those that were seen most.
    threads: [(u32, u32); THREADS],
    /// (thread, node that had the page, faults) since they were last taken.
    fetches: [(u32, NodeId, u32); THREADS],
}

/// A page that threads here fetched more than once since the last [`Contention::take_fetched`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchedPage {
    /// Page index.
    pub page: u32,
    /// Kernel id of a thread, the node that had the page, and how often.
    pub fetches: Vec<(u32, NodeId, u32)>,
}

/// A contended page, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HotPage {
    /// Page index.
    pub page: u32,
    /// Faults on it here.
    pub faults: u32,
    /// Times it was taken away soon after it had come.
    pub bounces: u32,
    /// Kernel ids of the threads here that faulted on it, and how often: most first.
    pub threads: Vec<(u32, u32)>,
}

/// The contended pages of one node.
#[derive(Debug, Default)]
pub struct Contention {
    pages: BTreeMap<u32, Page>,
    bounces: u64,
}

impl Contention {
    /// `thread` here waits for a page.
    pub fn fault(&mut self, page: u32, thread: u32) {
        if self.pages.len() >= REMEMBERED && !self.pages.contains_key(&page) {
            self.forget();
        }
        let entry = self.pages.entry(page).or_default();
        entry.faults = entry.faults.saturating_add(1);
        if let Some(seen) = entry.threads.iter_mut().find(|(id, count)| *id == thread && *count > 0) {
            seen.1 = seen.1.saturating_add(1);
        } else if let Some(least) = entry.threads.iter_mut().min_by_key(|(_, count)| *count) {
            // The newcomer takes over the count: who comes often is soon told from who came once.
            *least = (thread, least.1.saturating_add(1));
        }
    }

    /// `thread` here waited for a page, and `node` had it.
    pub fn fetched(&mut self, page: u32, thread: u32, node: NodeId) {
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if let Some(seen) = entry.fetches.iter_mut().find(|(id, had, count)| (*id, *had) == (thread, node) && *count > 0) {
            seen.2 = seen.2.saturating_add(1);
        } else if let Some(least) = entry.fetches.iter_mut().min_by_key(|(_, _, count)| *count) {
            *least = (thread, node, least.2.saturating_add(1));
        }
    }

    /// Of the pages fetched more than once since the last time the `most` that were fetched most.
    pub fn take_fetched(&mut self, most: usize) -> Vec<FetchedPage> {
        let total = |page: &Page| page.fetches.iter().fold(0u32, |sum, (_, _, count)| sum.saturating_add(*count));
        let mut pages: Vec<(u32, u32)> = self.pages.iter().map(|(number, page)| (total(page), *number)).collect();
        pages.retain(|(total, _)| *total > 1);
        pages.sort_unstable_by_key(|(total, number)| (std::cmp::Reverse(*total), *number));
        pages.truncate(most);
        let fetched = |page: u32| {
            let fetches = self.pages.get(&page)?.fetches.iter().copied().filter(|(_, _, count)| *count > 0);
            Some(FetchedPage { page, fetches: fetches.collect() })
        };
        let told = pages.into_iter().filter_map(|(_, page)| fetched(page)).collect();
        self.pages.values_mut().for_each(|page| page.fetches = Default::default());
        told
    }

    /// Pages have come.
    pub fn arrived(&mut self, pages: Range<u32>, now: u64) {
        self.pages.range_mut(pages).for_each(|(_, entry)| entry.arrived = Some(now));
    }

    /// Those of the pages that are `gone` were taken away.
    pub fn taken(&mut self, pages: Range<u32>, now: u64, gone: impl Fn(u32) -> bool) {
        for (_, entry) in self.pages.range_mut(pages).filter(|(page, _)| gone(**page)) {
            let Some(arrived) = entry.arrived.take() else { continue };
            let stay = now.saturating_sub(arrived);
            entry.stay = Some(stay);
            if stay < BOUNCE {
                entry.bounces = entry.bounces.saturating_add(1);
                self.bounces += 1;
            }
        }
    }

    /// How long a page was here the last time it was, in microseconds, if that is known.
    pub fn stay(&self, page: u32) -> Option<u64> {
        self.pages.get(&page).and_then(|entry| entry.stay)
    }

    /// Times any page was taken away soon after it had come.
    pub fn bounces(&self) -> u64 {
        self.bounces
    }

    /// The most contended pages: by bounces, then by faults.
    pub fn hottest(&self, count: usize) -> Vec<HotPage> {
        let mut pages: Vec<(&u32, &Page)> = self.pages.iter().collect();
        pages.sort_unstable_by_key(|(number, page)| std::cmp::Reverse((page.bounces, page.faults, **number)));
        pages.into_iter().take(count).map(|(number, page)| page.told(*number)).collect()
    }

    /// Forgets the less contended half.
    fn forget(&mut self) {
        let weight = |page: &Page| (page.bounces, page.faults);
        let mut weights: Vec<_> = self.pages.values().map(weight).collect();
        let middle = weights.len() / 2;
        let (_, median, _) = weights.select_nth_unstable(middle);
        let median = *median;
        self.pages.retain(|_, page| weight(page) > median);
    }
}

impl Page {
    fn told(&self, page: u32) -> HotPage {
        let mut threads: Vec<_> = self.threads.into_iter().filter(|(_, count)| *count > 0).collect();
        threads.sort_unstable_by_key(|(id, count)| (std::cmp::Reverse(*count), *id));
        HotPage { page, faults: self.faults, bounces: self.bounces, threads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounce(contention: &mut Contention, page: u32, thread: u32, at: u64) {
        contention.fault(page, thread);
        contention.arrived(page..page + 1, at);
        contention.taken(page..page + 1, at + 100, |_| true);
    }

    #[test]
    fn a_page_bounces_if_it_goes_soon_after_it_came() {
        let mut c = Contention::default();
        bounce(&mut c, 7, 1, 0);
        c.taken(7..8, 200, |_| true);
        assert_eq!(c.bounces(), 1, "it had not come again");
        c.fault(7, 1);
        c.arrived(0..8, 1000);
        c.taken(7..8, 1000 + BOUNCE, |_| true);
        assert_eq!(c.bounces(), 1, "it stayed for long");
        assert_eq!((c.stay(7), c.stay(8)), (Some(BOUNCE), None));
        c.taken(8..9, 5, |_| true);
        assert_eq!(c.bounces(), 1, "never waited for");
    }

    #[test]
    fn the_hottest_come_first_with_those_who_fight_for_them() {
        let mut c = Contention::default();
        for n in 0..10 {
            bounce(&mut c, 1, 100 + u32::from(n % 3 == 0), 1000 * n);
        }
        bounce(&mut c, 2, 100, 0);
        c.fault(3, 102);
        let hot = c.hottest(2);
        assert_eq!(hot[0], HotPage { page: 1, faults: 10, bounces: 10, threads: vec![(100, 6), (101, 4)] });
        assert_eq!((hot[1].page, hot.len()), (2, 2));
    }

    #[test]
    fn pages_fetched_again_and_again_are_told_with_who_had_them() {
        let mut c = Contention::default();
        let fetch = |c: &mut Contention, page, thread, node| {
            c.fault(page, thread);
            c.fetched(page, thread, node);
        };
        for _ in 0..3 {
            fetch(&mut c, 1, 100, 2);
            fetch(&mut c, 2, 100, 1);
        }
        fetch(&mut c, 1, 101, 2);
        fetch(&mut c, 3, 100, 1);
        c.fetched(9, 100, 1);
        let taken = c.take_fetched(8);
        assert_eq!(taken[0], FetchedPage { page: 1, fetches: vec![(100, 2, 3), (101, 2, 1)] });
        assert_eq!((taken[1].page, taken.len()), (2, 2), "once is no contention");
        assert_eq!(c.take_fetched(8), [], "they were taken");
        assert_eq!(c.hottest(1)[0].faults, 4, "what people are told goes on");
        for page in 1..4 {
            fetch(&mut c, page, 100, 1);
            fetch(&mut c, page, 100, 1);
        }
        assert_eq!(c.take_fetched(2).len(), 2);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_contended_stay() {
        let mut c = Contention::default();
        for n in 0..5 {
            bounce(&mut c, 1, 9, 1000 * n);
        }
        for page in 10..10 * REMEMBERED as u32 {
            c.fault(page, page);
        }
        assert!(c.pages.len() <= REMEMBERED);
        assert_eq!(c.hottest(1)[0].page, 1);
        for thread in 0..100 {
            c.fault(1, 1000 + thread);
        }
        assert_eq!(c.hottest(1)[0].threads.len(), THREADS);
    }
}
