//! A disk in memory that counts what reaches it.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use krg_virtio::disk::{Disk, DiskError};

pub struct RamDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub writes: AtomicUsize,
    pub flushes: AtomicUsize,
    pub read_only: bool,
}

impl RamDisk {
    pub fn new(size: usize) -> Self {
        let bytes = (0..size).map(|i| (i / 512 + i) as u8).collect();
        RamDisk {
            bytes: Mutex::new(bytes),
            writes: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            read_only: false,
        }
    }
}

impl Disk for RamDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn path(&self) -> &Path {
        Path::new("ram disk")
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let offset = offset as usize;
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[offset..offset + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        let offset = offset as usize;
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.bytes.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        self.bytes.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}
