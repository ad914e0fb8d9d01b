//! Whole blocks given away, with ownership.
//!
//! A node that goes on reading for long asks home for a whole aligned block, of which it may read some pages
//! already. Home gives it if all of its pages are home's, read by nobody else but the asker, and none is busy, a page
//! table, or goes from writer to writer. It takes the block out of the guest's memory in one go, and that freezes it;
//! from then on the asker owns all pages. It is page by page what home does with a write request for a page that
//! nobody else has, and nobody says Done. A refusal changes nothing anywhere.
//!
//! The copies that the asker reads meanwhile hold what the block holds: only home could write to these pages, and it
//! would have taken the copies back before. So they are good until the block takes their place.
//!
//! A block is long, and who waits for a page shall not wait behind it: it may go another way than all other
//! messages, and come after such that were sent later (never before such that were sent sooner). Only four of
//! these can be about its pages: what home asks of an owner or a reader ([`Message::Fetch`], [`Message::FetchBlock`],
//! [`Message::Invalidate`], [`Message::Recall`]; a run is so many of them). The asker, who has no request for any page of
//! the block under way, keeps them until home's answer is there. If they mean the block's owner to be, it is the block. If they mean the copy that the asker reads,
//! the page that it owns, or one that it once had, then home was busy with the page when it was asked for the block,
//! and the answer, a refusal, is on its way already: nobody waits for long.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Bug;
use super::block_data::BlockContent;
use super::engine::{Access, Engine, Output, ProtocolError};
use super::memory::Memory;
use super::message::{Intent, Message, NodeId};
use super::node_set::NodeSet;
use super::place::Place;

/// A block that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Awaited<const W: usize> {
    /// The pages that somebody here waits for meanwhile, and whether to write.
    waits: BTreeMap<u32, bool>,
    /// What home asks of the block's owner, in its order.
    early: Vec<Message<W>>,
}

impl<const W: usize> Awaited<W> {
    /// Whether it is about pages of this block alone.
    pub(super) fn fits(&self, block: &Range<u32>) -> bool {
        let early = self.early.iter().map(asked_of_owner);
        self.waits.keys().map(|page| Some(*page)).chain(early).all(|page| page.is_some_and(|page| block.contains(&page)))
    }
}

/// The page of a message by which home asks something of a page's owner or reader.
fn asked_of_owner<const W: usize>(message: &Message<W>) -> Option<u32> {
    match *message {
        Message::Fetch { page, .. } | Message::FetchBlock { page } | Message::Invalidate { page, .. } | Message::Recall { page, .. } => Some(page),
        _ => None,
    }
}

impl<const W: usize> Engine<W> {
    /// The block that starts with a page, if one does and all its pages exist and have one home.
    pub(super) fn block_from(&self, first: u32) -> Option<Range<u32>> {
        let end = first.checked_add(self.zero_block).filter(|end| *end <= self.geometry.pages())?;
        let block = self.zero_block > 1 && first % self.zero_block == 0 && self.geometry.home(first) == self.geometry.home(end - 1);
        block.then_some(first..end)
    }

    /// The first page of the block a page is in.
    pub(super) fn block_of(&self, page: u32) -> u32 {
        page - page % self.zero_block
    }

    /// Whether the page is in a block that was asked for and has not come.
    pub fn is_block_asked(&self, page: u32) -> bool {
        !self.blocks.is_empty() && self.blocks.contains_key(&self.block_of(page))
    }

    /// Somebody touches a page. Whether it may be coming with its block: then that is waited for.
    pub(super) fn await_block(&mut self, page: u32, write: bool) -> bool {
        let first = self.block_of(page);
        let Some(awaited) = self.blocks.get_mut(&first) else { return false };
        *awaited.waits.entry(page).or_default() |= write;
        true
    }

    /// A message that has come. `None`: it is for the owner of a block that is on its way here, and is kept.
    pub(super) fn unless_early(&mut self, from: NodeId, message: Message<W>) -> Result<Option<Message<W>>, ProtocolError> {
        let Some(page) = asked_of_owner(&message) else { return Ok(Some(message)) };
        if self.blocks.is_empty() || from != self.geometry.home(page) {
            return Ok(Some(message));
        }
        let first = self.block_of(page);
        match self.blocks.get_mut(&first) {
            None => Ok(Some(message)),
            Some(_) if self.bug == Some(Bug::EarlyForgotten) => Ok(None),
            // Home asks for a page once at a time, and once more if whom it was for is lost.
            Some(awaited) if awaited.early.len() >= 2 * self.zero_block as usize => {
                Err(ProtocolError { from, what: "too much asked of the owner of a block that has not come", page })
            }
            Some(awaited) => {
                awaited.early.push(message);
                Ok(None)
            }
        }
    }

