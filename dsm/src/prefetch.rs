//! Which pages a thread is going to read: streams seen in its read faults. Pure: decides from the order
//! of faults alone.
//!
//! A stream is a thread's faults at equal distances, upwards or downwards. When it has shown itself
//! by three faults, the pages ahead are asked for, in a window that doubles for as long as the stream goes
//! on. Pages that are there don't fault, so the stream would be out of sight: one page in the middle of
//! each window is left out, and the fault on it tells that the pages before it were used, and that it is
//! time for the next window.

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
/// Pages by which accuracy is judged; older ones count half, a quarter, ...
const MEMORY: u64 = 4096;
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

    /// The page so many steps after the last fault.
    fn page(&self, steps: u32) -> Option<u32> {
        u32::try_from(i64::from(self.last) + i64::from(self.step) * i64::from(steps)).ok()
    }
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
    /// Takes note that `thread` waits for `page`, to read it, and appends the pages to ask for now, `room` at most: all
    /// but those that don't exist are meant.
    pub fn fault(&mut self, thread: u32, page: u32, room: u32, ask: &mut Vec<u32>) {
        self.faults += 1;
        let (confirmed, most) = self.limits();
        let most = most.min(room);
        let of_thread = |stream: &Stream| stream.thread == thread;
        let Some((at, steps)) =
            self.streams.iter().enumerate().find_map(|(n, s)| Some((n, s.steps_to(page).filter(|_| of_thread(s))?)))
        else {
            return self.begin(thread, page);
        };
        let stream = &mut self.streams[at];
        let passed = steps.min(stream.ahead + 1) - 1;
        stream.last = page;
        stream.hits += 1;
        stream.ahead = stream.ahead.saturating_sub(steps);
        stream.at = self.faults;
        // Half of the window is still ahead: nothing to do.
        if stream.hits >= confirmed && stream.ahead <= stream.window / 2 && most >= FIRST_WINDOW {
            stream.window = (stream.window * 2).clamp(FIRST_WINDOW, most);
            let from = stream.ahead + 1;
            // The fault on this one will tell how far the stream has come.
            let left_out = stream.ahead + (stream.window - stream.ahead.min(stream.window)).div_ceil(2);
            let before = ask.len();
            ask.extend((from..=stream.window).filter(|steps| *steps != left_out).map_while(|steps| stream.page(steps)));
            stream.ahead = stream.ahead.max(stream.window);
            self.accuracy.issued += (ask.len() - before) as u64;
        }
        self.judge(u64::from(passed), 0);
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
            (stream.last, stream.hits, stream.at) = (page, 1, self.faults);
            return;
        }
        let new = Stream { thread, last: page, step: 0, hits: 0, window: 0, ahead: 0, at: self.faults };
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
                let mut ask = Vec::new();
                predictor.fault(thread, page, u32::MAX, &mut ask);
                here.extend(ask);
            }
        }
        faults
    }

    fn asked(predictor: &mut Predictor, thread: u32, page: u32) -> Vec<u32> {
        let mut ask = Vec::new();
        predictor.fault(thread, page, u32::MAX, &mut ask);
        ask
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
                let mut ask = Vec::new();
                p.fault(1, page, room, &mut ask);
                assert!(ask.len() <= most, "{} pages with room for {room}", ask.len());
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
