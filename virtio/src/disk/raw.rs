//! Raw images and block devices: byte n of the disk is byte n of the file.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::{Disk, DiskError, MAX_SIZE, SECTOR_SIZE, check_range};

/// A raw image or block device.
#[derive(Debug)]
pub struct Raw {
    file: File,
    path: PathBuf,
    size: u64,
    writable: bool,
}

impl Raw {
    /// Takes an open image. It must be a whole number of sectors and not empty.
    pub fn new(mut file: File, path: &Path, writable: bool) -> Result<Raw, DiskError> {
        // Seeking also tells the size of a block device; its metadata does not.
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(DiskError::io(path, "find the size"))?;
        let refuse = |what: String, remedy| {
            Err(DiskError::Format {
                path: path.to_owned(),
                what,
                remedy,
            })
        };
        if size == 0 {
            return refuse("is empty".into(), "give a disk image");
        }
        if size % SECTOR_SIZE != 0 {
            return refuse(
                format!("size of {size} bytes is not a multiple of 512"),
                "the image is truncated or not a disk: copy it again",
            );
        }
        if size > MAX_SIZE {
            return refuse(format!("size of {size} bytes is beyond 64 TiB"), "use a smaller disk");
        }
        Ok(Raw {
            file,
            path: path.to_owned(),
            size,
            writable,
        })
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if !self.writable {
            return Err(DiskError::ReadOnly {
                path: self.path.clone(),
            });
        }
        check_range(self, offset, len)
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        check_range(self, offset, buffer.len() as u64)?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(DiskError::io(&self.path, "read"))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        self.check_write(offset, data.len() as u64)?;
        self.file
            .write_all_at(data, offset)
            .map_err(DiskError::io(&self.path, "write"))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if !self.writable {
            return Ok(());
        }
        self.file.sync_data().map_err(DiskError::io(&self.path, "flush"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.check_write(offset, len)?;
        zero_file(&self.file, offset, len, unmap).map_err(DiskError::io(&self.path, "write zeroes"))
    }
}

/// Zeroes a range of a file, by a hole if `unmap`, else keeping its storage; by plain writes where
/// the file system knows neither. The file's length must already cover the range.
pub(super) fn zero_file(file: &File, offset: u64, len: u64, unmap: bool) -> std::io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let mode = if unmap {
        FallocateMode::PunchHole
    } else {
        FallocateMode::ZeroRange
    };
    if fallocate(file, mode, true, offset, len).is_ok() {
        return Ok(());
    }
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let chunk = (end - at).min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..chunk as usize], at)?;
        at += chunk;
    }
    Ok(())
}
