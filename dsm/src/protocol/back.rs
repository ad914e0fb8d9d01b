//! Whole blocks that their home takes back from the node that has them.
//!
//! Nothing of this is new to the protocol, either: a [`Message::FetchBlock`] is a [`Message::Fetch`] to write of every
//! page of a block, for home itself, and a [`Message::GivenBlock`] that comes from an owner is a [`Message::Data`] of
//! every page. So home is busy with all of them until the block is there, and whatever is asked meanwhile, also by who
//! had the block and may be heard sooner than it comes, waits for its turn or is refused, as ever. An owner to whom one
//! of the pages is special answers page by page. An owner to whom the block itself is still on its way keeps the
//! message until it is there.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Bug;
use super::block_data::{BlockContent, BlockData};
use super::directory::Busy;
use super::engine::{Access, Engine, Output, Pending, ProtocolError};
use super::memory::Memory;
use super::message::{Intent, Message, NodeId};
use super::node_set::NodeSet;
use super::place::Place;
use super::runs::fetch;

impl<const W: usize> Engine<W> {
    /// As home: has the owner of a block send all of it, if one node has all of it and nobody else but home any, and
    /// nothing else is going on there. Whether it did.
    pub(super) fn take_block_back(&mut self, block: Range<u32>, intent: Intent, memory: &mut impl Memory<W>, out: &mut Output<W>) -> bool {
        let Some(owner) = self.owner_of_block(&block).filter(|_| intent != Intent::WriteUntouched) else { return false };
        self.drop_copies(&block, memory);
        self.directory.write_shared.unmark_all(block.clone());
        for page in block.clone() {
            *self.directory.place(page) = Place::owned(self.me, NodeSet::new());
        }
        // Together: one by one they take longer than all else here.
        self.directory.busy.append(&mut block.clone().map(|page| (page, Busy::Request { by: self.me, owner, acks: NodeSet::new() })).collect());
        let asked = Pending { write: true, answer: None, acks: NodeSet::new() };
        self.pending.append(&mut block.clone().map(|page| (page, asked.clone())).collect());
        self.taking.insert(block.start, owner);
        self.counters.blocks_asked += 1;
        out.whole.push((block.start, self.me, intent.writes()));
        self.send(owner, Message::FetchBlock { page: block.start }, memory, out);
        true
    }

    /// As home: the other node that has all pages of a block.
    fn owner_of_block(&self, block: &Range<u32>) -> Option<NodeId> {
        let places = &self.directory.places[(block.start - self.directory.first) as usize..][..block.len()];
        let Place::Owned { owner, .. } = places.first()? else { return None };
        let quiet = self.directory.busy.range(block.clone()).next().is_none() && self.pending.range(block.clone()).next().is_none();
        let access = &self.access[block.start as usize..block.end as usize];
        let free = |page: u32| {
            let alone = self.directory.is_alone(page, *owner, self.me) || self.bug == Some(Bug::BlockDespiteReaders);
            alone && self.tables.level(page).is_none()
        };
        let fits = *owner != self.me
            && !self.gone.contains(*owner)
            && quiet
            && access.contains(&Access::Invalid)
            && access.iter().all(|access| matches!(access, Access::Invalid | Access::Shared))
            && !self.directory.write_shared.migrates(block.clone())
            && block.clone().all(free);
        fits.then_some(*owner)
    }

    /// As owner: home wants all of the block.
    pub(super) fn fetch_block(
        &mut self,
        from: NodeId,
        first: u32,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let Some(block) = self.block_from(first).filter(|_| self.geometry.home(first) == from && from != self.me) else {
            return Err(ProtocolError { from, what: "a FetchBlock for what is no block of this home", page: first });
        };
        if !block.clone().all(|page| self.leaves_as_data(page)) {
            return block.into_iter().try_for_each(|page| self.receive(from, fetch(page, from, true), memory, out));
        }
        let data = self.take_out(block.clone(), memory);
        block.for_each(|page| self.note_taken(page, out));
        self.send(from, Message::GivenBlock { page: first, content: BlockContent::Pages(data) }, memory, out);
        Ok(())
    }

