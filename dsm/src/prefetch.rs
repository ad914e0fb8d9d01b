//! Which pages a thread is going to read, or to write: streams seen in its faults of one kind. Pure: decides from
//! the order of faults alone.
//!
//! A stream is a thread's faults at equal distances, upwards or downwards. When it has shown itself
//! by three faults, the pages ahead are asked for, in a window that doubles for as long as the stream goes
//! on. Pages that are there don't fault, so the stream would be out of sight: one page in the middle of
//! each window is left out, and the fault on it tells that the pages before it were used, and that it is
//! time for the next window.
//!
//! A stream of neighbouring pages that has come far asks for whole blocks, the first of them the one it is in, if much
//! of that is still ahead. No page of these is left out: its fault on one that is still to come tells how far it is.

/// Streams followed at a time; the one longest without a fault makes room.
const STREAMS: usize = 64;
/// Of these, first faults and such that a thread may have: random faults shall not drive streams out.
const STREAMS_A_THREAD: usize = 8;
/// Greatest distance in pages between two faults of one stream.
const FARTHEST: u32 = 16;
/// Equal distances that make a stream, and as many when most of what was asked for was not used.
const CONFIRMED: u32 = 2;
const CONFIRMED_LATE: u32 = 8;
/// Pages in the first window and in the largest.
const FIRST_WINDOW: u32 = 8;
const LAST_WINDOW: u32 = 1024;
/// Neighbouring pages after which a stream asks for whole blocks, and its largest window then.
const LONG: u32 = 64;
const BLOCKS_WINDOW: u32 = 2048;
/// Pages after which a stream has come so far that it may take pages from others.
const FAR: u32 = 32;
/// Pages by which accuracy is judged; older ones count half, a quarter, ...
const MEMORY: u64 = 16384;
/// Pages that may be wasted before anything is believed less.
const MAY_WASTE: u64 = 256;

/// What came of the pages asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Accuracy {
    /// Pages asked for.
    pub issued: u64,
    /// Of these, pages a stream has passed.
    pub used: u64,
    /// Of these, pages ahead of a stream that ended.
    pub wasted: u64,
}

impl std::ops::Add for Accuracy {
    type Output = Accuracy;

    fn add(self, other: Accuracy) -> Accuracy {
        Accuracy { issued: self.issued + other.issued, used: self.used + other.used, wasted: self.wasted + other.wasted }
    }
}

/// Faults of one thread at equal distances.
#[derive(Clone, Copy, Debug)]
struct Stream {
    thread: u32,
    /// Page of the last fault.
    last: u32,
    /// Distance from one page to the next; 0 while there was one fault only.
    step: i32,
    /// Distances that were equal.
    hits: u32,
    /// Pages of the window; 0 until the first.
    window: u32,
    /// Steps from `last` to the farthest page asked for.
    ahead: u32,
    /// Pages it has passed, about.
    run: u32,
    /// It has asked for whole blocks.
    by_blocks: bool,
    /// When the last fault was, counted in faults.
    at: u64,
}

impl Stream {
    /// How many steps after the last fault `page` is, if the stream may well have come there.
    fn steps_to(&self, page: u32) -> Option<u32> {
        let distance = i64::from(page) - i64::from(self.last);
        let step = i64::from(self.step);
        if step == 0 || distance % step != 0 {
            return None;
        }
        u32::try_from(distance / step).ok().filter(|steps| (1..=self.ahead + 1).contains(steps))
    }

    /// Whether it asks for whole blocks, when it has come so many steps farther.
    fn goes_by_blocks(&self, steps: u32, block: u32) -> bool {
        block > 1 && self.step.abs() == 1 && self.run.saturating_add(steps) >= LONG
    }

    /// Whether `page` is the first page it meets of a block, and none of that was asked for.
    fn enters_block(&self, page: u32, block: u32) -> bool {
        self.rest_of_block(page, block) == block && self.steps_to(page) == Some(self.ahead + 1)
    }

    /// Pages of the block that `page` is in which it has not passed when it is there.
    fn rest_of_block(&self, page: u32, block: u32) -> u32 {
        if self.step > 0 { block - page % block } else { page % block + 1 }
    }

    /// Whether it had better have all of the block that `page` is in, where it has come to: at the first page of one
    /// that was not asked for, and when it turns to whole blocks with half of one still ahead.
    fn takes_block(&self, page: u32, block: u32) -> bool {
        let turns = !self.by_blocks && self.rest_of_block(page, block) >= block / 2;
        turns || self.enters_block(page, block)
    }

