//! One node's part of the protocol: faults and messages in, memory operations and messages out.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::ahead::{Asked, GivenPages};
use super::counters::Counters;
use super::directory::{Directory, Request};
use super::fence::Fence;
use super::geometry::Geometry;
use super::memory::{Memory, PageData, words};
use super::message::{Change, Intent, Message, NodeId};
use super::node_set::NodeSet;
use super::rest::Patience;
use super::tables::Tables;
use super::whole::Awaited;
use super::{Bug, pte};

/// What this node may do with a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Access {
    /// Absent: every touch faults.
    #[default]
    Invalid,
    /// Present, read-only; others may have it too.
    Shared,
    /// Present, writable; nobody else has it.
    Exclusive,
    /// Present, writable unless it rests; others have replicas, and changes are merged.
    Replicated,
}

impl Access {
    /// Whether a touch of this kind goes through.
    pub fn allows(self, write: bool) -> bool {
        match self {
            Access::Invalid => false,
            Access::Shared => !write,
            Access::Exclusive | Access::Replicated => true,
        }
    }
}

/// A request of ours that home has not completed yet. At most one a page.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Pending<const W: usize> {
    pub write: bool,
    pub answer: Option<Answer<W>>,
    /// With the answer: whose acknowledgements are still due. Before: whose came ahead of it.
    pub acks: NodeSet,
}

/// How home (or the owner) answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Answer<const W: usize> {
    Data { write: bool, done: bool, migratory: bool, #[serde(with = "words")] data: Box<PageData<W>> },
    Zero { done: bool },
    Upgrade { done: bool },
}

/// Something that happened at this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input<const W: usize> {
    /// Somebody here touched a page that does not allow it.
    Fault { page: u32, write: bool },
    /// Somebody here is about to touch pages that may not allow it.
    Prefetch { pages: Range<u32>, write: bool },
    /// Somebody here is expected to read these pages soon.
    Expect(Vec<u32>),
    /// Somebody here is expected to use pages soon: bit n is the nth from `first` on.
    Ahead { first: u32, wanted: u64, intent: Intent },
    /// Somebody here is expected to use all of the block from `first` on, and more.
    AheadBlock { first: u32, intent: Intent },
    /// [`Message::AskBlock`] arrived from `to`, and this node has reasons to keep the block.
    KeepBlock { to: NodeId, first: u32 },
    /// A message arrived.
    Message { from: NodeId, message: Message<W> },
    /// The machine sends something to another node: leaves after everything the guest did before.
    Send { to: NodeId, bytes: Vec<u8> },
    /// This node has no room for its copies of these pages.
    Evict(Vec<u32>),
    /// The guest has no use for these pages; `id` names this request, and no other under way.
    Free { id: u32, pages: Range<u32> },
    /// CR3 of the vCPUs that run here, as pages.
    Roots(Vec<u32>),
    /// This node is lost: nothing of it comes any more.
    Lost(NodeId),
}

/// What the node has to do now: messages to send, in order, and messages for the machine.
#[derive(Debug, Default)]
pub struct Output<const W: usize> {
    /// Messages to other nodes. The order to one node must be kept.
    pub sends: Vec<(NodeId, Message<W>)>,
    /// Machine messages that arrived: (from, bytes).
    pub deliver: Vec<(NodeId, Vec<u8>)>,
    /// Pages whose requests are complete.
    pub completed: Vec<u32>,
    /// Pages that were asked for and will not come: the newest copy, or the home, was lost with a node.
    pub failed: Vec<u32>,
    /// Nodes this node knows from now on to be lost: by [`Input::Lost`], or told by another.
    pub lost: Vec<NodeId>,
    /// Requests to give pages up that are complete: see [`Input::Free`].
    pub freed: Vec<u32>,
    /// First pages of blocks that were to be asked for whole and won't come so ([`Input::AheadBlock`]).
    pub not_given: Vec<u32>,
    /// Blocks of this home that go whole: the first page, to whom, and for it to write or to read. To this node itself
    /// means that their owner is asked for them.
    pub whole: Vec<(u32, NodeId, bool)>,
    /// A page bounces between hosts and might be a root: fresh [`Input::Roots`] would tell.
    pub want_roots: bool,
}

