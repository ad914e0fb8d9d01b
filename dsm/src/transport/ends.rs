//! The end of a peer whose frames come over several streams.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::transport::link::Link;
use crate::transport::{LostReason, PeerEvent};

/// What the receivers of one peer's streams know of each other: when one stream ends all do, and the last receiver
/// tells, as no frame may come after that. The first reason counts.
#[derive(Debug)]
pub struct Ends {
    links: Vec<Arc<Link>>,
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

impl Ends {
    /// Of a peer's streams, the one with the messages first.
    pub fn new(links: Vec<Arc<Link>>) -> Self {
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
