//! What went over a stream, by class.

use std::sync::atomic::{AtomicU64, Ordering};

/// Frames and bytes (headers included) of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassCount {
    /// Frames accepted for sending.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames received.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
}

impl ClassCount {
    fn plus(self, other: ClassCount) -> ClassCount {
        ClassCount {
            frames_out: self.frames_out + other.frames_out,
            bytes_out: self.bytes_out + other.bytes_out,
            frames_in: self.frames_in + other.frames_in,
            bytes_in: self.bytes_in + other.bytes_in,
        }
    }
}

/// What went to and came from one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerCount {
    /// Classes that occurred, in ascending order; heartbeats among them.
    pub classes: Vec<(u8, ClassCount)>,
    /// Bytes that wait because the network does not take them.
    pub queued: usize,
}

impl PeerCount {
    /// One class.
    pub fn class(&self, class: u8) -> ClassCount {
        self.classes
            .iter()
            .find(|(at, _)| *at == class)
            .map_or_else(ClassCount::default, |(_, count)| *count)
    }

    /// All classes together.
    pub fn total(&self) -> ClassCount {
        self.classes.iter().fold(ClassCount::default(), |sum, (_, count)| sum.plus(*count))
    }

    /// Of two streams of the same peer.
    pub(crate) fn plus(mut self, other: PeerCount) -> PeerCount {
        for (class, count) in other.classes {
            match self.classes.binary_search_by_key(&class, |(at, _)| *at) {
                Ok(at) => self.classes[at].1 = self.classes[at].1.plus(count),
                Err(at) => self.classes.insert(at, (class, count)),
            }
        }
        self.queued += other.queued;
        self
    }
}

#[derive(Debug, Default)]
struct Pair {
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Pair {
    fn add(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn get(&self) -> (u64, u64) {
        (self.frames.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

/// Live counters of one peer: (out, in) for each class.
#[derive(Debug)]
pub struct Counters(Vec<(Pair, Pair)>);

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self((0..=u8::MAX).map(|_| Default::default()).collect())
    }

    /// A frame of `bytes` with its header was accepted for sending.
    pub fn sent(&self, class: u8, bytes: usize) {
        self.0[usize::from(class)].0.add(bytes);
    }

    /// A frame of `bytes` with its header has come.
    pub fn received(&self, class: u8, bytes: usize) {
        self.0[usize::from(class)].1.add(bytes);
    }

    /// The present values.
    pub fn get(&self, queued: usize) -> PeerCount {
        let count = |(out, into): &(Pair, Pair)| {
            let ((frames_out, bytes_out), (frames_in, bytes_in)) = (out.get(), into.get());
            ClassCount {
                frames_out,
                bytes_out,
                frames_in,
                bytes_in,
            }
        };
        let classes = (0..=u8::MAX).zip(self.0.iter().map(count));
        PeerCount {
            classes: classes.filter(|(_, count)| *count != ClassCount::default()).collect(),
            queued,
        }
    }
}
