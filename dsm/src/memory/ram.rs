//! The host mapping of guest RAM.

use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU64;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::errno::Errno;
use crate::memory::{BLOCK_PAGES, MemoryError, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, RamLayout};

/// Mappings start on this boundary, so that host and guest huge pages coincide.
pub(super) const HUGE_PAGE: u64 = (BLOCK_PAGES as u64) << PAGE_SHIFT;

const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// One RAM range and where the host has it: what KVM_SET_USER_MEMORY_REGION needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte.
    pub host: u64,
}

/// The RAM of one node: private anonymous memory, one host mapping a guest-physical range.
///
/// The address range stays reserved until the process ends, because copies of [`Self::memory`]
/// may outlive this object; its content is given back on drop. Nothing may hold a Rust
/// reference to plain (non-atomic) data in it: the guest changes it at any time.
#[derive(Debug)]
pub struct GuestRam {
    layout: RamLayout,
    /// Host address of each range of the layout.
    hosts: Vec<NonNull<u8>>,
    memory: GuestMemoryMmap<()>,
    coherent: bool,
}

// SAFETY: the pointers name mappings that live as long as the process, are the same for every
// thread, and are only used for atomic or kernel-side access.
unsafe impl Send for GuestRam {}
// SAFETY: as above; no method changes the object through a shared reference.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Maps RAM for `ranges` (guest-physical address and length in bytes; ascending, disjoint,
    /// whole pages). `coherent` RAM is meant for [`crate::memory::UffdMemory`]: 4 KiB pages only until
    /// it is registered, since a huge page would make neighbours present that nobody owns here. Other
    /// RAM asks for huge pages. Neither is copied to child processes or core dumps.
    ///
    /// # Errors
    /// Bad ranges, or a host that refuses the mapping.
    pub fn new(ranges: &[(u64, u64)], coherent: bool) -> Result<Self, MemoryError> {
        let layout = RamLayout::new(ranges)?;
        let mut hosts = Vec::new();
        let mut regions = Vec::new();
        for range in layout.ranges() {
            let host = map(range.len)?;
            hosts.push(host);
            // Before the first touch: what is touched first may become a huge page.
            if coherent {
                advise(host, range.len, libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE", true)?;
            } else {
                advise(host, range.len, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE", true)?;
            }
            advise(host, range.len, libc::MADV_DONTDUMP, "MADV_DONTDUMP", false)?;
            advise(host, range.len, libc::MADV_DONTFORK, "MADV_DONTFORK", false)?;
            // SAFETY: `map` returned a page-aligned mapping of `len` bytes with these flags that
            // is never unmapped, so it outlives the region and every clone of it.
            let region = unsafe { MmapRegion::<()>::build_raw(host.as_ptr(), range.len as usize, PROT, FLAGS) };
            let region = region.map_err(|error| MemoryError::Regions {
                reason: error.to_string(),
            })?;
            let region = GuestRegionMmap::new(region, GuestAddress(range.gpa)).ok_or(MemoryError::Order {
                gpa: range.gpa,
                len: range.len,
            })?;
            regions.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Regions {
            reason: error.to_string(),
        })?;
        Ok(Self {
            layout,
            hosts,
            memory,
            coherent,
        })
    }

    /// The ranges and the page index over them.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Mapped for [`crate::memory::UffdMemory`].
    pub fn coherent(&self) -> bool {
        self.coherent
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u32 {
        self.layout.pages()
    }

    /// Page index of the page that holds `gpa`; `None` where there is no RAM.
    pub fn index_of(&self, gpa: u64) -> Option<u32> {
        self.layout.index_of(gpa)
    }

    /// Guest-physical address of a page; `None` beyond the last page.
    pub fn gpa_of(&self, page: u32) -> Option<u64> {
        self.layout.gpa_of(page)
    }

    /// The same RAM for vm-memory users: devices, loaders. Under userfaultfd a touch may block
    /// until the protocol has brought the page, so never touch with a protocol lock held.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Every range with its host address, in ascending order.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.layout
            .ranges()
            .iter()
            .zip(&self.hosts)
            .map(|(range, host)| RamRegion {
                gpa: range.gpa,
                len: range.len,
                host: host.as_ptr() as u64,
            })
    }

    /// Host address of a page; `None` beyond the last page.
    pub fn host_of(&self, page: u32) -> Option<u64> {
        self.page(page).map(|host| host.as_ptr() as u64)
    }

    /// Page index of the page at a host address; `None` outside the RAM.
    pub fn index_of_host(&self, address: u64) -> Option<u32> {
        self.layout.ranges().iter().zip(&self.hosts).find_map(|(range, host)| {
            let offset = address.checked_sub(host.as_ptr() as u64)?;
            (offset < range.len).then(|| range.first + (offset >> PAGE_SHIFT) as u32)
        })
    }

    /// The words of a page. Touching them faults like any other touch: the caller has to know
    /// that the page is present, and for writes that it is writable, or be ready to block.
    pub fn words(&self, page: u32) -> Option<&[AtomicU64; PAGE_WORDS]> {
        // SAFETY: `page` returns a page-aligned address inside a mapping that stays mapped
        // readable and writable until the process ends, with PAGE_SIZE bytes behind it. Atomics
        // may be shared with whoever else writes there.
        self.page(page)
            .map(|host| unsafe { host.cast::<[AtomicU64; PAGE_WORDS]>().as_ref() })
    }

    /// Drops a page's content; the next touch finds it absent (coherent RAM) or zero.
    ///
    /// # Errors
    /// A page beyond the RAM, or the kernel's refusal.
    pub fn discard(&self, page: u32) -> Result<(), MemoryError> {
        let bounds = MemoryError::Bounds {
            page,
            word: 0,
            pages: self.pages(),
        };
        let host = self.page(page).ok_or(bounds)?;
        advise(host, PAGE_SIZE as u64, libc::MADV_DONTNEED, "MADV_DONTNEED", true)
    }

    /// Drops the content of a range of pages that exist.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn discard_range(&self, pages: Range<u32>) -> Result<(), MemoryError> {
        for range in self.layout.ranges() {
            let first = pages.start.max(range.first);
            let end = pages.end.min(range.first + range.pages());
            if let Some(host) = (first < end).then(|| self.page(first)).flatten() {
                advise(host, u64::from(end - first) << PAGE_SHIFT, libc::MADV_DONTNEED, "MADV_DONTNEED", true)?;
            }
        }
        Ok(())
    }

    /// Gives the memory of the whole pages of a guest-physical range back to the host: they read as zeros.
    /// Addresses that are no RAM are left out.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn free(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let end = gpa.saturating_add(len);
        for range in self.layout.ranges() {
            let inside = |gpa: u64| gpa.clamp(range.gpa, range.gpa + range.len);
            let from = inside(gpa).next_multiple_of(PAGE_SIZE as u64);
            let to = inside(end) & !(PAGE_SIZE as u64 - 1);
            if let Some(first) = (from < to).then(|| self.index_of(from)).flatten() {
                self.discard_range(first..first + ((to - from) >> PAGE_SHIFT) as u32)?;
            }
        }
        Ok(())
    }

    /// Drops all content.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn discard_all(&self) -> Result<(), MemoryError> {
        for (range, host) in self.layout.ranges().iter().zip(&self.hosts) {
            advise(*host, range.len, libc::MADV_DONTNEED, "MADV_DONTNEED", true)?;
        }
        Ok(())
    }

    /// Allows huge pages. Under userfaultfd the kernel makes none where a page is absent.
    pub(super) fn allow_huge_pages(&self) -> Result<(), MemoryError> {
        for (range, host) in self.layout.ranges().iter().zip(&self.hosts) {
            advise(*host, range.len, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE", true)?;
        }
        Ok(())
    }

    /// Makes every page of a block present and writable, in memory that is not under userfaultfd.
    pub(super) fn populate(&self, block: u32) -> Result<(), MemoryError> {
        let page = block * BLOCK_PAGES;
        let bounds = MemoryError::Bounds { page, word: 0, pages: self.pages() };
        let host = self.page(page).ok_or(bounds)?;
        loop {
            match advise(host, HUGE_PAGE, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE", true) {
                Err(MemoryError::Advise { errno: Errno(libc::EINTR | libc::EAGAIN), .. }) => {}
                result => return result,
            }
        }
    }

    /// Has the kernel map a block whose pages are all present by one huge page, if it has one to spare.
    /// Whether it did changes nothing but speed.
    pub fn collapse(&self, block: u32) -> bool {
        let host = self.page(block.saturating_mul(BLOCK_PAGES));
        host.is_some_and(|host| advise(host, HUGE_PAGE, libc::MADV_COLLAPSE, "MADV_COLLAPSE", true).is_ok())
    }

    /// Whether a block lies in one range and at a boundary both in this process and for the guest, so that
    /// the kernel and KVM can map it by one huge page.
    pub(super) fn block_is_whole(&self, block: u32) -> bool {
        let Some(first) = block.checked_mul(BLOCK_PAGES) else { return false };
        let Some((_, range)) = self.layout.range_of(first) else { return false };
        let Some(gpa) = self.gpa_of(first) else { return false };
        first.saturating_add(BLOCK_PAGES) <= range.first + range.pages()
            && gpa % HUGE_PAGE == 0
            && self.host_of(first).is_some_and(|host| host % HUGE_PAGE == 0)
    }

    fn page(&self, page: u32) -> Option<NonNull<u8>> {
        let (at, range) = self.layout.range_of(page)?;
        let offset = (page - range.first) as usize * PAGE_SIZE;
        // SAFETY: the page is inside the range, so the offset is inside its mapping.
        self.hosts.get(at).map(|host| unsafe { host.add(offset) })
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        if let Err(error) = self.discard_all() {
            tracing::warn!(%error, "guest RAM was not given back");
        }
    }
}

