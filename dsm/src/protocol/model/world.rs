//! The world the checker explores: engines, their memories, the channels between them, and guests.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::{Deref, Range};
use std::rc::Rc;

use super::super::{Access, BlockContent, Bug, Engine, Geometry, Input, Intent, Memory, Message, NodeId, Output, PageData, Patience, pte};

/// Words a page: two in the user half of a root, two in the kernel half.
pub const W: usize = 4;

/// One guest operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Plain store.
    Store(u32, usize, u64),
    /// Plain load, into the next result.
    Load(u32, usize),
    /// Atomic increment (a locked instruction: needs the page for writing).
    Increment(u32, usize),
    /// Waits until a word has a value.
    Wait(u32, usize, u64),
    /// Hardware walk of the path (entry indices from the root down): every table is touched for writing,
    /// as AMD's nested paging does. The last entry's value, or 0 if an entry on the way is not
    /// present, is the next result.
    Walk(u32, &'static [usize]),
    /// Has pages (first, end) fetched, to write or to read, without waiting.
    Prefetch(u32, u32, bool),
    /// Is expected to read pages soon.
    Expect(&'static [u32]),
    /// Its node has no room for a page.
    Evict(u32),
    /// Its node has no room for pages: the first, and the one after the last.
    EvictRun(u32, u32),
    /// Asks for pages ahead of need, to read: the first, and which from there on.
    Ahead(u32, u64),
    /// The same, to write.
    AheadToWrite(u32, u64),
    /// Asks for a whole block ahead of need.
    AheadBlock(u32),
    /// Gives a page up; the CPU is interrupted when that is done.
    Free(u32),
    /// Interrupts a CPU.
    Interrupt(usize),
    /// Waits for an interrupt.
    AwaitInterrupt,
}

/// One guest CPU.
#[derive(Clone, Debug)]
pub struct Cpu {
    pub node: usize,
    pub program: Rc<[Op]>,
    pub at: usize,
    /// Level of a walk under way and the table it has come to.
    walk: (usize, u32),
    pub results: Vec<u64>,
    pub interrupts: u32,
    /// The page whose fault it waits for.
    pub blocked: Option<u32>,
    /// Its node was lost, or the page it waited for: it does nothing any more.
    pub dead: bool,
}

impl Cpu {
    pub fn new(node: usize, program: &[Op]) -> Self {
        Cpu { node, program: program.into(), at: 0, walk: (0, 0), results: vec![], interrupts: 0, blocked: None, dead: false }
    }

    pub fn finished(&self) -> bool {
        self.dead || self.at == self.program.len()
    }
}

impl Hash for Cpu {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Node and program never change.
        (self.at, self.walk, &self.results, self.interrupts, self.blocked, self.dead).hash(state);
    }
}

/// An engine, shared by all worlds in which it is in the same state, with the hash of that.
#[derive(Clone, Debug)]
pub struct Peer {
    engine: Engine<W>,
    print: u64,
}

impl Peer {
    fn new(engine: Engine<W>) -> Self {
        Peer { print: print_of(&engine), engine }
    }
}

impl Deref for Peer {
    type Target = Engine<W>;

    fn deref(&self) -> &Engine<W> {
        &self.engine
    }
}

fn print_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A page as one node's hardware sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapped {
    pub data: PageData<W>,
    pub writable: bool,
}

/// What trying an operation came to.
#[derive(Debug, PartialEq, Eq)]
enum Tried {
    Progress,
    Fault(u32, bool),
    Interrupt(usize),
    Prefetch(u32, u32, bool),
    Expect(&'static [u32]),
    Evict(u32, u32),
    Ahead(u32, u64, Intent),
    AheadBlock(u32),
    Free(u32),
    Waiting,
}

#[derive(Clone, Debug)]
pub struct World {
    pub engines: Vec<Rc<Peer>>,
    pub memories: Vec<Vec<Option<Mapped>>>,
    /// `channels[from][to]`.
    pub channels: Vec<Vec<VecDeque<Message<W>>>>,
    /// Whole blocks go another way, on which they overtake nothing: behind how many messages of the channel each is.
    pub blocks: Vec<Vec<VecDeque<(usize, Message<W>)>>>,
    pub cpus: Vec<Cpu>,
    /// What the guest's stores, in their order, have led to; `None` if pages become replicated tables,
    /// whose copies may differ.
    latest: Option<Vec<PageData<W>>>,
    /// Nodes that may be lost: one of them is, at some step.
    mortal: Vec<usize>,
    /// The node that is lost.
    pub lost: Option<usize>,
    /// (node, page): requests that failed.
    pub failed: BTreeSet<(usize, u32)>,
}

/// While an engine takes a step, before its memory operation number `before`, CPU `cpu` of the same
/// node runs up to `operations` operations.
#[derive(Clone, Copy, Debug)]
pub struct Intrusion {
    pub before: usize,
    pub cpu: usize,
    pub operations: usize,
}

/// The memory of one node during one step of its engine.
struct View<'a> {
    pages: &'a mut Vec<Option<Mapped>>,
    latest: &'a mut Option<Vec<PageData<W>>>,
    cpus: &'a mut Vec<Cpu>,
    operation: usize,
    intrusion: Option<Intrusion>,
}

