//! Saved form of a node's machine. Taken and restored while its vCPUs are stopped.

use std::ops::RangeInclusive;

use kvm_bindings::{
    Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sync_regs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::SyncReg;
use serde::{Deserialize, Serialize};

use super::error::MachineError;
use super::ioapic::IoapicState;
use super::serial::Com1State;
use super::vcpu::{Role, Vcpu, XSAVE_PAGE, fail};
use crate::ownership::Ownership;

/// The guest's time-stamp counter; restored through the TSC offset, not as an MSR, as two writes of
/// it at different moments would set two vCPUs apart.
const IA32_TSC: u32 = 0x10;
/// Another view of the same counter; hidden from the guest.
const IA32_TSC_ADJUST: u32 = 0x3b;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Where KVM has pages in common with the guest: MSR_KVM_WALL_CLOCK and MSR_KVM_SYSTEM_TIME, and MSR_KVM_WALL_CLOCK_NEW to
/// MSR_KVM_PV_EOI_EN.
const KVM_CLOCK: RangeInclusive<u32> = 0x11..=0x12;
const KVM_PAGES: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d04;
/// MSRs that KVM takes in one call (MAX_IO_MSRS).
const MOST_MSRS: usize = 256;
/// Restored with the system registers.
const IA32_APIC_BASE: u32 = 0x1b;
/// The parts of a vCPU that KVM_RUN leaves in the run page, and takes from there (KVM_CAP_SYNC_REGS).
pub(crate) const SHOWN: [SyncReg; 3] = [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents];

/// One vCPU of one node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Layout of this structure: [`VcpuState::VERSION`].
    pub version: u32,
    /// vCPU number.
    pub id: u32,
    /// What the node does for it. A proxy's registers have no meaning; nothing is pending in it.
    pub role: Role,
    /// A proxy between INIT and SIPI.
    pub awaits_sipi: bool,
    /// KVM_MP_STATE_*.
    pub mp_state: u32,
    /// The guest's TSC when it was saved.
    pub tsc: u64,
    /// Registers; `None` for a proxy.
    pub registers: Option<Box<Registers>>,
}

/// Architectural state of a vCPU that ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registers {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables.
    pub sregs: kvm_sregs,
    /// FPU and vector registers: the XSAVE area in KVM's form, 1024 words or as many as the host's takes.
    pub xsave: Vec<u32>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Exceptions, interrupts and NMIs under way.
    pub events: kvm_vcpu_events,
    /// MSRs, as `(index, value)`.
    pub msrs: Vec<(u32, u64)>,
}

/// What KVM_RUN can read and write.
struct Core {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
}

/// Devices of node 0 that this module has (not PCI).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Console port.
    pub com1: Com1State,
    /// Interrupt controller.
    pub ioapic: IoapicState,
    /// Register selected in the clock.
    pub rtc_index: u8,
}

/// One node's machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Layout of this structure: [`MachineState::VERSION`].
    pub version: u32,
    /// The node that was saved.
    pub node: usize,
    /// Who owns each vCPU, and what is known of the events for it.
    pub ownership: Vec<Ownership>,
    /// Start-up vectors the guest has used, one byte each, 0 for none.
    pub startup_vectors: u32,
    /// Every vCPU, by number.
    pub vcpus: Vec<VcpuState>,
    /// Node 0's devices.
    pub devices: Option<DeviceState>,
}

impl MachineState {
    /// Layout written by this program.
    pub const VERSION: u32 = 2;
}

impl VcpuState {
    /// Layout written by this program.
    pub const VERSION: u32 = 1;
}

impl Vcpu {
    /// Saves a stopped vCPU; `msrs` are the indices KVM lists as state.
    pub(crate) fn save(&self, msrs: &[u32]) -> Result<VcpuState, MachineError> {
        let mp_state = self.mp_state()?;
        let registers = match self.role {
            Role::Owner => Some(Box::new(self.save_registers(msrs)?)),
            Role::Proxy => None,
        };
        Ok(VcpuState {
            version: VcpuState::VERSION,
            id: self.id,
            role: self.role,
            awaits_sipi: self.awaits_sipi,
            mp_state,
            tsc: self.read_msrs(&[IA32_TSC])?.first().map_or(0, |(_, value)| *value),
            registers,
        })
    }

    /// Order: MP state first (in `save`), as reading it takes pending INIT and SIPI.
    pub(crate) fn save_registers(&self, msrs: &[u32]) -> Result<Registers, MachineError> {
        self.save_beside(self.core()?, msrs)
    }

