//! Builds a virtqueue out of arbitrary bytes and has a block device serve it.
//!
//! Descriptors are written compactly, 6 bytes each, so that most of them point into guest memory;
//! bits of their flags make the others point anywhere. Requests can reach the rings, too, and make them say
//! what nobody meant, unless the input has those put where no request reaches: then what the device used is
//! counted.

use std::cell::RefCell;

use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, FAR, FAR_LEN, MEMORY, WINDOW};

const DESCRIPTORS: usize = 16;
const COMPACT: usize = 6;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x200;
const INDIRECT: u64 = 0x300;
/// Request headers and data.
const CONTENT: u64 = 0x400;
/// Of the options: the rings are out of reach.
const SAFE_RINGS: u8 = 8;
const HUGE_LEN: u8 = 0x40;
const FAR_ADDRESS: u8 = 0x80;

thread_local! {
    /// One bus for all inputs: the device is reset before each.
    static BUS: RefCell<Bus> = RefCell::new(Bus::new());
}

/// Returns how many chains the device used; `None` if `data` is too short for a queue.
pub fn run(data: &[u8]) -> Option<u16> {
    let (head, rest) = data.split_at_checked(2 + DESCRIPTORS)?;
    Some(BUS.with_borrow(|bus| serve(bus, head, rest)))
}

fn serve(bus: &Bus, head: &[u8], rest: &[u8]) -> u16 {
    let common = |offset: u64, value: &[u8]| {
        assert!(bus.root.mmio_write(WINDOW + offset, value));
    };
    common(0x14, &[0]);
    // The reset is complete once the device rests.
    bus.root.pause().unwrap();
    bus.memory.write_slice(&[0; MEMORY], GuestAddress(0)).unwrap();
    bus.memory.write_slice(&[0; FAR_LEN], GuestAddress(FAR)).unwrap();
    let rest = table(bus, TABLE, rest);
    let rest = table(bus, INDIRECT, rest);
    let len = rest.len().min(MEMORY - CONTENT as usize);
    bus.memory.write_slice(&rest[..len], GuestAddress(CONTENT)).unwrap();
    let (options, available) = (head[0], u16::from(head[1]));
    let rings = if options & SAFE_RINGS != 0 { FAR } else { 0 };
    let (avail, used) = (rings + AVAIL, rings + USED);
    bus.memory.write_obj(available, GuestAddress(avail + 2)).unwrap();
    for (slot, index) in head[2..].iter().enumerate() {
        let place = GuestAddress(avail + 4 + 2 * slot as u64);
        bus.memory.write_obj(u16::from(*index), place).unwrap();
    }

    let features = 1 << 32 | u64::from(options & 1) << 29 | u64::from(options & 2) << 27 | u64::from(options & 4) << 7;
    common(0x14, &[3]);
    for select in 0..2u32 {
        common(8, &select.to_le_bytes());
        common(12, &((features >> (32 * select)) as u32).to_le_bytes());
    }
    common(0x14, &[11]);
    common(0x18, &(DESCRIPTORS as u16).to_le_bytes());
    for (register, address) in [(0x20, TABLE), (0x28, avail), (0x30, used)] {
        common(register, &address.to_le_bytes());
    }
    common(0x1c, &1u16.to_le_bytes());
    bus.root.resume().unwrap();
    common(0x14, &[15]);
    // A device thread serves what is available between any two commands, so it has by the time
    // it rests. Had it panicked, this would fail.
    bus.root.pause().unwrap();
    let used: u16 = bus.memory.read_obj(GuestAddress(used + 2)).unwrap();
    assert!(
        options & SAFE_RINGS == 0 || used <= available.min(DESCRIPTORS as u16),
        "{used} of {available} chains used"
    );
    used
}

/// Writes a descriptor table from compact ones; returns the bytes left over.
fn table<'a>(bus: &Bus, place: u64, data: &'a [u8]) -> &'a [u8] {
    let (compact, rest) = data.split_at(data.len().min(DESCRIPTORS * COMPACT));
    for (i, c) in compact.chunks_exact(COMPACT).enumerate() {
        let mut address = u64::from(u16::from_le_bytes([c[0], c[1]]));
        let mut len = u32::from(u16::from_le_bytes([c[2], c[3]]));
        if c[4] & FAR_ADDRESS != 0 {
            address = address << 48 | 0xff00;
        }
        if c[4] & HUGE_LEN != 0 {
            len <<= 16;
        }
        let flags = u64::from(c[4] & 0x3f);
        let low = u64::from(len) | flags << 32 | u64::from(c[5]) << 48;
        let at = place + 16 * i as u64;
        bus.memory.write_obj(address, GuestAddress(at)).unwrap();
        bus.memory.write_obj(low, GuestAddress(at + 8)).unwrap();
    }
    rest
}
