//! The host's KVM: what it must be able to do, and a VM set up for this machine.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::error::{Errno, MachineError};
use super::layout::{IDENTITY_MAP, IOAPIC_PINS, STUB, TSS};
use super::stub::StubMemory;
use crate::node::CpuidLeaf;

/// Opens `/dev/kvm` and checks that it can do what the machine is built on.
///
/// # Errors
/// [`MachineError::OpenKvm`] or [`MachineError::Capability`].
pub fn open() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(|e| MachineError::OpenKvm {
        errno: Errno(e.errno()),
    })?;
    let required = [
        (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
        (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
        (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    ];
    match required.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, capability)) => Err(MachineError::Capability { capability }),
        None => Ok(kvm),
    }
}

/// The CPUID leaves this host can give a guest, its offer to [`super::cpuid_common`].
///
/// # Errors
/// When KVM_GET_SUPPORTED_CPUID fails.
pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidLeaf>, MachineError> {
    let leaves = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| MachineError::kvm("KVM_GET_SUPPORTED_CPUID", "host", e))?;
    Ok(leaves.as_slice().iter().map(CpuidLeaf::from).collect())
}

/// Frequency of this host's TSC in kHz.
///
/// # Errors
/// When KVM can't be opened or doesn't know it.
pub fn host_tsc_khz(kvm: &Kvm) -> Result<u32, MachineError> {
    let vm = kvm
        .create_vm()
        .map_err(|e| MachineError::kvm("KVM_CREATE_VM", "host", e))?;
    let vcpu = vm
        .create_vcpu(0)
        .map_err(|e| MachineError::kvm("KVM_CREATE_VCPU", "vCPU 0", e))?;
    vcpu.get_tsc_khz()
        .map_err(|e| MachineError::kvm("KVM_GET_TSC_KHZ", "host", e))
}

/// A KVM VM and the memory its slots show the guest.
pub(crate) struct Vm {
    pub fd: Arc<VmFd>,
    // The slots refer to these mappings: they must live as long as the VM.
    _memory: GuestMemoryMmap<()>,
    _stub: StubMemory,
}

impl Vm {
    /// A VM with its LAPICs in the kernel, 32-bit APIC ids, `memory` as RAM and the hidden stubs.
    ///
    /// Its vCPUs are created next, then comes [`Vm::keep_faults_exact`].
    pub fn new(kvm: &Kvm, memory: GuestMemoryMmap<()>, faults: FaultKinds) -> Result<Self, MachineError> {
        let fail = |call| move |e| MachineError::kvm(call, "VM", e);
        let fd = kvm.create_vm().map_err(fail("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(fail("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS as usize).map_err(fail("KVM_SET_TSS_ADDR"))?;
        let enable = |cap, arg, name| {
            let cap = kvm_enable_cap {
                cap,
                args: [arg, 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&cap).map_err(fail(name))
        };
        enable(KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS.into(), "KVM_CAP_SPLIT_IRQCHIP")?;
        let wide = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(KVM_CAP_X2APIC_API, wide.into(), "KVM_CAP_X2APIC_API")?;
        if faults == FaultKinds::ExactHaltInGuest {
            let hlt = KVM_X86_DISABLE_EXITS_HLT.into();
            enable(KVM_CAP_X86_DISABLE_EXITS, hlt, "KVM_CAP_X86_DISABLE_EXITS")?;
        }
        let stub = StubMemory::new()?;
        let mut slots = vec![(STUB.start, STUB.end - STUB.start, stub.host_address())];
        for region in memory.iter() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|e| MachineError::Config(format!("guest memory at {:#x}: {e}", region.start_addr().0)))?;
            slots.push((region.start_addr().0, region.len(), host as u64));
        }
        for (slot, (guest_phys_addr, memory_size, userspace_addr)) in slots.into_iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr,
                memory_size,
                userspace_addr,
                flags: 0,
            };
            // SAFETY: the range is a mapping of `memory` or `stub`, which this Vm keeps for as long
            // as it has the VM's file; vCPU files keep the kernel's VM alive longer, but vCPUs only
            // run while the Machine that holds this Vm does (Machine's field order and Drop).
            unsafe { fd.set_user_memory_region(region) }.map_err(fail("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(Vm {
            fd: Arc::new(fd),
            _memory: memory,
            _stub: stub,
        })
    }

    /// With [`FaultKinds::Exact`], has KVM keep faults to the vCPUs' threads. After all vCPUs were
    /// created: their HLT exits, which were decided then, stay.
    pub fn keep_faults_exact(&self, faults: FaultKinds) -> Result<(), MachineError> {
        if faults == FaultKinds::Exact {
            halts_stay_in_guest(&self.fd).map_err(|e| MachineError::kvm("KVM_CAP_X86_DISABLE_EXITS", "VM", e))?;
        }
        Ok(())
    }
}

/// Whether a fault on guest memory says if the guest read or wrote.
///
/// KVM hands a fault that was taken with guest interrupts enabled to a kernel worker, which reports
/// every read as a write (`kvm_can_do_async_pf`, `async_pf_execute`): between hosts, readers of a
/// page would take it from each other. It does not in a VM whose HLT does not exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKinds {
    /// It does, and HLT exits: KVM decides about the exits when a vCPU is created, and about the
    /// faults each time. Kernels that refuse the change once there are vCPUs rule this out.
    Exact,
    /// It does; a halted vCPU keeps its host CPU, so it has to have one for itself.
    ExactHaltInGuest,
    /// It does not: reads may come as writes.
    Coarse,
}

impl FaultKinds {
    /// The best this host can do for `vcpus` vCPUs that run here.
    pub fn best(kvm: &Kvm, vcpus: u32) -> Self {
        let offered = kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into()) as u32;
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        if offered & KVM_X86_DISABLE_EXITS_HLT == 0 {
            FaultKinds::Coarse
        } else if changes_after_creation(kvm) {
            FaultKinds::Exact
        } else if vcpus <= cpus {
            FaultKinds::ExactHaltInGuest
        } else {
            FaultKinds::Coarse
        }
    }
}

/// Whether this kernel takes the change in a VM that has a vCPU, tried on a scratch VM.
fn changes_after_creation(kvm: &Kvm) -> bool {
    let attempt = || {
        let vm = kvm.create_vm()?;
        let _vcpu = vm.create_vcpu(0)?;
        halts_stay_in_guest(&vm)
    };
    attempt().is_ok()
}

fn halts_stay_in_guest(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_DISABLE_EXITS,
        args: [KVM_X86_DISABLE_EXITS_HLT.into(), 0, 0, 0],
        ..Default::default()
    })
}
