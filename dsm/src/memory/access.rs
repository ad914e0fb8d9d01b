//! What the guest may do with each page here.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a touch of a page does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Any touch faults.
    Absent,
    /// Reads go through, writes fault.
    ReadOnly,
    /// No touch faults.
    Writable,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "absent",
            Self::ReadOnly => "read-only",
            Self::Writable => "writable",
        })
    }
}

/// The access of every page, two bits each. Exact, because a page under userfaultfd becomes
/// present only when we fill it.
#[derive(Clone, Debug)]
pub struct AccessMap {
    words: Vec<u64>,
}

const PER_WORD: u32 = 32;

impl AccessMap {
    /// All `pages` absent.
    pub fn new(pages: u32) -> Self {
        Self {
            words: vec![0; pages.div_ceil(PER_WORD) as usize],
        }
    }

    /// The access of a page; absent beyond the end.
    pub fn get(&self, page: u32) -> Access {
        let word = self.words.get((page / PER_WORD) as usize).copied().unwrap_or(0);
        match word >> (page % PER_WORD * 2) & 3 {
            0 => Access::Absent,
            1 => Access::ReadOnly,
            _ => Access::Writable,
        }
    }

    /// Changes the access of a page; nothing beyond the end.
    pub fn set(&mut self, page: u32, access: Access) {
        if let Some(word) = self.words.get_mut((page / PER_WORD) as usize) {
            let shift = page % PER_WORD * 2;
            *word = *word & !(3 << shift) | (access as u64) << shift;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_neighbours_apart() {
        let mut map = AccessMap::new(65);
        map.set(31, Access::Writable);
        map.set(32, Access::ReadOnly);
        map.set(64, Access::Writable);
        map.set(31, Access::ReadOnly);
        let expected = [(30, Access::Absent), (31, Access::ReadOnly), (32, Access::ReadOnly)];
        for (page, access) in expected
            .into_iter()
            .chain([(33, Access::Absent), (64, Access::Writable)])
        {
            assert_eq!(map.get(page), access, "page {page}");
        }
        map.set(64, Access::Absent);
        assert_eq!(map.get(64), Access::Absent);
        assert_eq!(map.get(100_000), Access::Absent);
    }
}
