//! Pages and blocks asked for ahead of streams, pages that follow others, and blocks on their way.
//!
//! A block is more than a frame may have, and too much to be copied as a message: it goes as pieces of its own
//! class straight out of its slot, and lands in another one. The pieces may go another way than the messages, which
//! don't wait behind them. A piece without content has the message's place among the others: once that has come,
//! and all of the block has, it is the message of the protocol.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, Read};
use std::sync::{Arc, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use super::{BLOCK, Dsm, DsmError, State, nanos};
use crate::followers::Standing;
use crate::memory::{BLOCK_BYTES, BLOCK_PAGES, Landing, PAGE_WORDS};
use crate::prefetch::Predictor;
use crate::protocol::{Access, BlockContent, BlockData, Input, Intent, MOST_AHEAD, Malformed, Message, NodeId};
use crate::transport::Body;

/// Pages of a stream that are asked for, and come, in one message: what has come is in place while the next
/// are still being read, and a fault waits behind so many pages at most.
const AHEAD_AT_ONCE: usize = 16;
/// Pages of streams that may be under way at a time: enough for the wire, and the most that a fault waits behind.
const AHEAD_UNDER_WAY: usize = 64;
/// Whole blocks that may be: while one is filled and put in place the next is on the wire.
const BLOCKS_UNDER_WAY: usize = 2;

/// Bytes of a piece of a block.
const PIECE: usize = 512 << 10;
/// The block's first page and the piece's offset before it.
const PIECE_HEAD: usize = 8;

/// Times as long as a fault that a page was here the last time, at least, if it is to be asked for because it follows
/// another: somebody writes the others now, and would have to ask for them again.
const STAY: u64 = 64;

/// Blocks that are asked for by threads that enter one, at most.
const ENTERED_UNDER_WAY: usize = 16;
/// Blocks that are asked for at all, at most; so many of one peer may have come, or their places, one without the
/// other.
pub(super) const MOST_BLOCKS: usize = BLOCKS_UNDER_WAY + ENTERED_UNDER_WAY;

/// Blocks on their way from other nodes.
pub(super) type Landings = HashMap<usize, Arrivals>;

/// Those of one peer.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// A part of it has come: first page and content.
    landing: Option<(u32, Landing)>,
    /// All of it has, but not its message.
    landed: VecDeque<(u32, BlockData<PAGE_WORDS>)>,
    /// Its message has come, but not all of it.
    due: VecDeque<u32>,
}

impl Arrivals {
    /// The next block of which both is there, if any.
    fn next(&mut self) -> Result<Option<(u32, BlockData<PAGE_WORDS>)>, Malformed> {
        if self.landed.len() > MOST_BLOCKS || self.due.len() > MOST_BLOCKS {
            return Err(Malformed);
        }
        match (self.landed.front(), self.due.front()) {
            (Some((page, _)), Some(due)) if page == due => {
                self.due.pop_front();
                Ok(self.landed.pop_front())
            }
            (Some(_), Some(_)) => Err(Malformed),
            _ => Ok(None),
        }
    }
}

/// What streams have still to ask for. Blocks go behind pages, which somebody comes to sooner.
#[derive(Debug, Default)]
pub(super) struct Asks {
    /// The first page, a bit for each, and what for.
    pages: VecDeque<(u32, u64, Intent)>,
    /// The first page of each, and whether to write.
    blocks: VecDeque<(u32, bool)>,
    /// Blocks asked for by streams that write.
    writing: BTreeSet<u32>,
    /// The kernel can make guest memory of a block that comes.
    moves: bool,
}

impl Asks {
    /// Nothing. `moves`: see [`crate::memory::Features`].
    pub(super) fn new(moves: bool) -> Self {
        Asks { moves, ..Asks::default() }
    }

    /// How many pages that is.
    fn count(&self) -> u32 {
        self.pages.iter().map(|(_, wanted, _)| wanted.count_ones()).sum::<u32>() + self.blocks.len() as u32 * BLOCK_PAGES
    }

    /// A block by the page instead of whole, before all else.
    pub(super) fn not_whole(&mut self, first: u32) {
        let intent = Intent::of(self.writing.remove(&first), true);
        for offset in (0..BLOCK_PAGES).step_by(AHEAD_AT_ONCE).rev() {
            self.pages.push_front((first.saturating_add(offset), (1 << AHEAD_AT_ONCE) - 1, intent));
        }
    }

    /// A block has come whole.
    pub(super) fn whole(&mut self, first: u32) {
        self.writing.remove(&first);
    }

    /// To be asked for whole.
    fn block(&mut self, first: u32, write: bool) -> Input<PAGE_WORDS> {
        if write {
            self.writing.insert(first);
        } else {
            self.writing.remove(&first);
        }
        Input::AheadBlock { first, intent: Intent::of(write, self.moves) }
    }

