//! Configuration space and BARs under every access a guest can make.

use crate::driver::*;
use krg_virtio::pci::ECAM_SIZE;
use krg_virtio::rng::Rng;
use vm_memory::GuestAddress;

const SLOT: u64 = 1 << 15;

#[test]
fn every_offset_and_width_of_configuration_space_is_answered() {
    let machine = machine(Rng::new("rng0").unwrap());
    let root = &machine.root;
    let starts = [
        0,
        SLOT,
        SLOT + 4096 - 64,
        2 * SLOT - 64,
        ECAM_SIZE - 64,
        ECAM_SIZE,
        u64::MAX - 300,
    ];
    for start in starts {
        for offset in start..start.saturating_add(300) {
            for width in 0..=9 {
                for fill in [0xff, 0, 0x5a] {
                    root.config_write(offset, &vec![fill; width]);
                    root.config_read(offset, &mut vec![0; width]);
                }
            }
        }
    }
    let mut id = [0; 4];
    root.config_read(SLOT, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1044_1af4, "identity is read-only");
}

#[test]
fn every_offset_and_width_of_the_bar_is_answered() {
    let machine = machine(Rng::new("rng0").unwrap());
    machine.root.config_write(SLOT + 4, &2u16.to_le_bytes());
    let bar = WINDOW.start;
    for offset in (0..0x8000u64).filter(|o| o & 0xfff < 0x80 || o & 0xfff > 0xff0) {
        for width in 0..=16 {
            for fill in [0xff, 0, 0x5a] {
                let mut data = vec![fill; width];
                let inside = offset + width as u64 <= 0x8000;
                assert_eq!(machine.root.mmio_write(bar + offset, &data), inside);
                assert_eq!(machine.root.mmio_read(bar + offset, &mut data), inside);
            }
        }
    }
}

#[test]
fn the_bar_is_decoded_where_and_while_the_guest_wants_it() {
    let machine = machine(Rng::new("rng0").unwrap());
    let root = &machine.root;
    let mut byte = [0];
    assert!(!root.mmio_read(WINDOW.start, &mut byte), "decoding is off at first");
    root.config_write(SLOT + 4, &2u16.to_le_bytes());
    assert!(root.mmio_read(WINDOW.start, &mut byte));
    let doorbells = WINDOW.start + 0x3000..WINDOW.start + 0x4000;
    assert_eq!(root.doorbells(), std::slice::from_ref(&doorbells));
    assert!(root.is_doorbell(WINDOW.start + 0x3000));
    assert!(!root.is_doorbell(WINDOW.start + 0x2fff));
    root.config_write(SLOT + 0x10, &0xD000_0000u64.to_le_bytes());
    assert!(!root.mmio_read(WINDOW.start, &mut byte));
    assert!(root.mmio_read(0xD000_0000, &mut byte));
    root.config_write(SLOT + 4, &[0]);
    assert!(!root.mmio_read(0xD000_0000, &mut byte));
    assert!(root.doorbells().is_empty());
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let machine = machine(Rng::new("rng0").unwrap());
    let root = &machine.root;
    let read = |offset: u64| {
        let mut value = [0; 4];
        root.config_read(SLOT + offset, &mut value);
        u32::from_le_bytes(value)
    };
    let mut at = u64::from(read(0x34) & 0xfc);
    while read(at) & 0xff != 9 || read(at) >> 24 != 5 {
        at = u64::from(read(at) >> 8 & 0xfc);
        assert_ne!(at, 0, "no window");
    }
    root.config_write(SLOT + at + 8, &0x14u32.to_le_bytes());
    root.config_write(SLOT + at + 12, &1u32.to_le_bytes());
    root.config_write(SLOT + at + 16, &[3]);
    assert_eq!(read(at + 16) & 0xff, 3, "device status");
    let driver = Driver::probe(&machine);
    assert_eq!(driver.status(), 3);
    for (offset, len) in [(0x14, 3), (0x16, 4), (0x8000, 1), (u32::MAX, 4), (0, 0)] {
        root.config_write(SLOT + at + 8, &offset.to_le_bytes());
        root.config_write(SLOT + at + 12, &u32::to_le_bytes(len));
        root.config_write(SLOT + at + 16, &[0; 4]);
        read(at + 16);
    }
    assert_eq!(driver.status(), 3, "impossible accesses change nothing");
}

#[test]
fn random_numbers_come() {
    let machine = machine(Rng::new("rng0").unwrap());
    let driver = Driver::probe(&machine);
    driver.negotiate(VERSION_1 | EVENT_IDX);
    let mut queue = driver.queue(0, 64, 0x1_0000);
    driver.start();
    for head in 0..4 {
        driver.describe(queue.table, head, 0x4_0000 + 64 * u64::from(head), 64, WRITE, 0);
        driver.offer(&mut queue, head);
        driver.kick(&queue);
        assert_eq!(driver.wait_used(&mut queue), (u32::from(head), 64));
    }
    let mut bytes = [0; 256];
    vm_memory::Bytes::read_slice(&*machine.memory, &mut bytes, GuestAddress(0x4_0000)).unwrap();
    assert!(bytes.chunks(64).all(|c| c.iter().any(|b| *b != 0)));
    assert_ne!(bytes[..64], bytes[64..128]);
}

#[test]
fn without_msix_the_isr_register_tells() {
    let machine = machine(Rng::new("rng0").unwrap());
    let driver = Driver::probe(&machine);
    let capability = (0x40..0x100)
        .step_by(4)
        .find(|at| driver.config_u32(*at) & 0xff == 0x11);
    machine.root.config_write(SLOT + capability.unwrap() + 2, &[0, 0]);
    driver.negotiate(VERSION_1);
    let mut queue = driver.queue(0, 64, 0x1_0000);
    driver.start();
    driver.describe(queue.table, 0, 0x4_0000, 64, WRITE, 0);
    driver.offer(&mut queue, 0);
    driver.kick(&queue);
    driver.wait_used(&mut queue);
    let start = std::time::Instant::now();
    while driver.isr() & 1 == 0 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert_eq!(driver.isr(), 0, "reading clears it");
    assert!(machine.interrupts.try_recv().is_err());
}