    /// The same of a vCPU that has just run: KVM_RUN has left a part of it in the run page, which saves a call each.
    pub(crate) fn save_after_run(&self, msrs: &[u32]) -> Result<Registers, MachineError> {
        let shown = self.fd.sync_regs();
        let core = Core { regs: shown.regs, sregs: shown.sregs, events: shown.events };
        let mut saved = self.save_beside(core, msrs)?;
        // INIT may have come since, and with SIPI changed all that. It switches the LAPIC off, and who switches it on
        // again is the vCPU itself.
        if !saved.takes_interrupts() {
            let core = self.core()?;
            (saved.regs, saved.sregs, saved.events) = (core.regs, core.sregs, core.events);
        }
        Ok(saved)
    }

    /// Reads what KVM has in a proxy, where it isn't known: what comes to run here is then written where it differs.
    pub(crate) fn note_present(&mut self, msrs: &[u32]) -> Result<(), MachineError> {
        if self.present.is_none() {
            self.present = Some(Box::new(self.save_registers(msrs)?));
        }
        Ok(())
    }

    fn core(&self) -> Result<Core, MachineError> {
        let events = self.fd.get_vcpu_events().map_err(|e| fail("KVM_GET_VCPU_EVENTS", self.id, e))?;
        Ok(Core { regs: self.regs()?, sregs: self.sregs()?, events })
    }

    fn save_beside(&self, core: Core, msrs: &[u32]) -> Result<Registers, MachineError> {
        let failed = |call| move |e| fail(call, self.id, e);
        Ok(Registers {
            regs: core.regs,
            sregs: core.sregs,
            events: core.events,
            xsave: self.xsave()?,
            xcrs: self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: self.fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            msrs: self.read_msrs(msrs)?,
        })
    }

    /// Restores a stopped vCPU. The TSC is left to [`super::Machine::set_tsc_offset`].
    pub(crate) fn restore(&mut self, saved: &VcpuState) -> Result<(), MachineError> {
        let refuse = |reason: String| MachineError::State {
            object: format!("vCPU {}", self.id),
            reason,
        };
        if saved.version != VcpuState::VERSION {
            return Err(refuse(format!("version {} is not known here", saved.version)));
        }
        if saved.id != self.id {
            return Err(refuse(format!("this is vCPU {}", saved.id)));
        }
        match (saved.role, &saved.registers) {
            (Role::Owner, Some(registers)) => {
                self.restore_core(registers)?;
                self.restore_beside(registers, None)?;
            }
            (Role::Owner, None) => return Err(refuse("the registers are missing".into())),
            (Role::Proxy, _) => {}
        }
        self.set_mp_state(saved.mp_state)?;
        self.present = None;
        self.role = saved.role;
        self.awaits_sipi = saved.awaits_sipi;
        Ok(())
    }

    /// Writes the registers that KVM_RUN can, by calls.
    pub(crate) fn restore_core(&self, saved: &Registers) -> Result<(), MachineError> {
        self.set_sregs(&saved.sregs)?;
        // Forgets exceptions.
        self.set_regs(&saved.regs)?;
        self.fd.set_vcpu_events(&saved.events).map_err(|e| fail("KVM_SET_VCPU_EVENTS", self.id, e))
    }

    /// Has the next KVM_RUN write them, before anything else of the vCPU changes: it must not be one that waits for
    /// INIT, nor change the mode of its LAPIC.
    pub(crate) fn restore_core_at_run(&mut self, saved: &Registers) {
        let Registers { regs, sregs, events, .. } = *saved;
        *self.fd.sync_regs_mut() = kvm_sync_regs { regs, sregs, events };
        for part in SHOWN {
            self.fd.set_sync_dirty_reg(part);
        }
    }

