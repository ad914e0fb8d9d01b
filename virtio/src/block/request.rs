//! One request of virtio-blk (VIRTIO 1.2, section 5.2.6).

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{MAX_RANGE_SECTORS, MAX_RANGES, SEG_MAX, SIZE_MAX};
use crate::GuestMemory;
use crate::disk::{Disk, DiskError, SECTOR_SIZE};
use crate::queue::{Chain, QueueError};
use crate::worker::{Halt, StopFlag};

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;
const ID_LEN: usize = 20;
const BOUNCE_LEN: usize = 1 << 20;
const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Failures of the host's disk that are logged, so that a dying disk doesn't fill the log too.
const LOGGED_FAILURES: u32 = 16;

/// How a request ended, apart from the guest's mistakes that break the device.
enum Outcome {
    /// Done; so many bytes were written to guest memory besides the status.
    Done(u32),
    IoError,
    Unsupported,
}

/// Executes requests one at a time, through one bounce buffer: a kernel call directly on guest
/// memory would fault it in page by page while holding up the disk.
pub(super) struct Requests {
    disk: Arc<dyn Disk>,
    bounce: Vec<u8>,
    write_through: bool,
    failures: u32,
}

impl Requests {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Requests {
            disk,
            bounce: vec![0; BOUNCE_LEN],
            write_through: false,
            failures: 0,
        }
    }

    /// Whether every write is followed by a flush.
    pub(super) fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    /// Executes the request in `chain` and stores its status. Returns the bytes written to guest
    /// memory, for the used ring.
    pub(super) fn execute(&mut self, chain: &Chain, memory: &GuestMemory, stop: &StopFlag) -> Result<u32, Halt> {
        let malformed = |reason| QueueError::Chain {
            head: chain.head(),
            reason,
        };
        if chain.readable_len() < HEADER_LEN as u64 {
            return Err(malformed("a block request without a header").into());
        }
        let Some(data_in) = chain.writable_len().checked_sub(1) else {
            return Err(malformed("a block request without a status byte").into());
        };
        let data_out = chain.readable_len() - HEADER_LEN as u64;
        let mut header = [0; HEADER_LEN];
        chain.read(memory, 0, &mut header)?;
        let kind = le_u32(&header, 0);
        let sector = le_u64(&header, 8);
        let outcome = match kind {
            VIRTIO_BLK_T_IN => self.read(chain, memory, stop, sector, data_in)?,
            VIRTIO_BLK_T_OUT => self.write(chain, memory, stop, sector, data_out)?,
            VIRTIO_BLK_T_FLUSH => {
                stop.check()?;
                let flushed = self.disk.flush();
                self.outcome(flushed)
            }
            VIRTIO_BLK_T_GET_ID => {
                let id = self.disk.id();
                let len = data_in.min(ID_LEN as u64) as usize;
                chain.write(memory, 0, &id[..len])?;
                Outcome::Done(len as u32)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(chain, memory, stop, kind, data_out)?,
            _ => Outcome::Unsupported,
        };
        let (status, written) = match outcome {
            Outcome::Done(written) => (VIRTIO_BLK_S_OK, written + 1),
            Outcome::IoError => (VIRTIO_BLK_S_IOERR, 1),
            Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, 1),
        };
        chain.write(memory, data_in, &[status as u8])?;
        Ok(written)
    }

    fn read(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        stop: &StopFlag,
        sector: u64,
        len: u64,
    ) -> Result<Outcome, Halt> {
        let Some(start) = self.byte_range(sector, len).filter(|_| len <= MAX_DATA) else {
            return Ok(Outcome::IoError);
        };
        let mut done = 0;
        while done < len {
            stop.check()?;
            let piece = (len - done).min(BOUNCE_LEN as u64) as usize;
            let read = self.disk.read_at(&mut self.bounce[..piece], start + done);
            if let Outcome::IoError = self.outcome(read) {
                return Ok(Outcome::IoError);
            }
            chain.write(memory, done, &self.bounce[..piece])?;
            done += piece as u64;
        }
        Ok(Outcome::Done(len as u32))
    }

    fn write(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        stop: &StopFlag,
        sector: u64,
        len: u64,
    ) -> Result<Outcome, Halt> {
        let start = self.byte_range(sector, len);
        let Some(start) = start.filter(|_| len <= MAX_DATA && !self.disk.read_only()) else {
            return Ok(Outcome::IoError);
        };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(BOUNCE_LEN as u64) as usize;
            chain.read(memory, HEADER_LEN as u64 + done, &mut self.bounce[..piece])?;
            stop.check()?;
            let write = self.disk.write_at(&self.bounce[..piece], start + done);
            if let Outcome::IoError = self.outcome(write) {
                return Ok(Outcome::IoError);
            }
            done += piece as u64;
        }
        if self.write_through {
            stop.check()?;
            let flushed = self.disk.flush();
            return Ok(self.outcome(flushed));
        }
        Ok(Outcome::Done(0))
    }

    /// Discard and write-zeroes: the data is a list of ranges.
    fn ranges(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        stop: &StopFlag,
        kind: u32,
        len: u64,
    ) -> Result<Outcome, Halt> {
        if self.disk.read_only() {
            return Ok(Outcome::IoError);
        }
        let most = u64::from(MAX_RANGES) * RANGE_LEN as u64;
        if len == 0 || len % RANGE_LEN as u64 != 0 || len > most {
            return Ok(Outcome::IoError);
        }
        let mut list = vec![0; len as usize];
        chain.read(memory, HEADER_LEN as u64, &mut list)?;
        for range in list.chunks_exact(RANGE_LEN) {
            let (sector, sectors, flags) = (le_u64(range, 0), le_u32(range, 8), le_u32(range, 12));
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            let reserved = flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if reserved || (kind == VIRTIO_BLK_T_DISCARD && unmap) {
                return Ok(Outcome::Unsupported);
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let Some(start) = self.byte_range(sector, len).filter(|_| sectors <= MAX_RANGE_SECTORS) else {
                return Ok(Outcome::IoError);
            };
            stop.check()?;
            let result = match kind {
                VIRTIO_BLK_T_DISCARD => self.disk.discard(start, len),
                _ => self.disk.write_zeroes(start, len, unmap),
            };
            if let Outcome::IoError = self.outcome(result) {
                return Ok(Outcome::IoError);
            }
        }
        Ok(Outcome::Done(0))
    }

    /// First byte of a range of whole sectors, if it lies on the disk.
    fn byte_range(&self, sector: u64, len: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR_SIZE)?;
        let end = start.checked_add(len)?;
        let fits = len % SECTOR_SIZE == 0 && end <= self.disk.size();
        fits.then_some(start)
    }

    fn outcome(&mut self, result: Result<(), DiskError>) -> Outcome {
        let Err(error) = result else {
            return Outcome::Done(0);
        };
        if self.failures < LOGGED_FAILURES {
            self.failures += 1;
            tracing::warn!(%error, "disk request failed; the guest gets an I/O error");
        }
        Outcome::IoError
    }
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le_u32(bytes, at)) | u64::from(le_u32(bytes, at + 4)) << 32
}
