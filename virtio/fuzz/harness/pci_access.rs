//! Performs arbitrary accesses on a bus: configuration space, BAR, guest memory, pause, save and
//! restore.

use std::cell::RefCell;

use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, ECAM_SLOT, MEMORY, WINDOW};

const OP: usize = 12;

thread_local! {
    /// One bus for all inputs: what may be changed is set back before each.
    static BUS: RefCell<Bus> = RefCell::new(Bus::new());
}

pub fn run(data: &[u8]) {
    BUS.with_borrow(|bus| {
        reset(bus);
        for op in data.chunks_exact(OP).take(200) {
            access(bus, op);
        }
        let mut identity = [0; 4];
        bus.root.config_read(ECAM_SLOT, &mut identity);
        assert_eq!(u32::from_le_bytes(identity), 0x1042_1af4);
    });
}

fn reset(bus: &Bus) {
    bus.root.config_write(ECAM_SLOT + 4, &6u16.to_le_bytes());
    bus.root.config_write(ECAM_SLOT + 0x10, &WINDOW.to_le_bytes());
    assert!(bus.root.mmio_write(WINDOW + 0x14, &[0]));
    bus.root.resume().unwrap();
}

/// One access: kind, width, offset (4 bytes), value (6 bytes, repeated).
fn access(bus: &Bus, op: &[u8]) {
    let width = usize::from(op[1] % 18);
    let offset = u64::from(u32::from_le_bytes([op[2], op[3], op[4], op[5]]));
    let mut data: Vec<u8> = op[6..].iter().copied().cycle().take(width).collect();
    let root = &bus.root;
    match op[0] % 11 {
        0 => root.config_write(offset, &data),
        1 => root.config_read(offset, &mut data),
        2 => root.config_write(ECAM_SLOT + offset % 0x110, &data),
        3 => root.config_read(ECAM_SLOT + offset % 0x110, &mut data),
        4 => {
            root.mmio_write(offset, &data);
        }
        5 => {
            root.mmio_read(offset, &mut data);
        }
        6 => {
            root.mmio_write(WINDOW + offset % 0x8008, &data);
        }
        7 => {
            root.mmio_read(WINDOW + offset % 0x8008, &mut data);
        }
        8 => {
            let doorbell = root.is_doorbell(offset);
            let listed = root.doorbells().iter().any(|range| range.contains(&offset));
            assert_eq!(doorbell, listed);
        }
        9 => {
            // What the device finds, wherever its queue is set up.
            let place = GuestAddress(offset % (MEMORY as u64 - 18));
            bus.memory.write_slice(&data, place).unwrap();
        }
        _ => {
            root.pause().unwrap();
            let state = root.save().unwrap();
            root.restore(&state).unwrap();
            assert_eq!(root.save().unwrap(), state);
            root.resume().unwrap();
        }
    }
}
