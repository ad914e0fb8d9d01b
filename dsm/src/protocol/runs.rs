//! Neighbouring pages that home asks of one owner in one step, and gets, or has dropped by one sharer, together: one
//! message each way instead of one a page, and one operation of the memory instead of one a page.
//!
//! It is nothing new to the protocol. A [`Message::FetchRun`] is so many a [`Message::Fetch`] that follow each other,
//! a [`Message::DataRun`] so many a [`Message::Data`], a [`Message::InvalidateRun`] so many a [`Message::Invalidate`] and a
//! [`Message::InvalidateAckRun`] so many a [`Message::InvalidateAck`]; where one of the pages is special to who receives
//! them, they are taken one by one.

use std::ops::Range;

use super::engine::{Access, Answer, Engine, Output, ProtocolError};
use super::memory::{Memory, PageData};
use super::message::{MAX_RUN, Message, NodeId};
use super::node_set::NodeSet;

/// Runs to different nodes that are made at a time.
const SIDE_BY_SIDE: usize = 8;

/// What one Fetch of a run is.
pub(super) fn fetch<const W: usize>(page: u32, requester: NodeId, write: bool) -> Message<W> {
    Message::Fetch { page, requester, write, acks: NodeSet::new(), alone: true, table: false, done: true, migratory: false }
}

/// A message as a run of one, if it may be part of a run. `me` sends it.
fn as_run<const W: usize>(me: NodeId, message: &Message<W>) -> Option<Message<W>> {
    match *message {
        Message::Fetch { page, requester, write, ref acks, alone: true, table: false, done: true, migratory: false }
            if requester == me && acks.is_empty() =>
        {
            Some(Message::FetchRun { page, count: 1, write })
        }
        Message::Invalidate { page, requester } => Some(Message::InvalidateRun { page, count: 1, requester }),
        _ => None,
    }
}

/// A run of one as what it was.
fn as_one<const W: usize>(me: NodeId, message: &Message<W>) -> Option<Message<W>> {
    match *message {
        Message::FetchRun { page, count: 1, write } => Some(fetch(page, me, write)),
        Message::InvalidateRun { page, count: 1, requester } => Some(Message::Invalidate { page, requester }),
        _ => None,
    }
}

/// Whether `run` has become one with the run of one that follows it.
fn extend<const W: usize>(run: &mut Message<W>, next: &Message<W>) -> bool {
    let (first, count, page) = match (run, next) {
        (Message::FetchRun { page: first, count, write }, Message::FetchRun { page, write: same, .. }) if write == same => (*first, count, *page),
        (Message::InvalidateRun { page: first, count, requester }, Message::InvalidateRun { page, requester: same, .. }) if requester == same => {
            (*first, count, *page)
        }
        _ => return false,
    };
    let follows = first + *count == page && *count < MAX_RUN;
    *count += u32::from(follows);
    follows
}

impl<const W: usize> Engine<W> {
    /// Makes runs of what home asks for itself, and of what it has dropped.
    pub(super) fn join_runs(&self, out: &mut Output<W>) {
        if out.sends.len() < 2 {
            return;
        }
        let mut joined: Vec<(NodeId, Message<W>)> = Vec::with_capacity(out.sends.len());
        for (to, message) in out.sends.drain(..) {
            let Some(run) = as_run(self.me, &message) else {
                joined.push((to, message));
                continue;
            };
            // What goes to others may stand between them: only what goes to one node has an order.
            let before = joined.iter_mut().rev().take(SIDE_BY_SIDE).find(|(before, _)| *before == to);
            if !before.is_some_and(|(_, before)| extend(before, &run)) {
                joined.push((to, run));
            }
        }
        for (_, message) in &mut joined {
            if let Some(one) = as_one(self.me, message) {
                *message = one;
            }
        }
        out.sends = joined;
    }

    /// The pages of a run that home names.
    fn run_of(&self, from: NodeId, home: NodeId, page: u32, count: usize, what: &'static str) -> Result<Range<u32>, ProtocolError> {
        let end = u32::try_from(count).ok().and_then(|count| page.checked_add(count)).filter(|end| *end <= self.geometry.pages());
        match end {
            Some(end) if (1..=MAX_RUN as usize).contains(&count) && (page..end).all(|page| self.geometry.home(page) == home) => Ok(page..end),
            _ => Err(ProtocolError { from, what, page }),
        }
    }

    /// Pages that are here are read only from now on.
    pub(super) fn freeze(&mut self, pages: Range<u32>, memory: &mut impl Memory<W>) {
        let mut next = pages.start;
        while next < pages.end {
            let writable = |page: u32| self.access[page as usize] == Access::Exclusive;
            let end = (next..pages.end).find(|page| writable(*page) != writable(next)).unwrap_or(pages.end);
            if writable(next) {
                self.access[next as usize..end as usize].fill(Access::Shared);
                memory.protect_range(next..end);
            }
            next = end;
        }
    }

