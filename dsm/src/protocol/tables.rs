//! The page-table pages this node holds a replica of, and what hangs below them.
//!
//! A page is a page table *now*, as far as this node can see, when it is a root or when an entry of
//! a replica held here points to it. Both are kept up to date word by word, by every change made or
//! merged here.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::geometry::Geometry;
use super::memory::{PageData, words};
use super::pte;
use super::rest::{Patience, Rest};

/// A replica held here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Replica<const W: usize> {
    /// The content at the last merge.
    #[serde(with = "words")]
    pub twin: Box<PageData<W>>,
    /// Asked home to make this node its owner; it no longer counts as anybody's parent.
    pub leaving: bool,
    /// A changed word cannot stand in a table of this level: the page is something else now.
    pub implausible: bool,
    /// No other node holds one.
    pub alone: bool,
    pub rest: Rest,
}

/// The order of comparing, and of finding out what is no table any more: highest level first, so that whoever sees a new
/// link sees what it points to.
type ByLevel = BTreeSet<(Reverse<u8>, u32)>;

/// Most replicas that are looked at to find one that may leave.
const LOOKED_AT: usize = 8;

/// What points to a page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Link {
    /// Entries of replicas held here: (page, word).
    parents: BTreeSet<(u32, u16)>,
    level: u8,
    /// Seen at two levels at once: never treated as a table.
    mixed: bool,
}

/// All this node knows of page tables.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tables<const W: usize> {
    replicas: BTreeMap<u32, (u8, Replica<W>)>,
    /// Replicas that may have changed since the last flush: neither leaving nor at rest.
    active: ByLevel,
    /// Replicas of which something has changed that tells whether they are tables.
    suspects: ByLevel,
    /// Replicas at rest that are not leaving, by [`Rest::queued`].
    resting: BTreeSet<(u64, u32)>,
    /// Flushes and merges so far.
    flushes: u64,
    patience: Patience,
    links: BTreeMap<u32, Link>,
    roots: BTreeSet<u32>,
    /// Pages of the loaded kernel image: its own tables are never freed.
    image: Range<u32>,
}

impl<const W: usize> Tables<W> {
    /// `image`: the pages the kernel image was loaded to.
    pub fn new(image: Range<u32>) -> Self {
        Tables {
            replicas: BTreeMap::new(),
            active: BTreeSet::new(),
            suspects: BTreeSet::new(),
            resting: BTreeSet::new(),
            flushes: 0,
            patience: Patience::default(),
            links: BTreeMap::new(),
            roots: BTreeSet::new(),
            image,
        }
    }

