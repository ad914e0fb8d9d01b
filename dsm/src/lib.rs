//! Distributed shared memory of guest-physical pages.
