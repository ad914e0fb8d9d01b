//! Buffers for blocks that go whole from one node to another.
//!
//! A slot has room for one block and is a huge page if the host has one: its memory itself can become guest
//! memory (UFFDIO_MOVE), as one huge page. Slots are used again and again, what was sent from one is the
//! landing place of another block; their addresses stay reserved until the process ends. Some are filled with
//! memory beside the work: to find a huge page and to clear it takes longer than to receive it, and where the
//! host is a virtual machine itself that has not touched the memory before, ten times as long.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::ram::{HUGE_PAGE, advise, map};
use crate::memory::{BLOCK_PAGES, MemoryError, PAGE_WORDS};
use crate::protocol::{BlockMemory, PageData};

/// Slots that are given memory before it is needed: 32 MiB.
const FILLED: usize = 16;
/// Slots that keep theirs, at most, while blocks come and go: 128 MiB.
const KEPT: usize = 64;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = HUGE_PAGE as usize;

/// The slots of one node.
#[derive(Debug, Default)]
pub struct Slots(Mutex<Free>);

/// Those that are not in use.
#[derive(Debug, Default)]
struct Free {
    with_memory: Vec<Address>,
    without: Vec<Address>,
}

/// Where a slot is.
#[derive(Debug)]
struct Address(NonNull<u8>);

// SAFETY: the address of a mapping that lives as long as the process; whoever has the value has the memory.
unsafe impl Send for Address {}
// SAFETY: through a shared reference it is only read.
unsafe impl Sync for Address {}

/// Room for the content of one block.
#[derive(Debug)]
pub struct Slot {
    address: Address,
    /// Its memory may be one huge page: what comes next can land in it.
    lands: bool,
    slots: Arc<Slots>,
}

impl Slots {
    /// A slot with anything in it.
    ///
    /// # Errors
    /// The host would not map more memory.
    pub fn take(self: &Arc<Self>) -> Result<Slot, MemoryError> {
        let free = {
            let mut free = self.lock();
            free.with_memory.pop().or_else(|| free.without.pop())
        };
        let address = match free {
            Some(address) => address,
            None => new_slot()?,
        };
        Ok(Slot { address, lands: true, slots: Arc::clone(self) })
    }

    /// A slot that holds the very memory of the block at `host`, where nothing is left: one request, whatever the
    /// block consists of; `huge` says whether that is one huge page. `None`: the kernel can't, and nothing changed.
    ///
    /// # Safety
    /// `host` must be a whole block of guest memory, which nobody refers to but by atomics, and whoever touches it
    /// from now on must be ready to find it absent.
    ///
    /// # Errors
    /// The host would not map more memory.
    pub unsafe fn take_over(self: &Arc<Self>, host: u64, huge: bool) -> Result<Option<Slot>, MemoryError> {
        let free = self.lock().without.pop();
        let address = match free {
            Some(address) => address,
            None => new_slot()?,
        };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let (from, to, len) = (host as *mut libc::c_void, address.0.as_ptr().cast::<libc::c_void>(), BLOCK_BYTES);
        // SAFETY: what is replaced at `to` is a mapping of our own that nobody else knows of; the caller vouches for
        // the other end, which stays mapped.
        if unsafe { libc::mremap(from, len, len, flags, to) } == libc::MAP_FAILED {
            // Whether there is still a mapping is not known, so this address is not used again.
            return Ok(None);
        }
        // Small pages are no landing place. A huge page is, and saves finding and clearing another.
        Ok(Some(Slot { address, lands: huge, slots: Arc::clone(self) }))
    }

    /// Makes one slot's memory a huge page, if it is none and the host has one now: each in its turn.
    pub fn mend_one(&self) {
        let address = {
            let mut free = self.lock();
            match free.with_memory.is_empty() {
                true => return,
                false => free.with_memory.remove(0),
            }
        };
        // Meanwhile nobody else knows of it. A refusal would mean that it stays as it is.
        let _ = advise(address.0, HUGE_PAGE, libc::MADV_COLLAPSE, "MADV_COLLAPSE", true);
        self.lock().with_memory.push(address);
    }

    /// Gives the host the memory of one slot back, if many have some.
    pub fn empty_one(&self) {
        let address = {
            let mut free = self.lock();
            if free.with_memory.len() <= FILLED {
                return;
            }
            free.with_memory.swap_remove(0)
        };
        self.empty(address);
    }

