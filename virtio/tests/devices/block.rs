//! virtio-blk end to end: a driver does I/O through PCI, MMIO and virtqueues.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::driver::*;
use crate::ram_disk::RamDisk;
use krg_virtio::Prefetch;
use krg_virtio::block::Block;
use vm_memory::{Bytes, GuestAddress};

const FLUSH: u64 = 1 << 9;
const RO: u64 = 1 << 5;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const QUEUE: u64 = 0x1_0000;
const HEADERS: u64 = 0x3_0000;
const DATA: u64 = 0x10_0000;
const SIZE: usize = 4 << 20;

struct Fixture {
    disk: Arc<RamDisk>,
    machine: Machine,
    driver: Driver,
    queue: Queue,
}

fn fixture_with(disk: RamDisk, features: u64) -> Fixture {
    let disk = Arc::new(disk);
    let block = Block::new("disk0", disk.clone()).unwrap();
    fixture_of(disk, block, features)
}

fn fixture_of(disk: Arc<RamDisk>, block: Block, features: u64) -> Fixture {
    let machine = machine(block);
    let driver = Driver::probe(&machine);
    driver.negotiate(VERSION_1 | features);
    let queue = driver.queue(0, 256, QUEUE);
    driver.start();
    Fixture {
        disk,
        machine,
        driver,
        queue,
    }
}

fn fixture() -> Fixture {
    fixture_with(RamDisk::new(SIZE), FLUSH | EVENT_IDX | INDIRECT)
}

impl Fixture {
    /// Describes a request as chain `3 * number` and offers it.
    fn offer(&mut self, number: u16, kind: u32, sector: u64, data: u64, len: u32) {
        let header = HEADERS + 64 * u64::from(number);
        let memory = &self.machine.memory;
        memory.write_obj(u64::from(kind), GuestAddress(header)).unwrap();
        memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(header + 32)).unwrap();
        let first = 3 * number;
        let table = self.queue.table;
        let write = if matches!(kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        let status = if len == 0 { first + 2 } else { first + 1 };
        self.driver.describe(table, first, header, 16, NEXT, status);
        self.driver
            .describe(table, first + 1, data, len, NEXT | write, first + 2);
        self.driver.describe(table, first + 2, header + 32, 1, WRITE, 0);
        self.driver.offer(&mut self.queue, first);
    }

