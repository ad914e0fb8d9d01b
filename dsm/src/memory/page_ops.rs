//! The page operations that the coherence protocol does on guest RAM under userfaultfd.

use std::ops::Range;
use std::sync::atomic::{Ordering, fence};

use crate::memory::uffd_memory::ZEROS_AT_ONCE;
use crate::memory::{Access, BLOCK_PAGES, PAGE_WORDS, UffdMemory, compare};
use crate::protocol::{BlockData, Memory};

/// The words of a page that is all zero.
const ZERO: [u64; PAGE_WORDS] = [0; PAGE_WORDS];

/// The pages from `next` on, before `end`, that are filled with zeros by one request: blocks that were parted may stay
/// mappings of their own, and Linux 6.1 refuses a request over more than one.
fn zeros_from(next: u32, end: u32) -> Range<u32> {
    let block_end = (next / BLOCK_PAGES + 1).saturating_mul(BLOCK_PAGES);
    next..end.min(next.saturating_add(ZEROS_AT_ONCE as u32)).min(block_end)
}

/// After an error, which [`UffdMemory::failed`] keeps, an operation has changed nothing and what
/// it returns means nothing.
impl Memory<PAGE_WORDS> for UffdMemory {
    /// Present to present and read-only; when it returns no write is under way.
    fn protect(&mut self, page: u32) {
        let result = self
            .present(page, "protect")
            .and_then(|()| self.share_block_of(page))
            .and_then(|()| self.at(page))
            .and_then(|(uffd, address)| uffd.write_protect(address, 1, true));
        if self.keep(result).is_some() {
            self.access.set(page, Access::ReadOnly);
        }
    }

    /// The same for neighbours, in one request for as many as the host has side by side.
    fn protect_range(&mut self, pages: Range<u32>) {
        let checked = pages.clone().try_for_each(|page| {
            self.present(page, "protect")?;
            self.share_block_of(page)
        });
        let result = checked.and_then(|()| {
            self.side_by_side(pages, |memory, run| {
                let (uffd, address) = memory.at(run.start)?;
                uffd.write_protect(address, run.len(), true)?;
                run.for_each(|page| memory.access.set(page, Access::ReadOnly));
                Ok(())
            })
        });
        self.keep(result);
    }

    /// Its block is private, or came whole.
    fn is_in_huge_mapping(&self, page: u32) -> bool {
        let block = page / BLOCK_PAGES;
        self.blocks.is_private(block) || self.blocks.is_huge(block)
    }

    /// Present to writable; wakes those who wait for the page.
    fn unprotect(&mut self, page: u32) {
        let result = self
            .present(page, "unprotect")
            .and_then(|()| self.at(page))
            .and_then(|(uffd, address)| match self.access(page) {
                // Perhaps in a private block, which is not registered.
                Access::Writable => uffd.wake(address),
                _ => uffd.write_protect(address, 1, false),
            });
        if self.keep(result).is_some() {
            self.access.set(page, Access::Writable);
        }
    }

    /// A copy of a present page, each word whole. A copy of a writable page is no snapshot: its
    /// words may be from different moments. Zeros after an error.
    fn read(&self, page: u32) -> Box<[u64; PAGE_WORDS]> {
        let mut copy = Box::new(ZERO);
        self.read_into(page, &mut copy);
        copy
    }

    /// The same. After an error `copy` is as it was.
    fn read_into(&self, page: u32, copy: &mut [u64; PAGE_WORDS]) {
        if self.keep(self.present(page, "read")).is_some() {
            if let Some(words) = self.ram().words(page) {
                for (to, from) in copy.iter_mut().zip(words) {
                    *to = from.load(Ordering::Relaxed);
                }
            }
            fence(Ordering::Acquire);
        }
    }

    /// Absent to present with `data`, read-only unless `writable`; wakes those who wait for it.
    fn install(&mut self, page: u32, data: &[u64; PAGE_WORDS], writable: bool) {
        let result = self.try_install(page, data, writable, "install");
        self.keep(result);
    }