impl View<'_> {
    fn tick(&mut self) {
        if let Some(i) = self.intrusion.filter(|i| i.before == self.operation) {
            for _ in 0..i.operations {
                let cpu = &mut self.cpus[i.cpu];
                if cpu.blocked.is_some() || cpu.finished() || run(cpu, self.pages, self.latest) != Tried::Progress {
                    break;
                }
            }
        }
        self.operation += 1;
    }

    fn present(&mut self, page: u32) -> &mut Mapped {
        self.pages[page as usize].as_mut().unwrap_or_else(|| panic!("page {page} is absent"))
    }
}

impl Memory<W> for View<'_> {
    fn protect(&mut self, page: u32) {
        self.tick();
        self.present(page).writable = false;
    }
    fn unprotect(&mut self, page: u32) {
        self.tick();
        self.present(page).writable = true;
        self.wake(page);
    }
    fn read(&self, page: u32) -> Box<PageData<W>> {
        Box::new(self.pages[page as usize].unwrap_or_else(|| panic!("page {page} is absent")).data)
    }
    fn install(&mut self, page: u32, data: &PageData<W>, writable: bool) {
        self.tick();
        assert_eq!(self.pages[page as usize], None, "page {page} is present already");
        self.pages[page as usize] = Some(Mapped { data: *data, writable });
        self.wake(page);
    }
    fn install_zeros(&mut self, pages: Range<u32>) {
        for page in pages {
            self.install(page, &[0; W], true);
        }
    }
    fn discard(&mut self, page: u32) {
        self.tick();
        self.present(page);
        self.pages[page as usize] = None;
    }
    fn wake(&mut self, page: u32) {
        for cpu in self.cpus.iter_mut().filter(|c| c.blocked == Some(page)) {
            cpu.blocked = None;
        }
    }
    fn load(&self, page: u32, word: usize) -> u64 {
        self.read(page)[word]
    }
    fn compare_exchange(&mut self, page: u32, word: usize, old: u64, new: u64) -> Result<u64, u64> {
        self.tick();
        let mapped = self.present(page);
        assert!(mapped.writable, "the engine writes page {page}, which is protected");
        let now = mapped.data[word];
        if now == old {
            mapped.data[word] = new;
            Ok(old)
        } else {
            Err(now)
        }
    }
    fn differences(&self, page: u32, twin: &PageData<W>, out: &mut Vec<(u16, u64)>) {
        let now = self.read(page);
        out.extend((0..W).filter(|&i| now[i] != twin[i]).map(|i| (i as u16, now[i])));
    }
}

/// What the page holds, if it may be touched that way.
fn touch(pages: &[Option<Mapped>], page: u32, write: bool) -> Result<PageData<W>, Tried> {
    match pages[page as usize] {
        Some(m) if m.writable || !write => Ok(m.data),
        _ => Err(Tried::Fault(page, write)),
    }
}

