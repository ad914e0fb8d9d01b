//! Many nodes in one thread: the engines that ship, their memories, channels with random delays, guests.
//!
//! Events happen one after the other, so there is one order of all loads and stores: a load has to return
//! what the last store before it left, whichever node that ran on. That is more than sequential
//! consistency asks for, and what one writer or many readers give.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::ops::Range;

use fastrand::Rng;
use krg_dsm::protocol::{BlockContent, Bug, Engine, Geometry, Input, Intent, Memory, Message, NodeId, Output, PageData};

/// Words a page.
pub const W: usize = 2;

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    pub nodes: usize,
    /// Pages homed at each node.
    pub pages: u32,
    /// CPUs of each node.
    pub cpus: usize,
    /// Operations of each CPU.
    pub operations: u32,
    /// Per cent of operations that store.
    pub stores: u8,
    /// Nodes that are lost.
    pub losses: usize,
    /// Untouched pages taken at once.
    pub zero_group: u32,
    /// Untouched blocks taken whole.
    pub zero_block: u32,
    pub bug: Option<Bug>,
    pub seed: u64,
    /// Tell every event.
    pub told: bool,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub faults: u64,
    pub messages: u64,
    pub bytes: u64,
    /// Longest chain of messages, each sent because of the one before, from a fault to its end.
    pub chain: u32,
    /// Messages with page data.
    pub data: u64,
    /// Bytes of the longest message.
    pub longest: usize,
    /// Most invalidations sent by one node in one step.
    pub burst: usize,
    pub directory_bytes: usize,
    /// Blocks that went whole from one node to another.
    pub blocks: u64,
    pub failed: usize,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Load(u32, usize),
    Store(u32, usize),
    Prefetch(u32, u32, bool),
    Expect([u32; 3]),
    Evict(u32),
    Ahead(u32, u64, Intent),
    Block(u32, Intent),
    Send(usize),
}

struct Cpu {
    node: usize,
    left: u32,
    op: Option<Op>,
    blocked: Option<u32>,
}

#[derive(Debug)]
enum Event {
    Run(usize),
    Arrive { from: usize, to: usize, bytes: Vec<u8>, fault: Option<(usize, u32)>, depth: u32 },
    Lose(usize),
    Learn { node: usize, lost: usize },
}

#[derive(Clone, Copy)]
struct Mapped {
    data: PageData<W>,
    writable: bool,
}

/// The pages of the whole machine as nobody but the simulator sees them.
struct Truth {
    latest: Vec<PageData<W>>,
    /// Copies of each page, and writable ones.
    copies: Vec<(u32, u32)>,
    stored: u64,
}

impl Truth {
    fn store(&mut self, page: u32, word: usize, mapped: &mut Mapped) {
        self.stored += 1;
        mapped.data[word] = self.stored;
        self.latest[page as usize][word] = self.stored;
    }

    fn map(&mut self, page: u32, writable: bool) {
        let (copies, writers) = &mut self.copies[page as usize];
        *copies += 1;
        *writers += u32::from(writable);
        assert!(*writers == 0 || *copies == 1, "page {page}: {writers} writers among {copies} copies");
    }

    fn unmap(&mut self, page: u32, mapped: Mapped) {
        let (copies, writers) = &mut self.copies[page as usize];
        *copies -= 1;
        *writers -= u32::from(mapped.writable);
    }
}

/// The memory of one node during one step of its engine.
struct View<'a> {
    pages: &'a mut BTreeMap<u32, Mapped>,
    truth: &'a mut Truth,
    rng: &'a mut Rng,
    /// CPUs of this node store while the engine works.
    stores: bool,
    woken: Vec<u32>,
}

impl View<'_> {
    fn present(&self, page: u32) -> &Mapped {
        self.pages.get(&page).unwrap_or_else(|| panic!("page {page} is absent"))
    }
}