/// A peer did what the protocol does not allow.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("node {from} broke the protocol: {what} for page {page}")]
pub struct ProtocolError {
    /// The peer.
    pub from: NodeId,
    /// What it sent.
    pub what: &'static str,
    /// The page it was about.
    pub page: u32,
}

/// The protocol engine of one node. Pure: it has no clock, no thread and does no I/O.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Engine<const W: usize> {
    pub(super) me: NodeId,
    pub(super) geometry: Geometry,
    pub(super) replicate: bool,
    pub(super) access: Vec<Access>,
    pub(super) pending: BTreeMap<u32, Pending<W>>,
    /// Pages asked for by [`Message::Ask`].
    pub(super) ahead: BTreeMap<u32, Asked>,
    /// Blocks asked for by [`Message::AskBlock`], by their first page.
    pub(super) blocks: BTreeMap<u32, Awaited<W>>,
    /// As home: blocks asked for by [`Message::FetchBlock`] of which nothing has come, by their first page, and their
    /// owners.
    pub(super) taking: BTreeMap<u32, NodeId>,
    pub(super) directory: Directory<W>,
    pub(super) tables: Tables<W>,
    pub(super) fence: Fence<W>,
    /// What migratory pages held (as a hash) when they were given here: a page given away again
    /// unchanged was only read.
    pub(super) given: BTreeMap<u32, u64>,
    /// Times each page was taken away from here: saturating.
    pub(super) taken: Vec<u8>,
    /// Homes that have not given up their part yet, by the number of the request.
    pub(super) freeing: BTreeMap<u32, NodeSet>,
    pub(super) loopback: VecDeque<Message<W>>,
    /// Nodes that are lost: nothing is sent to them, taken from them or awaited from them.
    pub(super) gone: NodeSet,
    pub(super) counters: Counters,
    #[serde(skip)]
    pub(super) bug: Option<Bug>,
    /// Untouched pages homed here are taken in aligned groups of this many.
    pub(super) zero_group: u32,
    /// Untouched aligned blocks of this many, homed here, are taken whole, and others given whole.
    pub(super) zero_block: u32,
    /// Only ever set by a planted bug.
    #[serde(skip)]
    late_discard: Option<u32>,
}

impl<const W: usize> Engine<W> {
    /// The engine of node `me`. `preloaded`: pages node 0 wrote before the start; they are its own.
    /// `image`: the pages the kernel image was loaded to. All nodes are given the same values.
    pub fn new(me: NodeId, geometry: Geometry, preloaded: &[Range<u32>], image: Range<u32>, replicate: bool) -> Self {
        let pages = geometry.pages() as usize;
        let mut access = vec![Access::Invalid; pages];
        if me == 0 {
            for range in preloaded {
                access[range.start as usize..range.end as usize].fill(Access::Exclusive);
            }
        }
        Engine {
            me,
            directory: Directory::new(me, &geometry, preloaded),
            geometry,
            replicate,
            access,
            pending: BTreeMap::new(),
            ahead: BTreeMap::new(),
            blocks: BTreeMap::new(),
            taking: BTreeMap::new(),
            tables: Tables::new(image),
            fence: Fence::default(),
            given: BTreeMap::new(),
            taken: vec![0; pages],
            freeing: BTreeMap::new(),
            loopback: VecDeque::new(),
            gone: NodeSet::new(),
            counters: Counters::default(),
            bug: None,
            zero_group: 1,
            zero_block: 1,
            late_discard: None,
        }
    }

    /// Has the first touch of a page nobody wrote, by its own home, take more along: all of an aligned block
    /// of `block` pages if nobody wrote any of it, else its untouched neighbours in an aligned group of
    /// `group` (powers of two). Most memory is only ever used at home, and these pages fault no more. Blocks
    /// of more than one page are also what a node may ask for whole: the same on all nodes.
    pub fn take_zeros_by(&mut self, group: u32, block: u32) {
        self.zero_group = group.max(1);
        self.zero_block = block.max(1);
    }

    /// Has replicas rest when flushes have found them unchanged for so long. By itself the engine lets none rest.
    pub fn rest_after(&mut self, patience: Patience) {
        self.tables.set_patience(patience);
    }

