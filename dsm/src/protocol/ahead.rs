//! Pages asked for before anybody touches them, by the run.
//!
//! A node that expects to read pages asks their home for all of them at once. Home gives copies of those
//! it owns itself, in one message, and refuses the rest: what another node owns, what is busy, a page
//! table, and a page that went to another writer a short while ago, if that has not passed it. A refusal changes
//! nothing anywhere. What is given is given as to a reader whose request home answers itself, so nobody says Done:
//! whatever home sends next about the page comes behind it. It is migratory no longer.
//!
//! A node that expects to write them is given those that nobody wrote, without data, and, if it is sure enough to
//! ask for them, those that home alone has, as it would be on a write request; all of them are its own.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::engine::{Access, Engine, Output, ProtocolError};
use super::memory::{Memory, PageData};
use super::message::{Intent, Message, NodeId};
use super::node_set::NodeSet;
use super::place::Place;
use super::Bug;

/// Pages that a node names in one message: bit n stands for the nth page from the first on.
pub const MOST_AHEAD: u32 = u64::BITS;

/// The pages from `first` on whose bits are set.
fn pages(first: u32, set: u64) -> impl Iterator<Item = u32> {
    (0..MOST_AHEAD).filter(move |n| set >> n & 1 != 0).map(move |n| first.saturating_add(n))
}

/// The same as runs of neighbours.
fn runs(first: u32, mut set: u64) -> impl Iterator<Item = Range<u32>> {
    std::iter::from_fn(move || {
        let start = set.trailing_zeros();
        if start == MOST_AHEAD {
            return None;
        }
        let len = (!(set >> start)).trailing_zeros().min(MOST_AHEAD - start);
        set &= !(u64::MAX >> (MOST_AHEAD - len) << start);
        Some(first + start..first + start + len)
    })
}

/// How a page was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Asked {
    /// To write.
    pub write: bool,
    /// Somebody has come for it meanwhile: to write?
    pub waits: Option<bool>,
}

impl<const W: usize> Engine<W> {
    /// As for pages somebody is going to use: asks for those of `wanted`, from page `first` on, that
    /// are not here nor under way and have the same home as the first.
    pub(super) fn ask_ahead(&mut self, first: u32, wanted: u64, intent: Intent, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        if first >= self.geometry.pages() {
            return;
        }
        let home = self.geometry.home(first);
        if self.gone.contains(home) {
            return;
        }
        if home == self.me {
            return match intent {
                // At home these come along with their neighbours.
                Intent::WriteUntouched => {}
                Intent::Read => self.fetch_ahead(first, wanted, false, memory, out),
                Intent::Write => self.fetch_ahead(first, wanted, true, memory, out),
            };
        }
        let mut asked: u64 = 0;
        for n in 0..MOST_AHEAD.min(self.geometry.pages() - first) {
            let page = first + n;
            let fits = wanted >> n & 1 != 0
                && self.access[page as usize] == Access::Invalid
                && self.geometry.home(page) == home
                && !self.pending.contains_key(&page)
                && !self.ahead.contains_key(&page)
                && !self.is_block_asked(page);
            if fits {
                asked |= 1 << n;
                self.ahead.insert(page, Asked { write: intent.writes(), waits: None });
            }
        }
        if asked != 0 {
            self.counters.prefetches += u64::from(asked.count_ones());
            self.send(home, Message::Ask { page: first, wanted: asked, intent }, memory, out);
        }
    }

    /// The same for pages whose home this is: it knows which of them cost nobody anything, and has their owners
    /// send those.
    fn fetch_ahead(&mut self, first: u32, wanted: u64, write: bool, memory: &mut impl Memory<W>, out: &mut Output<W>) {
        for page in pages(first, wanted) {
            let exists = page < self.geometry.pages() && self.geometry.home(page) == self.me;
            if !exists || self.is_pending(page) {
                continue;
            }
            let owner = match self.directory.owner_for(page, self.me) {
                Some((owner, false)) if owner != self.me => owner,
                _ => continue,
            };
            let spare = self.tables.level(page).is_none() && !self.directory.write_shared.is_written(page, self.me);
            if spare && (!write || self.directory.is_alone(page, owner, owner)) {
                self.counters.prefetches += 1;
                self.directory.write_shared.unmark(page);
                self.request(page, write, memory, out);
            }
        }
    }

