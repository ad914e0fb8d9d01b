//! Who waits for pages here, how long, and which node had them: what a scheduler has to know of each vCPU.
//!
//! Pure: times come in as nanoseconds since some start. Nothing is allocated at a fault once a thread and its
//! first pages were seen, and what is remembered is bounded.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Duration;

use crate::protocol::NodeId;

/// Threads that are remembered; one that has no wait to its name makes room for a new one.
const THREADS: usize = 4096;
/// Nodes that are remembered for one thread; the least asked is forgotten first.
pub const SOURCES: usize = 8;
/// Pages count as fetched lately for one to two times this, in nanoseconds.
const LATELY: u64 = 5_000_000_000;
/// Bits of a sketch: tells up to some 20,000 pages apart.
const SKETCH_BITS: usize = 4096;
/// No thread.
const NONE: u32 = u32::MAX;
/// Threads looked at for room.
const TRIES: usize = 16;

/// How long faults took from the event's arrival here to the page's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Faults that needed another node, or home.
    pub faults: u64,
    /// Sum of their times.
    pub total: Duration,
}

/// What one thread waited for since the last [`Stalls::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadStalls {
    /// Its kernel id.
    pub thread: u32,
    /// Nanoseconds it waited for pages.
    pub stalled: u64,
    /// Whether it waits for one now.
    pub waits: bool,
    /// Faults by the node that had the page; places without faults are none.
    pub sources: [(NodeId, u32); SOURCES],
    /// Different pages it fetched from other nodes in the last seconds, roughly.
    pub footprint: u64,
}

/// A set of pages of which only the size can be told, roughly: linear counting (Whang et al., 1990).
#[derive(Clone, Debug)]
struct Sketch([u64; SKETCH_BITS / 64]);

/// A thread and its wait, if it waits.
#[derive(Debug)]
struct Thread {
    id: u32,
    waits: bool,
    /// Of its wait.
    page: u32,
    since: u64,
    /// Who waits for the same page.
    next: u32,
    stalled: u64,
    sources: [(NodeId, u32); SOURCES],
    recent: Sketch,
    before: Sketch,
}

/// A page that is waited for.
#[derive(Clone, Copy, Debug)]
struct Page {
    since: u64,
    first: u32,
    source: Option<(NodeId, Part)>,
}

/// What a node did for a page to come, the least telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// It granted it, as home.
    Granted,
    /// It gave up its copy.
    Dropped,
    /// It sent it.
    Sent,
}

/// All waits of one node.
#[derive(Debug, Default)]
pub struct Stalls {
    threads: Vec<Thread>,
    places: HashMap<u32, u32>,
    /// Few: whole blocks are looked up in it.
    pages: BTreeMap<u32, Page>,
    waited: Waited,
    renewed: u64,
    /// Where room for another thread is looked for next.
    hand: usize,
}

impl Stalls {
    /// `thread` (0: unknown) waits for a page from `now` on.
    pub fn fault(&mut self, page: u32, thread: u32, now: u64) {
        self.pages.entry(page).or_insert(Page { since: now, first: NONE, source: None });
        let Some(place) = self.place(thread) else { return };
        let waiting = &self.threads[place as usize];
        if waiting.waits && waiting.page == page {
            // It was woken for another reason, and asks again.
            return;
        }
        if waiting.waits {
            self.leave(place, now);
        }
        if let Some(entry) = self.pages.get_mut(&page) {
            let thread = &mut self.threads[place as usize];
            (thread.waits, thread.page, thread.since, thread.next) = (true, page, now, entry.first);
            entry.first = place;
        }
    }

    /// `node` did its part for those of the pages that somebody waits for.
    pub fn answered(&mut self, pages: Range<u32>, node: NodeId, part: Part) {
        for (_, page) in self.pages.range_mut(pages) {
            if page.source.is_none_or(|(_, before)| before <= part) {
                page.source = Some((node, part));
            }
        }
    }

    /// Pages have come; `each` is called with those that were waited for, every thread that did, and who had it, if
    /// another node did.
    pub fn arrived(&mut self, pages: Range<u32>, now: u64, mut each: impl FnMut(u32, u32, NodeId)) {
        while let Some(page) = self.pages.range(pages.clone()).next().map(|(page, _)| *page) {
            self.page_arrived(page, now, &mut each);
        }
    }

    fn page_arrived(&mut self, page: u32, now: u64, each: &mut impl FnMut(u32, u32, NodeId)) {
        let Some(entry) = self.pages.remove(&page) else { return };
        self.waited.faults += 1;
        self.waited.total += Duration::from_nanos(now.saturating_sub(entry.since));
        let mut place = entry.first;
        while let Some(thread) = self.threads.get_mut(place as usize) {
            thread.end(now);
            if let Some((node, _)) = entry.source {
                thread.fetched(page, node);
                each(page, thread.id, node);
            }
            place = thread.next;
        }
    }

