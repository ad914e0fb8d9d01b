//! How a vCPU of a micro guest starts: in 64-bit mode at CPL 3.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::tables::{TSS_LEN, USER_CODE, USER_DATA};

/// Reserved bit 1, IOPL 3: port I/O from CPL 3. Interrupts stay off, as nothing handles them.
pub(super) const RFLAGS: u64 = 0x3002;
/// PG, AM, WP, NE, ET, MP, PE.
pub(super) const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
pub(super) const CR4: u64 = 0x620;
/// NXE, LMA, LME, SCE.
const EFER: u64 = 0xd01;

/// A vCPU's first registers. All other general registers are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitialRegs {
    /// First instruction.
    pub rip: u64,
    /// End of the user stack.
    pub rsp: u64,
    /// Top-level page table.
    pub cr3: u64,
    /// First argument: the vCPU's index.
    pub rdi: u64,
    /// Base and limit of the GDT.
    pub gdt: (u64, u16),
    /// Base and limit of the IDT.
    pub idt: (u64, u16),
    /// Selector and base of the vCPU's TSS.
    pub tss: (u16, u64),
}

impl InitialRegs {
    /// For KVM_SET_REGS.
    pub fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.rip,
            rsp: self.rsp,
            rdi: self.rdi,
            rflags: RFLAGS,
            ..kvm_regs::default()
        }
    }

    /// Changes what KVM_GET_SREGS gave for KVM_SET_SREGS; the APIC base stays as it is.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: USER_CODE,
            type_: 0xb,
            present: 1,
            dpl: 3,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment {
            selector: USER_DATA,
            type_: 3,
            l: 0,
            db: 1,
            ..code
        };
        let (selector, base) = self.tss;
        let tss = kvm_segment {
            base,
            limit: u32::from(TSS_LEN) - 1,
            selector,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        let table = |(base, limit): (u64, u16)| kvm_dtable {
            base,
            limit,
            ..kvm_dtable::default()
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = tss;
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        };
        sregs.gdt = table(self.gdt);
        sregs.idt = table(self.idt);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, self.cr3, CR4, EFER);
    }
}
