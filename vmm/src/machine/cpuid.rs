//! What CPUID tells the guest: the features all hosts share, without those that can't work or
//! would hurt across hosts, and the machine's own topology.
//!
//! Leaf numbers and bits: Intel SDM vol. 2A "CPUID", AMD APM vol. 3 appendix E, and the kernel's
//! "KVM CPUID bits" for 0x4000_00xx.

use krg_scheduler::Placement;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::topology::Topology;
use crate::node::CpuidLeaf;

/// Feature bits every guest of this machine sees set.
struct Forced;

impl Forced {
    /// 1.ECX: x2APIC (every LAPIC starts in that mode), TSC deadline timer (in the kernel's
    /// LAPIC, no exit to us), hypervisor present.
    const LEAF1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 31;
    /// 1.EDX: APIC.
    const LEAF1_EDX: u32 = 1 << 9;
    /// 8000_0007.EDX: invariant TSC, so that Linux takes the TSC as its clock.
    const INVARIANT_TSC: u32 = 1 << 8;
}

/// 1.ECX bits withheld: MONITOR (3; its exits would idle badly), DS_CPL (4), VMX (5), SMX (6),
/// EIST (7), TM2 (8), SDBG (11), xTPR (14), PDCM (15), DCA (18), OSXSAVE (27, KVM follows CR4).
const HIDE_LEAF1_ECX: u32 =
    1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 14 | 1 << 15 | 1 << 18 | 1 << 27;
/// 1.EDX bits withheld: PSN (18), DS (21), ACPI (22), HTT (28, set by topology), TM (29), PBE (31).
const HIDE_LEAF1_EDX: u32 = 1 << 18 | 1 << 21 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 31;
/// 7.0.EBX withheld: TSC_ADJUST (1; one vCPU could shift its clock against the others), SGX (2),
/// RDT (12, 15), MPX (14), PT (25).
const HIDE_LEAF7_EBX: u32 = 1 << 1 | 1 << 2 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 25;
/// 7.0.ECX withheld: PKU (3), OSPKE (4), WAITPKG (5), CET_SS (7), TME (13), LA57 (16: a fifth
/// page-table level is one more page to share at every walk), BUS_LOCK_DETECT (24), ENQCMD (29),
/// SGX_LC (30), PKS (31).
const HIDE_LEAF7_ECX: u32 =
    1 << 3 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 13 | 1 << 16 | 1 << 24 | 1 << 29 | 1 << 30 | 1 << 31;
/// 7.0.EDX withheld: UINTR (5), PCONFIG (18), ARCH_LBR (19), CET_IBT (20), AMX (22, 24, 25: 8 KiB
/// more state a vCPU, switched on by request only).
const HIDE_LEAF7_EDX: u32 = 1 << 5 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25;
/// 7.1.EAX withheld: FRED (17), LKGS (18), LAM (26).
const HIDE_LEAF7_1_EAX: u32 = 1 << 17 | 1 << 18 | 1 << 26;
/// XCR0 components withheld: MPX (3, 4), PKRU (9), AMX (17, 18).
const HIDE_XCR0: u32 = 1 << 3 | 1 << 4 | 1 << 9 | 1 << 17 | 1 << 18;
/// 8000_0001.ECX withheld: SVM (2), IBS (10), SKINIT (12), WDT (13), LWP (15), NodeId MSR (19),
/// performance counters (23, 24, 28), MWAITX (29).
const HIDE_EXT1_ECX: u32 =
    1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29;

/// Leaves withheld whole: MWAIT (5), performance counters (0xA, 8000_0022), cache QoS (0xF, 0x10),
/// SGX (0x12), PT (0x14), AMX (0x1D, 0x1E), the second topology leaf (0x1F; Linux then takes 0xB),
/// SVM (8000_000A), IBS (8000_001B), SEV (8000_001F), AMD's topology leaf (8000_0026).
const DROPPED: [u32; 13] = [
    5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1d,
    0x1e,
    0x1f,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0026,
];