/// Tries the next operation of `cpu` on its node's memory.
fn run(cpu: &mut Cpu, pages: &mut [Option<Mapped>], latest: &mut Option<Vec<PageData<W>>>) -> Tried {
    let op = cpu.program[cpu.at];
    let mut stored = |page: u32, word: usize, value: u64| {
        if let Some(latest) = latest {
            latest[page as usize][word] = value;
        }
    };
    let tried = (|| {
        match op {
            Op::Store(page, word, value) => {
                touch(pages, page, true)?;
                pages[page as usize].as_mut().expect("touched").data[word] = value;
                stored(page, word, value);
            }
            Op::Load(page, word) => cpu.results.push(touch(pages, page, false)?[word]),
            Op::Increment(page, word) => {
                touch(pages, page, true)?;
                let value = &mut pages[page as usize].as_mut().expect("touched").data[word];
                *value += 1;
                stored(page, word, *value);
            }
            Op::Wait(page, word, value) => {
                if touch(pages, page, false)?[word] != value {
                    return Err(Tried::Waiting);
                }
            }
            Op::Walk(root, path) => {
                let (step, table) = if cpu.walk.0 == 0 { (0, root) } else { cpu.walk };
                let entry = touch(pages, table, true)?[path[step]];
                let entry_ref = &mut pages[table as usize].as_mut().expect("touched").data[path[step]];
                let present = entry & pte::PRESENT != 0;
                if present {
                    *entry_ref |= pte::ACCESSED;
                }
                if step + 1 == path.len() || !present {
                    let complete = step + 1 == path.len();
                    cpu.results.push(if complete { entry & !(pte::ACCESSED | pte::DIRTY) } else { 0 });
                    cpu.walk = (0, 0);
                } else {
                    cpu.walk = (step + 1, (entry >> 12) as u32);
                    return Ok(false);
                }
            }
            Op::Ahead(first, wanted) => return Err(Tried::Ahead(first, wanted, Intent::Read)),
            Op::AheadToWrite(first, wanted) => return Err(Tried::Ahead(first, wanted, Intent::Write)),
            Op::AheadBlock(first) => return Err(Tried::AheadBlock(first)),
            Op::Prefetch(first, end, write) => return Err(Tried::Prefetch(first, end, write)),
            Op::Expect(pages) => return Err(Tried::Expect(pages)),
            Op::Evict(page) => return Err(Tried::Evict(page, page + 1)),
            Op::EvictRun(first, end) => return Err(Tried::Evict(first, end)),
            Op::Free(page) => return Err(Tried::Free(page)),
            Op::Interrupt(to) => return Err(Tried::Interrupt(to)),
            Op::AwaitInterrupt => {
                if cpu.interrupts == 0 {
                    return Err(Tried::Waiting);
                }
                cpu.interrupts -= 1;
            }
        }
        Ok(true)
    })();
    match tried {
        Ok(complete) => {
            cpu.at += usize::from(complete);
            Tried::Progress
        }
        Err(tried) => tried,
    }
}

/// Something that can happen next.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Cpu(usize),
    Deliver(usize, usize),
    /// A whole block comes, which what was sent later may have overtaken.
    DeliverBlock(usize, usize),
    /// A node is lost, with what is on its way to it. What it sent may still arrive, up to any point.
    Lose(usize),
    /// A node's transport finds out.
    Learn(usize),
}

impl World {
    /// `homes`: pages homed at each node. `loaded`: content of pages node 0 starts with.
    pub fn new(homes: &[u32], loaded: &[(u32, PageData<W>)], image: Range<u32>, cpus: Vec<Cpu>) -> Self {
        let pages: u32 = homes.iter().sum();
        let geometry = Geometry::new(&[(0, pages)], homes);
        let n = homes.len();
        let preloaded: Vec<_> = loaded.iter().map(|&(p, _)| p..p + 1).collect();
        let mut memories = vec![vec![None; pages as usize]; n];
        for &(page, data) in loaded {
            memories[0][page as usize] = Some(Mapped { data, writable: true });
        }
        let engines = (0..n)
            .map(|i| Engine::new(i as NodeId, geometry.clone(), &preloaded, image.clone(), true))
            .map(|engine| Rc::new(Peer::new(engine)))
            .collect();
        World {
            engines,
            memories,
            channels: vec![vec![VecDeque::new(); n]; n],
            blocks: vec![vec![VecDeque::new(); n]; n],
            cpus,
            latest: None,
            mortal: vec![],
            lost: None,
            failed: BTreeSet::new(),
        }
    }

    /// No page becomes a table: every copy anywhere must be what the last store left, always.
    pub fn only_data(mut self) -> Self {
        self.latest = Some(vec![[0; W]; self.memories[0].len()]);
        self
    }

    /// One of `nodes` will be lost, at any step.
    pub fn losing(mut self, nodes: &[usize]) -> Self {
        self.mortal = nodes.to_vec();
        self
    }