    /// What to ask for next, with so many pages and blocks under way.
    fn next(&mut self, pages: usize, blocks: usize) -> Option<Input<PAGE_WORDS>> {
        if pages + AHEAD_AT_ONCE <= AHEAD_UNDER_WAY {
            if let Some((first, wanted, intent)) = self.pages.pop_front() {
                return Some(Input::Ahead { first, wanted, intent });
            }
        }
        let next = if self.pages.is_empty() && blocks < BLOCKS_UNDER_WAY { self.blocks.pop_front() } else { None };
        next.map(|(first, write)| self.block(first, write))
    }
}

impl State {
    /// Of the streams that write, or of those that read.
    fn predictor(&mut self, write: bool) -> &mut Predictor {
        if write { &mut self.writers } else { &mut self.readers }
    }

    /// How many pages may be asked for ahead of need, and pages of a block that may be asked for whole, if any: if
    /// nobody wrote it, it needs nothing of the kernel.
    fn may_ask(&self, page: u32, write: bool) -> (u32, u32) {
        // Nothing is evicted for pages that may never be read.
        let asked = self.engine.pending() as u32 + self.asks.count();
        let room = self.cache.limit().saturating_sub(self.memory.copies()).saturating_sub(asked);
        let block = page / BLOCK_PAGES;
        let takes = self.memory.takes_block(block) || (write && self.memory.is_whole_block(block));
        (room, if takes { BLOCK_PAGES } else { 0 })
    }

    /// Takes note of what is to be asked for ahead of a thread's stream. Whether the page goes on with one.
    fn follow_stream(&mut self, thread: u32, page: u32, write: bool) -> bool {
        let (room, block) = self.may_ask(page, write);
        let mut wanted = self.predictor(write).fault(thread, page, room, block);
        let intent = Intent::of(write, wanted.far);
        // Streams go either way.
        wanted.pages.sort_unstable();
        let mut rest = &wanted.pages[..];
        while let Some(&first) = rest.first() {
            let some = rest.iter().take(AHEAD_AT_ONCE).take_while(|page| *page - first < MOST_AHEAD).count();
            let bits = rest[..some].iter().fold(0, |wanted, page| wanted | 1 << (page - first));
            self.asks.pages.push_back((first, bits, intent));
            rest = &rest[some..];
        }
        self.asks.blocks.extend(wanted.blocks.into_iter().map(|first| (first, write)));
        wanted.goes_on
    }

    /// The pages that the thread reads soon after this one, as a rule, and that may be asked for.
    fn followers_of(&mut self, thread: u32, page: u32, write: bool) -> Vec<u32> {
        let (room, _) = self.may_ask(page, write);
        let State { engine, followers, contention, stalls, begun, .. } = self;
        let waited = stalls.waited();
        let least_stay = waited.total.as_micros() as u64 / waited.faults.max(1) * STAY;
        let may_ask = |page| contention.stay(page).is_none_or(|stay| stay >= least_stay);
        let standing = |page| match engine.access(page) {
            Access::Invalid if !engine.is_pending(page) => if may_ask(page) { Standing::Askable } else { Standing::Away },
            _ => Standing::Here,
        };
        followers.fault(thread, (page, write), nanos(*begun) / 1000, room as usize, standing)
    }
}

impl Dsm {
    /// A thread is about to have a fault: if that is where a long stream enters a block, all of it is asked for.
    pub(super) fn enter_block(&self, thread: u32, page: u32, write: bool) {
        let input = self.lock().as_mut().and_then(|state| {
            let (room, block) = state.may_ask(page, write);
            let enters = state.engine.asked_blocks() < ENTERED_UNDER_WAY && state.predictor(write).wants_block(thread, page, room, block);
            enters.then(|| state.asks.block(page - page % BLOCK_PAGES, write))
        });
        if let Some(input) = input {
            self.step(self.me, input);
        }
    }

    /// Sees to it that what a thread is going to read next, or to write, is asked for, if its faults show that. The
    /// fault itself, which somebody waits for, has been asked for before.
    pub(super) fn follow(&self, thread: u32, page: u32, write: bool) {
        let expected = self.lock().as_mut().map_or_else(Vec::new, |state| {
            if state.follow_stream(thread, page, write) {
                // What tells of a stream is not to come ahead of it.
                return Vec::new();
            }
            let expected = state.followers_of(thread, page, write);
            // Those that come so don't fault, and may be of a stream.
            for page in &expected {
                state.follow_stream(thread, *page, false);
            }
            expected
        });
        if !expected.is_empty() {
            self.step(self.me, Input::Expect(expected));
        }
        self.ask_ahead();
    }

    /// Asks for pages of streams, as far as enough of those asked for before have come.
    pub(super) fn ask_ahead(&self) {
        loop {
            let next = self.lock().as_mut().and_then(|State { engine, asks, .. }| asks.next(engine.asked_ahead(), engine.asked_blocks()));
            match next {
                Some(input) => self.step(self.me, input),
                None => return,
            };
        }
    }

