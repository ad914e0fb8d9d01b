//! Private blocks: 2 MiB of RAM that only this node uses.
//!
//! All pages of a private block are writable here, and it is not registered with a userfaultfd: the
//! kernel fills it at the first touch, by one huge page where it has one, and tells us of nothing any
//! more. Before one of its pages may change its state, the block is *shared*: filled, and registered
//! again. A registered block of which all pages have been writable for long is *merged*: it becomes
//! private again.
//!
//! Every change between private and shared neighbours is a boundary of a kernel mapping, of which a
//! process may have so many (vm.max_map_count). Near half of that no more blocks become private where
//! that makes boundaries, and blocks are shared together with their neighbours.

use std::ops::Range;

use crate::memory::{Access, BLOCK_PAGES, MemoryError, PAGE_SHIFT, UffdMemory};

/// Bytes of a block.
const BLOCK_LEN: u64 = (BLOCK_PAGES as u64) << PAGE_SHIFT;
/// Without the kernel's word on it: its default for mappings of one process.
const USUAL_MAPPINGS: usize = 65530;

/// What happened to the blocks of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BlockCounters {
    /// Private now.
    pub private: u64,
    /// Became private at the first touch of any of their pages.
    pub taken: u64,
    /// Private ones that another node asked for a page of.
    pub splits: u64,
    /// Became private because nobody else had asked for any of their pages for long.
    pub merges: u64,
}

/// The state of all blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    private: Vec<bool>,
    /// All of it came at once from a slot, and no page of it changed since: most likely it is a huge page.
    huge: Vec<bool>,
    /// Passes of the hand since a page last changed its state by a request of another node.
    quiet: Vec<u8>,
    hand: u32,
    /// Neighbours of which one is private, and how many there may be.
    boundaries: usize,
    limit: usize,
    counters: BlockCounters,
}

impl Blocks {
    /// All shared.
    pub(super) fn new(pages: u32) -> Self {
        let count = pages.div_ceil(BLOCK_PAGES) as usize;
        let allowed = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let allowed = allowed.and_then(|text| text.trim().parse().ok()).unwrap_or(USUAL_MAPPINGS);
        Blocks {
            private: vec![false; count],
            huge: vec![false; count],
            quiet: vec![0; count],
            hand: 0,
            boundaries: 0,
            limit: allowed / 2,
            counters: BlockCounters::default(),
        }
    }

    pub(super) fn is_private(&self, block: u32) -> bool {
        self.private.get(block as usize).copied().unwrap_or(false)
    }

    /// How many boundaries there are more if this block changes.
    fn more_boundaries(&self, block: u32) -> isize {
        let me = self.is_private(block);
        let neighbours = [block.checked_sub(1), block.checked_add(1)];
        let same = neighbours.into_iter().filter(|n| n.is_some_and(|n| self.is_private(n)) == me).count();
        2 * same as isize - 2
    }

    fn fits(&self, block: u32) -> bool {
        self.boundaries.saturating_add_signed(self.more_boundaries(block)) <= self.limit
    }

    fn change(&mut self, block: u32) {
        self.boundaries = self.boundaries.saturating_add_signed(self.more_boundaries(block));
        if let Some(private) = self.private.get_mut(block as usize) {
            *private = !*private;
            if *private { self.counters.private += 1 } else { self.counters.private -= 1 }
        }
    }

    /// A page of the block changes its state because another node asked.
    fn disturb(&mut self, block: u32) {
        if let Some(quiet) = self.quiet.get_mut(block as usize) {
            *quiet = 0;
        }
    }

    /// The block has come at once as its very memory, or not: or a page of it has changed since.
    pub(super) fn came_whole(&mut self, block: u32, moved: bool) {
        if let Some(huge) = self.huge.get_mut(block as usize) {
            *huge = moved;
        }
    }

    /// Whether the block is a huge page, as far as is known.
    pub(super) fn is_huge(&self, block: u32) -> bool {
        self.huge.get(block as usize).copied().unwrap_or(false)
    }
}

impl UffdMemory {
    /// Makes a block private of which all pages are absent. `false`: it can't be, and nothing changed.
    pub(super) fn take_block(&mut self, block: u32) -> bool {
        let first = block * BLOCK_PAGES;
        if !self.access.all(first, BLOCK_PAGES, Access::Absent) {
            return false;
        }
        // Of pages that went one by one the page table is left, and where one is no huge page comes. Not to have got
        // rid of it changes nothing but speed. Before anybody can write here.
        let _ = self.ram().discard_range(first..first + BLOCK_PAGES);
        let taken = self.make_private(block);
        if taken {
            (first..first + BLOCK_PAGES).for_each(|page| self.access.set(page, Access::Writable));
            self.blocks.counters.taken += 1;
        }
        taken
    }

    /// Whether a shared block is a kernel mapping by itself: no neighbour is of its kind.
    pub(super) fn stands_alone(&self, block: u32) -> bool {
        let first = block * BLOCK_PAGES;
        let (start, end) = Self::stripe_of(first);
        let range = |page| self.ram().layout().range_of(page).map(|(at, _)| at);
        let joined = |page: Option<u32>| {
            page.is_some_and(|page| (start..end).contains(&page) && range(page).is_some_and(|at| Some(at) == range(first)) && !self.blocks.is_private(page / BLOCK_PAGES))
        };
        !joined(first.checked_sub(1)) && !joined(first.checked_add(BLOCK_PAGES))
    }