    /// A block that is here leaves.
    pub(super) fn take_out(&mut self, block: Range<u32>, memory: &mut impl Memory<W>) -> BlockData<W> {
        let early = (self.bug == Some(Bug::BlockBeforeFreeze))
            .then(|| BlockData::new(block.clone().map(|page| *memory.read(page)).collect::<Vec<_>>()));
        // Frozen first, as every page that leaves.
        let data = memory.take_out(block.clone());
        self.access[block.start as usize..block.end as usize].fill(Access::Invalid);
        let given: Vec<u32> = self.given.range(block.clone()).map(|(page, _)| *page).collect();
        for page in given {
            self.given.remove(&page);
        }
        self.counters.blocks_out += 1;
        self.counters.pages_out += block.len() as u64;
        early.unwrap_or(data)
    }

    /// As home: the block that its owner was asked for.
    pub(super) fn block_is_back(
        &mut self,
        from: NodeId,
        block: Range<u32>,
        content: BlockContent<W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = Err(ProtocolError { from, what: "a GivenBlock home did not ask for", page: block.start });
        let BlockContent::Pages(data) = content else { return bad };
        // An entry means that no page of it has come yet.
        if self.taking.get(&block.start) != Some(&from) || data.pages().len() != block.len() {
            return bad;
        }
        self.taking.remove(&block.start);
        memory.install_block(block.start, data);
        self.access[block.start as usize..block.end as usize].fill(Access::Exclusive);
        remove_range(&mut self.pending, &block);
        remove_range(&mut self.directory.busy, &block);
        self.counters.blocks_in += 1;
        self.counters.pages_in += block.len() as u64;
        out.completed.extend(block.clone());
        let queued: Vec<u32> = self.directory.queues.range(block).map(|(page, _)| *page).collect();
        queued.into_iter().try_for_each(|page| self.serve_next(page, memory, out))
    }

    /// Pages have come by themselves: if they are of blocks that home takes back, so do all of those.
    pub(super) fn come_by_the_page(&mut self, pages: Range<u32>) {
        if self.taking.is_empty() || pages.is_empty() {
            return;
        }
        for block in pages.start / self.zero_block..=(pages.end - 1) / self.zero_block {
            self.taking.remove(&(block * self.zero_block));
        }
    }

    /// What `node` has comes back no more.
    pub(super) fn end_taking(&mut self, node: NodeId) {
        self.taking.retain(|_, owner| *owner != node);
    }

    /// Whether what is written down of blocks on their way back can be true.
    pub(super) fn taking_fits(&self) -> bool {
        self.taking.iter().all(|(first, owner)| {
            let asked = |page: u32| {
                let busy = Some(&Busy::Request { by: self.me, owner: *owner, acks: NodeSet::new() });
                let waits = self.pending.get(&page).is_some_and(|pending| pending.answer.is_none() && pending.acks.is_empty());
                waits && self.directory.busy.get(&page) == busy && self.access[page as usize] == Access::Invalid
            };
            let block = self.block_from(*first).filter(|_| self.geometry.home(*first) == self.me);
            *owner != self.me && block.is_some_and(|mut block| block.all(asked))
        })
    }
}

/// Removes what there is of these pages.
fn remove_range<V>(map: &mut BTreeMap<u32, V>, pages: &Range<u32>) {
    let mut from = map.split_off(&pages.start);
    let mut behind = from.split_off(&pages.end);
    map.append(&mut behind);
}

#[cfg(test)]
mod tests {
    use super::super::memory::Quiet;
    use super::super::runs::tests::{from, step};
    use super::super::{Geometry, Input};
    use super::*;

