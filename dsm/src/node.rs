//! The shared memory of one node at work: protocol, guest memory and transport joined.
//!
//! One thread per userfaultfd takes faults to the engine, the transport's receivers take messages to
//! it. The engine is under one lock; what it wants sent is handed to the transport before the lock
//! is released, so the order of messages is the order of the engine's steps. Machine messages are
//! delivered after that, outside the lock.

mod ahead;
mod cache;
mod upkeep;

use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ahead::{Asks, Landings, MOST_BLOCKS};
use cache::Cache;
pub use cache::Copies;

use crate::contention::{Contention, FetchedPage, HotPage};
use crate::followers::{FollowerCounters, Followers};
use crate::lending::{Lending, LendingCounters};
use crate::memory::{BLOCK_PAGES, BlockCounters, FaultSource, FaultStop, GuestRam, MemoryError, PAGE_WORDS, UffdMemory};
use crate::prefetch::{Accuracy, Predictor};
use crate::protocol::{Access, BlockContent, Bug, Counters, Engine, Geometry, Input, Malformed, Message, NodeId, Output, Patience, ProtocolError};
use crate::stalls::{Part, Stalls, ThreadStalls, Waited};
use crate::trace::{Mark, Stage, Trace};
use crate::transport::{Handler, PeerCount, PeerEvent, SendError, Transport};

/// Frame class of protocol messages; machine messages, which the protocol orders, are among them.
pub const PROTOCOL: u8 = 1;
/// Frame class of messages outside the protocol's order (set-up, clocks).
pub const SETUP: u8 = 2;
/// Frame class of pieces of whole blocks, and of their places in the protocol's order (a piece of no bytes).
pub const BLOCK: u8 = 3;

/// Roots are asked for again after this long at the earliest.
const ROOTS_INTERVAL: Duration = Duration::from_millis(1);

/// Pages a node takes at once of what nobody wrote at home, where it can't have the whole block: 128 KiB.
/// Filling them costs about what one fault does; sixteen would bring the most of it.
const ZERO_GROUP: u32 = 32;

/// When replicas of page tables rest. Comparing one costs 0.11 us, protecting it and the fault that ends that some hundred
/// times as much.
pub const TABLES_REST: Patience = Patience { first: 256, most: 1 << 16, leave: 4096 };

/// Longest wait of a fault for room among the copies: what can't be evicted must not stop the guest.
const ROOM_PATIENCE: Duration = Duration::from_secs(1);

/// Pages asked for in one step, with the engine locked.
const PREFETCH_AT_ONCE: u32 = 64;

/// Why the shared memory can't go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DsmError {
    /// The peer is gone, or not a peer.
    #[error("{0}")]
    Peer(PeerEvent),
    /// A peer sent what is not a message.
    #[error("node {from}: {reason}; its version may differ from ours")]
    Malformed {
        /// The peer.
        from: usize,
        /// What was wrong.
        reason: Malformed,
    },
    /// A peer broke the protocol.
    #[error("{0}")]
    Protocol(ProtocolError),
    /// This host's memory refused an operation.
    #[error("{0}")]
    Memory(MemoryError),
    /// A thread could not be started.
    #[error("shared memory: starting a thread failed: {0}; raise the limit of processes")]
    Thread(String),
}

/// What the shared memory calls on.
pub trait Client: Send + Sync {
    /// A machine message from node `from`, in the order it was sent.
    fn machine(&self, from: usize, bytes: &[u8]);
    /// A message outside the protocol's order.
    fn setup(&self, from: usize, bytes: &[u8]);
    /// Page frame numbers of the page-table roots of the vCPUs that run here, as last seen; has them
    /// looked at again soon.
    fn roots(&self) -> Vec<u64>;
    /// The machine can't go on. Called once.
    fn failed(&self, error: DsmError);
}

/// Replicas of page tables at a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replicas {
    /// All of them.
    pub held: usize,
    /// Those that nobody here walked or wrote lately, which flushes don't compare.
    pub resting: usize,
}

