//! virtio over PCI, modern interface (VIRTIO 1.2, section 4.1).

mod capabilities;
mod common;
mod registers;
mod shared;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use registers::{CommonState, QueueRegisters};

use capabilities::{
    COMMON, DEVICE, Function, ISR, Layout, MSIX_PBA, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER, PCI_CFG_DATA,
};
use registers::Registers;
use shared::{ResetGuard, Shared};

use crate::GuestMemory;
use crate::device::{Activation, VirtioDevice};
use crate::error::{Error, Result};
use crate::interrupt::MsiSink;
use crate::pci::PciFunction;
use crate::pci::config::{BAR0, COMMAND, ConfigSpace};
use crate::pci::msix::Msix;
use crate::queue::state::RingState;
use crate::queue::{QueueError, Ring, RingLayout};
use crate::state::{FunctionState, VirtioPciState};

const STATE_VERSION: u32 = 1;

/// One PCI function with a virtio device behind it.
///
/// Locks, each held briefly and never while guest memory is touched or a thread is waited for:
/// `config` (configuration space), `registers` (common configuration), the vector table's. The
/// only nesting is under `registers`: the device's mailbox, which keeps activation and reset in
/// order, and `config` while saving and restoring.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    layout: Layout,
    config: Mutex<ConfigSpace>,
    registers: Mutex<Registers>,
    shared: Arc<Shared>,
    /// Queue positions while the device is paused.
    paused: Mutex<Option<Vec<RingState>>>,
}

impl VirtioPci {
    /// Puts `device` on PCI. It sees `memory`; its interrupts go to `sink`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>, sink: Arc<dyn MsiSink>) -> Self {
        let queues = device.queue_sizes().len() as u16;
        // One vector a queue and one for configuration changes.
        let vectors = queues + 1;
        let Function { config, layout } = capabilities::function(&*device, vectors);
        VirtioPci {
            layout,
            config: Mutex::new(config),
            registers: Mutex::new(Registers::new(device.features(), device.queue_sizes())),
            shared: Arc::new(Shared::new(queues, Msix::new(vectors, sink))),
            paused: Mutex::new(None),
            device,
            memory,
        }
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn paused(&self) -> MutexGuard<'_, Option<Vec<RingState>>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds the queues the driver enabled. `positions`: where to go on in each; empty: start.
    fn rings(&self, registers: &Registers, positions: &[RingState]) -> std::result::Result<Vec<Ring>, QueueError> {
        let event_idx = registers.event_idx();
        let mut rings = Vec::new();
        for (index, queue) in registers.queues().iter().enumerate() {
            if !queue.enabled {
                continue;
            }
            let index = index as u16;
            let position = positions
                .iter()
                .find(|p| p.index == index)
                .map_or((0, 0), |p| (p.next_avail, p.next_used));
            let layout = RingLayout {
                max_size: registers.max_queue_size(index),
                size: queue.size,
                descriptors: queue.descriptors,
                available: queue.available,
                used: queue.used,
            };
            rings.push(Ring::new(index, &layout, event_idx, position, self.memory.clone())?);
        }
        Ok(rings)
    }

    fn activate(&self, registers: &Registers, rings: Vec<Ring>) {
        self.device.queues().activate(Activation {
            rings,
            features: registers.driver_features(),
            signals: self.shared.clone(),
        });
    }

    /// Resets registers and device (section 2.4). The driver sees the old status until the
    /// device's threads have let go of the queues.
    fn reset(&self, registers: &mut Registers) {
        if registers.reset() {
            self.device.queues().reset(Arc::new(ResetGuard::new(&self.shared)));
        }
        self.shared.reset();
    }

    fn set_status(&self, value: u8) {
        let mut registers = self.registers();
        if value == 0 {
            self.reset(&mut registers);
            return;
        }
        if !registers.set_status(value) {
            return;
        }
        // The driver has just set DRIVER_OK.
        match self.rings(&registers, &[]) {
            Ok(rings) => self.activate(&registers, rings),
            Err(error) => {
                drop(registers);
                tracing::warn!(device = self.device.name(), %error, "the guest's driver set up a queue wrongly; the device needs a reset");
                crate::device::Signals::needs_reset(&*self.shared);
            }
        }
    }

    /// Performs the access that the window in configuration space asks for (section 4.1.4.9).
    fn window(&self, write: bool) {
        let mut config = self.config();
        let Some((offset, len)) = self.layout.window(&config) else {
            return;
        };
        let mut data = [0; 4];
        let at = self.layout.pci_cfg + PCI_CFG_DATA;
        if write {
            config.read(at, &mut data[..len]);
            drop(config);
            self.bar_write(offset, &data[..len]);
        } else {
            drop(config);
            self.bar_read(offset, &mut data[..len]);
            config = self.config();
            config.write(at, &data[..len]);
        }
    }

