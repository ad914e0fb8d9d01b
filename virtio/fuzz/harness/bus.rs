//! A bus with one block device on a small disk, in little guest memory.

use std::path::Path;
use std::sync::{Arc, Mutex};

use krg_virtio::block::Block;
use krg_virtio::disk::{Disk, DiskError};
use krg_virtio::pci::PciRoot;
use krg_virtio::transport::VirtioPci;
use krg_virtio::{GuestMemory, MsiSink};
use vm_memory::GuestAddress;

pub const WINDOW: u64 = 0xC000_0000;
pub const ECAM_SLOT: u64 = 1 << 15;
pub const MEMORY: usize = 0x1_0000;
/// A page that 16-bit addresses do not reach.
pub const FAR: u64 = 0x10_0000;
pub const FAR_LEN: usize = 0x1000;
const DISK: usize = 64 << 10;

/// Takes interrupts and forgets them.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _address: u64, _data: u32) {}
}

/// A disk that panics when it is asked for what is not there.
struct StrictDisk(Mutex<Vec<u8>>);

impl Disk for StrictDisk {
    fn size(&self) -> u64 {
        DISK as u64
    }

    fn path(&self) -> &Path {
        Path::new("disk")
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let offset = offset as usize;
        buffer.copy_from_slice(&self.0.lock().unwrap()[offset..offset + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        let offset = offset as usize;
        self.0.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        self.0.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

pub struct Bus {
    pub root: PciRoot,
    pub memory: Arc<GuestMemory>,
}

impl Bus {
    pub fn new() -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY), (GuestAddress(FAR), FAR_LEN)]).unwrap());
        let disk = Arc::new(StrictDisk(Mutex::new(vec![0x5a; DISK])));
        let block = Block::new("disk0", disk).unwrap();
        let function = VirtioPci::new(Box::new(block), memory.clone(), Arc::new(Nowhere));
        let root = PciRoot::new(WINDOW..0xE000_0000);
        root.add(Arc::new(function)).unwrap();
        root.config_write(ECAM_SLOT + 4, &6u16.to_le_bytes());
        Bus { root, memory }
    }
}
