//! Device status, features and queue registers, and the rules for changing them (VIRTIO 1.2,
//! sections 2.1, 2.2 and 3.1).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::shared::Shared;
use crate::error::{Error, Result};

const STATE_VERSION: u32 = 1;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// Registers of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Descriptors.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        QueueRegisters {
            size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// Saved common configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonState {
    /// Layout of this structure.
    pub version: u32,
    /// Device status with NEEDS_RESET.
    pub status: u8,
    /// Features the device offers; must be the same where it is restored.
    pub device_features: u64,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is shown.
    pub driver_feature_select: u32,
    /// The queue that is shown.
    pub queue_select: u16,
    /// Vector for configuration changes.
    pub config_vector: u16,
    /// Vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// ISR status.
    pub isr: u8,
    /// Each queue.
    pub queues: Vec<QueueRegisters>,
}

/// The registers behind the common configuration structure.
pub(super) struct Registers {
    status: u8,
    /// What is shown while a reset goes on.
    status_before_reset: u8,
    device_features: u64,
    driver_features: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    max_sizes: Vec<u16>,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(device_features: u64, max_sizes: &[u16]) -> Self {
        let transport = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        Registers {
            status: 0,
            status_before_reset: 0,
            device_features: device_features | transport,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            max_sizes: max_sizes.to_vec(),
            queues: max_sizes.iter().map(|s| QueueRegisters::new(*s)).collect(),
        }
    }

    /// Back to the initial values. Returns whether the device had queues to give up.
    pub(super) fn reset(&mut self) -> bool {
        let running = self.running();
        *self = Registers {
            status_before_reset: match self.status {
                // A second reset while the first goes on.
                0 => self.status_before_reset,
                status => status,
            },
            max_sizes: std::mem::take(&mut self.max_sizes),
            queues: Vec::new(),
            ..Registers::new(self.device_features, &[])
        };
        self.queues = self.max_sizes.iter().map(|s| QueueRegisters::new(*s)).collect();
        running
    }

    /// Status as the driver reads it. Never 0 while a reset goes on.
    pub(super) fn status(&self, resetting: bool, needs_reset: bool) -> u8 {
        match (resetting, needs_reset) {
            (true, _) => self.status_before_reset,
            (false, true) => self.status | NEEDS_RESET,
            (false, false) => self.status,
        }
    }

