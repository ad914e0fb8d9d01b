//! virtio-rng (VIRTIO 1.2, section 5.4): the host kernel's random numbers.

use std::fs::File;
use std::io::Read;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::device::{Activation, Queues, VirtioDevice};
use crate::error::{Error, Result};
use crate::state::DeviceState;
use crate::worker::{Halt, Next, Service, StopFlag, Worker};

const QUEUE_SIZE: u16 = 64;
/// Bytes given for one buffer; the driver asks again for more.
const MAX_BYTES: usize = 4096;
const STATE_VERSION: u32 = 1;

/// Saved state: none but the version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// Layout of this structure.
    pub version: u32,
}

/// An entropy device.
pub struct Rng {
    name: String,
    worker: Worker,
}

impl Rng {
    /// A device named `name` in messages. Starts its thread.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn new(name: &str) -> Result<Self> {
        let source = File::open("/dev/urandom").map_err(|source| Error::Start {
            device: name.into(),
            source,
        })?;
        let service = RngService {
            source,
            bytes: vec![0; MAX_BYTES],
        };
        Ok(Rng {
            name: name.into(),
            worker: Worker::spawn(name.into(), service)?,
        })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_read(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn queues(&self) -> &dyn Queues {
        &self.worker
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState { version: STATE_VERSION })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        if *state == self.save() {
            return Ok(());
        }
        let reason = "it belongs to another kind or version of device";
        Err(Error::bad_state(&self.name, reason))
    }
}

struct RngService {
    source: File,
    bytes: Vec<u8>,
}

impl Service for RngService {
    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> std::result::Result<Next, Halt> {
        let Some(ring) = active.rings.first_mut() else {
            return Ok(Next::Kick);
        };
        stop.check()?;
        let Some(chain) = ring.pop()? else {
            return match ring.enable_notifications()? {
                true => Ok(Next::More),
                false => Ok(Next::Kick),
            };
        };
        let len = chain.writable_len().min(MAX_BYTES as u64) as usize;
        let bytes = &mut self.bytes[..len];
        // The kernel's generator does not fail once open; if it did, the driver would get
        // nothing rather than bytes that are not random.
        let written = match self.source.read_exact(bytes) {
            Ok(()) => {
                chain.write(ring.memory(), 0, bytes)?;
                len as u32
            }
            Err(error) => {
                tracing::warn!(%error, "the host gives no random numbers");
                0
            }
        };
        ring.complete(&[(chain.head(), written)])?;
        if ring.wants_interrupt()? {
            active.signals.queue(ring.index());
        }
        Ok(Next::More)
    }
}
