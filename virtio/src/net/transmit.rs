//! Frames from the guest to the host.

use super::tap::{Frames, HEADER_LEN};
use super::{BATCH_FRAMES, MAX_FRAME};
use crate::device::Activation;
use crate::worker::{Halt, Next, Service, StopFlag};

pub(super) struct Transmit<F> {
    frames: F,
    buffer: Vec<u8>,
}

impl<F: Frames> Transmit<F> {
    pub(super) fn new(frames: F) -> Self {
        Transmit {
            frames,
            buffer: vec![0; MAX_FRAME],
        }
    }
}

impl<F: Frames> Service for Transmit<F> {
    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> Result<Next, Halt> {
        let Some(ring) = active.rings.first_mut() else {
            return Ok(Next::Kick);
        };
        ring.disable_notifications()?;
        let mut sent = 0;
        while sent < BATCH_FRAMES {
            let Some(chain) = ring.pop()? else {
                break;
            };
            let len = chain.readable_len() as usize;
            // What is too short or too long for a frame is dropped, as a wire would.
            if (HEADER_LEN..=MAX_FRAME).contains(&len) {
                let frame = &mut self.buffer[..len];
                chain.read(ring.memory(), 0, frame)?;
                stop.check()?;
                // So is what the interface has no room for or finds malformed.
                let _ = self.frames.send(frame);
            }
            ring.complete(&[(chain.head(), 0)])?;
            sent += 1;
        }
        if sent > 0 && ring.wants_interrupt()? {
            active.signals.queue(ring.index());
        }
        match sent > 0 || ring.enable_notifications()? {
            true => Ok(Next::More),
            false => Ok(Next::Kick),
        }
    }
}
