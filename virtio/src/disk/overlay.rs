//! A private copy-on-write overlay: the guest may write, the image stays as it was.
//!
//! Written blocks live in an unlinked, sparse temporary file at the same offset as on the disk; a
//! bitmap tells which ones. A block is copied from the image only when a request covers part of it,
//! and file systems write whole blocks, so that is rare.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};

use super::raw::zero_file;
use super::{Disk, DiskError, check_range};

/// Unit of copying in bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// Layout version of [`OverlayState`].
const STATE_VERSION: u32 = 1;

/// Bitmap words in one chunk; a chunk covers 128 MiB of disk and exists once one block in it was
/// written.
const CHUNK_WORDS: usize = 512;
const CHUNK_BLOCKS: u64 = CHUNK_WORDS as u64 * 64;

/// What a snapshot keeps of an overlay besides its data ([`Overlay::export`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayState {
    /// Layout of this struct; 1.
    pub version: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// [`BLOCK_SIZE`] of the writer.
    pub block_size: u64,
    /// The blocks that differ from the image: first block and count, ascending, never touching.
    pub runs: Vec<(u64, u64)>,
}

/// A disk whose writes go to a temporary file over a read-only base.
pub struct Overlay {
    base: Arc<dyn Disk>,
    file: File,
    map: RwLock<Bitmap>,
}

impl Overlay {
    /// An overlay without any written block. The temporary file is made in `TMPDIR`, or
    /// `/var/tmp`, which unlike `/tmp` is seldom in memory.
    pub fn new(base: Arc<dyn Disk>) -> Result<Overlay, DiskError> {
        let directory = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let file = tempfile::tempfile_in(&directory).and_then(|file| {
            file.set_len(base.size())?;
            Ok(file)
        });
        let file = file.map_err(|source| DiskError::Overlay {
            path: base.path().to_owned(),
            directory,
            source,
        })?;
        Ok(Overlay {
            base,
            file,
            map: RwLock::default(),
        })
    }

    /// The map of written blocks. The machine must be paused: [`Overlay::export`] then writes the
    /// data that belongs to it.
    pub fn save(&self) -> OverlayState {
        OverlayState {
            version: STATE_VERSION,
            size: self.base.size(),
            block_size: BLOCK_SIZE,
            runs: self.map().runs(),
        }
    }

    /// Writes the data of every run of [`Overlay::save`], in order; the last block of the disk is
    /// cut off at the disk's end.
    pub fn export(&self, to: &mut dyn Write) -> Result<(), DiskError> {
        let mut buffer = vec![0; 1 << 20];
        for (first, count) in self.map().runs() {
            let end = ((first + count) * BLOCK_SIZE).min(self.size());
            let mut at = first * BLOCK_SIZE;
            while at < end {
                let len = (end - at).min(buffer.len() as u64) as usize;
                self.file
                    .read_exact_at(&mut buffer[..len], at)
                    .map_err(self.io("read the overlay"))?;
                to.write_all(&buffer[..len]).map_err(self.io("export the overlay"))?;
                at += len as u64;
            }
        }
        Ok(())
    }

    /// An overlay with the map `state` over `base`, its data read from `data` as
    /// [`Overlay::export`] wrote it. Both are checked: a snapshot may come from elsewhere.
    pub fn restore(base: Arc<dyn Disk>, state: &OverlayState, data: &mut dyn Read) -> Result<Overlay, DiskError> {
        let refuse = |what: String| {
            Err(DiskError::State {
                path: base.path().to_owned(),
                what,
            })
        };
        if state.version != STATE_VERSION {
            return refuse(format!(
                "version {} of its map, this program reads {STATE_VERSION}",
                state.version
            ));
        }
        if state.block_size != BLOCK_SIZE || state.size != base.size() {
            return refuse(format!(
                "it is for {} bytes in blocks of {}, the image has {}",
                state.size,
                state.block_size,
                base.size()
            ));
        }
        let blocks = base.size().div_ceil(BLOCK_SIZE);
        let mut free = 0;
        for &(first, count) in &state.runs {
            match first.checked_add(count) {
                Some(end) if first >= free && count > 0 && end <= blocks => free = end,
                _ => return refuse(format!("run of {count} blocks at {first} is out of order or range")),
            }
        }
        let overlay = Overlay::new(base)?;
        let mut buffer = vec![0; 1 << 20];
        for &(first, count) in &state.runs {
            let end = ((first + count) * BLOCK_SIZE).min(overlay.size());
            let mut at = first * BLOCK_SIZE;
            while at < end {
                let len = (end - at).min(buffer.len() as u64) as usize;
                data.read_exact(&mut buffer[..len])
                    .map_err(overlay.io("restore the overlay"))?;
                overlay
                    .file
                    .write_all_at(&buffer[..len], at)
                    .map_err(overlay.io("write the overlay"))?;
                at += len as u64;
            }
            overlay.map_mut().set(first, count);
        }
        Ok(overlay)
    }