    /// Whether a page is here and no table: nothing but what it holds is to be told when it leaves.
    pub(super) fn leaves_as_data(&self, page: u32) -> bool {
        matches!(self.access[page as usize], Access::Shared | Access::Exclusive) && self.tables.level(page).is_none()
    }

    /// As owner: home wants these pages for itself.
    pub(super) fn fetch_run(
        &mut self,
        from: NodeId,
        first: u32,
        count: u32,
        write: bool,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let pages = self.run_of(from, from, first, count as usize, "FetchRun")?;
        let plain = |page: u32| self.leaves_as_data(page) && !self.is_block_asked(page);
        if self.bug.is_some() || !pages.clone().all(plain) {
            return pages.into_iter().try_for_each(|page| self.receive(from, fetch(page, from, write), memory, out));
        }
        // Frozen first, as every page that leaves.
        self.freeze(pages.clone(), memory);
        let mut data = vec![[0; W]; pages.len()];
        for (page, words) in pages.clone().zip(&mut data) {
            memory.read_into(page, words);
            self.given.remove(&page);
        }
        if write {
            self.access[pages.start as usize..pages.end as usize].fill(Access::Invalid);
            memory.discard_run(pages.clone());
            pages.clone().for_each(|page| self.note_taken(page, out));
        }
        self.counters.pages_out += data.len() as u64;
        self.send(from, Message::DataRun { page: first, write, data }, memory, out);
        Ok(())
    }

    /// As home: pages that an owner was asked for.
    pub(super) fn data_run(
        &mut self,
        from: NodeId,
        first: u32,
        write: bool,
        data: Vec<PageData<W>>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let pages = self.run_of(from, self.me, first, data.len(), "DataRun")?;
        let plain = |page: u32| {
            let asked = self.pending.get(&page).is_some_and(|pending| pending.answer.is_none() && pending.acks.is_empty());
            asked && self.access[page as usize] == Access::Invalid
        };
        if self.bug.is_some() || !pages.clone().all(plain) {
            return pages.zip(data).try_for_each(|(page, words)| {
                let answer = Answer::Data { write, done: true, migratory: false, data: Box::new(words) };
                self.answer(from, page, NodeSet::new(), answer, memory, out)
            });
        }
        self.come_by_the_page(pages.clone());
        memory.install_range(first, &data, write);
        self.access[pages.start as usize..pages.end as usize].fill(if write { Access::Exclusive } else { Access::Shared });
        self.counters.pages_in += data.len() as u64;
        for page in pages {
            self.pending.remove(&page);
            out.completed.push(page);
            self.send(self.me, Message::Done { page, shared: false }, memory, out);
        }
        Ok(())
    }

    /// As sharer: home has these copies dropped.
    pub(super) fn invalidate_run(
        &mut self,
        from: NodeId,
        first: u32,
        count: u32,
        requester: NodeId,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let pages = self.run_of(from, from, first, count as usize, "InvalidateRun")?;
        let plain = |page: u32| self.can_be_dropped(page, from, requester) && !self.is_block_asked(page);
        let exists = usize::from(requester) < self.geometry.nodes();
        if self.bug.is_some() || !exists || !pages.clone().all(plain) {
            return pages.into_iter().try_for_each(|page| self.receive(from, Message::Invalidate { page, requester }, memory, out));
        }
        self.access[pages.start as usize..pages.end as usize].fill(Access::Invalid);
        memory.discard_run(pages.clone());
        self.counters.invalidations += u64::from(count);
        pages.for_each(|page| self.note_taken(page, out));
        self.send(requester, Message::InvalidateAckRun { page: first, count }, memory, out);
        Ok(())
    }

    /// As requester: copies that a sharer has dropped.
    pub(super) fn invalidated_run(
        &mut self,
        from: NodeId,
        first: u32,
        count: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let home = self.geometry.home(first);
        let mut pages = self.run_of(from, home, first, count as usize, "InvalidateAckRun")?;
        pages.try_for_each(|page| self.receive(from, Message::InvalidateAck { page }, memory, out))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::memory::Quiet;
    use super::super::{Bug, Geometry, Input};
    use super::*;

    /// Two nodes; node 0 is the home of 100 pages, and node 1 has written to those from 10 to 79.
    fn nodes() -> [Engine<1>; 2] {
        let geometry = Geometry::new(&[(0, 104)], &[100, 4]);
        let mut nodes = [0, 1].map(|me| Engine::new(me, geometry.clone(), &[], 0..0, false));
        for page in 10..80 {
            let get = step(&mut nodes[1], Input::Fault { page, write: true }).unwrap();
            let grant = step(&mut nodes[0], from(1, get[0].clone())).unwrap();
            step(&mut nodes[1], from(0, grant[0].clone())).unwrap();
        }
        nodes
    }

    /// What a node sends.
    pub fn step(node: &mut Engine<1>, input: Input<1>) -> Result<Vec<Message<1>>, &'static str> {
        let mut out = Output::default();
        node.step(input, &mut Quiet::default(), &mut out).map_err(|error| error.what)?;
        Ok(out.sends.into_iter().map(|(_, message)| message).collect())
    }

