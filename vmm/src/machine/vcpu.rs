//! One vCPU as this node has it: the KVM object, and whether it runs here or stands for one that
//! runs on another node.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2, kvm_device_attr, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_signal_mask, kvm_sregs,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::error::MachineError;
use super::layout::LAPIC_BASE;
use super::state::{Registers, SHOWN};

/// What this node does for a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Runs it.
    Owner,
    /// Collects what this node's vCPUs send it.
    Proxy,
}

const IA32_APIC_BASE: u32 = 0x1b;
const APIC_BASE_BSP: u64 = 1 << 8;
/// xAPIC global enable and x2APIC mode.
pub(crate) const APIC_BASE_X2APIC: u64 = 0xc00;
/// x2APIC spurious-interrupt vector register.
const X2APIC_SVR: u32 = 0x80f;
/// Software enable, spurious vector 0xff.
const SVR_ENABLED: u64 = 0x1ff;
/// x2APIC EOI register.
const X2APIC_EOI: u32 = 0x80b;

/// Bytes of an XSAVE area as KVM_GET_XSAVE and KVM_SET_XSAVE take it.
pub(crate) const XSAVE_PAGE: usize = 4096;

/// Interrupt request registers in KVM's form of a LAPIC.
pub(crate) const LAPIC_IRR: usize = 0x200;
pub(crate) const LAPIC_IRR_END: usize = 0x280;

/// KVM_VCPU_TSC_CTRL and its attribute KVM_VCPU_TSC_OFFSET.
const TSC_CONTROL: u32 = 0;
const TSC_OFFSET: u64 = 0;

vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xAE, 0xe1, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, 0xAE, 0x8b, kvm_signal_mask);

/// A kvm_signal_mask with the kernel's signal set behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u32; 2],
}

/// A vCPU of this node's VM.
pub(crate) struct Vcpu {
    pub id: u32,
    pub role: Role,
    pub fd: VcpuFd,
    /// A proxy that took INIT and not yet the SIPI after it.
    pub awaits_sipi: bool,
    /// Bytes of this host's XSAVE area.
    pub xsave_size: usize,
    /// A proxy with a single step or breakpoints set.
    pub is_debugged: bool,
    /// What KVM has in this proxy of what stubs don't change, if that is known: all but the registers of its core, events
    /// and LAPIC.
    pub present: Option<Box<Registers>>,
}

