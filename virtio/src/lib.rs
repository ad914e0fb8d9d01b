//! Virtio devices over PCI, and the PCI root they sit on.
//!
//! [`pci::PciRoot`] is what the machine sees: configuration space (ECAM of bus 0), MMIO by
//! guest-physical address, and the life of all devices (pause, save, restore, stop).
//! [`transport::VirtioPci`] is one PCI function that carries one [`device::VirtioDevice`].
//!
//! Two rules hold everywhere, because a touch of guest memory may block for as long as a page
//! takes to arrive from another host:
//!
//! 1. Handlers of configuration and MMIO accesses never touch guest memory and never wait for a
//!    thread that does; they hand work to the device's thread and return.
//! 2. Only a device's own threads touch guest memory, holding no lock that a handler takes.

pub mod balloon;
pub mod block;
pub mod device;
pub mod disk;
mod error;
pub mod interrupt;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod state;
pub mod transport;
mod worker;

pub use error::{Error, Result};
pub use interrupt::MsiSink;

/// Told what a device is about to touch, so that pages which are elsewhere come together, not one by
/// one as they are touched. Must not wait for them.
pub trait Prefetch: Send + Sync {
    /// `len` bytes at `gpa` will be read, or written.
    fn prefetch(&self, gpa: u64, len: u64, write: bool);
}

/// Guest memory as the devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
