//! A disk as `Read + Seek`, for code that looks into file systems.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use super::Disk;

/// A cursor over a disk's bytes.
pub struct Reader {
    disk: Arc<dyn Disk>,
    position: u64,
}

impl Reader {
    /// Starts at byte 0.
    pub fn new(disk: Arc<dyn Disk>) -> Reader {
        Reader { disk, position: 0 }
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size().saturating_sub(self.position);
        let len = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.disk
            .read_at(&mut buffer[..len], self.position)
            .map_err(io::Error::other)?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.disk.size().checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}