    /// As home: gives what costs nobody anything.
    pub(super) fn home_ask(
        &mut self,
        from: NodeId,
        first: u32,
        wanted: u64,
        intent: Intent,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let write = intent.writes();
        let (mut held, mut zeros) = (0, 0);
        for page in pages(first, wanted) {
            if page >= self.geometry.pages() || self.geometry.home(page) != self.me {
                return Err(ProtocolError { from, what: "an Ask for a page of another home", page });
            }
            let bit = 1 << (page - first);
            if write && self.directory.is_untouched(page) {
                zeros |= bit;
            } else if self.spare(from, page, write)? && intent != Intent::WriteUntouched {
                held |= bit;
            }
        }
        // Frozen first, as every page that leaves.
        runs(first, held).for_each(|run| self.freeze(run, memory));
        let mut data = Vec::with_capacity(held.count_ones() as usize);
        for page in pages(first, held) {
            let mut words = [0; W];
            memory.read_into(page, &mut words);
            data.push(words);
            self.directory.write_shared.unmark(page);
            if !write {
                self.directory.add_sharer(page, from);
            }
        }
        if write {
            for run in runs(first, held) {
                self.access[run.start as usize..run.end as usize].fill(Access::Invalid);
                for page in run.clone() {
                    self.given.remove(&page);
                }
                memory.discard_run(run);
            }
            pages(first, held | zeros).for_each(|page| *self.directory.place(page) = Place::owned(from, NodeSet::new()));
        }
        self.counters.pages_out += data.len() as u64;
        self.send(from, Message::Given { page: first, wanted, given: held | zeros, zeros, write, data }, memory, out);
        Ok(())
    }

    /// As home: whether a page that has been written can be given to `from`, who expects to read it, or to write it.
    fn spare(&mut self, from: NodeId, page: u32, write: bool) -> Result<bool, ProtocolError> {
        let Some((owner, has_copy)) = self.directory.owner_for(page, from) else { return Ok(false) };
        if has_copy {
            return Err(ProtocolError { from, what: "an Ask for a page it has", page });
        }
        let here = matches!(self.access[page as usize], Access::Shared | Access::Exclusive);
        let alone = !write || self.directory.is_alone(page, owner, from) || self.bug == Some(Bug::GivenDespiteReaders);
        let migrates = self.directory.write_shared.is_written(page, from);
        Ok(owner == self.me && here && alone && self.tables.level(page).is_none() && !migrates)
    }

    /// Home's answer.
    pub(super) fn given_ahead(
        &mut self,
        from: NodeId,
        first: u32,
        answer: GivenPages<'_, W>,
        memory: &mut impl Memory<W>,
        out: &mut Output<W>,
    ) -> Result<(), ProtocolError> {
        let bad = |page| Err(ProtocolError { from, what: "a Given nobody asked for", page });
        let GivenPages { wanted, given, zeros, write, data } = answer;
        let held = given & !zeros;
        if given & !wanted != 0 || zeros & !given != 0 || (zeros != 0 && !write) || data.len() != held.count_ones() as usize {
            return bad(first);
        }
        let mut waiting = Vec::new();
        for page in pages(first, wanted) {
            let asked = page < self.geometry.pages() && self.geometry.home(page) == from;
            match self.ahead.remove(&page).filter(|how| asked && how.write == write) {
                Some(Asked { waits: Some(write), .. }) if given >> (page - first) & 1 == 0 => waiting.push((page, write)),
                Some(_) => {}
                None => return bad(page),
            }
        }
        let mut rest = data;
        for run in runs(first, held) {
            let (some, more) = rest.split_at(run.len());
            rest = more;
            memory.install_range(run.start, some, write);
        }
        runs(first, zeros).for_each(|run| memory.install_zeros(run));
        for run in runs(first, given) {
            self.access[run.start as usize..run.end as usize].fill(if write { Access::Exclusive } else { Access::Shared });
            out.completed.extend(run);
        }
        self.counters.pages_in += data.len() as u64;
        self.counters.zero_neighbours += u64::from(zeros.count_ones());
        self.counters.prefetches_refused += u64::from((wanted & !given).count_ones());
        // Somebody came for these meanwhile: now it is a fault like any other.
        for (page, write) in waiting {
            if !self.await_block(page, write) {
                self.request(page, write, memory, out);
            }
        }
        Ok(())
    }
}