impl Vcpu {
    /// Creates vCPU `id` with its LAPIC in x2APIC mode, so that its logical id follows from its APIC
    /// id and a proxy needs no state of the vCPU it stands for.
    pub fn new(vm: &VmFd, id: u32, role: Role, cpuid: &[kvm_cpuid_entry2]) -> Result<Self, MachineError> {
        let fd = vm.create_vcpu(id.into()).map_err(|e| fail("KVM_CREATE_VCPU", id, e))?;
        let vcpu = Vcpu {
            id,
            role,
            fd,
            awaits_sipi: false,
            is_debugged: false,
            present: None,
            // 0 where KVM has no KVM_GET_XSAVE2: then it is a page at most.
            xsave_size: usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_PAGE),
        };
        let cpuid = CpuId::from_entries(cpuid)
            .map_err(|_| MachineError::Cpuid(format!("{} leaves are more than KVM takes", cpuid.len())))?;
        vcpu.fd.set_cpuid2(&cpuid).map_err(|e| fail("KVM_SET_CPUID2", id, e))?;
        // A proxy is no boot processor, even of vCPU 0: INIT would not make it wait for SIPI.
        vcpu.set_apic_base(id == 0 && role == Role::Owner)?;
        vcpu.enable_lapic()?;
        let runnable = id == 0 && role == Role::Owner;
        vcpu.set_mp_state(if runnable {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        })?;
        Ok(vcpu)
    }

    /// Has KVM show registers at every exit (owners: for the page-table root, and for a move), or not.
    pub fn show_registers(&mut self, show: bool) {
        for part in SHOWN {
            match show {
                true => self.fd.set_sync_valid_reg(part),
                false => self.fd.clear_sync_valid_reg(part),
            }
        }
    }

    /// Puts the LAPIC into x2APIC mode, as a boot processor's or not.
    pub fn set_apic_base(&self, boot_processor: bool) -> Result<(), MachineError> {
        let bsp = if boot_processor { APIC_BASE_BSP } else { 0 };
        self.set_msr(IA32_APIC_BASE, LAPIC_BASE | APIC_BASE_X2APIC | bsp)
    }

    /// Switches the LAPIC on by software: INIT leaves it off, and then it drops what arrives.
    pub fn enable_lapic(&self) -> Result<(), MachineError> {
        self.set_msr(X2APIC_SVR, SVR_ENABLED)
    }

    /// Ends the interrupt in service, as the guest's own write to the EOI register does.
    pub fn end_of_interrupt(&self) -> Result<(), MachineError> {
        self.set_msr(X2APIC_EOI, 0)
    }

    /// Whether an interrupt or NMI is pending.
    pub fn has_pending(&self) -> Result<bool, MachineError> {
        let lapic = self.fd.get_lapic().map_err(|e| fail("KVM_GET_LAPIC", self.id, e))?;
        let events = || self.fd.get_vcpu_events().map_err(|e| fail("KVM_GET_VCPU_EVENTS", self.id, e));
        Ok(is_requested(&lapic) || events()?.nmi.pending != 0)
    }

    pub fn set_msr(&self, index: u32, data: u64) -> Result<(), MachineError> {
        self.set_msrs(&[(index, data)])
    }

    /// Sets MSRs in their order, each of which has to take its value.
    pub fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), MachineError> {
        let entry = |(index, data): &(u32, u64)| kvm_msr_entry { index: *index, data: *data, ..Default::default() };
        let entries: Vec<_> = values.iter().map(entry).collect();
        let msrs = Msrs::from_entries(&entries)
            .map_err(|_| MachineError::Config(format!("MSR list of vCPU {} can't be built", self.id)))?;
        let taken = self.fd.set_msrs(&msrs).map_err(|e| fail("KVM_SET_MSRS", self.id, e))?;
        match values.get(taken) {
            None => Ok(()),
            Some((index, data)) => Err(MachineError::Kvm {
                call: "KVM_SET_MSRS",
                object: format!("vCPU {}, MSR {index:#x} = {data:#x}", self.id),
                errno: super::error::Errno(libc::EINVAL),
            }),
        }
    }

    pub fn mp_state(&self) -> Result<u32, MachineError> {
        Ok(self
            .fd
            .get_mp_state()
            .map_err(|e| fail("KVM_GET_MP_STATE", self.id, e))?
            .mp_state)
    }

    pub fn set_mp_state(&self, mp_state: u32) -> Result<(), MachineError> {
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(|e| fail("KVM_SET_MP_STATE", self.id, e))
    }

    pub fn sregs(&self) -> Result<kvm_sregs, MachineError> {
        self.fd.get_sregs().map_err(|e| fail("KVM_GET_SREGS", self.id, e))
    }

    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), MachineError> {
        self.fd.set_sregs(sregs).map_err(|e| fail("KVM_SET_SREGS", self.id, e))
    }

    pub fn regs(&self) -> Result<kvm_regs, MachineError> {
        self.fd.get_regs().map_err(|e| fail("KVM_GET_REGS", self.id, e))
    }

    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), MachineError> {
        self.fd.set_regs(regs).map_err(|e| fail("KVM_SET_REGS", self.id, e))
    }

    /// Makes the guest's TSC run at `khz`, by hardware scaling where the host's own differs by more
    /// than KVM's tolerance.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), MachineError> {
        let host = self.fd.get_tsc_khz().map_err(|e| fail("KVM_GET_TSC_KHZ", self.id, e))?;
        // KVM takes 250 ppm for the same frequency; so does this machine.
        if host.abs_diff(khz) <= khz / 4000 {
            return Ok(());
        }
        self.fd.set_tsc_khz(khz).map_err(|e| {
            MachineError::Config(format!(
                "TSC of this host is {host} kHz, node 0's {khz} kHz, and this CPU can't scale ({e}); use hosts of one clock"
            ))
        })
    }

    /// Signals blocked while KVM_RUN runs, as bits; `None`: the thread's own.
    pub fn signal_mask(&self, blocked: Option<u64>) -> Result<(), MachineError> {
        let mask = SignalMask { len: 8, set: [blocked.unwrap_or(0) as u32, (blocked.unwrap_or(0) >> 32) as u32] };
        let pointer = if blocked.is_some() { &raw const mask } else { std::ptr::null() };
        // SAFETY: KVM_SET_SIGNAL_MASK reads the length and as many bytes behind it, which `mask` has and which
        // live until the call returns; null is allowed.
        match unsafe { vmm_sys_util::ioctl::ioctl_with_ptr(&self.fd, KVM_SET_SIGNAL_MASK(), pointer) } {
            0 => Ok(()),
            _ => Err(MachineError::last_os("KVM_SET_SIGNAL_MASK")),
        }
    }

    /// Sets what is added to the host's (scaled) TSC, modulo 2^64.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), MachineError> {
        let attr = kvm_device_attr {
            group: TSC_CONTROL,
            attr: TSC_OFFSET,
            addr: &raw const offset as u64,
            flags: 0,
        };
        // SAFETY: KVM_SET_DEVICE_ATTR on a vCPU file reads `attr` and the eight bytes at `addr`;
        // both live until the call returns.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attr) } {
            0 => Ok(()),
            _ => Err(MachineError::last_os("KVM_VCPU_TSC_OFFSET")),
        }
    }
}

/// Whether a LAPIC has an interrupt that was not taken.
pub(crate) fn is_requested(lapic: &kvm_lapic_state) -> bool {
    lapic.regs[LAPIC_IRR..LAPIC_IRR_END].iter().any(|byte| *byte != 0)
}

/// A failed call on vCPU `id`.
pub(crate) fn fail(call: &'static str, id: u32, error: kvm_ioctls::Error) -> MachineError {
    MachineError::kvm(call, format!("vCPU {id}"), error)
}