    /// A message arrives.
    pub fn from(from: NodeId, message: Message<1>) -> Input<1> {
        Input::Message { from, message }
    }

    #[test]
    fn what_is_evicted_goes_home_by_the_run() {
        let [mut home, mut owner] = nodes();
        let pages = (0..90).filter(|page| *page != 20).collect();
        let evict = step(&mut owner, Input::Evict(pages)).unwrap();
        assert_eq!(evict, [Message::Evict { page: 10, count: 10 }, Message::Evict { page: 21, count: 59 }]);
        let asked = step(&mut home, from(1, evict[1].clone())).unwrap();
        assert_eq!(asked, [Message::FetchRun { page: 21, count: 59, write: true }]);
        let data = step(&mut owner, from(0, asked[0].clone())).unwrap();
        assert_eq!(data, [Message::DataRun { page: 21, write: true, data: vec![[0]; 59] }]);
        assert_eq!((owner.access(20), owner.access(21), owner.access(79)), (Access::Exclusive, Access::Invalid, Access::Invalid));
        assert_eq!(step(&mut home, from(1, data[0].clone())), Ok(vec![]));
        assert_eq!((home.access(21), home.access(79), home.quiet()), (Access::Exclusive, Access::Exclusive, true));
        assert_eq!(step(&mut home, from(1, data[0].clone())), Err("an answer nobody asked for"));
    }

