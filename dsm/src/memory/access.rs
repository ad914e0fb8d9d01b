//! What the guest may do with each page here.

use std::fmt;
use std::ops::Range;

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
    /// Pages that count as copies of other nodes' when they are present: all but these.
    home: Range<u32>,
    copies: u32,
}

const PER_WORD: u32 = 32;

impl AccessMap {
    /// All `pages` absent.
    pub fn new(pages: u32) -> Self {
        Self {
            words: vec![0; pages.div_ceil(PER_WORD) as usize],
            home: 0..pages,
            copies: 0,
        }
    }

    /// Says which pages have their home here; at first all have.
    pub fn set_home(&mut self, home: Range<u32>) {
        let pages = self.words.len() as u32 * PER_WORD;
        self.copies = (0..pages).filter(|page| !home.contains(page) && self.get(*page) != Access::Absent).count() as u32;
        self.home = home;
    }

    /// How many pages are present whose home is elsewhere.
    pub fn copies(&self) -> u32 {
        self.copies
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

    /// Whether all pages from `first` on have this access; both numbers are multiples of [`PER_WORD`].
    pub fn all(&self, first: u32, pages: u32, access: Access) -> bool {
        let pattern = 0x5555_5555_5555_5555 * access as u64;
        let words = (first / PER_WORD) as usize..((first + pages) / PER_WORD) as usize;
        self.words.get(words).is_some_and(|words| words.iter().all(|word| *word == pattern))
    }

    /// Changes the access of a page; nothing beyond the end.
    pub fn set(&mut self, page: u32, access: Access) {
        let before = self.get(page);
        if let Some(word) = self.words.get_mut((page / PER_WORD) as usize) {
            if !self.home.contains(&page) {
                self.copies += u32::from(access != Access::Absent);
                self.copies -= u32::from(before != Access::Absent);
            }
            let shift = page % PER_WORD * 2;
            *word = *word & !(3 << shift) | (access as u64) << shift;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_at_once() {
        let mut map = AccessMap::new(128);
        (32..96).for_each(|page| map.set(page, Access::Writable));
        assert!(map.all(32, 64, Access::Writable) && map.all(96, 32, Access::Absent));
        assert!(!map.all(0, 64, Access::Writable) && !map.all(96, 64, Access::Absent));
        map.set(95, Access::ReadOnly);
        assert!(!map.all(32, 64, Access::Writable));
        assert_eq!((map.get(31), map.get(94)), (Access::Absent, Access::Writable));
    }

    #[test]
    fn copies_are_counted_beyond_home() {
        let mut map = AccessMap::new(128);
        (0..4).for_each(|page| map.set(page * 32, Access::ReadOnly));
        assert_eq!(map.copies(), 0);
        map.set_home(32..96);
        assert_eq!(map.copies(), 2);
        map.set(33, Access::Writable);
        map.set(127, Access::Writable);
        map.set(96, Access::Writable);
        assert_eq!(map.copies(), 3);
        map.set(0, Access::Absent);
        map.set(1, Access::Absent);
        map.set(64, Access::Absent);
        assert_eq!(map.copies(), 2);
    }

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
