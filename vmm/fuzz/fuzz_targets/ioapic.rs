//! Any sequence of accesses and edges: the IOAPIC keeps its 24 pins and sends no message that a
//! guest may not send.
#![no_main]

use krg_vmm::machine::{Event, Ioapic};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let ioapic = Ioapic::default();
    for step in data.chunks_exact(8) {
        let (offset, size) = (u64::from(step[1]), step[2]);
        let value = u32::from_le_bytes([step[4], step[5], step[6], step[7]]);
        match step[0] % 3 {
            0 => drop(ioapic.read(offset, size)),
            1 => ioapic.write(offset, size, value),
            _ => {
                if let Some(message) = ioapic.edge(value) {
                    assert!(value < 24);
                    assert!(!matches!(message.event, Event::Sipi(_) | Event::Fixed(0..16)));
                }
            }
        }
    }
    assert_eq!(ioapic.save().entries.len(), 24);
    assert!(Ioapic::default().restore(ioapic.save()).is_ok());
});
