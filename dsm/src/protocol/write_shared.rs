//! Which pages of a home go from writer to writer.
//!
//! *Migratory* is a page that a node reads and then writes while nobody else reads it: the next reader is given
//! the page to write at once. Locks and counters are such pages. A mark stays until its page was only read, or
//! went to somebody by a stream; nobody may ever see that it is out of date, so who only expects to read asks
//! how long ago the page last went to a writer.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::message::NodeId;

/// Pages written last that are not given to others who only expect to use them.
const WRITTEN: usize = 64;
/// The same for migratory ones: as long as so many pages have not gone to writers since.
const RECENT: u64 = 1024;

/// What the directory of one home knows of that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct WriteShared {
    /// Migratory pages, and the value of `given` when each last went to a writer; at most its present one.
    marks: BTreeMap<u32, u64>,
    /// How often a page of this home went to a writer.
    given: u64,
    /// The pages that did so last, newest last, each once.
    written: VecDeque<Written>,
}

/// A page that went to a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Written {
    page: u32,
    writer: NodeId,
    /// So did a neighbour of it a short while before or after: a stream has come by, and is somewhere else now.
    passed: bool,
}

impl WriteShared {
    /// Whether all of it is about pages of `homed` and the first `nodes` nodes, and agrees with itself.
    pub(super) fn fits(&self, homed: &Range<u32>, nodes: usize) -> bool {
        self.marks.keys().chain(self.written.iter().map(|written| &written.page)).all(|page| homed.contains(page))
            && self.written.iter().all(|written| usize::from(written.writer) < nodes)
            && self.marks.values().all(|at| *at <= self.given)
            && self.written.len() <= WRITTEN
    }

    /// Forgets what only counts history: no page went to a writer lately.
    #[cfg(test)]
    pub(super) fn forget_history(&mut self) {
        self.written.clear();
        self.given = RECENT;
        self.marks.values_mut().for_each(|at| *at = 0);
    }

    /// Notes that `page` goes to `writer`, or to a reader as to a writer.
    pub(super) fn note(&mut self, page: u32, writer: NodeId) {
        self.given = self.given.saturating_add(1);
        if let Some(at) = self.marks.get_mut(&page) {
            *at = self.given;
        }
        if self.written.back().is_some_and(|last| (last.page, last.writer) == (page, writer)) {
            return;
        }
        let mut passed = false;
        self.written.retain_mut(|other| {
            if other.page.abs_diff(page) == 1 && other.writer == writer {
                (passed, other.passed) = (true, true);
            }
            other.page != page
        });
        if self.written.len() == WRITTEN {
            self.written.pop_front();
        }
        self.written.push_back(Written { page, writer, passed });
    }

    /// The only reader of `page` is its next writer.
    pub(super) fn mark(&mut self, page: u32) {
        self.marks.insert(page, self.given);
    }

    pub(super) fn unmark(&mut self, page: u32) {
        self.marks.remove(&page);
    }

    pub(super) fn unmark_all(&mut self, pages: Range<u32>) {
        let marked: Vec<u32> = self.marks.range(pages).map(|(page, _)| *page).collect();
        marked.iter().for_each(|page| self.unmark(*page));
    }

    pub(super) fn is_migratory(&self, page: u32) -> bool {
        self.marks.contains_key(&page)
    }

    /// Whether one of these pages is migratory and went to a writer a short while ago.
    pub(super) fn migrates(&self, pages: Range<u32>) -> bool {
        self.marks.range(pages).any(|(_, at)| self.given - at < RECENT)
    }

    /// Whether that is so of this page, or it went to another writer than `by` very shortly ago, who is still there.
    pub(super) fn is_written(&self, page: u32, by: NodeId) -> bool {
        self.written.iter().any(|last| last.page == page && last.writer != by && !last.passed) || self.migrates(page..page + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_written_last_are_written() {
        let mut pages = WriteShared::default();
        (0..WRITTEN as u32 + 1).for_each(|n| pages.note(2 * n, 3));
        assert!(!pages.is_written(0, 0) && pages.is_written(2, 0) && pages.is_written(2 * WRITTEN as u32, 0));
        assert!(!pages.is_written(2, 3), "who wrote it may have it again");
        (0..3).for_each(|_| pages.note(2, 3));
        assert!(pages.is_written(4, 0) && pages.written.len() == WRITTEN, "each is there once");
        assert!(!pages.migrates(0..200) && !pages.is_migratory(2));
    }

    #[test]
    fn pages_that_a_writer_has_passed_are_not() {
        for order in [[5, 6, 7], [7, 6, 5]] {
            let mut pages = WriteShared::default();
            order.into_iter().for_each(|page| pages.note(page, 3));
            assert!(!(0..10).any(|page| pages.is_written(page, 0)));
        }
        let mut pages = WriteShared::default();
        [(5, 3), (6, 2), (8, 3)].into_iter().for_each(|(page, writer)| pages.note(page, writer));
        assert!([5, 6, 8].iter().all(|page| pages.is_written(*page, 0)), "no stream of one writer's");
        pages.mark(8);
        pages.note(7, 3);
        assert!(!pages.is_written(7, 0) && pages.is_written(8, 0), "a migratory one stays");
    }

    #[test]
    fn a_migratory_page_is_written_for_longer_and_marked_until_that_ends() {
        let mut pages = WriteShared::default();
        pages.note(7, 3);
        pages.mark(7);
        (0..RECENT as u32 - 1).for_each(|n| pages.note(1000 + n, 3));
        assert!(pages.is_written(7, 0) && pages.migrates(0..8) && !pages.migrates(8..1000));
        pages.note(7, 3);
        (0..RECENT as u32).for_each(|n| pages.note(1000 + n, 3));
        assert!(!pages.is_written(7, 0) && !pages.migrates(0..8) && pages.is_migratory(7));
        pages.note(7, 3);
        assert!(pages.migrates(7..8), "it still goes from writer to writer");
        pages.unmark_all(0..7);
        assert!(pages.is_migratory(7));
        pages.unmark_all(7..8);
        assert!(!pages.is_migratory(7) && !pages.migrates(0..8));
    }

    #[test]
    fn what_cannot_be_does_not_fit() {
        let mut pages = WriteShared::default();
        pages.note(7, 3);
        pages.mark(7);
        assert!(pages.fits(&(0..8), 4) && !pages.fits(&(0..7), 4));
        assert!(!WriteShared { given: 0, ..pages.clone() }.fits(&(0..8), 4));
        assert!(!pages.fits(&(0..8), 3), "no such writer");
        pages.marks.clear();
        assert!(!pages.fits(&(8..9), 4));
    }
}
