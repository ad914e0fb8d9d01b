//! Frames from the host to the guest.

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
};

use super::tap::{Frames, HEADER_LEN, Offloads};
use super::{BATCH_FRAMES, MAX_FRAME};
use crate::device::Activation;
use crate::queue::{Chain, QueueError, Ring};
use crate::worker::{Halt, Next, Service, StopFlag};

/// Place of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

pub(super) struct Receive<F> {
    frames: F,
    buffer: Vec<u8>,
    /// Length of a frame in `buffer` that waits for guest buffers. A reset or a snapshot loses
    /// it, as networks may.
    waiting: Option<usize>,
}

/// What became of a frame.
enum Placed {
    /// It is in guest memory.
    Done,
    /// It waits for more buffers.
    NoBuffers,
    /// It fits in no single buffer and may not be spread.
    TooLong,
}

impl<F: Frames> Receive<F> {
    pub(super) fn new(frames: F) -> Self {
        Receive {
            frames,
            buffer: vec![0; MAX_FRAME],
            waiting: None,
        }
    }

    /// Puts the first `len` bytes of the buffer into guest buffers: one, or with `mergeable` as
    /// many as it takes (section 5.1.6.4).
    fn place(&mut self, ring: &mut Ring, len: usize, mergeable: bool) -> Result<Placed, QueueError> {
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < len as u64 {
            let Some(chain) = ring.pop()? else {
                // Asked for while all buffers are taken, so that any new one brings a kick.
                if ring.enable_notifications()? {
                    continue;
                }
                // Those taken so far are taken again when there are more.
                ring.unpop(chains.len() as u16);
                return Ok(match chains.len() < usize::from(ring.size()) {
                    true => Placed::NoBuffers,
                    false => Placed::TooLong,
                });
            };
            if chain.writable_len() < HEADER_LEN as u64 {
                return Err(QueueError::Chain {
                    head: chain.head(),
                    reason: "a receive buffer without room for the header",
                });
            }
            room += chain.writable_len();
            chains.push(chain);
            if !mergeable {
                break;
            }
        }
        if room < len as u64 {
            ring.unpop(chains.len() as u16);
            return Ok(Placed::TooLong);
        }
        let count = chains.len() as u16;
        self.buffer[NUM_BUFFERS..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.buffer[..len];
        for chain in &chains {
            let piece = rest.len().min(chain.writable_len() as usize);
            chain.write(ring.memory(), 0, &rest[..piece])?;
            rest = &rest[piece..];
        }
        // The driver counts on finding all buffers of a frame at once.
        let mut rest = len as u64;
        let used: Vec<_> = chains
            .iter()
            .map(|chain| {
                let piece = rest.min(chain.writable_len());
                rest -= piece;
                (chain.head(), piece as u32)
            })
            .collect();
        ring.complete(&used)?;
        Ok(Placed::Done)
    }
}

impl<F: Frames> Service for Receive<F> {
    fn begin(&mut self, active: &Activation) {
        self.waiting = None;
        let checksum = active.has(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = checksum && active.has(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = checksum && active.has(VIRTIO_NET_F_GUEST_TSO6);
        let offloads = Offloads {
            checksum,
            tso4,
            tso6,
            ecn: (tso4 || tso6) && active.has(VIRTIO_NET_F_GUEST_ECN),
        };
        if let Err(error) = self.frames.offloads(offloads) {
            // Frames then come finished, which every guest takes.
            tracing::warn!(%error, "network offloads stay off");
        }
    }

    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> Result<Next, Halt> {
        let mergeable = active.has(VIRTIO_NET_F_MRG_RXBUF);
        let Some(ring) = active.rings.first_mut() else {
            return Ok(Next::Kick);
        };
        ring.disable_notifications()?;
        let mut placed = 0;
        let next = loop {
            stop.check()?;
            if placed == BATCH_FRAMES {
                break Next::More;
            }
            let len = match self.waiting.take() {
                Some(len) => len,
                None => match self.frames.receive(&mut self.buffer) {
                    Ok(len) if len >= HEADER_LEN => len,
                    Ok(_) => continue,
                    Err(error) => match error.kind() {
                        io::ErrorKind::WouldBlock => {
                            break Next::KickOr(self.frames.descriptor());
                        }
                        io::ErrorKind::Interrupted => continue,
                        // The interface is gone. Polling its descriptor would spin.
                        _ => {
                            tracing::warn!(%error, "the tap interface gives no more frames");
                            break Next::Kick;
                        }
                    },
                },
            };
            match self.place(ring, len, mergeable)? {
                Placed::Done => placed += 1,
                Placed::TooLong => {}
                Placed::NoBuffers => {
                    self.waiting = Some(len);
                    break Next::Kick;
                }
            }
        };
        if placed > 0 && ring.wants_interrupt()? {
            active.signals.queue(ring.index());
        }
        Ok(next)
    }
}
