//! Guest RAM under userfaultfd: set-up, page states, saved state.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::memory::access::AccessMap;
use crate::memory::blocks::Blocks;
use crate::memory::slots::Slots;
use crate::memory::uffd::{Features, Uffd};
use crate::memory::{Access, BLOCK_PAGES, FaultSource, GuestRam, MemoryError, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS};

/// Version of [`MemoryState`].
const STATE_VERSION: u32 = 1;
/// Neighbouring pages that share a userfaultfd: 64 MiB.
const STRIPE_PAGES: u32 = 1 << (26 - PAGE_SHIFT);

/// Most pages that [`UffdMemory::try_install_zeros`] takes.
pub(super) const ZEROS_AT_ONCE: usize = 32;
static ZEROS: [[u64; PAGE_WORDS]; ZEROS_AT_ONCE] = [[0; PAGE_WORDS]; ZEROS_AT_ONCE];

/// Guest RAM under userfaultfd, as the coherence protocol uses it. Starts with every page absent.
///
/// Operations that find a page in the wrong state, or whose request the kernel refuses, change
/// nothing (a group of zero pages may be filled in part) and keep the first error for [`UffdMemory::failed`]; the node cannot go on then.
/// Dropping it together with its fault sources ends coherence: waiting threads go on and see
/// zero pages.
#[derive(Debug)]
pub struct UffdMemory {
    ram: Arc<GuestRam>,
    /// 64 MiB stripes go round these: the kernel's waiting lists are per descriptor and do not
    /// scale beyond a few faulting CPUs each.
    uffds: Vec<Arc<Uffd>>,
    pub(super) access: AccessMap,
    pub(super) blocks: Blocks,
    slots: Arc<Slots>,
    failed: OnceLock<MemoryError>,
}

/// What of the memory's state is saved in a snapshot, beside the content of the present pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Version of this structure.
    pub version: u32,
    /// Guest-physical address and length in bytes of each RAM range.
    pub ranges: Vec<(u64, u64)>,
    /// Present pages: first page index, count, and access of each run.
    pub runs: Vec<(u32, u32, Access)>,
}

impl UffdMemory {
    /// Puts coherent RAM under `shards` userfaultfds (at least one) and returns one fault source
    /// for each. All content is discarded: whatever was written before belongs to nobody.
    ///
    /// # Errors
    /// RAM that is not coherent, no permission for userfaultfd, a kernel that lacks parts of it.
    pub fn new(ram: Arc<GuestRam>, shards: usize) -> Result<(Self, Vec<FaultSource>), MemoryError> {
        Self::keeping(ram, shards, &[])
    }