    /// The same for neighbours, in one request for as many as the host has side by side.
    fn install_range(&mut self, first: u32, data: &[[u64; PAGE_WORDS]], writable: bool) {
        let pages = first..first.saturating_add(data.len() as u32);
        let access = if writable { Access::Writable } else { Access::ReadOnly };
        let checked = pages.clone().try_for_each(|page| self.expect(page, "install", Access::Absent));
        let result = checked.and_then(|()| {
            self.side_by_side(pages, |memory, run| {
                let (uffd, address) = memory.at(run.start)?;
                uffd.copy(address, &data[(run.start - first) as usize..(run.end - first) as usize], writable)?;
                run.for_each(|page| memory.access.set(page, access));
                Ok(())
            })
        });
        self.keep(result);
    }

    /// Absent to present and writable, all zero; wakes those who wait for the pages. Whole blocks become
    /// private.
    fn install_zeros(&mut self, pages: Range<u32>) {
        // Copied rather than UFFDIO_ZEROPAGE: that maps the kernel's one zero page, on which
        // write protection does not hold and whose first write costs another fault.
        let mut next = pages.start;
        while next < pages.end {
            if next % BLOCK_PAGES == 0 && pages.end - next >= BLOCK_PAGES && self.take_block(next / BLOCK_PAGES) {
                next += BLOCK_PAGES;
                continue;
            }
            let some = zeros_from(next, pages.end);
            next = some.end;
            let result = self.try_install_zeros(some);
            self.keep(result);
        }
    }

    /// Present to absent; when it returns nobody can reach the old content. Later touches fault.
    fn discard(&mut self, page: u32) {
        let result = self
            .present(page, "discard")
            .and_then(|()| self.share_block_of(page))
            .and_then(|()| self.ram().discard(page));
        if self.keep(result).is_some() {
            self.access.set(page, Access::Absent);
        }
    }

    /// Present to absent, in few requests; private blocks are not filled before.
    fn discard_run(&mut self, pages: Range<u32>) {
        let result = self.try_discard_run(pages.clone());
        if self.keep(result).is_some() {
            pages.for_each(|page| self.access.set(page, Access::Absent));
        }
    }

    /// All pages of a block become absent at once, and what they held is returned.
    fn take_out(&mut self, block: Range<u32>) -> BlockData<PAGE_WORDS> {
        self.take_block_out(block)
    }

    /// A block becomes present and writable, by one huge page where the kernel can do so; wakes those who wait.
    fn install_block(&mut self, first: u32, mut data: BlockData<PAGE_WORDS>) {
        let result = self.try_install_block(first, &mut data);
        self.keep(result);
    }

    /// Lets those who wait for the page touch it again; they fault again if it is not there.
    fn wake(&mut self, page: u32) {
        let result = self.at(page).and_then(|(uffd, address)| uffd.wake(address));
        self.keep(result);
    }

    /// One word of a present page. Zero after an error.
    fn load(&self, page: u32, word: usize) -> u64 {
        let result = self.present(page, "load").and_then(|()| self.word(page, word));
        self.keep(result).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Replaces a word of a writable page if it is `old`, atomically towards the running guest;
    /// `Err` with the present value if it is not. `Ok` after an error, so that nobody tries again.
    fn compare_exchange(&mut self, page: u32, word: usize, old: u64, new: u64) -> Result<u64, u64> {
        // On a read-only page the write would wait for an answer that only the caller can give.
        let result = self
            .expect(page, "compare and exchange", Access::Writable)
            .and_then(|()| self.word(page, word));
        match self.keep(result) {
            Some(word) => word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire),
            None => Ok(old),
        }
    }

    /// Appends to `out` the words in which a present page differs from its twin, with their
    /// values now. Nothing after an error.
    fn differences(&self, page: u32, twin: &[u64; PAGE_WORDS], out: &mut Vec<(u16, u64)>) {
        if self.keep(self.present(page, "compare")).is_some() {
            if let Some(words) = self.ram().words(page) {
                compare::differences(words, twin, out);
                fence(Ordering::Acquire);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_filled_in_within_blocks() {
        let at_once = ZEROS_AT_ONCE as u32;
        assert_eq!(zeros_from(BLOCK_PAGES - 8, BLOCK_PAGES + 8), BLOCK_PAGES - 8..BLOCK_PAGES);
        assert_eq!(zeros_from(BLOCK_PAGES, BLOCK_PAGES + 8), BLOCK_PAGES..BLOCK_PAGES + 8);
        assert_eq!(zeros_from(3, 500), 3..3 + at_once);
        assert_eq!(zeros_from(u32::MAX - 1, u32::MAX), u32::MAX - 1..u32::MAX);
    }
}
