//! The type 0 configuration header of one function (PCI Local Bus 3.0, chapter 6): a register
//! file of 256 bytes with a mask of writable bits, one 64-bit memory BAR and capabilities.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes of a conventional function's configuration space; ECAM offsets above read as zero.
pub const CONFIG_SIZE: usize = 256;

/// Command register.
pub const COMMAND: usize = 0x04;
/// Command register: memory space enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// First BAR.
pub const BAR0: usize = 0x10;
const BAR_MEMORY_64: u8 = 0b100;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// What identifies a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class and programming interface, as in bits 31:8 of register 8.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Configuration registers of one function. Accesses of any width at any offset are total: what
/// lies outside reads as zero and ignores writes.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bar_size: u64,
    last_capability: Option<usize>,
    next_capability: usize,
}

/// Saved registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// Layout of this structure.
    pub version: u32,
    /// All 256 bytes.
    pub bytes: Vec<u8>,
}

const STATE_VERSION: u32 = 1;

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(id: Identity) -> Self {
        let mut config = ConfigSpace {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bar_size: 0,
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        config.set(0x00, &id.vendor.to_le_bytes());
        config.set(0x02, &id.device.to_le_bytes());
        config.set(0x08, &[id.revision]);
        config.set(0x09, &id.class.to_le_bytes()[..3]);
        config.set(0x2c, &id.subsystem_vendor.to_le_bytes());
        config.set(0x2e, &id.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        config.set_writable(COMMAND, &command.to_le_bytes());
        // Cache line size and latency timer have no effect but keep what is written; so does
        // the interrupt line, although no interrupt pin is used.
        config.set_writable(0x0c, &[0xff]);
        config.set_writable(0x0d, &[0xff]);
        config.set_writable(0x3c, &[0xff]);
        config
    }

    /// Makes BAR 0/1 a 64-bit, not prefetchable memory BAR of `size` bytes: a power of two from
    /// 16 bytes to 2 GiB.
    pub fn set_bar(&mut self, size: u64) {
        debug_assert!(size.is_power_of_two() && (16..=1 << 31).contains(&size));
        self.bar_size = size;
        self.set(BAR0, &[BAR_MEMORY_64]);
        // Address bits below the size are hardwired to zero: that is how a guest sizes it.
        self.set_writable(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Size of the memory BAR in bytes, 0 without one.
    pub fn bar_size(&self) -> u64 {
        self.bar_size
    }

    /// Places the BAR.
    pub fn set_bar_address(&mut self, address: u64) {
        let value = (address & !(self.bar_size - 1)) | u64::from(BAR_MEMORY_64);
        self.set(BAR0, &value.to_le_bytes());
    }

    /// Where the BAR is decoded now; `None` while memory decoding is off.
    pub fn decoded_bar(&self) -> Option<u64> {
        if self.bar_size == 0 || self.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let mut value = [0; 8];
        self.read(BAR0, &mut value);
        let base = u64::from_le_bytes(value) & !0xf;
        // A BAR that reaches past the end of the address space decodes nothing.
        base.checked_add(self.bar_size).map(|_| base)
    }

    /// Appends a capability: `body` follows the id and next pointer. `writable` masks `body`'s
    /// bits. Returns its offset, or `None` if the 192 bytes for capabilities are used up.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        if end > CONFIG_SIZE {
            return None;
        }
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.set_writable(offset + 2, writable);
        let link = match self.last_capability {
            Some(last) => last + 1,
            None => CAPABILITY_POINTER,
        };
        self.set(link, &[offset as u8]);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        self.last_capability = Some(offset);
        self.next_capability = end.next_multiple_of(4);
        Some(offset)
    }

    /// Reads from `offset`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset
                .checked_add(i)
                .and_then(|at| self.bytes.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// Writes what is writable of `data` at `offset`.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(i).filter(|at| *at < CONFIG_SIZE) else {
                return;
            };
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
    }

    /// A 16-bit register.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut value = [0; 2];
        self.read(offset, &mut value);
        u16::from_le_bytes(value)
    }

    /// A 32-bit register.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut value = [0; 4];
        self.read(offset, &mut value);
        u32::from_le_bytes(value)
    }

    /// Registers to save.
    pub fn save(&self) -> ConfigState {
        ConfigState {
            version: STATE_VERSION,
            bytes: self.bytes.to_vec(),
        }
    }

    /// Takes saved registers over; those a guest cannot write must be the same as here.
    ///
    /// # Errors
    /// [`Error::BadState`] if the state is of another function or layout.
    pub fn restore(&mut self, state: &ConfigState) -> Result<()> {
        const OBJECT: &str = "PCI configuration space";
        if state.version != STATE_VERSION {
            let reason = format!("version {} is not {STATE_VERSION}", state.version);
            return Err(Error::bad_state(OBJECT, reason));
        }
        let bytes: [u8; CONFIG_SIZE] = state
            .bytes
            .as_slice()
            .try_into()
            .map_err(|_| Error::bad_state(OBJECT, format!("{} bytes", state.bytes.len())))?;
        for (at, byte) in bytes.iter().enumerate() {
            if (byte ^ self.bytes[at]) & !self.writable[at] != 0 {
                let reason = format!("register {at:#x} belongs to another device");
                return Err(Error::bad_state(OBJECT, reason));
            }
        }
        self.bytes = bytes;
        Ok(())
    }

    fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.set_bar(0x8000);
        config
    }

    #[test]
    fn header_fields_are_where_the_specification_has_them() {
        let config = config();
        assert_eq!(config.u32(0x00), 0x1042_1af4);
        assert_eq!(config.u32(0x08), 0x0180_0001);
        assert_eq!(config.u32(0x2c), 0x1100_1af4);
        assert_eq!(config.u16(0x0e), 0, "type 0, single function");
    }

    #[test]
    fn bar_is_sized_and_moved() {
        let mut config = config();
        config.write(BAR0, &[0xff; 8]);
        assert_eq!(config.u32(BAR0), 0xffff_8004);
        assert_eq!(config.u32(BAR0 + 4), 0xffff_ffff);
        config.write(BAR0, &0xC001_0000u64.to_le_bytes());
        assert_eq!(config.decoded_bar(), None);
        config.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(config.decoded_bar(), Some(0xC001_0000));
        config.write(BAR0, &[0xff; 8]);
        assert_eq!(config.decoded_bar(), None, "would wrap around");
    }

    #[test]
    fn capabilities_are_linked_and_bounded() {
        let mut config = config();
        let first = config.add_capability(9, &[4, 1], &[0, 0]).unwrap();
        let second = config.add_capability(0x11, &[0; 10], &[0; 10]).unwrap();
        assert_eq!(config.u16(STATUS) & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        assert_eq!(config.u16(CAPABILITY_POINTER) & 0xff, first as u16);
        assert_eq!(config.u16(first) >> 8, second as u16);
        assert_eq!(config.u16(second) >> 8, 0);
        while config.add_capability(9, &[0; 30], &[0; 30]).is_some() {}
        assert!(config.next_capability <= CONFIG_SIZE);
    }

    #[test]
    fn read_only_bits_survive_any_write() {
        let mut written = config();
        for offset in 0..CONFIG_SIZE + 8 {
            for width in 0..9 {
                written.write(offset, &vec![0xff; width]);
                written.write(offset, &vec![0; width]);
            }
        }
        written.write(usize::MAX, &[1, 2, 3]);
        let mut fresh = config();
        fresh.write(0, &[0; CONFIG_SIZE]);
        assert_eq!(written.bytes, fresh.bytes);
    }

    #[test]
    fn state_of_another_function_is_refused() {
        let mut config = config();
        let mut state = config.save();
        config.write(0x3c, &[7]);
        config.restore(&state).unwrap();
        assert_eq!(config.save(), state);
        state.bytes[0] ^= 1;
        assert!(config.restore(&state).is_err());
        state.bytes.pop();
        assert!(config.restore(&state).is_err());
    }
}
