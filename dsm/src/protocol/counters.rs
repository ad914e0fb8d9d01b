//! What one node's part of the protocol counts.

use serde::{Deserialize, Serialize};

/// Events counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Counters {
    /// Faults on absent pages that asked to read.
    pub read_faults: u64,
    /// Faults on absent pages that asked to write.
    pub write_faults: u64,
    /// Write faults on pages present read-only.
    pub upgrade_faults: u64,
    /// Faults that had been resolved meanwhile, or joined a request under way.
    pub stale_faults: u64,
    /// Of all faults, those answered without page data because nobody had written the page.
    pub zero_grants: u64,
    /// Pages taken without a fault beside one that was: see [`Engine::take_zeros_by`](super::Engine::take_zeros_by).
    pub zero_neighbours: u64,
    /// Requests for pages before anybody had touched them.
    pub prefetches: u64,
    /// Pages homed here that were given up because the guest had no use for them.
    pub pages_freed: u64,
    /// Copies this node asked home to take away.
    pub evictions: u64,
    /// Of the pages asked for ahead of need, those home did not give.
    pub prefetches_refused: u64,
    /// Whole blocks asked for ahead of need.
    pub blocks_asked: u64,
    /// Of these, those home did not give.
    pub blocks_refused: u64,
    /// Blocks received whole.
    pub blocks_in: u64,
    /// Blocks given away whole.
    pub blocks_out: u64,
    /// Pages received.
    pub pages_in: u64,
    /// Pages sent.
    pub pages_out: u64,
    /// Copies dropped because home said so: for another node's write, or evicted.
    pub invalidations: u64,
    /// Requests that ended without the page, since a node was lost.
    pub failures: u64,
    /// Pages that became replicated tables while this node owned them.
    pub promotions: u64,
    /// Replicas this node asked to take back because they are tables no longer, or because nobody else has one.
    pub demotions: u64,
    /// Flushes: comparisons of replicas before a release, of all that do not rest.
    pub flushes: u64,
    /// Replicas that came to rest: write-protected here and not compared.
    pub rests: u64,
    /// Of these, those that somebody here walked or wrote again. A fault that does so waits for nobody, and is none of the
    /// others.
    pub rests_ended: u64,
    /// Replica pages compared.
    pub pages_compared: u64,
    /// Changed words sent.
    pub words_merged: u64,
    /// Replicas given up here, since nobody used them.
    pub departures: u64,
    /// Words two nodes had changed differently since the last merge.
    pub conflicts: u64,
}
