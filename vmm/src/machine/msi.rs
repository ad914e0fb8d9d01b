//! Message-signalled interrupts: from an address and data pair to events on vCPUs, wherever they
//! run (Intel SDM vol. 3A, 11.11).

use std::sync::Arc;

use super::fabric::Event;
use super::layout::LAPIC_BASE;
use super::owners::Owners;

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The vCPU with this APIC id.
    Physical(u32),
    /// x2APIC logical id (SDM 11.12.10.2): cluster in bits 31-16, a bit for each of its 16 members.
    Logical(u32),
    /// Every vCPU.
    All,
}

/// A decoded message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// One member of the destination takes it, instead of all.
    pub lowest_priority: bool,
    /// What it raises.
    pub event: Event,
}

/// Decodes a message as a device or the IOAPIC sends it. Address bits 11-5 extend the destination
/// to 15 bits (KVM_FEATURE_MSI_EXT_DEST_ID). `None` when it isn't an interrupt a guest may send
/// this way: wrong address, a reserved delivery mode or vector.
pub fn decode(address: u64, data: u32) -> Option<Message> {
    if address & !0xf_ffff != LAPIC_BASE {
        return None;
    }
    let id = (address >> 12 & 0xff) as u32 | ((address >> 5 & 0x7f) as u32) << 8;
    let destination = match address & 4 != 0 {
        _ if id == 0xff => Destination::All,
        true => Destination::Logical(id),
        false => Destination::Physical(id),
    };
    let vector = data as u8;
    let mode = data >> 8 & 7;
    let event = match mode {
        0 | 1 if vector >= 16 => Event::Fixed(vector),
        4 => Event::Nmi,
        5 => Event::Init,
        _ => return None,
    };
    Some(Message {
        destination,
        lowest_priority: mode == 1,
        event,
    })
}

impl Destination {
    /// Whether the vCPU with APIC id `id` (in x2APIC mode) is addressed.
    pub fn includes(self, id: u32) -> bool {
        match self {
            Destination::All => true,
            Destination::Physical(wanted) => wanted == id,
            Destination::Logical(mda) => mda >> 16 == id >> 4 && mda >> (id & 15) & 1 == 1,
        }
    }
}

/// Raises events on vCPUs: by KVM on those that run here, through the fabric on the others.
pub struct Interrupts {
    owners: Arc<Owners>,
}

impl Interrupts {
    pub(crate) fn new(owners: Arc<Owners>) -> Self {
        Interrupts { owners }
    }

    /// Sends a message as a device would. One that makes no sense is dropped, as hardware does.
    pub fn message(&self, address: u64, data: u32) {
        if let Some(message) = decode(address, data) {
            self.send(message);
        }
    }

    /// Raises a decoded message on its destinations.
    pub fn send(&self, message: Message) {
        if let Destination::Physical(id) = message.destination {
            return self.raise(id, message.event);
        }
        for id in (0..self.owners.count()).filter(|id| message.destination.includes(*id)) {
            self.raise(id, message.event);
            if message.lowest_priority {
                return;
            }
        }
    }

    /// Raises `event` on `vcpu`, wherever it runs. Unknown numbers are dropped.
    pub fn raise(&self, vcpu: u32, event: Event) {
        self.owners.raise(vcpu, event);
    }
}

impl krg_virtio::MsiSink for Interrupts {
    fn signal(&self, address: u64, data: u32) {
        self.message(address, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_and_extended_destinations() {
        let m = decode(0xfee0_5000, 0x4041).unwrap();
        assert_eq!((m.destination, m.event), (Destination::Physical(5), Event::Fixed(0x41)));
        let m = decode(0xfee0_5000 | 1 << 5, 0x41).unwrap();
        assert_eq!(m.destination, Destination::Physical(0x105));
        assert_eq!(decode(0xfeef_f000, 0x41).unwrap().destination, Destination::All);
    }

    #[test]
    fn logical_destinations_are_bits_of_a_cluster() {
        let d = decode(0xfee0_6004, 0x0141).unwrap();
        assert!(d.lowest_priority);
        assert_eq!(
            (0..32).filter(|id| d.destination.includes(*id)).collect::<Vec<_>>(),
            [1, 2]
        );
        assert!(Destination::Logical(0x1_0001).includes(16));
        assert!(!Destination::Logical(0x1_0001).includes(0));
    }

    #[test]
    fn what_no_device_may_send_is_dropped() {
        assert_eq!(decode(0xfed0_0000, 0x41), None);
        assert_eq!(decode(0x1_fee0_0000, 0x41), None);
        assert_eq!(decode(0xfee0_0000, 0x0f), None);
        assert_eq!(decode(0xfee0_0000, 0x0241), None, "SMI");
        assert_eq!(decode(0xfee0_0000, 0x0641), None, "SIPI");
        assert_eq!(decode(0xfee0_0000, 0x0741), None, "ExtINT");
        assert_eq!(decode(0xfee0_0000, 0x4400).unwrap().event, Event::Nmi);
    }
}
