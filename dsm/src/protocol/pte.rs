//! What the protocol has to know of x86 page-table entries (AMD64 APM vol. 2, section 5.3; Intel SDM
//! vol. 3A, section 4.5). Levels count from 1 (page table) to 4 (PML4); 5-level paging is not offered
//! to the guest.

/// Entry is present.
pub const PRESENT: u64 = 1;
/// Entry allows writes.
pub const WRITABLE: u64 = 1 << 1;
/// Set by hardware when the entry was used in a walk.
pub const ACCESSED: u64 = 1 << 5;
/// Set by hardware when the page was written through this leaf entry.
pub const DIRTY: u64 = 1 << 6;
/// At levels 2 and 3: the entry maps a large page.
pub const PAGE_SIZE: u64 = 1 << 7;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The level of a PML4, where CR3 points.
pub const ROOT_LEVEL: u8 = 4;

/// The page frame number of the next lower table that `entry`, found at `level`, points to.
pub fn child_frame(entry: u64, level: u8) -> Option<u64> {
    let table = level > 1 && entry & PRESENT != 0 && entry & PAGE_SIZE == 0;
    table.then_some((entry & FRAME) >> 12)
}

/// The entry with the bits set that hardware might still set by itself in a leaf, so that a walk on
/// another host has nothing left to write there. A spurious D is harmless, a lost one loses data.
/// Entries that point to tables are left alone: their A bit is merged when hardware sets it.
pub fn settled(entry: u64, level: u8) -> u64 {
    let leaf = level == 1 || (level < ROOT_LEVEL && entry & PAGE_SIZE != 0);
    if entry & PRESENT == 0 || !leaf {
        return entry;
    }
    let dirty = if entry & WRITABLE != 0 { DIRTY } else { 0 };
    entry | ACCESSED | dirty
}

/// Whether two entries differ in nothing but the bits hardware sets.
pub fn same_but_accessed_dirty(a: u64, b: u64) -> bool {
    (a ^ b) & !(ACCESSED | DIRTY) == 0
}

/// Whether `entry` can stand in a PML4: empty, or present and pointing to a table with no
/// reserved or software-high bits set but NX (bit 7 is reserved at this level).
pub fn plausible_root_entry(entry: u64) -> bool {
    entry == 0 || (entry & PRESENT != 0 && entry & PAGE_SIZE == 0 && (entry >> 52) & 0x7ff == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_present_non_leaf_entries_above_level_one() {
        assert_eq!(child_frame(0x1234_5063, 4), Some(0x12345));
        assert_eq!(child_frame(0x1234_5062, 4), None);
        assert_eq!(child_frame(0x1234_50e3, 2), None, "a 2 MiB page");
        assert_eq!(child_frame(0x1234_5063, 1), None);
        assert_eq!(child_frame(0x8000_0000_1234_5063, 3), Some(0x12345), "NX is no address bit");
    }

    #[test]
    fn settling_sets_only_what_hardware_could_set() {
        assert_eq!(settled(0x1000 | PRESENT, 1), 0x1000 | PRESENT | ACCESSED, "read-only leaf: no D");
        assert_eq!(settled(0x1003, 1), 0x1003 | ACCESSED | DIRTY);
        assert_eq!(settled(0x1003, 3), 0x1003, "not a leaf");
        assert_eq!(settled(0x1083, 2), 0x1083 | ACCESSED | DIRTY, "large page");
        assert_eq!(settled(0x1002, 1), 0x1002, "not present: a swap entry belongs to software");
    }
}
