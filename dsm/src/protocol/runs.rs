//! Neighbouring pages that home asks of one owner in one step, and gets, together: one message each way instead of
//! one a page, and one operation of the memory instead of one a page.
//!
//! It is nothing new to the protocol. A [`Message::FetchRun`] is so many a [`Message::Fetch`] that follow each other,
//! and a [`Message::DataRun`] so many a [`Message::Data`]; where one of the pages is special to who receives
//! them, they are taken one by one.

use std::ops::Range;

use super::engine::{Access, Answer, Engine, Output, ProtocolError};
use super::memory::{Memory, PageData};
use super::message::{MAX_RUN, Message, NodeId};
use super::node_set::NodeSet;

/// What one Fetch of a run is.
pub(super) fn fetch<const W: usize>(page: u32, requester: NodeId, write: bool) -> Message<W> {
    Message::Fetch { page, requester, write, acks: NodeSet::new(), alone: true, table: false, done: true, migratory: false }
}

impl<const W: usize> Engine<W> {
    /// Makes runs of what home asks for itself.
    pub(super) fn join_fetches(&self, out: &mut Output<W>) {
        if out.sends.len() < 2 {
            return;
        }
        let mut joined: Vec<(NodeId, Message<W>)> = Vec::with_capacity(out.sends.len());
        for (to, message) in out.sends.drain(..) {
            let next = match &message {
                Message::Fetch { page, requester, write, acks, alone: true, table: false, done: true, migratory: false }
                    if *requester == self.me && acks.is_empty() =>
                {
                    Some((*page, *write))
                }
                _ => None,
            };
            let Some((page, write)) = next else {
                joined.push((to, message));
                continue;
            };
            match joined.last_mut() {
                Some((before, Message::FetchRun { page: first, count, write: same }))
                    if *before == to && *same == write && *first + *count == page && *count < MAX_RUN =>
                {
                    *count += 1;
                }
                _ => joined.push((to, Message::FetchRun { page, count: 1, write })),
            }
        }
        for (_, message) in &mut joined {
            if let Message::FetchRun { page, count: 1, write } = *message {
                *message = fetch(page, self.me, write);
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
        node.step(input, &mut Quiet, &mut out).map_err(|error| error.what)?;
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
