//! Unpacks the payload of a bzImage by the format its first bytes tell (Linux, lib/decompress.c).
//! The output is bounded: a small file can unpack to any size.

use std::io::{self, Read};

/// Largest kernel that is unpacked, in bytes. Distribution kernels are 30 to 100 MiB.
pub const MAX_UNPACKED: usize = 512 << 20;

/// Memory an xz or lzma dictionary may take, in KiB. The kernel's build uses at most 128 MiB.
const MAX_DICTIONARY_KIB: u32 = 256 << 10;

/// Uncompressed bytes of every LZ4 legacy block but the last.
const LZ4_BLOCK: usize = 8 << 20;

/// Why a payload does not unpack: the end of a line.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The format is known by its magic number but not unpacked here.
    #[error("it is compressed with {0}, which is not unpacked; use a kernel with gzip, xz, lzma, lz4 or zstd")]
    Unsupported(&'static str),
    /// The format is not known.
    #[error("its compression is not known (first bytes {0:02x?})")]
    Unknown([u8; 4]),
    /// The data is damaged.
    #[error("{format} data is damaged: {source}")]
    Damaged {
        /// The format.
        format: &'static str,
        /// What the decoder says.
        source: io::Error,
    },
    /// The output would be larger than [`MAX_UNPACKED`].
    #[error("it is larger than {} MiB unpacked", MAX_UNPACKED >> 20)]
    TooLarge,
}

/// Unpacks `payload`, whose last 4 bytes are the unpacked size (little endian): a hint, not trusted.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, UnpackError> {
    unpack_bounded(payload, MAX_UNPACKED)
}

fn unpack_bounded(payload: &[u8], limit: usize) -> Result<Vec<u8>, UnpackError> {
    let (data, hint) = match payload.split_last_chunk::<4>() {
        Some((data, size)) => (data, u32::from_le_bytes(*size) as usize),
        None => (payload, 0),
    };
    // Compressed by more than 1:64 no real kernel is: the hint of a forged one takes no memory.
    let hint = hint.min(data.len().saturating_mul(64)).min(limit);
    match payload {
        // For gzip the size belongs to the format itself.
        [0x1f, 0x8b, ..] => drain("gzip", flate2::read::GzDecoder::new(payload), hint, limit),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => drain(
            "xz",
            lzma_rust2::XzReader::new_mem_limit(data, false, MAX_DICTIONARY_KIB),
            hint,
            limit,
        ),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(data);
            let decoder = decoder.map_err(|error| damaged("zstd", io::Error::other(error)))?;
            drain("zstd", decoder, hint, limit)
        }
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => lz4_legacy(rest, hint, limit),
        [0x5d, 0, 0, ..] => {
            let decoder = lzma_rust2::LzmaReader::new_mem_limit(data, MAX_DICTIONARY_KIB, None);
            drain("lzma", decoder.map_err(|error| damaged("lzma", error))?, hint, limit)
        }
        [b'B', b'Z', b'h', ..] => Err(UnpackError::Unsupported("bzip2")),
        [0x89, b'L', b'Z', b'O', ..] => Err(UnpackError::Unsupported("LZO")),
        // Not packed at all (CONFIG_KERNEL_UNCOMPRESSED); the caller checks the ELF file.
        [0x7f, b'E', b'L', b'F', ..] if payload.len() <= limit => Ok(payload.to_vec()),
        [a, b, c, d, ..] => Err(UnpackError::Unknown([*a, *b, *c, *d])),
        _ => Err(UnpackError::Unknown([0; 4])),
    }
}

fn damaged(format: &'static str, source: io::Error) -> UnpackError {
    UnpackError::Damaged { format, source }
}

fn drain(format: &'static str, decoder: impl Read, hint: usize, limit: usize) -> Result<Vec<u8>, UnpackError> {
    let mut out = Vec::with_capacity(hint);
    decoder
        .take(limit as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|error| damaged(format, error))?;
    if out.len() > limit {
        return Err(UnpackError::TooLarge);
    }
    Ok(out)
}

/// LZ4 "legacy" frames, as the kernel's build makes them: blocks, each with its packed length.
fn lz4_legacy(packed: &[u8], hint: usize, limit: usize) -> Result<Vec<u8>, UnpackError> {
    let cut_off = || damaged("lz4", io::Error::from(io::ErrorKind::UnexpectedEof));
    let mut rest = packed;
    let mut out = Vec::with_capacity(hint);
    // The unpacked size at the end of the payload is what is left after the last block.
    while rest.len() > 4 {
        let Some((len, tail)) = rest.split_first_chunk::<4>() else {
            break;
        };
        let (block, tail) = tail
            .split_at_checked(u32::from_le_bytes(*len) as usize)
            .ok_or_else(cut_off)?;
        let start = out.len();
        if start >= limit {
            return Err(UnpackError::TooLarge);
        }
        out.resize(start + LZ4_BLOCK, 0);
        let len = lz4_flex::block::decompress_into(block, &mut out[start..])
            .map_err(|error| damaged("lz4", io::Error::other(error)))?;
        out.truncate(start + len);
        rest = tail;
    }
    if out.len() > limit {
        return Err(UnpackError::TooLarge);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn output_is_bounded_and_the_size_hint_is_not_believed() {
        let payload = gzip(&vec![7; 1 << 20]);
        assert_eq!(unpack_bounded(&payload, 1 << 20).unwrap().len(), 1 << 20);
        assert!(matches!(
            unpack_bounded(&payload, (1 << 20) - 1),
            Err(UnpackError::TooLarge)
        ));
        let mut forged = payload;
        let at = forged.len() - 4;
        forged[at..].fill(0xff);
        assert!(matches!(
            unpack(&forged),
            Err(UnpackError::Damaged { format: "gzip", .. })
        ));
    }

    #[test]
    fn lz4_blocks_are_joined() {
        let data: Vec<u8> = (0..LZ4_BLOCK + 1000).map(|i| (i / 300) as u8).collect();
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        for block in data.chunks(LZ4_BLOCK) {
            // One literal run: a valid block that needs no encoder.
            payload.extend(lz4_literals(block));
        }
        payload.extend((data.len() as u32).to_le_bytes());
        assert!(unpack(&payload).unwrap() == data);
        payload.truncate(payload.len() - 500);
        assert!(matches!(
            unpack(&payload),
            Err(UnpackError::Damaged { format: "lz4", .. })
        ));
    }

    fn lz4_literals(data: &[u8]) -> Vec<u8> {
        let mut block = vec![0xf0];
        let mut len = data.len() - 15;
        while len >= 255 {
            block.push(255);
            len -= 255;
        }
        block.push(len as u8);
        block.extend(data);
        let mut out = (block.len() as u32).to_le_bytes().to_vec();
        out.extend(block);
        out
    }

    #[test]
    fn other_formats_are_named() {
        assert!(unpack(b"BZh91AY").unwrap_err().to_string().contains("bzip2"));
        assert!(unpack(b"\x89LZO\0\r\n").unwrap_err().to_string().contains("LZO"));
        assert!(unpack(b"abcdefgh").unwrap_err().to_string().contains("61, 62, 63, 64"));
        assert!(unpack(b"").is_err());
    }
}