impl Memory<W> for View<'_> {
    fn protect(&mut self, page: u32) {
        let mapped = self.pages.get_mut(&page).unwrap_or_else(|| panic!("page {page} is absent"));
        // A CPU of this node is faster.
        if mapped.writable && self.stores && self.rng.u8(..4) == 0 {
            self.truth.store(page, self.rng.usize(..W), mapped);
        }
        self.truth.copies[page as usize].1 -= u32::from(mapped.writable);
        mapped.writable = false;
    }
    fn unprotect(&mut self, page: u32) {
        let mapped = *self.present(page);
        self.truth.unmap(page, mapped);
        self.truth.map(page, true);
        self.pages.insert(page, Mapped { writable: true, ..mapped });
        self.wake(page);
    }
    fn read(&self, page: u32) -> Box<PageData<W>> {
        Box::new(self.present(page).data)
    }
    fn install(&mut self, page: u32, data: &PageData<W>, writable: bool) {
        let there = self.pages.insert(page, Mapped { data: *data, writable });
        assert!(there.is_none(), "page {page} is present already");
        self.truth.map(page, writable);
        self.wake(page);
    }
    fn install_zeros(&mut self, pages: Range<u32>) {
        pages.for_each(|page| self.install(page, &[0; W], true));
    }
    fn discard(&mut self, page: u32) {
        let mapped = self.pages.remove(&page).unwrap_or_else(|| panic!("page {page} is absent"));
        self.truth.unmap(page, mapped);
    }
    fn wake(&mut self, page: u32) {
        self.woken.push(page);
    }
    fn load(&self, page: u32, word: usize) -> u64 {
        self.present(page).data[word]
    }
    fn compare_exchange(&mut self, page: u32, _: usize, _: u64, _: u64) -> Result<u64, u64> {
        panic!("the engine writes page {page}, which is no table")
    }
    fn differences(&self, _: u32, _: &PageData<W>, _: &mut Vec<(u16, u64)>) {}
}

/// Whose fault a message on its way belongs to: (requester, page).
fn fault_of(from: usize, to: usize, message: &Message<W>) -> Option<(usize, u32)> {
    match *message {
        Message::Get { page, .. } | Message::Retry { page, .. } => Some((from, page)),
        Message::Fetch { page, requester, .. } | Message::Invalidate { page, requester } => Some((requester.into(), page)),
        Message::Data { page, .. } | Message::Grant { page, .. } | Message::InvalidateAck { page } => Some((to, page)),
        _ => None,
    }
}

