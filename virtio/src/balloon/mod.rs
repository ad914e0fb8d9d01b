//! virtio-balloon (VIRTIO 1.2, section 5.5) for one purpose: the guest reports pages that it has no use
//! for (free page reporting), and their memory can serve somebody else. The balloon is never inflated.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use crate::device::{Activation, Queues, VirtioDevice};
use crate::error::{Error, Result};
use crate::state::DeviceState;
use crate::worker::{Halt, Next, Service, StopFlag, Worker};

/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u32 = 5;
/// Inflate, deflate, reporting. Drivers number only the queues they have: without statistics and hints,
/// reports are the third.
const REPORTS: u16 = 2;
/// A report is up to 32 ranges, which Linux puts into one chain and needs room for.
const QUEUE_SIZES: [u16; 3] = [64, 64, 64];
const PAGE: u64 = 4096;
const STATE_VERSION: u32 = 1;

/// Takes memory back that the guest has no use for.
pub trait FreePages: Send + Sync {
    /// The content of `len` bytes at `gpa`, whole pages, is of no use: they read as zeros from now on, or
    /// as before where that is not possible. When this returns the guest may use them again. May block.
    fn free(&self, gpa: u64, len: u64);
}

/// Saved state: none but the version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Layout of this structure.
    pub version: u32,
}

/// A balloon that only hears of free pages.
pub struct Balloon {
    name: String,
    worker: Worker,
}

impl Balloon {
    /// A device named `name` in messages that tells `free` of free pages. Starts its thread.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn new(name: &str, free: Arc<dyn FreePages>) -> Result<Self> {
        let worker = Worker::spawn(name.into(), Reports { free })?;
        Ok(Balloon { name: name.into(), worker })
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        1 << REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `num_pages`, the size asked for, and `actual`: none.
    fn config_read(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn queues(&self) -> &dyn Queues {
        &self.worker
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState { version: STATE_VERSION })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        if *state == self.save() {
            return Ok(());
        }
        let reason = "it belongs to another kind or version of device";
        Err(Error::bad_state(&self.name, reason))
    }
}

struct Reports {
    free: Arc<dyn FreePages>,
}

impl Service for Reports {
    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> std::result::Result<Next, Halt> {
        let reporting = active.has(REPORTING);
        let mut next = Next::Kick;
        for ring in &mut active.rings {
            stop.check()?;
            let Some(chain) = ring.pop()? else {
                if ring.enable_notifications()? {
                    next = Next::More;
                }
                continue;
            };
            next = Next::More;
            // What comes to the other queues is about a balloon that nobody asked to grow: it is taken and
            // no page with it.
            if reporting && ring.index() == REPORTS {
                for segment in chain.writable() {
                    // Whole pages only. The range was checked to be in guest memory.
                    let first = segment.address.next_multiple_of(PAGE);
                    let end = (segment.address + u64::from(segment.len)) / PAGE * PAGE;
                    if first < end {
                        self.free.free(first, end - first);
                    }
                    stop.check()?;
                }
            }
            ring.complete(&[(chain.head(), 0)])?;
            if ring.wants_interrupt()? {
                active.signals.queue(ring.index());
            }
        }
        Ok(next)
    }
}
