//! What the machine boots: disks opened, kernel found, guest memory loaded (node 0).

use std::fs;
use std::path::Path;
use std::sync::Arc;

use krg_guest_kernel::kernel::Kernel;
use krg_virtio::disk::{self, Disk};
use vm_memory::GuestMemoryMmap;

use super::NodeSpec;
use crate::cluster::errno;
use crate::machine::boot::{self, Loaded};
use crate::machine::command_line::{self, Needs};

/// A loaded machine.
pub(super) struct Booted {
    pub loaded: Loaded,
    pub disks: Vec<Arc<dyn Disk>>,
    /// What was found, for people.
    pub line: String,
}

/// Opens the disks, finds the kernel and loads it. Errors are one line.
pub(super) fn load(spec: &NodeSpec, memory: &GuestMemoryMmap<()>, tsc_khz: u32) -> Result<Booted, String> {
    let disks = spec
        .disks
        .iter()
        .map(|d| disk::open(&d.path, d.persist).map_err(|e| e.to_string()))
        .collect::<Result<Vec<_>, _>>()?;
    let (kernel, initrd, own, source) = files(spec, &disks)?;
    let first_host_cpus = spec.placement.hosts.first().map_or(0, |h| h.vcpus.len() as u32);
    let needs = Needs { tsc_khz, hosts: spec.placement.hosts.len(), cpus: spec.placement.cpus(), first_host_cpus };
    let command_line = command_line::complete(&own, &needs);
    let image = boot::Kernel { elf: &kernel.elf, initrd: &initrd, command_line: &command_line };
    let loaded = boot::load(memory, &spec.placement, &image).map_err(|e| e.to_string())?;
    let version = kernel.version.as_deref().unwrap_or("of unknown release");
    Ok(Booted { loaded, disks, line: format!("Linux {version} from {source}: {command_line}") })
}

/// Kernel, initrd, command line, and where they are from.
fn files(spec: &NodeSpec, disks: &[Arc<dyn Disk>]) -> Result<(Kernel, Vec<u8>, String, String), String> {
    let boot = &spec.boot;
    if let Some(path) = &boot.kernel {
        let kernel = Kernel::from_bytes(&path.display().to_string(), &read(path)?).map_err(|e| e.to_string())?;
        let initrd = boot.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
        return Ok((kernel, initrd, boot.append.clone().unwrap_or_default(), path.display().to_string()));
    }
    let disk = disks.first().ok_or("nothing to boot: give a disk image or --kernel")?;
    let name = disk.path().display().to_string();
    let found =
        krg_guest_kernel::find(disk::Reader::new(Arc::clone(disk))).map_err(|e| format!("{name}: {e}"))?;
    let kernel = Kernel::from_bytes(&found.kernel_path, &found.kernel).map_err(|e| format!("{name}: {e}"))?;
    let command_line = match &boot.append {
        Some(more) => format!("{} {more}", found.cmdline),
        None => found.cmdline,
    };
    Ok((kernel, found.initrd.unwrap_or_default(), command_line, format!("{name}, {}", found.source)))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {}", path.display(), errno::describe(&e)))
}
