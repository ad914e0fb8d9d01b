//! One virtqueue as a device's thread sees it: a split ring (VIRTIO 1.2, section 2.7) in guest
//! memory that the guest may fill with anything.

mod chain;
pub mod state;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub use chain::{Chain, Segment};
use state::RingState;

use crate::GuestMemory;

/// What a driver did wrong with a queue. The device then needs a reset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Size, alignment or place of the rings.
    #[error("queue {index}: {reason}")]
    Setup {
        /// Queue number.
        index: u16,
        /// What is wrong.
        reason: String,
    },
    /// A descriptor chain that can't be.
    #[error("descriptor chain {head}: {reason}")]
    Chain {
        /// Index of the chain's head.
        head: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// The rings contradict themselves or are no longer in guest memory.
    #[error("ring access: {0}")]
    Ring(String),
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        ring_error(error)
    }
}

/// Where a driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingLayout {
    /// Largest size offered.
    pub max_size: u16,
    /// Descriptors in the queue.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

/// A queue in use. Owned by one device thread.
pub struct Ring {
    index: u16,
    queue: Queue,
    /// Used index at the last decision about an interrupt.
    signalled: u16,
    memory: Arc<GuestMemory>,
}

const AVAIL_HEADER_LEN: u64 = 4;
const AVAIL_ELEMENT_LEN: u64 = 2;
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;

fn ring_error(error: impl std::fmt::Display) -> QueueError {
    QueueError::Ring(error.to_string())
}

impl Ring {
    /// Checks where a driver put queue `index`, without touching guest memory. `next_avail` and
    /// `next_used` are the positions to go on from.
    ///
    /// # Errors
    /// [`QueueError::Setup`].
    pub fn new(
        index: u16,
        layout: &RingLayout,
        event_idx: bool,
        position: (u16, u16),
        memory: Arc<GuestMemory>,
    ) -> Result<Self, QueueError> {
        let queue = Queue::try_from(QueueState {
            max_size: layout.max_size,
            next_avail: position.0,
            next_used: position.1,
            event_idx_enabled: event_idx,
            size: layout.size,
            ready: true,
            desc_table: layout.descriptors,
            avail_ring: layout.available,
            used_ring: layout.used,
        })
        .map_err(|error| QueueError::Setup {
            index,
            reason: error.to_string(),
        })?;
        if layout.available == 0 || !queue.is_valid(&*memory) {
            return Err(QueueError::Setup {
                index,
                reason: "its rings are not in guest memory".into(),
            });
        }
        Ok(Ring {
            index,
            signalled: queue.next_used(),
            queue,
            memory,
        })
    }

    /// Queue number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Descriptors in the queue.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Takes the next chain the driver made available.
    ///
    /// # Errors
    /// If the ring or the chain is malformed.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let memory = &*self.memory;
        match self.queue.iter(memory)?.next() {
            Some(descriptors) => Chain::collect(memory, descriptors).map(Some),
            None => Ok(None),
        }
    }

    /// Makes the last `count` popped chains available again.
    pub fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives chains, as head and bytes written, back to the driver, which sees all of them at
    /// once.
    ///
    /// # Errors
    /// If the used ring can't be written.
    pub fn complete(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (head, written) in used {
            if *head >= size {
                return Err(QueueError::Chain {
                    head: *head,
                    reason: "its head is not in the queue",
                });
            }
            let element = u64::from(*head) | u64::from(*written) << 32;
            let place = USED_HEADER_LEN + USED_ELEMENT_LEN * u64::from(next % size);
            let address = GuestAddress(self.queue.used_ring() + place);
            self.memory
                .write_slice(&element.to_le_bytes(), address)
                .map_err(ring_error)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        let index = GuestAddress(self.queue.used_ring() + 2);
        self.memory
            .store(next.to_le(), index, Ordering::Release)
            .map_err(ring_error)
    }

    /// Whether the driver wants an interrupt for what was completed since the last call (section
    /// 2.7.7).
    ///
    /// # Errors
    /// If the available ring can't be read.
    pub fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        // Orders the used index before the read of the driver's wish.
        fence(Ordering::SeqCst);
        let load = |offset: u64| -> Result<u16, QueueError> {
            let address = GuestAddress(self.queue.avail_ring() + offset);
            let value = self.memory.load(address, Ordering::Relaxed);
            value.map(u16::from_le).map_err(ring_error)
        };
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = load(AVAIL_HEADER_LEN + AVAIL_ELEMENT_LEN * u64::from(self.queue.size()))?;
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Tells the driver that it need not notify.
    ///
    /// # Errors
    /// If the used ring can't be written.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Asks the driver to notify. True if chains were made available meanwhile, for which no
    /// notification may come.
    ///
    /// # Errors
    /// If a ring can't be accessed.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }

    /// Position to save.
    pub fn save(&self) -> RingState {
        RingState::new(self.index, self.queue.next_avail(), self.queue.next_used())
    }
}
