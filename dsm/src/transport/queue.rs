//! Bytes that wait to be sent, some of them in buffers of others.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

/// Memory that is sent from where it is, and let go when it has been.
pub type Body = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// As much of `part` as there is in the body.
pub fn part_of(body: &Body, part: Range<usize>) -> Range<usize> {
    part.start..part.end.min((**body).as_ref().len()).max(part.start)
}

/// Pieces of memory that are sent with one system call at most.
const SLICES: usize = 8;

/// Copied bytes before a lent part that are worth being copied again to go along.
const HEAD: usize = 4096;

/// Bytes in the order in which they are to be sent.
#[derive(Default)]
pub struct Queue {
    parts: VecDeque<Part>,
    len: usize,
}

enum Part {
    Copied(VecDeque<u8>),
    /// What is left to be sent of a body; never empty.
    Lent(Body, Range<usize>),
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes in {} parts", self.len, self.parts.len())
    }
}

impl Queue {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of `bytes`.
    pub fn copy(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        match self.parts.back_mut() {
            Some(Part::Copied(part)) => part.extend(bytes),
            _ => self.parts.push_back(Part::Copied(bytes.iter().copied().collect())),
        }
    }

    /// Appends a part of a body, which is not copied; cut to what there is of it.
    pub fn lend(&mut self, body: Body, range: Range<usize>) {
        let end = range.end.min((*body).as_ref().len());
        if range.start < end {
            self.len += end - range.start;
            self.parts.push_back(Part::Lent(body, range.start..end));
        }
    }

    /// The first bytes, at most `most`.
    pub fn front(&self, mut most: usize) -> [IoSlice<'_>; SLICES] {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let bytes = self.parts.iter().flat_map(|part| match part {
            Part::Copied(part) => <[&[u8]; 2]>::from(part.as_slices()),
            Part::Lent(body, range) => [(**body).as_ref().get(range.clone()).unwrap_or_default(), &[]],
        });
        for (slice, bytes) in slices.iter_mut().zip(bytes) {
            let some = &bytes[..bytes.len().min(most)];
            most -= some.len();
            *slice = IoSlice::new(some);
        }
        slices
    }

    /// If a lent part is next, or is behind a few copied bytes: those, and the part. They can be sent without the
    /// queue, as long as nobody else does.
    pub fn lent(&self) -> Option<(Vec<u8>, Body, Range<usize>)> {
        match (self.parts.front()?, self.parts.get(1)) {
            (Part::Lent(body, range), _) => Some((Vec::new(), body.clone(), range.clone())),
            (Part::Copied(head), Some(Part::Lent(body, range))) if head.len() <= HEAD => {
                Some((head.iter().copied().collect(), body.clone(), range.clone()))
            }
            _ => None,
        }
    }

    /// The first `count` bytes of what [`Queue::front`] told are sent. A copied part with more memory than `keep`
    /// gives it back when it is through.
    pub fn sent(&mut self, mut count: usize, keep: usize) {
        self.len -= count.min(self.len);
        while count > 0 {
            let last = self.parts.len() == 1;
            let through = match self.parts.front_mut() {
                Some(Part::Copied(part)) => {
                    let some = count.min(part.len());
                    part.drain(..some);
                    count -= some;
                    // The memory of the last one is used again.
                    if part.is_empty() && last {
                        return part.shrink_to(keep);
                    }
                    part.is_empty()
                }
                Some(Part::Lent(_, range)) => {
                    let some = count.min(range.len());
                    range.start += some;
                    count -= some;
                    range.start >= range.end
                }
                None => return,
            };
            if through {
                self.parts.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_comes_with_the_few_bytes_before_it() {
        let body: Body = Arc::new(vec![7; 10]);
        let mut queue = Queue::default();
        assert!(queue.lent().is_none());
        queue.copy(&[1; HEAD]);
        assert!(queue.lent().is_none());
        queue.lend(body.clone(), 2..10);
        let told = |queue: &Queue| queue.lent().map(|(head, _, range)| (head.len(), range));
        assert_eq!(told(&queue), Some((HEAD, 2..10)));
        queue.sent(HEAD + 1, 0);
        assert_eq!(told(&queue), Some((0, 3..10)));
        queue.sent(7, 0);
        queue.copy(&[1; HEAD + 1]);
        queue.lend(body, 0..1);
        assert_eq!(told(&queue), None);
    }

    #[test]
    fn bytes_leave_in_their_order_whatever_they_lie_in() {
        for piece in [1, 3, 7, 100] {
            let body: Body = Arc::new((0..20).collect::<Vec<u8>>());
            let mut queue = Queue::default();
            let mut got: Vec<u8> = Vec::new();
            for round in 0..3 {
                queue.copy(&[100, 101]);
                queue.copy(&[102]);
                queue.lend(body.clone(), 5..8);
                queue.lend(body.clone(), 18..30);
                queue.lend(body.clone(), 25..30);
                queue.copy(&[103]);
                assert_eq!(queue.len(), 9, "round {round}");
                while !queue.is_empty() {
                    let count = queue.front(piece).iter().map(|slice| slice.len()).sum::<usize>();
                    assert!((1..=piece).contains(&count));
                    queue.front(piece).iter().for_each(|slice| got.extend_from_slice(slice));
                    queue.sent(count, 4);
                }
                assert_eq!(Arc::strong_count(&body), 1, "what is sent is let go");
            }
            assert_eq!(got, [100, 101, 102, 5, 6, 7, 18, 19, 103].repeat(3), "pieces of {piece}");
        }
    }
}