    /// The driver writes `value`, not 0, to the status. Bits it leaves out stay. Returns whether
    /// DRIVER_OK was newly and rightly set.
    pub(super) fn set_status(&mut self, value: u8) -> bool {
        let before = self.status;
        let mut new = value & !before & !NEEDS_RESET;
        if new & FEATURES_OK != 0 && !self.features_valid() {
            // The driver finds the bit clear when it reads the status back.
            new &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && ((before | new) & FEATURES_OK == 0 || before & FAILED != 0) {
            new &= !DRIVER_OK;
        }
        self.status |= new;
        new & DRIVER_OK != 0
    }

    fn features_valid(&self) -> bool {
        let version_1 = self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        version_1 && self.driver_features & !self.device_features == 0
    }

    /// Whether DRIVER_OK is set.
    pub(super) fn running(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    pub(super) fn event_idx(&self) -> bool {
        self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// The selected half of the device's features.
    pub(super) fn device_feature_half(&self) -> u32 {
        half(self.device_features, self.device_feature_select)
    }

    /// The selected half of the driver's features.
    pub(super) fn driver_feature_half(&self) -> u32 {
        half(self.driver_features, self.driver_feature_select)
    }

    /// Sets the selected half of the driver's features; too late after FEATURES_OK.
    pub(super) fn set_driver_feature_half(&mut self, value: u32) {
        if self.status & FEATURES_OK == 0 && self.driver_feature_select < 2 {
            let shift = 32 * self.driver_feature_select;
            let mask = u64::from(u32::MAX) << shift;
            self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
        }
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    pub(super) fn max_queue_size(&self, index: u16) -> u16 {
        self.max_sizes.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// The selected queue.
    pub(super) fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while the driver may change it: before it enables the queue and before
    /// DRIVER_OK.
    pub(super) fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        let running = self.running();
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !running && !queue.enabled)
    }

    /// Sets the selected queue's size; what is no power of two or too large is ignored.
    pub(super) fn set_queue_size(&mut self, size: u16) {
        let max = self.max_queue_size(self.queue_select);
        if let Some(queue) = self.queue_mut() {
            if size.is_power_of_two() && size <= max {
                queue.size = size;
            }
        }
    }

    pub(super) fn save(&self, shared: &Shared, needs_reset: bool) -> CommonState {
        CommonState {
            version: STATE_VERSION,
            status: self.status(false, needs_reset),
            device_features: self.device_features,
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            config_vector: shared.config_vector(),
            queue_vectors: (0..self.queues.len() as u16)
                .map(|queue| shared.queue_vector(queue))
                .collect(),
            isr: shared.isr.load(std::sync::atomic::Ordering::SeqCst),
            queues: self.queues.clone(),
        }
    }

    /// Takes saved registers over. Returns whether the device needs a reset.
    pub(super) fn restore(&mut self, state: &CommonState, shared: &Shared) -> Result<bool> {
        const OBJECT: &str = "virtio registers";
        if state.version != STATE_VERSION {
            let reason = format!("version {} is not {STATE_VERSION}", state.version);
            return Err(Error::bad_state(OBJECT, reason));
        }
        if state.device_features != self.device_features {
            let reason = format!(
                "features {:#x} were offered, now {:#x}",
                state.device_features, self.device_features
            );
            return Err(Error::bad_state(OBJECT, reason));
        }
        let count = self.max_sizes.len();
        if state.queues.len() != count || state.queue_vectors.len() != count {
            let reason = format!("{} queues instead of {count}", state.queues.len());
            return Err(Error::bad_state(OBJECT, reason));
        }
        self.driver_features = state.driver_features;
        if state.status & FEATURES_OK != 0 && !self.features_valid() {
            let reason = format!("features {:#x} were not offered", state.driver_features);
            return Err(Error::bad_state(OBJECT, reason));
        }
        self.status = state.status & !NEEDS_RESET;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        shared.set_config_vector(state.config_vector);
        for (queue, vector) in state.queue_vectors.iter().enumerate() {
            shared.set_queue_vector(queue as u16, *vector);
        }
        shared.isr.store(state.isr, std::sync::atomic::Ordering::SeqCst);
        Ok(state.status & NEEDS_RESET != 0)
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        Registers::new(1 << 5, &[256])
    }

    fn accept(registers: &mut Registers, features: u64) {
        for select in 0..2 {
            registers.driver_feature_select = select;
            registers.set_driver_feature_half((features >> (32 * select)) as u32);
        }
    }

    #[test]
    fn version_1_is_required_and_nothing_else_is_accepted() {
        for (features, accepted) in [
            (1 << 32, true),
            (1 << 32 | 1 << 5 | 1 << 29, true),
            (1 << 5, false),
            (1 << 32 | 1 << 6, false),
        ] {
            let mut registers = registers();
            accept(&mut registers, features);
            registers.set_status(3 | FEATURES_OK);
            assert_eq!(registers.status & FEATURES_OK != 0, accepted, "{features:#x}");
            assert_eq!(registers.set_status(3 | FEATURES_OK | DRIVER_OK), accepted);
        }
    }

    #[test]
    fn features_are_fixed_by_features_ok_and_queues_by_driver_ok() {
        let mut registers = registers();
        accept(&mut registers, 1 << 32);
        registers.set_status(3 | FEATURES_OK);
        accept(&mut registers, 1 << 32 | 1 << 5);
        assert_eq!(registers.driver_features(), 1 << 32);
        registers.set_queue_size(100);
        registers.set_queue_size(512);
        assert_eq!(registers.queues()[0].size, 256);
        registers.set_queue_size(64);
        assert_eq!(registers.queues()[0].size, 64);
        assert!(registers.set_status(DRIVER_OK));
        assert!(!registers.set_status(DRIVER_OK), "only once");
        assert!(registers.queue_mut().is_none());
    }

    #[test]
    fn status_bits_stay_until_reset_which_shows_when_it_is_complete() {
        let mut registers = registers();
        accept(&mut registers, 1 << 32);
        registers.set_status(3);
        registers.set_status(FEATURES_OK | DRIVER_OK | NEEDS_RESET);
        assert_eq!(registers.status(false, false), 3 | FEATURES_OK | DRIVER_OK);
        assert_eq!(registers.status(false, true) & NEEDS_RESET, NEEDS_RESET);
        assert!(registers.reset());
        assert_ne!(registers.status(true, false), 0);
        assert_eq!(registers.status(false, false), 0);
        assert_eq!(registers.queues().len(), 1);
        assert!(!registers.reset(), "nothing was running");
    }

    #[test]
    fn a_failed_device_does_not_start() {
        let mut registers = registers();
        accept(&mut registers, 1 << 32);
        registers.set_status(3 | FEATURES_OK | FAILED);
        assert!(!registers.set_status(DRIVER_OK));
    }
}
