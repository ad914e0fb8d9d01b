//! Whole devices, driven as a guest drives them.

mod accesses;
mod balloon;
mod block;
mod driver;
mod malformed;
mod net;
mod ram_disk;
mod snapshot;
mod stop;
