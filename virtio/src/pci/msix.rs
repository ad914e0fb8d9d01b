//! MSI-X (PCI Local Bus 3.0, section 6.8.2): table, pending bits, and the two levels of masks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::interrupt::MsiSink;

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bits of message control (capability offset 2) that a guest writes: enable and function mask.
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK_ALL;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_SIZE: usize = 16;
const ENTRY_MASKED: u32 = 1;

/// One table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control; bit 0 masks.
    pub control: u32,
    /// An interrupt waits for the mask to go.
    pub pending: bool,
}

/// Saved MSI-X state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Layout of this structure.
    pub version: u32,
    /// Message control as last written.
    pub control: u16,
    /// The table.
    pub entries: Vec<Entry>,
}

const STATE_VERSION: u32 = 1;

struct Vectors {
    control: u16,
    entries: Vec<Entry>,
}

impl Vectors {
    fn masked(&self, vector: usize) -> bool {
        self.control & CONTROL_MASK_ALL != 0 || self.entries[vector].control & ENTRY_MASKED != 0
    }

    /// Takes the messages that may go now.
    fn take_ready(&mut self) -> Vec<(u64, u32)> {
        let mut ready = Vec::new();
        if self.control & CONTROL_ENABLE == 0 {
            return ready;
        }
        for vector in 0..self.entries.len() {
            if self.entries[vector].pending && !self.masked(vector) {
                let entry = &mut self.entries[vector];
                entry.pending = false;
                ready.push((entry.address, entry.data));
            }
        }
        ready
    }
}

/// The MSI-X state of one function. Messages are sent after its lock is released.
pub struct Msix {
    vectors: Mutex<Vectors>,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// `count` vectors (1 to 2048), all masked, MSI-X off.
    pub fn new(count: u16, sink: Arc<dyn MsiSink>) -> Self {
        let entry = Entry {
            address: 0,
            data: 0,
            control: ENTRY_MASKED,
            pending: false,
        };
        Msix {
            vectors: Mutex::new(Vectors {
                control: 0,
                entries: vec![entry; usize::from(count)],
            }),
            sink,
        }
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// Whether the guest uses MSI-X.
    pub fn enabled(&self) -> bool {
        self.lock().control & CONTROL_ENABLE != 0
    }

    /// Takes a new value of message control's writable bits.
    pub fn set_control(&self, control: u16) {
        let ready = {
            let mut vectors = self.lock();
            vectors.control = control & CONTROL_WRITABLE;
            vectors.take_ready()
        };
        self.send(ready);
    }

    /// Raises `vector`, or leaves it pending while masked. Vectors that don't exist are ignored.
    pub fn raise(&self, vector: u16) {
        let vector = usize::from(vector);
        let message = {
            let mut vectors = self.lock();
            if vector >= vectors.entries.len() || vectors.control & CONTROL_ENABLE == 0 {
                return;
            }
            if vectors.masked(vector) {
                vectors.entries[vector].pending = true;
                return;
            }
            let entry = &vectors.entries[vector];
            (entry.address, entry.data)
        };
        self.sink.signal(message.0, message.1);
    }

    /// Reads the table; beyond its end is zero.
    pub fn table_read(&self, offset: usize, data: &mut [u8]) {
        let vectors = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i;
            *byte = vectors
                .entries
                .get(at / ENTRY_SIZE)
                .map_or(0, |entry| entry_bytes(entry)[at % ENTRY_SIZE]);
        }
    }

    /// Writes the table. Only aligned 4- and 8-byte accesses are defined; others are ignored.
    pub fn table_write(&self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || offset % data.len() != 0 {
            return;
        }
        let ready = {
            let mut vectors = self.lock();
            for (i, chunk) in data.chunks_exact(4).enumerate() {
                let at = offset + 4 * i;
                let value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
                let Some(entry) = vectors.entries.get_mut(at / ENTRY_SIZE) else {
                    break;
                };
                match at % ENTRY_SIZE {
                    0 => entry.address = (entry.address & !0xffff_ffff) | u64::from(value & !3),
                    4 => {
                        entry.address = (entry.address & 0xffff_ffff) | (u64::from(value) << 32);
                    }
                    8 => entry.data = value,
                    _ => entry.control = value & ENTRY_MASKED,
                }
            }
            vectors.take_ready()
        };
        self.send(ready);
    }