    /// Asks for the pages up to the next block, but one in the middle of many, and fills the window with whole blocks
    /// from there on.
    fn ask_blocks(&mut self, block: u32, wanted: &mut Wanted) {
        while let Some(page) = self.page(self.ahead + 1) {
            if !self.enters_block(page, block) {
                wanted.pages.push(page);
                self.ahead += 1;
            } else if self.ahead + block <= self.window {
                wanted.blocks.push(page - page % block);
                self.ahead += block;
            } else {
                break;
            }
        }
        if wanted.pages.len() as u32 >= LONG {
            wanted.pages.swap_remove(wanted.pages.len() / 2);
        }
    }

    /// The page so many steps after the last fault.
    fn page(&self, steps: u32) -> Option<u32> {
        u32::try_from(i64::from(self.last) + i64::from(self.step) * i64::from(steps)).ok()
    }
}

/// What to ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Single pages; all but those that don't exist are meant.
    pub pages: Vec<u32>,
    /// First pages of whole blocks. They come behind the pages.
    pub blocks: Vec<u32>,
    /// The stream has come so far that it may take pages from others.
    pub far: bool,
    /// The fault goes on with a stream that has shown itself.
    pub goes_on: bool,
}

/// Streams of one node's threads.
#[derive(Debug, Default)]
pub struct Predictor {
    streams: Vec<Stream>,
    faults: u64,
    accuracy: Accuracy,
    /// Used and wasted pages of late.
    recent: (u64, u64),
}

impl Predictor {
    /// Takes note that `thread` waits for `page`, and says what to ask for now, about `room` pages at
    /// most. `block`: pages of a block that may be asked for whole; 0 if none may be.
    pub fn fault(&mut self, thread: u32, page: u32, room: u32, block: u32) -> Wanted {
        let mut wanted = Wanted::default();
        self.faults += 1;
        let (confirmed, most) = self.limits();
        let most = most.min(room);
        let Some((at, steps)) = self.find(thread, page) else {
            self.begin(thread, page);
            return wanted;
        };
        let stream = &mut self.streams[at];
        let passed = steps.min(stream.ahead + 1) - 1;
        let whole = stream.goes_by_blocks(steps, block) && most >= LAST_WINDOW.max(2 * block);
        let entered = whole && stream.takes_block(page, block);
        stream.last = page;
        stream.hits += 1;
        stream.run = stream.run.saturating_add(steps);
        stream.ahead = stream.ahead.saturating_sub(steps);
        stream.at = self.faults;
        wanted.far = stream.run >= FAR;
        wanted.goes_on = stream.hits >= confirmed;
        if whole {
            // At first the next one, as long as it has shown little.
            let mut least = if std::mem::replace(&mut stream.by_blocks, true) { 2 * block } else { block };
            if entered {
                let rest = stream.rest_of_block(page, block) - 1;
                self.accuracy.issued += u64::from(rest.saturating_sub(stream.ahead));
                stream.ahead = stream.ahead.max(rest);
                least += stream.ahead;
            }
            stream.window = (stream.window * 2).max(least).min(BLOCKS_WINDOW.max(2 * block)).min(room);
            let before = stream.ahead;
            stream.ask_blocks(block, &mut wanted);
            self.accuracy.issued += u64::from(stream.ahead - before);
        } else if stream.hits >= confirmed && stream.ahead <= stream.window / 2 && most >= FIRST_WINDOW {
            stream.window = (stream.window * 2).clamp(FIRST_WINDOW, most);
            let from = stream.ahead + 1;
            // The fault on this one will tell how far the stream has come.
            let left_out = stream.ahead + (stream.window - stream.ahead.min(stream.window)).div_ceil(2);
            wanted.pages.extend((from..=stream.window).filter(|steps| *steps != left_out).map_while(|steps| stream.page(steps)));
            stream.ahead = stream.ahead.max(stream.window);
            self.accuracy.issued += wanted.pages.len() as u64;
        }
        self.judge(u64::from(passed), 0);
        wanted
    }

    /// Whether the fault that [`Predictor::fault`] will be told of is best answered by the whole block the page is in.
    pub fn wants_block(&self, thread: u32, page: u32, room: u32, block: u32) -> bool {
        let may = block > 1 && self.limits().1.min(room) >= LAST_WINDOW.max(2 * block);
        let enters = |(at, steps): (usize, u32)| {
            let stream = &self.streams[at];
            stream.goes_by_blocks(steps, block) && stream.takes_block(page, block)
        };
        may && self.find(thread, page).is_some_and(enters)
    }

    /// The stream that a thread goes on with if it comes to `page`, and in how many steps: the one it was at last, if
    /// it fits several, since one that has ended may have gone the same way.
    fn find(&self, thread: u32, page: u32) -> Option<(usize, u32)> {
        let fits = |(n, stream): (usize, &Stream)| Some((n, stream.steps_to(page).filter(|_| stream.thread == thread)?));
        self.streams.iter().enumerate().filter_map(fits).max_by_key(|(n, _)| self.streams[*n].at)
    }