/// What home answers to an Ask: see [`Message::Given`].
pub(super) struct GivenPages<'a, const W: usize> {
    pub wanted: u64,
    pub given: u64,
    pub zeros: u64,
    pub write: bool,
    pub data: &'a [PageData<W>],
}

#[cfg(test)]
mod tests {
    use super::super::{Geometry, Input};
    use super::*;

    #[test]
    fn runs_are_the_pages_in_order() {
        for set in [0, 1, u64::MAX, 1 << 63, 0b1011_0111, u64::MAX << 3, u64::MAX >> 9, 0xaaaa_aaaa_aaaa_aaaa] {
            let of_runs: Vec<u32> = runs(100, set).flatten().collect();
            assert_eq!(of_runs, pages(100, set).collect::<Vec<_>>(), "{set:#x}");
        }
        assert_eq!(runs(7, 0b1_0110).collect::<Vec<_>>(), [8..10, 11..12]);
    }

    /// Memory that notes what is done to it.
    #[derive(Default)]
    struct Noted(Vec<String>);

    impl Memory<1> for Noted {
        fn protect(&mut self, page: u32) {
            self.0.push(format!("protect {page}"));
        }
        fn protect_range(&mut self, pages: Range<u32>) {
            self.0.push(format!("protect {pages:?}"));
        }
        fn unprotect(&mut self, _: u32) {}
        fn read(&self, page: u32) -> Box<PageData<1>> {
            Box::new([u64::from(page)])
        }
        fn install(&mut self, page: u32, _: &PageData<1>, _: bool) {
            self.0.push(format!("install {page}"));
        }
        fn install_range(&mut self, first: u32, data: &[PageData<1>], _: bool) {
            self.0.push(format!("install {first} {data:?}"));
        }
        fn install_zeros(&mut self, pages: Range<u32>) {
            self.0.push(format!("zeros {pages:?}"));
        }
        fn discard(&mut self, page: u32) {
            self.0.push(format!("discard {page}"));
        }
        fn discard_run(&mut self, pages: Range<u32>) {
            self.0.push(format!("discard {pages:?}"));
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

    /// A node of two, with its memory; node 0 is the home of ten pages and has written the first eight.
    fn node(me: NodeId) -> (Engine<1>, Noted) {
        let geometry = Geometry::new(&[(0, 12)], &[10, 2]);
        (Engine::new(me, geometry, std::slice::from_ref(&(0..8)), 0..0, false), Noted::default())
    }

    fn step(node: &mut (Engine<1>, Noted), input: Input<1>) -> Result<Vec<Message<1>>, &'static str> {
        let mut out = Output::default();
        node.0.step(input, &mut node.1, &mut out).map_err(|error| error.what)?;
        Ok(out.sends.into_iter().map(|(_, message)| message).collect())
    }

    fn from(from: NodeId, message: Message<1>) -> Input<1> {
        Input::Message { from, message }
    }

