//! A device goes on where it was saved.

use std::sync::Arc;

use crate::driver::*;
use crate::ram_disk::RamDisk;
use krg_virtio::Error;
use krg_virtio::block::Block;
use krg_virtio::rng::Rng;
use krg_virtio::state::{FunctionState, PciRootState};
use vm_memory::{Bytes, GuestAddress};

const QUEUE: u64 = 0x1_0000;
const HEADER: u64 = 0x3_0000;
const DATA: u64 = 0x4_0000;
const FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << 9;

fn disk_machine(disk: &Arc<RamDisk>) -> Machine {
    machine(Block::new("disk0", disk.clone()).unwrap())
}

/// Offers and kicks a read of one sector.
fn offer(driver: &Driver, queue: &mut Queue, sector: u64) {
    driver.memory.write_obj(0u64, GuestAddress(HEADER)).unwrap();
    driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    driver.describe(queue.table, 0, HEADER, 16, NEXT, 1);
    driver.describe(queue.table, 1, DATA, 512, NEXT | WRITE, 2);
    driver.describe(queue.table, 2, HEADER + 32, 1, WRITE, 0);
    driver.offer(queue, 0);
    driver.kick(queue);
}

/// A driver that has done a few requests on a new machine.
fn worked(disk: &Arc<RamDisk>) -> (Machine, Driver, Queue) {
    let machine = disk_machine(disk);
    let driver = Driver::probe(&machine);
    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    driver.start();
    for sector in 0..20 {
        // The driver wants an interrupt for each.
        driver.interrupt_at(&queue, queue.next_used);
        offer(&driver, &mut queue, sector);
        assert_eq!(driver.wait_used(&mut queue), (0, 513));
        machine.interrupts.recv_timeout(PATIENCE).unwrap();
    }
    (machine, driver, queue)
}

fn through_json(state: &PciRootState) -> PciRootState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn a_disk_goes_on_in_another_machine() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let (old, driver, mut queue) = worked(&disk);
    assert!(matches!(old.root.save(), Err(Error::NotPaused(_))));
    old.root.pause().unwrap();
    driver.mask_vector(1, true);
    // Kicked while paused: nobody but the new machine serves it.
    driver.interrupt_at(&queue, queue.next_used);
    offer(&driver, &mut queue, 77);
    let state = through_json(&old.root.save().unwrap());
    assert_eq!(state, old.root.save().unwrap());
    old.root.stop();
    assert_eq!(driver.used(&mut queue), None);

    let mut image = vec![0; MEMORY];
    old.memory.read_slice(&mut image, GuestAddress(0)).unwrap();
    let new = disk_machine(&disk);
    new.root.restore(&state).unwrap();
    assert_eq!(new.root.save().unwrap(), state, "restored, but not yet resumed");
    new.memory.write_slice(&image, GuestAddress(0)).unwrap();
    let driver = driver.moved_to(&new);
    assert_eq!(driver.used(&mut queue), None);
    new.root.resume().unwrap();
    assert_eq!(driver.wait_used(&mut queue), (0, 513));
    let mut sector = vec![0; 512];
    new.memory.read_slice(&mut sector, GuestAddress(DATA)).unwrap();
    assert_eq!(sector, disk.bytes.lock().unwrap()[77 * 512..78 * 512]);
    driver.mask_vector(1, false);
    // Pending behind the mask, unless it is raised only now.
    assert_eq!(new.interrupts.recv_timeout(PATIENCE), Ok((0xFEE0_0000, 0x41)));
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_paused_device_is_at_rest_until_resumed() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let (machine, driver, mut queue) = worked(&disk);
    machine.root.pause().unwrap();
    offer(&driver, &mut queue, 3);
    machine.root.pause().unwrap();
    assert_eq!(driver.used(&mut queue), None);
    machine.root.resume().unwrap();
    assert_eq!(driver.wait_used(&mut queue), (0, 513));
    assert!(matches!(machine.root.save(), Err(Error::NotPaused(_))));
}

#[test]
fn a_broken_device_stays_broken() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let (machine, driver, mut queue) = worked(&disk);
    driver.offer(&mut queue, 16);
    driver.kick(&queue);
    driver.wait_status(NEEDS_RESET);
    machine.root.pause().unwrap();
    let state = through_json(&machine.root.save().unwrap());
    let new = disk_machine(&disk);
    new.root.restore(&state).unwrap();
    new.root.resume().unwrap();
    let driver = driver.moved_to(&new);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.negotiate(FEATURES);
    let mut queue = driver.queue(0, 16, QUEUE);
    driver.start();
    offer(&driver, &mut queue, 1);
    assert_eq!(driver.wait_used(&mut queue), (0, 513));
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let (old, _, _) = worked(&disk);
    old.root.pause().unwrap();
    let state = old.root.save().unwrap();
    let refused = |what: &str, state: &PciRootState, machine: Machine| {
        let error = machine.root.restore(state).unwrap_err();
        assert!(matches!(error, Error::BadState { .. }), "{what}: {error}");
    };
    refused("another device", &state, machine(Rng::new("rng0").unwrap()));
    let smaller = Arc::new(RamDisk::new(1 << 19));
    refused("a smaller disk", &state, disk_machine(&smaller));
    let mut other = state.clone();
    other.version += 1;
    refused("another version", &other, disk_machine(&disk));
    let mut other = state.clone();
    other.slots.pop();
    refused("a device less", &other, disk_machine(&disk));
    type Change = fn(&mut krg_virtio::state::VirtioPciState);
    let changes: [(&str, Change); 8] = [
        ("version", |s| s.version += 1),
        ("queue size", |s| s.common.queues[0].size = 100),
        ("queue place", |s| s.common.queues[0].descriptors = MEMORY as u64),
        ("queue count", |s| s.common.queues.clear()),
        ("features", |s| s.common.driver_features |= 1 << 63),
        ("no VERSION_1", |s| s.common.driver_features = 0),
        ("vectors", |s| s.msix.entries.clear()),
        ("registers", |s| s.config.bytes[2] ^= 1),
    ];
    for (what, change) in changes {
        let mut other = state.clone();
        let FunctionState::Virtio(virtio) = &mut other.slots[1].function else {
            panic!("no device in slot 1");
        };
        change(virtio);
        refused(what, &other, disk_machine(&disk));
    }
}
