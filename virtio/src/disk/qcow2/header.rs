//! The qcow2 header: what is read of it, and what is refused.

use std::path::Path;

use super::super::{DiskError, MAX_SIZE, SECTOR_SIZE};

/// First bytes of every qcow2 image.
pub(in super::super) const MAGIC: &[u8] = b"QFI\xfb";

/// Bytes read for the header: version 3 with the compression type.
pub(super) const SIZE: usize = 112;

/// Most L1 entries that are accepted: a table of 32 MiB, as in QEMU.
const MAX_L1: u64 = 4 << 20;

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// Raw deflate.
    Zlib,
    /// One zstd frame.
    Zstd,
}

/// The checked header.
#[derive(Debug)]
pub(super) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk in bytes: a multiple of 512, not 0, at most [`MAX_SIZE`].
    pub size: u64,
    /// Log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Where the L1 table starts.
    pub l1_offset: u64,
    /// Entries of the L1 table that `size` needs; at least as many are in the file.
    pub l1_needed: u64,
    /// How compressed clusters are packed.
    pub compression: Compression,
}

impl Header {
    /// Bytes in a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in an L2 table, which is one cluster.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8
    }

    /// Reads a header from the file's first bytes.
    pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Header, DiskError> {
        let field = |at: usize, len: usize| -> Result<u64, DiskError> {
            let field = bytes
                .get(at..at + len)
                .ok_or_else(|| DiskError::corrupt(path, "the qcow2 header is cut off"))?;
            Ok(field.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)))
        };
        let refuse = |what: String, remedy| {
            Err(DiskError::Format {
                path: path.to_owned(),
                what,
                remedy,
            })
        };
        let convert = "convert it with qemu-img convert -O qcow2";

        if !bytes.starts_with(MAGIC) {
            return refuse("has no qcow2 header".into(), "give a qcow2 or raw image");
        }
        let version = field(4, 4)? as u32;
        if version != 2 && version != 3 {
            return refuse(format!("qcow2 version {version} is not known"), convert);
        }
        if field(8, 8)? != 0 {
            // Followed, an image from elsewhere could name any file of this host.
            return refuse("has a backing file, which is not followed".into(), convert);
        }
        let cluster_bits = field(20, 4)? as u32;
        if !(9..=21).contains(&cluster_bits) {
            return Err(DiskError::corrupt(
                path,
                format!("cluster size of 2^{cluster_bits} bytes"),
            ));
        }
        let size = field(24, 8)?;
        if size == 0 || size % SECTOR_SIZE != 0 || size > MAX_SIZE {
            return Err(DiskError::corrupt(path, format!("disk size of {size} bytes")));
        }
        if field(32, 4)? != 0 {
            return refuse("is encrypted".into(), convert);
        }
        let compression = if version == 3 {
            Self::features(&field, path)?
        } else {
            Compression::Zlib
        };
        let l1_covers = 1u64 << (2 * cluster_bits - 3);
        let (l1_size, l1_needed) = (field(36, 4)?, size.div_ceil(l1_covers));
        if l1_needed > MAX_L1 {
            return refuse(
                format!("clusters of 2^{cluster_bits} bytes are too small for its {size} bytes"),
                convert,
            );
        }
        if l1_size < l1_needed {
            return Err(DiskError::corrupt(
                path,
                format!("L1 table of {l1_size} entries, {l1_needed} needed"),
            ));
        }
        Ok(Header {
            version,
            size,
            cluster_bits,
            l1_offset: field(40, 8)?,
            l1_needed,
            compression,
        })
    }

    /// The incompatible features of version 3: bits that a reader must know.
    fn features(
        field: &impl Fn(usize, usize) -> Result<u64, DiskError>,
        path: &Path,
    ) -> Result<Compression, DiskError> {
        // Bit 0: reference counts may be wrong; a reader does not use them.
        const DIRTY: u64 = 1;
        const CORRUPT: u64 = 1 << 1;
        const COMPRESSION_TYPE: u64 = 1 << 3;
        let features = field(72, 8)?;
        if features & CORRUPT != 0 {
            return Err(DiskError::corrupt(
                path,
                "marked as corrupt by the program that wrote it",
            ));
        }
        let unknown = features & !(DIRTY | COMPRESSION_TYPE);
        if unknown != 0 {
            return Err(DiskError::Format {
                path: path.to_owned(),
                what: format!("uses qcow2 features that are not read (bits {unknown:#x})"),
                remedy: "convert it with qemu-img convert -O qcow2",
            });
        }
        if features & COMPRESSION_TYPE == 0 {
            return Ok(Compression::Zlib);
        }
        match field(104, 1)? {
            0 => Ok(Compression::Zlib),
            1 => Ok(Compression::Zstd),
            other => Err(DiskError::corrupt(path, format!("compression type {other}"))),
        }
    }
}
