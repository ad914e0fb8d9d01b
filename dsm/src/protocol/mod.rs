//! The coherence protocol, as a pure state machine.
//!
//! Every page has a **home** (by its place in the NUMA layout), whose directory knows the page's
//! **owner** (who has the newest copy), its **sharers** (who may read), or, for page tables that several
//! nodes walk, its **holders** (who have a writable replica). A node that needs a page sends `Get` to
//! home; home sends `Fetch` to the owner and `Invalidate` to the sharers at once; the owner sends `Data`
//! and the sharers `InvalidateAck` straight to the requester: three messages deep, whatever the number
//! of sharers. Home works on one request a page at a time.
//!
//! ARCHITECTURE.md holds the argument: states, invariants, and why replicated tables are sound.

mod ahead;
mod back;
mod block_data;
mod counters;
mod directory;
mod engine;
mod evict;
mod fence;
mod free;
mod geometry;
mod loss;
mod memory;
mod merge;
mod message;
#[cfg(test)]
mod model;
mod node_set;
mod place;
pub mod pte;
mod rest;
mod runs;
mod state;
mod tables;
mod whole;
mod write_shared;

pub use ahead::MOST_AHEAD;
pub use block_data::{BlockContent, BlockData, BlockMemory};
pub use counters::Counters;
pub use engine::{Access, Engine, Input, Output, ProtocolError};
pub use geometry::Geometry;
pub use memory::{Memory, PageData};
pub use message::{Change, Intent, MAX_NODES, Malformed, Message, NodeId};
pub use node_set::NodeSet;
pub use rest::Patience;
pub use state::{EngineState, StateError};

/// Protocol bugs that can be planted, to show that the model check and the litmus tests find them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Bug {
    /// A sharer acknowledges an invalidation before it has dropped its copy.
    AckBeforeInvalidate,
    /// Tables are merged before the page that leaves is frozen, not after.
    MergeBeforeFreeze,
    /// A replica is kept although it is a page table no longer.
    NoReachability,
    /// A replica that is to rest is compared before it can be written to no more, not after.
    RestBeforeFreeze,
    /// Who gives up a replica of what is a table no more doesn't wait until all others have.
    SettledNotAwaited,
    /// An owner reads the page it sends before it is frozen, not after.
    SendBeforeFreeze,
    /// Home serves the next request without waiting for the Done of the one before.
    DoneNotAwaited,
    /// A sharer that waits to write acknowledges an invalidation and keeps its copy.
    KeepWhileUpgrading,
    /// The acknowledgement of a sharer that is lost is waited for.
    AwaitLostSharer,
    /// Home forgets who was told to drop a copy for a requester that is lost.
    SharersOfLostForgotten,
    /// Home reads a block it gives away before it is frozen, not after.
    BlockBeforeFreeze,
    /// What home asks of a block's new owner before the block has come is forgotten.
    EarlyForgotten,
    /// Home gives a block away of which another node reads a page.
    BlockDespiteReaders,
    /// Home gives a page to who expects to write it, although another node reads it.
    GivenDespiteReaders,
}
