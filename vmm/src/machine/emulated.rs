//! Hosts that are emulated themselves.
//!
//! QEMU's emulation of SVM does not intercept XSETBV: KVM never learns of the guest's XCR0 and resets
//! it at every entry, so AVX instructions fault under a guest that enabled them. There the guest is
//! not offered XSAVE, nor what builds on it.

use crate::node::CpuidLeaf;

/// Signature of QEMU's emulation in CPUID leaf 4000_0000.
const TCG: [u8; 12] = *b"TCGTCGTCGTCG";

const XSAVE_AVX_FMA_F16C: u32 = 1 << 26 | 1 << 27 | 1 << 28 | 1 << 12 | 1 << 29;
/// Leaf 7, EBX: AVX2 and AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL.
const LEAF_7_EBX: u32 = 1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 0xf << 26 | 1 << 30 | 1 << 31;
/// Leaf 7, ECX: AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; VAES, VPCLMULQDQ; PKU, OSPKE.
const LEAF_7_ECX: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
/// Leaf 8000_0001, ECX: XOP, FMA4.
const EXTENDED_ECX: u32 = 1 << 11 | 1 << 16;

/// Whether this host's CPUs are emulated by QEMU.
pub fn by_qemu() -> bool {
    let leaf = core::arch::x86_64::__cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == TCG
}

/// Takes XSAVE out of `leaves`, and what needs it.
pub fn hide_xsave(leaves: &mut Vec<CpuidLeaf>) {
    leaves.retain(|l| l.function != 0xd);
    for leaf in leaves.iter_mut() {
        match (leaf.function, leaf.index) {
            (1, _) => leaf.ecx &= !XSAVE_AVX_FMA_F16C,
            (7, 0) => {
                leaf.ebx &= !LEAF_7_EBX;
                leaf.ecx &= !LEAF_7_ECX;
                leaf.edx = 0;
            }
            (7, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            (0x8000_0001, _) => leaf.ecx &= !EXTENDED_ECX,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_needs_xsave_is_left() {
        let leaf = |function| CpuidLeaf {
            function,
            index: 0,
            flags: 0,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
        };
        let mut leaves = vec![leaf(1), leaf(7), leaf(0xd), leaf(0x8000_0001)];
        hide_xsave(&mut leaves);
        assert_eq!(
            leaves.iter().map(|l| l.function).collect::<Vec<_>>(),
            [1, 7, 0x8000_0001]
        );
        assert_eq!(leaves[0].ecx & 1 << 26, 0);
        assert_eq!(leaves[1].ebx & 1 << 5, 0);
        assert_ne!(leaves[1].ebx & 1, 0, "FSGSBASE stays");
    }
}
