//! Node 0's devices by address: what answers an [`Access`].

use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use super::error::MachineError;
use super::fabric::{Access, DeviceBus, Direction, End, Space};
use super::ioapic::Ioapic;
use super::layout::{COM1_GSI, COM1_PORTS, ECAM, IOAPIC, PCI_WINDOW, REGISTERS};
use super::msi::Interrupts;
use super::power;
use super::rtc::{DATA_PORT, INDEX_PORT, Rtc};
use super::serial::Com1;
use super::state::DeviceState;

/// The counter of the PIT that there is none of. Linux on AMD loads it with all ones and measures its TSC by it,
/// whatever else it knows: a counter that stays at all ones is read 100,000 times, one at zero a few times.
const PIT_COUNTER_2: u16 = 0x42;

/// The devices of node 0.
pub struct Bus {
    pub(crate) com1: Com1,
    pub(crate) rtc: Rtc,
    pub(crate) ioapic: Ioapic,
    pub(crate) interrupts: Arc<Interrupts>,
    /// PCI; set once before the vCPUs start.
    pub(crate) devices: OnceLock<Arc<dyn DeviceBus>>,
    pub(crate) ends: Sender<End>,
}

/// Whether a write to `gpa` may be posted: PCI memory writes are (PCIe base spec 2.4), nothing
/// else is. Drivers read back where they need it done.
pub fn is_posted(space: Space, address: u64) -> bool {
    space == Space::Memory && PCI_WINDOW.contains(&address)
}

impl Bus {
    /// Carries out `access`; returns the value read (all ones where nothing answers, but for the PIT), 0 for writes.
    /// Takes any input: addresses and sizes may come from a peer.
    pub fn access(&self, access: Access) -> u64 {
        let size = access.size.clamp(1, 8);
        match (access.space, access.direction) {
            (Space::Port, Direction::Read) => self.port_read(access.address, size),
            (Space::Memory, Direction::Read) => self.memory_read(access.address, size),
            (Space::Port, Direction::Write(value) | Direction::Posted(value)) => {
                self.port_write(access.address, size, value);
                0
            }
            (Space::Memory, Direction::Write(value) | Direction::Posted(value)) => {
                self.memory_write(access.address, size, value);
                0
            }
        }
    }

    /// Types on the console; returns how many bytes were taken.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let (taken, interrupt) = self.com1.type_in(bytes);
        self.console_interrupt(interrupt);
        taken
    }

    /// A wider access to byte-wide ports is one of each byte, lowest first.
    fn port_read(&self, port: u64, size: u8) -> u64 {
        (0..size).fold(0, |value, i| {
            value | u64::from(self.port_read_byte(port.wrapping_add(i.into()))) << (8 * i)
        })
    }

    fn port_read_byte(&self, port: u64) -> u8 {
        match u16::try_from(port) {
            Ok(port) if COM1_PORTS.contains(&port) => {
                let (value, interrupt) = self.com1.read((port - COM1_PORTS.start) as u8);
                self.console_interrupt(interrupt);
                value
            }
            Ok(DATA_PORT) => self.rtc.read(),
            Ok(PIT_COUNTER_2) => 0,
            _ => 0xff,
        }
    }

    fn port_write(&self, port: u64, size: u8, value: u64) {
        // Only a byte access reaches a reset port: 0xcf9 lies within the doubleword 0xcf8, to which
        // Linux writes PCI configuration addresses.
        if let (1, Ok(port)) = (size, u16::try_from(port)) {
            if let Some(end) = power::port_write(port, value as u8) {
                return self.end(end);
            }
        }
        for i in 0..size {
            let byte = (value >> (8 * i)) as u8;
            let Ok(port) = u16::try_from(port.wrapping_add(i.into())) else {
                continue;
            };
            if COM1_PORTS.contains(&port) {
                let interrupt = self.com1.write((port - COM1_PORTS.start) as u8, byte);
                self.console_interrupt(interrupt);
            } else if port == INDEX_PORT {
                self.rtc.select(byte);
            }
        }
    }

    fn memory_read(&self, gpa: u64, size: u8) -> u64 {
        if IOAPIC.contains(&gpa) {
            return u64::from(self.ioapic.read(gpa - IOAPIC.start, size));
        }
        if REGISTERS.contains(&gpa) {
            return 0;
        }
        let mut bytes = [0xff; 8];
        if let Some(devices) = self.pci(gpa) {
            let mut data = [0xff; 8];
            if devices.read(gpa, &mut data[..size.into()]) {
                bytes = data;
            }
        }
        u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * u32::from(size)))
    }

    fn memory_write(&self, gpa: u64, size: u8, value: u64) {
        if IOAPIC.contains(&gpa) {
            self.ioapic.write(gpa - IOAPIC.start, size, value as u32);
        } else if REGISTERS.contains(&gpa) {
            if let Some(end) = power::register_write(gpa - REGISTERS.start, value as u8) {
                self.end(end);
            }
        } else if let Some(devices) = self.pci(gpa) {
            devices.write(gpa, &value.to_le_bytes()[..size.into()]);
        }
    }

    /// The state of the devices that live here.
    pub fn save(&self) -> DeviceState {
        DeviceState {
            com1: self.com1.save(),
            ioapic: self.ioapic.save(),
            rtc_index: self.rtc.index(),
        }
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// When it isn't one of these devices.
    pub fn restore(&self, saved: &DeviceState) -> Result<(), MachineError> {
        self.com1.restore(&saved.com1)?;
        self.ioapic.restore(saved.ioapic.clone())?;
        self.rtc.select(saved.rtc_index);
        Ok(())
    }

    fn pci(&self, gpa: u64) -> Option<&Arc<dyn DeviceBus>> {
        (ECAM.contains(&gpa) || PCI_WINDOW.contains(&gpa))
            .then(|| self.devices.get())
            .flatten()
    }

    fn console_interrupt(&self, wanted: bool) {
        if let Some(message) = wanted.then(|| self.ioapic.edge(COM1_GSI)).flatten() {
            self.interrupts.send(message);
        }
    }

    fn end(&self, end: End) {
        // The receiver is gone when the machine is ending already.
        let _ = self.ends.send(end);
    }
}
