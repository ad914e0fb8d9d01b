//! A virtio driver for tests: finds a device through PCI as a guest does, sets it up through
//! MMIO and moves buffers through virtqueues in guest memory.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use krg_virtio::device::VirtioDevice;
use krg_virtio::pci::PciRoot;
use krg_virtio::transport::VirtioPci;
use krg_virtio::{GuestMemory, MsiSink};
use vm_memory::{Bytes, GuestAddress};

pub const WINDOW: std::ops::Range<u64> = 0xC000_0000..0xE000_0000;
pub const MEMORY: usize = 8 << 20;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;
pub const NEEDS_RESET: u8 = 64;
/// How long a device may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Interrupts as they come.
pub struct Interrupts(Mutex<Sender<(u64, u32)>>);

impl MsiSink for Interrupts {
    fn signal(&self, address: u64, data: u32) {
        // The test may be over before the device is.
        let _ = self.0.lock().unwrap().send((address, data));
    }
}

/// A bus with one device at 00:01.0, in guest memory of 8 MiB.
pub struct Machine {
    pub root: Arc<PciRoot>,
    pub memory: Arc<GuestMemory>,
    pub interrupts: Receiver<(u64, u32)>,
}

pub fn machine(device: impl VirtioDevice + 'static) -> Machine {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let memory = Arc::new(memory);
    let (sender, interrupts) = channel();
    let sink = Arc::new(Interrupts(Mutex::new(sender)));
    let root = Arc::new(PciRoot::new(WINDOW));
    let function = VirtioPci::new(Box::new(device), memory.clone(), sink);
    root.add(Arc::new(function)).unwrap();
    Machine {
        root,
        memory,
        interrupts,
    }
}

/// One virtqueue as its driver sees it.
pub struct Queue {
    pub index: u16,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    pub next_avail: u16,
    pub next_used: u16,
}

/// A driver bound to the device at 00:01.0.
pub struct Driver {
    pub root: Arc<PciRoot>,
    pub memory: Arc<GuestMemory>,
    common: u64,
    isr: u64,
    config: u64,
    notify: u64,
    notify_multiplier: u64,
    table: u64,
}

const SLOT: u64 = 1 << 15;

impl Driver {
    /// Finds the device's structures by its capabilities and switches memory decoding and MSI-X
    /// on; vector `v` then signals `(0xFEE0_0000, 0x40 + v)`.
    pub fn probe(machine: &Machine) -> Driver {
        let mut driver = Driver {
            root: machine.root.clone(),
            memory: machine.memory.clone(),
            common: 0,
            isr: 0,
            config: 0,
            notify: 0,
            notify_multiplier: 0,
            table: 0,
        };
        assert_eq!(driver.config_u32(0) & 0xffff, 0x1af4);
        driver.root.config_write(SLOT + 4, &6u16.to_le_bytes());
        let bar = u64::from(driver.config_u32(0x10) & !0xf) | u64::from(driver.config_u32(0x14)) << 32;
        let mut at = u64::from(driver.config_u32(0x34) & 0xfc);
        while at != 0 {
            let head = driver.config_u32(at);
            let offset = |driver: &Driver, place| bar + u64::from(driver.config_u32(at + place));
            match (head & 0xff, head >> 24) {
                (9, 1) => driver.common = offset(&driver, 8),
                (9, 2) => {
                    driver.notify = offset(&driver, 8);
                    driver.notify_multiplier = u64::from(driver.config_u32(at + 16));
                }
                (9, 3) => driver.isr = offset(&driver, 8),
                (9, 4) => driver.config = offset(&driver, 8),
                (0x11, _) => {
                    driver.table = offset(&driver, 4);
                    driver.root.config_write(SLOT + at + 2, &0x8000u16.to_le_bytes());
                    let count = (head >> 16 & 0x7ff) + 1;
                    for vector in 0..count {
                        let entry = driver.table + 16 * u64::from(vector);
                        driver.write(entry, &0xFEE0_0000u64.to_le_bytes());
                        driver.write(entry + 8, &(0x40 + vector).to_le_bytes());
                        driver.write(entry + 12, &0u32.to_le_bytes());
                    }
                }
                _ => {}
            }
            at = u64::from(head >> 8 & 0xfc);
        }
        assert!(driver.common != 0 && driver.notify != 0 && driver.isr != 0 && driver.config != 0);
        driver
    }

    /// The same driver in another machine with the same devices.
    pub fn moved_to(self, machine: &Machine) -> Driver {
        Driver {
            root: machine.root.clone(),
            memory: machine.memory.clone(),
            ..self
        }
    }

