//! Bus 0 as the machine sees it.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bar::WindowAllocator;
use super::decode::{DecodeMap, Decoded};
use super::function::PciFunction;
use super::host_bridge::HostBridge;
use crate::error::{Error, Result};
use crate::state::{PciRootState, SlotState};

/// Bytes of ECAM that bus 0 takes.
pub const ECAM_SIZE: u64 = 1 << 20;
const FUNCTION_SHIFT: u64 = 12;
const DEVICE_SHIFT: u64 = 15;
const MAX_DEVICES: usize = 32;
const STATE_VERSION: u32 = 1;

/// The PCI root: host bridge at 00:00.0, devices at 00:01.0 and up, function 0 of each. All
/// methods take `&self` and may be called by any thread; accesses never wait for a device.
pub struct PciRoot {
    functions: RwLock<Vec<Arc<dyn PciFunction>>>,
    decode: RwLock<DecodeMap>,
    /// Serialises rebuilding `decode`, so that an older view never replaces a newer one.
    rebuild: Mutex<()>,
    window: Mutex<WindowAllocator>,
}

impl PciRoot {
    /// A root whose BARs are first placed in `window` (guest-physical addresses below 4 GiB).
    pub fn new(window: Range<u64>) -> Self {
        PciRoot {
            functions: RwLock::new(vec![Arc::new(HostBridge::default())]),
            decode: RwLock::new(DecodeMap::default()),
            rebuild: Mutex::new(()),
            window: Mutex::new(WindowAllocator::new(window)),
        }
    }

