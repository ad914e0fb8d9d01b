//! The home role: who has which page of those homed here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::engine::{Access, Engine, Output, ProtocolError};
use super::geometry::Geometry;
use super::memory::{Memory, PageData, words};
use super::message::{Change, Message, NodeId};
use super::pte;

/// Where a page is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Place {
    /// Nobody wrote it yet: it reads as zero.
    #[default]
    Untouched,
    /// `owner` has the page; with no sharers it may write, else all of them read.
    Owned { owner: NodeId, sharers: u64 },
    /// A page table with a replica at each holder; the master copy is here.
    Replicated { holders: u64 },
}

/// A request that waits for the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Request {
    from: NodeId,
    write: bool,
    table: bool,
}

/// What a page is busy with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Busy {
    /// A request by this node: until its Done, or the owner's Promote.
    Request { by: NodeId, owner: NodeId },
    /// A replica is taken back from these nodes, for `owner` (`None`: for home itself).
    Demotion { owner: Option<NodeId>, waiting: u64, changes: Vec<Change> },
}

/// What home keeps of a replicated page: its level as a table and the content all merges have led to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Master<const W: usize> {
    level: u8,
    #[serde(with = "words")]
    data: Box<PageData<W>>,
}

/// The directory of one home.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Directory<const W: usize> {
    first: u32,
    places: Vec<Place>,
    busy: BTreeMap<u32, Busy>,
    queues: BTreeMap<u32, VecDeque<Request>>,
    masters: BTreeMap<u32, Master<W>>,
    /// Pages that a node reads and then writes while nobody else reads them: the next reader is given
    /// the page to write at once. Locks and counters are such pages.
    migratory: BTreeSet<u32>,
}

fn bit(node: NodeId) -> u64 {
    1 << node
}

impl<const W: usize> Directory<W> {
    pub(super) fn new(me: NodeId, geometry: &Geometry, preloaded: &[Range<u32>]) -> Self {
        let homed: Vec<u32> = (0..geometry.pages()).filter(|&p| geometry.home(p) == me).collect();
        let first = homed.first().copied().unwrap_or(0);
        let mut places = vec![Place::Untouched; homed.len()];
        for page in preloaded.iter().cloned().flatten().filter(|&p| geometry.home(p) == me) {
            places[(page - first) as usize] = Place::Owned { owner: 0, sharers: 0 };
        }
        Directory { first, places, busy: BTreeMap::new(), queues: BTreeMap::new(), masters: BTreeMap::new(), migratory: BTreeSet::new() }
    }

    pub(super) fn quiet(&self) -> bool {
        self.busy.is_empty() && self.queues.is_empty()
    }

    /// Whether this is a directory of the pages homed at `me`, and everything in it is about those.
    pub(super) fn fits(&self, me: NodeId, geometry: &Geometry) -> bool {
        let mut homed = (0..geometry.pages()).filter(|&p| geometry.home(p) == me);
        let first = homed.next();
        let count = homed.count() + usize::from(first.is_some());
        let first = first.unwrap_or(0);
        let here = |page: &u32| page.checked_sub(first).is_some_and(|n| (n as usize) < count);
        let node = |node: NodeId| usize::from(node) < geometry.nodes();
        self.first == first
            && self.places.len() == count
            && self.places.iter().all(|place| !matches!(place, Place::Owned { owner, .. } if !node(*owner)))
            && self.busy.keys().chain(self.queues.keys()).chain(self.masters.keys()).chain(&self.migratory).all(here)
            && self.queues.values().flatten().all(|request| node(request.from))
    }

    fn place(&mut self, page: u32) -> &mut Place {
        &mut self.places[(page - self.first) as usize]
    }

    /// Applies a change to the master copy. Returns the holders, and whether the change followed from
    /// the master's value; `None` if the page is not replicated.
    pub(super) fn merge(&mut self, from: NodeId, change: &Change) -> Option<(u64, bool)> {
        let Place::Replicated { holders } = *self.place(change.page) else { return None };
        if holders & bit(from) == 0 {
            return None;
        }
        let word = self.masters.get_mut(&change.page)?.data.get_mut(usize::from(change.word))?;
        let clean = *word == change.old || pte::same_but_accessed_dirty(*word, change.old) || *word == change.new;
        *word = change.new;
        Some((holders, clean))
    }
}

impl<const W: usize> Engine<W> {
    fn check_home(&self, from: NodeId, page: u32, what: &'static str) -> Result<(), ProtocolError> {
        if self.geometry.home(page) == self.me { Ok(()) } else { Err(ProtocolError { from, what, page }) }
    }