    /// Of two pages each: three of node 0, of which node 1 has written all, and one of node 1.
    fn nodes() -> [Engine<1>; 2] {
        let geometry = Geometry::new(&[(0, 8)], &[6, 2]);
        let mut nodes = [0, 1].map(|me| {
            let mut engine = Engine::new(me, geometry.clone(), &[], 0..0, false);
            engine.take_zeros_by(1, 2);
            engine
        });
        for first in [0, 2, 4] {
            let asked = step(&mut nodes[1], Input::AheadBlock { first, intent: Intent::Write }).unwrap();
            let given = step(&mut nodes[0], from(1, asked[0].clone())).unwrap();
            step(&mut nodes[1], from(0, given[0].clone())).unwrap();
        }
        nodes
    }

    fn back(first: u32) -> Input<1> {
        Input::AheadBlock { first, intent: Intent::Read }
    }

    fn content(pages: usize) -> BlockContent<1> {
        BlockContent::Pages(BlockData::new(vec![[7]; pages]))
    }

    #[test]
    fn one_message_each_way_brings_a_block_home() {
        let [mut home, mut owner] = nodes();
        let asked = step(&mut home, back(2)).unwrap();
        assert_eq!(asked, [Message::FetchBlock { page: 2 }]);
        assert_eq!((home.asked_blocks(), home.is_pending(3), home.quiet()), (1, true, false));
        assert_eq!(step(&mut home, back(2)).unwrap(), [], "it is under way");
        let get = |page| from(1, Message::Get { page, write: true, table: false });
        let sent = step(&mut owner, from(0, asked[0].clone())).unwrap();
        assert_eq!(sent, [Message::GivenBlock { page: 2, content: BlockContent::Pages(BlockData::new(vec![[0]; 2])) }]);
        assert_eq!((owner.access(2), owner.access(3), owner.access(4)), (Access::Invalid, Access::Invalid, Access::Exclusive));
        // Who gave it wants some of it again at once, and is heard sooner.
        assert_eq!(step(&mut home, get(3)).unwrap(), []);
        let answers = step(&mut home, from(1, sent[0].clone())).unwrap();
        assert!(matches!(answers[..], [Message::Data { page: 3, write: true, .. }]), "{answers:?}");
        assert_eq!((home.access(2), home.access(3), home.quiet()), (Access::Exclusive, Access::Invalid, true));
        assert_eq!(home.counters().blocks_in, 1);
    }

    #[test]
    fn home_takes_back_only_what_one_other_has_and_drops_its_own_copies() {
        let [mut home, mut owner] = nodes();
        let mut memory = home.clone();
        assert_eq!(step(&mut memory, Input::AheadBlock { first: 2, intent: Intent::WriteUntouched }).unwrap(), []);
        for page in [2, 4, 5] {
            let asked = step(&mut home, Input::Fault { page, write: false }).unwrap();
            let sent = step(&mut owner, from(0, asked[0].clone())).unwrap();
            step(&mut home, from(1, sent[0].clone())).unwrap();
        }
        assert_eq!(step(&mut home, back(4)).unwrap(), [], "all of it can be read here");
        assert_eq!(step(&mut home, back(6)).unwrap(), [Message::AskBlock { page: 6, intent: Intent::Read }], "another's");
        assert_eq!(home.access(2), Access::Shared);
        assert_eq!(step(&mut home, back(2)).unwrap(), [Message::FetchBlock { page: 2 }]);
        assert_eq!(home.access(2), Access::Invalid);
        let asked = step(&mut home, Input::Fault { page: 0, write: true }).unwrap();
        assert!(matches!(asked[..], [Message::Fetch { page: 0, .. }]), "{asked:?}");
        assert_eq!(step(&mut home, back(0)).unwrap(), [], "one of its pages is on its way");
    }