    /// Blocks asked for that have not come yet, be it by home.
    pub fn asked_blocks(&self) -> usize {
        self.blocks.len() + self.taking.len()
    }

    /// Asks for the whole block from `first` on. If this is its home, as [`Engine::take_block_back`] says; else if no
    /// page of it can be written here or was asked for to be, some can't be read, and nobody here waits for one. Pages asked for by [`Message::Ask`]
    /// come before it.
    /// `out.not_given` says what won't come.
    pub(super) fn ask_block(&mut self, first: u32, intent: Intent, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        let block = self.block_from(first).filter(|_| self.geometry.home(first) == self.me);
        if block.is_some_and(|block| self.take_block_back(block, intent, memory, out)) {
            return;
        }
        let askable = self.block_from(first).is_some_and(|block| {
            let some = self.access[block.start as usize..block.end as usize].contains(&Access::Invalid);
            some && !self.blocks.contains_key(&first) && self.may_await(&block)
        });
        if !askable {
            return out.not_given.push(first);
        }
        self.blocks.insert(first, Awaited { waits: BTreeMap::new(), early: Vec::new() });
        self.counters.blocks_asked += 1;
        self.send(self.geometry.home(first), Message::AskBlock { page: first, intent }, memory, out);
    }

    /// Whether a block is one that this node may have asked for, as far as what it has of it tells.
    fn may_await(&self, block: &Range<u32>) -> bool {
        let home = self.geometry.home(block.start);
        let mut here = self.access[block.start as usize..block.end as usize].iter();
        let to_write = self.ahead.range(block.clone()).any(|(_, asked)| asked.write);
        home != self.me
            && !to_write
            && !self.gone.contains(home)
            && self.pending.range(block.clone()).next().is_none()
            && here.all(|access| matches!(access, Access::Invalid | Access::Shared))
    }

    /// Whether what is written down of blocks on their way can be true.
    pub(super) fn blocks_fit(&self) -> bool {
        let fits = |(first, awaited): (&u32, &Awaited<W>)| {
            self.block_from(*first).is_some_and(|block| awaited.fits(&block) && self.may_await(&block))
        };
        self.blocks.iter().all(fits)
    }

    /// As home: gives the block, or not, if `intent` is none because the node has reasons of its own to keep it.
    pub(super) fn home_ask_block(
        &mut self,
        from: NodeId,
        first: u32,
        intent: Option<Intent>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let here = self.block_from(first).filter(|_| self.geometry.home(first) == self.me);
        let Some(block) = here else {
            return Err(ProtocolError { from, what: "an AskBlock for what is no block of this home", page: first });
        };
        let written = self.directory.untouched(block.clone()).count() < block.len();
        let willing = intent.is_some_and(|intent| !written || intent != Intent::WriteUntouched);
        let content = match intent.filter(|_| willing && self.can_spare_block(from, &block)) {
            Some(intent) => {
                out.whole.push((first, from, intent.writes()));
                self.give_block(from, block, memory)
            }
            None => BlockContent::Stays,
        };
        self.send(from, Message::GivenBlock { page: first, content }, memory, out);
        Ok(())
    }

    /// As home: whether a block can be given to `from`.
    fn can_spare_block(&self, from: NodeId, block: &Range<u32>) -> bool {
        let directory = &self.directory;
        // All of it is here, and nobody else has any.
        let spare = |page: u32| {
            let alone = directory.is_alone(page, self.me, from) || self.bug == Some(Bug::BlockDespiteReaders);
            let here = matches!(self.access[page as usize], Access::Shared | Access::Exclusive);
            alone && here && !directory.busy.contains_key(&page) && self.tables.level(page).is_none()
        };
        let untouched = directory.untouched(block.clone()).count();
        // A block of which little was written is less by the page.
        let worth = untouched == block.len() || 2 * untouched <= block.len();
        worth && !directory.write_shared.migrates(block.clone()) && block.clone().all(|page| directory.is_untouched(page) || spare(page))
    }