/// Maps `len` bytes at a huge page boundary.
pub(super) fn map(len: u64) -> Result<NonNull<u8>, MemoryError> {
    let failed = |errno| MemoryError::Map { len, errno };
    let padded = len
        .checked_add(HUGE_PAGE)
        .and_then(|padded| usize::try_from(padded).ok())
        .ok_or(failed(Errno(libc::ENOMEM)))?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(null_mut(), padded, PROT, FLAGS, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(failed(Errno::last()));
    }
    let start = base as u64;
    let aligned = start.next_multiple_of(HUGE_PAGE);
    for (from, to) in [(start, aligned), (aligned + len, start + padded as u64)] {
        // SAFETY: both ends are page-aligned parts of the mapping made above that nobody knows
        // of yet. A failure leaves unused address space, which harms nothing.
        unsafe {
            if to > from {
                libc::munmap(from as *mut _, (to - from) as usize)
            } else {
                0
            }
        };
    }
    NonNull::new(aligned as *mut u8).ok_or(failed(Errno(libc::ENOMEM)))
}

/// Gives advice on guest RAM, or on memory meant for it. Advice that is not `needed` only saves memory or dump space; a
/// kernel built without it says EINVAL.
pub(super) fn advise(host: NonNull<u8>, len: u64, advice: i32, name: &'static str, needed: bool) -> Result<(), MemoryError> {
    // SAFETY: callers pass whole pages of a mapping made by `map`, which only holds guest data
    // that is accessed atomically or by the kernel, or integers that nobody refers to: losing its
    // content breaks no Rust object.
    if unsafe { libc::madvise(host.as_ptr().cast(), len as usize, advice) } == 0 {
        return Ok(());
    }
    let errno = Errno::last();
    // Without CONFIG_TRANSPARENT_HUGEPAGE there are no huge pages to ask for or to prevent.
    let huge = matches!(advice, libc::MADV_HUGEPAGE | libc::MADV_NOHUGEPAGE);
    if errno.0 == libc::EINVAL && (huge || !needed) {
        return Ok(());
    }
    Err(MemoryError::Advise { advice: name, errno })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn maps_ranges_with_one_view_for_all() {
        let ranges = [(0, 16 << 20), (4 << 30, 8 << 20)];
        let ram = GuestRam::new(&ranges, false).unwrap();
        assert_eq!(ram.pages(), 6144);
        ram.memory()
            .write_obj(0x1122_3344_5566_7788u64, GuestAddress((4 << 30) + 8))
            .unwrap();
        let page = ram.index_of(4 << 30).unwrap();
        assert_eq!(
            ram.words(page).unwrap()[1].load(Ordering::Relaxed),
            0x1122_3344_5566_7788
        );
        assert_eq!(ram.index_of_host(ram.host_of(page).unwrap() + 4095), Some(page));
        assert_eq!(ram.index_of_host(0), None);
        assert!(ram.words(6144).is_none());
        for region in ram.regions() {
            assert_eq!(region.host % HUGE_PAGE, 0);
            assert_eq!(ram.index_of_host(region.host), ram.index_of(region.gpa));
        }
        assert_eq!(ram.memory().num_regions(), 2);
    }

    #[test]
    fn discards_single_pages_and_everything() {
        let ram = GuestRam::new(&[(0, 1 << 20)], true).unwrap();
        for page in [3, 4] {
            ram.words(page).unwrap()[0].store(7, Ordering::Relaxed);
        }
        ram.discard(3).unwrap();
        assert_eq!(ram.words(3).unwrap()[0].load(Ordering::Relaxed), 0);
        assert_eq!(ram.words(4).unwrap()[0].load(Ordering::Relaxed), 7);
        ram.discard_all().unwrap();
        assert_eq!(ram.words(4).unwrap()[0].load(Ordering::Relaxed), 0);
        assert!(matches!(ram.discard(256), Err(MemoryError::Bounds { page: 256, .. })));
    }

    #[test]
    fn whole_pages_of_any_range_are_given_back() {
        let ram = GuestRam::new(&[(0, 1 << 20), (4 << 30, 1 << 20)], false).unwrap();
        for page in 0..ram.pages() {
            ram.words(page).unwrap()[0].store(7, Ordering::Relaxed);
        }
        // From the middle of page 254 over the hole to the middle of the second range's page 1.
        ram.free((254 << 12) + 100, (4 << 30) + 0x1800 - (254 << 12) - 100).unwrap();
        let kept = |page: u32| ram.words(page).unwrap()[0].load(Ordering::Relaxed) == 7;
        assert_eq!([254, 255, 256, 257].map(kept), [true, false, false, true]);
        ram.free(u64::MAX - 10, 100).unwrap();
        ram.free(2 << 30, 1 << 20).unwrap();
        assert!(kept(0) && kept(511));
    }

    #[test]
    fn memory_outlives_the_ram_it_came_from() {
        let ram = GuestRam::new(&[(0, 1 << 20)], false).unwrap();
        let memory = ram.memory().clone();
        memory.write_obj(5u64, GuestAddress(0)).unwrap();
        drop(ram);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }
}