/// What a node starts with; the same on all nodes but for `me`.
#[derive(Clone, Debug)]
pub struct Start {
    /// This node.
    pub me: usize,
    /// Bytes of RAM whose home is each node, in guest-physical order.
    pub shares: Vec<u64>,
    /// Page ranges node 0 has written.
    pub preloaded: Vec<Range<u32>>,
    /// Pages the kernel image was loaded to.
    pub image: Range<u32>,
    /// Replicate page tables.
    pub replicate: bool,
    /// When their replicas rest.
    pub tables_rest: Patience,
    /// How long no other node must have asked for a page of a block before it is private again.
    pub merge_after: Duration,
    /// Bytes of copies of other nodes' pages that there may be here.
    pub cache: u64,
    /// A protocol bug to plant, for tests.
    pub bug: Option<Bug>,
}

struct State {
    engine: Engine<PAGE_WORDS>,
    memory: UffdMemory,
    cache: Cache,
    out: Output<PAGE_WORDS>,
    encoded: Vec<Vec<u8>>,
    roots_asked: Instant,
    contention: Contention,
    begun: Instant,
    /// Numbers of requests to give pages up: the next one, and those that are complete.
    next_free: u32,
    freed: Vec<u32>,
    stalls: Stalls,
    /// Streams that read, and streams that write.
    readers: Predictor,
    writers: Predictor,
    followers: Followers,
    /// What streams have still to ask for.
    asks: Asks,
    lending: Lending,
}

/// The shared memory of one node.
pub struct Dsm {
    me: usize,
    ram: Arc<GuestRam>,
    transport: Arc<dyn Transport>,
    client: OnceLock<Arc<dyn Client>>,
    /// `None` until [`Dsm::start`], and again after [`Dsm::stop`].
    state: Mutex<Option<State>>,
    started: Condvar,
    stopping: AtomicBool,
    failed: AtomicBool,
    threads: Mutex<Vec<(FaultStop, JoinHandle<()>)>>,
    trace: Trace,
    /// Threads of [`upkeep`].
    upkeep: Mutex<Vec<JoinHandle<()>>>,
    /// There are more copies than there may be.
    full: Condvar,
    /// There are fewer copies than before.
    room: Condvar,
    /// Faults are watched for streams and followers, which are asked for ahead of need.
    ahead: AtomicBool,
    /// Pages have been given up.
    freed: Condvar,
    landings: Mutex<Landings>,
}

impl Dsm {
    /// The shared memory over `ram`, not yet coherent: node 0 may write to it what the machine
    /// starts with. The transport's handler is [`Dsm::handler`].
    pub fn new(me: usize, ram: Arc<GuestRam>, transport: Arc<dyn Transport>) -> Arc<Self> {
        Arc::new(Dsm {
            me,
            ram,
            transport,
            client: OnceLock::new(),
            state: Mutex::new(None),
            started: Condvar::new(),
            stopping: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            threads: Mutex::default(),
            trace: Trace::default(),
            upkeep: Mutex::default(),
            full: Condvar::new(),
            room: Condvar::new(),
            ahead: AtomicBool::new(true),
            freed: Condvar::new(),
            landings: Mutex::default(),
        })
    }

    /// What to start the transport with. `client` hears from now on.
    pub fn handler(self: &Arc<Self>, client: Arc<dyn Client>) -> Arc<dyn Handler> {
        // A second client is refused by the cell; the first stays.
        let _ = self.client.set(client);
        Arc::new(Receiver(Arc::clone(self)))
    }