    /// As home: the block is `to`'s.
    fn give_block(&mut self, to: NodeId, block: Range<u32>, memory: &mut impl Memory<W>) -> BlockContent<W> {
        let untouched: Vec<u32> = self.directory.untouched(block.clone()).collect();
        for page in block.clone() {
            *self.directory.place(page) = Place::owned(to, NodeSet::new());
        }
        if untouched.len() == block.len() {
            self.counters.blocks_out += 1;
            return BlockContent::Zeros;
        }
        for page in untouched {
            memory.install_zeros(page..page + 1);
            self.access[page as usize] = Access::Exclusive;
        }
        self.directory.write_shared.unmark_all(block.clone());
        BlockContent::Pages(self.take_out(block, memory))
    }

    /// Nothing of a block is here any more that it would have to take the place of.
    pub(super) fn drop_copies(&mut self, block: &Range<u32>, memory: &mut impl Memory<W>) {
        let mut next = block.start;
        while next < block.end {
            let end = (next..block.end).find(|page| self.access[*page as usize] == Access::Invalid).unwrap_or(block.end);
            if end > next {
                memory.discard_run(next..end);
            }
            next = end + 1;
        }
        self.access[block.start as usize..block.end as usize].fill(Access::Invalid);
    }

    /// Home's answer: the block, or that it won't come.
    pub(super) fn given_block(
        &mut self,
        from: NodeId,
        first: u32,
        content: BlockContent<W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = Err(ProtocolError { from, what: "a GivenBlock nobody asked for", page: first });
        let home = self.geometry.home(first);
        if let Some(block) = self.block_from(first).filter(|_| home == self.me) {
            return self.block_is_back(from, block, content, memory, out);
        }
        if from != home {
            return bad;
        }
        let (Some(awaited), Some(block)) = (self.blocks.remove(&first), self.block_from(first)) else { return bad };
        let data = match content {
            BlockContent::Stays => {
                self.counters.blocks_refused += 1;
                out.not_given.push(first);
                // Somebody came for these meanwhile: now it is a fault like any other.
                awaited.early.into_iter().try_for_each(|message| self.receive(from, message, memory, out))?;
                awaited.waits.into_iter().for_each(|(page, write)| self.request(page, write, memory, out));
                return Ok(());
            }
            BlockContent::Zeros => None,
            BlockContent::Pages(data) => Some(data),
        };
        let short = data.as_ref().is_some_and(|data| data.pages().len() != block.len());
        // What was asked for by the page before the block comes before it.
        if short || self.ahead.range(block.clone()).next().is_some() {
            return bad;
        }
        self.drop_copies(&block, memory);
        match data {
            Some(data) => {
                memory.install_block(first, data);
                self.counters.pages_in += block.len() as u64;
            }
            None => {
                memory.install_zeros(block.clone());
                self.counters.zero_neighbours += block.len() as u64;
            }
        }
        self.access[block.start as usize..block.end as usize].fill(Access::Exclusive);
        self.counters.blocks_in += 1;
        out.completed.extend(block);
        awaited.early.into_iter().try_for_each(|message| self.receive(from, message, memory, out))
    }

