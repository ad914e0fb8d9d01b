//! The IOAPIC (Intel 82093AA): pins to messages, in user space because its targets may run on
//! other hosts.
//!
//! All sources of this machine are edge-triggered, so a pin has no level to hold, remote IRR stays
//! clear, and no EOI has to come back. An edge on a masked pin is lost, as on the real part.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::error::MachineError;
use super::layout::{IOAPIC_PINS, LAPIC_BASE};
use super::msi::{self, Message};

/// Register select, offset from the base.
const IOREGSEL: u64 = 0x00;
/// Data window.
const IOWIN: u64 = 0x10;
/// Redirection entry: masked.
const MASKED: u64 = 1 << 16;
/// Bits of an entry the guest can't write: delivery status, remote IRR and the reserved ones.
const READ_ONLY: u64 = 1 << 12 | 1 << 14 | 0x0001_ffff_fffe_0000;
/// Version 0x11: no EOI register.
const VERSION: u32 = 0x11 | (IOAPIC_PINS - 1) << 16;

/// State of the IOAPIC; also its saved form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Layout of this structure: [`IoapicState::VERSION`].
    pub version: u32,
    /// Selected register.
    pub select: u8,
    /// Identification, bits 27-24.
    pub id: u32,
    /// Redirection table, one entry a pin.
    pub entries: Vec<u64>,
}

impl IoapicState {
    /// Layout written by this program.
    pub const VERSION: u32 = 1;
}

/// The IOAPIC.
pub struct Ioapic(Mutex<IoapicState>);

impl Default for Ioapic {
    fn default() -> Self {
        Ioapic(Mutex::new(IoapicState {
            version: IoapicState::VERSION,
            select: 0,
            id: 0,
            entries: vec![MASKED; IOAPIC_PINS as usize],
        }))
    }
}

impl Ioapic {
    /// Reads `size` bytes at `offset` from the base. Only aligned 32-bit accesses are defined;
    /// everything else reads 0.
    pub fn read(&self, offset: u64, size: u8) -> u32 {
        if size < 4 {
            return 0;
        }
        let state = self.lock();
        match offset {
            IOREGSEL => u32::from(state.select),
            IOWIN => state.register(),
            _ => 0,
        }
    }

    /// Writes `size` bytes at `offset` from the base; what is not an aligned 32-bit write to a
    /// register is ignored.
    pub fn write(&self, offset: u64, size: u8, value: u32) {
        if size < 4 {
            return;
        }
        let mut state = self.lock();
        match offset {
            IOREGSEL => state.select = value as u8,
            IOWIN => state.set_register(value),
            _ => {}
        }
    }

    /// A rising edge on `pin`: the message to send, if the guest wants one.
    pub fn edge(&self, pin: u32) -> Option<Message> {
        let entry = *self.lock().entries.get(pin as usize)?;
        if entry & MASKED != 0 {
            return None;
        }
        // Bits 63-56 are the destination, 55-49 its extension (KVM_FEATURE_MSI_EXT_DEST_ID).
        let address = LAPIC_BASE | (entry >> 56) << 12 | (entry >> 49 & 0x7f) << 5 | (entry >> 11 & 1) << 2;
        msi::decode(address, (entry & 0x7ff) as u32)
    }

    /// The state as of now.
    pub fn save(&self) -> IoapicState {
        self.lock().clone()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// When it has another layout or another number of pins.
    pub fn restore(&self, saved: IoapicState) -> Result<(), MachineError> {
        if saved.version != IoapicState::VERSION || saved.entries.len() != IOAPIC_PINS as usize {
            let reason = format!(
                "version {} with {} pins is not known here",
                saved.version,
                saved.entries.len()
            );
            return Err(MachineError::State {
                object: "IOAPIC".into(),
                reason,
            });
        }
        *self.lock() = saved;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, IoapicState> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl IoapicState {
    /// Pin and half (`true`: upper) of the selected redirection register.
    fn selected(&self) -> Option<(usize, bool)> {
        let index = usize::from(self.select).checked_sub(0x10)?;
        (index / 2 < self.entries.len()).then_some((index / 2, index % 2 == 1))
    }

    fn register(&self) -> u32 {
        match (self.select, self.selected()) {
            (0 | 2, _) => self.id,
            (1, _) => VERSION,
            (_, Some((pin, false))) => self.entries[pin] as u32,
            (_, Some((pin, true))) => (self.entries[pin] >> 32) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.select == 0 {
            self.id = value & 0x0f00_0000;
        } else if let Some((pin, upper)) = self.selected() {
            let old = self.entries[pin];
            let new = match upper {
                false => old & !0xffff_ffff | u64::from(value),
                true => old & 0xffff_ffff | u64::from(value) << 32,
            };
            self.entries[pin] = new & !READ_ONLY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fabric::Event;
    use crate::machine::msi::Destination;

    fn program(ioapic: &Ioapic, register: u32, value: u32) {
        ioapic.write(IOREGSEL, 4, register);
        ioapic.write(IOWIN, 4, value);
    }

    fn register(ioapic: &Ioapic, register: u32) -> u32 {
        ioapic.write(IOREGSEL, 4, register);
        ioapic.read(IOWIN, 4)
    }

    #[test]
    fn pins_start_masked_and_send_what_is_programmed() {
        let ioapic = Ioapic::default();
        assert_eq!(ioapic.edge(4), None);
        program(&ioapic, 0x19, 3 << 24 | 1 << 17);
        program(&ioapic, 0x18, 0x31);
        let message = ioapic.edge(4).unwrap();
        assert_eq!(
            (message.destination, message.event),
            (Destination::Physical(0x103), Event::Fixed(0x31))
        );
        program(&ioapic, 0x18, 0x1_0031);
        assert_eq!(ioapic.edge(4), None);
        assert_eq!(ioapic.edge(24), None, "no such pin");
    }

    #[test]
    fn registers_read_as_the_real_part() {
        let ioapic = Ioapic::default();
        assert_eq!(register(&ioapic, 1), 0x0017_0011);
        program(&ioapic, 0x10, 0xffff_ffff);
        assert_eq!(
            register(&ioapic, 0x10),
            0x0001_afff,
            "status bits and reserved bits stay clear"
        );
        assert_eq!(register(&ioapic, 0x40), 0, "beyond the last pin");
        program(&ioapic, 0x40, 1);
        ioapic.write(IOWIN, 1, 0xff);
        assert_eq!(ioapic.read(IOWIN, 1), 0);
    }

    #[test]
    fn state_survives_save_and_restore() {
        let ioapic = Ioapic::default();
        program(&ioapic, 0x18, 0x31);
        let other = Ioapic::default();
        other.restore(ioapic.save()).unwrap();
        assert_eq!(other.save(), ioapic.save());
        let short = IoapicState {
            entries: vec![],
            ..ioapic.save()
        };
        assert!(other.restore(short).is_err());
    }

    /// Any sequence of accesses leaves a table of 24 entries without read-only bits.
    #[test]
    fn random_accesses_keep_the_invariants() {
        let ioapic = Ioapic::default();
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        for _ in 0..20_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let (offset, size) = (seed >> 8 & 0x1c, 1 << (seed >> 16 & 3));
            match seed & 3 {
                0 => drop(ioapic.read(offset, size)),
                1 => drop(ioapic.edge((seed >> 32) as u32 & 31)),
                _ => ioapic.write(offset, size, (seed >> 32) as u32),
            }
        }
        let state = ioapic.save();
        assert_eq!(state.entries.len(), 24);
        assert!(state.entries.iter().all(|entry| entry & READ_ONLY == 0));
    }
}
