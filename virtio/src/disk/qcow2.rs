//! qcow2 images, for reading: versions 2 and 3, compressed clusters (zlib, zstd), no backing file,
//! no encryption (format: QEMU, docs/interop/qcow2.rst).
//!
//! An image is untrusted: every table is bounded by the size the header claims, which is bounded by
//! [`MAX_SIZE`], and every offset is checked against the file before it is used.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Disk, DiskError, check_range};

mod cache;
mod header;

use cache::Cache;
use header::{Compression, Header};

pub(super) use header::MAGIC;

/// Bits of an L1 or L2 entry that hold an offset; bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// L2 entry of a standard cluster, version 3: reads as zeroes.
const ZERO: u64 = 1;

/// L2 tables kept in memory; of 64 KiB each with the usual clusters, they cover 8 GiB.
const CACHED_TABLES: usize = 16;
/// Unpacked clusters kept in memory: a reader goes through a compressed cluster in small steps.
const CACHED_CLUSTERS: usize = 8;

/// A qcow2 image, read-only.
pub struct Qcow2 {
    file: File,
    path: PathBuf,
    file_size: u64,
    header: Header,
    l1: Vec<u64>,
    tables: Mutex<Cache<Vec<u64>>>,
    unpacked: Mutex<Cache<Vec<u8>>>,
}

/// Where a cluster's data is.
enum Cluster {
    Zero,
    At(u64),
    Compressed { offset: u64, len: u64 },
}

impl Qcow2 {
    /// Reads header and L1 table of an open image.
    pub fn new(file: File, path: &Path) -> Result<Qcow2, DiskError> {
        let file_size = file.metadata().map_err(DiskError::io(path, "find the size"))?.len();
        let mut bytes = [0; header::SIZE];
        let have = read_up_to(&file, &mut bytes, 0).map_err(DiskError::io(path, "read"))?;
        let header = Header::parse(&bytes[..have], path)?;
        let mut qcow2 = Qcow2 {
            file,
            path: path.to_owned(),
            file_size,
            l1: Vec::new(),
            header,
            tables: Mutex::new(Cache::new(CACHED_TABLES)),
            unpacked: Mutex::new(Cache::new(CACHED_CLUSTERS)),
        };
        let entries = qcow2.header.l1_needed as usize;
        qcow2.l1 = qcow2.read_table(qcow2.header.l1_offset, entries, "L1 table")?;
        Ok(qcow2)
    }

    /// Reads a table of big-endian words, which must be inside the file: the memory taken for it is
    /// then bounded by the file's own size.
    fn read_table(&self, offset: u64, entries: usize, what: &str) -> Result<Vec<u64>, DiskError> {
        let len = entries * 8;
        if offset.checked_add(len as u64).is_none_or(|end| end > self.file_size) {
            return Err(self.corrupt(format!(
                "{what} at {offset:#x} ends beyond the file's {} bytes",
                self.file_size
            )));
        }
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(DiskError::io(&self.path, "read"))?;
        Ok(bytes
            .chunks_exact(8)
            .map(|word| word.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)))
            .collect())
    }

    fn l2_table(&self, index: u64) -> Result<Option<Arc<Vec<u64>>>, DiskError> {
        let Some(&entry) = self.l1.get(index as usize) else {
            return Err(self.corrupt(format!("no L1 entry {index}")));
        };
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if offset % self.header.cluster_size() != 0 {
            return Err(self.corrupt(format!("L2 table {index} at {offset:#x} is not at a cluster boundary")));
        }
        if let Some(table) = self.tables.lock().unwrap_or_else(PoisonError::into_inner).get(offset) {
            return Ok(Some(table));
        }
        let table = Arc::new(self.read_table(offset, self.header.l2_entries() as usize, "L2 table")?);
        self.tables
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(offset, table.clone());
        Ok(Some(table))
    }

    fn cluster(&self, index: u64) -> Result<Cluster, DiskError> {
        let per_table = self.header.l2_entries();
        let Some(table) = self.l2_table(index / per_table)? else {
            return Ok(Cluster::Zero);
        };
        let entry = table[(index % per_table) as usize];
        if entry & COMPRESSED != 0 {
            // Bits 0 to x-1: offset, not aligned; x to 61: sectors beyond the one it starts in.
            let x = 62 - (self.header.cluster_bits - 8);
            let offset = entry & ((1 << x) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> x;
            return Ok(Cluster::Compressed {
                offset,
                len: (sectors + 1) * 512 - offset % 512,
            });
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 || (self.header.version >= 3 && entry & ZERO != 0) {
            return Ok(Cluster::Zero);
        }
        if offset % self.header.cluster_size() != 0 {
            return Err(self.corrupt(format!("cluster {index} at {offset:#x} is not at a cluster boundary")));
        }
        Ok(Cluster::At(offset))
    }

    /// Reads file bytes; the last cluster may be cut off at the file's end and reads as zeroes
    /// from there, but has to begin inside the file.
    fn read_file(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        if offset >= self.file_size {
            return Err(self.corrupt(format!(
                "data at {offset:#x} is beyond the file's {} bytes",
                self.file_size
            )));
        }
        let have = read_up_to(&self.file, buffer, offset).map_err(DiskError::io(&self.path, "read"))?;
        buffer[have..].fill(0);
        Ok(())
    }

    fn unpack(&self, offset: u64, len: u64) -> Result<Arc<Vec<u8>>, DiskError> {
        if let Some(data) = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).get(offset) {
            return Ok(data);
        }
        // `len` is at most two clusters: the field has cluster_bits - 8 bits of sectors.
        let mut packed = vec![0; len as usize];
        self.read_file(&mut packed, offset)?;
        let mut data = vec![0; self.header.cluster_size() as usize];
        let unpacked = match self.header.compression {
            Compression::Zlib => flate2::read::DeflateDecoder::new(packed.as_slice()).read_exact(&mut data),
            Compression::Zstd => match ruzstd::decoding::StreamingDecoder::new(packed.as_slice()) {
                Ok(mut decoder) => decoder.read_exact(&mut data),
                Err(error) => Err(std::io::Error::other(error)),
            },
        };
        unpacked.map_err(|error| self.corrupt(format!("compressed cluster at {offset:#x}: {error}")))?;
        let data = Arc::new(data);
        self.unpacked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(offset, data.clone());
        Ok(data)
    }

    fn corrupt(&self, what: String) -> DiskError {
        DiskError::corrupt(&self.path, what)
    }
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        check_range(self, offset, buffer.len() as u64)?;
        let cluster_size = self.header.cluster_size();
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let inside = at % cluster_size;
            let len = rest.len().min((cluster_size - inside) as usize);
            let (part, tail) = rest.split_at_mut(len);
            match self.cluster(at / cluster_size)? {
                Cluster::Zero => part.fill(0),
                Cluster::At(host) => self.read_file(part, host + inside)?,
                Cluster::Compressed { offset, len: packed } => {
                    let data = self.unpack(offset, packed)?;
                    part.copy_from_slice(&data[inside as usize..][..len]);
                }
            }
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly {
            path: self.path.clone(),
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly {
            path: self.path.clone(),
        })
    }
}

/// Fills as much of `buffer` as the file has from `offset` on.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], offset + have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