    /// Every node takes untouched pages of its own in groups and blocks of so many.
    pub fn take_zeros_by(&mut self, group: u32, block: u32) {
        self.change(|engine| engine.take_zeros_by(group, block));
    }

    /// Replicas rest after one flush without a change.
    pub fn rest_at_once(&mut self) {
        self.change(|engine| engine.rest_after(Patience { first: 1, most: 1, leave: 0 }));
    }

    /// Replicas rest as soon, and are given up at the next flush or merge.
    pub fn leave_at_once(&mut self) {
        self.change(|engine| engine.rest_after(Patience { first: 1, most: 1, leave: 1 }));
    }

    /// All replicas come to rest, on every node, and do so again after one flush without a change.
    pub fn let_tables_rest(&mut self) {
        self.rest_at_once();
        let nodes = self.engines.len();
        for node in 0..nodes {
            let to = ((node + 1) % nodes) as NodeId;
            while self.engines[node].resting() < self.engines[node].replicas() {
                self.step(node, Input::Send { to, bytes: vec![0] }, None);
                while let Some((from, to)) = (0..nodes).flat_map(|f| (0..nodes).map(move |t| (f, t))).find(|&(f, t)| !self.channels[f][t].is_empty()) {
                    self.act(Action::Deliver(from, to), None);
                }
            }
        }
        self.cpus[0].interrupts = 0;
    }

    pub fn plant(&mut self, bug: Bug) {
        self.change(|engine| engine.plant(bug));
    }

    fn change(&mut self, change: impl Fn(&mut Engine<W>)) {
        for peer in &mut self.engines {
            let mut engine = peer.engine.clone();
            change(&mut engine);
            *peer = Rc::new(Peer::new(engine));
        }
    }

    /// Tells this state from others.
    pub fn print(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.engines.iter().for_each(|peer| peer.print.hash(&mut hasher));
        (&self.memories, &self.channels, &self.blocks, &self.cpus, &self.latest, self.lost, &self.failed).hash(&mut hasher);
        hasher.finish()
    }

    /// All nodes know `page` to be in CR3 of one of their CPUs.
    pub fn set_root(&mut self, page: u32) {
        for node in 0..self.engines.len() {
            self.step(node, Input::Roots(vec![page]), None);
        }
    }

    /// The node whose engine an action may step.
    pub fn node_of(&self, action: Action) -> usize {
        match action {
            Action::Cpu(c) => self.cpus[c].node,
            Action::Deliver(_, to) | Action::DeliverBlock(_, to) => to,
            Action::Lose(node) | Action::Learn(node) => node,
        }
    }

    /// Whether this node is still there and does not know of a loss that there is.
    fn unaware(&self, node: usize) -> bool {
        self.lost.is_some_and(|lost| lost != node && self.engines[node].lost().next().is_none())
    }

    pub fn actions(&self) -> Vec<Action> {
        let cpus = (0..self.cpus.len()).filter(|&c| {
            let cpu = &self.cpus[c];
            if cpu.finished() || cpu.blocked.is_some() {
                return false;
            }
            match cpu.program[cpu.at] {
                Op::Wait(page, word, value) => self.memories[cpu.node][page as usize].is_none_or(|p| p.data[word] == value),
                Op::AwaitInterrupt => cpu.interrupts > 0,
                _ => true,
            }
        });
        let n = self.engines.len();
        let pairs = || (0..n).flat_map(|f| (0..n).map(move |t| (f, t)));
        let heads = pairs().filter(|&(f, t)| !self.channels[f][t].is_empty());
        let blocks = pairs().filter(|&(f, t)| self.blocks[f][t].front().is_some_and(|(behind, _)| *behind == 0));
        let lose = self.mortal.iter().filter(|_| self.lost.is_none());
        cpus.map(Action::Cpu)
            .chain(heads.map(|(f, t)| Action::Deliver(f, t)))
            .chain(blocks.map(|(f, t)| Action::DeliverBlock(f, t)))
            .chain(lose.map(|node| Action::Lose(*node)))
            .chain((0..n).filter(|node| self.unaware(*node)).map(Action::Learn))
            .collect()
    }