    /// Replicas rest after so many flushes without a change, counted from now on.
    pub fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
        let active = self.replicas.values_mut().filter(|(_, replica)| !replica.rest.is_resting());
        active.for_each(|(_, replica)| replica.rest = Rest::new(patience));
    }

    /// Whether everything in here is about pages that exist.
    pub fn fits(&self, geometry: &Geometry) -> bool {
        let pages = geometry.pages();
        let key = |(page, (level, _)): (&u32, &(u8, Replica<W>))| (Reverse(*level), *page);
        self.replicas.keys().chain(self.links.keys()).chain(&self.roots).all(|page| *page < pages)
            && self.active == self.replicas.iter().filter(|(_, (_, r))| !r.leaving && !r.rest.is_resting()).map(key).collect()
            && self.suspects.is_subset(&self.replicas.iter().map(key).collect())
            && self.resting == self.replicas.iter().filter_map(|(page, (_, r))| Some((r.rest.queued().filter(|_| !r.leaving)?, *page))).collect()
            && self.replicas.values().all(|(level, _)| (1..=pte::ROOT_LEVEL).contains(level))
            && self.image.start <= self.image.end
            && self.image.end <= pages
            && self.links.values().flat_map(|link| &link.parents).all(|(page, word)| *page < pages && usize::from(*word) < W)
    }

    /// The pages the vCPUs that run here have in CR3 now.
    pub fn set_roots(&mut self, roots: impl IntoIterator<Item = u32>) {
        self.roots = roots.into_iter().collect();
    }

    /// The page's level if it is a table in use, as far as this node can see.
    pub fn level(&self, page: u32) -> Option<u8> {
        if self.roots.contains(&page) {
            return Some(pte::ROOT_LEVEL);
        }
        self.links.get(&page).filter(|l| !l.mixed).map(|l| l.level)
    }

    /// The replica of `page`, if one is held.
    pub fn replica(&self, page: u32) -> Option<(u8, &Replica<W>)> {
        self.replicas.get(&page).map(|(level, r)| (*level, r))
    }

    /// Whether a page with this content may be taken for the root it was last seen as. The kernel
    /// image's own roots may; others must map the kernel exactly as one of those does, or the page was
    /// freed since and is data.
    pub fn fits_root(&self, page: u32, data: &PageData<W>) -> bool {
        if !data.iter().all(|&e| pte::plausible_root_entry(e)) {
            return false;
        }
        let same = |a: &PageData<W>| a[W / 2..].iter().zip(&data[W / 2..]).all(|(&a, &b)| pte::same_but_accessed_dirty(a, b));
        let image_roots =
            || self.replicas.range(self.image.clone()).filter(|(_, (level, _))| *level == pte::ROOT_LEVEL);
        self.image.contains(&page) || image_roots().any(|(_, (_, root))| same(&root.twin))
    }

    /// An entry that pointed to the table `page` at the last merge: (page, word).
    pub fn parent(&self, page: u32) -> Option<(u32, usize)> {
        self.links.get(&page)?.parents.first().map(|&(parent, word)| (parent, usize::from(word)))
    }

    /// Pages held.
    pub fn held(&self) -> Vec<u32> {
        self.replicas.keys().copied().collect()
    }

    /// Number of replicas held.
    pub fn len(&self) -> usize {
        self.replicas.len()
    }

    /// A flush, or a merge from elsewhere.
    pub fn tick(&mut self) {
        self.flushes = self.flushes.saturating_add(1);
    }

    /// The pages a flush has to compare, parents before children.
    pub fn active(&self) -> Vec<u32> {
        self.active.iter().map(|&(_, page)| page).collect()
    }

    /// Replicas in a range of pages.
    pub fn held_in(&self, pages: Range<u32>) -> usize {
        self.replicas.range(pages).count()
    }

    /// A flush has compared a replica. One that is due, but is not to rest now, may count as changed.
    pub fn compared(&mut self, page: u32, changed: bool) {
        if let Some((_, replica)) = self.replicas.get_mut(&page) {
            replica.rest.compared(changed);
        }
    }

    /// A replica that is the same as its twin and can't be written to any more rests.
    pub fn rest(&mut self, page: u32) {
        if let Some((level, replica)) = self.replicas.get_mut(&page) {
            replica.rest.begin(self.flushes);
            self.resting.insert((self.flushes, page));
            self.active.remove(&(Reverse(*level), page));
        }
    }

    /// A replica rests no longer, since it is `touched` here or is to be none any more; whether it did, in which case it
    /// has to be made writable.
    pub fn rouse(&mut self, page: u32, touched: bool) -> bool {
        let Some((level, replica)) = self.replicas.get_mut(&page) else { return false };
        replica.rest.queued().map(|at| self.resting.remove(&(at, page)));
        let rested = replica.rest.end(self.flushes, touched, self.patience);
        if rested && !replica.leaving {
            self.active.insert((Reverse(*level), page));
        }
        rested
    }

    /// Whether what is not looked at need not be: every replica that is neither leaving nor a suspect is a table.
    #[cfg(test)]
    pub fn suspects_all(&self) -> bool {
        self.replicas.iter().all(|(page, (level, replica))| {
            replica.leaving || self.suspects.contains(&(Reverse(*level), *page)) || self.is_table(*page, *level, replica)
        })
    }

    /// A replica that has rested for so long that it may be given up, and is the last of its branch here: what hangs below
    /// one that is held is known to be a table by that. Roots stay, since other roots are compared with the image's.
    pub fn take_leaver(&mut self, geometry: &Geometry) -> Option<u32> {
        for _ in 0..LOOKED_AT {
            let &(at, page) = self.resting.first()?;
            if self.patience.leave == 0 || self.flushes.saturating_sub(at) < u64::from(self.patience.leave) {
                return None;
            }
            let (level, replica) = self.replicas.get(&page)?;
            let mut children = replica.twin.iter().filter_map(|entry| geometry.page_of_frame(pte::child_frame(*entry, *level)?));
            if *level < pte::ROOT_LEVEL && !children.any(|child| self.replicas.contains_key(&child)) {
                return Some(page);
            }
            // After as long again.
            self.resting.remove(&(at, page));
            self.resting.insert((self.flushes, page));
            self.replicas.get_mut(&page)?.1.rest.stay(self.flushes);
        }
        None
    }

    /// Nobody else holds a replica of `page` any more: it need be none.
    pub fn set_alone(&mut self, page: u32) {
        if let Some((level, replica)) = self.replicas.get_mut(&page) {
            replica.alone = true;
            self.suspects.insert((Reverse(*level), page));
        }
    }

    /// Whether a replica rests.
    pub fn is_resting(&self, page: u32) -> bool {
        self.replicas.get(&page).is_some_and(|(_, replica)| replica.rest.is_resting())
    }

    /// Replicas at rest.
    pub fn resting(&self) -> usize {
        self.replicas.values().filter(|(_, replica)| replica.rest.is_resting()).count()
    }

    /// Forgets what only counts history: of the rests their order is left.
    #[cfg(test)]
    pub fn forget_history(&mut self) {
        self.replicas.values_mut().for_each(|(_, replica)| replica.rest.forget_history(0));
        self.resting = self.resting.iter().zip(0..).map(|((_, page), order)| (order, *page)).collect();
        self.flushes = self.resting.len() as u64;
        for (order, page) in &self.resting {
            self.replicas.get_mut(page).expect("held").1.rest.forget_history(*order);
        }
    }

    /// A replica of `page` is held from now on.
    pub fn insert(&mut self, geometry: &Geometry, page: u32, level: u8, twin: Box<PageData<W>>) {
        for (word, &entry) in twin.iter().enumerate() {
            self.link(geometry, (page, word), level, entry);
        }
        self.active.insert((Reverse(level), page));
        self.suspects.insert((Reverse(level), page));
        let rest = Rest::new(self.patience);
        self.replicas.insert(page, (level, Replica { twin, leaving: false, implausible: false, alone: false, rest }));
    }

    /// The replica of `page` is held no longer; returns its twin.
    pub fn remove(&mut self, geometry: &Geometry, page: u32) -> Option<Box<PageData<W>>> {
        let (level, replica) = self.replicas.remove(&page)?;
        self.active.remove(&(Reverse(level), page));
        self.suspects.remove(&(Reverse(level), page));
        replica.rest.queued().map(|at| self.resting.remove(&(at, page)));
        if !replica.leaving {
            for (word, &entry) in replica.twin.iter().enumerate() {
                self.unlink(geometry, (page, word), level, entry);
            }
        }
        Some(replica.twin)
    }

    /// Word `word` of a replica has become `new` (here, or by a merge).
    pub fn set_word(&mut self, geometry: &Geometry, page: u32, word: usize, new: u64) {
        let Some((level, replica)) = self.replicas.get_mut(&page) else { return };
        let (level, leaving) = (*level, replica.leaving);
        let old = std::mem::replace(&mut replica.twin[word], new);
        if level == pte::ROOT_LEVEL {
            let upper_half_lost = word >= W / 2 && old != 0 && new == 0;
            replica.implausible |= upper_half_lost || !pte::plausible_root_entry(new);
            self.suspects.insert((Reverse(level), page));
        }
        if !leaving && pte::child_frame(old, level) != pte::child_frame(new, level) {
            self.unlink(geometry, (page, word), level, old);
            self.link(geometry, (page, word), level, new);
        }
    }

    /// Word `word` of a replica that is leaving was not merged after all: its twin is `old` again.
    pub fn unmerge(&mut self, page: u32, word: usize, old: u64) {
        if let Some((_, replica)) = self.replicas.get_mut(&page).filter(|(_, replica)| replica.leaving) {
            replica.twin[word] = old;
        }
    }

    /// Replicas that are page tables no longer, children of such included. They are marked as leaving:
    /// each is returned once.
    pub fn take_orphans(&mut self, geometry: &Geometry) -> Vec<u32> {
        let mut orphans = Vec::new();
        // Parents come first. Marking one makes its children suspects.
        while let Some((_, page)) = self.suspects.pop_first() {
            let Some((level, replica)) = self.replicas.get(&page) else { continue };
            if replica.leaving || self.is_table(page, *level, replica) {
                continue;
            }
            let level = *level;
            let (_, replica) = self.replicas.get_mut(&page).expect("held");
            replica.leaving = true;
            replica.rest.queued().map(|at| self.resting.remove(&(at, page)));
            self.active.remove(&(Reverse(level), page));
            for (word, entry) in replica.twin.clone().iter().enumerate() {
                self.unlink(geometry, (page, word), level, *entry);
            }
            orphans.push(page);
        }
        orphans
    }

    /// Whether a replica has to go on being one.
    fn is_table(&self, page: u32, level: u8, replica: &Replica<W>) -> bool {
        if replica.alone && level < pte::ROOT_LEVEL {
            return false;
        }
        if level < pte::ROOT_LEVEL {
            return self.links.get(&page).is_some_and(|l| !l.mixed && l.level == level);
        }
        // A root has no parent that could stop pointing to it. It is freed only after its user half
        // was emptied, and the kernel image's own is never freed.
        !replica.implausible && (self.image.contains(&page) || replica.twin[..W / 2].iter().any(|&e| e & pte::PRESENT != 0))
    }

    fn link(&mut self, geometry: &Geometry, from: (u32, usize), level: u8, entry: u64) {
        if let Some(page) = pte::child_frame(entry, level).and_then(|f| geometry.page_of_frame(f)) {
            let link = self.links.entry(page).or_insert_with(|| Link { level: level - 1, ..Link::default() });
            link.parents.insert((from.0, from.1 as u16));
            link.mixed |= link.level != level - 1;
            self.suspect(page);
        }
    }

    fn unlink(&mut self, geometry: &Geometry, from: (u32, usize), level: u8, entry: u64) {
        if let Some(page) = pte::child_frame(entry, level).and_then(|f| geometry.page_of_frame(f)) {
            if let Some(link) = self.links.get_mut(&page) {
                link.parents.remove(&(from.0, from.1 as u16));
                if link.parents.is_empty() {
                    self.links.remove(&page);
                }
            }
            self.suspect(page);
        }
    }

    /// What points to a page has changed.
    fn suspect(&mut self, page: u32) {
        if let Some((level, _)) = self.replicas.get(&page) {
            self.suspects.insert((Reverse(*level), page));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: u64 = pte::PRESENT | pte::WRITABLE | pte::ACCESSED;

    fn entry(page: u64) -> u64 {
        page << 12 | LINK
    }

    fn geometry() -> Geometry {
        Geometry::new(&[(0, 16)], &[16])
    }

    #[test]
    fn a_child_is_a_table_as_long_as_a_held_parent_points_to_it() {
        let g = geometry();
        let mut t = Tables::<2>::new(0..0);
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        assert_eq!((t.level(2), t.level(3)), (Some(3), None));
        t.insert(&g, 2, 3, Box::new([entry(3), entry(3)]));
        t.set_word(&g, 2, 0, 0);
        assert_eq!(t.level(3), Some(2), "one entry still points to it");
        t.set_word(&g, 2, 1, entry(4));
        assert_eq!((t.level(3), t.level(4)), (None, Some(2)));
        assert!(t.take_orphans(&g).is_empty());
    }

    #[test]
    fn unlinking_a_table_orphans_all_below_it_at_once() {
        let g = geometry();
        let mut t = Tables::<2>::new(1..2);
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        t.insert(&g, 2, 3, Box::new([entry(3), 0]));
        t.insert(&g, 3, 2, Box::new([entry(4), 0]));
        t.set_word(&g, 1, 0, 0);
        assert_eq!(t.take_orphans(&g), [2, 3]);
        assert!(t.take_orphans(&g).is_empty(), "each is reported once");
        assert_eq!(t.level(4), None);
        t.remove(&g, 2);
        t.remove(&g, 3);
        assert_eq!(t.len(), 1, "the image's root stays");
    }

    #[test]
    fn a_root_is_given_up_when_its_user_half_is_empty_or_it_looks_like_data() {
        let g = geometry();
        let mut t = Tables::<4>::new(0..0);
        t.insert(&g, 5, 4, Box::new([entry(6), 0, entry(7), 0]));
        t.insert(&g, 8, 4, Box::new([entry(9), 0, entry(7), 0]));
        t.set_word(&g, 5, 0, 0);
        t.set_word(&g, 8, 3, 0xffff_8880_0123_4567);
        assert_eq!(t.take_orphans(&g), [5, 8]);
    }

    #[test]
    fn what_rests_is_not_compared_and_yet_found_to_be_no_table() {
        let is_due = |t: &Tables<2>, page| t.replica(page).is_some_and(|(_, replica)| replica.rest.is_due());
        let g = geometry();
        let mut t = Tables::<2>::new(1..2);
        t.set_patience(Patience { first: 2, most: 8, leave: 0 });
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        t.insert(&g, 2, 3, Box::new([entry(3), 0]));
        t.insert(&g, 3, 2, Box::new([0, 0]));
        assert!(t.take_orphans(&g).is_empty());
        for _ in 0..2 {
            assert_eq!(t.active(), [1, 2, 3]);
            assert!(!is_due(&t, 3));
            t.compared(3, false);
        }
        assert!(is_due(&t, 3) && !is_due(&t, 2));
        t.rest(3);
        assert_eq!((t.active(), t.resting(), t.len()), (vec![1, 2], 1, 3));
        assert!(t.rouse(3, true) && !t.rouse(3, true));
        assert_eq!(t.active(), [1, 2, 3]);
        t.rest(3);
        t.set_word(&g, 2, 0, 0);
        assert_eq!(t.take_orphans(&g), [3]);
        assert!(t.rouse(3, true), "its next user makes it writable");
        assert_eq!(t.active(), [1, 2], "what is leaving is not compared");
    }

    #[test]
    fn a_replica_that_came_after_its_link_went_is_an_orphan() {
        let g = geometry();
        let mut t = Tables::<2>::new(1..2);
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        t.insert(&g, 2, 3, Box::new([0, 0]));
        t.insert(&g, 3, 2, Box::new([entry(4), 0]));
        assert_eq!(t.take_orphans(&g), [3]);
        t.set_word(&g, 2, 1, entry(1));
        assert!(t.take_orphans(&g).is_empty(), "the image's root stays, whatever points to it");
    }

    #[test]
    fn what_has_rested_for_long_leaves_from_below_and_roots_stay() {
        let g = geometry();
        let mut t = Tables::<2>::new(0..0);
        t.set_patience(Patience { first: 1, most: 1, leave: 3 });
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        t.insert(&g, 2, 3, Box::new([entry(3), 0]));
        t.insert(&g, 3, 2, Box::new([0, 0]));
        (1..4).for_each(|page| t.rest(page));
        let mut left = Vec::new();
        for _ in 0..40 {
            t.tick();
            if let Some(page) = t.take_leaver(&g) {
                left.push(page);
                t.remove(&g, page);
            }
            assert!(t.fits(&g));
        }
        assert_eq!((left, t.len()), (vec![3, 2], 1));
    }

    #[test]
    fn a_replica_that_is_touched_does_not_leave() {
        let g = geometry();
        let mut t = Tables::<2>::new(0..0);
        t.set_patience(Patience { first: 1, most: 1, leave: 3 });
        t.insert(&g, 3, 2, Box::new([0, 0]));
        t.rest(3);
        for _ in 0..3 {
            (0..2).for_each(|_| t.tick());
            assert_eq!(t.take_leaver(&g), None);
            assert!(t.rouse(3, true));
            t.rest(3);
        }
        (0..3).for_each(|_| t.tick());
        assert_eq!(t.take_leaver(&g), Some(3));
    }

    #[test]
    fn a_replica_nobody_else_holds_is_given_back_once() {
        let g = geometry();
        let mut t = Tables::<2>::new(1..2);
        t.insert(&g, 1, 4, Box::new([entry(2), 0]));
        t.insert(&g, 2, 3, Box::new([0, 0]));
        assert!(t.take_orphans(&g).is_empty());
        t.set_alone(2);
        assert_eq!((t.take_orphans(&g), t.take_orphans(&g)), (vec![2], vec![]));
        assert_eq!(t.level(2), Some(3), "it is a table still");
    }
}