    /// What came of the pages asked for so far.
    pub fn accuracy(&self) -> Accuracy {
        self.accuracy
    }

    /// A fault that goes on with no stream: with an earlier one nearby it may be the second of a stream,
    /// else it is the first.
    fn begin(&mut self, thread: u32, page: u32) {
        let near = |s: &&mut Stream| s.thread == thread && s.hits < CONFIRMED && s.last != page && s.last.abs_diff(page) <= FARTHEST;
        if let Some(stream) = self.streams.iter_mut().filter(near).max_by_key(|s| s.at) {
            stream.step = (i64::from(page) - i64::from(stream.last)) as i32;
            (stream.last, stream.hits, stream.run, stream.at) = (page, 1, 1, self.faults);
            stream.by_blocks = false;
            return;
        }
        let new = Stream { thread, last: page, step: 0, hits: 0, window: 0, ahead: 0, run: 0, by_blocks: false, at: self.faults };
        let own = self.streams.iter().filter(|s| s.thread == thread).count();
        let oldest = |of: &dyn Fn(&Stream) -> bool| {
            self.streams.iter().enumerate().filter(|(_, s)| of(s)).min_by_key(|(_, s)| s.at).map(|(n, _)| n)
        };
        let victim = match self.streams.len() {
            _ if own >= STREAMS_A_THREAD => oldest(&|s| s.thread == thread),
            STREAMS.. => oldest(&|_| true),
            _ => None,
        };
        match victim {
            Some(at) => {
                let ended = std::mem::replace(&mut self.streams[at], new);
                self.judge(0, u64::from(ended.ahead));
            }
            None => self.streams.push(new),
        }
    }

    fn judge(&mut self, used: u64, wasted: u64) {
        self.accuracy.used += used;
        self.accuracy.wasted += wasted;
        self.recent.0 += used;
        self.recent.1 += wasted;
        if self.recent.0 + self.recent.1 > MEMORY {
            self.recent = (self.recent.0 / 2, self.recent.1 / 2);
        }
    }

