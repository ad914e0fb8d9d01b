//! The host bridge at 00:00.0: an identity and nothing else.

use std::sync::{Mutex, PoisonError};

use super::config::{ConfigSpace, Identity};
use super::function::PciFunction;
use crate::error::{Error, Result};
use crate::state::FunctionState;

/// Red Hat, generic PCIe host bridge: known to be driven by nobody.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The bridge between the CPUs and bus 0.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        HostBridge {
            config: Mutex::new(ConfigSpace::new(IDENTITY)),
        }
    }
}

impl HostBridge {
    fn config(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn name(&self) -> String {
        "PCI host bridge".into()
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) -> bool {
        self.config().write(offset, data);
        false
    }

    fn bar_size(&self) -> u64 {
        0
    }

    fn set_bar_address(&self, _address: u64) {}

    fn decoded_bar(&self) -> Option<u64> {
        None
    }

    fn bar_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _offset: u64, _data: &[u8]) {}

    fn doorbells(&self) -> Option<(u64, u64)> {
        None
    }

    fn pause(&self) -> Result<()> {
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        Ok(())
    }

    fn save(&self) -> Result<FunctionState> {
        Ok(FunctionState::HostBridge(self.config().save()))
    }

    fn restore(&self, state: &FunctionState) -> Result<()> {
        match state {
            FunctionState::HostBridge(config) => self.config().restore(config),
            FunctionState::Virtio(_) => Err(Error::bad_state(self.name(), "it belongs to a virtio device")),
        }
    }

    fn request_stop(&self) {}

    fn stop(&self) {}
}
