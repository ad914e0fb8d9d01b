//! Distributed shared memory of guest-physical pages.

pub mod clock;
pub mod contention;
mod errno;
pub mod followers;
pub mod lending;
pub mod memory;
pub mod node;
pub mod prefetch;
mod priority;
pub mod protocol;
mod spin;
pub mod stalls;
pub mod trace;
pub mod transport;