    /// As home: takes a page nobody wrote yet, and the untouched ones of its group. Nobody is asked: what
    /// a later request sends comes after this step.
    pub(super) fn take_untouched(&mut self, page: u32, memory: &mut impl Memory<W>) -> bool {
        let untouched = |engine: &mut Self, page| {
            engine.geometry.home(page) == engine.me && *engine.directory.place(page) == Place::Untouched
        };
        if !untouched(self, page) {
            return false;
        }
        let first = page - page % self.zero_group;
        let end = first.saturating_add(self.zero_group).min(self.geometry.pages());
        let mut next = first;
        while next < end {
            let run = next..(next..end).find(|&p| !untouched(self, p)).unwrap_or(end);
            next = run.end + 1;
            if run.is_empty() {
                continue;
            }
            for page in run.clone() {
                *self.directory.place(page) = Place::Owned { owner: self.me, sharers: 0 };
                self.access[page as usize] = Access::Exclusive;
            }
            self.counters.zero_neighbours += u64::from(run.end - run.start);
            memory.install_zeros(run);
        }
        self.counters.zero_neighbours -= 1;
        self.counters.zero_grants += 1;
        true
    }

    pub(super) fn home_get(
        &mut self,
        from: NodeId,
        page: u32,
        write: bool,
        table: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Get")?;
        let request = Request { from, write, table };
        if self.directory.busy.contains_key(&page) {
            let queue = self.directory.queues.entry(page).or_default();
            if queue.iter().any(|r| r.from == from) {
                return Err(ProtocolError { from, what: "a second Get", page });
            }
            queue.push_back(request);
            return Ok(());
        }
        self.serve(page, request, memory, out)
    }

    fn serve(
        &mut self,
        page: u32,
        request: Request,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let Request { from, write, table } = request;
        match *self.directory.place(page) {
            Place::Untouched => {
                *self.directory.place(page) = Place::Owned { owner: from, sharers: 0 };
                // No Done: whatever home sends next about this page comes behind the grant.
                self.send(from, Message::Grant { page, zero: true, acks: 0, done: false }, memory, out);
            }
            Place::Owned { owner, sharers } => {
                let has_copy = owner == from || sharers & bit(from) != 0;
                if has_copy && !write {
                    return Err(ProtocolError { from, what: "a read Get for a page it has", page });
                }
                let mut drop = if write { sharers & !bit(from) } else { 0 };
                if has_copy && owner != from {
                    drop |= bit(owner);
                }
                let acks = drop.count_ones() as u8;
                // Home need not wait if all that follows reaches the requester through home, in order.
                if has_copy && owner != from {
                    // It read the page, and now writes it: one reader, and the next writer.
                    if sharers == bit(from) {
                        self.directory.migratory.insert(page);
                    } else {
                        self.directory.migratory.remove(&page);
                    }
                }
                let migratory = !write && sharers == 0 && self.directory.migratory.contains(&page);
                let done = acks > 0 || migratory || from == self.me || (!has_copy && owner != self.me);
                if done || !has_copy {
                    self.directory.busy.insert(page, Busy::Request { by: from, owner });
                }
                *self.directory.place(page) = if write || migratory {
                    Place::Owned { owner: from, sharers: 0 }
                } else {
                    Place::Owned { owner, sharers: sharers | bit(from) }
                };
                for node in (0..self.geometry.nodes() as NodeId).filter(|&n| drop & bit(n) != 0) {
                    self.send(node, Message::Invalidate { page, requester: from }, memory, out);
                }
                if has_copy {
                    self.send(from, Message::Grant { page, zero: false, acks, done }, memory, out);
                } else {
                    let alone = sharers == 0;
                    let fetch = Message::Fetch { page, requester: from, write, acks, alone, table, done, migratory };
                    self.send(owner, fetch, memory, out);
                }
            }
            Place::Replicated { holders } => {
                if holders & bit(from) != 0 {
                    return Err(ProtocolError { from, what: "a Get for a replica it has", page });
                }
                if table {
                    *self.directory.place(page) = Place::Replicated { holders: holders | bit(from) };
                    let Some(Master { level, data }) = self.directory.masters.get(&page).cloned() else {
                        return Err(ProtocolError { from, what: "a Get for a replica without a master", page });
                    };
                    self.send(from, Message::Replica { page, level, data }, memory, out);
                } else {
                    self.directory.queues.entry(page).or_default().push_front(request);
                    self.home_take_back(page, None, memory, out);
                }
            }
        }
        Ok(())
    }

    pub(super) fn home_done(
        &mut self,
        from: NodeId,
        page: u32,
        shared: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Done")?;
        let owner = match self.directory.busy.get(&page) {
            Some(Busy::Request { by, owner }) if *by == from => *owner,
            _ => return Err(ProtocolError { from, what: "a Done nobody waits for", page }),
        };
        self.directory.busy.remove(&page);
        if shared && owner != from {
            self.directory.migratory.remove(&page);
            *self.directory.place(page) = Place::Owned { owner, sharers: bit(from) };
        }
        self.serve_next(page, memory, out)
    }

