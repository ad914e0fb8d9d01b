//! The home role: who has which page of those homed here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::engine::{Access, Engine, Output, ProtocolError};
use super::geometry::Geometry;
use super::memory::{Memory, PageData, words};
use super::message::{Change, Message, NodeId};
use super::node_set::NodeSet;
use super::place::Place;
use super::write_shared::WriteShared;
use super::{Bug, pte};

/// A request that waits for the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Request {
    pub from: NodeId,
    pub write: bool,
    pub table: bool,
}

/// What a page is busy with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Busy {
    /// A request by this node: until its Done, or the owner's Promote. `owner` has the copy it gets: `by`
    /// itself if it has one. `acks`: the sharers that were told to drop theirs for it.
    Request { by: NodeId, owner: NodeId, acks: NodeSet },
    /// The requester was lost: until the owner has said whether it has the page still (`kept`), and all of `waiting`, who
    /// were told to drop their copies for it, have said so to home.
    Recall { requester: NodeId, owner: NodeId, kept: Option<bool>, waiting: NodeSet },
    /// A replica is taken back from these nodes, for `owner` (`None`: for home itself).
    /// `dropped`: who has to be told when that is over.
    Demotion { owner: Option<NodeId>, waiting: NodeSet, dropped: NodeSet, changes: Vec<Change> },
    /// A copy goes that its node had no room for: until it says that it is gone.
    Eviction { node: NodeId },
    /// Given up for `by`, as part of what it called `id`, once these have dropped their copies.
    Freeing { by: NodeId, id: u32, waiting: NodeSet },
}

/// What home keeps of a replicated page: its level as a table, who has a replica, and the content all
/// merges have led to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Master<const W: usize> {
    pub level: u8,
    pub holders: NodeSet,
    #[serde(with = "words")]
    pub data: Box<PageData<W>>,
}

/// The directory of one home.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Directory<const W: usize> {
    pub first: u32,
    pub places: Vec<Place>,
    pub busy: BTreeMap<u32, Busy>,
    pub queues: BTreeMap<u32, VecDeque<Request>>,
    pub masters: BTreeMap<u32, Master<W>>,
    pub(super) write_shared: WriteShared,
    /// Pages that are still busy of what a node wants to be given up, by that node and its number for it
    /// ([`super::free::key`]).
    pub(super) freeing: BTreeMap<u64, u32>,
}

impl<const W: usize> Directory<W> {
    pub(super) fn new(me: NodeId, geometry: &Geometry, preloaded: &[Range<u32>]) -> Self {
        let homed = geometry.homed(me);
        let mut places = vec![Place::Untouched; homed.len()];
        for page in preloaded.iter().cloned().flatten().filter(|page| homed.contains(page)) {
            places[(page - homed.start) as usize] = Place::owned(0, NodeSet::new());
        }
        Directory {
            first: homed.start,
            places,
            busy: BTreeMap::new(),
            queues: BTreeMap::new(),
            masters: BTreeMap::new(),
            write_shared: WriteShared::default(),
            freeing: BTreeMap::new(),
        }
    }

    pub(super) fn quiet(&self) -> bool {
        self.busy.is_empty() && self.queues.is_empty()
    }

    /// Memory of the directory that grows with its pages.
    pub(super) fn bytes(&self) -> usize {
        self.places.iter().map(|place| size_of::<Place>() + place.heap_bytes()).sum()
    }