    #[test]
    fn an_owner_may_answer_by_the_page_and_then_not_by_the_block() {
        let [mut home, owner] = nodes();
        step(&mut home, back(2)).unwrap();
        let text = serde_json::to_string(&home.save()).unwrap();
        assert_eq!(Engine::restore(serde_json::from_str(&text).unwrap(), home.geometry()).as_ref(), Ok(&home));
        for (of, to) in [(r#""taking":{"2":1}"#, r#""taking":{"2":0}"#), (r#""taking":{"2":1}"#, r#""taking":{"3":1}"#), (r#""taking":{"2":1}"#, r#""taking":{"4":1}"#)] {
            assert!(text.contains(of), "{of} in {text}");
            assert!(Engine::<1>::restore(serde_json::from_str(&text.replacen(of, to, 1)).unwrap(), home.geometry()).is_err(), "{to}");
        }
        // As one does to whom a page is special: a table.
        let fetch = |page| from(0, fetch(page, 0, true));
        let mut owner = owner;
        let mut sent = step(&mut owner, fetch(2)).unwrap();
        sent.extend(step(&mut owner, fetch(3)).unwrap());
        step(&mut home, from(1, sent[0].clone())).unwrap();
        assert_eq!((home.access(2), home.access(3), home.asked_blocks(), home.quiet()), (Access::Exclusive, Access::Invalid, 0, false));
        let block = from(1, Message::GivenBlock { page: 2, content: content(2) });
        assert_eq!(step(&mut home.clone(), block), Err("a GivenBlock home did not ask for"));
        step(&mut home, from(1, sent[1].clone())).unwrap();
        assert!(home.quiet());
    }

    #[test]
    fn an_owner_to_whom_the_block_is_on_its_way_sends_it_on_whole() {
        let [_, mut owner] = nodes();
        owner.access[2..4].fill(Access::Invalid);
        step(&mut owner, back(2)).unwrap();
        assert_eq!(step(&mut owner, from(0, Message::FetchBlock { page: 2 })).unwrap(), []);
        let sent = step(&mut owner, from(0, Message::GivenBlock { page: 2, content: content(2) })).unwrap();
        assert!(matches!(sent[..], [Message::GivenBlock { page: 2, content: BlockContent::Pages(_) }]), "{sent:?}");
        assert_eq!(owner.access(3), Access::Invalid);
    }

    #[test]
    fn a_run_over_the_end_of_a_block_is_of_both() {
        let [mut home, _] = nodes();
        step(&mut home, back(0)).unwrap();
        step(&mut home, back(2)).unwrap();
        assert_eq!(home.asked_blocks(), 2);
        step(&mut home, from(1, Message::DataRun { page: 1, write: true, data: vec![[7]; 2] })).unwrap();
        assert_eq!(home.asked_blocks(), 0);
    }

    #[test]
    fn what_nobody_asked_for_or_has_is_refused() {
        let [mut home, mut owner] = nodes();
        let given = |page, content| from(1, Message::GivenBlock { page, content });
        assert!(step(&mut home.clone(), given(2, content(2))).is_err());
        step(&mut home, back(2)).unwrap();
        for (page, what) in [(2, content(1)), (2, BlockContent::Stays), (2, BlockContent::Zeros), (3, content(2)), (4, content(2))] {
            assert!(step(&mut home.clone(), given(page, what)).is_err());
        }
        for page in [1, 6, 8, u32::MAX] {
            assert!(step(&mut owner, from(0, Message::FetchBlock { page })).is_err(), "{page}");
        }
        let mut other = Engine::<1>::new(1, home.geometry().clone(), &[], 0..0, false);
        other.take_zeros_by(1, 2);
        assert_eq!(step(&mut other, from(0, Message::FetchBlock { page: 2 })), Err("Fetch"), "it is not here");
    }

    #[test]
    fn a_lost_owner_ends_it() {
        let [mut home, _] = nodes();
        step(&mut home, back(2)).unwrap();
        step(&mut home, Input::Fault { page: 3, write: false }).unwrap();
        let mut out = Output::default();
        home.step(Input::Lost(1), &mut Quiet::default(), &mut out).unwrap();
        assert_eq!((out.failed, home.asked_blocks(), home.quiet()), (vec![2, 3], 0, true));
    }
}
