//! Distributed shared memory of guest-physical pages.

mod errno;
pub mod memory;
pub mod transport;