    /// Whether this is a directory of the pages homed at `me`, and everything in it is about those, about
    /// nodes that exist, and agrees with itself.
    pub(super) fn fits(&self, me: NodeId, geometry: &Geometry) -> bool {
        let (homed, nodes) = (geometry.homed(me), geometry.nodes());
        if self.first != homed.start || self.places.len() != homed.len() {
            return false;
        }
        let node = |node: NodeId| usize::from(node) < nodes;
        let place = |page: u32| &self.places[(page - self.first) as usize];
        let known = self.busy.keys().chain(self.queues.keys()).chain(self.masters.keys());
        let owners_fit = self.places.iter().all(|place| match place.clone().into_owned() {
            Ok((owner, sharers)) => node(owner) && sharers.fits(nodes) && !sharers.contains(owner),
            Err(_) => true,
        });
        let replicated = homed.clone().filter(|page| *place(*page) == Place::Replicated);
        let busy_fits = |(page, busy): (&u32, &Busy)| match busy {
            Busy::Request { by, owner, acks } => node(*by) && node(*owner) && acks.fits(nodes) && place(*page).names(*by),
            Busy::Recall { requester, owner, kept, waiting } => {
                node(*requester) && node(*owner) && requester != owner && waiting.fits(nodes) && !waiting.contains(me) && !(kept.is_some() && waiting.is_empty())
            }
            Busy::Eviction { node: of } => node(*of),
            Busy::Freeing { by, waiting, .. } => node(*by) && waiting.fits(nodes) && !waiting.is_empty(),
            Busy::Demotion { owner, waiting, dropped, changes } => {
                self.masters.contains_key(page)
                    && owner.is_none_or(|owner| node(owner) && !waiting.contains(owner))
                    && waiting.fits(nodes)
                    && !waiting.is_empty()
                    && dropped.fits(nodes)
                    && dropped.iter().all(|node| !waiting.contains(node))
                    && changes.iter().all(|change| change.page == *page && usize::from(change.word) < W)
            }
        };
        let mut freeing = BTreeMap::new();
        for busy in self.busy.values() {
            if let Busy::Freeing { by, id, .. } = busy {
                *freeing.entry(super::free::key(*by, *id)).or_insert(0) += 1;
            }
        }
        let queue_fits = |(page, queue): (&u32, &VecDeque<Request>)| {
            let from: BTreeSet<_> = queue.iter().map(|request| request.from).collect();
            self.busy.contains_key(page) && !queue.is_empty() && from.len() == queue.len() && from.into_iter().all(node)
        };
        known.copied().all(|page| homed.contains(&page))
            && self.write_shared.fits(&homed, nodes)
            && owners_fit
            && self.freeing == freeing
            && self.masters.keys().copied().eq(replicated)
            && self.masters.values().all(|m| (1..=pte::ROOT_LEVEL).contains(&m.level) && m.holders.fits(nodes))
            && self.busy.iter().all(busy_fits)
            && self.queues.iter().all(queue_fits)
    }

    /// The owner of a page that is somebody's and not busy, and whether `node` has a copy.
    pub(super) fn owner_for(&mut self, page: u32, node: NodeId) -> Option<(NodeId, bool)> {
        if self.busy.contains_key(&page) {
            return None;
        }
        let place = self.place(page);
        match *place {
            Place::Owned { owner, .. } | Place::Crowded { owner, .. } => Some((owner, place.names(node))),
            _ => None,
        }
    }

    /// Whether a page homed here is `owner`'s, and nobody else has a copy but perhaps `reader`.
    pub(super) fn is_alone(&self, page: u32, owner: NodeId, reader: NodeId) -> bool {
        match &self.places[(page - self.first) as usize] {
            Place::Owned { owner: of, sharers } => *of == owner && sharers.is_within(reader),
            // Nobody's, or read by more than one.
            _ => false,
        }
    }

    /// Whether nobody wrote a page homed here.
    pub(super) fn is_untouched(&self, page: u32) -> bool {
        self.places[(page - self.first) as usize] == Place::Untouched
    }

    /// Those of pages homed here that nobody wrote.
    pub(super) fn untouched(&self, pages: Range<u32>) -> impl Iterator<Item = u32> {
        pages.filter(|page| self.is_untouched(*page))
    }

    /// `node` reads a page from now on that is somebody's.
    pub(super) fn add_sharer(&mut self, page: u32, node: NodeId) {
        let place = std::mem::take(self.place(page));
        *self.place(page) = match place.into_owned() {
            Ok((owner, mut sharers)) => {
                sharers.insert(node);
                Place::owned(owner, sharers)
            }
            Err(place) => place,
        };
    }