    /// Does one action. Returns how many memory operations the engine made (0 if it took no step).
    pub fn act(&mut self, action: Action, intrusion: Option<Intrusion>) -> usize {
        match action {
            Action::Cpu(c) => {
                let node = self.cpus[c].node;
                match run(&mut self.cpus[c], &mut self.memories[node], &mut self.latest) {
                    Tried::Fault(page, write) => {
                        self.cpus[c].blocked = Some(page);
                        self.step(node, Input::Fault { page, write }, intrusion)
                    }
                    Tried::Prefetch(first, end, write) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::Prefetch { pages: first..end, write }, intrusion)
                    }
                    Tried::Expect(pages) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::Expect(pages.to_vec()), intrusion)
                    }
                    Tried::Evict(first, end) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::Evict((first..end).collect()), intrusion)
                    }
                    Tried::Ahead(first, wanted, intent) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::Ahead { first, wanted, intent }, intrusion)
                    }
                    Tried::AheadBlock(first) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::AheadBlock { first, intent: Intent::Read }, intrusion)
                    }
                    Tried::Free(page) => {
                        self.cpus[c].at += 1;
                        self.step(node, Input::Free { id: c as u32, pages: page..page + 1 }, intrusion)
                    }
                    Tried::Interrupt(to) => {
                        self.cpus[c].at += 1;
                        let target = self.cpus[to].node;
                        if target == node {
                            self.cpus[to].interrupts += 1;
                            return 0;
                        }
                        self.step(node, Input::Send { to: target as NodeId, bytes: vec![to as u8] }, intrusion)
                    }
                    Tried::Progress | Tried::Waiting => 0,
                }
            }
            Action::Deliver(from, to) | Action::DeliverBlock(from, to) => {
                let message = match action {
                    Action::Deliver(..) => self.next(from, to),
                    _ => self.blocks[from][to].pop_front().map(|(_, block)| block),
                };
                let message = message.expect("a head");
                // Across the wire and back: the codec is part of what ships.
                let mut bytes = Vec::new();
                message.encode(&mut bytes);
                let message = Message::decode(&bytes).expect("our own encoding");
                self.step(to, Input::Message { from: from as NodeId, message }, intrusion)
            }
            Action::Lose(node) => {
                self.lost = Some(node);
                self.memories[node].fill(None);
                self.channels.iter_mut().for_each(|to| to[node].clear());
                self.blocks.iter_mut().for_each(|to| to[node].clear());
                self.cpus.iter_mut().filter(|cpu| cpu.node == node).for_each(|cpu| cpu.dead = true);
                0
            }
            Action::Learn(node) => {
                let lost = self.lost.expect("a loss to learn of");
                self.step(node, Input::Lost(lost as NodeId), intrusion)
            }
        }
    }

    fn step(&mut self, node: usize, input: Input<W>, intrusion: Option<Intrusion>) -> usize {
        let mut out = Output::default();
        let mut view =
            View { pages: &mut self.memories[node], latest: &mut self.latest, cpus: &mut self.cpus, operation: 0, intrusion };
        let peer = Rc::make_mut(&mut self.engines[node]);
        peer.engine.step(input, &mut view, &mut out).unwrap_or_else(|e| panic!("{e}"));
        let operations = view.operation;
        peer.engine.forget_history();
        peer.print = print_of(&peer.engine);
        for (to, message) in out.sends {
            assert_ne!(usize::from(to), node, "a message to itself left the engine");
            if self.lost != Some(usize::from(to)) {
                let channel = &mut self.channels[node][usize::from(to)];
                match message {
                    Message::GivenBlock { content: BlockContent::Pages(_), .. } => self.blocks[node][usize::from(to)].push_back((channel.len(), message)),
                    _ => channel.push_back(message),
                }
            }
        }
        for page in out.failed {
            self.failed.insert((node, page));
            self.cpus.iter_mut().filter(|c| c.node == node && c.blocked == Some(page)).for_each(|c| c.dead = true);
        }
        for lost in out.lost {
            // It is over with what that one sent.
            self.channels[usize::from(lost)][node].clear();
            self.blocks[usize::from(lost)][node].clear();
        }
        self.skip_known();
        for cpu in out.freed {
            self.cpus[cpu as usize].interrupts += 1;
        }
        for (_, bytes) in out.deliver {
            self.cpus[usize::from(bytes[0])].interrupts += 1;
        }
        operations
    }

    /// To be told of a loss again changes nothing, whenever it happens: no order of that has to be tried.
    fn skip_known(&mut self) {
        let Some(lost) = self.lost else { return };
        for to in (0..self.engines.len()).filter(|to| self.engines[*to].lost().next().is_some()).collect::<Vec<_>>() {
            for from in 0..self.channels.len() {
                while matches!(self.channels[from][to].front(), Some(Message::NodeLost { node }) if usize::from(*node) == lost) {
                    self.next(from, to);
                }
            }
        }
    }

    /// The next message of a channel.
    fn next(&mut self, from: usize, to: usize) -> Option<Message<W>> {
        for (behind, _) in &mut self.blocks[from][to] {
            *behind = behind.saturating_sub(1);
        }
        self.channels[from][to].pop_front()
    }

    /// One writer or many readers, for every page that is not a replicated table, and no replica that can be written to but
    /// is not compared, or the other way round.
    pub fn check(&self) -> Result<(), String> {
        if let Some(node) = self.engines.iter().position(|engine| !engine.tables.suspects_all()) {
            return Err(format!("node {node} doesn't suspect a replica that is no table any more"));
        }
        for page in 0..self.memories[0].len() {
            for (node, engine) in self.engines.iter().enumerate().filter(|(node, _)| self.lost != Some(*node)) {
                let writable = self.memories[node][page].is_some_and(|mapped| mapped.writable);
                let resting = engine.tables.is_resting(page as u32);
                if engine.access(page as u32) == Access::Replicated && writable == resting {
                    return Err(format!("page {page}: the replica of node {node} rests: {resting}, and is writable: {writable}"));
                }
            }
            if self.engines.iter().any(|e| e.access(page as u32) == Access::Replicated) {
                continue;
            }
            let present = self.memories.iter().filter(|m| m[page].is_some()).count();
            let writers = self.memories.iter().filter(|m| m[page].is_some_and(|p| p.writable)).count();
            if writers > 1 || (writers == 1 && present > 1) {
                return Err(format!("page {page}: {writers} writers among {present} copies"));
            }
            if let Some(latest) = &self.latest {
                if let Some(node) = self.memories.iter().position(|m| m[page].is_some_and(|p| p.data != latest[page])) {
                    return Err(format!("page {page}: node {node} has {:?}, last stored was {:?}", self.memories[node][page], latest[page]));
                }
            }
        }
        Ok(())
    }

    /// Every engine comes back from its written form as it was.
    pub fn check_saved(&self) -> Result<(), String> {
        // A planted bug is not written down: such worlds are checked for the bug alone.
        for (node, peer) in self.engines.iter().enumerate().filter(|(_, peer)| peer.bug.is_none()) {
            let engine = &peer.engine;
            let text = serde_json::to_string(&engine.save()).map_err(|e| e.to_string())?;
            let state = serde_json::from_str(&text).map_err(|e| e.to_string())?;
            let back = Engine::<W>::restore(state, engine.geometry()).map_err(|e| e.to_string())?;
            if back != *engine {
                return Err(format!("node {node} is another one after it was written down"));
            }
        }
        Ok(())
    }

    /// Nothing can happen any more: everybody must be through.
    pub fn check_end(&self) -> Result<(), String> {
        // Once a node is lost, a guest may wait in vain for what a CPU there was to do, but not for a page.
        let stuck = |c: &Cpu| !c.finished() && (self.lost.is_none() || c.blocked.is_some());
        if let Some(c) = self.cpus.iter().position(stuck) {
            return Err(format!("CPU {c} waits for ever at operation {}", self.cpus[c].at));
        }
        if let Some(node) = (0..self.engines.len()).find(|&n| self.lost != Some(n) && !self.engines[n].quiet()) {
            return Err(format!("node {node} waits for ever"));
        }
        for &(node, page) in &self.failed {
            let home = usize::from(self.engines[0].geometry().home(page));
            let kept = self.memories.iter().position(|m| m[page as usize].is_some());
            if let Some(kept) = kept.filter(|_| self.lost != Some(home)) {
                return Err(format!("node {node} was told that page {page} is lost, and node {kept} has it"));
            }
        }
        Ok(())
    }

    /// The value of a word in the newest copy.
    pub fn value(&self, page: u32, word: usize) -> u64 {
        let copies = || self.memories.iter().filter_map(|m| m[page as usize]);
        copies().find(|m| m.writable).or_else(|| copies().next()).map_or(0, |m| m.data[word])
    }
}
