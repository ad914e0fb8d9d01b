//! virtio-blk (VIRTIO 1.2, section 5.2): one request queue and one thread over a [`Disk`].

mod request;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::Prefetch;
use crate::device::{Activation, Queues, VirtioDevice, read_config};
use crate::disk::{Disk, SECTOR_SIZE};
use crate::error::{Error, Result};
use crate::state::DeviceState;
use crate::worker::{Halt, Next, Service, StopFlag, Worker};
use request::Requests;

const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Largest data segment in bytes; with [`SEG_MAX`] this bounds a request below 64 MiB.
const SIZE_MAX: u32 = 256 << 10;
/// Largest discard or write-zeroes segment in sectors, 64 MiB.
const MAX_RANGE_SECTORS: u32 = 1 << 17;
/// Segments of one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// Bytes moved before the driver is told and commands are looked at again.
const BATCH_BYTES: u64 = 1 << 20;
/// Requests served before that.
const BATCH_REQUESTS: usize = 64;
const STATE_VERSION: u32 = 1;

/// Saved state: what the image must have in common with the one it was saved over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Layout of this structure.
    pub version: u32,
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Whether the guest was told that it can't write.
    pub read_only: bool,
}

/// A virtio block device.
pub struct Block {
    name: String,
    disk: Arc<dyn Disk>,
    worker: Worker,
}

impl Block {
    /// A device over `disk`, named `name` in messages. Starts its thread.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn new(name: &str, disk: Arc<dyn Disk>) -> Result<Self> {
        Self::start(name, disk, None)
    }

    /// Like [`Block::new`]; each request's memory is announced to `prefetch` before it is touched.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn with_prefetch(name: &str, disk: Arc<dyn Disk>, prefetch: Arc<dyn Prefetch>) -> Result<Self> {
        Self::start(name, disk, Some(prefetch))
    }

    fn start(name: &str, disk: Arc<dyn Disk>, prefetch: Option<Arc<dyn Prefetch>>) -> Result<Self> {
        let service = BlockService {
            requests: Requests::new(disk.clone()),
            prefetch,
        };
        Ok(Block {
            name: name.into(),
            disk,
            worker: Worker::spawn(name.into(), service)?,
        })
    }

    /// Configuration structure (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, value: u32| {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        let sectors = self.disk.sectors();
        put(0, sectors as u32);
        put(4, (sectors >> 32) as u32);
        put(8, SIZE_MAX);
        put(12, SEG_MAX);
        put(20, SECTOR_SIZE as u32);
        put(36, MAX_RANGE_SECTORS);
        put(40, MAX_RANGES);
        // Discards are best aligned to 4 KiB, the block of most file systems that hold images.
        put(44, 8);
        put(48, MAX_RANGE_SECTORS);
        put(52, MAX_RANGES);
        // write_zeroes_may_unmap, one byte.
        put(56, 1);
        config
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn pci_class(&self) -> u32 {
        0x01_80_00
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        let access: &[u32] = match self.disk.read_only() {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        always.iter().chain(access).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn queues(&self) -> &dyn Queues {
        &self.worker
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            version: STATE_VERSION,
            sectors: self.disk.sectors(),
            read_only: self.disk.read_only(),
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        if *state == self.save() {
            return Ok(());
        }
        let reason = match state {
            DeviceState::Block(block) if block.version != STATE_VERSION => {
                format!("version {} is not {STATE_VERSION}", block.version)
            }
            DeviceState::Block(block) => format!(
                "a disk of {} sectors, read-only: {}; this one has {}, {}",
                block.sectors,
                block.read_only,
                self.disk.sectors(),
                self.disk.read_only()
            ),
            _ => "it belongs to another kind of device".into(),
        };
        Err(Error::bad_state(&self.name, reason))
    }
}

struct BlockService {
    requests: Requests,
    prefetch: Option<Arc<dyn Prefetch>>,
}

impl Service for BlockService {
    fn begin(&mut self, active: &Activation) {
        // Without FLUSH the driver relies on completed writes being durable.
        self.requests.set_write_through(!active.has(VIRTIO_BLK_F_FLUSH));
    }

    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> std::result::Result<Next, Halt> {
        let Some(ring) = active.rings.first_mut() else {
            return Ok(Next::Kick);
        };
        ring.disable_notifications()?;
        let memory = ring.memory().clone();
        let (mut bytes, mut requests) = (0, 0);
        while bytes < BATCH_BYTES && requests < BATCH_REQUESTS {
            stop.check()?;
            let Some(chain) = ring.pop()? else {
                break;
            };
            if let Some(prefetch) = &self.prefetch {
                chain.prefetch(&**prefetch, BATCH_BYTES);
            }
            let written = self.requests.execute(&chain, &memory, stop)?;
            ring.complete(&[(chain.head(), written)])?;
            bytes += chain.readable_len() + chain.writable_len();
            requests += 1;
        }
        if requests > 0 && ring.wants_interrupt()? {
            active.signals.queue(ring.index());
        }
        match requests > 0 || ring.enable_notifications()? {
            true => Ok(Next::More),
            false => Ok(Next::Kick),
        }
    }
}