    pub(super) fn place(&mut self, page: u32) -> &mut Place {
        &mut self.places[(page - self.first) as usize]
    }

    /// Applies a change to the master copy. Returns the holders, and whether the change followed from
    /// the master's value; `None` if the page is not replicated.
    pub(super) fn merge(&mut self, from: NodeId, change: &Change) -> Option<(&NodeSet, bool)> {
        let master = self.masters.get_mut(&change.page)?;
        if !master.holders.contains(from) {
            return None;
        }
        let word = master.data.get_mut(usize::from(change.word))?;
        let clean = *word == change.old || pte::same_but_accessed_dirty(*word, change.old) || *word == change.new;
        *word = change.new;
        Some((&master.holders, clean))
    }
}

impl<const W: usize> Engine<W> {
    pub(super) fn check_home(&self, from: NodeId, page: u32, what: &'static str) -> Result<(), ProtocolError> {
        if self.geometry.home(page) == self.me { Ok(()) } else { Err(ProtocolError { from, what, page }) }
    }

    /// As home: takes a page nobody wrote yet, and the untouched block around it or the untouched pages of
    /// its group. Nobody is asked: what a later request sends comes after this step.
    pub(super) fn take_untouched(&mut self, page: u32, memory: &mut impl Memory<W>) -> bool {
        let untouched = |engine: &mut Self, page| {
            engine.geometry.home(page) == engine.me && *engine.directory.place(page) == Place::Untouched
        };
        if !untouched(self, page) {
            return false;
        }
        let around = |size: u32, pages: u32| {
            let first = page - page % size;
            first..first.saturating_add(size).min(pages)
        };
        let block = around(self.zero_block, self.geometry.pages());
        let whole = block.len() == self.zero_block as usize && block.clone().all(|p| untouched(self, p));
        let Range { start: first, end } = if whole { block } else { around(self.zero_group, self.geometry.pages()) };
        let mut next = first;
        while next < end {
            let run = next..(next..end).find(|&p| !untouched(self, p)).unwrap_or(end);
            next = run.end + 1;
            if run.is_empty() {
                continue;
            }
            for page in run.clone() {
                *self.directory.place(page) = Place::owned(self.me, NodeSet::new());
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

    pub(super) fn serve(
        &mut self,
        page: u32,
        request: Request,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let Request { from, table, .. } = request;
        match std::mem::take(self.directory.place(page)).into_owned() {
            Ok((owner, sharers)) => self.serve_owned(page, request, owner, sharers, memory, out)?,
            Err(Place::Replicated) => {
                *self.directory.place(page) = Place::Replicated;
                let Some(master) = self.directory.masters.get_mut(&page) else {
                    return Err(ProtocolError { from, what: "a Get for a replica without a master", page });
                };
                if master.holders.contains(from) {
                    return Err(ProtocolError { from, what: "a Get for a replica it has", page });
                }
                if table {
                    master.holders.insert(from);
                    let replica = Message::Replica { page, level: master.level, data: master.data.clone() };
                    self.send(from, replica, memory, out);
                } else {
                    self.directory.queues.entry(page).or_default().push_front(request);
                    self.home_take_back(page, None, memory, out);
                }
            }
            Err(Place::Lost) => {
                *self.directory.place(page) = Place::Lost;
                self.send(from, Message::Gone { page }, memory, out);
            }
            Err(_) => {
                *self.directory.place(page) = Place::owned(from, NodeSet::new());
                // No Done: whatever home sends next about this page comes behind the grant.
                self.send(from, Message::Grant { page, zero: true, acks: NodeSet::new(), done: false }, memory, out);
            }
        }
        Ok(())
    }

    /// Serves a request for a page that is `owner`'s and that `sharers` read.
    fn serve_owned(
        &mut self,
        page: u32,
        request: Request,
        owner: NodeId,
        mut sharers: NodeSet,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let Request { from, write, table } = request;
        let has_copy = owner == from || sharers.contains(from);
        if has_copy && !write {
            return Err(ProtocolError { from, what: "a read Get for a page it has", page });
        }
        let alone = sharers.is_empty();
        if has_copy && owner != from {
            // It read the page, and now writes it: one reader, and the next writer.
            if sharers.len() == 1 {
                self.directory.write_shared.mark(page);
            } else {
                self.directory.write_shared.unmark(page);
            }
        }
        let migratory = !write && alone && self.directory.write_shared.is_migratory(page);
        // What home asks for itself it may ask for another's sake: an eviction.
        if migratory || (write && from != self.me) {
            self.directory.write_shared.note(page, from);
        }
        let mut acks = NodeSet::new();
        if write {
            acks = std::mem::take(&mut sharers);
            acks.remove(from);
            if has_copy && owner != from {
                acks.insert(owner);
            }
        }
        // Home need not wait if all that follows reaches the requester through home, in order.
        let mut done = !acks.is_empty() || migratory || from == self.me || (!has_copy && owner != self.me);
        let mut busy = done || !has_copy;
        if self.bug == Some(Bug::DoneNotAwaited) {
            (done, busy) = (false, false);
        }
        if busy {
            let owner = if has_copy { from } else { owner };
            self.directory.busy.insert(page, Busy::Request { by: from, owner, acks: acks.clone() });
        }
        *self.directory.place(page) = if write || migratory {
            Place::owned(from, NodeSet::new())
        } else {
            sharers.insert(from);
            Place::owned(owner, sharers)
        };
        for node in acks.iter() {
            self.send(node, Message::Invalidate { page, requester: from }, memory, out);
        }
        if has_copy {
            self.send(from, Message::Grant { page, zero: false, acks, done }, memory, out);
        } else {
            let fetch = Message::Fetch { page, requester: from, write, acks, alone, table, done, migratory };
            self.send(owner, fetch, memory, out);
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
            Some(Busy::Request { by, owner, .. }) if *by == from => *owner,
            _ => return Err(ProtocolError { from, what: "a Done nobody waits for", page }),
        };
        self.directory.busy.remove(&page);
        if shared && owner != from {
            self.directory.write_shared.unmark(page);
            *self.directory.place(page) = Place::owned(owner, NodeSet::of(from));
        }
        self.forget_lost(page);
        self.serve_next(page, memory, out)
    }

    pub(super) fn serve_next(
        &mut self,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
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
        let (expected, holders) = match self.directory.busy.get(&page) {
            Some(Busy::Request { by, owner, .. }) => ((*by, *owner) == (requester, from), [from, requester].into_iter().collect()),
            Some(Busy::Recall { requester: lost, owner, kept: None, waiting }) if waiting.is_empty() => ((*lost, *owner) == (requester, from), NodeSet::of(from)),
            _ => (false, NodeSet::new()),
        };
        if !expected || from == requester || !(1..=pte::ROOT_LEVEL).contains(&level) {
            return Err(ProtocolError { from, what: "a Promote nobody asked for", page });
        }
        *self.directory.place(page) = Place::Replicated;
        self.directory.masters.insert(page, Master { level, holders, data: data.clone() });
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
        if let Some(master) = self.directory.masters.get(&page).filter(|master| master.holders.contains(from)) {
            // Where another may tell it of the page before home's word has come, it gives its replica up like all others.
            let keeps = self.geometry.nodes() == 2 || master.holders.len() == 1;
            self.home_take_back(page, keeps.then_some(from), memory, out);
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
        let Some(master) = self.directory.masters.get(&page) else { return };
        if self.directory.busy.contains_key(&page) {
            return;
        }
        let mut waiting = master.holders.clone();
        if let Some(owner) = owner {
            waiting.remove(owner);
        }
        for node in waiting.iter() {
            self.send(node, Message::Drop { page }, memory, out);
        }
        if waiting.is_empty() {
            self.loopback.push_back(Message::Dropped { page, changes: Vec::new() });
        }
        self.directory.busy.insert(page, Busy::Demotion { owner, waiting, dropped: NodeSet::new(), changes: Vec::new() });
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
        if !self.directory.busy.contains_key(&page) {
            return self.home_left(from, page, changed.is_empty(), memory, out);
        }
        let Some(Busy::Demotion { waiting, dropped, changes, .. }) = self.directory.busy.get_mut(&page) else {
            return Err(ProtocolError { from, what: "a Dropped nobody waits for", page });
        };
        if changed.iter().any(|c| c.page != page || usize::from(c.word) >= W) {
            return Err(ProtocolError { from, what: "Dropped with changes elsewhere", page });
        }
        if waiting.remove(from) {
            dropped.insert(from);
        }
        changes.extend(&changed);
        if let Some(master) = self.directory.masters.get_mut(&page) {
            for change in &changed {
                let word = &mut master.data[usize::from(change.word)];
                // Bits that hardware set don't bring back what another node has changed meanwhile.
                if *word == change.old || !pte::same_but_accessed_dirty(change.old, change.new) {
                    *word = change.new;
                }
            }
        }
        self.finish_demotion(from, page, memory, out)
    }

    /// A holder has given up a replica that nobody there used, unchanged.
    fn home_left(
        &mut self,
        from: NodeId,
        page: u32,
        unchanged: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let master = self.directory.masters.get_mut(&page).filter(|master| unchanged && master.holders.contains(from));
        let Some(master) = master else {
            return Err(ProtocolError { from, what: "a Dropped nobody waits for", page });
        };
        master.holders.remove(from);
        self.home_holder_gone(page, memory, out);
        Ok(())
    }

    /// A holder has left, or is lost: if that was the last one, home takes the page, and who is left alone with it is told.
    pub(super) fn home_holder_gone(&mut self, page: u32, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let master = self.directory.masters.get(&page).filter(|_| !self.directory.busy.contains_key(&page));
        let Some(Master { holders, .. }) = master else { return };
        let (count, first) = (holders.len(), holders.iter().next());
        match first {
            None => self.home_take_back(page, None, memory, out),
            Some(last) if count == 1 => self.send(last, Message::Alone { page }, memory, out),
            Some(_) => {}
        }
    }

    /// If nobody holds the replica any more but its new owner: the page is that node's, or goes to whoever
    /// asked first, or to home. `from`: whose message or loss led here.
    pub(super) fn finish_demotion(
        &mut self,
        from: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let (owner, changes, dropped) = match self.directory.busy.get_mut(&page) {
            Some(Busy::Demotion { owner, waiting, dropped, changes }) if waiting.is_empty() => {
                (*owner, std::mem::take(changes), std::mem::take(dropped))
            }
            _ => return Ok(()),
        };
        self.directory.busy.remove(&page);
        let master = self.directory.masters.remove(&page);
        if let Some(owner) = owner {
            *self.directory.place(page) = Place::owned(owner, NodeSet::new());
            self.send(owner, Message::Demoted { page, changes }, memory, out);
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
            *self.directory.place(page) = Place::owned(owner, NodeSet::new());
            if next.is_some() {
                let acks = NodeSet::new();
                self.send(owner, Message::Data { page, write: true, acks, done: false, migratory: false, data }, memory, out);
            } else {
                if self.access[page as usize] != Access::Invalid {
                    return Err(ProtocolError { from, what: "Dropped while home has a copy", page });
                }
                memory.install(page, &data, true);
                self.access[page as usize] = Access::Exclusive;
            }
        }
        if self.geometry.nodes() > 2 {
            for node in dropped.iter() {
                self.send(node, Message::Settled { page }, memory, out);
            }
        }
        self.serve_next(page, memory, out)
    }
}