/// KVM's feature leaf 4000_0001.EAX, chosen bit by bit. On: NOP_IO_DELAY (1; port 0x80 writes
/// would cross hosts for nothing), MSI_EXT_DEST_ID (15; APIC ids above 255 without interrupt
/// remapping). Off, because a page would be written by several hosts at the rate of scheduling or
/// interrupts: kvmclock (0, 3, 24), async page faults (4, 10, 14), steal time (5), PV EOI (6), TLB
/// flush by shared flag (9). Off, because the kernel would do it to vCPUs of this host only:
/// PV_UNHALT (7), PV_SEND_IPI (11), PV_SCHED_YIELD (13). Off, as there is no use: POLL_CONTROL (12),
/// MIGRATION_CONTROL (17).
const KVM_FEATURES: u32 = 1 << 1 | 1 << 15;
/// On one host besides: PV EOI, which spares an exit an interrupt, of three or four a timer tick.
const KVM_FEATURES_ALONE: u32 = 1 << 6;
/// 4000_0001.EDX: KVM_HINTS_REALTIME. Linux then uses its queued spinlocks, whose waiters spin on
/// their own cache line, instead of the test-and-set lock for preempted vCPUs, whose waiters all
/// write the lock's: over pages that travel between hosts that is the difference that counts.
const KVM_HINTS: u32 = 1;
/// Last leaf of the hypervisor range: the TSC and APIC frequencies in kHz.
const KVM_LAST: u32 = 0x4000_0010;
/// Frequency of the kernel's LAPIC timer, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The CPUID leaves of `vcpu`: those of `common` (see [`super::cpuid_common`]), masked, with the
/// topology that follows from `placement` and a TSC of `tsc_khz` kHz. Depends on nothing else, so
/// every node gives a vCPU the same answers.
pub fn guest_cpuid(common: &[CpuidLeaf], vcpu: u32, placement: &Placement, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
    let topology = Topology::new(placement);
    let intel = is_intel(common);
    let mut leaves: Vec<CpuidLeaf> = common
        .iter()
        .filter(|l| !DROPPED.contains(&l.function) && l.function != 0xb && !is_hypervisor(l.function))
        .filter(|l| !matches!(l.function, 0x15 | 0x16) || intel)
        .filter(|l| l.function != 0xd || l.index < 2 || HIDE_XCR0 >> l.index.min(31) & 1 == 0)
        .copied()
        .collect();
    for leaf in &mut leaves {
        mask(leaf);
        topology.describe(leaf, vcpu);
    }
    shrink_xsave(&mut leaves);
    leaves.extend(topology.leaf_b(vcpu));
    leaves.extend(hypervisor(tsc_khz, placement.hosts.len() == 1));
    let last = leaves
        .iter()
        .map(|l| l.function)
        .filter(|f| *f < 0x4000_0000)
        .max()
        .unwrap_or(0);
    if intel && last >= 0x16 {
        leaves.retain(|l| !matches!(l.function, 0x15 | 0x16));
        // A crystal of the LAPIC's frequency: Linux takes the LAPIC timer's rate from it.
        leaves.push(leaf(0x15, 0, [1_000_000, tsc_khz, 1_000_000_000, 0]));
        leaves.push(leaf(0x16, 0, [tsc_khz / 1000, tsc_khz / 1000, 100, 0]));
    }
    for leaf in leaves.iter_mut().filter(|l| l.function == 0) {
        leaf.eax = leaf.eax.max(0xb);
    }
    leaves.sort_by_key(|l| (l.function, l.index));
    leaves.iter().map(entry).collect()
}

/// Whether the vendor string is Intel's.
pub(crate) fn is_intel(leaves: &[CpuidLeaf]) -> bool {
    leaves
        .iter()
        .any(|l| l.function == 0 && l.ebx == u32::from_le_bytes(*b"Genu"))
}