    /// Sends a block in pieces. An error is as for any message.
    pub(super) fn send_block(&self, to: usize, page: u32, data: BlockData<PAGE_WORDS>) {
        let len = data.pages().as_bytes().len();
        let body: Body = Arc::new(Leaving(data));
        if let Err(error) = self.transport.send(to, BLOCK, &[&piece_head(page, 0)]) {
            tracing::debug!(%error, "a block was not sent");
            return;
        }
        for offset in (0..len).step_by(PIECE) {
            if let Err(error) = self.transport.send_from(to, BLOCK, &piece_head(page, offset), &body, offset..offset + PIECE) {
                tracing::debug!(%error, "a block was not sent");
                return;
            }
        }
    }

    /// A piece of a block is coming, or its place among the messages. The blocks of one peer come one after the other.
    ///
    /// # Errors
    /// Those of the content.
    pub(super) fn block_piece(&self, peer: usize, len: usize, content: &mut dyn Read) -> io::Result<()> {
        let malformed = DsmError::Malformed { from: peer, reason: Malformed };
        let Some(len) = len.checked_sub(PIECE_HEAD) else {
            self.fail(malformed);
            return Ok(());
        };
        let mut head = [0; PIECE_HEAD];
        content.read_exact(&mut head)?;
        let [a, b, c, d, e, f, g, h] = head;
        let (page, offset) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]) as usize);
        if len == 0 {
            self.landings().entry(peer).or_default().due.push_back(page);
        } else {
            let landing = match self.begun(peer, page, offset) {
                Ok(Some(landing)) => landing,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.fail(error);
                    return Ok(());
                }
            };
            if !self.land(peer, page, landing, (offset, len), content)? {
                self.fail(malformed);
                return Ok(());
            }
        }
        // Whichever of the two receivers comes later takes the step, with no lock of the landings.
        let next = self.landings().entry(peer).or_default().next();
        match next {
            Err(reason) => self.fail(DsmError::Malformed { from: peer, reason }),
            Ok(None) => {}
            Ok(Some((page, data))) => {
                let message = Message::GivenBlock { page, content: BlockContent::Pages(data) };
                self.step(peer, Input::Message { from: peer as NodeId, message });
            }
        }
        Ok(())
    }

    /// A peer is lost, and what was on its way from it.
    pub(super) fn forget_landings(&self, peer: usize) {
        self.landings().remove(&peer);
    }

    fn landings(&self) -> MutexGuard<'_, Landings> {
        self.landings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block that a piece belongs to, as far as it has come. `None`: there is no memory any more.
    fn begun(&self, peer: usize, page: u32, offset: usize) -> Result<Option<Landing>, DsmError> {
        let landing = self.landings().entry(peer).or_default().landing.take();
        match landing {
            Some((of, landing)) if of == page && offset > 0 => Ok(Some(landing)),
            None if offset == 0 => {
                // Only who was asked has a block to send, and that is after the start.
                let slots = match self.lock().as_ref() {
                    Some(state) if state.engine.asked_blocks() == 0 => {
                        return Err(DsmError::Malformed { from: peer, reason: Malformed });
                    }
                    Some(state) => state.memory.slots().clone(),
                    None => return Ok(None),
                };
                slots.take().map(|slot| Some(Landing::new(slot))).map_err(DsmError::Memory)
            }
            _ => Err(DsmError::Malformed { from: peer, reason: Malformed }),
        }
    }

    /// Puts a piece where it belongs: offset and length. Whether it belongs anywhere.
    fn land(
        &self,
        peer: usize,
        page: u32,
        mut landing: Landing,
        (offset, len): (usize, usize),
        content: &mut dyn Read,
    ) -> io::Result<bool> {
        // Without a lock: it is filled by one receiver of this peer alone.
        let Some(space) = landing.space(offset, len) else { return Ok(false) };
        content.read_exact(space)?;
        landing.filled(len);
        let mut landings = self.landings();
        let arrivals = landings.entry(peer).or_default();
        match landing.is_full() {
            true => arrivals.landed.push_back((page, landing.into_block())),
            false => arrivals.landing = Some((page, landing)),
        }
        Ok(true)
    }
}

/// What a piece begins with.
fn piece_head(page: u32, offset: usize) -> [u8; PIECE_HEAD] {
    let mut head = [0; PIECE_HEAD];
    head[..4].copy_from_slice(&page.to_le_bytes());
    head[4..].copy_from_slice(&(offset as u32).to_le_bytes());
    head
}

/// A block while it is sent.
struct Leaving(BlockData<PAGE_WORDS>);

impl AsRef<[u8]> for Leaving {
    fn as_ref(&self) -> &[u8] {
        self.0.pages().as_bytes()
    }
}

// A piece is part of a block, and fits a frame.
const _: () = assert!(BLOCK_BYTES % PIECE == 0 && PIECE + PIECE_HEAD <= crate::transport::MAX_PAYLOAD);