    /// Before a page changes its state: its block is shared.
    pub(super) fn share_block_of(&mut self, page: u32) -> Result<(), MemoryError> {
        let block = page / BLOCK_PAGES;
        self.blocks.disturb(block);
        self.blocks.came_whole(block, false);
        if !self.blocks.is_private(block) {
            return Ok(());
        }
        self.blocks.counters.splits += 1;
        if self.blocks.fits(block) {
            return self.share_block(block);
        }
        // Too many mappings: no boundaries inside a stripe.
        let (first, end) = Self::stripe_of(page);
        (first / BLOCK_PAGES..end / BLOCK_PAGES).filter(|b| self.blocks.is_private(*b)).collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|block| self.share_block(block))
    }

    /// Drops the content of pages that are all present. A private block that goes whole is shared without
    /// being filled first: whoever touches it meanwhile waits as for any page that goes.
    pub(super) fn try_discard_run(&mut self, pages: Range<u32>) -> Result<(), MemoryError> {
        for page in pages.clone() {
            self.present(page, "discard")?;
        }
        let mut next = pages.start;
        while next < pages.end {
            let (block, after) = (next / BLOCK_PAGES, (next / BLOCK_PAGES + 1) * BLOCK_PAGES);
            let whole = next % BLOCK_PAGES == 0 && after <= pages.end;
            if whole && self.blocks.is_private(block) && self.blocks.fits(block) {
                self.register_block(block)?;
            } else {
                self.share_block_of(next)?;
            }
            self.blocks.disturb(block);
            self.blocks.came_whole(block, false);
            next = after.min(pages.end);
        }
        self.ram().discard_range(pages)
    }

    /// Moves the hand over the next `count` blocks, and makes those private of which all pages have been
    /// writable for `passes` passes and `exclusive` says of every page that no other node has it. Returns
    /// them: [`crate::memory::GuestRam::collapse`] makes them huge pages.
    pub fn merge_quiet(&mut self, count: u32, passes: u8, exclusive: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut merged = Vec::new();
        for _ in 0..count.min(self.blocks.private.len() as u32) {
            let block = self.blocks.hand;
            self.blocks.hand = (block + 1) % self.blocks.private.len() as u32;
            let first = block * BLOCK_PAGES;
            if self.blocks.is_private(block) || !self.access.all(first, BLOCK_PAGES, Access::Writable) {
                self.blocks.disturb(block);
                continue;
            }
            let quiet = &mut self.blocks.quiet[block as usize];
            *quiet = quiet.saturating_add(1);
            if *quiet > passes && (first..first + BLOCK_PAGES).all(&exclusive) && self.make_private(block) {
                self.blocks.counters.merges += 1;
                merged.push(block);
            }
        }
        merged
    }

    /// Number of blocks, the last one perhaps in part.
    pub fn blocks(&self) -> u32 {
        self.blocks.private.len() as u32
    }

    /// What happened to the blocks.
    pub fn block_counters(&self) -> BlockCounters {
        self.blocks.counters
    }

    fn make_private(&mut self, block: u32) -> bool {
        if self.blocks.is_private(block) || !self.ram().block_is_whole(block) || !self.blocks.fits(block) {
            return false;
        }
        let result = self.at(block * BLOCK_PAGES).and_then(|(uffd, address)| uffd.unregister(address, BLOCK_LEN));
        match result {
            Ok(()) => self.blocks.change(block),
            Err(error) => {
                // Other parts of the process have more mappings than was thought: this many, no more.
                self.blocks.limit = self.blocks.limit.min(self.blocks.boundaries);
                tracing::warn!(%error, "a block of guest memory stays in small pages");
            }
        }
        self.blocks.is_private(block)
    }

    fn share_block(&mut self, block: u32) -> Result<(), MemoryError> {
        // First filled: an absent page would be a fault nobody expects of a page that is ours.
        self.ram().populate(block)?;
        self.register_block(block)
    }

    fn register_block(&mut self, block: u32) -> Result<(), MemoryError> {
        let (uffd, address) = self.at(block * BLOCK_PAGES)?;
        // SAFETY: a whole block of a range, which GuestRam keeps mapped as private anonymous memory
        // until the process ends and that is only accessed atomically.
        unsafe { uffd.register(address, BLOCK_LEN) }?;
        self.blocks.change(block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_are_counted_where_private_meets_shared() {
        let mut blocks = Blocks::new(BLOCK_PAGES * 6);
        let mut expect = |block, boundaries, private| {
            blocks.change(block);
            assert_eq!((blocks.boundaries, blocks.counters.private), (boundaries, private), "after {block}");
        };
        expect(2, 2, 1);
        expect(3, 2, 2);
        expect(5, 4, 3);
        expect(4, 2, 4);
        expect(0, 4, 5);
        expect(1, 2, 6);
        expect(3, 4, 5);
        expect(0, 4, 4);
    }

    #[test]
    fn no_more_boundaries_than_allowed() {
        let mut blocks = Blocks::new(BLOCK_PAGES * 8);
        blocks.limit = 2;
        assert!(blocks.fits(3));
        blocks.change(3);
        assert!(blocks.fits(4), "a neighbour makes none");
        assert!(!blocks.fits(6));
    }
}