    /// The driver's view of the status register.
    fn status(&self, registers: &Registers) -> u8 {
        registers.status(self.shared.resetting(), self.shared.needs_reset.load(Ordering::SeqCst))
    }
}

fn overlaps(offset: usize, len: usize, start: usize, size: usize) -> bool {
    offset < start + size && start < offset.saturating_add(len)
}

impl PciFunction for VirtioPci {
    fn name(&self) -> String {
        self.device.name().into()
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if overlaps(offset, data.len(), self.layout.pci_cfg + PCI_CFG_DATA, 4) {
            self.window(false);
        }
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) -> bool {
        let control = {
            let mut config = self.config();
            config.write(offset, data);
            config.u16(self.layout.msix + 2)
        };
        if overlaps(offset, data.len(), self.layout.msix + 2, 2) {
            self.shared.msix.set_control(control);
        }
        if overlaps(offset, data.len(), self.layout.pci_cfg + PCI_CFG_DATA, 4) {
            self.window(true);
        }
        overlaps(offset, data.len(), COMMAND, 2) || overlaps(offset, data.len(), BAR0, 8)
    }

    fn bar_size(&self) -> u64 {
        capabilities::BAR_SIZE
    }

    fn set_bar_address(&self, address: u64) {
        self.config().set_bar_address(address);
    }

    fn decoded_bar(&self) -> Option<u64> {
        self.config().decoded_bar()
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = COMMON.contains(offset) {
            self.common_read(at, data);
        } else if ISR.contains(offset) == Some(0) {
            // An access of no bytes reads, and so clears, nothing.
            if let Some(first) = data.first_mut() {
                *first = self.shared.isr.swap(0, Ordering::SeqCst);
            }
        } else if let Some(at) = DEVICE.contains(offset) {
            self.device.config_read(at, data);
        } else if let Some(at) = MSIX_TABLE.contains(offset) {
            self.shared.msix.table_read(at, data);
        } else if let Some(at) = MSIX_PBA.contains(offset) {
            self.shared.msix.pba_read(at, data);
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = NOTIFY.contains(offset) {
            let queue = at / NOTIFY_MULTIPLIER as usize;
            if queue < self.device.queue_sizes().len() {
                self.device.queues().kick(queue as u16);
            }
        } else if let Some(at) = COMMON.contains(offset) {
            self.common_write(at, data);
        } else if let Some(at) = MSIX_TABLE.contains(offset) {
            self.shared.msix.table_write(at, data);
        }
    }

    fn doorbells(&self) -> Option<(u64, u64)> {
        Some((NOTIFY.offset, NOTIFY.len))
    }

    fn pause(&self) -> Result<()> {
        let rings = self.device.queues().pause()?;
        *self.paused() = Some(rings);
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        *self.paused() = None;
        self.device.queues().resume()
    }

    fn save(&self) -> Result<FunctionState> {
        let rings = self.paused().clone().ok_or_else(|| Error::NotPaused(self.name()))?;
        let registers = self.registers();
        let needs_reset = self.shared.needs_reset.load(Ordering::SeqCst);
        Ok(FunctionState::Virtio(Box::new(VirtioPciState {
            version: STATE_VERSION,
            config: self.config().save(),
            msix: self.shared.msix.save(),
            common: registers.save(&self.shared, needs_reset),
            rings,
            device: self.device.save(),
        })))
    }

    fn restore(&self, state: &FunctionState) -> Result<()> {
        let FunctionState::Virtio(state) = state else {
            return Err(Error::bad_state(self.name(), "it belongs to the host bridge"));
        };
        if state.version != STATE_VERSION || state.rings.iter().any(|r| r.version != RingState::VERSION) {
            return Err(Error::bad_state(self.name(), "it has another version"));
        }
        self.device.restore(&state.device)?;
        self.pause()?;
        let mut registers = self.registers();
        self.reset(&mut registers);
        self.config().restore(&state.config)?;
        self.shared.msix.restore(&state.msix)?;
        let needs_reset = registers.restore(&state.common, &self.shared)?;
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
        if registers.running() && !needs_reset {
            let rings = self
                .rings(&registers, &state.rings)
                .map_err(|error| Error::bad_state(self.name(), error.to_string()))?;
            self.activate(&registers, rings);
        }
        drop(registers);
        self.pause()
    }

    fn request_stop(&self) {
        self.device.queues().request_stop();
    }

    fn stop(&self) {
        self.device.queues().stop();
    }
}
