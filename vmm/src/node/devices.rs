//! The PCI devices of node 0.

use std::sync::Arc;

use krg_virtio::block::Block;
use krg_virtio::device::VirtioDevice;
use krg_virtio::disk::Disk;
use krg_virtio::net::Net;
use krg_virtio::pci::PciRoot;
use krg_virtio::rng::Rng;
use krg_virtio::transport::VirtioPci;
use vm_memory::GuestMemoryMmap;

use super::NodeSpec;
use crate::machine::layout::{ECAM, PCI_WINDOW};
use crate::machine::{DeviceBus, Machine};

/// The PCI root as the machine's bus sees it.
pub(super) struct Pci(pub PciRoot);

impl DeviceBus for Pci {
    fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        if ECAM.contains(&gpa) {
            self.0.config_read(gpa - ECAM.start, data);
            return true;
        }
        self.0.mmio_read(gpa, data)
    }

    fn write(&self, gpa: u64, data: &[u8]) -> bool {
        if ECAM.contains(&gpa) {
            self.0.config_write(gpa - ECAM.start, data);
            return true;
        }
        self.0.mmio_write(gpa, data)
    }
}

/// Makes all devices of `spec`. Errors are one line.
pub(super) fn make(
    spec: &NodeSpec,
    disks: Vec<Arc<dyn Disk>>,
    memory: &GuestMemoryMmap<()>,
    machine: &Machine,
) -> Result<Arc<Pci>, String> {
    let root = PciRoot::new(PCI_WINDOW);
    let memory = Arc::new(memory.clone());
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (n, disk) in disks.into_iter().enumerate() {
        devices.push(Box::new(Block::new(&format!("disk{n}"), disk).map_err(|e| e.to_string())?));
    }
    devices.push(Box::new(Rng::new("rng0").map_err(|e| e.to_string())?));
    if let Some(tap) = &spec.net {
        devices.push(Box::new(Net::open("net0", tap, &spec.name).map_err(|e| e.to_string())?));
    }
    for device in devices {
        let function = VirtioPci::new(device, Arc::clone(&memory), machine.interrupts());
        root.add(Arc::new(function)).map_err(|e| e.to_string())?;
    }
    Ok(Arc::new(Pci(root)))
}