    /// Makes the memory coherent. Messages that came before wait for this.
    ///
    /// # Errors
    /// Userfaultfd is not to be had, or no thread.
    pub fn start(self: &Arc<Self>, start: Start) -> Result<(), DsmError> {
        let ranges: Vec<(u64, u32)> = self.ram.layout().ranges().iter().map(|r| (r.gpa >> 12, r.pages())).collect();
        let shares: Vec<u32> = start.shares.iter().map(|bytes| (bytes >> 12) as u32).collect();
        let geometry = Geometry::new(&ranges, &shares);
        let kept: &[Range<u32>] = if start.me == 0 { &start.preloaded } else { &[] };
        let first: u32 = shares.iter().take(start.me).sum();
        let home = first..first + shares.get(start.me).copied().unwrap_or(0);
        let limit = u32::try_from(start.cache >> 12).unwrap_or(u32::MAX);
        let cache = Cache::new(self.ram.pages(), home.clone(), limit);
        let (mut memory, sources) = UffdMemory::keeping(Arc::clone(&self.ram), shards(), kept).map_err(DsmError::Memory)?;
        memory.set_home(home);
        let mut engine =
            Engine::new(start.me as NodeId, geometry, &start.preloaded, start.image.clone(), start.replicate);
        engine.take_zeros_by(ZERO_GROUP, BLOCK_PAGES);
        engine.rest_after(start.tables_rest);
        if let Some(bug) = start.bug {
            engine.plant(bug);
        }
        let asks = Asks::new(memory.features().moves);
        let (out, encoded, roots_asked) = (Output::default(), Vec::new(), Instant::now());
        *self.lock() = Some(State { engine, memory, cache, out, encoded, roots_asked, contention: Contention::default(), begun: Instant::now(), next_free: 0, freed: Vec::new(), stalls: Stalls::default(), readers: Predictor::default(), writers: Predictor::default(), followers: Followers::default(), asks, lending: Lending::default() });
        self.started.notify_all();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, source) in sources.into_iter().enumerate() {
            let stop = source.stopper();
            let dsm = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("dsm-fault-{n}"))
                .spawn(move || dsm.answer_faults(source))
                .map_err(|e| DsmError::Thread(e.to_string()))?;
            threads.push((stop, thread));
        }
        self.start_upkeep(start.merge_after)?;
        Ok(())
    }

    /// Sends a machine message: it arrives after everything the guest here did before is in place
    /// there. Order is kept per destination.
    pub fn send(&self, to: usize, bytes: Vec<u8>) {
        self.step(self.me, Input::Send { to: to as NodeId, bytes });
    }

    /// Fetches the pages of a range somebody here is about to touch, all at once and without waiting.
    /// Addresses that are no RAM are left out.
    pub fn prefetch(&self, gpa: u64, len: u64, write: bool) {
        let frames = gpa >> 12..gpa.saturating_add(len).div_ceil(4096);
        let (geometry, home) = match self.lock().as_ref() {
            Some(state) => {
                let full = state.memory.copies() >= state.cache.limit();
                (state.engine.geometry().clone(), full.then(|| state.cache.home()))
            }
            None => return,
        };
        // Without room for copies, only what is at home.
        let wanted = |page: &u32| home.as_ref().is_none_or(|home| home.contains(page));
        let mut pages = frames.filter_map(|frame| geometry.page_of_frame(frame)).filter(wanted).peekable();
        while let Some(first) = pages.next() {
            let mut end = first + 1;
            while end - first < PREFETCH_AT_ONCE && pages.next_if_eq(&end).is_some() {
                end += 1;
            }
            self.step(self.me, Input::Prefetch { pages: first..end, write });
        }
    }

    /// The guest has no use for the whole pages of a range: nobody has them when this returns, and they read
    /// as zeros, but for those that were in use after all. Addresses that are no RAM are left out.
    pub fn free(&self, gpa: u64, len: u64) {
        let frames = gpa.div_ceil(4096)..gpa.saturating_add(len) >> 12;
        let geometry = match self.lock().as_ref() {
            Some(state) => state.engine.geometry().clone(),
            None => return,
        };
        let mut pages = frames.filter_map(|frame| geometry.page_of_frame(frame)).peekable();
        while let Some(first) = pages.next() {
            let mut end = first + 1;
            while pages.next_if_eq(&end).is_some() {
                end += 1;
            }
            let id = match self.lock().as_mut() {
                Some(state) => {
                    state.next_free = state.next_free.wrapping_add(1);
                    state.next_free
                }
                None => return,
            };
            self.step(self.me, Input::Free { id, pages: first..end });
            let mut guard = self.lock();
            // The end of coherence ends this, too.
            while let Some(state) = guard.as_mut() {
                if let Some(at) = state.freed.iter().position(|done| *done == id) {
                    state.freed.swap_remove(at);
                    break;
                }
                guard = self.freed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Sends a message outside the protocol's order.
    ///
    /// # Errors
    /// The peer is gone, or the message is too long.
    pub fn send_setup(&self, to: usize, bytes: &[u8]) -> Result<(), SendError> {
        self.transport.send(to, SETUP, &[bytes])
    }

    /// Counters of the protocol here, and the replicas of page tables; `None` before the start.
    pub fn counters(&self) -> Option<(Counters, Replicas)> {
        let replicas = |engine: &Engine<PAGE_WORDS>| Replicas { held: engine.replicas(), resting: engine.resting() };
        self.lock().as_ref().map(|s| (s.engine.counters(), replicas(&s.engine)))
    }

    /// What happened to this node's blocks.
    pub fn blocks(&self) -> BlockCounters {
        self.lock().as_ref().map(|s| s.memory.block_counters()).unwrap_or_default()
    }

    /// Whether streams here ask for whole blocks of which something was written: the kernel can put one in place as a
    /// huge page.
    pub fn moves_blocks(&self) -> bool {
        self.lock().as_ref().is_some_and(|s| s.memory.features().moves)
    }

    /// What happened to blocks that were given away whole.
    pub fn lending(&self) -> LendingCounters {
        self.lock().as_ref().map(|s| s.lending.counters()).unwrap_or_default()
    }

    /// The copies of other nodes' pages here.
    pub fn copies(&self) -> Copies {
        self.lock().as_ref().map(|s| s.cache.copies(s.memory.copies())).unwrap_or_default()
    }

    /// How long this node's faults took.
    pub fn waited(&self) -> Waited {
        self.lock().as_ref().map(|s| s.stalls.waited()).unwrap_or_default()
    }

    /// What each thread here waited for since the last call, and the pages that were fetched more than once, the
    /// `most` that were fetched most. Nothing before the start.
    pub fn take_stalls(&self, most: usize) -> (Vec<ThreadStalls>, Vec<FetchedPage>) {
        match self.lock().as_mut() {
            Some(state) => (state.stalls.take(nanos(state.begun)), state.contention.take_fetched(most)),
            None => Default::default(),
        }
    }

    /// Has faults bring the pages ahead of their streams and those that follow them, as they do from the start, or not.
    pub fn read_ahead(&self, on: bool) {
        self.ahead.store(on, Ordering::Relaxed);
    }

    /// What came of the pages asked for ahead of streams.
    pub fn accuracy(&self) -> Accuracy {
        self.lock().as_ref().map(|s| s.readers.accuracy() + s.writers.accuracy()).unwrap_or_default()
    }

    /// What came of the pages that follow others.
    pub fn followers(&self) -> FollowerCounters {
        self.lock().as_ref().map(|s| s.followers.counters()).unwrap_or_default()
    }

    /// Notes from now on when the parts of faults happen, or no longer.
    pub fn trace(&self, on: bool) {
        self.trace.switch(on);
    }

    /// What was noted since the last call.
    pub fn take_trace(&self) -> Vec<Mark> {
        self.trace.take()
    }

    /// The pages hosts fight for most, hottest first, and how often any page was taken away soon after it had
    /// come.
    pub fn hottest(&self, count: usize) -> (Vec<HotPage>, u64) {
        match self.lock().as_ref() {
            Some(state) => (state.contention.hottest(count), state.contention.bounces()),
            None => (Vec::new(), 0),
        }
    }

    /// What went to and came from a peer.
    pub fn traffic(&self, peer: usize) -> PeerCount {
        self.transport.count(peer)
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Ends coherence: whoever waits for a page goes on and sees zeros, so nothing of the guest may
    /// be let out of this node any more. Call it once vCPUs are told to stop.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for (stop, _) in &threads {
            stop.stop();
        }
        let state = self.lock().take();
        self.started.notify_all();
        self.stop_upkeep();
        for (_, thread) in threads {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a fault thread panicked");
            }
        }
        // Last: closing the userfaultfds wakes those who wait.
        drop(state);
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer_faults(&self, mut source: FaultSource) {
        crate::priority::raise();
        let mut faults = Vec::new();
        loop {
            match source.next_batch(&mut faults) {
                Ok(true) => {
                    let now = self.trace.now();
                    for fault in &faults {
                        self.trace.mark(now, Stage::Detected, fault.page);
                        let ahead = self.ahead.load(Ordering::Relaxed);
                        if ahead {
                            self.enter_block(fault.thread, fault.page, fault.write);
                        }
                        let input = Input::Fault { page: fault.page, write: fault.write };
                        let waits = self.step_of(self.me, input, fault.thread);
                        if waits && ahead {
                            self.follow(fault.thread, fault.page, fault.write);
                        }
                    }
                }
                Ok(false) => return,
                Err(error) => return self.fail(DsmError::Memory(error)),
            }
        }
    }

    /// A peer is lost: no page is waited for from it any more. Before the start there is nothing to wait for.
    fn lose(&self, peer: usize) {
        if self.lock().is_some() {
            self.step(peer, Input::Lost(peer as NodeId));
        }
        self.forget_landings(peer);
    }

    /// One step of the engine and all that follows from it. Whether it was a fault on a page that another
    /// node has to send.
    fn step(&self, from: usize, input: Input<PAGE_WORDS>) -> bool {
        self.step_of(from, input, 0)
    }

    /// The same; `thread` has the fault.
    fn step_of(&self, from: usize, mut input: Input<PAGE_WORDS>, thread: u32) -> bool {
        let mut guard = self.lock();
        while guard.is_none() {
            if self.stopping.load(Ordering::SeqCst) {
                return false;
            }
            guard = self.started.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        if let Input::Fault { page, .. } = input {
            guard = self.await_room(guard, page);
        }
        let Some(state) = guard.as_mut() else { return false };
        let State { engine, memory, cache, out, encoded, roots_asked, freed, contention, begun, stalls, asks, lending, .. } = state;
        let mut faulted = None;
        if let Input::Fault { page, write } = input {
            faulted = Some((page, write, nanos(*begun)));
        }
        if let Input::Message { message, .. } = &input {
            note_part(stalls, from as NodeId, message);
        }
        // Somebody else wants a page that is here.
        let wanted = match &input {
            Input::Message { message: Message::Fetch { page, .. } | Message::Invalidate { page, .. }, .. } => *page..page.saturating_add(1),
            Input::Message { message: Message::FetchRun { page, count, .. } | Message::InvalidateRun { page, count, .. }, .. } => *page..page.saturating_add(*count),
            Input::Message { message: Message::FetchBlock { page }, .. } => *page..page.saturating_add(BLOCK_PAGES),
            _ => 0..0,
        };
        if let Input::AheadBlock { first, .. } = input {
            // Several threads may have found so few, each for itself.
            if engine.asked_blocks() >= MOST_BLOCKS {
                asks.not_whole(first);
                return false;
            }
        }
        let mut came = matches!(input, Input::Message { message: Message::Given { .. } | Message::GivenBlock { .. }, .. });
        if let Input::Message { message: Message::GivenBlock { page, content: BlockContent::Zeros | BlockContent::Pages(_) }, .. } = &input {
            asks.whole(*page);
        }
        let stays = note_wanted(self.me, engine.geometry(), lending, &mut input, || nanos(*begun) / 1000);
        if let Input::AheadBlock { first, .. } = input && stays {
            asks.not_whole(first);
            return false;
        }
        // Who joins others that wait wants nothing that was not wanted before.
        let joins = faulted.is_some_and(|(page, ..)| engine.is_pending(page));
        let asked = engine.asked_blocks();
        let copies = memory.copies();
        let mut result = engine.step(input, memory, out).map_err(DsmError::Protocol);
        if let Some(error) = memory.failed() {
            result = Err(DsmError::Memory(error));
        }
        let now = self.trace.now();
        out.completed.iter().for_each(|page| self.trace.mark(now, Stage::Installed, *page));
        self.transmit(out, encoded);
        out.not_given.drain(..).for_each(|first| asks.not_whole(first));
        for (first, to, write) in out.whole.drain(..) {
            let (block, to, now) = (first / BLOCK_PAGES, usize::from(to), nanos(*begun) / 1000);
            if to == self.me { lending.taken_back(block, to, write, now) } else { lending.given(block, to, write, now) }
        }
        // One that comes by the page makes room, too.
        came |= engine.asked_blocks() < asked;
        let waits = faulted.is_some_and(|(page, ..)| engine.is_pending(page));
        if let Some((page, write, since)) = faulted {
            // One that needed nothing waits for nothing.
            if engine.is_pending(page) || out.completed.contains(&page) {
                stalls.fault(page, thread, since);
                if !joins {
                    lending.wanted(page / BLOCK_PAGES, self.me, write, since / 1000);
                }
                contention.fault(page, thread);
            }
        }
        // Whoever waits for a page that was lost is let go by the end of the machine, which the same loss
        // brings: the transport tells of it, here or to the node that told this one.
        for page in out.failed.drain(..) {
            stalls.failed(page, nanos(*begun));
        }
        for node in out.lost.drain(..) {
            tracing::info!(node, "nothing is shared with this node any more");
        }
        // What is kept for a block on its way takes nothing yet.
        if result.is_ok() && !wanted.is_empty() {
            let gone = |page: u32| engine.access(page) == Access::Invalid && !engine.is_block_asked(page);
            contention.taken(wanted, nanos(*begun) / 1000, gone);
        }
        let now = nanos(*begun);
        for run in out.completed.chunk_by(|one, next| one + 1 == *next) {
            let pages = run[0]..run[0] + run.len() as u32;
            cache.came(pages.clone());
            contention.arrived(pages.clone(), now / 1000);
            stalls.arrived(pages.clone(), now, |page, thread, node| contention.fetched(page, thread, node));
            // These came with their block, and somebody had asked for them before.
            contention.taken(pages, now / 1000, |page| engine.access(page) == Access::Invalid);
        }
        out.completed.clear();
        if memory.copies() != copies {
            self.copies_changed(cache, copies, memory.copies());
        }
        if !out.freed.is_empty() {
            freed.append(&mut out.freed);
            self.freed.notify_all();
        }
        let deliver = std::mem::take(&mut out.deliver);
        if std::mem::take(&mut out.want_roots) && roots_asked.elapsed() >= ROOTS_INTERVAL {
            *roots_asked = Instant::now();
            if let Some(client) = self.client.get() {
                let frames = client.roots();
                let pages = frames.into_iter().filter_map(|f| engine.geometry().page_of_frame(f)).collect();
                if let Err(error) = engine.step(Input::Roots(pages), memory, out) {
                    result = Err(DsmError::Protocol(error));
                }
            }
        }
        drop(guard);
        if let Some(client) = self.client.get() {
            for (_, bytes) in deliver {
                client.machine(from, &bytes);
            }
        }
        if let Err(error) = result {
            self.fail(error);
        }
        if came {
            self.ask_ahead();
        }
        waits
    }

    /// Hands the messages of a step to the transport: those to one node together, in their order.
    fn transmit(&self, out: &mut Output<PAGE_WORDS>, encoded: &mut Vec<Vec<u8>>) {
        let traced: Vec<u32> = match self.trace.now() {
            Some(_) => out.sends.iter().filter_map(|(_, message)| message.page()).collect(),
            None => Vec::new(),
        };
        while let Some(&(to, _)) = out.sends.first() {
            let mut count = 0;
            let mut block = None;
            out.sends.retain_mut(|(node, message)| {
                if *node != to || block.is_some() {
                    return true;
                }
                // A block ends what leaves together.
                if let Message::GivenBlock { page, content: content @ BlockContent::Pages(_) } = message {
                    if let BlockContent::Pages(data) = std::mem::replace(content, BlockContent::Stays) {
                        block = Some((*page, data));
                    }
                    return false;
                }
                // The buffers stay, with their memory.
                if encoded.len() == count {
                    encoded.push(Vec::new());
                }
                encoded[count].clear();
                message.encode(&mut encoded[count]);
                count += 1;
                false
            });
            if let Err(error) = self.transport.send_together(usize::from(to), PROTOCOL, &encoded[..count]) {
                // The transport tells of a lost peer by an event; anything else is our own fault.
                tracing::debug!(%error, "a protocol message was not sent");
            }
            if let Some((page, data)) = block {
                self.send_block(usize::from(to), page, data);
            }
        }
        let now = self.trace.now();
        traced.into_iter().for_each(|page| self.trace.mark(now, Stage::Sent, page));
    }

    fn fail(&self, error: DsmError) {
        if !self.failed.swap(true, Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
            if let Some(client) = self.client.get() {
                client.failed(error);
            }
        }
    }
}

/// Nanoseconds since `begun`.
fn nanos(begun: Instant) -> u64 {
    begun.elapsed().as_nanos() as u64
}

/// Notes which of this home's blocks somebody is about to want. Whether the one that is asked for whole shall stay where
/// it is: then another is told so, and this node asks for its pages.
fn note_wanted(me: usize, geometry: &Geometry, lending: &mut Lending, input: &mut Input<PAGE_WORDS>, now: impl Fn() -> u64) -> bool {
    let (page, by, write) = match *input {
        Input::Ahead { first, intent, .. } | Input::AheadBlock { first, intent } => (first, me, intent.writes()),
        Input::Message { from, message: Message::Get { page, write, .. } } => (page, usize::from(from), write),
        Input::Message { from, message: Message::Ask { page, intent, .. } | Message::AskBlock { page, intent } } => {
            (page, usize::from(from), intent.writes())
        }
        _ => return false,
    };
    if page >= geometry.pages() || usize::from(geometry.home(page)) != me {
        return false;
    }
    let (block, now) = (page / BLOCK_PAGES, now());
    lending.wanted(block, by, write, now);
    match *input {
        Input::AheadBlock { .. } => lending.keeps(block, now),
        Input::Message { from, message: Message::AskBlock { page, .. } } if lending.keeps(block, now) => {
            *input = Input::KeepBlock { to: from, first: page };
            true
        }
        _ => false,
    }
}

/// Notes what a message says of who had pages that threads here wait for.
fn note_part(stalls: &mut Stalls, from: NodeId, message: &Message<PAGE_WORDS>) {
    let (page, count, part) = match message {
        Message::Data { page, .. } | Message::Replica { page, .. } | Message::Demoted { page, .. } => (*page, 1, Part::Sent),
        Message::DataRun { page, data, .. } => (*page, data.len() as u32, Part::Sent),
        Message::GivenBlock { page, content: BlockContent::Zeros } => (*page, BLOCK_PAGES, Part::Granted),
        Message::GivenBlock { page, content: BlockContent::Pages(_) } => (*page, BLOCK_PAGES, Part::Sent),
        Message::InvalidateAck { page } => (*page, 1, Part::Dropped),
        Message::InvalidateAckRun { page, count } => (*page, *count, Part::Dropped),
        Message::Grant { page, .. } => (*page, 1, Part::Granted),
        Message::Given { page, given, .. } => {
            let bits = (0..u64::BITS).filter(|bit| given >> bit & 1 == 1).map(|bit| page.saturating_add(bit));
            return bits.for_each(|page| stalls.answered(page..page.saturating_add(1), from, Part::Sent));
        }
        _ => return,
    };
    stalls.answered(page..page.saturating_add(count), from, part);
}

/// One userfaultfd peaks at about four faulting CPUs.
fn shards() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(4))
}