    /// Equal distances that make a stream, and its largest window: less is risked the more was wasted.
    fn limits(&self) -> (u32, u32) {
        let (used, wasted) = self.recent;
        if wasted <= used + MAY_WASTE {
            (CONFIRMED, LAST_WINDOW)
        } else if wasted <= 4 * used {
            (CONFIRMED, 4 * FIRST_WINDOW)
        } else {
            (CONFIRMED_LATE, FIRST_WINDOW)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has a thread touch pages in order, each asked for page being there at once; the faults it takes.
    fn walk(predictor: &mut Predictor, thread: u32, pages: impl IntoIterator<Item = u32>) -> usize {
        let mut here = std::collections::HashSet::new();
        let mut faults = 0;
        for page in pages {
            if here.insert(page) {
                faults += 1;
                here.extend(predictor.fault(thread, page, u32::MAX, 0).pages);
            }
        }
        faults
    }

    fn asked(predictor: &mut Predictor, thread: u32, page: u32) -> Vec<u32> {
        predictor.fault(thread, page, u32::MAX, 0).pages
    }

    #[test]
    fn the_third_of_three_equal_steps_brings_the_pages_ahead_but_one() {
        for step in [1, 2, 7, 16, -1, -5] {
            let page = |n: i64| (1000 + n * step) as u32;
            let mut p = Predictor::default();
            assert_eq!(asked(&mut p, 1, page(0)), [0; 0]);
            assert_eq!(asked(&mut p, 1, page(1)), [0; 0]);
            assert_eq!(asked(&mut p, 1, page(2)), [3, 4, 5, 7, 8, 9, 10].map(page), "step {step}");
            // The one left out: the window doubles, and goes on where the first ended.
            let next = asked(&mut p, 1, page(6));
            assert_eq!((next[0], next[next.len() - 1], next.len()), (page(11), page(22), 11), "step {step}");
            assert_eq!(p.accuracy(), Accuracy { issued: 18, used: 3, wasted: 0 });
        }
    }

    #[test]
    fn a_scan_takes_few_faults() {
        for (step, pages) in [(1, 4000), (3, 4000), (-1, 4000), (-4, 4000)] {
            let mut p = Predictor::default();
            let faults = walk(&mut p, 1, (0..pages).map(|n| (100_000 + n * step) as u32));
            assert!(faults < 45, "{faults} faults of {pages} pages at step {step}");
            assert!(p.accuracy().issued < 4000 + u64::from(LAST_WINDOW), "{:?}", p.accuracy());
        }
    }

    #[test]
    fn no_more_is_asked_for_than_there_is_room() {
        for (room, most) in [(0, 0), (7, 0), (8, 7), (100, 99)] {
            let mut p = Predictor::default();
            for page in 0..2000 {
                let wanted = p.fault(1, page, room, 512);
                assert!(wanted.pages.len() <= most, "{} pages with room for {room}", wanted.pages.len());
                assert_eq!(wanted.blocks, [0; 0]);
            }
        }
    }

    #[test]
    fn a_long_stream_asks_for_whole_blocks() {
        for (start, step) in [(100_000, 1), (100_000, -1), (2048, 1)] {
            let mut p = Predictor::default();
            let mut here = std::collections::HashSet::new();
            let (mut faults, mut blocks, mut pages) = (0, Vec::new(), 0);
            for page in (0..8192).map(|n| (start + n * step) as u32) {
                if !here.contains(&page) {
                    faults += 1;
                    if p.wants_block(1, page, u32::MAX, 512) {
                        blocks.push(page / 512 * 512);
                        // Some pages of the first are there.
                        let new = (page / 512 * 512..).take(512).filter(|page| here.insert(*page)).count();
                        assert!(new == 512 || blocks.len() == 1 && new > 256, "{new} of {page}");
                    } else {
                        here.insert(page);
                    }
                    let wanted = p.fault(1, page, u32::MAX, 512);
                    pages += wanted.pages.len();
                    here.extend(wanted.pages);
                    // None of a block is asked for twice.
                    wanted.blocks.iter().for_each(|first| assert!((*first..first + 512).all(|page| here.insert(page)), "{first}"));
                    blocks.extend(wanted.blocks);
                }
            }
            assert!(blocks.len() >= 16 && blocks.iter().all(|first| first % 512 == 0), "{blocks:?}");
            assert!(pages < 700 && faults < 20, "{pages} pages, {faults} faults");
            assert!(p.accuracy().issued < 8192 + u64::from(BLOCKS_WINDOW) + 512, "{:?}", p.accuracy());
        }
    }

    #[test]
    fn a_stream_that_has_come_far_says_so() {
        let mut p = Predictor::default();
        let far: Vec<bool> = (0..100).map(|n| p.fault(1, n, u32::MAX, 0).far).collect();
        // The first two are no stream yet.
        assert_eq!(far.iter().position(|far| *far), Some(FAR as usize));
        assert!(far[FAR as usize..].iter().all(|far| *far));
    }

    #[test]
    fn no_blocks_for_streams_that_leave_pages_out_or_are_short() {
        for (step, pages) in [(2, 4000), (-3, 4000), (1, 60)] {
            let mut p = Predictor::default();
            for n in 0..pages {
                assert_eq!(p.fault(1, (100_000 + n * step) as u32, u32::MAX, 512).blocks, [0; 0], "step {step}");
            }
        }
    }

    #[test]
    fn interleaved_streams_and_threads_are_kept_apart() {
        let mut p = Predictor::default();
        let two = (0..2000u32).flat_map(|n| [10_000 + n, 50_000 - n]);
        assert!(walk(&mut p, 1, two) < 80);
        let mut p = Predictor::default();
        // Each thread alone has no stream: the pages alternate between them.
        for n in 0..100 {
            assert_eq!(asked(&mut p, n % 7, 5000 + 17 * n), [0; 0]);
        }
    }

    #[test]
    fn random_faults_bring_almost_nothing() {
        let mut p = Predictor::default();
        let mut seed = 1u32;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            asked(&mut p, 1, seed >> 16);
        }
        assert!(p.accuracy().issued < 50, "{:?}", p.accuracy());
    }

    #[test]
    fn streams_that_end_early_are_believed_less() {
        let mut p = Predictor::default();
        let mut issued = Vec::new();
        for run in 0..400u32 {
            let before = p.accuracy().issued;
            walk(&mut p, 1, (0..4).map(|n| run * 1000 + n));
            issued.push(p.accuracy().issued - before);
        }
        assert_eq!(issued[0], 7);
        assert_eq!(issued[399], 0, "four faults in a row are no stream any more");
        assert!(p.accuracy().wasted > 200 && p.accuracy().used < p.accuracy().wasted);
        // A long one is found nevertheless, and brings confidence back.
        walk(&mut p, 2, 2_000_000..2_004_000);
        assert!(walk(&mut p, 3, 3_000_000..3_004_000) < 60);
    }

    #[test]
    fn the_ends_of_the_numbers_are_no_trouble() {
        let mut p = Predictor::default();
        walk(&mut p, 1, (0..3).rev());
        walk(&mut p, 1, u32::MAX - 4..=u32::MAX);
        walk(&mut p, 1, [u32::MAX, 0, u32::MAX]);
        assert!(p.streams.len() <= STREAMS);
    }
}