    /// A page will not come.
    pub fn failed(&mut self, page: u32, now: u64) {
        let mut place = self.pages.remove(&page).map_or(NONE, |entry| entry.first);
        while let Some(thread) = self.threads.get_mut(place as usize) {
            thread.end(now);
            place = thread.next;
        }
    }

    /// All waits since the start that are over.
    pub fn waited(&self) -> Waited {
        self.waited
    }

    /// What every thread that is known waited for since the last time. A wait that goes on counts up to `now`.
    pub fn take(&mut self, now: u64) -> Vec<ThreadStalls> {
        let renew = now.saturating_sub(self.renewed) >= LATELY;
        if renew {
            self.renewed = now;
        }
        let take = |thread: &mut Thread| {
            if thread.waits {
                thread.end(now);
                (thread.waits, thread.since) = (true, now);
            }
            let footprint = thread.recent.with(&thread.before);
            if renew {
                thread.before = std::mem::replace(&mut thread.recent, Sketch::EMPTY);
            }
            ThreadStalls {
                thread: thread.id,
                stalled: std::mem::take(&mut thread.stalled),
                waits: thread.waits,
                sources: std::mem::take(&mut thread.sources),
                footprint,
            }
        };
        self.threads.iter_mut().map(take).collect()
    }

    /// The place of a thread, made if there is room.
    fn place(&mut self, id: u32) -> Option<u32> {
        if id == 0 {
            return None;
        }
        if let Some(place) = self.places.get(&id) {
            return Some(*place);
        }
        let new = Thread {
            id,
            waits: false,
            page: 0,
            since: 0,
            next: NONE,
            stalled: 0,
            sources: Default::default(),
            recent: Sketch::EMPTY,
            before: Sketch::EMPTY,
        };
        let place = if self.threads.len() < THREADS {
            self.threads.push(new);
            self.threads.len() - 1
        } else {
            let tried = (0..TRIES).map(|n| (self.hand + n) % THREADS).find(|place| self.threads[*place].is_idle());
            self.hand = (self.hand + TRIES) % THREADS;
            let place = tried?;
            self.places.remove(&self.threads[place].id);
            self.threads[place] = new;
            place
        };
        self.places.insert(id, place as u32);
        Some(place as u32)
    }

    /// Ends a thread's wait for a page that has not come: it waits for another.
    fn leave(&mut self, place: u32, now: u64) {
        let (page, next) = (self.threads[place as usize].page, self.threads[place as usize].next);
        self.threads[place as usize].end(now);
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if entry.first == place {
            entry.first = next;
            return;
        }
        let mut at = entry.first;
        while let Some(thread) = self.threads.get_mut(at as usize) {
            if thread.next == place {
                thread.next = next;
                return;
            }
            at = thread.next;
        }
    }
}

impl Thread {
    /// Its wait is over.
    fn end(&mut self, now: u64) {
        self.stalled += now.saturating_sub(self.since);
        self.waits = false;
    }

    fn fetched(&mut self, page: u32, node: NodeId) {
        self.recent.add(page);
        if let Some((_, count)) = self.sources.iter_mut().find(|(source, count)| *source == node && *count > 0) {
            *count = count.saturating_add(1);
        } else if let Some(least) = self.sources.iter_mut().min_by_key(|(_, count)| *count) {
            *least = (node, least.1.saturating_add(1));
        }
    }

    fn is_idle(&self) -> bool {
        !self.waits && self.stalled == 0 && self.recent.is_empty() && self.before.is_empty()
    }
}

impl Sketch {
    const EMPTY: Sketch = Sketch([0; SKETCH_BITS / 64]);

    fn add(&mut self, page: u32) {
        // MurmurHash3's finalizer: the estimate takes the bits for random, and pages often are neighbours.
        let mixed = (page ^ page >> 16).wrapping_mul(0x85eb_ca6b);
        let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
        let bit = (mixed >> (u32::BITS - SKETCH_BITS.ilog2())) as usize;
        self.0[bit / 64] |= 1 << (bit % 64);
    }

