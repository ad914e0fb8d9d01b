//! Peers that send anything at any time: every byte string is parsed, and what parses goes to an engine
//! among faults of its own guest. It may refuse, which ends the machine; it may not panic, nor ask its
//! memory for what the state of a page does not allow.

#![no_main]

use std::ops::Range;

use krg_dsm::protocol::{Engine, Geometry, Input, Intent, Memory, Message, NodeId, Output, PageData, Patience};
use libfuzzer_sys::fuzz_target;

/// Words a page: two in the user half of a root, two in the kernel half.
const W: usize = 4;
const NODES: usize = 3;
const PAGES: u32 = 12;

/// Guest memory that insists on the states `Memory` asks for.
struct Strict(Vec<Option<(PageData<W>, bool)>>);

impl Strict {
    fn present(&self, page: u32) -> &(PageData<W>, bool) {
        self.0[page as usize].as_ref().expect("a page that is absent")
    }

    fn present_mut(&mut self, page: u32) -> &mut (PageData<W>, bool) {
        self.0[page as usize].as_mut().expect("a page that is absent")
    }
}

impl Memory<W> for Strict {
    fn protect(&mut self, page: u32) {
        self.present_mut(page).1 = false;
    }
    fn unprotect(&mut self, page: u32) {
        self.present_mut(page).1 = true;
    }
    fn read(&self, page: u32) -> Box<PageData<W>> {
        Box::new(self.present(page).0)
    }
    fn install(&mut self, page: u32, data: &PageData<W>, writable: bool) {
        let there = self.0[page as usize].replace((*data, writable));
        assert!(there.is_none(), "page {page} is present already");
    }
    fn install_zeros(&mut self, pages: Range<u32>) {
        pages.for_each(|page| self.install(page, &[0; W], true));
    }
    fn discard(&mut self, page: u32) {
        self.present(page);
        self.0[page as usize] = None;
    }
    fn wake(&mut self, page: u32) {
        assert!(page < PAGES);
    }
    fn load(&self, page: u32, word: usize) -> u64 {
        self.present(page).0[word]
    }
    fn compare_exchange(&mut self, page: u32, word: usize, old: u64, new: u64) -> Result<u64, u64> {
        let (data, writable) = self.present_mut(page);
        assert!(*writable, "page {page} is protected");
        let now = data[word];
        if now == old {
            data[word] = new;
            return Ok(old);
        }
        Err(now)
    }
    fn differences(&self, page: u32, twin: &PageData<W>, out: &mut Vec<(u16, u64)>) {
        let now = self.present(page).0;
        out.extend((0..W).filter(|&i| now[i] != twin[i]).map(|i| (i as u16, now[i])));
    }
}

fuzz_target!(|data: &[u8]| {
    let [me, group, rest @ ..] = data else { return };
    let mut rest = rest;
    let geometry = Geometry::new(&[(0, 8), (0x100, 4)], &[4, 4, 4]);
    let me = NodeId::from(*me) % NODES as NodeId;
    let mut engine = Engine::<W>::new(me, geometry.clone(), &[0..3, 5..6], 0..2, true);
    engine.take_zeros_by(1 << (group % 4), 1 << (group >> 2 & 3));
    engine.rest_after(Patience { first: u32::from(group >> 4 & 3), most: 2, leave: u32::from(group >> 6) });
    let mut memory = Strict(vec![None; PAGES as usize]);
    for page in [0, 1, 2, 5].into_iter().filter(|_| me == 0) {
        memory.0[page] = Some(([0; W], true));
    }
    let mut out = Output::default();
    let mut requests = 0;
    // A kind and a length, then so many bytes.
    while let [kind, len, more @ ..] = rest {
        let (body, next) = more.split_at(usize::from(*len).min(more.len()));
        rest = next;
        let first = body.first().copied().unwrap_or(0);
        let input = match kind % 8 {
            0 => Input::Fault { page: u32::from(first) % PAGES, write: kind & 8 != 0 },
            1 => {
                let page = u32::from(first) % PAGES;
                let pages = page..(page + 3).min(PAGES);
                match body.get(1) {
                    Some(1) => Input::Evict(pages.collect()),
                    Some(2) => {
                        requests += 1;
                        Input::Free { id: requests, pages }
                    }
                    Some(3) => Input::AheadBlock { first: page, intent: if kind & 8 != 0 { Intent::WriteUntouched } else { Intent::Read } },
                    Some(5) => Input::Ahead { first: page, wanted: 0b111, intent: if kind & 8 != 0 { Intent::Write } else { Intent::Read } },
                    Some(4) => Input::KeepBlock { to: (me + 1) % NODES as NodeId, first: page },
                    _ => Input::Prefetch { pages, write: kind & 8 != 0 },
                }
            }
            2 => Input::Roots(body.iter().map(|page| u32::from(*page) % PAGES).collect()),
            3 => {
                let to = NodeId::from(first) % NODES as NodeId;
                if to == me {
                    continue;
                }
                Input::Send { to, bytes: body.to_vec() }
            }
            // The transport tells of a loss.
            4 if kind & 128 != 0 && first & 1 != 0 => Input::Lost(NodeId::from(first >> 1) % NODES as NodeId),
            4 => {
                // The guest writes where it may.
                let page = usize::from(first) % PAGES as usize;
                if let (Some((words, true)), Some(bytes)) = (&mut memory.0[page], body.get(1..9)) {
                    words[usize::from(kind >> 3) % W] = u64::from_le_bytes(bytes.try_into().expect("eight"));
                }
                continue;
            }
            _ => {
                let Ok(message) = Message::<W>::decode(body) else { continue };
                let mut again = Vec::new();
                message.encode(&mut again);
                assert_eq!(Message::<W>::decode(&again).as_ref(), Ok(&message));
                let from = NodeId::from(kind >> 3) % NODES as NodeId;
                if from == me {
                    continue;
                }
                Input::Message { from, message }
            }
        };
        if engine.step(input, &mut memory, &mut out).is_err() {
            return;
        }
        out = Output::default();
    }
    assert_eq!(Engine::restore(engine.save(), &geometry), Ok(engine));
});
