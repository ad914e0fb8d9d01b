//! Guest RAM of one node, and the page operations the coherence protocol does on it.
//!
//! [`GuestRam`] maps the RAM; devices and loaders reach it through [`GuestRam::memory`]. In a
//! machine of several hosts [`UffdMemory`] puts it under userfaultfd: a page is absent, present
//! and read-only, or present and writable, and every touch that its state does not allow becomes
//! a [`Fault`] that a [`FaultSource`] hands to the protocol. It does not matter who touches: a
//! vCPU inside KVM, a device thread, or the kernel on behalf of a system call.
//!
//! A 2 MiB block that only this node uses is *private*: it is taken out of userfaultfd, and the kernel
//! maps it by one huge page (`blocks.rs`). A block may also leave, or come, in one go (`whole.rs`).
//!
//! Pages go by a dense *page index*: 0 for the first page of the first RAM range, with no gaps
//! between ranges.

mod access;
mod blocks;
mod compare;
mod error;
mod fault;
mod layout;
mod page_ops;
mod ram;
mod slots;
mod uffd;
mod uffd_memory;
mod whole;

pub use access::Access;
pub use blocks::BlockCounters;
pub use error::MemoryError;
pub use fault::{Fault, FaultSource, FaultStop};
pub use layout::{BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, RamLayout, RamRange};
pub use ram::{GuestRam, RamRegion};
pub use slots::{BLOCK_BYTES, Slot, Slots};
pub use uffd::Features;
pub use uffd_memory::{MemoryState, UffdMemory};
pub use whole::Landing;