    fn status(&self, number: u16) -> u8 {
        let at = HEADERS + 64 * u64::from(number) + 32;
        self.machine.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// One request, waited for. Returns its status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: u64, len: u32) -> (u8, u32) {
        self.offer(0, kind, sector, data, len);
        self.driver.kick(&self.queue);
        let (head, used) = self.driver.wait_used(&mut self.queue);
        assert_eq!(head, 0);
        (self.status(0), used)
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

#[derive(Default)]
struct Announced(Mutex<Vec<(u64, u64, bool)>>);

impl Prefetch for Announced {
    fn prefetch(&self, gpa: u64, len: u64, write: bool) {
        self.0.lock().unwrap().push((gpa, len, write));
    }
}

#[test]
fn a_request_announces_the_memory_it_will_touch() {
    let disk = Arc::new(RamDisk::new(SIZE));
    let announced = Arc::new(Announced::default());
    let block = Block::with_prefetch("disk0", disk.clone(), announced.clone()).unwrap();
    let mut f = fixture_of(disk, block, 0);
    assert_eq!(f.request(T_IN, 1, DATA, 8192), (OK, 8193));
    assert_eq!(*announced.0.lock().unwrap(), [(HEADERS, 16, false), (DATA, 8192, true), (HEADERS + 32, 1, true)]);
    announced.0.lock().unwrap().clear();
    // No more than a batch, however long the request.
    assert_eq!(f.request(T_OUT, 1, DATA, 3 << 20), (OK, 1));
    assert_eq!(*announced.0.lock().unwrap(), [(HEADERS, 16, false), (DATA, (1 << 20) - 16, false), (HEADERS + 32, 1, true)]);
}

#[test]
fn reads_writes_and_flushes_reach_the_disk() {
    let mut f = fixture();
    let len = 3 << 20;
    assert_eq!(f.request(T_IN, 1, DATA, len), (OK, len + 1));
    assert_eq!(
        f.memory(DATA, len as usize),
        f.disk.bytes.lock().unwrap()[512..512 + len as usize]
    );
    let pattern: Vec<u8> = (0..8192u32).map(|i| (i * 7) as u8).collect();
    f.machine.memory.write_slice(&pattern, GuestAddress(DATA)).unwrap();
    assert_eq!(f.request(T_OUT, 100, DATA, 8192), (OK, 1));
    assert_eq!(f.disk.bytes.lock().unwrap()[51200..59392], pattern);
    assert_eq!(f.disk.flushes.load(Ordering::SeqCst), 0);
    assert_eq!(f.request(T_FLUSH, 0, 0, 0), (OK, 1));
    assert_eq!(f.disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(f.request(T_GET_ID, 0, DATA, 20), (OK, 21));
    assert_eq!(&f.memory(DATA, 10), b"ram_disk\0\0");
    let interrupt = f.machine.interrupts.recv_timeout(PATIENCE).unwrap();
    assert_eq!(interrupt, (0xFEE0_0000, 0x41));
}

#[test]
fn configuration_says_what_the_disk_is() {
    let f = fixture();
    assert_eq!(u64::from_le_bytes(f.driver.device_config(0)), SIZE as u64 / 512);
    assert_eq!(u32::from_le_bytes(f.driver.device_config(12)), 254);
    assert_eq!(u32::from_le_bytes(f.driver.device_config(20)), 512);
    assert_eq!(f.driver.device_config::<8>(0xffc), [0; 8][..8]);
}

#[test]
fn requests_beyond_the_disk_fail_and_touch_nothing() {
    let mut f = fixture();
    let last = SIZE as u64 / 512;
    for (kind, sector, len) in [
        (T_IN, last, 512),
        (T_OUT, last - 1, 1024),
        (T_OUT, u64::MAX, 512),
        (T_OUT, u64::MAX / 512, 512),
        (T_IN, 0, 100),
        (T_OUT, 0, 513),
    ] {
        assert_eq!(f.request(kind, sector, DATA, len), (IOERR, 1), "{kind} {sector} {len}");
    }
    assert_eq!(f.request(77, 0, DATA, 512), (UNSUPP, 1));
    assert_eq!(f.disk.writes.load(Ordering::SeqCst), 0);
}

#[test]
fn ranges_are_zeroed_and_checked() {
    let mut f = fixture();
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let both = [range(2, 4, 1), range(10, 1, 0)].concat();
    f.machine.memory.write_slice(&both, GuestAddress(DATA)).unwrap();
    assert_eq!(f.request(T_WRITE_ZEROES, 0, DATA, 32), (OK, 1));
    {
        let bytes = f.disk.bytes.lock().unwrap();
        assert!(bytes[1024..3072].iter().chain(&bytes[5120..5632]).all(|b| *b == 0));
        assert!(bytes[3072..3584].iter().any(|b| *b != 0));
    }
    assert_eq!(f.request(T_DISCARD, 0, DATA, 32), (UNSUPP, 1), "discard takes no flags");
    assert_eq!(f.request(T_DISCARD, 0, DATA + 16, 16), (OK, 1));
    assert_eq!(f.request(T_DISCARD, 0, DATA, 17), (IOERR, 1));
    let beyond = range(SIZE as u64 / 512 - 1, 2, 0);
    f.machine.memory.write_slice(&beyond, GuestAddress(DATA)).unwrap();
    assert_eq!(f.request(T_WRITE_ZEROES, 0, DATA, 16), (IOERR, 1));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut disk = RamDisk::new(SIZE);
    disk.read_only = true;
    let mut f = fixture_with(disk, RO | FLUSH);
    assert_eq!(f.driver.features() & RO, RO);
    assert_eq!(f.request(T_OUT, 0, DATA, 512), (IOERR, 1));
    assert_eq!(f.request(T_IN, 0, DATA, 512), (OK, 513));
    assert_eq!(f.disk.writes.load(Ordering::SeqCst), 0);
}

#[test]
fn without_flush_every_write_is_flushed() {
    let mut f = fixture_with(RamDisk::new(SIZE), 0);
    assert_eq!(f.request(T_OUT, 0, DATA, 512), (OK, 1));
    assert_eq!(f.disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn many_requests_in_flight_end_with_few_interrupts() {
    let mut f = fixture();
    // The driver asks for one interrupt, after the 64th request.
    f.driver.interrupt_at(&f.queue, 63);
    for round in 0..5u16 {
        for number in 0..64 {
            f.offer(number, T_OUT, u64::from(number), DATA + 512 * u64::from(number), 512);
        }
        f.driver.kick(&f.queue);
        f.machine.interrupts.recv_timeout(PATIENCE).unwrap();
        for number in 0..64u16 {
            assert_eq!(f.driver.wait_used(&mut f.queue), (u32::from(3 * number), 1));
            assert_eq!(f.status(number), OK);
        }
        assert!(f.machine.interrupts.try_recv().is_err(), "one interrupt a round");
        f.driver.interrupt_at(&f.queue, 64 * (round + 2) - 1);
    }
    assert_eq!(f.disk.writes.load(Ordering::SeqCst), 5 * 64);
}

#[test]
fn interrupts_wait_for_their_mask() {
    let mut f = fixture_with(RamDisk::new(SIZE), FLUSH);
    f.driver.mask_vector(1, true);
    assert_eq!(f.request(T_FLUSH, 0, 0, 0).0, OK);
    // A second request is only served after the first one's interrupt was dealt with.
    assert_eq!(f.request(T_FLUSH, 0, 0, 0).0, OK);
    assert!(f.machine.interrupts.try_recv().is_err());
    f.driver.mask_vector(1, false);
    f.machine.interrupts.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn indirect_chains_work() {
    let mut f = fixture();
    let table = DATA + 0x8_0000;
    let header = HEADERS;
    f.machine.memory.write_obj(0u64, GuestAddress(header)).unwrap();
    f.machine.memory.write_obj(3u64, GuestAddress(header + 8)).unwrap();
    f.driver.describe(table, 0, header, 16, NEXT, 1);
    for piece in 0..16u16 {
        let at = DATA + 4096 * u64::from(piece);
        f.driver.describe(table, piece + 1, at, 512, NEXT | WRITE, piece + 2);
    }
    f.driver.describe(table, 17, header + 32, 1, WRITE, 0);
    f.driver.describe(f.queue.table, 5, table, 18 * 16, INDIRECT_TABLE, 0);
    f.driver.offer(&mut f.queue, 5);
    f.driver.kick(&f.queue);
    assert_eq!(f.driver.wait_used(&mut f.queue), (5, 16 * 512 + 1));
    for piece in 0..16 {
        let want = f.disk.bytes.lock().unwrap()[1536 + 512 * piece..2048 + 512 * piece].to_vec();
        assert_eq!(f.memory(DATA + 4096 * piece as u64, 512), want);
    }
}

#[test]
fn a_driver_can_reset_and_start_over() {
    let mut f = fixture();
    for round in 0..20 {
        f.offer(0, T_OUT, round, DATA, 512);
        f.driver.kick(&f.queue);
        f.driver.negotiate(VERSION_1 | FLUSH);
        f.queue = f.driver.queue(0, 64, QUEUE);
        f.driver.start();
        assert_eq!(f.request(T_IN, round, DATA, 512), (OK, 513));
    }
}

#[test]
fn after_stop_nothing_is_written() {
    let mut f = fixture();
    assert_eq!(f.request(T_OUT, 0, DATA, 512), (OK, 1));
    f.machine.root.stop();
    let writes = f.disk.writes.load(Ordering::SeqCst);
    f.offer(0, T_OUT, 0, DATA, 512);
    f.driver.kick(&f.queue);
    // The threads are joined, so there is nobody to wait for.
    assert_eq!(f.disk.writes.load(Ordering::SeqCst), writes);
    assert_eq!(f.driver.used(&mut f.queue), None);
    assert!(f.machine.root.pause().is_err());
}