    #[test]
    fn home_gives_what_it_owns_by_the_run_and_refuses_the_rest() {
        let mut home = node(0);
        let answer = step(&mut home, from(1, Message::Ask { page: 4, wanted: 0b11_1011, intent: Intent::Read })).unwrap();
        let data = vec![[4], [5], [7]];
        assert_eq!(answer, [Message::Given { page: 4, wanted: 0b11_1011, given: 0b1011, zeros: 0, write: false, data }], "8 and 9 nobody wrote");
        assert_eq!(home.1.0, ["protect 4..6", "protect 7..8"]);
        assert_eq!(step(&mut home, from(1, Message::Ask { page: 4, wanted: 1, intent: Intent::Read })), Err("an Ask for a page it has"));
        assert_eq!(step(&mut home, from(1, Message::Ask { page: 9, wanted: 2, intent: Intent::Read })), Err("an Ask for a page of another home"));
        assert_eq!(step(&mut home, from(1, Message::Ask { page: 11, wanted: 1 << 63, intent: Intent::Read })), Err("an Ask for a page of another home"));
    }

    #[test]
    fn who_expects_to_write_is_given_the_pages_themselves_and_zeros_without_data() {
        let (mut home, mut writer) = (node(0), node(1));
        step(&mut home, from(1, Message::Get { page: 2, write: false, table: false })).unwrap();
        home.1.0.clear();
        writer.0.access[2] = Access::Shared;
        let asked = step(&mut writer, Input::Ahead { first: 1, wanted: 0x1ff, intent: Intent::Write }).unwrap();
        assert_eq!(asked, [Message::Ask { page: 1, wanted: 0x1fd, intent: Intent::Write }]);
        let answer = step(&mut home, from(1, asked[0].clone())).unwrap();
        let data = (1..8).filter(|page| *page != 2).map(|page| [page]).collect();
        assert_eq!(answer, [Message::Given { page: 1, wanted: 0x1fd, given: 0x1fd, zeros: 0x180, write: true, data }]);
        assert_eq!(home.1.0, ["protect 1..2", "protect 3..8", "discard 1..2", "discard 3..8"]);
        assert_eq!((home.0.access(1), home.0.access(2)), (Access::Invalid, Access::Shared));
        let other = Message::Given { page: 1, wanted: 0x1fd, given: 0, zeros: 0, write: false, data: vec![] };
        assert_eq!(step(&mut (writer.0.clone(), Noted::default()), from(0, other)), Err("a Given nobody asked for"));
        assert_eq!(step(&mut writer, from(0, answer[0].clone())).unwrap(), []);
        assert_eq!(writer.1.0, ["install 1 [[1]]", "install 3 [[3], [4], [5], [6], [7]]", "zeros 8..10"]);
        assert_eq!([1, 2, 9].map(|page| writer.0.access(page)), [Access::Exclusive, Access::Shared, Access::Exclusive]);
        let sends = step(&mut home, Input::Fault { page: 9, write: false }).unwrap();
        assert!(matches!(sends[..], [Message::Fetch { page: 9, requester: 0, .. }]), "{sends:?}");
    }

    #[test]
    fn who_expects_to_write_is_not_given_what_others_read() {
        let geometry = Geometry::new(&[(0, 4)], &[4, 0, 0]);
        let mut home = (Engine::new(0, geometry, std::slice::from_ref(&(0..4)), 0..0, false), Noted::default());
        step(&mut home, from(2, Message::Get { page: 1, write: false, table: false })).unwrap();
        let answer = step(&mut home, from(1, Message::Ask { page: 0, wanted: 0b11, intent: Intent::Write })).unwrap();
        assert_eq!(answer, [Message::Given { page: 0, wanted: 0b11, given: 0b01, zeros: 0, write: true, data: vec![[0]] }]);
    }

