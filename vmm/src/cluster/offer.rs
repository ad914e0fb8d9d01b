//! What a host can give, as its node found it out.

use std::fs;
use std::path::Path;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use krg_dsm::transport::rdma::{self, RdmaPort};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::errno;
use super::probe;
use super::size;
use crate::node::CpuidLeaf;

/// Version of [`Offer`]'s form.
pub const OFFER_VERSION: u32 = 2;

/// Which KVM a host has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmInfo {
    /// Kernel module: `kvm_amd`, `kvm_intel`, `kvm_pvm`, or `kvm` when it can't be told.
    pub module: String,
    /// Nested paging is on (`npt`, `ept`); `None` where the module has no such parameter.
    pub nested_paging: Option<bool>,
    /// `kvm_intel.eptad`: hardware walks count as writes while it is on. `None` elsewhere.
    pub eptad: Option<bool>,
    /// vCPUs a VM may have.
    pub max_vcpus: u32,
    /// Frequency of a vCPU's TSC in kHz.
    pub tsc_khz: u32,
    /// KVM_GET_SUPPORTED_CPUID.
    pub cpuid: Vec<CpuidLeaf>,
}

/// A node's offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`OFFER_VERSION`].
    pub version: u32,
    /// Version of the node's program.
    pub software: String,
    /// Kernel release of the host.
    pub kernel: String,
    /// Same for all nodes on one running machine: they share its CPUs and memory.
    pub boot_id: String,
    /// Logical CPUs the process may use.
    pub cpus: u32,
    /// Memory that can be had without swapping, in bytes.
    pub memory: u64,
    /// KVM, or one line why it can't be used.
    pub kvm: Result<KvmInfo, String>,
    /// userfaultfd with faults taken in the kernel (those of KVM are), or one line why not.
    pub userfaultfd: Result<(), String>,
    /// RDMA by address, none without a device; or one line why a device can't be used.
    pub rdma: Result<Vec<RdmaPort>, String>,
}

impl Offer {
    /// Looks at this host.
    pub fn of_this_host() -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        Self {
            version: OFFER_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            kernel: line("/proc/sys/kernel/osrelease"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory: available_memory(&line("/proc/meminfo"), &line("/sys/fs/cgroup/memory.max")),
            kvm: kvm_info(Path::new("/dev/kvm")),
            userfaultfd: probe::userfaultfd(),
            rdma: rdma_ports(),
        }
    }

    /// Says why the host can't run a node of a machine over several hosts (`alone`: over one).
    pub fn obstacle(&self, alone: bool) -> Option<&str> {
        match (&self.kvm, &self.userfaultfd) {
            (Err(reason), _) => Some(reason),
            (_, Err(reason)) if !alone => Some(reason),
            _ => None,
        }
    }

    /// The host in one line.
    pub fn line(&self) -> String {
        let memory = size::show(self.memory);
        format!(
            "{} CPUs, {memory} free, {}, kernel {}",
            self.cpus,
            self.kvm_line(),
            self.kernel
        )
    }

    /// The KVM in a few words, with what decides how page tables are shared.
    fn kvm_line(&self) -> String {
        let Ok(kvm) = &self.kvm else { return "no KVM".into() };
        let mut line = kvm.module.clone();
        if let Some(on) = kvm.nested_paging {
            line += if on { ", nested paging" } else { ", shadow paging" };
        }
        if let Some(on) = kvm.eptad {
            line += if on { ", eptad=1" } else { ", eptad=0" };
        }
        line
    }
}

/// `MemAvailable` of /proc/meminfo, or the control group's limit if that is less.
fn available_memory(meminfo: &str, cgroup_max: &str) -> u64 {
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024));
    cgroup_max.parse().map_or(available, |limit: u64| available.min(limit))
}

/// The library is only loaded where there is a device.
fn rdma_ports() -> Result<Vec<RdmaPort>, String> {
    let ports = RdmaPort::of_this_host();
    if !ports.is_empty() {
        rdma::available().map_err(|error| error.to_string())?;
    }
    Ok(ports)
}

