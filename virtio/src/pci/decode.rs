//! Which function answers at which guest-physical address.

use std::ops::Range;

/// One function's decoded BAR.
#[derive(Clone, Debug)]
pub(super) struct Decoded {
    /// Guest-physical addresses.
    pub(super) range: Range<u64>,
    /// Index of the function.
    pub(super) function: usize,
    /// Those addresses of `range` that take notifications only; may be empty.
    pub(super) doorbells: Range<u64>,
}

/// The decoded BARs, sorted by address.
#[derive(Debug, Default)]
pub(super) struct DecodeMap {
    sorted: Vec<Decoded>,
}

impl DecodeMap {
    pub(super) fn new(mut decoded: Vec<Decoded>) -> Self {
        decoded.sort_by_key(|d| d.range.start);
        DecodeMap { sorted: decoded }
    }

    /// The BAR that covers all `len` bytes at `gpa`. While a guest has BARs overlap, the one with
    /// the highest start below `gpa` answers.
    pub(super) fn find(&self, gpa: u64, len: usize) -> Option<&Decoded> {
        let end = gpa.checked_add(len as u64)?;
        let after = self.sorted.partition_point(|d| d.range.start <= gpa);
        self.sorted[..after].iter().rev().find(|d| end <= d.range.end)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Decoded> {
        self.sorted.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_whole_accesses_only() {
        let at = |start, function| Decoded {
            range: start..start + 0x1000,
            function,
            doorbells: 0..0,
        };
        let map = DecodeMap::new(vec![at(0x9000, 1), at(0x4000, 0)]);
        assert_eq!(map.find(0x4000, 4).map(|d| d.function), Some(0));
        assert_eq!(map.find(0x9ffc, 4).map(|d| d.function), Some(1));
        assert!(map.find(0x9ffd, 4).is_none());
        assert!(map.find(0x3fff, 1).is_none());
        assert!(map.find(0x5000, 1).is_none());
        assert!(map.find(u64::MAX, 8).is_none());
    }
}