    /// Reads the pending bits; beyond their end is zero.
    pub fn pba_read(&self, offset: usize, data: &mut [u8]) {
        let vectors = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset + i) * 8;
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = vectors.entries.get(first + bit).is_some_and(|e| e.pending);
                bits | (u8::from(pending) << bit)
            });
        }
    }

    /// State to save.
    pub fn save(&self) -> MsixState {
        let vectors = self.lock();
        MsixState {
            version: STATE_VERSION,
            control: vectors.control,
            entries: vectors.entries.clone(),
        }
    }

    /// Takes saved state over. Sends nothing: what is pending goes with the next unmasking.
    ///
    /// # Errors
    /// [`Error::BadState`] if the number of vectors or the layout differs.
    pub fn restore(&self, state: &MsixState) -> Result<()> {
        let mut vectors = self.lock();
        if state.version != STATE_VERSION {
            let reason = format!("version {} is not {STATE_VERSION}", state.version);
            return Err(Error::bad_state("MSI-X", reason));
        }
        if state.entries.len() != vectors.entries.len() {
            let reason = format!("{} vectors", state.entries.len());
            return Err(Error::bad_state("MSI-X", reason));
        }
        vectors.control = state.control & CONTROL_WRITABLE;
        vectors.entries = state.entries.clone();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vectors> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, messages: Vec<(u64, u32)>) {
        for (address, data) in messages {
            self.sink.signal(address, data);
        }
    }
}

fn entry_bytes(entry: &Entry) -> [u8; ENTRY_SIZE] {
    let mut bytes = [0; ENTRY_SIZE];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(u64, u32)>>);

    impl MsiSink for Seen {
        fn signal(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    fn programmed() -> (Arc<Seen>, Msix) {
        let seen = Arc::new(Seen::default());
        let msix = Msix::new(3, seen.clone());
        msix.table_write(16, &0xFEE0_1000u64.to_le_bytes());
        msix.table_write(24, &(0x41u64).to_le_bytes());
        (seen, msix)
    }

    #[test]
    fn a_masked_vector_is_pending_and_goes_when_unmasked() {
        let (seen, msix) = programmed();
        msix.raise(1);
        assert!(seen.0.lock().unwrap().is_empty(), "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.raise(1);
        let mut pending = [0];
        msix.pba_read(0, &mut pending);
        assert_eq!(pending, [0b10]);
        msix.table_write(28, &1u32.to_le_bytes());
        msix.set_control(CONTROL_ENABLE);
        assert!(seen.0.lock().unwrap().is_empty(), "the entry is masked");
        msix.table_write(28, &0u32.to_le_bytes());
        msix.raise(1);
        msix.raise(7);
        let want = vec![(0xFEE0_1000, 0x41); 2];
        assert_eq!(*seen.0.lock().unwrap(), want);
    }

    #[test]
    fn any_access_is_harmless() {
        let (_, msix) = programmed();
        for offset in 0..100 {
            for width in 0..17 {
                let mut data = vec![0xff; width];
                msix.table_write(offset, &data);
                msix.table_read(offset, &mut data);
                msix.pba_read(offset, &mut data);
            }
        }
        let mut low = [0; 4];
        msix.table_read(0, &mut low);
        assert_eq!(low, [0xfc, 0xff, 0xff, 0xff], "bits 1:0 of an address are zero");
    }

    #[test]
    fn state_comes_back() {
        let (seen, msix) = programmed();
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.raise(1);
        let state = msix.save();
        let other = Msix::new(3, seen.clone());
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        other.set_control(CONTROL_ENABLE);
        assert_eq!(*seen.0.lock().unwrap(), [(0xFEE0_1000, 0x41)]);
        assert!(Msix::new(2, seen).restore(&state).is_err());
    }
}