    /// How many pages are in either, roughly.
    fn with(&self, other: &Sketch) -> u64 {
        let set: u32 = self.0.iter().zip(&other.0).map(|(a, b)| (a | b).count_ones()).sum();
        // All set: as if one were not.
        let unset = (SKETCH_BITS as f64 - f64::from(set)).max(1.0);
        (SKETCH_BITS as f64 * (SKETCH_BITS as f64 / unset).ln()).round() as u64
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn of(taken: &[ThreadStalls], thread: u32) -> ThreadStalls {
        *taken.iter().find(|t| t.thread == thread).unwrap()
    }

    fn sources(stalls: ThreadStalls) -> Vec<(NodeId, u32)> {
        stalls.sources.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn every_thread_that_waited_for_a_page_is_told_with_who_had_it() {
        let mut s = Stalls::default();
        let mut told = Vec::new();
        s.fault(7, 1, 0);
        s.fault(7, 2, MS);
        s.fault(9, 3, 0);
        s.answered(7..8, 5, Part::Granted);
        s.answered(7..8, 4, Part::Sent);
        s.answered(7..8, 6, Part::Dropped);
        s.answered(8..9, 6, Part::Sent);
        s.arrived(7..8, 3 * MS, |_, thread, node| told.push((thread, node)));
        told.sort_unstable();
        assert_eq!(told, [(1, 4), (2, 4)]);
        let taken = s.take(4 * MS);
        assert_eq!((of(&taken, 1).stalled, of(&taken, 2).stalled), (3 * MS, 2 * MS));
        assert_eq!(sources(of(&taken, 1)), [(4, 1)]);
        assert_eq!((of(&taken, 3).stalled, of(&taken, 3).waits), (4 * MS, true), "it waits still");
        assert_eq!(s.waited(), Waited { faults: 1, total: Duration::from_millis(3) });
        let taken = s.take(5 * MS);
        assert_eq!((of(&taken, 1).stalled, of(&taken, 3).stalled), (0, MS));
        assert_eq!(sources(of(&taken, 1)), []);
        // Nobody else had it: a wait, but for no node.
        s.arrived(9..10, 6 * MS, |_, _, _| panic!("no node had it"));
        assert_eq!(s.take(7 * MS).iter().map(|t| t.stalled).sum::<u64>(), MS);
    }

    #[test]
    fn a_thread_waits_for_one_page_at_a_time() {
        let mut s = Stalls::default();
        for thread in 1..=3 {
            s.fault(7, thread, 0);
        }
        s.fault(7, 2, MS);
        s.fault(8, 2, 2 * MS);
        let mut told = Vec::new();
        s.answered(7..8, 4, Part::Sent);
        s.arrived(7..8, 3 * MS, |_, thread, _| told.push(thread));
        assert_eq!(told, [3, 1]);
        s.failed(8, 5 * MS);
        let taken = s.take(9 * MS);
        assert_eq!([1, 2, 3].map(|thread| of(&taken, thread).stalled), [3 * MS, 5 * MS, 3 * MS]);
        assert!(taken.iter().all(|t| !t.waits));
        assert_eq!(s.waited().faults, 1);
    }

    #[test]
    fn the_footprint_counts_pages_once_and_forgets_them() {
        let mut s = Stalls::default();
        let fetch = |s: &mut Stalls, pages: std::ops::Range<u32>, at: u64| {
            for page in pages {
                s.fault(page, 1, at);
                s.answered(page..page + 1, 2, Part::Sent);
                s.arrived(page..page + 1, at, |_, _, _| ());
            }
        };
        for _ in 0..3 {
            fetch(&mut s, 100..1100, 0);
        }
        let footprint = |s: &mut Stalls, at| of(&s.take(at), 1).footprint;
        assert!((900..1100).contains(&footprint(&mut s, MS)));
        assert!((900..1100).contains(&footprint(&mut s, LATELY)));
        fetch(&mut s, 5000..5010, LATELY);
        assert!((900..1100).contains(&footprint(&mut s, LATELY + MS)));
        assert!(footprint(&mut s, 2 * LATELY) > 900);
        assert!((5..20).contains(&footprint(&mut s, 2 * LATELY + MS)));
        fetch(&mut s, 0..1 << 20, 3 * LATELY);
        assert!(footprint(&mut s, 3 * LATELY) > 10_000, "more than it can tell");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_idle_threads_make_room() {
        let mut s = Stalls::default();
        for thread in 1..=2 * THREADS as u32 {
            s.fault(thread, thread, 0);
        }
        assert_eq!(s.take(0).len(), THREADS, "all of them wait");
        for thread in 1..=2 * THREADS as u32 {
            s.arrived(thread..thread + 1, 0, |_, _, _| ());
        }
        s.take(0);
        s.fault(7, 10_000_000, 0);
        let taken = s.take(MS);
        assert_eq!((taken.len(), of(&taken, 10_000_000).stalled), (THREADS, MS));
        assert_eq!(s.places.len(), THREADS);
        for node in 0..100 {
            s.fault(1, 1, 0);
            s.answered(1..2, node, Part::Sent);
            s.arrived(1..2, 0, |_, _, _| ());
        }
    }
}
