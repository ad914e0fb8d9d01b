//! Saved state of the bus and everything on it. The structures carry their own versions; what is
//! restored is untrusted and checked by whoever takes it over.

use serde::{Deserialize, Serialize};

pub use crate::balloon::BalloonState;
pub use crate::block::BlockState;
pub use crate::net::NetState;
pub use crate::pci::config::ConfigState;
pub use crate::pci::msix::MsixState;
pub use crate::queue::state::RingState;
pub use crate::rng::RngState;
pub use crate::transport::CommonState;

/// The PCI root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRootState {
    /// Layout of this structure.
    pub version: u32,
    /// Every device, in order.
    pub slots: Vec<SlotState>,
}

/// One device of the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// Device number.
    pub device: u8,
    /// Its function 0.
    pub function: FunctionState,
}

/// One PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FunctionState {
    /// The host bridge.
    HostBridge(ConfigState),
    /// A virtio device.
    Virtio(Box<VirtioPciState>),
}

/// A virtio-pci function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// Layout of this structure.
    pub version: u32,
    /// Configuration space.
    pub config: ConfigState,
    /// Vector table and pending interrupts.
    pub msix: MsixState,
    /// Status, features and queue registers.
    pub common: CommonState,
    /// Position in each enabled queue; empty if the driver isn't running.
    pub rings: Vec<RingState>,
    /// The device behind it.
    pub device: DeviceState,
}

/// A virtio device, apart from its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// virtio-balloon.
    Balloon(BalloonState),
    /// virtio-blk.
    Block(BlockState),
    /// virtio-net.
    Net(NetState),
    /// virtio-rng.
    Rng(RngState),
}
