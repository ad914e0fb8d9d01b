//! Whole blocks that leave the guest's memory, or come, in one go.

use std::ops::Range;

use crate::memory::slots::Slot;
use crate::memory::{Access, BLOCK_PAGES, MemoryError, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, UffdMemory};
use crate::protocol::{BlockData, Memory};

/// Bytes of a block.
const BLOCK_LEN: u64 = (BLOCK_PAGES as u64) << PAGE_SHIFT;

impl UffdMemory {
    /// Whether this block can be mapped by one huge page at all.
    pub fn is_whole_block(&self, block: u32) -> bool {
        self.ram().block_is_whole(block)
    }

    /// Whether the kernel can map this block by one huge page when it comes whole.
    pub fn takes_block(&self, block: u32) -> bool {
        self.features().moves && self.ram().block_is_whole(block)
    }

    /// Takes the very memory of a block whose pages are all present; where the kernel can't do that, a copy of what
    /// they hold once they are frozen. Zeros after an error.
    pub(super) fn take_block_out(&mut self, block: Range<u32>) -> BlockData<PAGE_WORDS> {
        let taken = self.try_take_over(block.clone());
        if let Some(Some(slot)) = self.keep(taken) {
            block.for_each(|page| self.access.set(page, Access::Absent));
            return BlockData::new(slot);
        }
        let slot = self.slots().take();
        let Some(mut slot) = self.keep(slot).filter(|_| block.len() == BLOCK_PAGES as usize) else {
            return BlockData::new(vec![[0; PAGE_WORDS]; block.len()]);
        };
        self.protect_range(block.clone());
        for (page, data) in block.clone().zip(slot.pages_mut()) {
            self.read_into(page, data);
        }
        self.discard_run(block);
        BlockData::new(slot)
    }

    fn try_take_over(&mut self, block: Range<u32>) -> Result<Option<Slot>, MemoryError> {
        for page in block.clone() {
            self.present(page, "take out")?;
        }
        if block.len() != BLOCK_PAGES as usize || !self.ram().block_is_whole(block.start / BLOCK_PAGES) {
            return Ok(None);
        }
        let huge = self.blocks.is_huge(block.start / BLOCK_PAGES);
        // From then on who finds a page absent waits for the protocol.
        self.share_block_of(block.start)?;
        // A mapping that loses all its memory so loses what it has in common with its neighbours (anon_vma), and would
        // never be one with them again.
        if self.stands_alone(block.start / BLOCK_PAGES) {
            return Ok(None);
        }
        let (_, address) = self.at(block.start)?;
        // SAFETY: a whole block of guest memory, as was just seen; guests and atomics are all that touch it.
        unsafe { self.slots().take_over(address, huge) }
    }

    /// Fills a block whose pages are all absent: with the very memory of `data` if the kernel can do so, and with a
    /// copy of what it did not take.
    pub(super) fn try_install_block(&mut self, first: u32, data: &mut BlockData<PAGE_WORDS>) -> Result<(), MemoryError> {
        let pages = data.pages().len();
        if pages != BLOCK_PAGES as usize || !self.takes_block(first / BLOCK_PAGES) {
            self.install_range(first, data.pages(), true);
            return Ok(());
        }
        for page in first..first + BLOCK_PAGES {
            self.expect(page, "install", Access::Absent)?;
        }
        let mut moved = 0;
        if let Some(from) = data.movable() {
            // Nothing is there, but perhaps a page table of what was: the kernel drops that, too, and moves a huge
            // page as such only to where there is none.
            self.ram().discard_range(first..first + BLOCK_PAGES)?;
            let (uffd, address) = self.at(first)?;
            // SAFETY: the block is private anonymous memory that is only accessed atomically; `data` is ours, nobody
            // refers to what is in it, and it is as long as the block.
            moved = unsafe { uffd.take_over(address, from, BLOCK_LEN) } as usize / PAGE_SIZE;
        }
        if moved > 0 {
            data.moved();
        }
        if moved < pages {
            let (uffd, address) = self.at(first + moved as u32)?;
            uffd.copy(address, &data.pages()[moved..], true)?;
        }
        (first..first + BLOCK_PAGES).for_each(|page| self.access.set(page, Access::Writable));
        self.blocks.came_whole(first / BLOCK_PAGES, moved == pages);
        Ok(())
    }
}

/// A block that comes in pieces.
#[derive(Debug)]
pub struct Landing {
    slot: Slot,
    filled: usize,
}

impl Landing {
    /// Nothing has come yet.
    pub fn new(slot: Slot) -> Self {
        Landing { slot, filled: 0 }
    }

    /// Where the next piece goes. `None`: it does not follow the one before, or is too long.
    pub fn space(&mut self, offset: usize, len: usize) -> Option<&mut [u8]> {
        let end = offset.checked_add(len).filter(|_| offset == self.filled)?;
        self.slot.bytes_mut().get_mut(offset..end)
    }

    /// The piece is there.
    pub fn filled(&mut self, len: usize) {
        self.filled += len;
    }

    /// Whether all of it is there.
    pub fn is_full(&self) -> bool {
        self.filled == crate::memory::BLOCK_BYTES
    }

    /// The block.
    pub fn into_block(self) -> BlockData<PAGE_WORDS> {
        BlockData::new(self.slot)
    }
}