    /// Fills one of the slots that wait for memory. `false`: enough have some, or the host has none now.
    ///
    /// # Errors
    /// The host would not map more memory.
    pub fn fill_one(&self) -> Result<bool, MemoryError> {
        let free = {
            let mut free = self.lock();
            if free.with_memory.len() >= FILLED {
                return Ok(false);
            }
            free.without.pop()
        };
        let address = match free {
            Some(address) => address,
            None => new_slot()?,
        };
        // Meanwhile nobody else knows of it.
        let filled = advise(address.0, HUGE_PAGE, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE", true).is_ok();
        let mut free = self.lock();
        if filled { free.with_memory.push(address) } else { free.without.push(address) }
        Ok(filled)
    }

    /// A slot without memory; meanwhile nobody else knows of it.
    fn empty(&self, address: Address) {
        // A refusal would only mean that it keeps its memory.
        let _ = advise(address.0, HUGE_PAGE, libc::MADV_DONTNEED, "MADV_DONTNEED", true);
        self.lock().without.push(address);
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address for one more, without memory.
fn new_slot() -> Result<Address, MemoryError> {
    let host = map(HUGE_PAGE)?;
    advise(host, HUGE_PAGE, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE", true)?;
    advise(host, HUGE_PAGE, libc::MADV_DONTDUMP, "MADV_DONTDUMP", false)?;
    advise(host, HUGE_PAGE, libc::MADV_DONTFORK, "MADV_DONTFORK", false)?;
    Ok(Address(host))
}

impl Slot {
    /// All of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: BLOCK_BYTES of a private mapping that stays mapped, readable and writable; the slot is the
        // only one to know of it. Any content is valid, also the zeros that are left after a move.
        unsafe { std::slice::from_raw_parts_mut(self.address.0.as_ptr(), BLOCK_BYTES) }
    }

    /// The same as pages.
    pub fn pages_mut(&mut self) -> &mut [PageData<PAGE_WORDS>] {
        // SAFETY: as above; the mapping is aligned to more than a page.
        unsafe { std::slice::from_raw_parts_mut(self.address.0.as_ptr().cast(), BLOCK_PAGES as usize) }
    }
}

impl BlockMemory<PAGE_WORDS> for Slot {
    fn pages(&self) -> &[PageData<PAGE_WORDS>] {
        // SAFETY: as in `pages_mut`. The kernel moves the memory away only for `UffdMemory::install_block`, which
        // has the block itself, so no reference to its content exists.
        unsafe { std::slice::from_raw_parts(self.address.0.as_ptr().cast(), BLOCK_PAGES as usize) }
    }

    fn movable(&self) -> Option<u64> {
        Some(self.address.0.as_ptr() as u64)
    }

    fn moved(&mut self) {
        self.lands = false;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = self.slots.lock();
        if self.lands && free.with_memory.len() < KEPT {
            return free.with_memory.push(Address(self.address.0));
        }
        drop(free);
        self.slots.empty(Address(self.address.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_and_come_again() {
        let slots = Arc::new(Slots::default());
        let (mut one, mut other) = (slots.take().unwrap(), slots.take().unwrap());
        one.bytes_mut().fill(1);
        other.pages_mut().fill([2; PAGE_WORDS]);
        assert!(one.pages().iter().all(|page| *page == [0x0101_0101_0101_0101; PAGE_WORDS]));
        let address = one.movable();
        assert_eq!(address.unwrap() % HUGE_PAGE, 0);
        drop(one);
        let mut again = slots.take().unwrap();
        assert_eq!(again.movable(), address);
        again.moved();
        drop(again);
        other.pages_mut()[0][0] = 2;
        drop(other);
        assert_ne!(slots.take().unwrap().movable(), address, "one with memory comes first");
        other = slots.take().unwrap();
        assert_eq!(other.bytes_mut()[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((0..2 * FILLED).filter(|_| slots.fill_one().unwrap()).count(), FILLED);
    }

    #[test]
    fn what_left_as_a_huge_page_is_the_landing_place_of_another() {
        let slots = Arc::new(Slots::default());
        for huge in [true, false] {
            let guest = new_slot().unwrap().0;
            // SAFETY: a private mapping of that size that nobody else knows of.
            unsafe { guest.write_bytes(7, BLOCK_BYTES) };
            // SAFETY: as above.
            let slot = unsafe { slots.take_over(guest.as_ptr() as u64, huge) }.unwrap().unwrap();
            assert_eq!(slot.pages()[0][0], 0x0707_0707_0707_0707);
            let address = slot.movable();
            drop(slot);
            let mut again = slots.take().unwrap();
            assert_eq!(again.movable(), address, "the only one there is");
            assert_eq!(again.bytes_mut()[0], if huge { 7 } else { 0 });
            again.moved();
        }
    }

    #[test]
    fn few_keep_their_memory() {
        let slots = Arc::new(Slots::default());
        let mut many: Vec<Slot> = (0..KEPT + 2).map(|_| slots.take().unwrap()).collect();
        many.iter_mut().for_each(|slot| slot.bytes_mut()[0] = 7);
        drop(many);
        assert!(!slots.fill_one().unwrap());
        let again: Vec<Slot> = (0..KEPT + 2).map(|_| slots.take().unwrap()).collect();
        assert_eq!(again.iter().filter(|slot| slot.pages()[0][0] == 7).count(), KEPT);
        drop(again);
        (0..2 * KEPT).for_each(|_| slots.empty_one());
        assert_eq!(slots.lock().with_memory.len(), FILLED);
    }
}
