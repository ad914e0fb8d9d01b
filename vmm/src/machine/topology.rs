//! CPU topology as CPUID tells it: each host is a package if the APIC ids allow it, each vCPU a
//! core of one thread.

use krg_scheduler::Placement;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use super::cpuid::leaf;
use crate::node::CpuidLeaf;

/// The machine's packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// APIC id bits below the package number.
    shift: u32,
    /// Cores of each package; one entry if the machine is a single package.
    cores: Vec<u32>,
}

impl Topology {
    /// One package a host if every host's first vCPU number is a multiple of the power of two that
    /// holds the largest host; else one package for all, because a package is an aligned block of
    /// APIC ids.
    pub fn new(placement: &Placement) -> Self {
        let sizes: Vec<u32> = placement.hosts.iter().map(|h| h.vcpus.len() as u32).collect();
        let shift = bits(sizes.iter().copied().max().unwrap_or(1));
        let aligned = placement
            .hosts
            .iter()
            .enumerate()
            .all(|(host, share)| share.vcpus.iter().all(|vcpu| vcpu >> shift == host as u32));
        match aligned {
            true => Topology { shift, cores: sizes },
            false => Topology {
                shift: bits(placement.cpus()),
                cores: vec![placement.cpus()],
            },
        }
    }

    /// Package of a vCPU.
    pub fn package(&self, vcpu: u32) -> u32 {
        vcpu.checked_shr(self.shift).unwrap_or(0)
    }

    fn cores_of(&self, vcpu: u32) -> u32 {
        self.cores.get(self.package(vcpu) as usize).copied().unwrap_or(1).max(1)
    }

    /// Writes `vcpu`'s place into the topology fields of a leaf.
    pub(crate) fn describe(&self, l: &mut CpuidLeaf, vcpu: u32) {
        let cores = self.cores_of(vcpu);
        let ids = 1u32 << self.shift.min(7);
        match l.function {
            1 => {
                l.ebx = l.ebx & 0xffff | (vcpu & 0xff) << 24 | ids << 16;
                l.edx = l.edx & !(1 << 28) | u32::from(cores > 1) << 28;
            }
            // Caches: levels 1 and 2 belong to a core, level 3 to the package.
            4 | 0x8000_001d if l.eax & 0x1f != 0 => {
                let sharing = if l.eax >> 5 & 7 >= 3 { (1 << self.shift) - 1 } else { 0 };
                l.eax = l.eax & 0x3fff | (sharing & 0xfff) << 14;
                if l.function == 4 {
                    l.eax |= ((1u32 << self.shift) - 1).min(0x3f) << 26;
                }
            }
            0x8000_0001 => l.ecx = l.ecx & !(1 << 1) | u32::from(cores > 1) << 1,
            0x8000_0008 => l.ecx = (self.shift & 0xf) << 12 | (cores - 1).min(0xff),
            // One thread a core, one node a package.
            0x8000_001e => {
                l.eax = vcpu;
                l.ebx = vcpu & ((1 << self.shift) - 1) & 0xff;
                l.ecx = self.package(vcpu) & 0xff;
                l.edx = 0;
            }
            _ => {}
        }
    }

    /// Leaf 0xB: a level of one thread, a level of the package's cores, the end.
    pub(crate) fn leaf_b(&self, vcpu: u32) -> [CpuidLeaf; 3] {
        let level = |index, shift, count, kind: u32| CpuidLeaf {
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..leaf(0xb, index, [shift, count, kind << 8 | index, vcpu])
        };
        [
            level(0, 0, 1, 1),
            level(1, self.shift, self.cores_of(vcpu), 2),
            level(2, 0, 0, 0),
        ]
    }
}

/// Bits that number `count` things.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use krg_scheduler::HostShare;

    fn placement(sizes: &[u32]) -> Placement {
        let mut next = 0;
        let hosts = sizes
            .iter()
            .map(|n| {
                let first = next;
                next += n;
                HostShare {
                    vcpus: (first..next).collect(),
                    memory: 1 << 30,
                }
            })
            .collect();
        Placement { hosts }
    }

    #[test]
    fn equal_hosts_are_packages() {
        let t = Topology::new(&placement(&[4, 4]));
        assert_eq!(
            (0..8).map(|v| t.package(v)).collect::<Vec<_>>(),
            [0, 0, 0, 0, 1, 1, 1, 1]
        );
        let [thread, core, end] = t.leaf_b(5);
        assert_eq!(
            (thread.eax, thread.ebx, core.eax, core.ebx, end.ebx, core.edx),
            (0, 1, 2, 4, 0, 5)
        );
        let single = Topology::new(&placement(&[1, 1]));
        assert_eq!((single.package(0), single.package(1), single.shift), (0, 1, 0));
    }

    #[test]
    fn ids_that_do_not_align_make_one_package() {
        let t = Topology::new(&placement(&[3, 3]));
        assert_eq!((0..6).map(|v| t.package(v)).max(), Some(0));
        assert_eq!(t.leaf_b(5)[1].ebx, 6);
        assert_eq!(Topology::new(&placement(&[3, 1])).package(3), 0);
    }

    #[test]
    fn leaves_agree_with_each_other() {
        let t = Topology::new(&placement(&[4, 4]));
        let mut one = leaf(1, 0, [0; 4]);
        let mut amd = leaf(0x8000_001e, 0, [0; 4]);
        let mut size = leaf(0x8000_0008, 0, [0; 4]);
        for l in [&mut one, &mut amd, &mut size] {
            t.describe(l, 6);
        }
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (6, 4, 1));
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (6, 2, 1));
        assert_eq!((size.ecx >> 12, size.ecx & 0xff), (2, 3));
    }
}
