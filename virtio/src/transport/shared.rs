//! What a device's threads and the register handlers share: interrupts and the reset handshake.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicUsize, Ordering};

use crate::device::Signals;
use crate::pci::msix::Msix;

/// The vector that means none (section 4.1.5.1.2.1).
pub(super) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

pub(super) struct Shared {
    pub(super) msix: Msix,
    /// Set only while MSI-X is off; reading clears it.
    pub(super) isr: AtomicU8,
    pub(super) needs_reset: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    resets: AtomicUsize,
}

impl Shared {
    pub(super) fn new(queues: u16, msix: Msix) -> Self {
        Shared {
            msix,
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            resets: AtomicUsize::new(0),
        }
    }

    /// Takes a vector number as a driver writes it; one that doesn't exist becomes [`NO_VECTOR`].
    fn valid(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.valid(vector), Ordering::SeqCst);
    }

    /// Vector of a queue; [`NO_VECTOR`] for queues that don't exist.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(usize::from(queue)) {
            place.store(self.valid(vector), Ordering::SeqCst);
        }
    }

    /// Whether a device thread still works on a reset.
    pub(super) fn resetting(&self) -> bool {
        self.resets.load(Ordering::SeqCst) > 0
    }

    /// Back to the initial state; MSI-X is PCI's and stays.
    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }

    fn interrupt(&self, vector: u16, cause: u8) {
        if self.msix.enabled() {
            self.msix.raise(vector);
        } else {
            self.isr.fetch_or(cause, Ordering::SeqCst);
        }
    }
}

impl Signals for Shared {
    fn queue(&self, index: u16) {
        self.interrupt(self.queue_vector(index), ISR_QUEUE);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.interrupt(self.config_vector(), ISR_CONFIG);
    }
}

/// Holds a reset open until it is dropped.
pub(super) struct ResetGuard(Arc<Shared>);

impl ResetGuard {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.resets.fetch_add(1, Ordering::SeqCst);
        ResetGuard(shared.clone())
    }
}

impl Drop for ResetGuard {
    fn drop(&mut self) {
        // A device thread may have broken down between the reset and taking notice of it.
        self.0.needs_reset.store(false, Ordering::SeqCst);
        self.0.resets.fetch_sub(1, Ordering::SeqCst);
    }
}