    /// Plants a bug, to show that the checks find it.
    pub fn plant(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }

    /// Forgets what only counts history, so that the model checker sees equal states as equal.
    #[cfg(test)]
    pub(super) fn forget_history(&mut self) {
        self.counters = Counters::default();
        self.taken.fill(0);
        self.directory.write_shared.forget_history();
        self.fence.forget_history();
        self.tables.forget_history();
    }

    /// What this node may do with a page that exists.
    pub fn access(&self, page: u32) -> Access {
        self.access[page as usize]
    }

    /// Whether this node waits for a page.
    pub fn is_pending(&self, page: u32) -> bool {
        self.pending.contains_key(&page) || self.ahead.contains_key(&page) || self.is_block_asked(page)
    }

    /// Pages this node has requested that are not here.
    pub fn pending(&self) -> usize {
        self.pending.len() + self.ahead.len() + self.blocks.len() * self.zero_block as usize
    }

    /// Pages asked for by [`Message::Ask`] that have not come yet.
    pub fn asked_ahead(&self) -> usize {
        self.ahead.len()
    }

    /// Whether anything waits here for another node.
    pub fn quiet(&self) -> bool {
        let nothing_asked = self.pending.is_empty() && self.ahead.is_empty() && self.blocks.is_empty();
        nothing_asked && self.freeing.is_empty() && self.fence.is_open() && self.directory.quiet()
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Replicas held now.
    pub fn replicas(&self) -> usize {
        self.tables.len()
    }

    /// Replicas at rest: nobody here has walked or written them lately.
    pub fn resting(&self) -> usize {
        self.tables.resting()
    }

    /// Bytes this node's directory takes, for the pages whose home it is.
    pub fn directory_bytes(&self) -> usize {
        self.directory.bytes()
    }

    /// The machine's pages.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Takes one step.
    ///
    /// # Errors
    /// When a peer's message is not possible in the state this node is in; the node can't go on.
    pub fn step(
        &mut self,
        input: Input<W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        if let Some(page) = self.late_discard.take() {
            memory.discard(page);
        }
        match input {
            Input::Fault { page, write } => self.fault(page, write, memory, out),
            Input::Prefetch { pages, write } => pages.for_each(|page| self.prefetch(page, write, memory, out)),
            Input::Expect(pages) => self.expect(&pages, memory, out),
            Input::Free { id, pages } => self.free(id, pages, memory, out),
            Input::Evict(pages) => self.evict(&pages, memory, out),
            Input::Ahead { first, wanted, intent } => self.ask_ahead(first, wanted, intent, memory, out),
            Input::AheadBlock { first, intent } => self.ask_block(first, intent, memory, out),
            Input::KeepBlock { to, .. } if self.gone.contains(to) => {}
            Input::KeepBlock { to, first } => self.home_ask_block(to, first, None, memory, out)?,
            Input::Roots(pages) => self.tables.set_roots(pages),
            Input::Send { to, bytes } => self.send(to, Message::Machine(bytes), memory, out),
            Input::Message { from, message } if !self.gone.contains(from) => self.receive(from, message, memory, out)?,
            Input::Message { .. } => {}
            Input::Lost(node) => self.lose(node, memory, out)?,
        }
        while let Some(message) = self.loopback.pop_front() {
            self.receive(self.me, message, memory, out)?;
        }
        self.join_runs(out);
        Ok(())
    }

    fn fault(&mut self, page: u32, write: bool, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let access = self.access[page as usize];
        if access.allows(write) {
            if write && self.rouse(page, true, memory) {
                return;
            }
            self.counters.stale_faults += 1;
            return memory.wake(page);
        }
        if self.pending.contains_key(&page) {
            // The answer wakes everybody; who needs more than it gives faults again.
            self.counters.stale_faults += 1;
            return;
        }
        if let Some(asked) = self.ahead.get_mut(&page) {
            self.counters.stale_faults += 1;
            asked.waits = Some(write || asked.waits == Some(true));
            return;
        }
        if self.await_block(page, write) {
            self.counters.stale_faults += 1;
            return;
        }
        match (access, write) {
            (Access::Shared, _) => self.counters.upgrade_faults += 1,
            (_, true) => self.counters.write_faults += 1,
            (_, false) => self.counters.read_faults += 1,
        }
        self.note_writer(page, write);
        self.request(page, write, memory, out);
    }

    /// Somebody here is to write a page.
    fn note_writer(&mut self, page: u32, write: bool) {
        if write && self.geometry.home(page) == self.me {
            self.directory.write_shared.note(page, self.me);
        }
    }

    /// As a fault that nobody waits for yet.
    fn prefetch(&mut self, page: u32, write: bool, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if !self.access[page as usize].allows(write) && !self.is_pending(page) {
            self.counters.prefetches += 1;
            self.note_writer(page, write);
            self.request(page, write, memory, out);
        }
    }

    /// The same for pages that may be read soon. A table is not asked for: it would be replicated, and compared at
    /// releases, on the strength of a guess; nor what nobody wrote, which may have been given up.
    fn expect(&mut self, pages: &[u32], memory: &mut impl Memory<W>, out: &mut Output<W>) {
        for &page in pages {
            let exists = page < self.geometry.pages();
            let untouched = exists && self.geometry.home(page) == self.me && self.directory.is_untouched(page);
            if exists && !untouched && self.tables.level(page).is_none() {
                self.prefetch(page, false, memory, out);
            }
        }
    }

    pub(super) fn request(&mut self, page: u32, write: bool, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if self.take_untouched(page, memory) {
            return out.completed.push(page);
        }
        let home = self.geometry.home(page);
        if self.gone.contains(home) {
            return self.fail(page, out);
        }
        self.pending.insert(page, Pending { write, answer: None, acks: NodeSet::new() });
        let table = self.wanted_as_table(page);
        self.send(home, Message::Get { page, write, table }, memory, out);
    }

    pub(super) fn wanted_as_table(&self, page: u32) -> bool {
        self.replicate && self.tables.level(page).is_some()
    }

    /// Sends, or keeps until the merges that must be in place before it are. To ourselves: at once.
    pub(super) fn send(&mut self, to: NodeId, message: Message<W>, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if to == self.me {
            return self.loopback.push_back(message);
        }
        if self.gone.contains(to) {
            return;
        }
        if message.releases() {
            self.flush(memory, out);
        }
        if message.bypasses_fence() || self.fence.is_open() {
            out.sends.push((to, message));
        } else {
            self.fence.hold(to, message);
        }
    }

    pub(super) fn receive(
        &mut self,
        from: NodeId,
        message: Message<W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = |what, page| Err(ProtocolError { from, what, page });
        if let Some(page) = message.page() {
            if page >= self.geometry.pages() {
                return bad("a page that does not exist", page);
            }
        }
        let Some(message) = self.unless_early(from, message)? else { return Ok(()) };
        match message {
            Message::Machine(bytes) => out.deliver.push((from, bytes)),
            Message::Get { page, write, table } => self.home_get(from, page, write, table, memory, out)?,
            Message::Done { page, shared } => self.home_done(from, page, shared, memory, out)?,
            Message::Promote { page, requester, level, data } => {
                self.home_promote(from, page, requester, level, data, memory, out)?;
            }
            Message::Free { id, first, count } => {
                let pages = first..first.saturating_add(count);
                self.home_free(from, id, pages, memory, out)?;
            }
            Message::Freed { id } => self.freed(from, id, out)?,
            Message::Evict { page, count } => self.home_evict_run(from, page, count, memory, out)?,
            Message::FetchRun { page, count, write } => self.fetch_run(from, page, count, write, memory, out)?,
            Message::InvalidateRun { page, count, requester } => self.invalidate_run(from, page, count, requester, memory, out)?,
            Message::InvalidateAckRun { page, count } => self.invalidated_run(from, page, count, memory, out)?,
            Message::FetchBlock { page } => self.fetch_block(from, page, memory, out)?,
            Message::DataRun { page, write, data } => self.data_run(from, page, write, data, memory, out)?,
            Message::Demote { page } => self.home_demote(from, page, memory, out)?,
            Message::Dropped { page, changes } => self.home_dropped(from, page, changes, memory, out)?,
            Message::Fetch { page, requester, write, acks, alone, table, done, migratory } => {
                let nodes = self.geometry.nodes();
                if from != self.geometry.home(page) || usize::from(requester) >= nodes || !acks.fits(nodes) {
                    return bad("Fetch", page);
                }
                if !matches!(self.access[page as usize], Access::Shared | Access::Exclusive) {
                    return bad("Fetch", page);
                }
                if self.gone.contains(requester) {
                    // Home will ask what became of the page once it knows.
                    return Ok(());
                }
                let promoted = self.replicate && alone && self.promote(page, requester, table, memory, out);
                if !promoted {
                    self.yield_page(page, requester, Yield { write, acks, done, migratory }, memory, out);
                    if from == self.me && !done {
                        self.home_sent(page, memory, out)?;
                    }
                }
            }
            // Told so again, since who it was to tell is lost: see `home_lost_busy`.
            Message::Invalidate { page, requester } if self.dropped_for_lost(page, from, requester) => {
                self.send(requester, Message::InvalidateAck { page }, memory, out);
            }
            Message::Invalidate { page, requester } => {
                let possible = self.can_be_dropped(page, from, requester);
                if from != self.geometry.home(page) || usize::from(requester) >= self.geometry.nodes() || !possible {
                    return bad("Invalidate", page);
                }
                let kept = self.bug == Some(Bug::KeepWhileUpgrading) && self.pending.contains_key(&page);
                if self.bug == Some(Bug::AckBeforeInvalidate) {
                    self.late_discard = Some(page);
                } else if !kept {
                    memory.discard(page);
                }
                if !kept {
                    self.access[page as usize] = Access::Invalid;
                }
                self.note_taken(page, out);
                self.counters.invalidations += 1;
                self.send(requester, Message::InvalidateAck { page }, memory, out);
            }
            Message::Data { page, write, acks, done, migratory, data } => {
                let answer = Answer::Data { write, done, migratory, data };
                self.answer(from, page, acks, answer, memory, out)?;
            }
            Message::Grant { page, zero, acks, done } => {
                if from != self.geometry.home(page) {
                    return bad("Grant", page);
                }
                let answer = if zero { Answer::Zero { done } } else { Answer::Upgrade { done } };
                self.answer(from, page, acks, answer, memory, out)?;
            }
            Message::InvalidateAck { page } if self.home_acknowledged(from, page, memory, out)? => {}
            Message::InvalidateAck { page } => {
                match self.pending.get_mut(&page) {
                    Some(pending) if pending.answer.is_some() => {
                        if !pending.acks.remove(from) {
                            return bad("InvalidateAck", page);
                        }
                    }
                    Some(pending) if !pending.acks.contains(from) => pending.acks.insert(from),
                    // Of a request that a loss has ended.
                    None if !self.gone.is_empty() => return Ok(()),
                    _ => return bad("InvalidateAck", page),
                }
                self.complete(from, page, memory, out)?;
            }
            Message::Replica { page, level, data } => {
                let expected = from == self.geometry.home(page) && self.pending.remove(&page).is_some();
                if !expected || self.access[page as usize] != Access::Invalid || !(1..=pte::ROOT_LEVEL).contains(&level) {
                    return bad("Replica", page);
                }
                self.come_by_the_page(page..page + 1);
                self.counters.pages_in += 1;
                out.completed.push(page);
                memory.install(page, &data, true);
                self.access[page as usize] = Access::Replicated;
                self.tables.insert(&self.geometry, page, level, data);
            }
            Message::Merge { id, changes } => {
                let possible = |c: &&Change| {
                    c.page < self.geometry.pages() && usize::from(c.word) < W && {
                        let home = self.geometry.home(c.page);
                        home == self.me || home == from
                    }
                };
                if let Some(c) = changes.iter().find(|c| !possible(c)) {
                    return bad("Merge", c.page);
                }
                self.merge(from, id, changes, memory, out);
            }
            Message::Merged { id } => {
                self.fence_merged(from, id, out);
            }
            Message::Drop { page } => {
                if from != self.geometry.home(page) {
                    return bad("Drop", page);
                }
                if self.access[page as usize] == Access::Replicated {
                    self.flush(memory, out);
                }
                if self.access[page as usize] != Access::Replicated {
                    // It left in that flush, or before home asked; then the page may be here as any other, straight from its
                    // new owner.
                    return Ok(());
                }
                memory.protect(page);
                let changes = self.last_changes(page, memory);
                let changed = !changes.is_empty();
                memory.discard(page);
                self.access[page as usize] = Access::Invalid;
                self.tables.remove(&self.geometry, page);
                self.note_taken(page, out);
                self.send(from, Message::Dropped { page, changes }, memory, out);
                if self.geometry.nodes() == 2 || self.bug == Some(Bug::SettledNotAwaited) {
                    // What leaves now comes behind the Dropped.
                    self.fence_demoted(page, out);
                } else if changed {
                    self.fence.await_demotion(page);
                }
            }
            Message::Settled { page } => {
                if from != self.geometry.home(page) {
                    return bad("Settled", page);
                }
                self.fence_demoted(page, out);
            }
            Message::Demoted { page, changes } => {
                if from != self.geometry.home(page) || self.access[page as usize] != Access::Replicated {
                    return bad("Demoted", page);
                }
                self.take_back(page, &changes, memory);
                self.fence_demoted(page, out);
            }
            Message::Alone { page } => {
                if from != self.geometry.home(page) {
                    return bad("Alone", page);
                }
                self.tables.set_alone(page);
                // Gives it back.
                self.flush(memory, out);
            }
            Message::NodeLost { node } => {
                if node == self.me || node == from || usize::from(node) >= self.geometry.nodes() {
                    return bad("a NodeLost", 0);
                }
                self.lose(node, memory, out)?;
            }
            Message::Retry { page, lost, write, table } => {
                self.home_retry(page, lost, Request { from, write, table }, memory, out)?;
            }
            Message::Gone { page } => {
                let ends = self.pending.get(&page).is_some_and(|pending| pending.answer.is_none());
                if !ends || from != self.geometry.home(page) || self.gone.is_empty() {
                    return bad("Gone", page);
                }
                self.pending.remove(&page);
                self.fail(page, out);
            }
            Message::Ask { page, wanted, intent } => self.home_ask(from, page, wanted, intent, memory, out)?,
            Message::Given { page, wanted, given, zeros, write, data } => {
                let given = GivenPages { wanted, given, zeros, write, data: &data };
                self.given_ahead(from, page, given, memory, out)?;
            }
            Message::AskBlock { page, intent } => self.home_ask_block(from, page, Some(intent), memory, out)?,
            Message::GivenBlock { page, content } => self.given_block(from, page, content, memory, out)?,
            Message::Recall { page, requester } => {
                if from != self.geometry.home(page) {
                    return bad("Recall", page);
                }
                let copy = self.access[page as usize] != Access::Invalid;
                self.send(from, Message::Kept { page, requester, copy }, memory, out);
            }
            Message::Kept { page, requester, copy } => self.home_kept(from, page, requester, copy, memory, out)?,
        }
        Ok(())
    }

    /// Whether `home` can want a page dropped here for `requester`. For itself it also has one dropped that may be
    /// written to: nobody needs that.
    pub(super) fn can_be_dropped(&self, page: u32, home: NodeId, requester: NodeId) -> bool {
        let access = self.access[page as usize];
        access == Access::Shared || (access == Access::Exclusive && requester == home)
    }

    /// Whether `home` may ask anew for a copy to be dropped that is not here: after a loss, and for itself.
    fn dropped_for_lost(&self, page: u32, home: NodeId, requester: NodeId) -> bool {
        let for_home = requester == home && home == self.geometry.home(page);
        for_home && !self.gone.is_empty() && self.access[page as usize] == Access::Invalid
    }

    /// As owner: sends the page to `requester`, keeping a read-only copy if it only reads.
    fn yield_page(
        &mut self,
        page: u32,
        requester: NodeId,
        how: Yield,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) {
        if self.bug == Some(Bug::MergeBeforeFreeze) {
            self.flush(memory, out);
        }
        let early = (self.bug == Some(Bug::SendBeforeFreeze)).then(|| memory.read(page));
        // Frozen first, so that no table change can be published through this page after the merge.
        if self.access[page as usize] == Access::Exclusive {
            memory.protect(page);
            self.access[page as usize] = Access::Shared;
        }
        let data = early.unwrap_or_else(|| memory.read(page));
        let Yield { acks, done, migratory, .. } = how;
        let only_read = self.given.remove(&page).is_some_and(|hash| hash == hash_of(&data));
        let write = how.write || (migratory && !only_read);
        if write {
            memory.discard(page);
            self.access[page as usize] = Access::Invalid;
            self.note_taken(page, out);
        }
        self.counters.pages_out += 1;
        let message = Message::Data { page, write, acks, done, migratory, data };
        if self.bug == Some(Bug::MergeBeforeFreeze) {
            return out.sends.push((requester, message));
        }
        self.send(requester, message, memory, out);
    }

    pub(super) fn note_taken(&mut self, page: u32, out: &mut Output<W>) {
        self.given.remove(&page);
        let taken = &mut self.taken[page as usize];
        *taken = taken.saturating_add(1);
        out.want_roots |= self.replicate && *taken >= 2;
    }

    pub(super) fn answer(
        &mut self,
        from: NodeId,
        page: u32,
        mut acks: NodeSet,
        answer: Answer<W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = |what| Err(ProtocolError { from, what, page });
        if !acks.fits(self.geometry.nodes()) {
            return bad("an acknowledgement of a node that does not exist");
        }
        match self.pending.get_mut(&page) {
            Some(pending) if pending.answer.is_none() => {
                for early in pending.acks.iter() {
                    if !acks.remove(early) {
                        return bad("an acknowledgement nobody is to send");
                    }
                }
                if !acks.is_empty() && self.bug != Some(Bug::AwaitLostSharer) {
                    acks.remove_all(&self.gone);
                }
                (pending.answer, pending.acks) = (Some(answer), acks);
            }
            // To a request that a loss has ended.
            None if !self.gone.is_empty() => return Ok(()),
            _ => return bad("an answer nobody asked for"),
        }
        self.complete(from, page, memory, out)
    }

    /// Completes a request once its answer and all acknowledgements are here.
    pub(super) fn complete(
        &mut self,
        from: NodeId,
        page: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let ready = self.pending.get(&page).is_some_and(|p| p.answer.is_some() && p.acks.is_empty());
        if !ready {
            return Ok(());
        }
        let pending = self.pending.remove(&page).expect("just seen");
        self.come_by_the_page(page..page + 1);
        out.completed.push(page);
        let mut shared = false;
        let access = &mut self.access[page as usize];
        let done = match (pending.answer.expect("just seen"), *access) {
            (Answer::Zero { done }, Access::Invalid) => {
                self.counters.zero_grants += 1;
                memory.install_zeros(page..page + 1);
                *access = Access::Exclusive;
                done
            }
            (Answer::Data { write, done, migratory, data }, Access::Invalid) => {
                self.counters.pages_in += 1;
                shared = migratory && !write;
                if migratory && write {
                    self.given.insert(page, hash_of(&data));
                }
                memory.install(page, &data, write);
                *access = if write { Access::Exclusive } else { Access::Shared };
                done
            }
            (Answer::Upgrade { done }, Access::Shared) => {
                memory.unprotect(page);
                *access = Access::Exclusive;
                done
            }
            _ => return Err(ProtocolError { from, what: "an answer that does not fit", page }),
        };
        if done {
            self.send(self.geometry.home(page), Message::Done { page, shared }, memory, out);
        }
        Ok(())
    }

    /// The words of a replica that changed since the last merge; its twin follows.
    pub(super) fn last_changes(&mut self, page: u32, memory: &mut impl Memory<W>) -> Vec<Change> {
        let Some((_, replica)) = self.tables.replica(page) else { return Vec::new() };
        let mut found = Vec::new();
        memory.differences(page, &replica.twin, &mut found);
        let twin = replica.twin.clone();
        found
            .into_iter()
            .map(|(word, new)| Change { page, word, old: twin[usize::from(word)], new })
            .collect()
    }
}

/// How a page is to be given away; see [`Message::Fetch`].
struct Yield {
    write: bool,
    acks: NodeSet,
    done: bool,
    migratory: bool,
}

/// FNV-1a over words. Two contents that hash alike cost a needless transfer, nothing else.
fn hash_of<const W: usize>(data: &PageData<W>) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(29))
}