    #[test]
    fn one_page_is_fetched_as_ever_and_no_run_is_too_long() {
        let [mut home, _] = nodes();
        let one = step(&mut home, Input::Fault { page: 15, write: true }).unwrap();
        assert!(matches!(one[..], [Message::Fetch { page: 15, .. }]), "{one:?}");
        let counts: Vec<_> = step(&mut home, Input::Prefetch { pages: 10..80, write: true })
            .unwrap()
            .iter()
            .map(|message| match message {
                Message::FetchRun { page, count, write: true } => (*page, *count),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(counts, [(10, 5), (16, 64)]);
    }

    #[test]
    fn who_has_other_pages_or_none_is_told() {
        let [mut home, mut owner] = nodes();
        let run = |page, count| from(0, Message::FetchRun { page, count, write: true });
        for (page, count) in [(10, 0), (10, 65), (99, 2), (u32::MAX, 2), (90, 20)] {
            assert!(step(&mut owner, run(page, count)).is_err(), "{count} from {page}");
        }
        assert_eq!(step(&mut owner.clone(), run(78, 4)), Err("Fetch"), "some are not here");
        let data = |page, count| from(1, Message::DataRun { page, write: true, data: vec![[0]; count] });
        for (page, count) in [(10, 0), (99, 2), (102, 2), (10, 2)] {
            assert!(step(&mut home, data(page, count)).is_err(), "{count} from {page}");
        }
        for count in [0, 65] {
            assert_eq!(step(&mut home, from(1, Message::Evict { page: 10, count })), Err("an Evict of too much"));
        }
        assert_eq!(step(&mut home, from(1, Message::Evict { page: 99, count: 2 })), Err("Evict"), "of another home");
    }

    #[test]
    fn copies_go_by_the_run_and_that_they_have_gone_is_told_by_the_run() {
        let [mut home, mut reader] = nodes();
        // Both read them, and home is the owner.
        for page in 10..80 {
            let asked = step(&mut home, Input::Fault { page, write: true }).unwrap();
            let data = step(&mut reader, from(0, asked[0].clone())).unwrap();
            step(&mut home, from(1, data[0].clone())).unwrap();
            let get = step(&mut reader, Input::Fault { page, write: false }).unwrap();
            let data = step(&mut home, from(1, get[0].clone())).unwrap();
            step(&mut reader, from(0, data[0].clone())).unwrap();
        }
        let evict = step(&mut reader, Input::Evict((10..80).collect())).unwrap();
        assert_eq!(evict, [Message::Evict { page: 10, count: 64 }, Message::Evict { page: 74, count: 6 }]);
        let dropped = step(&mut home, from(1, evict[0].clone())).unwrap();
        assert_eq!(dropped, [Message::InvalidateRun { page: 10, count: 64, requester: 0 }]);
        // What is written meanwhile waits for it.
        assert_eq!(step(&mut home, Input::Fault { page: 12, write: true }), Ok(vec![]));
        let gone = step(&mut reader, from(0, dropped[0].clone())).unwrap();
        assert_eq!(gone, [Message::InvalidateAckRun { page: 10, count: 64 }]);
        assert_eq!((reader.access(10), reader.access(73), reader.access(74)), (Access::Invalid, Access::Invalid, Access::Shared));
        assert_eq!(reader.counters().invalidations, 64);
        assert_eq!(step(&mut home, from(1, gone[0].clone())), Ok(vec![]));
        assert_eq!((home.access(12), home.quiet()), (Access::Exclusive, true));
        // Nobody waits for it any more, or for so much.
        assert_eq!(step(&mut home, from(1, gone[0].clone())), Err("InvalidateAck"));
        let ack = |page, count| from(1, Message::InvalidateAckRun { page, count });
        let invalidate = |page, count, requester| from(0, Message::InvalidateRun { page, count, requester });
        for (page, count) in [(10, 0), (10, 65), (99, 2), (u32::MAX, 2)] {
            assert!(step(&mut home, ack(page, count)).is_err(), "{count} from {page}");
            assert!(step(&mut reader, invalidate(page, count, 0)).is_err(), "{count} from {page}");
        }
        assert_eq!(step(&mut reader, invalidate(73, 2, 0)), Err("Invalidate"), "one is not here");
        assert_eq!(step(&mut reader, invalidate(74, 2, 9)), Err("Invalidate"), "for nobody");
        let of_home = from(1, Message::InvalidateRun { page: 74, count: 2, requester: 1 });
        assert_eq!(step(&mut home, of_home), Err("InvalidateRun"), "another node is home");
    }

    #[test]
    fn what_goes_to_others_does_not_part_a_run() {
        let geometry = Geometry::new(&[(0, 104)], &[100, 2, 2]);
        let mut home = Engine::new(0, geometry, std::slice::from_ref(&(0..20)), 0..0, false);
        for (page, reader) in (0..20).flat_map(|page| [(page, 1), (page, 2)]) {
            step(&mut home, from(reader, Message::Get { page, write: false, table: false })).unwrap();
        }
        let mut out = Output::default();
        home.step(Input::Prefetch { pages: 3..7, write: true }, &mut Quiet::default(), &mut out).unwrap();
        let run = Message::InvalidateRun { page: 3, count: 4, requester: 0 };
        assert_eq!(out.sends, [(1, run.clone()), (2, run)]);
    }

    #[test]
    fn acknowledgements_of_nodes_that_do_not_exist_are_refused() {
        let [_, mut owner] = nodes();
        let acks: NodeSet = [0, 414].into_iter().collect();
        let fetch = Message::Fetch { page: 10, requester: 0, write: true, acks: acks.clone(), alone: false, table: false, done: true, migratory: false };
        assert_eq!(step(&mut owner, from(0, fetch)), Err("Fetch"));
        step(&mut owner, Input::Fault { page: 5, write: true }).unwrap();
        let grant = Message::Grant { page: 5, zero: true, acks, done: false };
        assert_eq!(step(&mut owner, from(0, grant)), Err("an acknowledgement of a node that does not exist"));
    }

    #[test]
    fn with_a_page_that_is_special_all_are_taken_one_by_one() {
        let [_, mut owner] = nodes();
        owner.plant(Bug::SendBeforeFreeze);
        let sent = step(&mut owner, from(0, Message::FetchRun { page: 10, count: 3, write: true })).unwrap();
        assert!(matches!(sent[..], [Message::Data { page: 10, .. }, Message::Data { page: 11, .. }, Message::Data { page: 12, .. }]), "{sent:?}");
        let [mut home, mut owner] = nodes();
        let asked = step(&mut home, Input::Prefetch { pages: 10..13, write: true }).unwrap();
        let mut sent = step(&mut owner, from(0, asked[0].clone())).unwrap();
        // One of them by itself first, as an owner may that takes them one by one.
        let [Message::DataRun { data, .. }] = &mut sent[..] else { panic!("{sent:?}") };
        let one = Message::Data { page: 11, write: true, acks: NodeSet::new(), done: true, migratory: false, data: Box::new(data[1]) };
        step(&mut home, from(1, one)).unwrap();
        assert_eq!(step(&mut home, from(1, sent[0].clone())), Err("an answer nobody asked for"));
    }
}
