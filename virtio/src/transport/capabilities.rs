//! The BAR's layout and the capabilities that describe it (VIRTIO 1.2, section 4.1.4).

use crate::device::VirtioDevice;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix;

/// A structure within the BAR.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Region {
    /// The place of BAR offset `at` in this region.
    pub(super) fn contains(self, at: u64) -> Option<usize> {
        let place = at.checked_sub(self.offset)?;
        (place < self.len).then_some(place as usize)
    }
}

const fn page(number: u64) -> Region {
    Region {
        offset: number << 12,
        len: 1 << 12,
    }
}

// Each structure has pages of its own, so that doorbells share none with registers.
pub(super) const COMMON: Region = page(0);
pub(super) const ISR: Region = page(1);
pub(super) const DEVICE: Region = page(2);
pub(super) const NOTIFY: Region = page(3);
pub(super) const MSIX_TABLE: Region = page(4);
pub(super) const MSIX_PBA: Region = page(5);
/// Size of the BAR in bytes: the next power of two.
pub(super) const BAR_SIZE: u64 = 8 << 12;
const _: () = assert!(MSIX_PBA.offset + MSIX_PBA.len <= BAR_SIZE);
/// Distance of two queues' doorbells in bytes.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Queues that have doorbells.
const MAX_QUEUES: u64 = NOTIFY.len / NOTIFY_MULTIPLIER as u64;

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI_CFG: u8 = 5;
/// Place of `pci_cfg_data` in its capability.
pub(super) const PCI_CFG_DATA: usize = 16;
const PCI_CFG_BAR: usize = 4;
const PCI_CFG_OFFSET: usize = 8;
const PCI_CFG_LENGTH: usize = 12;

/// Where the capabilities with registers of their own are in configuration space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The MSI-X capability.
    pub(super) msix: usize,
    /// The window into the BAR.
    pub(super) pci_cfg: usize,
}

impl Layout {
    /// The access the window is set to, as BAR offset and width, if there can be such a one.
    pub(super) fn window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let bar = config.u16(self.pci_cfg + PCI_CFG_BAR) & 0xff;
        let offset = u64::from(config.u32(self.pci_cfg + PCI_CFG_OFFSET));
        let len = u64::from(config.u32(self.pci_cfg + PCI_CFG_LENGTH));
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && offset % len == 0 && offset < BAR_SIZE;
        valid.then_some((offset, len as usize))
    }
}

/// Configuration space of a virtio function.
pub(super) struct Function {
    pub(super) config: ConfigSpace,
    pub(super) layout: Layout,
}

/// Builds the configuration space of `device` with `vectors` MSI-X vectors.
pub(super) fn function(device: &dyn VirtioDevice, vectors: u16) -> Function {
    debug_assert!(device.queue_sizes().len() as u64 <= MAX_QUEUES);
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: MODERN_DEVICE + device.device_type(),
        // Revision 1 or higher: no legacy interface (section 4.1.2.1).
        revision: 1,
        class: device.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: 0x1100,
    });
    config.set_bar(BAR_SIZE);

    let mut msix_body = [0; 10];
    msix_body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    msix_body[2..6].copy_from_slice(&(MSIX_TABLE.offset as u32).to_le_bytes());
    msix_body[6..].copy_from_slice(&(MSIX_PBA.offset as u32).to_le_bytes());
    let mut msix_writable = [0; 10];
    msix_writable[..2].copy_from_slice(&msix::CONTROL_WRITABLE.to_le_bytes());
    let mut add = |id, body: &[u8], writable: &[u8]| {
        // The six capabilities take 12 + 3 * 16 + 2 * 20 of 192 bytes.
        config.add_capability(id, body, writable).unwrap_or(0)
    };
    let msix = add(msix::CAPABILITY_ID, &msix_body, &msix_writable);
    for (kind, region) in [(TYPE_COMMON, COMMON), (TYPE_ISR, ISR), (TYPE_DEVICE, DEVICE)] {
        add(CAPABILITY_VENDOR, &structure(kind, region), &[]);
    }
    let notify = [
        structure(TYPE_NOTIFY, NOTIFY).as_slice(),
        &NOTIFY_MULTIPLIER.to_le_bytes(),
    ]
    .concat();
    add(CAPABILITY_VENDOR, &with_len(notify), &[]);

    let nowhere = Region { offset: 0, len: 0 };
    let window = [structure(TYPE_PCI_CFG, nowhere).as_slice(), &[0; 4]].concat();
    let mut window_writable = [0; 18];
    // bar, then offset, length and data; places in the body are two less than in the capability.
    window_writable[PCI_CFG_BAR - 2] = 0xff;
    window_writable[PCI_CFG_OFFSET - 2..].fill(0xff);
    let pci_cfg = add(CAPABILITY_VENDOR, &with_len(window), &window_writable);
    Function {
        config,
        layout: Layout { msix, pci_cfg },
    }
}

/// `struct virtio_pci_cap` in BAR 0 without its first two bytes.
fn structure(kind: u8, region: Region) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = 16;
    body[1] = kind;
    body[6..10].copy_from_slice(&(region.offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&(region.len as u32).to_le_bytes());
    body
}

/// Sets `cap_len` of a longer capability.
fn with_len(mut body: Vec<u8>) -> Vec<u8> {
    body[0] = body.len() as u8 + 2;
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap() {
        let regions = [COMMON, ISR, DEVICE, NOTIFY, MSIX_TABLE, MSIX_PBA];
        for pair in regions.windows(2) {
            assert!(pair[0].offset + pair[0].len <= pair[1].offset);
        }
        assert_eq!(NOTIFY.contains(NOTIFY.offset + 5), Some(5));
        assert_eq!(NOTIFY.contains(NOTIFY.offset - 1), None);
        assert_eq!(NOTIFY.contains(NOTIFY.offset + NOTIFY.len), None);
    }
}
