//! What a node does beside answering faults: blocks become private again, copies go home for want of room.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::{Dsm, DsmError, ROOM_PATIENCE, State};
use crate::memory::Access as Mapped;
use crate::protocol::{Access, Input};

/// The hand that looks for blocks to merge goes round in this many moves, and takes those in whose pages
/// nothing changed in this many rounds.
const HAND_MOVES: u32 = 10;
const QUIET_ROUNDS: u8 = 10;
/// One of the slots that kept their memory is emptied in so many moves of the hand.
const EMPTIES: u32 = 10;

/// Copies that are asked to go at once.
const EVICT_AT_ONCE: u32 = 128;
/// Longest wait until they are gone before others are asked to go.
const EVICTION_PATIENCE: Duration = Duration::from_millis(50);

impl Dsm {
    /// Starts the threads.
    pub(super) fn start_upkeep(self: &Arc<Self>, merge_after: Duration) -> Result<(), DsmError> {
        let start = |name: &str, work: Box<dyn FnOnce(&Dsm) + Send>| {
            let dsm = Arc::clone(self);
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(&dsm));
            thread.map_err(|e| DsmError::Thread(e.to_string()))
        };
        let merge = start("dsm-merge", Box::new(move |dsm| dsm.merge_blocks(merge_after)))?;
        let evict = start("dsm-evict", Box::new(Dsm::evict_copies))?;
        self.upkeep.lock().unwrap_or_else(PoisonError::into_inner).extend([merge, evict]);
        Ok(())
    }

    /// Waits until the threads have ended; the state is gone by now.
    pub(super) fn stop_upkeep(&self) {
        self.full.notify_all();
        self.room.notify_all();
        self.freed.notify_all();
        for thread in std::mem::take(&mut *self.upkeep.lock().unwrap_or_else(PoisonError::into_inner)) {
            thread.thread().unpark();
            // One that failed the machine may be what ends it.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the shared memory panicked");
            }
        }
    }

    /// Makes blocks private again that nobody else has asked for in a while, and fills slots for blocks that come
    /// whole while none does; of those that have memory since many came it empties one now and then.
    fn merge_blocks(&self, after: Duration) {
        let interval = after / (HAND_MOVES * u32::from(QUIET_ROUNDS));
        let (mut came, mut rounds) = (0, 0u32);
        loop {
            std::thread::park_timeout(interval);
            let slots = match self.lock().as_ref() {
                Some(State { engine, memory, .. }) => {
                    let before = std::mem::replace(&mut came, engine.counters().blocks_in);
                    (before == came && memory.features().moves).then(|| memory.slots().clone())
                }
                None => return,
            };
            // What the host can't give now it may give the next time.
            while slots.as_ref().is_some_and(|slots| slots.fill_one().unwrap_or(false)) {}
            rounds = rounds.wrapping_add(1);
            if let Some(slots) = slots {
                slots.mend_one();
                if rounds % EMPTIES == 0 {
                    slots.empty_one();
                }
            }
            let merged = match self.lock().as_mut() {
                Some(State { engine, memory, cache, .. }) => {
                    let count = memory.blocks().div_ceil(HAND_MOVES);
                    // Copies that may have to go soon, page by page, are left as they are.
                    let scarce = memory.copies() > cache.limit() / 2;
                    let mergeable = |page| engine.access(page) == Access::Exclusive && !(scarce && cache.counts(page));
                    memory.merge_quiet(count, QUIET_ROUNDS, mergeable)
                }
                None => return,
            };
            // Without the lock: it copies 2 MiB. If a page is asked for meanwhile, the kernel leaves the
            // block as it is, or splits it again.
            for block in merged {
                self.ram.collapse(block);
            }
        }
    }

    /// Has copies go home while there are more than there may be.
    fn evict_copies(&self) {
        let mut guard = self.lock();
        let mut evicting = false;
        loop {
            let Some(State { engine, memory, cache, .. }) = guard.as_mut() else { return };
            let copies = memory.copies();
            let mut pages = Vec::new();
            evicting = copies > if evicting { cache.low() } else { cache.limit() };
            if evicting {
                let count = (copies - cache.low()).min(EVICT_AT_ONCE) as usize;
                pages = cache.choose(count, |page| {
                    memory.access(page) != Mapped::Absent && engine.access(page) != Access::Replicated && !engine.is_pending(page)
                });
            }
            if pages.is_empty() {
                // What is left can't go.
                evicting = false;
                let waited = self.full.wait_timeout(guard, EVICTION_PATIENCE);
                guard = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(guard);
            self.step(self.me, Input::Evict(pages.clone()));
            guard = self.lock();
            // Meanwhile others come. A few that home is busy with are not waited for.
            let few = pages.len() / 8;
            let many_here = |state: &mut Option<State>| {
                state.as_ref().is_some_and(|s| pages.iter().filter(|page| s.memory.access(**page) != Mapped::Absent).count() > few)
            };
            let waited = self.room.wait_timeout_while(guard, EVICTION_PATIENCE, many_here);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A fault that needs room for one more copy waits while there are far too many.
    pub(super) fn await_room<'a>(&self, mut guard: MutexGuard<'a, Option<State>>, page: u32) -> MutexGuard<'a, Option<State>> {
        let lacks = |state: &State| {
            state.cache.counts(page) && state.memory.access(page) == Mapped::Absent && state.memory.copies() >= state.cache.most()
        };
        if !guard.as_ref().is_some_and(lacks) {
            return guard;
        }
        let until = Instant::now() + ROOM_PATIENCE;
        while guard.as_ref().is_some_and(lacks) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                if let Some(state) = guard.as_mut() {
                    state.cache.overruns += 1;
                }
                break;
            }
            guard = self.room.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        guard
    }

    /// The number of copies is not what it was.
    pub(super) fn copies_changed(&self, cache: &mut Cache, before: u32, now: u32) {
        cache.note(now);
        if now > before && now > cache.limit() {
            self.full.notify_one();
        }
        if now < before && before > cache.low() {
            self.room.notify_all();
        }
    }
}
