//! A device whose disk blocks holds nobody up but itself, and stops for good.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::driver::*;
use crate::ram_disk::RamDisk;
use krg_virtio::block::Block;
use krg_virtio::disk::{Disk, DiskError};
use vm_memory::{Bytes, GuestAddress};

/// Announces every write and waits to be let go on.
struct SlowDisk {
    ram: RamDisk,
    begun: SyncSender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Disk for SlowDisk {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn path(&self) -> &Path {
        self.ram.path()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.ram.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        self.begun.send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        self.ram.write_at(data, offset)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.ram.flush()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.ram.write_zeroes(offset, len, unmap)
    }
}

struct Blocked {
    disk: Arc<SlowDisk>,
    machine: Machine,
    driver: Driver,
    queue: Queue,
    go_on: SyncSender<()>,
}

/// A machine whose disk is in the first of three writes.
fn blocked() -> Blocked {
    let (begun, writes) = sync_channel(10);
    let (go_on, waiting) = sync_channel(10);
    let disk = Arc::new(SlowDisk {
        ram: RamDisk::new(1 << 20),
        begun,
        go_on: Mutex::new(waiting),
    });
    let machine = machine(Block::new("disk0", disk.clone()).unwrap());
    let driver = Driver::probe(&machine);
    driver.negotiate(VERSION_1 | 1 << 9);
    let mut queue = driver.queue(0, 16, 0x1_0000);
    driver.start();
    machine.memory.write_obj(1u64, GuestAddress(0x3_0000)).unwrap();
    driver.describe(queue.table, 0, 0x3_0000, 16, NEXT, 1);
    driver.describe(queue.table, 1, 0x4_0000, 512, NEXT, 2);
    driver.describe(queue.table, 2, 0x5_0000, 1, WRITE, 0);
    for _ in 0..3 {
        driver.offer(&mut queue, 0);
    }
    driver.kick(&queue);
    writes.recv_timeout(PATIENCE).unwrap();
    // Keeps the announcements of later writes from failing.
    std::thread::spawn(move || while writes.recv().is_ok() {});
    Blocked {
        disk,
        machine,
        driver,
        queue,
        go_on,
    }
}

#[test]
fn registers_answer_while_the_device_is_blocked() {
    let b = blocked();
    assert_eq!(b.driver.status(), 15);
    b.driver.kick(&b.queue);
    b.driver.config_u32(0);
    b.driver.mask_vector(1, true);
    b.driver.set_status(0);
    for _ in 0..100 {
        assert_eq!(b.driver.status(), 15, "the reset is not complete");
        b.driver.set_status(0);
    }
    for _ in 0..3 {
        b.go_on.send(()).unwrap();
    }
    b.driver.reset();
    assert_eq!(b.driver.status(), 0);
}

#[test]
fn what_was_not_begun_before_a_stop_is_never_written() {
    let mut b = blocked();
    b.machine.root.request_stop();
    for _ in 0..3 {
        b.go_on.send(()).unwrap();
    }
    b.machine.root.stop();
    assert_eq!(
        b.disk.ram.writes.load(Ordering::SeqCst),
        1,
        "the one that was in the disk"
    );
    b.driver.used(&mut b.queue);
    assert_eq!(b.driver.used(&mut b.queue), None, "the others are not completed");
}

#[test]
fn stop_waits_for_the_write_that_is_under_way() {
    let b = blocked();
    let root = b.machine.root.clone();
    let (done, stopped) = sync_channel(1);
    let stopper = std::thread::spawn(move || {
        root.stop();
        done.send(()).unwrap();
    });
    assert!(stopped.recv_timeout(Duration::from_millis(100)).is_err());
    b.go_on.send(()).unwrap();
    stopped.recv_timeout(PATIENCE).unwrap();
    stopper.join().unwrap();
}