fn kvm_info(device: &Path) -> Result<KvmInfo, String> {
    let denied = |what: &str, error: kvm_ioctls::Error| {
        let error = std::io::Error::from_raw_os_error(error.errno());
        let advice = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "load kvm_amd or kvm_intel, and switch virtualization on in the firmware"
            }
            Some(libc::EACCES | libc::EPERM) => "run the node as root or as a member of group kvm",
            _ => "see the host's kernel log",
        };
        format!("{what}: {}; {advice}", errno::describe(&error))
    };
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes()).map_err(|_| "a path with a zero byte")?;
    let kvm = Kvm::new_with_path(&path).map_err(|e| denied(&device.display().to_string(), e))?;
    if kvm.get_api_version() != 12 {
        return Err(format!(
            "{}: KVM API version {}, 12 is needed",
            device.display(),
            kvm.get_api_version()
        ));
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| denied("KVM_GET_SUPPORTED_CPUID", e))?;
    let vm = kvm.create_vm().map_err(|e| denied("KVM_CREATE_VM", e))?;
    let vcpu = vm.create_vcpu(0).map_err(|e| denied("KVM_CREATE_VCPU", e))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(|e| denied("KVM_GET_TSC_KHZ", e))?;
    let (module, nested_paging, eptad) = modules(Path::new("/sys/module"));
    Ok(KvmInfo {
        module,
        nested_paging,
        eptad,
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        tsc_khz,
        cpuid: cpuid
            .as_slice()
            .iter()
            .map(|e| CpuidLeaf {
                function: e.function,
                index: e.index,
                flags: e.flags,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect(),
    })
}

/// Whether this host's hardware walks of the guest's page tables count as writes to them, and how that
/// is known.
pub fn walks_write() -> (bool, String) {
    let (module, _, eptad) = modules(Path::new("/sys/module"));
    match (module.as_str(), eptad) {
        ("kvm_intel", Some(false)) => (false, "kvm_intel with eptad=0: walks only read".into()),
        ("kvm_intel", _) => (true, "kvm_intel with eptad=1: walks write".into()),
        ("kvm_amd", _) => (true, "kvm_amd: walks always write".into()),
        (module, _) => (true, format!("{module}: walks may write")),
    }
}

/// Name and parameters of the KVM module under `root` (`/sys/module`).
fn modules(root: &Path) -> (String, Option<bool>, Option<bool>) {
    let flag = |module: &str, parameter: &str| {
        let text = fs::read_to_string(root.join(module).join("parameters").join(parameter)).ok()?;
        match text.trim() {
            "1" | "Y" => Some(true),
            "0" | "N" => Some(false),
            _ => None,
        }
    };
    for (module, paging) in [("kvm_amd", "npt"), ("kvm_intel", "ept"), ("kvm_pvm", "npt")] {
        if root.join(module).is_dir() {
            return (module.into(), flag(module, paging), flag(module, "eptad"));
        }
    }
    ("kvm".into(), None, None)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn memory_is_what_can_be_had() {
        let meminfo = "MemTotal:       24684096 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available_memory(meminfo, "max"), 1 << 20);
        assert_eq!(available_memory(meminfo, "4096"), 4096);
        assert_eq!(available_memory("", ""), 0);
    }

    #[test]
    fn a_missing_device_is_named() {
        let reason = kvm_info(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(reason.starts_with("/nonexistent/kvm: ENOENT"), "{reason}");
    }

    #[test]
    fn modules_and_parameters() {
        let root = TempDir::new_with_prefix("/tmp/krg-offer").unwrap();
        assert_eq!(modules(root.as_path()), ("kvm".into(), None, None));
        let parameters = root.as_path().join("kvm_intel/parameters");
        fs::create_dir_all(&parameters).unwrap();
        fs::write(parameters.join("ept"), "Y\n").unwrap();
        fs::write(parameters.join("eptad"), "N\n").unwrap();
        assert_eq!(modules(root.as_path()), ("kvm_intel".into(), Some(true), Some(false)));
    }

    #[test]
    fn this_host_has_a_kernel() {
        let offer = Offer::of_this_host();
        assert!(!offer.kernel.is_empty() && offer.cpus > 0 && offer.memory > 0);
        let json = serde_json::to_string(&offer).unwrap();
        assert_eq!(serde_json::from_str::<Offer>(&json).unwrap(), offer);
    }
}
