//! What a virtio device is to its transport.

use std::any::Any;
use std::sync::Arc;

use crate::error::Result;
use crate::queue::Ring;
use crate::queue::state::RingState;
use crate::state::DeviceState;

/// How a device's thread reaches the driver.
pub trait Signals: Send + Sync {
    /// Tells the driver that queue `index` has used buffers.
    fn queue(&self, index: u16);

    /// Puts the device into NEEDS_RESET, with a configuration change interrupt.
    fn needs_reset(&self);
}

/// A driver has set a device going.
pub struct Activation {
    /// Queues the driver enabled, by number.
    pub rings: Vec<Ring>,
    /// Negotiated features.
    pub features: u64,
    /// The way to the driver.
    pub signals: Arc<dyn Signals>,
}

impl Activation {
    /// Whether feature bit `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// A reset is complete once every clone of its token is dropped.
pub type ResetToken = Arc<dyn Any + Send + Sync>;

/// The thread or threads that serve a device's queues. Methods are called from vCPU threads and return at
/// once unless they say otherwise. [`Self::activate`] and [`Self::reset`] take effect in the order of their
/// calls.
pub trait Queues: Send + Sync {
    /// Takes the queues over.
    fn activate(&self, activation: Activation);

    /// Gives the queues up; drops `token` when no thread touches them any more.
    fn reset(&self, token: ResetToken);

    /// The driver made buffers available in queue `index`.
    fn kick(&self, index: u16);

    /// Finishes what was begun, then rests; waits for that. Returns the position in each queue.
    ///
    /// # Errors
    /// If the device has stopped.
    fn pause(&self) -> Result<Vec<RingState>>;

    /// Works again.
    ///
    /// # Errors
    /// If the device has stopped.
    fn resume(&self) -> Result<()>;

    /// Asks the threads to end; from here on nothing read from guest memory leaves the device.
    fn request_stop(&self);

    /// [`Self::request_stop`], then waits for the threads.
    fn stop(&self);
}

/// A virtio device without its transport. Methods are called from vCPU threads and return at once.
pub trait VirtioDevice: Send + Sync {
    /// Name in messages.
    fn name(&self) -> &str;

    /// Device type (VIRTIO 1.2, section 5).
    fn device_type(&self) -> u16;

    /// PCI class code: base class, sub-class, programming interface.
    fn pci_class(&self) -> u32;

    /// Device-specific feature bits; the transport adds its own.
    fn features(&self) -> u64;

    /// Largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device-specific configuration; beyond its end is zero.
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// What serves its queues.
    fn queues(&self) -> &dyn Queues;

    /// State apart from transport and queues.
    fn save(&self) -> DeviceState;

    /// Checks and takes over saved state.
    ///
    /// # Errors
    /// If the state is of another device.
    fn restore(&self, state: &DeviceState) -> Result<()>;
}

/// Reads `data.len()` bytes at `offset` of a configuration structure; beyond its end is zero.
pub(crate) fn read_config(config: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = config.get(offset..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}
