//! The PCI devices of node 0.

use std::sync::Arc;

use krg_dsm::node::Dsm;
use krg_dsm::memory::GuestRam;
use krg_virtio::Prefetch;
use krg_virtio::balloon::{Balloon, FreePages};
use krg_virtio::block::Block;
use krg_virtio::device::VirtioDevice;
use krg_virtio::disk::Disk;
use krg_virtio::net::Net;
use krg_virtio::pci::PciRoot;
use krg_virtio::rng::Rng;
use krg_virtio::transport::VirtioPci;

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

/// Pages of other hosts, asked for ahead of a device that is about to touch them.
struct Pages(Arc<Dsm>);

impl Prefetch for Pages {
    fn prefetch(&self, gpa: u64, len: u64, write: bool) {
        self.0.prefetch(gpa, len, write);
    }
}

/// Memory that the guest has no use for, over all hosts.
struct Shared(Arc<Dsm>);

impl FreePages for Shared {
    fn free(&self, gpa: u64, len: u64) {
        self.0.free(gpa, len);
    }
}

/// The same on one host.
struct Own(Arc<GuestRam>);

impl FreePages for Own {
    fn free(&self, gpa: u64, len: u64) {
        // A refusal costs memory, nothing else.
        if let Err(error) = self.0.free(gpa, len) {
            tracing::warn!(%error, "free memory is not given back to the host");
        }
    }
}

/// Makes all devices of `spec`. Errors are one line.
pub(super) fn make(
    spec: &NodeSpec,
    disks: Vec<Arc<dyn Disk>>,
    ram: &Arc<GuestRam>,
    machine: &Machine,
    dsm: Option<&Arc<Dsm>>,
) -> Result<Arc<Pci>, String> {
    let root = PciRoot::new(PCI_WINDOW);
    let memory = Arc::new(ram.memory().clone());
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (n, disk) in disks.into_iter().enumerate() {
        let name = format!("disk{n}");
        let block = match dsm {
            Some(dsm) => Block::with_prefetch(&name, disk, Arc::new(Pages(Arc::clone(dsm)))),
            None => Block::new(&name, disk),
        };
        devices.push(Box::new(block.map_err(|e| e.to_string())?));
    }
    devices.push(Box::new(Rng::new("rng0").map_err(|e| e.to_string())?));
    let free: Arc<dyn FreePages> = match dsm {
        Some(dsm) => Arc::new(Shared(Arc::clone(dsm))),
        None => Arc::new(Own(Arc::clone(ram))),
    };
    devices.push(Box::new(Balloon::new("balloon0", free).map_err(|e| e.to_string())?));
    if let Some(tap) = &spec.net {
        devices.push(Box::new(Net::open("net0", tap, &spec.name).map_err(|e| e.to_string())?));
    }
    for device in devices {
        let function = VirtioPci::new(device, Arc::clone(&memory), machine.interrupts());
        root.add(Arc::new(function)).map_err(|e| e.to_string())?;
    }
    Ok(Arc::new(Pci(root)))
}
