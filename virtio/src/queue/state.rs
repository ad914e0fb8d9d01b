//! Saved position in a queue. Where the queue lies is saved with the transport's registers.

use serde::{Deserialize, Serialize};

/// Position in one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Layout of this structure.
    pub version: u32,
    /// Queue number.
    pub index: u16,
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

impl RingState {
    /// The version this build writes and reads.
    pub const VERSION: u32 = 1;

    pub(super) fn new(index: u16, next_avail: u16, next_used: u16) -> Self {
        RingState {
            version: Self::VERSION,
            index,
            next_avail,
            next_used,
        }
    }
}