    /// Writes the rest of `saved`, of which only what differs from `present`, if that is what KVM has.
    pub(crate) fn restore_beside(&self, saved: &Registers, present: Option<&Registers>) -> Result<(), MachineError> {
        let failed = |call| move |e| fail(call, self.id, e);
        if present.is_none_or(|present| present.xcrs != saved.xcrs) {
            self.fd.set_xcrs(&saved.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        if present.is_none_or(|present| present.xsave != saved.xsave) {
            self.set_xsave(&saved.xsave)?;
        }
        if present.is_none_or(|present| present.debug != saved.debug) {
            self.fd
                .set_debug_regs(&saved.debug)
                .map_err(failed("KVM_SET_DEBUGREGS"))?;
        }
        // Before the MSRs: the TSC deadline is one of them and needs the timer's mode.
        self.fd.set_lapic(&saved.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        let is_new = |value: &&(u32, u64)| {
            let present = present.and_then(|present| present.msrs.iter().find(|(index, _)| *index == value.0));
            present != Some(*value) || value.1 != 0 && works_when_written(value.0)
        };
        self.write_msrs(&saved.msrs.iter().filter(is_new).copied().collect::<Vec<_>>())
    }

    /// The XSAVE area, in words.
    fn xsave(&self) -> Result<Vec<u32>, MachineError> {
        if self.xsave_size == XSAVE_PAGE {
            let xsave = self.fd.get_xsave().map_err(|e| fail("KVM_GET_XSAVE", self.id, e))?;
            return Ok(xsave.region.to_vec());
        }
        let mut xsave = self.long_xsave()?;
        // SAFETY: it has room for as many bytes as the VM says the area has, and this process never asks the
        // kernel for features that would make it longer.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(|e| fail("KVM_GET_XSAVE2", self.id, e))?;
        let first = xsave.as_fam_struct_ref().xsave.region;
        Ok([&first[..], xsave.as_slice()].concat())
    }

    /// Sets the XSAVE area; one of another host may be shorter than this host's.
    fn set_xsave(&self, words: &[u32]) -> Result<(), MachineError> {
        let page = XSAVE_PAGE / 4;
        if words.len() < page || words.len() * 4 > self.xsave_size {
            return Err(MachineError::State {
                object: format!("vCPU {}", self.id),
                reason: format!("its XSAVE area has {} words; this host's has {}", words.len(), self.xsave_size / 4),
            });
        }
        let mut region = [0; XSAVE_PAGE / 4];
        region.copy_from_slice(&words[..page]);
        if self.xsave_size == XSAVE_PAGE {
            let xsave = kvm_xsave { region, ..Default::default() };
            // SAFETY: KVM reads more than the 4096 bytes of a kvm_xsave only if the VM says that its area is
            // longer, which was asked when the vCPU was made, or if this process has asked the kernel for dynamic
            // features (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM), which it never does.
            return unsafe { self.fd.set_xsave(&xsave) }.map_err(|e| fail("KVM_SET_XSAVE", self.id, e));
        }
        let mut xsave = self.long_xsave()?;
        // SAFETY: the words are plain data, and the length stays.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = region;
        xsave.as_mut_slice()[..words.len() - page].copy_from_slice(&words[page..]);
        // SAFETY: as in `xsave`.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(|e| fail("KVM_SET_XSAVE", self.id, e))
    }

    fn long_xsave(&self) -> Result<Xsave, MachineError> {
        Xsave::new((self.xsave_size - XSAVE_PAGE).div_ceil(4)).map_err(|_| MachineError::State {
            object: format!("vCPU {}", self.id),
            reason: format!("an XSAVE area of {} bytes can't be had", self.xsave_size),
        })
    }

    /// Writes MSRs, but for those that are restored in another way.
    fn write_msrs(&self, values: &[(u32, u64)]) -> Result<(), MachineError> {
        let entry = |(index, data): &(u32, u64)| kvm_msr_entry { index: *index, data: *data, ..Default::default() };
        let entries: Vec<_> = values.iter().filter(|(index, _)| !is_special(*index)).map(entry).collect();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let some = &rest[..rest.len().min(MOST_MSRS)];
            let msrs = Msrs::from_entries(some).map_err(|_| MachineError::State {
                object: format!("vCPU {}", self.id),
                reason: format!("{} MSRs are more than KVM takes", some.len()),
            })?;
            let written = self.fd.set_msrs(&msrs).map_err(|e| fail("KVM_SET_MSRS", self.id, e))?;
            rest = rest.get(written..).unwrap_or_default();
            let Some(refused) = rest.first().filter(|_| written < some.len()) else { continue };
            // A host may refuse an MSR of a feature the guest doesn't have, and some that can't be changed.
            let same = || self.read_msrs(&[refused.index]).is_ok_and(|now| now.first() == Some(&(refused.index, refused.data)));
            if refused.data != 0 && !same() {
                return Err(MachineError::State {
                    object: format!("vCPU {}", self.id),
                    reason: format!("MSR {:#x} can't be {:#x} on this host", refused.index, refused.data),
                });
            }
            rest = &rest[1..];
        }
        Ok(())
    }

    /// Reads those of `indices` that can be read.
    pub(crate) fn read_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, MachineError> {
        let mut values = Vec::new();
        let mut rest = indices;
        while !rest.is_empty() {
            let entries: Vec<_> = rest
                .iter()
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| MachineError::State {
                object: format!("vCPU {}", self.id),
                reason: format!("{} MSRs are more than KVM takes", entries.len()),
            })?;
            let read = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(|e| fail("KVM_GET_MSRS", self.id, e))?;
            values.extend(msrs.as_slice().iter().take(read).map(|e| (e.index, e.data)));
            // KVM stops at the first it can't read: that one is skipped.
            rest = rest.get(read + 1..).unwrap_or_default();
        }
        Ok(values)
    }
}

/// MSRs whose writing does something: the LAPIC forgets a deadline when its timer changes, and what KVM shares with
/// the guest by pages another host's KVM may have written meanwhile.
fn works_when_written(index: u32) -> bool {
    index == IA32_TSC_DEADLINE || KVM_CLOCK.contains(&index) || KVM_PAGES.contains(&index)
}

/// MSRs that are restored in another way.
fn is_special(index: u32) -> bool {
    matches!(index, IA32_TSC | IA32_TSC_ADJUST | IA32_APIC_BASE)
}
