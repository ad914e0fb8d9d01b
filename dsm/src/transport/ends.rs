//! The end of a peer whose frames come over several streams.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::transport::{LostReason, PeerEvent, link};

/// The sending side of one of a peer's streams.
pub trait Link {
    /// No more sending. If its receiver still waits for something to come, it ends, too.
    fn end(&self);
}

impl Link for link::Link {
    fn end(&self) {
        link::Link::end(self);
    }
}

/// What the receivers of one peer's streams know of each other: when one stream ends all do, and the last receiver
/// tells, as no frame may come after that. The first reason counts.
#[derive(Debug)]
pub struct Ends<L = link::Link> {
    links: Vec<Arc<L>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ended: usize,
    /// Nobody waits any longer.
    is_over: bool,
    event: Option<PeerEvent>,
}

impl<L: Link> Ends<L> {
    /// Of a peer's streams, the one with the messages first.
    pub fn new(links: Vec<Arc<L>>) -> Self {
        Ends { links, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The receiver of stream `number` is through. What is to be told, if it is the last.
    pub fn end(&self, number: usize, event: PeerEvent, patience: Duration) -> Option<PeerEvent> {
        let mut state = self.lock();
        // A peer that ends closes all its streams, and its last words are on the first.
        if number > 0 && matches!(event, PeerEvent::Lost { reason: LostReason::Closed | LostReason::Broken(_), .. }) {
            let until = Instant::now() + patience;
            while state.ended + 1 < self.links.len() && !state.is_over && Instant::now() < until {
                let left = until.saturating_duration_since(Instant::now());
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.event.get_or_insert(event);
        state.ended += 1;
        self.changed.notify_all();
        self.links.iter().for_each(|link| link.end());
        if state.ended == self.links.len() { state.event.take() } else { None }
    }

    /// This node ends all streams itself: no last words are waited for.
    pub fn over(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::errno::Errno;
    use crate::transport::Malformed;

    const PATIENCE: Duration = Duration::from_secs(60);
    const CLOSED: PeerEvent = PeerEvent::Lost { peer: 1, reason: LostReason::Closed };
    const BROKEN: PeerEvent = PeerEvent::Lost { peer: 1, reason: LostReason::Broken(Errno(libc::ETIMEDOUT)) };

    #[derive(Default)]
    struct Sender(AtomicBool);

    impl Link for Sender {
        fn end(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn two() -> (Ends<Sender>, [Arc<Sender>; 2]) {
        let links: [Arc<Sender>; 2] = Default::default();
        (Ends::new(links.to_vec()), links)
    }

    fn ended(links: &[Arc<Sender>; 2]) -> [bool; 2] {
        links.each_ref().map(|link| link.0.load(Ordering::SeqCst))
    }

    #[test]
    fn if_one_ends_both_do_and_the_last_tells_the_first_reason() {
        for (first, second) in [(0, 1), (1, 0)] {
            let (ends, links) = two();
            let event = PeerEvent::Malformed { peer: 1, reason: Malformed::Bare };
            assert_eq!(ends.end(first, event.clone(), PATIENCE), None);
            assert_eq!(ended(&links), [true, true]);
            assert_eq!(ends.end(second, CLOSED, PATIENCE), Some(event));
        }
    }

    #[test]
    fn the_second_that_breaks_waits_for_the_last_words_on_the_first() {
        let (ends, links) = two();
        thread::scope(|scope| {
            let second = scope.spawn(|| ends.end(1, BROKEN, PATIENCE));
            thread::sleep(Duration::from_millis(50));
            assert_eq!(ended(&links), [false, false]);
            assert_eq!(ends.end(0, CLOSED, PATIENCE), None);
            assert_eq!(second.join().unwrap(), Some(CLOSED));
        });
    }

    #[test]
    fn the_second_that_breaks_alone_ends_the_first_in_time() {
        let (ends, links) = two();
        let begun = Instant::now();
        assert_eq!(ends.end(1, BROKEN, Duration::from_millis(50)), None);
        assert!(begun.elapsed() >= Duration::from_millis(50));
        assert_eq!(ended(&links), [true, true]);
        assert_eq!(ends.end(0, CLOSED, PATIENCE), Some(BROKEN));
    }

    #[test]
    fn nobody_waits_for_a_node_that_ends_itself() {
        let (ends, _) = two();
        ends.over();
        assert_eq!(ends.end(1, CLOSED, PATIENCE), None);
        assert_eq!(ends.end(0, CLOSED, PATIENCE), Some(CLOSED));
    }
}
