//! Replicated page tables: promotion, the flush before a release, merging, and giving them up.

use std::collections::BTreeMap;

use super::Bug;
use super::engine::{Access, Engine, Output};
use super::memory::Memory;
use super::message::{Change, MAX_CHANGES, Message, NodeId};
use super::node_set::NodeSet;
use super::pte;

/// Replicas in a huge mapping that are worth parting it: comparing so many costs 2 us, in every fault that is served.
const PARTED_FOR: usize = 16;

/// A merge that nobody waits for: with two nodes, the order of messages between them is enough.
const UNCONFIRMED: u32 = 0;

impl<const W: usize> Engine<W> {
    /// As owner of a page that `requester` wants: if it is a page table in use here, and there too,
    /// makes it replicated instead of giving it away. Returns whether it did.
    pub(super) fn promote(
        &mut self,
        page: u32,
        requester: NodeId,
        table_there: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> bool {
        if self.tables.level(page).is_none() {
            return false;
        }
        self.flush(memory, out);
        // As the flush found it: the guest may just have unlinked the page.
        let Some(level) = self.tables.level(page) else { return false };
        if self.access[page as usize] != Access::Exclusive || !(table_there || level == pte::ROOT_LEVEL) {
            return false;
        }
        // Nothing is frozen: what the guest changes after a word was read differs from the twin and is
        // found by the next flush, like any other change.
        let mut data = memory.read(page);
        if level == pte::ROOT_LEVEL && !self.tables.fits_root(page, &data) {
            return false;
        }
        for (word, entry) in data.iter_mut().enumerate() {
            *entry = self.settle(page, level, word, *entry, memory);
        }
        self.access[page as usize] = Access::Replicated;
        self.tables.insert(&self.geometry, page, level, data.clone());
        self.counters.promotions += 1;
        self.counters.pages_out += 1;
        self.send(self.geometry.home(page), Message::Promote { page, requester, level, data }, memory, out);
        true
    }

    /// Sets the accessed and dirty bits of a leaf entry that was just read as `entry`; returns its
    /// value now. Only if the page was a table when the entry was read: an entry of a parent still
    /// points to it *after* that. A table that was freed and is data by now must not be touched.
    fn settle(&self, page: u32, level: u8, word: usize, mut entry: u64, memory: &mut impl Memory<W>) -> u64 {
        loop {
            let settled = pte::settled(entry, level);
            let linked = || {
                let (parent, at) = self.tables.parent(page)?;
                let link = memory.load(parent, at);
                self.geometry.page_of_frame(pte::child_frame(link, level + 1)?)
            };
            if settled == entry || linked() != Some(page) {
                return entry;
            }
            match memory.compare_exchange(page, word, entry, settled) {
                Ok(_) => return settled,
                Err(now) => entry = now,
            }
        }
    }

    /// Merges: finds every word changed in a replica since the last merge and sends it, and asks home
    /// to take back what is a table no longer. The fence stays closed until all that is in place.
    pub(super) fn flush(&mut self, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if self.tables.len() == 0 {
            return;
        }
        self.counters.flushes += 1;
        let mut by_home: BTreeMap<NodeId, Vec<Change>> = BTreeMap::new();
        let mut found = Vec::new();
        // One a flush, since somebody waits for it.
        let mut may_rest = true;
        self.tables.tick();
        for page in self.tables.active() {
            let Some((level, _)) = self.tables.replica(page) else { continue };
            self.compare(page, &mut may_rest, &mut found, memory);
            for &(word, now) in &found {
                let word = usize::from(word);
                let Some((_, replica)) = self.tables.replica(page) else { continue };
                let old = replica.twin[word];
                let new = self.settle(page, level, word, now, memory);
                if new != old {
                    self.tables.set_word(&self.geometry, page, word, new);
                    let change = Change { page, word: word as u16, old, new };
                    by_home.entry(self.geometry.home(page)).or_default().push(change);
                }
            }
        }
        let orphans = match self.bug {
            Some(Bug::NoReachability) => Vec::new(),
            _ => self.tables.take_orphans(&self.geometry),
        };
        for (home, mut changes) in by_home {
            // What is written to a page that is a table no longer is no merge, but data: it is this node's difference
            // until the page has one owner, whoever that is.
            changes.retain(|c| {
                let orphan = orphans.contains(&c.page);
                if orphan {
                    self.tables.unmerge(c.page, usize::from(c.word), c.old);
                }
                !orphan
            });
            self.counters.words_merged += changes.len() as u64;
            for part in changes.chunks(MAX_CHANGES) {
                let id = self.merge_id();
                let due = if home == self.me {
                    self.merge_at_home(self.me, id, part, memory, out)
                } else {
                    out.sends.push((home, Message::Merge { id, changes: part.to_vec() }));
                    if id == UNCONFIRMED { NodeSet::new() } else { NodeSet::of(home) }
                };
                self.fence.await_merge(id, due);
            }
        }
        self.leave(memory, out);
        for page in orphans {
            self.counters.demotions += 1;
            self.fence.await_demotion(page);
            self.send(self.geometry.home(page), Message::Demote { page }, memory, out);
        }
    }

    /// Gives up a replica that has rested for long: all that was changed in it here has been merged, and home has the master.
    fn leave(&mut self, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let Some(page) = self.tables.take_leaver(&self.geometry) else { return };
        memory.discard(page);
        self.access[page as usize] = Access::Invalid;
        self.tables.remove(&self.geometry, page);
        self.counters.departures += 1;
        self.send(self.geometry.home(page), Message::Dropped { page, changes: Vec::new() }, memory, out);
    }

    /// Ends the rest of a replica, for somebody here who `touched` it or because it is to be none any more; whether it rested.
    pub(super) fn rouse(&mut self, page: u32, touched: bool, memory: &mut impl Memory<W>) -> bool {
        let rested = self.tables.rouse(page, touched);
        if rested {
            self.counters.rests_ended += u64::from(touched);
            memory.unprotect(page);
        }
        rested
    }

    /// Finds the words of a replica that differ from its twin. One that has been unchanged for long comes to rest, if it
    /// `may_rest`.
    fn compare(&mut self, page: u32, may_rest: &mut bool, found: &mut Vec<(u16, u64)>, memory: &mut impl Memory<W>) {
        let Some((_, replica)) = self.tables.replica(page) else { return };
        let due = *may_rest && replica.rest.is_due();
        let rests = due && self.is_worth_protecting(page, memory);
        *may_rest &= !rests;
        let late = rests && self.bug == Some(Bug::RestBeforeFreeze);
        // Frozen first: what is found unchanged then stays so.
        if rests && !late {
            memory.protect(page);
        }
        found.clear();
        memory.differences(page, &replica.twin, found);
        self.counters.pages_compared += 1;
        if late {
            memory.protect(page);
        }
        if rests && found.is_empty() {
            self.counters.rests += 1;
            return self.tables.rest(page);
        }
        if rests {
            memory.unprotect(page);
        }
        // One that is not worth it is looked at again after as many flushes.
        self.tables.compared(page, due || !found.is_empty());
    }

    /// A huge mapping is parted for many replicas only.
    fn is_worth_protecting(&self, page: u32, memory: &impl Memory<W>) -> bool {
        let first = page - page % self.zero_block;
        !memory.is_in_huge_mapping(page) || self.tables.held_in(first..first.saturating_add(self.zero_block)) >= PARTED_FOR
    }

    fn merge_id(&mut self) -> u32 {
        if self.geometry.nodes() == 2 { UNCONFIRMED } else { self.fence.next_id() }
    }

    /// A merge arrived: for pages homed here it is passed on, for others it comes from home.
    pub(super) fn merge(
        &mut self,
        from: NodeId,
        id: u32,
        changes: Vec<Change>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) {
        let (mine, held): (Vec<_>, Vec<_>) = changes.into_iter().partition(|c| self.geometry.home(c.page) == self.me);
        self.tables.tick();
        self.apply_all(&held, memory);
        self.leave(memory, out);
        let mut due = NodeSet::new();
        let mut relay = UNCONFIRMED;
        if !mine.is_empty() {
            relay = self.merge_id();
            due = self.merge_at_home(from, relay, &mine, memory, out);
        }
        if id == UNCONFIRMED {
            return;
        }
        if due.is_empty() {
            out.sends.push((from, Message::Merged { id }));
        } else {
            self.fence.await_relay(relay, from, id, due);
        }
    }

    /// As home: applies to the masters and passes on to every other holder. Returns whom `id` awaits.
    fn merge_at_home(
        &mut self,
        from: NodeId,
        id: u32,
        changes: &[Change],
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> NodeSet {
        let mut to: BTreeMap<NodeId, Vec<Change>> = BTreeMap::new();
        let mut conflicting = Vec::new();
        for change in changes {
            let Some((holders, clean)) = self.directory.merge(from, change) else { continue };
            if !clean {
                self.counters.conflicts += 1;
                conflicting.push(change.page);
            }
            for node in holders.iter().filter(|&node| node != from) {
                to.entry(node).or_default().push(*change);
            }
        }
        let mut due = NodeSet::new();
        for (node, changes) in to {
            if node == self.me {
                self.apply_all(&changes, memory);
            } else {
                out.sends.push((node, Message::Merge { id, changes }));
                due.insert(node);
            }
        }
        conflicting.dedup();
        for page in conflicting {
            self.home_take_back(page, None, memory, out);
        }
        if id == UNCONFIRMED { NodeSet::new() } else { due }
    }

    /// As holder: puts another node's changes in place. What rests goes on doing so: who uses it elsewhere changes it often.
    fn apply_all(&mut self, changes: &[Change], memory: &mut impl Memory<W>) {
        let mut found = Vec::new();
        for of_page in changes.chunk_by(|one, next| one.page == next.page) {
            let page = of_page[0].page;
            let rests = self.tables.is_resting(page);
            if rests {
                memory.unprotect(page);
            }
            of_page.iter().for_each(|change| self.apply(change, memory));
            let Some((_, replica)) = self.tables.replica(page).filter(|_| rests) else { continue };
            memory.protect(page);
            // As for one that comes to rest: somebody here may have written to it meanwhile.
            found.clear();
            memory.differences(page, &replica.twin, &mut found);
            if !found.is_empty() {
                self.rouse(page, true, memory);
            }
        }
    }

    /// As holder: puts another node's change in place, in a replica that can be written to.
    fn apply(&mut self, change: &Change, memory: &mut impl Memory<W>) {
        let (page, word) = (change.page, usize::from(change.word));
        let Some((level, replica)) = self.tables.replica(page) else { return };
        let twin = replica.twin[word];
        let new = pte::settled(change.new, level);
        let mut now = memory.load(page, word);
        // A word changed here too, beyond the bits hardware sets, stays, and so does its twin: the next
        // flush sends it, and home sees the conflict.
        while pte::same_but_accessed_dirty(now, twin) {
            match memory.compare_exchange(page, word, now, new) {
                Ok(_) => return self.tables.set_word(&self.geometry, page, word, new),
                Err(current) => now = current,
            }
        }
    }

    /// As new single owner of a former replica: takes in what others changed last.
    pub(super) fn take_back(&mut self, page: u32, changes: &[Change], memory: &mut impl Memory<W>) {
        self.rouse(page, false, memory);
        let alone = self.tables.replica(page).is_some_and(|(_, replica)| replica.alone);
        let Some(twin) = self.tables.remove(&self.geometry, page) else { return };
        for change in changes.iter().filter(|c| c.page == page && usize::from(c.word) < W) {
            let word = usize::from(change.word);
            let mut now = twin[word];
            // What was changed here is newer: this node knows that the page is a table no longer. If it is one, whose last
            // other holder came late, hardware may have set bits here.
            while let Err(other) = memory.compare_exchange(page, word, now, change.new) {
                if !alone || !pte::same_but_accessed_dirty(other, twin[word]) {
                    break;
                }
                now = other;
            }
        }
        self.access[page as usize] = Access::Exclusive;
    }
}