/// Whether the leaf belongs to hypervisors, which this machine answers itself.
pub(crate) fn is_hypervisor(function: u32) -> bool {
    (0x4000_0000..0x5000_0000).contains(&function)
}

fn mask(leaf: &mut CpuidLeaf) {
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ecx = leaf.ecx & !HIDE_LEAF1_ECX | Forced::LEAF1_ECX;
            leaf.edx = leaf.edx & !HIDE_LEAF1_EDX | Forced::LEAF1_EDX;
        }
        // Only ARAT: the LAPIC timer never stops.
        (6, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (1 << 2, 0, 0, 0),
        (7, 0) => {
            leaf.ebx &= !HIDE_LEAF7_EBX;
            leaf.ecx &= !HIDE_LEAF7_ECX;
            leaf.edx &= !HIDE_LEAF7_EDX;
        }
        (7, 1) => leaf.eax &= !HIDE_LEAF7_1_EAX,
        (0xd, 0) => leaf.eax &= !HIDE_XCR0,
        // XSAVEOPT, XSAVEC, XGETBV and XSAVES stay, supervisor components (CET, PT, LBR) go.
        (0xd, 1) => (leaf.ecx, leaf.edx) = (0, 0),
        (0x8000_0001, _) => leaf.ecx &= !HIDE_EXT1_ECX,
        (0x8000_0007, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, Forced::INVARIANT_TSC),
        // No guest-physical width of its own.
        (0x8000_0008, _) => leaf.eax &= 0xffff,
        _ => {}
    }
}

/// Makes the XSAVE area's size fit the components that are left.
fn shrink_xsave(leaves: &mut Vec<CpuidLeaf>) {
    let Some(xcr0) = leaves.iter().find(|l| l.function == 0xd && l.index == 0).map(|l| l.eax) else {
        return;
    };
    leaves.retain(|l| l.function != 0xd || l.index < 2 || l.index < 32 && xcr0 >> l.index & 1 == 1);
    // 512 bytes of legacy area and the 64-byte header come first (SDM vol. 1, 13.4).
    let size = leaves
        .iter()
        .filter(|l| l.function == 0xd && l.index >= 2)
        .map(|l| l.eax.saturating_add(l.ebx))
        .fold(576, u32::max);
    for leaf in leaves.iter_mut().filter(|l| l.function == 0xd) {
        match leaf.index {
            0 => (leaf.ebx, leaf.ecx) = (leaf.ebx.min(size), size),
            1 => leaf.ebx = leaf.ebx.min(size),
            _ => {}
        }
    }
}