    /// `home` is lost: its blocks don't come.
    pub(super) fn end_blocks(&mut self, home: NodeId, out: &mut Output<W>) {
        let asked: Vec<u32> = self.blocks.keys().copied().filter(|first| self.geometry.home(*first) == home).collect();
        for first in asked {
            let waits = self.blocks.remove(&first).map(|awaited| awaited.waits).unwrap_or_default();
            waits.into_keys().for_each(|page| self.fail(page, out));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BlockData, EngineState, Geometry, Input, PageData, StateError};
    use super::*;

    /// Memory that notes what is done to it.
    #[derive(Clone, Default)]
    struct Noted(Vec<String>);

    impl Memory<1> for Noted {
        fn protect(&mut self, page: u32) {
            self.0.push(format!("protect {page}"));
        }
        fn unprotect(&mut self, _: u32) {}
        fn read(&self, page: u32) -> Box<PageData<1>> {
            Box::new([u64::from(page)])
        }
        fn install(&mut self, page: u32, data: &PageData<1>, writable: bool) {
            self.0.push(format!("install {page} {data:?} {writable}"));
        }
        fn install_zeros(&mut self, pages: Range<u32>) {
            self.0.push(format!("zeros {pages:?}"));
        }
        fn discard(&mut self, page: u32) {
            self.0.push(format!("discard {page}"));
        }
        fn wake(&mut self, _: u32) {}
        fn load(&self, _: u32, _: usize) -> u64 {
            0
        }
        fn compare_exchange(&mut self, _: u32, _: usize, old: u64, _: u64) -> Result<u64, u64> {
            Ok(old)
        }
        fn differences(&self, _: u32, _: &PageData<1>, _: &mut Vec<(u16, u64)>) {}
    }

    struct Node(Engine<1>, Noted, Output<1>);

    impl Node {
        /// Of three. Node 0 is the home of five blocks of two pages and half of another, and has written three.
        fn new(me: NodeId) -> Self {
            let mut engine = Engine::new(me, geometry(), std::slice::from_ref(&(0..6)), 0..0, false);
            engine.take_zeros_by(1, 2);
            Node(engine, Noted::default(), Output::default())
        }

        fn step(&mut self, input: Input<1>) -> Result<Vec<(NodeId, Message<1>)>, &'static str> {
            self.2 = Output::default();
            self.0.step(input, &mut self.1, &mut self.2).map_err(|error| error.what)?;
            Ok(std::mem::take(&mut self.2.sends))
        }

        fn hear(&mut self, from: NodeId, message: Message<1>) -> Result<Vec<(NodeId, Message<1>)>, &'static str> {
            self.step(Input::Message { from, message })
        }
    }

    fn geometry() -> Geometry {
        Geometry::new(&[(0, 16)], &[11, 3, 2])
    }

    fn ask(page: u32) -> Message<1> {
        Message::AskBlock { page, intent: Intent::Read }
    }

    fn given(page: u32, data: &[PageData<1>]) -> Message<1> {
        Message::GivenBlock { page, content: BlockContent::Pages(BlockData::new(data.to_vec())) }
    }

    fn refused(page: u32) -> Message<1> {
        Message::GivenBlock { page, content: BlockContent::Stays }
    }

    fn get(page: u32, write: bool) -> Message<1> {
        Message::Get { page, write, table: false }
    }

    #[test]
    fn home_gives_what_is_its_own_alone_and_asks_the_new_owner_from_then_on() {
        let mut home = Node::new(0);
        assert_eq!(home.hear(1, ask(2)), Ok(vec![(1, given(2, &[[2], [3]]))]));
        assert_eq!(home.1.0, ["protect 2", "protect 3", "discard 2", "discard 3"]);
        assert_eq!((home.0.access(3), home.0.counters().blocks_out), (Access::Invalid, 1));
        let sends = home.step(Input::Fault { page: 3, write: true }).unwrap();
        assert!(matches!(sends[..], [(1, Message::Fetch { page: 3, requester: 0, write: true, .. })]), "{sends:?}");
        // It is on its way home, and then the block is in two hands.
        assert_eq!(home.hear(2, ask(2)), Ok(vec![(2, refused(2))]));
    }

    #[test]
    fn home_refuses_what_it_shares_has_not_or_will_not_give() {
        let mut home = Node::new(0);
        home.hear(1, get(1, false)).unwrap();
        assert_eq!(home.hear(2, ask(0)), Ok(vec![(2, refused(0))]), "node 1 reads a page");
        assert_eq!(home.step(Input::KeepBlock { to: 2, first: 2 }), Ok(vec![(2, refused(2))]));
        assert_eq!(home.0.counters().blocks_out, 0);
        for no_block in [3, 10, 12, 15] {
            assert_eq!(home.hear(2, ask(no_block)), Err("an AskBlock for what is no block of this home"));
        }
        home.hear(2, ask(2)).unwrap();
        assert_eq!(home.hear(2, ask(2)), Ok(vec![(2, refused(2))]), "it is its own already");
    }

    #[test]
    fn a_block_nobody_wrote_goes_without_data() {
        let (mut home, mut writer) = (Node::new(0), Node::new(1));
        assert_eq!(writer.step(Input::AheadBlock { first: 6, intent: Intent::Read }), Ok(vec![(0, ask(6))]));
        let zeros = Message::GivenBlock { page: 6, content: BlockContent::Zeros };
        assert_eq!(home.hear(1, ask(6)), Ok(vec![(1, zeros.clone())]));
        assert_eq!((&home.1.0[..], home.0.access(6)), (&[][..], Access::Invalid));
        assert_eq!(writer.step(Input::Fault { page: 7, write: true }), Ok(vec![]));
        assert_eq!(writer.hear(0, zeros), Ok(vec![]));
        assert_eq!(writer.1.0, ["zeros 6..8"]);
        assert_eq!((writer.0.access(7), writer.0.quiet(), writer.0.counters().pages_in), (Access::Exclusive, true, 0));
        let sends = home.hear(2, get(7, false)).unwrap();
        assert!(matches!(sends[..], [(1, Message::Fetch { page: 7, requester: 2, .. })]), "{sends:?}");
    }

    #[test]
    fn a_block_may_be_asked_for_only_if_nobody_wrote_it() {
        let mut home = Node::new(0);
        let untouched = |page| Message::AskBlock { page, intent: Intent::WriteUntouched };
        assert_eq!(home.hear(1, untouched(2)), Ok(vec![(1, refused(2))]));
        assert_eq!(home.hear(1, untouched(6)), Ok(vec![(1, Message::GivenBlock { page: 6, content: BlockContent::Zeros })]));
    }

    #[test]
    fn a_block_half_of_which_was_written_goes_whole() {
        let mut home = Node::new(0);
        home.hear(1, get(6, true)).unwrap();
        assert_eq!(home.hear(1, ask(6)), Ok(vec![(1, refused(6))]), "half of it is its own");
        home.step(Input::Fault { page: 6, write: true }).unwrap();
        let data = Message::Data { page: 6, write: true, acks: NodeSet::new(), done: true, migratory: false, data: Box::new([9]) };
        home.hear(1, data).unwrap();
        home.1.0.clear();
        assert_eq!(home.hear(1, ask(6)), Ok(vec![(1, given(6, &[[6], [7]]))]), "the content is of this memory");
        assert_eq!(home.1.0, ["zeros 7..8", "protect 6", "protect 7", "discard 6", "discard 7"]);
    }

    #[test]
    fn a_block_with_a_page_that_migrates_stays_until_it_does_no_more() {
        let mut home = Node::new(0);
        home.hear(1, get(3, false)).unwrap();
        home.hear(1, get(3, true)).unwrap();
        home.hear(1, Message::Done { page: 3, shared: false }).unwrap();
        let back = |home: &mut Node| {
            home.step(Input::Fault { page: 3, write: false }).unwrap();
            let data = Message::Data { page: 3, write: true, acks: NodeSet::new(), done: true, migratory: true, data: Box::new([9]) };
            home.hear(1, data).unwrap();
        };
        back(&mut home);
        assert_eq!(home.hear(2, ask(2)), Ok(vec![(2, refused(2))]), "node 1 would come for it");
        for _ in 0..512 {
            home.hear(1, get(5, true)).unwrap();
            home.step(Input::Fault { page: 5, write: true }).unwrap();
            let data = Message::Data { page: 5, write: true, acks: NodeSet::new(), done: true, migratory: false, data: Box::new([5]) };
            home.hear(1, data).unwrap();
        }
        assert_eq!(home.hear(2, ask(2)), Ok(vec![(2, given(2, &[[2], [3]]))]), "it did not");
        // Node 2 has it, and has not been seen to write it: the next reader gets a copy.
        home.step(Input::Fault { page: 3, write: false }).unwrap();
        let data = Message::Data { page: 3, write: false, acks: NodeSet::new(), done: true, migratory: false, data: Box::new([9]) };
        home.hear(2, data).unwrap();
        assert_eq!((home.0.access(3), home.0.quiet()), (Access::Shared, true));
    }

    #[test]
    fn who_touches_a_block_on_its_way_waits_for_it() {
        let mut reader = Node::new(1);
        assert_eq!(reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }), Ok(vec![(0, ask(2))]));
        assert_eq!(reader.step(Input::Fault { page: 3, write: true }), Ok(vec![]));
        assert_eq!(reader.step(Input::Ahead { first: 0, wanted: 0b1111, intent: Intent::Read }), Ok(vec![(0, Message::Ask { page: 0, wanted: 0b11, intent: Intent::Read })]));
        assert_eq!(reader.step(Input::Prefetch { pages: 2..4, write: true }), Ok(vec![]));
        assert!(reader.0.is_pending(2) && !reader.0.is_pending(4) && !reader.0.quiet());
        assert_eq!((reader.0.asked_blocks(), reader.0.pending()), (1, 4));
        assert_eq!(reader.hear(0, given(2, &[[7], [8]])), Ok(vec![]));
        assert_eq!(reader.1.0, ["install 2 [7] true", "install 3 [8] true"]);
        assert_eq!((reader.0.access(2), &reader.2.completed[..]), (Access::Exclusive, &[2, 3][..]));
        assert_eq!(reader.hear(0, given(2, &[[7], [8]])), Err("a GivenBlock nobody asked for"));
    }

    #[test]
    fn what_home_asks_of_the_owner_of_a_block_waits_until_it_is_there() {
        let mut reader = Node::new(1);
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        let fetch = Message::Fetch {
            page: 3,
            requester: 2,
            write: false,
            acks: NodeSet::new(),
            alone: false,
            table: false,
            done: false,
            migratory: false,
        };
        assert_eq!(reader.hear(0, fetch.clone()), Ok(vec![]));
        assert_eq!(reader.hear(0, Message::Invalidate { page: 3, requester: 2 }), Ok(vec![]));
        assert_eq!(reader.hear(2, fetch), Err("Fetch"), "not its home");
        let sends = reader.hear(0, given(2, &[[7], [8]])).unwrap();
        assert!(matches!(&sends[..], [(2, Message::Data { page: 3, data, .. }), (2, Message::InvalidateAck { page: 3 })] if **data == [3]), "{sends:?}");
        assert_eq!((reader.0.access(2), reader.0.access(3), reader.0.quiet()), (Access::Exclusive, Access::Invalid, true));
        reader.step(Input::AheadBlock { first: 4, intent: Intent::Read }).unwrap();
        reader.hear(0, Message::Recall { page: 4, requester: 2 }).unwrap();
        assert_eq!(reader.hear(0, refused(4)), Ok(vec![(0, Message::Kept { page: 4, requester: 2, copy: false })]));
        reader.step(Input::AheadBlock { first: 4, intent: Intent::Read }).unwrap();
        (0..4).for_each(|_| drop(reader.hear(0, Message::Invalidate { page: 4, requester: 0 }).unwrap()));
        let fifth = reader.hear(0, Message::Invalidate { page: 4, requester: 0 });
        assert_eq!(fifth, Err("too much asked of the owner of a block that has not come"));
        assert_eq!(reader.hear(0, refused(4)), Err("Invalidate"), "of what is not here");
    }

    #[test]
    fn a_block_takes_the_place_of_copies_and_what_is_on_its_way_comes_before() {
        let (mut home, mut reader) = (Node::new(0), Node::new(1));
        let asked = reader.step(Input::Ahead { first: 2, wanted: 0b11, intent: Intent::Read }).unwrap();
        assert_eq!(reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }), Ok(vec![(0, ask(2))]));
        // Page 3 goes on being read by the page until the block is here, as far as anybody here knows.
        assert_eq!(reader.step(Input::Fault { page: 3, write: false }), Ok(vec![]));
        let (_, answer) = home.hear(1, asked[0].1.clone()).unwrap().remove(0);
        let (_, block) = home.hear(1, ask(2)).unwrap().remove(0);
        assert_eq!(block, given(2, &[[2], [3]]));
        assert_eq!(reader.hear(0, answer), Ok(vec![]));
        assert_eq!((reader.0.access(2), reader.0.access(3)), (Access::Shared, Access::Shared));
        assert_eq!(reader.step(Input::Fault { page: 2, write: true }), Ok(vec![]), "it will be writable");
        assert_eq!(reader.hear(0, block), Ok(vec![]));
        let done = ["install 2 [2] false", "install 3 [3] false", "discard 2", "discard 3", "install 2 [2] true", "install 3 [3] true"];
        assert_eq!(reader.1.0, done);
        assert_eq!((reader.0.access(2), reader.0.quiet()), (Access::Exclusive, true));
    }

    #[test]
    fn a_block_that_comes_before_what_was_asked_for_sooner_is_refused() {
        let mut reader = Node::new(1);
        reader.step(Input::Ahead { first: 2, wanted: 1, intent: Intent::Read }).unwrap();
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        assert_eq!(reader.hear(0, given(2, &[[7], [8]])), Err("a GivenBlock nobody asked for"));
    }

    #[test]
    fn who_waits_for_a_page_not_given_waits_for_its_block() {
        let mut reader = Node::new(1);
        reader.step(Input::Ahead { first: 2, wanted: 0b11, intent: Intent::Read }).unwrap();
        reader.step(Input::Fault { page: 3, write: true }).unwrap();
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        assert_eq!(reader.hear(0, Message::Given { page: 2, wanted: 0b11, given: 1, zeros: 0, write: false, data: vec![[2]] }), Ok(vec![]));
        // The copy is taken back for somebody's write, for which home was busy when it was asked for the block.
        assert_eq!(reader.hear(0, Message::Invalidate { page: 2, requester: 2 }), Ok(vec![]));
        assert_eq!(reader.hear(0, refused(2)), Ok(vec![(2, Message::InvalidateAck { page: 2 }), (0, get(3, true))]));
    }

    #[test]
    fn after_a_refusal_who_waits_asks_as_for_any_page() {
        let mut reader = Node::new(1);
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        reader.step(Input::Fault { page: 3, write: false }).unwrap();
        assert_eq!(reader.hear(0, refused(2)), Ok(vec![(0, get(3, false))]));
        assert_eq!((&reader.2.not_given[..], reader.0.counters().blocks_refused), (&[2][..], 1));
        assert_eq!(reader.hear(2, refused(2)), Err("a GivenBlock nobody asked for"));
    }

    #[test]
    fn what_can_not_be_asked_for_whole_is_told() {
        let mut reader = Node::new(1);
        reader.step(Input::Fault { page: 1, write: false }).unwrap();
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        reader.step(Input::Ahead { first: 4, wanted: 1, intent: Intent::Read }).unwrap();
        reader.step(Input::Ahead { first: 5, wanted: 1, intent: Intent::Read }).unwrap();
        reader.hear(0, Message::Given { page: 4, wanted: 1, given: 1, zeros: 0, write: false, data: vec![[4]] }).unwrap();
        reader.hear(0, Message::Given { page: 5, wanted: 1, given: 1, zeros: 0, write: false, data: vec![[5]] }).unwrap();
        // A page under way, all of it here, the block itself under way, no block, two homes, its own, beyond the end.
        for first in [0, 4, 2, 3, 10, 12, 16, u32::MAX] {
            assert_eq!(reader.step(Input::AheadBlock { first, intent: Intent::Read }), Ok(vec![]), "{first}");
            assert_eq!(reader.2.not_given, [first]);
        }
        let short = reader.hear(0, given(2, &[[1]]));
        assert_eq!(short, Err("a GivenBlock nobody asked for"), "half of a block");
    }

    #[test]
    fn a_lost_home_ends_the_wait_for_its_blocks() {
        let mut reader = Node::new(1);
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        reader.step(Input::Fault { page: 3, write: false }).unwrap();
        reader.step(Input::Lost(0)).unwrap();
        assert_eq!((&reader.2.failed[..], reader.0.quiet()), (&[3][..], true));
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        assert_eq!(reader.2.not_given, [2]);
    }

    #[test]
    fn blocks_under_way_are_written_down_and_must_be_blocks() {
        let mut reader = Node::new(1);
        reader.step(Input::AheadBlock { first: 2, intent: Intent::Read }).unwrap();
        reader.step(Input::Fault { page: 3, write: true }).unwrap();
        reader.hear(0, Message::Invalidate { page: 2, requester: 0 }).unwrap();
        let text = serde_json::to_string(&reader.0.save()).unwrap();
        assert_eq!(Engine::restore(serde_json::from_str(&text).unwrap(), &geometry()), Ok(reader.0));
        let written = r#""blocks":{"2":{"waits":{"3":true},"early":[{"Invalidate":{"page":2,"requester":0}}]}}"#;
        assert!(text.contains(written), "{text}");
        for damaged in [
            r#""blocks":{"3":{"waits":{},"early":[]}}"#,
            r#""blocks":{"10":{"waits":{},"early":[]}}"#,
            r#""blocks":{"2":{"waits":{"4":true},"early":[]}}"#,
            r#""blocks":{"2":{"waits":{},"early":[{"Invalidate":{"page":4,"requester":0}}]}}"#,
            r#""blocks":{"2":{"waits":{},"early":[{"Freed":{"id":2}}]}}"#,
            r#""blocks":{"2":{"waits":{},"early":[{"InvalidateAck":{"page":2}}]}}"#,
            r#""blocks":{"12":{"waits":{},"early":[]}}"#,
            r#""blocks":{"90":{"waits":{},"early":[]}}"#,
        ] {
            let state: EngineState<1> = serde_json::from_str(&text.replace(written, damaged)).unwrap();
            assert_eq!(Engine::restore(state, &geometry()), Err(StateError::Shape), "{damaged}");
        }
    }
}