    fn serve_next(&mut self, page: u32, memory: &mut impl Memory<W>, out: &mut Output<W>) -> Result<(), ProtocolError> {
        while !self.directory.busy.contains_key(&page) {
            let Some(queue) = self.directory.queues.get_mut(&page) else { return Ok(()) };
            let next = queue.pop_front();
            if queue.is_empty() {
                self.directory.queues.remove(&page);
            }
            let Some(request) = next else { return Ok(()) };
            self.serve(page, request, memory, out)?;
        }
        Ok(())
    }

    /// As home and owner at once: the page has been sent (or promoted) and nobody says Done.
    pub(super) fn home_sent(
        &mut self,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.directory.busy.remove(&page);
        self.serve_next(page, memory, out)
    }

    /// The owner found the requested page to be a page table in use on both nodes.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn home_promote(
        &mut self,
        from: NodeId,
        page: u32,
        requester: NodeId,
        level: u8,
        data: Box<PageData<W>>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Promote")?;
        let expected = matches!(self.directory.busy.get(&page), Some(Busy::Request { by, .. }) if *by == requester);
        if !expected || from == requester || !(1..=pte::ROOT_LEVEL).contains(&level) {
            return Err(ProtocolError { from, what: "a Promote nobody asked for", page });
        }
        *self.directory.place(page) = Place::Replicated { holders: bit(from) | bit(requester) };
        self.directory.masters.insert(page, Master { level, data: data.clone() });
        self.directory.busy.remove(&page);
        self.send(requester, Message::Replica { page, level, data }, memory, out);
        self.serve_next(page, memory, out)
    }

    /// A holder found its replica to be a table no longer and wants to own the page.
    pub(super) fn home_demote(
        &mut self,
        from: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Demote")?;
        // Otherwise it was taken back meanwhile: the Drop that tells so is on its way.
        if matches!(*self.directory.place(page), Place::Replicated { holders } if holders & bit(from) != 0) {
            self.home_take_back(page, Some(from), memory, out);
        }
        Ok(())
    }

    /// Starts to take a replica back from all holders but `owner`.
    pub(super) fn home_take_back(
        &mut self,
        page: u32,
        owner: Option<NodeId>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) {
        let Place::Replicated { holders } = *self.directory.place(page) else { return };
        if self.directory.busy.contains_key(&page) {
            return;
        }
        let waiting = holders & !owner.map_or(0, bit);
        self.directory.busy.insert(page, Busy::Demotion { owner, waiting, changes: Vec::new() });
        for node in (0..self.geometry.nodes() as NodeId).filter(|&n| waiting & bit(n) != 0) {
            self.send(node, Message::Drop { page }, memory, out);
        }
        if waiting == 0 {
            self.loopback.push_back(Message::Dropped { page, changes: Vec::new() });
        }
    }

    /// A holder has given up its replica.
    pub(super) fn home_dropped(
        &mut self,
        from: NodeId,
        page: u32,
        changed: Vec<Change>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        self.check_home(from, page, "Dropped")?;
        let Some(Busy::Demotion { owner, waiting, changes }) = self.directory.busy.get_mut(&page) else {
            return Err(ProtocolError { from, what: "a Dropped nobody waits for", page });
        };
        if changed.iter().any(|c| c.page != page || usize::from(c.word) >= W) {
            return Err(ProtocolError { from, what: "Dropped with changes elsewhere", page });
        }
        let owner = *owner;
        *waiting &= !bit(from);
        let over = *waiting == 0;
        changes.extend(&changed);
        let all = if over { std::mem::take(changes) } else { Vec::new() };
        if let Some(master) = self.directory.masters.get_mut(&page) {
            for change in &changed {
                master.data[usize::from(change.word)] = change.new;
            }
        }
        if !over {
            return Ok(());
        }
        self.directory.busy.remove(&page);
        let master = self.directory.masters.remove(&page);
        if let Some(owner) = owner {
            *self.directory.place(page) = Place::Owned { owner, sharers: 0 };
            self.send(owner, Message::Demoted { page, changes: all }, memory, out);
        } else {
            let Some(Master { data, .. }) = master else {
                return Err(ProtocolError { from, what: "Dropped without a master", page });
            };
            // Straight to whoever asked first; home keeps it if nobody did.
            let next = self.directory.queues.get_mut(&page).and_then(VecDeque::pop_front);
            if self.directory.queues.get(&page).is_some_and(VecDeque::is_empty) {
                self.directory.queues.remove(&page);
            }
            let owner = next.map_or(self.me, |r| r.from);
            *self.directory.place(page) = Place::Owned { owner, sharers: 0 };
            if next.is_some() {
                self.send(owner, Message::Data { page, write: true, acks: 0, done: false, migratory: false, data }, memory, out);
            } else {
                memory.install(page, &data, true);
                self.access[page as usize] = Access::Exclusive;
            }
        }
        self.serve_next(page, memory, out)
    }
}
