//! What a driver must not do ends in NEEDS_RESET and nothing worse, and a reset mends it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::driver::*;
use crate::ram_disk::RamDisk;
use krg_virtio::block::Block;
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = VERSION_1 | INDIRECT | 1 << 9;
const QUEUE: u64 = 0x1_0000;
const HEADER: u64 = 0x3_0000;
const STATUS: u64 = 0x3_0100;
const DATA: u64 = 0x4_0000;
const TABLE: u64 = 0x5_0000;
const END: u64 = MEMORY as u64;

/// One descriptor: table (true: the indirect one), index, address, length, flags, next.
type Descriptor = (bool, u16, u64, u32, u16, u16);

/// Offers chain 0 made of `descriptors` and expects the device to break down and recover.
fn breaks(what: &str, descriptors: &[Descriptor]) {
    breaks_at(what, descriptors, 0);
}

fn breaks_at(what: &str, descriptors: &[Descriptor], head: u16) {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let machine = machine(Block::new("disk0", disk.clone()).unwrap());
    let driver = Driver::probe(&machine);
    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    // A write to sector 0, if anything of it were done.
    machine.memory.write_obj(1u64, GuestAddress(HEADER)).unwrap();
    driver.start();
    for (indirect, index, address, len, flags, next) in descriptors {
        let table = if *indirect { TABLE } else { QUEUE };
        driver.describe(table, *index, *address, *len, *flags, *next);
    }
    driver.offer(&mut queue, head);
    driver.kick(&queue);
    let interrupt = machine.interrupts.recv_timeout(PATIENCE);
    assert_eq!(interrupt, Ok((0xFEE0_0000, 0x40)), "{what}: no configuration interrupt");
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{what}");
    assert_eq!(driver.used(&mut queue), None, "{what}");
    assert_eq!(disk.writes.load(Ordering::SeqCst), 0, "{what}");

    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    driver.start();
    good_request(&driver, &mut queue);
    assert_eq!(disk.writes.load(Ordering::SeqCst), 1, "{what}");
}

fn good_request(driver: &Driver, queue: &mut Queue) {
    driver.describe(QUEUE, 0, HEADER, 16, NEXT, 1);
    driver.describe(QUEUE, 1, DATA, 512, NEXT, 2);
    driver.describe(QUEUE, 2, STATUS, 1, WRITE, 0);
    driver.offer(queue, 0);
    driver.kick(queue);
    assert_eq!(driver.wait_used(queue), (0, 1));
}

#[test]
fn chains() {
    let header = (false, 0, HEADER, 16, NEXT, 1);
    let status = (false, 2, STATUS, 1, WRITE, 0);
    breaks("a loop", &[header, (false, 1, DATA, 512, NEXT, 0)]);
    breaks("a loop to itself", &[(false, 0, HEADER, 16, NEXT, 0)]);
    breaks(
        "a next index beyond the table",
        &[header, (false, 1, DATA, 512, NEXT, 16)],
    );
    breaks("an empty descriptor", &[header, (false, 1, DATA, 0, NEXT, 2), status]);
    breaks("data beyond memory", &[header, (false, 1, END, 512, NEXT, 2), status]);
    breaks(
        "data across the end",
        &[header, (false, 1, END - 511, 512, NEXT, 2), status],
    );
    breaks(
        "an address that wraps",
        &[header, (false, 1, u64::MAX - 10, 512, NEXT, 2), status],
    );
    breaks("huge data", &[header, (false, 1, 0, u32::MAX, NEXT, 2), status]);
    breaks(
        "a header beyond memory",
        &[(false, 0, END, 16, NEXT, 1), (false, 1, STATUS, 1, WRITE, 0)],
    );
    breaks(
        "readable after writable",
        &[(false, 0, STATUS, 1, WRITE | NEXT, 1), (false, 1, HEADER, 16, 0, 0)],
    );
    breaks("no status", &[header, (false, 1, DATA, 512, 0, 0)]);
    breaks(
        "a short header",
        &[(false, 0, HEADER, 15, NEXT, 1), (false, 1, STATUS, 1, WRITE, 0)],
    );
    breaks_at("a head beyond the table", &[], 16);
    breaks_at("the largest head", &[], 0xffff);
}

#[test]
fn indirect_tables() {
    let inner = (true, 0, TABLE, 32, INDIRECT_TABLE, 0);
    breaks(
        "indirect in indirect",
        &[(false, 0, TABLE, 16, INDIRECT_TABLE, 0), inner],
    );
    let good = (true, 0, HEADER, 16, NEXT, 1);
    breaks(
        "indirect in indirect, later",
        &[
            (false, 0, TABLE, 32, INDIRECT_TABLE, 0),
            good,
            (true, 1, TABLE, 32, INDIRECT_TABLE, 0),
        ],
    );
    breaks("an empty table", &[(false, 0, TABLE, 0, INDIRECT_TABLE, 0)]);
    breaks(
        "a table of odd length",
        &[(false, 0, TABLE, 33, INDIRECT_TABLE, 0), good],
    );
    breaks("a table beyond memory", &[(false, 0, END, 32, INDIRECT_TABLE, 0)]);
    breaks(
        "a huge table",
        &[(false, 0, TABLE, 0xffff_fff0, INDIRECT_TABLE, 0), good],
    );
    breaks(
        "a loop in a table",
        &[
            (false, 0, TABLE, 0xf_fff0, INDIRECT_TABLE, 0),
            (true, 0, DATA, 1, NEXT, 0),
        ],
    );
    breaks("a table too short", &[(false, 0, TABLE, 16, INDIRECT_TABLE, 0), good]);
}

#[test]
fn an_available_index_that_runs_ahead() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let machine = machine(Block::new("disk0", disk).unwrap());
    let driver = Driver::probe(&machine);
    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    driver.start();
    queue.next_avail = 1000;
    driver.offer(&mut queue, 0);
    driver.kick(&queue);
    driver.wait_status(NEEDS_RESET);
}

#[test]
fn queues_outside_of_memory_or_misaligned() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let machine = machine(Block::new("disk0", disk).unwrap());
    let driver = Driver::probe(&machine);
    for (what, table, avail, used) in [
        ("table beyond memory", END, 0x4000, 0x8000),
        ("table across the end", END - 0xf0, 0x4000, 0x8000),
        ("table wraps", !0xf, 0x4000, 0x8000),
        ("table misaligned", 0x1008, 0x4000, 0x8000),
        ("avail misaligned", 0x1000, 0x4001, 0x8000),
        ("avail beyond memory", 0x1000, END - 2, 0x8000),
        ("no avail", 0x1000, 0, 0x8000),
        ("used misaligned", 0x1000, 0x4000, 0x8002),
        ("used beyond memory", 0x1000, 0x4000, u64::MAX - 3),
    ] {
        driver.negotiate(FEATURES);
        driver.place(&Queue {
            index: 0,
            size: 16,
            table,
            avail,
            used,
            next_avail: 0,
            next_used: 0,
        });
        driver.start();
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{what}");
        assert!(machine.interrupts.recv_timeout(PATIENCE).is_ok(), "{what}");
    }
    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    driver.start();
    machine.memory.write_obj(1u64, GuestAddress(HEADER)).unwrap();
    good_request(&driver, &mut queue);
}