    fn io(&self, action: &'static str) -> impl FnOnce(io::Error) -> DiskError + '_ {
        DiskError::io(self.base.path(), action)
    }

    // A panic under the lock leaves the bitmap whole, as bits are set one by one.
    fn map(&self) -> RwLockReadGuard<'_, Bitmap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn map_mut(&self) -> RwLockWriteGuard<'_, Bitmap> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `change` with every block of the range that is in the file, after copying those
    /// blocks from the base that the range covers only in part; then marks them all.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&File) -> io::Result<()>,
        action: &'static str,
    ) -> Result<(), DiskError> {
        check_range(self, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let (first, last) = (offset / BLOCK_SIZE, (offset + len - 1) / BLOCK_SIZE);
        let map = self.map();
        if (first..=last).all(|block| map.get(block)) {
            return change(&self.file).map_err(self.io(action));
        }
        drop(map);
        // Under the write lock nobody sees a block between its copy and its mark, and no other
        // writer's data in it is lost to the copy.
        let mut map = self.map_mut();
        for (block, whole) in [
            (
                first,
                offset % BLOCK_SIZE == 0 && (len >= BLOCK_SIZE || offset + len == self.size()),
            ),
            (last, (offset + len) % BLOCK_SIZE == 0 || offset + len == self.size()),
        ] {
            let whole = whole && (first != last || offset % BLOCK_SIZE == 0);
            if !whole && !map.get(block) {
                self.copy(block)?;
                map.set(block, 1);
            }
        }
        change(&self.file).map_err(self.io(action))?;
        map.set(first, last - first + 1);
        Ok(())
    }

    fn copy(&self, block: u64) -> Result<(), DiskError> {
        let mut buffer = [0; BLOCK_SIZE as usize];
        let at = block * BLOCK_SIZE;
        let len = (self.size() - at).min(BLOCK_SIZE) as usize;
        self.base.read_at(&mut buffer[..len], at)?;
        self.file
            .write_all_at(&buffer[..len], at)
            .map_err(self.io("write the overlay"))
    }
}

impl Disk for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
        check_range(self, offset, buffer.len() as u64)?;
        let map = self.map();
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            // As many blocks as come from the same place, by one read.
            let written = map.get(at / BLOCK_SIZE);
            let mut run_end = (at / BLOCK_SIZE + 1) * BLOCK_SIZE;
            while run_end < end && map.get(run_end / BLOCK_SIZE) == written {
                run_end += BLOCK_SIZE;
            }
            let run_end = run_end.min(end);
            let part = &mut buffer[(at - offset) as usize..(run_end - offset) as usize];
            if written {
                self.file.read_exact_at(part, at).map_err(self.io("read the overlay"))?;
            } else {
                self.base.read_at(part, at)?;
            }
            at = run_end;
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        self.change(
            offset,
            data.len() as u64,
            |file| file.write_all_at(data, offset),
            "write the overlay",
        )
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        // A hole in the temporary file reads as zeroes and gives its space back either way.
        self.change(
            offset,
            len,
            |file| zero_file(file, offset, len, true),
            "zero the overlay",
        )
    }

    fn overlay(&self) -> Option<&Overlay> {
        Some(self)
    }
}

/// One bit a block, in chunks that exist only where a bit is set.
#[derive(Default)]
struct Bitmap {
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
}

impl Bitmap {
    fn get(&self, block: u64) -> bool {
        let bit = block % CHUNK_BLOCKS;
        self.chunks
            .get(&(block / CHUNK_BLOCKS))
            .is_some_and(|c| c[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    fn set(&mut self, first: u64, count: u64) {
        for block in first..first + count {
            let chunk = self
                .chunks
                .entry(block / CHUNK_BLOCKS)
                .or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            let bit = block % CHUNK_BLOCKS;
            chunk[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (&chunk, words) in &self.chunks {
            for (index, &word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let block = chunk * CHUNK_BLOCKS + index as u64 * 64 + bit;
                    match runs.last_mut() {
                        Some((first, count)) if *first + *count == block => *count += 1,
                        _ => runs.push((block, 1)),
                    }
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_joins_runs_across_words_and_chunks() {
        let mut map = Bitmap::default();
        map.set(CHUNK_BLOCKS - 2, 4);
        map.set(63, 2);
        map.set(7, 1);
        assert_eq!(map.runs(), [(7, 1), (63, 2), (CHUNK_BLOCKS - 2, 4)]);
        assert!(map.get(64) && !map.get(65) && map.get(CHUNK_BLOCKS));
    }
}
