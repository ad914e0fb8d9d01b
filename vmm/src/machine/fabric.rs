//! What a node's machine asks of the others, and what it is asked.

use serde::{Deserialize, Serialize};

use crate::ownership::Message;

/// An event for one vCPU, as a local APIC accepts it (Intel SDM vol. 3A, 11.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Event {
    /// A fixed interrupt with this vector (16-255).
    Fixed(u8),
    /// Non-maskable interrupt.
    Nmi,
    /// INIT: reset, then wait for SIPI.
    Init,
    /// Start-up: begin in real mode at `vector << 12`.
    Sipi(u8),
}

/// Address space of an [`Access`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Guest-physical memory without RAM behind it.
    Memory,
}

/// What an [`Access`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// Read; the answer is wanted.
    Read,
    /// Write of this value, complete when the answer arrives.
    Write(u64),
    /// Write of this value that nobody waits for. It keeps its place in the order of this node's
    /// accesses, as a posted write on PCI Express does (PCIe base spec 2.4).
    Posted(u64),
}

/// One device access of a vCPU: naturally 1, 2, 4 or 8 bytes, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Which address space.
    pub space: Space,
    /// Port number or guest-physical address.
    pub address: u64,
    /// Bytes: 1 to 8.
    pub size: u8,
    /// Read or write.
    pub direction: Direction,
}

/// A page that a vCPU is about to touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Touch {
    /// An address in it; an even one.
    pub gpa: u64,
    /// It will be written to.
    pub write: bool,
}

/// The other nodes, as the machine sees them. Implementations send on every memory change this node has to
/// publish before a message itself (a receiver that learns of a change must find it in place). They are called
/// without locks that [`super::Machine::receive`] takes, so they may deliver other messages meanwhile.
pub trait Fabric: Send + Sync {
    /// Sends a message about `vcpu` to node `to`, for [`super::Machine::receive`] there.
    fn send(&self, to: usize, vcpu: u32, message: Message);

    /// Tells node `to` which pages a vCPU that goes there is about to touch, so that it can fetch them. A hint.
    fn announce(&self, to: usize, touches: &[Touch]) {
        let _ = (to, touches);
    }

    /// `vcpu` came to run on this node, which owns it in this epoch.
    fn arrived(&self, vcpu: u32, epoch: u64) {
        let _ = (vcpu, epoch);
    }

    /// Has node 0 do `access`, through [`super::Machine::serve`] there. Returns the value read, 0
    /// for writes; `None` when node 0 can't be reached any more (the machine is ending).
    fn io(&self, access: Access) -> Option<u64>;

    /// Called by a vCPU's thread before a device access is carried out on this node, so that what
    /// the guest wrote before is published first. Cheap when there is nothing to publish.
    fn before_local_io(&self) {}
}

/// Memory-mapped devices of node 0: PCI configuration space (ECAM) and BARs.
pub trait DeviceBus: Send + Sync {
    /// Reads `data.len()` bytes at a guest-physical address; `false`: nothing there.
    fn read(&self, gpa: u64, data: &mut [u8]) -> bool;
    /// Writes `data` at a guest-physical address; `false`: nothing there.
    fn write(&self, gpa: u64, data: &[u8]) -> bool;
}

/// How the machine came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU shut down (KVM_EXIT_SHUTDOWN): a real machine would reset.
    TripleFault {
        /// Its number.
        vcpu: u32,
    },
    /// The machine can't go on: one line for people.
    Error(String),
}