    /// Like [`UffdMemory::new`], but the pages of `kept` keep their content and start out writable.
    ///
    /// # Errors
    /// As for [`UffdMemory::new`]; a range beyond the last page.
    pub fn keeping(
        ram: Arc<GuestRam>,
        shards: usize,
        kept: &[Range<u32>],
    ) -> Result<(Self, Vec<FaultSource>), MemoryError> {
        if !ram.coherent() {
            return Err(MemoryError::NotCoherent);
        }
        let uffds = (0..shards.max(1))
            .map(|_| Uffd::open().map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(beyond) = kept.iter().find(|r| r.start > r.end || r.end > ram.pages()) {
            return Err(MemoryError::Bounds { page: beyond.end, word: 0, pages: ram.pages() });
        }
        // All mappings that a range is split into later share what the kernel keeps of its first page
        // (anon_vma): without that, neighbours of one kind would not become one mapping again.
        let firsts = ram.layout().ranges().iter().map(|range| range.first).collect::<Vec<_>>();
        for page in kept.iter().cloned().flatten().chain(firsts) {
            // A page nobody wrote is not there yet, and would fault for ever once registered. Two steps,
            // because adding nothing is something the compiler leaves out.
            if let Some(words) = ram.words(page) {
                words[0].fetch_add(1, Ordering::SeqCst);
                words[0].fetch_sub(1, Ordering::SeqCst);
            }
        }
        let mut memory = Self {
            access: AccessMap::new(ram.pages()),
            blocks: Blocks::new(ram.pages()),
            ram,
            uffds,
            slots: Arc::default(),
            failed: OnceLock::new(),
        };
        for range in memory.ram.layout().ranges() {
            let end = range.first + range.pages();
            let mut first = range.first;
            while first < end {
                let next = (first / STRIPE_PAGES + 1).saturating_mul(STRIPE_PAGES).min(end);
                let (uffd, address) = memory.at(first)?;
                let len = u64::from(next - first) << PAGE_SHIFT;
                // SAFETY: pages `first..next` are in one range, so contiguous in a private
                // anonymous mapping that GuestRam keeps until the process ends and that is only
                // accessed atomically.
                unsafe { uffd.register(address, len) }?;
                first = next;
            }
        }
        memory.discard_others(kept)?;
        memory.ram.allow_huge_pages()?;
        let sources = memory
            .uffds
            .iter()
            .map(|uffd| FaultSource::new(Arc::clone(&memory.ram), Arc::clone(uffd)))
            .collect::<Result<_, _>>()?;
        Ok((memory, sources))
    }

    /// Discards every page that is not in `kept`, whose pages (made present before they were
    /// registered) become writable.
    fn discard_others(&mut self, kept: &[Range<u32>]) -> Result<(), MemoryError> {
        if kept.is_empty() {
            return self.ram.discard_all();
        }
        for page in kept.iter().cloned().flatten() {
            self.access.set(page, Access::Writable);
        }
        let mut kept: Vec<_> = kept.iter().map(|r| (r.start, r.end)).collect();
        kept.sort_unstable();
        let mut next = 0;
        for (start, end) in kept.into_iter().chain([(self.ram.pages(), self.ram.pages())]) {
            self.ram.discard_range(next..start)?;
            next = next.max(end);
        }
        Ok(())
    }

    /// The RAM underneath.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The kernel's optional features in use.
    pub fn features(&self) -> Features {
        self.uffds
            .first()
            .map_or(Features { thread_id: false, moves: false }, |uffd| uffd.features())
    }

    /// The first error of any operation; once there is one, the node has to stop.
    pub fn failed(&self) -> Option<MemoryError> {
        self.failed.get().cloned()
    }

    /// Says which pages have their home at this node: the others are copies.
    pub fn set_home(&mut self, home: Range<u32>) {
        self.access.set_home(home);
    }

    /// Pages that are present here and have their home elsewhere.
    pub fn copies(&self) -> u32 {
        self.access.copies()
    }

    /// What the guest may do with a page now; absent beyond the last page.
    pub fn access(&self, page: u32) -> Access {
        self.access.get(page)
    }

    /// The state to save, versioned. The content of present pages is saved apart.
    pub fn save(&self) -> MemoryState {
        let mut runs: Vec<(u32, u32, Access)> = Vec::new();
        for page in 0..self.ram.pages() {
            match (self.access(page), runs.last_mut()) {
                (Access::Absent, _) => {}
                (access, Some((first, count, last))) if *last == access && *first + *count == page => {
                    *count += 1;
                }
                (access, _) => runs.push((page, 1, access)),
            }
        }
        let ranges = self
            .ram
            .layout()
            .ranges()
            .iter()
            .map(|range| (range.gpa, range.len))
            .collect();
        MemoryState {
            version: STATE_VERSION,
            ranges,
            runs,
        }
    }

    /// Installs the pages of a saved state; `content` gives each page's words. All pages must be
    /// absent.
    ///
    /// # Errors
    /// Another version or RAM layout, runs beyond the RAM or on present pages, or a failed page
    /// operation.
    pub fn restore(
        &mut self,
        state: &MemoryState,
        mut content: impl FnMut(u32) -> Box<[u64; PAGE_WORDS]>,
    ) -> Result<(), MemoryError> {
        let refuse = |reason: String| Err(MemoryError::Saved { reason });
        if state.version != STATE_VERSION {
            return refuse(format!("version {} is not {STATE_VERSION}", state.version));
        }
        let ranges = self.ram.layout().ranges();
        if !ranges
            .iter()
            .map(|range| (range.gpa, range.len))
            .eq(state.ranges.iter().copied())
        {
            return refuse("its RAM ranges are not this machine's".into());
        }
        for &(first, count, access) in &state.runs {
            let end = first.checked_add(count).filter(|end| *end <= self.ram.pages());
            let Some(end) = end.filter(|_| access != Access::Absent) else {
                return refuse(format!("run of {count} pages from {first} does not fit"));
            };
            for page in first..end {
                self.try_install(page, &content(page), access == Access::Writable, "restore")?;
            }
        }
        Ok(())
    }

    /// Fills absent pages, [`ZEROS_AT_ONCE`] at most, with zeros: in one request where they are
    /// neighbours in this process, too, and belong to one userfaultfd.
    pub(super) fn try_install_zeros(&mut self, pages: Range<u32>) -> Result<(), MemoryError> {
        for page in pages.clone() {
            self.expect(page, "install", Access::Absent)?;
        }
        let Some(last) = pages.clone().last() else { return Ok(()) };
        let (uffd, address) = self.at(pages.start)?;
        let (last_uffd, last_address) = self.at(last)?;
        let len = pages.len() << PAGE_SHIFT;
        if std::ptr::eq(uffd, last_uffd) && last_address.checked_sub(address) == Some((len - PAGE_SIZE) as u64) {
            uffd.copy(address, &ZEROS[..pages.len()], true)?;
        } else {
            for page in pages.clone() {
                let (uffd, address) = self.at(page)?;
                uffd.copy(address, &ZEROS[..1], true)?;
            }
        }
        for page in pages {
            self.access.set(page, Access::Writable);
        }
        Ok(())
    }

    pub(super) fn try_install(
        &mut self,
        page: u32,
        data: &[u64; PAGE_WORDS],
        writable: bool,
        operation: &'static str,
    ) -> Result<(), MemoryError> {
        self.expect(page, operation, Access::Absent)?;
        let (uffd, address) = self.at(page)?;
        uffd.copy(address, std::slice::from_ref(data), writable)?;
        self.access
            .set(page, if writable { Access::Writable } else { Access::ReadOnly });
        Ok(())
    }

    /// The pages that have the userfaultfd of `page` in common with it: first, and the one past the last.
    pub(super) fn stripe_of(page: u32) -> (u32, u32) {
        let first = page - page % STRIPE_PAGES;
        (first, first.saturating_add(STRIPE_PAGES))
    }

    /// Calls `each` for runs of pages that are neighbours in this process, too, and belong to one userfaultfd
    /// and one mapping. Blocks that were parted may stay mappings of their own, and Linux 6.1 refuses a
    /// request over more than one (ENOENT): so no run leaves its block.
    pub(super) fn side_by_side(
        &mut self,
        pages: Range<u32>,
        mut each: impl FnMut(&mut Self, Range<u32>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut next = pages.start;
        while next < pages.end {
            let first = next;
            // A block has one userfaultfd, but may reach over the end of a RAM range.
            let block = (first / BLOCK_PAGES + 1).saturating_mul(BLOCK_PAGES);
            let range = self.ram.layout().range_of(first).map_or(block, |(_, range)| range.first + range.pages());
            next = pages.end.min(block).min(range);
            each(self, first..next)?;
        }
        Ok(())
    }

    /// Where blocks that go or come whole are on their way.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// The userfaultfd of a page, and its host address.
    pub(super) fn at(&self, page: u32) -> Result<(&Uffd, u64), MemoryError> {
        let shard = (page / STRIPE_PAGES) as usize % self.uffds.len();
        let address = self.ram.host_of(page).ok_or_else(|| self.bounds(page, 0))?;
        Ok((&self.uffds[shard], address))
    }

    pub(super) fn word(&self, page: u32, word: usize) -> Result<&AtomicU64, MemoryError> {
        let words = self.ram.words(page).ok_or_else(|| self.bounds(page, word))?;
        words.get(word).ok_or_else(|| self.bounds(page, word))
    }

    fn bounds(&self, page: u32, word: usize) -> MemoryError {
        MemoryError::Bounds {
            page,
            word,
            pages: self.ram.pages(),
        }
    }

    pub(super) fn expect(&self, page: u32, operation: &'static str, expected: Access) -> Result<(), MemoryError> {
        match self.access(page) {
            access if access == expected => Ok(()),
            access => Err(MemoryError::State {
                page,
                operation,
                access,
            }),
        }
    }

    pub(super) fn present(&self, page: u32, operation: &'static str) -> Result<(), MemoryError> {
        match self.access(page) {
            access @ Access::Absent => Err(MemoryError::State {
                page,
                operation,
                access,
            }),
            _ => Ok(()),
        }
    }

    /// Keeps the first error.
    pub(super) fn keep<T>(&self, result: Result<T, MemoryError>) -> Option<T> {
        result
            .map_err(|error| {
                if self.failed.set(error.clone()).is_ok() {
                    tracing::error!(%error, "guest memory failed");
                }
            })
            .ok()
    }
}
