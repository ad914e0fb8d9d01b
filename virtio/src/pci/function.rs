//! What the root asks of a function.

use crate::error::Result;
use crate::state::FunctionState;

/// One PCI function (function 0 of its device). Any thread may call any method at any time; only
/// those that say so may wait.
pub trait PciFunction: Send + Sync {
    /// The function's name in messages.
    fn name(&self) -> String;

    /// Reads configuration registers; `offset` + length lie within 4 KiB.
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration registers. Returns whether the decoded BAR may have changed.
    fn config_write(&self, offset: usize, data: &[u8]) -> bool;

    /// Size of the memory BAR in bytes, 0 if it has none.
    fn bar_size(&self) -> u64;

    /// Puts the BAR at `address` (before the guest runs).
    fn set_bar_address(&self, address: u64);

    /// Where the BAR is decoded now.
    fn decoded_bar(&self) -> Option<u64>;

    /// Reads `offset` of the BAR; the access lies within it.
    fn bar_read(&self, offset: u64, data: &mut [u8]);

    /// Writes `offset` of the BAR; the access lies within it.
    fn bar_write(&self, offset: u64, data: &[u8]);

    /// The part of the BAR, as offset and length, that takes notifications only.
    fn doorbells(&self) -> Option<(u64, u64)>;

    /// Brings the device to rest; waits until it is. Not from a vCPU thread.
    ///
    /// # Errors
    /// If the device has stopped.
    fn pause(&self) -> Result<()>;

    /// Lets a paused device work again.
    ///
    /// # Errors
    /// If the device has stopped.
    fn resume(&self) -> Result<()>;

    /// State of a paused device.
    ///
    /// # Errors
    /// If the device is not paused.
    fn save(&self) -> Result<FunctionState>;

    /// Takes saved state over; the device is paused afterwards.
    ///
    /// # Errors
    /// If the state does not fit.
    fn restore(&self, state: &FunctionState) -> Result<()>;

    /// Asks the device's threads to end; returns at once. From here on nothing it reads from
    /// guest memory reaches a disk or a network.
    fn request_stop(&self);

    /// [`Self::request_stop`], then waits for the threads.
    fn stop(&self);
}
