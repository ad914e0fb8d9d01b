//! Disk images: what a virtio-blk device reads and writes, and where a kernel is looked for.
//!
//! [`open`] recognises the format. Without `persist` the image is never written: a private
//! [`Overlay`] takes the writes and is gone with the process.

mod error;
mod lock;
mod overlay;
mod qcow2;
mod raw;
mod reader;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

pub use error::DiskError;
pub use overlay::{BLOCK_SIZE, Overlay, OverlayState};
pub use qcow2::Qcow2;
pub use raw::Raw;
pub use reader::Reader;

/// Bytes in a sector: the unit of virtio-blk and of image sizes.
pub const SECTOR_SIZE: u64 = 512;

/// Largest disk that is accepted. Bounds what the tables of an untrusted image can claim.
pub const MAX_SIZE: u64 = 64 << 40;

/// A disk of the guest. Any number of threads may use it; two requests that overlap and run at the
/// same time leave either one's data, as on a real disk.
pub trait Disk: Send + Sync {
    /// Size in bytes: a multiple of [`SECTOR_SIZE`], at most [`MAX_SIZE`], never changing.
    fn size(&self) -> u64;

    /// The image's path, for messages and for [`Disk::id`].
    fn path(&self) -> &Path;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `buffer` from byte `offset`. The range must lie inside the disk.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError>;

    /// Writes `data` at byte `offset`. The range must lie inside the disk.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError>;

    /// Returns once everything written before is as durable as the disk makes it: on the medium if
    /// the image is persistent; at once for a private overlay, which no crash survives anyway.
    fn flush(&self) -> Result<(), DiskError>;

    /// Makes a range read as zeroes. With `unmap` its storage may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;

    /// The guest no longer needs a range. What it reads as afterwards is unspecified to the guest;
    /// here it reads as zeroes or is unchanged.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len, true)
    }

    /// Size in sectors of [`SECTOR_SIZE`].
    fn sectors(&self) -> u64 {
        self.size() / SECTOR_SIZE
    }

    /// The serial number the guest sees (VIRTIO 1.2, 5.2.6.1, VIRTIO_BLK_T_GET_ID): the image's
    /// file name in printable ASCII, NUL padded.
    fn id(&self) -> [u8; 20] {
        let name = self.path().file_name().unwrap_or_default();
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(name.as_encoded_bytes()) {
            *to = if from.is_ascii_graphic() { *from } else { b'_' };
        }
        id
    }

    /// The private overlay if this disk is one: what a snapshot has to keep of it. A persistent
    /// disk is its own image and has none.
    fn overlay(&self) -> Option<&Overlay> {
        None
    }
}

/// Opens a disk image or block device by its format. With `persist` the guest writes through to it
/// and it is locked exclusively; without, it is locked shared and its writes go to an [`Overlay`].
/// The lock (flock) lasts as long as the disk.
pub fn open(path: &Path, persist: bool) -> Result<Arc<dyn Disk>, DiskError> {
    if persist {
        return Ok(Arc::new(open_raw(path)?));
    }
    Ok(Arc::new(Overlay::new(open_read_only(path)?)?))
}

/// Opens a disk image for reading only, whatever its format.
pub fn open_read_only(path: &Path) -> Result<Arc<dyn Disk>, DiskError> {
    let (file, format) = open_file(path, false)?;
    Ok(match format {
        Format::Raw => Arc::new(Raw::new(file, path, false)?),
        Format::Qcow2 => Arc::new(Qcow2::new(file, path)?),
    })
}

fn open_raw(path: &Path) -> Result<Raw, DiskError> {
    let (file, format) = open_file(path, true)?;
    match format {
        Format::Raw => Raw::new(file, path, true),
        Format::Qcow2 => Err(DiskError::Format {
            path: path.to_owned(),
            what: "qcow2 images are only read, not written".into(),
            remedy: "leave out persist, or convert it with qemu-img convert -O raw",
        }),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

fn open_file(path: &Path, write: bool) -> Result<(File, Format), DiskError> {
    // The type is looked at before the file is opened: opening a FIFO would block.
    let kind = fs::metadata(path).map_err(DiskError::io(path, "open"))?.file_type();
    let not_a_disk = |kind| {
        Err(DiskError::NotADisk {
            path: path.to_owned(),
            kind,
        })
    };
    if kind.is_dir() {
        return not_a_disk("a directory");
    } else if kind.is_fifo() {
        return not_a_disk("a FIFO");
    } else if kind.is_socket() {
        return not_a_disk("a socket");
    } else if kind.is_char_device() {
        return not_a_disk("a character device");
    }
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(DiskError::io(path, "open"))?;
    lock::lock(&file, path, write)?;
    let mut head = [0; 512];
    let mut have = 0;
    while have < head.len() {
        match file
            .read_at(&mut head[have..], have as u64)
            .map_err(DiskError::io(path, "read"))?
        {
            0 => break,
            n => have += n,
        }
    }
    let format = detect(&head[..have], path)?;
    Ok((file, format))
}

/// The format by its magic number. What is none of the known ones is a raw disk.
fn detect(head: &[u8], path: &Path) -> Result<Format, DiskError> {
    const COMPRESSED: [(&[u8], &str); 5] = [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
    ];
    const OTHER: [(usize, &[u8], &str); 4] = [
        (0, b"KDMV", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (64, b"\x7f\x10\xda\xbe", "VDI"),
    ];
    let format = |what: String, remedy| {
        Err(DiskError::Format {
            path: path.to_owned(),
            what,
            remedy,
        })
    };
    if head.starts_with(qcow2::MAGIC) {
        return Ok(Format::Qcow2);
    }
    // A compressed file's length is seldom a multiple of 512, so it would be refused anyhow; this
    // says why. A boot sector (signature at 510) is a disk whatever it starts with.
    let boot_sector = head.get(510..512) == Some(&[0x55, 0xaa]);
    if let Some((_, name)) = COMPRESSED
        .iter()
        .find(|(magic, _)| head.starts_with(magic) && !boot_sector)
    {
        return format(format!("is compressed with {name}"), "unpack it first");
    }
    if let Some((_, _, name)) = OTHER
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|h| h.starts_with(magic)))
    {
        return format(
            format!("{name} images are not read"),
            "convert it with qemu-img convert -O qcow2",
        );
    }
    Ok(Format::Raw)
}

/// Checks a request against the size of the disk.
fn check_range(disk: &dyn Disk, offset: u64, len: u64) -> Result<(), DiskError> {
    let size = disk.size();
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfRange {
            path: disk.path().to_owned(),
            offset,
            len,
            size,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_magic() {
        let path = Path::new("disk");
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03", path).unwrap(), Format::Qcow2);
        assert_eq!(detect(&[0; 512], path).unwrap(), Format::Raw);
        let error = detect(b"\xfd7zXZ\0rest", path).err().unwrap().to_string();
        assert_eq!(error, "disk disk: is compressed with xz; unpack it first");
        let error = detect(b"KDMVrest", path).err().unwrap().to_string();
        assert!(error.contains("VMDK"), "{error}");
    }

    #[test]
    fn a_boot_sector_is_raw_whatever_it_starts_with() {
        let mut head = [0; 512];
        head[..3].copy_from_slice(b"BZh");
        head[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(detect(&head, Path::new("disk")).unwrap(), Format::Raw);
    }
}