    #[test]
    fn who_may_write_is_given_what_nobody_wrote() {
        let mut home = node(0);
        let answer = step(&mut home, from(1, Message::Ask { page: 6, wanted: 0b1111, intent: Intent::WriteUntouched })).unwrap();
        assert_eq!(answer, [Message::Given { page: 6, wanted: 0b1111, given: 0b1100, zeros: 0b1100, write: true, data: vec![] }]);
        assert_eq!((&home.1.0[..], home.0.access(6)), (&[][..], Access::Exclusive));
    }

    #[test]
    fn a_page_taken_back_for_writing_is_refused() {
        let mut home = node(0);
        step(&mut home, from(1, Message::Ask { page: 0, wanted: 0b11, intent: Intent::Read })).unwrap();
        assert_eq!(step(&mut home, Input::Fault { page: 0, write: true }).unwrap(), [Message::Invalidate { page: 0, requester: 0 }]);
        let refused = [Message::Given { page: 0, wanted: 1, given: 0, zeros: 0, write: false, data: vec![] }];
        assert_eq!(step(&mut home, from(1, Message::Ask { page: 0, wanted: 1, intent: Intent::Read })).unwrap(), refused, "it is busy");
        step(&mut home, from(1, Message::InvalidateAck { page: 0 })).unwrap();
        assert_eq!(step(&mut home, from(1, Message::Ask { page: 0, wanted: 1, intent: Intent::Read })).unwrap(), refused, "its owner writes it");
        let get = Message::Get { page: 0, write: false, table: false };
        assert!(matches!(step(&mut home, from(1, get)).unwrap()[..], [Message::Data { page: 0, write: false, .. }]), "who needs it gets it");
    }

    #[test]
    fn what_comes_is_installed_by_the_run_and_who_came_for_the_rest_asks_again() {
        let mut reader = node(1);
        let asked = step(&mut reader, Input::Ahead { first: 2, wanted: u64::MAX, intent: Intent::Read }).unwrap();
        assert_eq!(asked, [Message::Ask { page: 2, wanted: 0xff, intent: Intent::Read }], "to the end of what this home has");
        assert_eq!(step(&mut reader, Input::Ahead { first: 2, wanted: u64::MAX, intent: Intent::Read }).unwrap(), [], "it is under way");
        assert_eq!(step(&mut reader, Input::Fault { page: 5, write: false }).unwrap(), []);
        assert!(reader.0.is_pending(5) && !reader.0.quiet());
        let given = |given, data| Message::Given { page: 2, wanted: 0xff, given, zeros: 0, write: false, data };
        assert_eq!(step(&mut (reader.0.clone(), Noted::default()), from(0, given(0x100, vec![[1]]))), Err("a Given nobody asked for"));
        assert_eq!(step(&mut (reader.0.clone(), Noted::default()), from(0, given(0b11, vec![[1]]))), Err("a Given nobody asked for"));
        let answers = step(&mut reader, from(0, given(0b1011_0011, vec![[2], [3], [6], [7], [9]]))).unwrap();
        assert_eq!(answers, [Message::Get { page: 5, write: false, table: false }]);
        assert_eq!(reader.1.0, ["install 2 [[2], [3]]", "install 6 [[6], [7]]", "install 9 [[9]]"]);
        assert_eq!((reader.0.access(3), reader.0.access(4)), (Access::Shared, Access::Invalid));
        assert_eq!(step(&mut reader, from(0, given(0, vec![]))), Err("a Given nobody asked for"));
    }

    #[test]
    fn a_lost_home_ends_what_was_asked_for() {
        let mut reader = node(1);
        step(&mut reader, Input::Ahead { first: 0, wanted: 0b111, intent: Intent::Read }).unwrap();
        step(&mut reader, Input::Fault { page: 1, write: false }).unwrap();
        let mut out = Output::default();
        reader.0.step(Input::Lost(0), &mut reader.1, &mut out).unwrap();
        assert_eq!((out.failed, reader.0.quiet()), (vec![1], true));
        assert_eq!(step(&mut reader, Input::Ahead { first: 0, wanted: 0b111, intent: Intent::Read }).unwrap(), []);
    }
}
