//! Accesses to the common configuration structure (VIRTIO 1.2, section 4.1.4.3).

use super::VirtioPci;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
// 0x15 is config_generation: no device here ever changes its configuration, so it stays 0.
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
/// Length of the structure, without the fields of features that are not offered.
const LENGTH: usize = 0x38;

impl VirtioPci {
    /// Reads any part of the structure, which has no side effects. Beyond it is zero.
    pub(super) fn common_read(&self, offset: usize, data: &mut [u8]) {
        let registers = self.registers();
        let mut image = [0; LENGTH];
        let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        put(DEVICE_FEATURE_SELECT, &registers.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &registers.device_feature_half().to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &registers.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &registers.driver_feature_half().to_le_bytes());
        put(CONFIG_MSIX_VECTOR, &self.shared.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(registers.queues().len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status(&registers)]);
        put(QUEUE_SELECT, &registers.queue_select.to_le_bytes());
        // A queue that doesn't exist has size 0.
        if let Some(queue) = registers.queue() {
            let vector = self.shared.queue_vector(registers.queue_select);
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &registers.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        crate::device::read_config(&image, offset, data);
    }

    /// Writes one field, in the width the specification gives it; 64-bit fields also half by
    /// half. Other accesses are ignored.
    pub(super) fn common_write(&self, offset: usize, data: &[u8]) {
        match *data {
            [value] if offset == DEVICE_STATUS => self.set_status(value),
            [a, b] => self.common_write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.common_write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset % 8 == 0 => {
                self.common_write_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.common_write_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn common_write_u16(&self, offset: usize, value: u16) {
        let mut registers = self.registers();
        match offset {
            CONFIG_MSIX_VECTOR => self.shared.set_config_vector(value),
            QUEUE_SELECT => registers.queue_select = value,
            QUEUE_SIZE => registers.set_queue_size(value),
            QUEUE_MSIX_VECTOR => self.shared.set_queue_vector(registers.queue_select, value),
            QUEUE_ENABLE if value == 1 => {
                if let Some(queue) = registers.queue_mut() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn common_write_u32(&self, offset: usize, value: u32) {
        let mut registers = self.registers();
        match offset {
            DEVICE_FEATURE_SELECT => registers.device_feature_select = value,
            DRIVER_FEATURE_SELECT => registers.driver_feature_select = value,
            DRIVER_FEATURE => registers.set_driver_feature_half(value),
            _ => {
                drop(registers);
                self.common_write_address(offset, value);
            }
        }
    }

    /// Writes half of a queue address.
    fn common_write_address(&self, offset: usize, value: u32) {
        let mut registers = self.registers();
        let Some(queue) = registers.queue_mut() else {
            return;
        };
        let field = match offset & !7 {
            QUEUE_DESC => &mut queue.descriptors,
            QUEUE_DRIVER => &mut queue.available,
            QUEUE_DEVICE => &mut queue.used,
            _ => return,
        };
        let value = u64::from(value);
        match offset & 7 {
            0 => *field = (*field & !0xffff_ffff) | value,
            4 => *field = (*field & 0xffff_ffff) | value << 32,
            _ => {}
        }
    }
}