    /// Attaches `function` at the next device number, which it returns, and places its BAR. The
    /// guest switches decoding on.
    ///
    /// # Errors
    /// [`Error::BusFull`], [`Error::WindowFull`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<u8> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if functions.len() == MAX_DEVICES {
            return Err(Error::BusFull);
        }
        let size = function.bar_size();
        if size > 0 {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            function.set_bar_address(window.take(size)?);
        }
        functions.push(function);
        Ok((functions.len() - 1) as u8)
    }

    /// Reads configuration space at `offset` of bus 0's ECAM. What is not there reads as ones.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        match self.at(offset, data.len()) {
            Some((function, register)) => function.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space at `offset` of bus 0's ECAM.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.at(offset, data.len()) {
            if function.config_write(register, data) {
                self.rebuild_decode();
            }
        }
    }

    /// Reads `data.len()` bytes at guest-physical address `gpa`; false if no device answers.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        match self.decoded(gpa, data.len()) {
            Some((function, offset)) => {
                function.bar_read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes `data` at guest-physical address `gpa`; false if no device answers.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        match self.decoded(gpa, data.len()) {
            Some((function, offset)) => {
                function.bar_write(offset, data);
                true
            }
            None => false,
        }
    }

    /// Whether a write to `gpa` only rings a doorbell: the writer need not wait for it.
    pub fn is_doorbell(&self, gpa: u64) -> bool {
        let decode = self.decode.read().unwrap_or_else(PoisonError::into_inner);
        decode.find(gpa, 1).is_some_and(|d| d.doorbells.contains(&gpa))
    }

    /// All addresses for which [`Self::is_doorbell`] holds now, for nodes that forward accesses.
    pub fn doorbells(&self) -> Vec<Range<u64>> {
        let decode = self.decode.read().unwrap_or_else(PoisonError::into_inner);
        decode
            .iter()
            .map(|d| d.doorbells.clone())
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// Brings every device to rest; waits. Not from a vCPU thread.
    ///
    /// # Errors
    /// [`Error::Stopped`]; the devices before it stay paused.
    pub fn pause(&self) -> Result<()> {
        self.functions().iter().try_for_each(|f| f.pause())
    }

    /// Lets every paused device work again.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn resume(&self) -> Result<()> {
        self.functions().iter().try_for_each(|f| f.resume())
    }

    /// State of all functions; they must be paused.
    ///
    /// # Errors
    /// [`Error::NotPaused`].
    pub fn save(&self) -> Result<PciRootState> {
        let slots = self
            .functions()
            .iter()
            .enumerate()
            .map(|(device, function)| {
                Ok(SlotState {
                    device: device as u8,
                    function: function.save()?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(PciRootState {
            version: STATE_VERSION,
            slots,
        })
    }

    /// Takes saved state over into the same devices, attached in the same order. They are paused
    /// afterwards: [`Self::resume`] once guest memory is there.
    ///
    /// # Errors
    /// [`Error::BadState`] if the state is of other devices.
    pub fn restore(&self, state: &PciRootState) -> Result<()> {
        const OBJECT: &str = "PCI bus 0";
        if state.version != STATE_VERSION {
            let reason = format!("version {} is not {STATE_VERSION}", state.version);
            return Err(Error::bad_state(OBJECT, reason));
        }
        let functions = self.functions();
        if functions.len() != state.slots.len() {
            let reason = format!("{} devices instead of {}", state.slots.len(), functions.len());
            return Err(Error::bad_state(OBJECT, reason));
        }
        for (device, (function, slot)) in functions.iter().zip(&state.slots).enumerate() {
            if usize::from(slot.device) != device {
                let reason = format!("device {} at place {device}", slot.device);
                return Err(Error::bad_state(OBJECT, reason));
            }
            function.restore(&slot.function)?;
        }
        self.rebuild_decode();
        Ok(())
    }

    /// Asks every device's threads to end; returns at once. From here on nothing a device reads
    /// from guest memory reaches a disk or a network, so blocked touches of guest memory may
    /// then be ended with whatever content.
    pub fn request_stop(&self) {
        self.functions().iter().for_each(|f| f.request_stop());
    }

    /// [`Self::request_stop`], then waits until all device threads have ended. After it nothing
    /// is written to any disk.
    pub fn stop(&self) {
        self.request_stop();
        self.functions().iter().for_each(|f| f.stop());
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The function and register of a configuration access that stays within one function.
    fn at(&self, offset: u64, len: usize) -> Option<(Arc<dyn PciFunction>, usize)> {
        let end = offset.checked_add(len as u64)?;
        let register = (offset & ((1 << FUNCTION_SHIFT) - 1)) as usize;
        let function = (offset >> FUNCTION_SHIFT) & 7;
        if end > ECAM_SIZE || function != 0 || register + len > 1 << FUNCTION_SHIFT {
            return None;
        }
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let function = functions.get((offset >> DEVICE_SHIFT) as usize)?;
        Some((function.clone(), register))
    }

    fn decoded(&self, gpa: u64, len: usize) -> Option<(Arc<dyn PciFunction>, u64)> {
        let (index, offset) = {
            let decode = self.decode.read().unwrap_or_else(PoisonError::into_inner);
            let found = decode.find(gpa, len)?;
            (found.function, gpa - found.range.start)
        };
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(index).map(|f| (f.clone(), offset))
    }

    fn rebuild_decode(&self) {
        let _one_at_a_time = self.rebuild.lock().unwrap_or_else(PoisonError::into_inner);
        let decoded = self
            .functions()
            .iter()
            .enumerate()
            .filter_map(|(index, function)| {
                let base = function.decoded_bar()?;
                let (offset, len) = function.doorbells().unwrap_or((0, 0));
                Some(Decoded {
                    range: base..base + function.bar_size(),
                    function: index,
                    doorbells: base + offset..base + offset + len,
                })
            })
            .collect();
        let map = DecodeMap::new(decoded);
        *self.decode.write().unwrap_or_else(PoisonError::into_inner) = map;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_bus_has_its_bridge_and_reads_ones_elsewhere() {
        let root = PciRoot::new(0xC000_0000..0xE000_0000);
        let mut id = [0; 4];
        root.config_read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x0008_1b36);
        for absent in [
            1 << DEVICE_SHIFT,
            1 << FUNCTION_SHIFT,
            ECAM_SIZE - 4,
            ECAM_SIZE,
            u64::MAX,
        ] {
            root.config_read(absent, &mut id);
            assert_eq!(id, [0xff; 4], "offset {absent:#x}");
            root.config_write(absent, &[0; 4]);
        }
        assert!(!root.mmio_read(0xC000_0000, &mut id));
        assert!(!root.is_doorbell(0xC000_0000));
    }

    #[test]
    fn the_bus_has_31_devices() {
        let root = PciRoot::new(0xC000_0000..0xE000_0000);
        for device in 1..32 {
            assert_eq!(root.add(Arc::new(HostBridge::default())).unwrap(), device);
        }
        let full = root.add(Arc::new(HostBridge::default()));
        assert!(matches!(full, Err(Error::BusFull)));
    }
}
