//! Guest-physical RAM ranges and the dense page index over them.

use crate::memory::MemoryError;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// 64-bit words a page.
pub const PAGE_WORDS: usize = PAGE_SIZE / 8;
/// Pages of a block: what one huge page maps, 2 MiB. Block `n` begins with page index `n * BLOCK_PAGES`.
pub const BLOCK_PAGES: u32 = 512;

/// One contiguous range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address; page-aligned.
    pub gpa: u64,
    /// Length in bytes; whole pages.
    pub len: u64,
    /// Page index of the first page.
    pub first: u32,
}

impl RamRange {
    /// Number of pages.
    pub fn pages(&self) -> u32 {
        // The layout has no more than u32::MAX pages in all.
        (self.len >> PAGE_SHIFT) as u32
    }
}

/// The RAM of a machine: ascending, disjoint ranges, and the page index over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<RamRange>,
    pages: u32,
}

impl RamLayout {
    /// Checks `ranges` (guest-physical address and length in bytes) and numbers their pages.
    ///
    /// # Errors
    /// Ranges that are empty, not page-aligned, overlapping or out of order, and a total beyond
    /// `u32::MAX` pages.
    pub fn new(ranges: &[(u64, u64)]) -> Result<Self, MemoryError> {
        let mut checked = Vec::with_capacity(ranges.len());
        let (mut pages, mut end) = (0u64, 0u64);
        for &(gpa, len) in ranges {
            if len == 0 || (gpa | len) & (PAGE_SIZE as u64 - 1) != 0 {
                return Err(MemoryError::Unaligned { gpa, len });
            }
            let next = gpa.checked_add(len).filter(|_| gpa >= end);
            end = next.ok_or(MemoryError::Order { gpa, len })?;
            let first = u32::try_from(pages).map_err(|_| MemoryError::Size { pages })?;
            pages += len >> PAGE_SHIFT;
            checked.push(RamRange { gpa, len, first });
        }
        match u32::try_from(pages) {
            Ok(count) if count > 0 => Ok(Self {
                ranges: checked,
                pages: count,
            }),
            _ => Err(MemoryError::Size { pages }),
        }
    }

    /// The ranges in ascending order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Pages of RAM: page indices are below this.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Page index of the page that holds `gpa`; `None` where there is no RAM.
    pub fn index_of(&self, gpa: u64) -> Option<u32> {
        let after = self.ranges.partition_point(|range| range.gpa <= gpa);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = gpa - range.gpa;
        (offset < range.len).then(|| range.first + (offset >> PAGE_SHIFT) as u32)
    }

    /// Guest-physical address of a page; `None` beyond the last page.
    pub fn gpa_of(&self, page: u32) -> Option<u64> {
        let (_, range) = self.range_of(page)?;
        Some(range.gpa + (u64::from(page - range.first) << PAGE_SHIFT))
    }

    /// The range that holds `page`, and its place among the ranges.
    pub fn range_of(&self, page: u32) -> Option<(usize, &RamRange)> {
        if page >= self.pages {
            return None;
        }
        let at = self
            .ranges
            .partition_point(|range| range.first <= page)
            .checked_sub(1)?;
        self.ranges.get(at).map(|range| (at, range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn numbers_pages_without_gaps() {
        let layout = RamLayout::new(&[(0, 3 * GIB), (4 * GIB, 2 * GIB)]).unwrap();
        assert_eq!(u64::from(layout.pages()), (5 * GIB) >> PAGE_SHIFT);
        assert_eq!(layout.index_of(0), Some(0));
        assert_eq!(layout.index_of(0x1fff), Some(1));
        let last_low = ((3 * GIB) >> PAGE_SHIFT) as u32 - 1;
        assert_eq!(layout.index_of(3 * GIB - 1), Some(last_low));
        assert_eq!(layout.index_of(3 * GIB), None);
        assert_eq!(layout.index_of(4 * GIB - 1), None);
        assert_eq!(layout.index_of(4 * GIB), Some(last_low + 1));
        assert_eq!(layout.index_of(6 * GIB - 1), Some(layout.pages() - 1));
        assert_eq!(layout.index_of(6 * GIB), None);
        assert_eq!(layout.index_of(u64::MAX), None);
        for page in [0, 1, last_low, last_low + 1, layout.pages() - 1] {
            assert_eq!(layout.index_of(layout.gpa_of(page).unwrap()), Some(page));
        }
        assert_eq!(layout.gpa_of(layout.pages()), None);
        assert_eq!(layout.gpa_of(u32::MAX), None);
    }

    #[test]
    fn has_no_page_below_a_first_range_that_starts_high() {
        let layout = RamLayout::new(&[(GIB, GIB)]).unwrap();
        assert_eq!(layout.index_of(0), None);
        assert_eq!(layout.index_of(GIB), Some(0));
    }

    #[test]
    fn refuses_bad_ranges() {
        let kind = |ranges: &[(u64, u64)]| RamLayout::new(ranges).unwrap_err();
        assert!(matches!(kind(&[(0, 0)]), MemoryError::Unaligned { .. }));
        assert!(matches!(kind(&[(1, 4096)]), MemoryError::Unaligned { .. }));
        assert!(matches!(kind(&[(0, 4097)]), MemoryError::Unaligned { .. }));
        assert!(matches!(kind(&[(4096, 4096), (0, 4096)]), MemoryError::Order { .. }));
        assert!(matches!(kind(&[(0, 8192), (4096, 4096)]), MemoryError::Order { .. }));
        let top = !(PAGE_SIZE as u64 - 1);
        assert!(matches!(kind(&[(top, 8192)]), MemoryError::Order { .. }));
        assert!(matches!(kind(&[]), MemoryError::Size { pages: 0 }));
        assert!(matches!(kind(&[(0, 1 << 44)]), MemoryError::Size { .. }));
    }
}
