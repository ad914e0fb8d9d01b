//! Distributed shared memory of guest-physical pages.

pub mod clock;
mod errno;
pub mod memory;
pub mod node;
mod priority;
pub mod protocol;
pub mod trace;
pub mod transport;