struct Receiver(Arc<Dsm>);

impl Handler for Receiver {
    fn frame(&self, peer: usize, class: u8, payload: &[u8]) {
        let now = self.0.trace.now();
        match class {
            PROTOCOL => match Message::decode(payload) {
                Ok(message) => {
                    if let Some(page) = message.page() {
                        self.0.trace.mark(now, Stage::Received, page);
                    }
                    self.0.step(peer, Input::Message { from: peer as NodeId, message });
                }
                Err(reason) => self.0.fail(DsmError::Malformed { from: peer, reason }),
            },
            BLOCK => {
                // All of it is there.
                let _ = self.0.block_piece(peer, payload.len(), &mut &*payload);
            }
            SETUP => {
                if let Some(client) = self.0.client.get() {
                    client.setup(peer, payload);
                }
            }
            _ => self.0.fail(DsmError::Malformed { from: peer, reason: Malformed }),
        }
    }

    fn long_frame(&self, peer: usize, class: u8, len: usize, payload: &mut dyn Read) -> io::Result<()> {
        if class == BLOCK {
            return self.0.block_piece(peer, len, payload);
        }
        // No other is sent so.
        self.0.fail(DsmError::Malformed { from: peer, reason: Malformed });
        Ok(())
    }

    fn event(&self, event: PeerEvent) {
        if let PeerEvent::Lost { peer, .. } = event {
            self.0.lose(peer);
        }
        self.0.fail(DsmError::Peer(event));
    }
}