pub struct World {
    plan: Plan,
    rng: Rng,
    engines: Vec<Engine<W>>,
    memories: Vec<BTreeMap<u32, Mapped>>,
    truth: Truth,
    cpus: Vec<Cpu>,
    now: u64,
    /// By time, then in the order they were made.
    events: BinaryHeap<Reverse<(u64, u64)>>,
    what: HashMap<u64, Event>,
    made: u64,
    /// When the last message from one node to another arrives; whole blocks go another way, on which they overtake
    /// nothing.
    channels: HashMap<(usize, usize, bool), u64>,
    lost: BTreeSet<usize>,
    failed: BTreeSet<(usize, u32)>,
    /// Machine messages: sent and received of every pair.
    sent: HashMap<(usize, usize), (u64, u64)>,
    /// Depth of the deepest message of a fault that has come to a node.
    depths: HashMap<(usize, u32), BTreeMap<usize, u32>>,
    out: Output<W>,
    pub figures: Figures,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let pages = plan.pages * plan.nodes as u32;
        let geometry = Geometry::new(&[(0, pages)], &vec![plan.pages; plan.nodes]);
        let engines = (0..plan.nodes).map(|node| {
            let mut engine = Engine::new(node as NodeId, geometry.clone(), &[], 0..0, true);
            engine.take_zeros_by(plan.zero_group, plan.zero_block);
            if let Some(bug) = plan.bug {
                engine.plant(bug);
            }
            engine
        });
        let cpus = (0..plan.nodes * plan.cpus)
            .map(|cpu| Cpu { node: cpu / plan.cpus, left: plan.operations, op: None, blocked: None });
        let mut world = World {
            engines: engines.collect(),
            memories: vec![BTreeMap::new(); plan.nodes],
            truth: Truth { latest: vec![[0; W]; pages as usize], copies: vec![(0, 0); pages as usize], stored: 0 },
            cpus: cpus.collect(),
            now: 0,
            events: BinaryHeap::new(),
            what: HashMap::new(),
            made: 0,
            channels: HashMap::new(),
            lost: BTreeSet::new(),
            failed: BTreeSet::new(),
            sent: HashMap::new(),
            depths: HashMap::new(),
            out: Output::default(),
            figures: Figures::default(),
            rng: Rng::with_seed(plan.seed),
            plan,
        };
        for cpu in 0..world.cpus.len() {
            let start = world.rng.u64(..100);
            world.at(start, Event::Run(cpu));
        }
        for _ in 0..world.plan.losses {
            let (when, node) = (world.rng.u64(..4000), world.rng.usize(..world.plan.nodes));
            world.at(when, Event::Lose(node));
        }
        world
    }

    fn at(&mut self, when: u64, event: Event) {
        self.made += 1;
        self.events.push(Reverse((when, self.made)));
        self.what.insert(self.made, event);
    }

    /// Until nothing can happen any more; then everybody must be through.
    pub fn run(&mut self) {
        self.settle();
        for (number, cpu) in self.cpus.iter().enumerate().filter(|(_, cpu)| !self.lost.contains(&cpu.node)) {
            assert_eq!(cpu.blocked, None, "CPU {number} waits for ever for a page");
            assert_eq!(cpu.left, 0, "CPU {number} has not come to its end");
        }
        for node in self.living() {
            assert!(self.engines[node].quiet(), "node {node} waits for ever");
        }
        for &(node, page) in &self.failed {
            let home = usize::from(self.engines[0].geometry().home(page));
            let kept = self.memories.iter().position(|memory| memory.contains_key(&page));
            assert!(kept.is_none() || self.lost.contains(&home), "node {node} was told that page {page} is lost, {kept:?} has it");
        }
        self.figures.failed = self.failed.len();
        for node in self.living() {
            let count = self.engines[node].counters();
            self.figures.faults += count.read_faults + count.write_faults + count.upgrade_faults;
            self.figures.blocks += count.blocks_in;
            self.figures.directory_bytes += self.engines[node].directory_bytes();
        }
    }

    /// Until nothing can happen any more.
    pub fn settle(&mut self) {
        while let Some(Reverse((when, number))) = self.events.pop() {
            self.now = when;
            let event = self.what.remove(&number).expect("an event to every number");
            self.happen(event);
        }
    }

    fn living(&self) -> Vec<usize> {
        (0..self.plan.nodes).filter(|node| !self.lost.contains(node)).collect()
    }

    fn happen(&mut self, event: Event) {
        if self.plan.told {
            match &event {
                Event::Arrive { from, to, bytes, .. } => {
                    println!("{} {from} to {to}: {:?}", self.now, Message::<W>::decode(bytes));
                }
                Event::Run(cpu) => println!("{} CPU {cpu} of node {}", self.now, self.cpus[*cpu].node),
                other => println!("{} {other:?}", self.now),
            }
        }
        match event {
            Event::Run(cpu) => self.operate(cpu),
            Event::Arrive { from, to, bytes, fault, depth } => {
                if self.lost.contains(&to) {
                    return;
                }
                let message = Message::decode(&bytes).expect("our own encoding");
                if let Some(fault) = fault {
                    let deepest = self.depths.entry(fault).or_default().entry(to).or_default();
                    *deepest = depth.max(*deepest);
                }
                self.step(to, Input::Message { from: from as NodeId, message });
            }
            Event::Lose(node) => {
                // At least one is left.
                if self.lost.len() + 1 == self.plan.nodes || !self.lost.insert(node) {
                    return;
                }
                for (page, mapped) in std::mem::take(&mut self.memories[node]) {
                    self.truth.unmap(page, mapped);
                }
                for other in self.living() {
                    let when = self.now + self.rng.u64(..600);
                    self.at(when, Event::Learn { node: other, lost: node });
                }
            }
            Event::Learn { node, lost } => {
                if !self.lost.contains(&node) {
                    self.step(node, Input::Lost(lost as NodeId));
                }
            }
        }
    }

    /// Most of what a node touches is its own or its neighbours'; some is anybody's, a little everybody's.
    fn some_page(&mut self, node: usize) -> u32 {
        let home = match self.rng.u8(..100) {
            0..45 => node,
            45..75 => (node / 4 * 4 + self.rng.usize(..4)).min(self.plan.nodes - 1),
            75..97 => self.rng.usize(..self.plan.nodes),
            _ => 0,
        };
        home as u32 * self.plan.pages + self.rng.u32(..self.plan.pages)
    }

    fn some_intent(&mut self) -> Intent {
        [Intent::Read, Intent::WriteUntouched, Intent::Write][self.rng.usize(..3)]
    }

    fn some_op(&mut self, node: usize) -> Op {
        let (page, word) = (self.some_page(node), self.rng.usize(..W));
        match self.rng.u8(..100) {
            kind if kind < self.plan.stores => Op::Store(page, word),
            92..96 => Op::Evict(page),
            80..82 => Op::Expect([(); 3].map(|()| self.some_page(node))),
            82..86 => Op::Ahead(page, self.rng.u64(..1 << 6), self.some_intent()),
            86..92 => Op::Block(page - page % self.plan.zero_block, self.some_intent()),
            96..98 => {
                let end = (page + self.rng.u32(1..5)).min(self.plan.pages * self.plan.nodes as u32);
                Op::Prefetch(page, end, self.rng.bool())
            }
            98.. => Op::Send(self.rng.usize(..self.plan.nodes)),
            _ => Op::Load(page, word),
        }
    }

    fn operate(&mut self, number: usize) {
        let node = self.cpus[number].node;
        if self.lost.contains(&node) || self.cpus[number].left == 0 || self.cpus[number].blocked.is_some() {
            return;
        }
        let op = self.cpus[number].op.take().unwrap_or_else(|| self.some_op(node));
        let touched = match op {
            Op::Load(page, word) => {
                let mapped = self.memories[node].get(&page);
                if let Some(mapped) = mapped {
                    let (is, last) = (mapped.data[word], self.truth.latest[page as usize][word]);
                    assert_eq!(is, last, "node {node} loads word {word} of page {page}, and not what was stored last");
                }
                if mapped.is_some() { Ok(()) } else { Err((page, false)) }
            }
            Op::Store(page, word) => match self.memories[node].get_mut(&page).filter(|mapped| mapped.writable) {
                Some(mapped) => {
                    self.truth.store(page, word, mapped);
                    Ok(())
                }
                None => Err((page, true)),
            },
            Op::Prefetch(page, end, write) => {
                self.step(node, Input::Prefetch { pages: page..end, write });
                Ok(())
            }
            Op::Expect(pages) => {
                self.step(node, Input::Expect(pages.to_vec()));
                Ok(())
            }
            Op::Evict(page) => {
                let end = (page + self.rng.u32(1..5)).min(self.plan.pages * self.plan.nodes as u32);
                self.step(node, Input::Evict((page..end).collect()));
                Ok(())
            }
            Op::Ahead(first, wanted, intent) => {
                self.step(node, Input::Ahead { first, wanted, intent });
                Ok(())
            }
            Op::Block(first, intent) => {
                self.step(node, Input::AheadBlock { first, intent });
                Ok(())
            }
            Op::Send(to) => {
                if to != node {
                    let (sent, _) = self.sent.entry((node, to)).or_default();
                    *sent += 1;
                    let bytes = sent.to_le_bytes().to_vec();
                    self.step(node, Input::Send { to: to as NodeId, bytes });
                }
                Ok(())
            }
        };
        match touched {
            Ok(()) => {
                self.cpus[number].left -= 1;
                let when = self.now + self.rng.u64(..30);
                self.at(when, Event::Run(number));
            }
            Err((page, write)) => {
                self.cpus[number].op = Some(op);
                self.cpus[number].blocked = Some(page);
                self.step(node, Input::Fault { page, write });
            }
        }
    }

    /// One step of one engine and all that follows from it.
    pub fn step(&mut self, node: usize, input: Input<W>) {
        let mut view = View {
            pages: &mut self.memories[node],
            truth: &mut self.truth,
            rng: &mut self.rng,
            stores: self.plan.stores > 0,
            woken: Vec::new(),
        };
        let mut out = std::mem::take(&mut self.out);
        if let Err(error) = self.engines[node].step(input, &mut view, &mut out) {
            panic!("{error}");
        }
        let woken = view.woken;
        let dropped = |(_, message): &(NodeId, Message<W>)| match message {
            Message::Invalidate { .. } => 1,
            Message::InvalidateRun { count, .. } => *count as usize,
            _ => 0,
        };
        let invalidates = out.sends.iter().map(dropped).sum();
        self.figures.burst = self.figures.burst.max(invalidates);
        for (to, message) in out.sends.drain(..) {
            self.post(node, to.into(), message);
        }
        for (from, bytes) in out.deliver.drain(..) {
            let (_, received) = self.sent.entry((from.into(), node)).or_default();
            *received += 1;
            assert_eq!(bytes, received.to_le_bytes(), "machine messages from {from} to {node} out of order");
        }
        for page in out.completed.drain(..) {
            if let Some(depths) = self.depths.remove(&(node, page)) {
                self.figures.chain = self.figures.chain.max(depths.get(&node).copied().unwrap_or(0));
            }
        }
        let failed = std::mem::take(&mut out.failed);
        out.lost.clear();
        out.not_given.clear();
        self.out = out;
        for &page in &failed {
            self.depths.remove(&(node, page));
            self.failed.insert((node, page));
        }
        let cpus = node * self.plan.cpus..(node + 1) * self.plan.cpus;
        for number in cpus {
            let Some(page) = self.cpus[number].blocked else { continue };
            let gone = failed.contains(&page);
            if gone || woken.contains(&page) {
                self.cpus[number].blocked = None;
                if gone {
                    // It does without.
                    self.cpus[number].op = None;
                    self.cpus[number].left -= 1;
                }
                let when = self.now + self.rng.u64(..3);
                self.at(when, Event::Run(number));
            }
        }
    }

    fn post(&mut self, from: usize, to: usize, message: Message<W>) {
        // What an eviction sends belongs to no fault.
        let waits = |(requester, page): &(usize, u32)| self.engines[*requester].is_pending(*page);
        let fault = fault_of(from, to, &message).filter(waits);
        let depth = fault
            .and_then(|fault| self.depths.get(&fault))
            .and_then(|depths| depths.get(&from))
            .map_or(1, |depth| depth + 1);
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        if !matches!(message, Message::Machine(_)) {
            self.figures.messages += 1;
            self.figures.bytes += bytes.len() as u64;
            self.figures.data += u64::from(matches!(message, Message::Data { .. }));
            self.figures.longest = self.figures.longest.max(bytes.len());
        }
        // Mostly near, now and then late.
        let delay = if self.rng.u8(..16) == 0 { self.rng.u64(5..1000) } else { self.rng.u64(5..80) };
        let is_block = matches!(message, Message::GivenBlock { content: BlockContent::Pages(_), .. });
        let last = |block: bool| self.channels.get(&(from, to, block)).copied().unwrap_or_default();
        let when = (self.now + delay).max(last(false)).max(if is_block { last(true) } else { 0 });
        self.channels.insert((from, to, is_block), when);
        self.at(when, Event::Arrive { from, to, bytes, fault, depth });
    }
}
