//! Where the devices' message-signalled interrupts go.

/// Takes message-signalled interrupts of the devices.
pub trait MsiSink: Send + Sync {
    /// Delivers one message: `data` written to `address`, as the guest programmed them. Called
    /// from device and vCPU threads with no lock of this crate held.
    fn signal(&self, address: u64, data: u32);
}
