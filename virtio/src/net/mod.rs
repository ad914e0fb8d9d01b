//! virtio-net (VIRTIO 1.2, section 5.1) on a tap interface: one queue pair, one thread a
//! direction.

mod receive;
mod tap;
mod transmit;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
};

pub use tap::{Frames, HEADER_LEN, Offloads, Tap};

use crate::device::{Activation, Queues, ResetToken, VirtioDevice, read_config};
use crate::error::{Error, Result};
use crate::queue::state::RingState;
use crate::state::DeviceState;
use crate::worker::Worker;
use receive::Receive;
use transmit::Transmit;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
const QUEUE_SIZE: u16 = 256;
/// Largest frame, a full TSO segment, with its header: 64 KiB and the Ethernet header.
const MAX_FRAME: usize = HEADER_LEN + 65536 + 18;
/// Frames moved before commands are looked at again.
const BATCH_FRAMES: usize = 64;
const STATE_VERSION: u32 = 1;

/// Saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Layout of this structure.
    pub version: u32,
    /// The address the guest was given.
    pub mac: [u8; 6],
}

/// A virtio network device.
pub struct Net {
    name: String,
    mac: [u8; 6],
    receive: Worker,
    transmit: Worker,
}

impl Net {
    /// A device named `name` in messages on the tap interface `interface`. Its MAC address is
    /// made from `machine`, the machine's name, so that it stays the same. Starts its threads.
    ///
    /// # Errors
    /// [`Error::Tap`], [`Error::TapName`], [`Error::Start`].
    pub fn open(name: &str, interface: &str, machine: &str) -> Result<Self> {
        let tap = Tap::open(interface)?;
        Self::new(name, mac_address(machine), tap.try_clone()?, tap)
    }

    /// A device between a source and a sink of frames; both may be the same interface.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn new(name: &str, mac: [u8; 6], from: impl Frames, to: impl Frames) -> Result<Self> {
        Ok(Net {
            name: name.into(),
            mac,
            receive: Worker::spawn(format!("{name}-rx"), Receive::new(from))?,
            transmit: Worker::spawn(format!("{name}-tx"), Transmit::new(to))?,
        })
    }
}

/// A locally administered unicast address that depends on `name` only (FNV-1a).
pub fn mac_address(name: &str) -> [u8; 6] {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut mac = [0; 6];
    mac.copy_from_slice(&hash.to_be_bytes()[2..]);
    mac[0] = (mac[0] & !1) | 2;
    mac
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn pci_class(&self) -> u32 {
        0x02_00_00
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]
        .iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        read_config(&self.mac, offset, data);
    }

    fn queues(&self) -> &dyn Queues {
        self
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {
            version: STATE_VERSION,
            mac: self.mac,
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<()> {
        if *state == self.save() {
            return Ok(());
        }
        let reason = match state {
            DeviceState::Net(net) if net.version == STATE_VERSION => "the guest knows another MAC address",
            _ => "it belongs to another kind or version of device",
        };
        Err(Error::bad_state(&self.name, reason))
    }
}

/// A thread for each direction.
impl Queues for Net {
    fn activate(&self, activation: Activation) {
        let Activation {
            rings,
            features,
            signals,
        } = activation;
        let (receive, transmit) = rings.into_iter().partition(|ring| ring.index() == RECEIVE_QUEUE);
        for (worker, rings) in [(&self.receive, receive), (&self.transmit, transmit)] {
            worker.activate(Activation {
                rings,
                features,
                signals: signals.clone(),
            });
        }
    }

    fn reset(&self, token: ResetToken) {
        self.receive.reset(Arc::clone(&token));
        self.transmit.reset(token);
    }

    fn kick(&self, index: u16) {
        match index {
            TRANSMIT_QUEUE => self.transmit.kick(index),
            _ => self.receive.kick(index),
        }
    }

    fn pause(&self) -> Result<Vec<RingState>> {
        let mut rings = self.receive.pause()?;
        rings.extend(self.transmit.pause()?);
        Ok(rings)
    }

    fn resume(&self) -> Result<()> {
        self.receive.resume()?;
        self.transmit.resume()
    }

    fn request_stop(&self) {
        self.receive.request_stop();
        self.transmit.request_stop();
    }

    fn stop(&self) {
        self.request_stop();
        self.receive.stop();
        self.transmit.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_local_unicast_and_stable() {
        let mac = mac_address("guest");
        assert_eq!(mac[0] & 3, 2);
        assert_eq!(mac, mac_address("guest"));
        assert_ne!(mac, mac_address("guest2"));
    }
}