    pub fn config_u32(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.root.config_read(SLOT + offset, &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        assert!(self.root.mmio_write(gpa, data), "nothing at {gpa:#x}");
    }

    fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.root.mmio_read(gpa, &mut data), "nothing at {gpa:#x}");
        data
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(self.common + 0x14)[0]
    }

    pub fn set_status(&self, status: u8) {
        self.write(self.common + 0x14, &[status]);
    }

    pub fn isr(&self) -> u8 {
        self.read::<1>(self.isr)[0]
    }

    pub fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.read(self.config + offset)
    }

    pub fn mask_vector(&self, vector: u64, masked: bool) {
        self.write(self.table + 16 * vector + 12, &u32::from(masked).to_le_bytes());
    }

    pub fn features(&self) -> u64 {
        (0..2u32).fold(0, |features, select| {
            self.write(self.common, &select.to_le_bytes());
            features | u64::from(u32::from_le_bytes(self.read(self.common + 4))) << (32 * select)
        })
    }

    pub fn reset(&self) {
        self.set_status(0);
        let start = Instant::now();
        while self.status() != 0 {
            assert!(start.elapsed() < PATIENCE, "reset does not end");
            std::thread::yield_now();
        }
    }

    /// Resets, negotiates `features` and gets to FEATURES_OK.
    pub fn negotiate(&self, features: u64) {
        self.reset();
        self.set_status(1);
        self.set_status(3);
        for select in 0..2u32 {
            self.write(self.common + 8, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.write(self.common + 12, &half.to_le_bytes());
        }
        self.set_status(11);
        assert_eq!(self.status(), 11, "features {features:#x} refused");
        self.write(self.common + 0x10, &0u16.to_le_bytes());
    }

    /// Sets queue `index` up at `base` with `size` descriptors and vector `index` + 1. It takes
    /// less than 64 KiB.
    pub fn queue(&self, index: u16, size: u16, base: u64) -> Queue {
        let queue = Queue {
            index,
            size,
            table: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            next_avail: 0,
            next_used: 0,
        };
        self.memory.write_slice(&[0; 0xc000], GuestAddress(base)).unwrap();
        self.place(&queue);
        queue
    }

    /// Tells the device where `queue` is.
    pub fn place(&self, queue: &Queue) {
        self.write(self.common + 0x16, &queue.index.to_le_bytes());
        self.write(self.common + 0x18, &queue.size.to_le_bytes());
        self.write(self.common + 0x1a, &(queue.index + 1).to_le_bytes());
        let addresses = [queue.table, queue.avail, queue.used];
        for (at, address) in [0x20, 0x28, 0x30].iter().zip(addresses) {
            self.write(self.common + at, &(address as u32).to_le_bytes());
            self.write(self.common + at + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(self.common + 0x1c, &1u16.to_le_bytes());
    }

    pub fn start(&self) {
        self.set_status(15);
    }

    pub fn kick(&self, queue: &Queue) {
        let gpa = self.notify + u64::from(queue.index) * self.notify_multiplier;
        assert!(self.root.is_doorbell(gpa));
        self.write(gpa, &queue.index.to_le_bytes());
    }

    /// Stores a descriptor of the table at `table`.
    pub fn describe(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let place = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_slice(&bytes, place).unwrap();
    }

    /// Makes `head` available without a kick.
    pub fn offer(&self, queue: &mut Queue, head: u16) {
        let slot = queue.avail + 4 + 2 * u64::from(queue.next_avail % queue.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        queue.next_avail = queue.next_avail.wrapping_add(1);
        let index = GuestAddress(queue.avail + 2);
        self.memory
            .store(queue.next_avail, index, std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    /// Sets `used_event` of the available ring.
    pub fn interrupt_at(&self, queue: &Queue, used: u16) {
        let place = GuestAddress(queue.avail + 4 + 2 * u64::from(queue.size));
        self.memory.write_obj(used, place).unwrap();
    }

    /// The next used element, if there is one.
    pub fn used(&self, queue: &mut Queue) -> Option<(u32, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(queue.used + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        if index == queue.next_used {
            return None;
        }
        let slot = queue.used + 4 + 8 * u64::from(queue.next_used % queue.size);
        queue.next_used = queue.next_used.wrapping_add(1);
        let head = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head, len))
    }

    /// Waits for the next used element.
    pub fn wait_used(&self, queue: &mut Queue) -> (u32, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "nothing is used");
            std::thread::yield_now();
        }
    }

    pub fn wait_status(&self, bit: u8) {
        let start = Instant::now();
        while self.status() & bit == 0 {
            assert!(start.elapsed() < PATIENCE, "status stays {:#x}", self.status());
            std::thread::yield_now();
        }
    }
}