fn hypervisor(tsc_khz: u32, alone: bool) -> [CpuidLeaf; 3] {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let features = KVM_FEATURES | if alone { KVM_FEATURES_ALONE } else { 0 };
    [
        leaf(
            0x4000_0000,
            0,
            [KVM_LAST, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
        ),
        leaf(0x4000_0001, 0, [features, 0, 0, KVM_HINTS]),
        leaf(KVM_LAST, 0, [tsc_khz, APIC_BUS_KHZ, 0, 0]),
    ]
}

/// A leaf without flags.
pub(crate) fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf {
        function,
        index,
        flags: 0,
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn entry(l: &CpuidLeaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: l.function,
        index: l.index,
        flags: l.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: l.eax,
        ebx: l.ebx,
        ecx: l.ecx,
        edx: l.edx,
        ..Default::default()
    }
}

/// The leaf as KVM gives it.
impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        CpuidLeaf {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krg_scheduler::HostShare;

    fn all_ones() -> Vec<CpuidLeaf> {
        let indexed = |function, index, regs| CpuidLeaf {
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..leaf(function, index, regs)
        };
        let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        vec![
            leaf(0, 0, [0x20, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            leaf(1, 0, [0x806f8, 0, !0, !0]),
            leaf(5, 0, [!0; 4]),
            leaf(6, 0, [!0; 4]),
            indexed(7, 0, [1, !0, !0, !0]),
            leaf(0xa, 0, [!0; 4]),
            indexed(0xd, 0, [0x602e7, 11_008, 11_008, 0]),
            indexed(0xd, 1, [0xf, 11_008, 0x1800, 0]),
            indexed(0xd, 2, [256, 576, 0, 0]),
            indexed(0xd, 9, [8, 2688, 0, 0]),
            indexed(0xd, 18, [8192, 2816, 0, 0]),
            leaf(0x15, 0, [0; 4]),
            leaf(0x16, 0, [0; 4]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
            leaf(0x4000_0001, 0, [!0, 0, 0, !0]),
            leaf(0x8000_0001, 0, [0, 0, !0, !0]),
            leaf(0x8000_0007, 0, [0, 0, 0, 0]),
            leaf(0x8000_000a, 0, [!0; 4]),
        ]
    }

    fn placement() -> Placement {
        let host = |vcpus| HostShare { vcpus, memory: 1 << 30 };
        Placement {
            hosts: vec![host(vec![0, 1]), host(vec![2, 3])],
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        entries.iter().find(|e| e.function == function && e.index == index)
    }

    #[test]
    fn features_that_cannot_span_hosts_are_hidden() {
        let guest = guest_cpuid(&all_ones(), 2, &placement(), 2_000_000);
        let get = |f, i| find(&guest, f, i).unwrap();
        assert_eq!(get(1, 0).ecx & (1 << 5 | 1 << 3), 0, "VMX, MONITOR");
        assert_eq!(get(1, 0).ecx & Forced::LEAF1_ECX, Forced::LEAF1_ECX);
        assert_eq!(get(7, 0).ecx & (1 << 16 | 1 << 3 | 1 << 7), 0, "LA57, PKU, CET");
        assert_eq!(get(0x8000_0001, 0).ecx & 1 << 2, 0, "SVM");
        assert_ne!(get(0x8000_0001, 0).edx & 1 << 26, 0, "1 GiB pages stay");
        assert_eq!(get(0x8000_0007, 0).edx, 1 << 8);
        assert_eq!(get(0x4000_0001, 0).eax, 1 << 1 | 1 << 15);
        assert_eq!(&get(0x4000_0000, 0).ebx.to_le_bytes(), b"KVMK");
        assert!([5, 0xa, 0x8000_000a].iter().all(|f| find(&guest, *f, 0).is_none()));
    }

    #[test]
    fn one_host_has_pv_eoi() {
        let alone = Placement { hosts: vec![HostShare { vcpus: vec![0], memory: 1 << 30 }] };
        let guest = guest_cpuid(&all_ones(), 0, &alone, 2_000_000);
        assert_eq!(find(&guest, 0x4000_0001, 0).unwrap().eax, 1 << 1 | 1 << 6 | 1 << 15);
    }

    #[test]
    fn xsave_area_has_no_gap_for_hidden_components() {
        let guest = guest_cpuid(&all_ones(), 0, &placement(), 2_000_000);
        let main = find(&guest, 0xd, 0).unwrap();
        assert_eq!((main.eax, main.ecx), (0xe7, 832));
        assert!(find(&guest, 0xd, 9).is_none() && find(&guest, 0xd, 18).is_none());
    }

    #[test]
    fn clock_is_described_where_intel_kernels_look() {
        let guest = guest_cpuid(&all_ones(), 0, &placement(), 2_100_000);
        let crystal = find(&guest, 0x15, 0).unwrap();
        let hz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax);
        assert_eq!(hz, 2_100_000_000);
        assert_eq!(find(&guest, 0x4000_0010, 0).unwrap().eax, 2_100_000);
    }

    #[test]
    fn nodes_agree_and_entries_are_unique() {
        let guest = guest_cpuid(&all_ones(), 3, &placement(), 1);
        assert_eq!(guest, guest_cpuid(&all_ones(), 3, &placement(), 1));
        let mut keys: Vec<_> = guest.iter().map(|e| (e.function, e.index)).collect();
        keys.dedup();
        assert_eq!(keys.len(), guest.len());
    }
}
