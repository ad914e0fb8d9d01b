//! What the CPUs of several hosts have in common, so that a guest can run on all of them.

use super::cpuid::is_hypervisor;
use super::error::MachineError;
use crate::node::CpuidLeaf;

/// How a register of a leaf is combined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Combine {
    /// Feature bits: those all hosts have.
    And,
    /// A size or highest number: the smallest.
    Min,
    /// Descriptive: the first host's.
    First,
}

use Combine::{And, First, Min};

/// How EAX, EBX, ECX and EDX of a leaf are combined. What describes one CPU (name, family, caches)
/// is the first host's.
fn rule(function: u32, index: u32) -> [Combine; 4] {
    match (function, index) {
        (0 | 0x8000_0000, _) => [Min, First, First, First],
        (1, _) => [First, First, And, And],
        (6, _) => [And, First, And, First],
        (7, 0) => [Min, And, And, And],
        (7, _) => [And, And, And, And],
        (0xd, 0) => [And, Min, Min, And],
        (0xd, 1) => [And, Min, And, And],
        (0x8000_0001, _) => [First, First, And, And],
        (0x8000_0007, _) => [First, And, First, And],
        // Address widths are byte fields, combined below.
        (0x8000_0008, _) => [First, And, First, First],
        (0x8000_0021, _) => [And, First, First, First],
        _ => [First; 4],
    }
}

/// The leaves all `offers` (one a host, as KVM_GET_SUPPORTED_CPUID gives them) share, and a line
/// for each difference that was masked. The first offer must be node 0's: its CPU's name and caches
/// are shown.
///
/// # Errors
/// When there is no offer, or the vendors differ: a guest patches itself for one vendor at boot.
pub fn common_subset(offers: &[Vec<CpuidLeaf>]) -> Result<(Vec<CpuidLeaf>, Vec<String>), MachineError> {
    let Some((first, others)) = offers.split_first() else {
        return Err(MachineError::Cpuid("no host offers any".into()));
    };
    let vendor = vendor(first)?;
    for (host, offer) in others.iter().enumerate() {
        let other = self::vendor(offer)?;
        if other != vendor {
            return Err(MachineError::Cpuid(format!(
                "host 0 has {vendor}, host {} has {other}; use hosts of one vendor",
                host + 1
            )));
        }
    }
    let mut masked = Vec::new();
    let mut common = Vec::new();
    for leaf in first.iter().filter(|l| !is_hypervisor(l.function)) {
        let mut result = *leaf;
        let mut everywhere = true;
        for (host, offer) in others.iter().enumerate() {
            match offer
                .iter()
                .find(|l| l.function == leaf.function && l.index == leaf.index)
            {
                Some(other) => combine(&mut result, other, host + 1, &mut masked),
                None => {
                    everywhere = false;
                    masked.push(format!(
                        "CPUID {:#x}.{:#x}: host {} has no such leaf",
                        leaf.function,
                        leaf.index,
                        host + 1
                    ));
                }
            }
        }
        if everywhere {
            common.push(result);
        }
    }
    Ok((common, masked))
}

fn combine(result: &mut CpuidLeaf, other: &CpuidLeaf, host: usize, masked: &mut Vec<String>) {
    let rules = rule(result.function, result.index);
    let theirs = [other.eax, other.ebx, other.ecx, other.edx];
    let ours = [&mut result.eax, &mut result.ebx, &mut result.ecx, &mut result.edx];
    let names = ["EAX", "EBX", "ECX", "EDX"];
    for (((ours, theirs), rule), name) in ours.into_iter().zip(theirs).zip(rules).zip(names) {
        let combined = match rule {
            And => *ours & theirs,
            Min => (*ours).min(theirs),
            First => *ours,
        };
        if combined != *ours && rule == And {
            masked.push(format!(
                "CPUID {:#x}.{:#x} {name}: host {host} lacks bits {:#x}",
                result.function,
                result.index,
                *ours & !theirs
            ));
        }
        *ours = combined;
    }
    if result.function == 0x8000_0008 {
        let byte = |shift: u32| (result.eax >> shift & 0xff).min(other.eax >> shift & 0xff) << shift;
        result.eax = byte(0) | byte(8) | byte(16);
    }
}

fn vendor(leaves: &[CpuidLeaf]) -> Result<String, MachineError> {
    let leaf = leaves
        .iter()
        .find(|l| l.function == 0)
        .ok_or_else(|| MachineError::Cpuid("a host's offer has no leaf 0".into()))?;
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
        .iter()
        .flat_map(|r| r.to_le_bytes())
        .collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::cpuid::leaf;

    fn offer(vendor: &[u8; 4], features: u32, width: u32) -> Vec<CpuidLeaf> {
        vec![
            leaf(0, 0, [0xd, u32::from_le_bytes(*vendor), 0, 0]),
            leaf(1, 0, [7, 7, features, !0]),
            leaf(0x4000_0001, 0, [!0; 4]),
            leaf(0x8000_0008, 0, [width, 0, 0, 0]),
        ]
    }

    #[test]
    fn features_are_those_of_all_and_differences_are_said() {
        let (common, masked) =
            common_subset(&[offer(b"Auth", 0b1110, 0x3030), offer(b"Auth", 0b0111, 0x392e)]).unwrap();
        assert_eq!(common[1].ecx, 0b0110);
        assert_eq!(common.last().unwrap().eax, 0x302e);
        assert_eq!(masked, ["CPUID 0x1.0x0 ECX: host 1 lacks bits 0x8"]);
        assert!(common.iter().all(|l| l.function != 0x4000_0001));
    }

    #[test]
    fn a_leaf_one_host_lacks_is_dropped() {
        let mut short = offer(b"Auth", 1, 0x3030);
        short.pop();
        let (common, masked) = common_subset(&[offer(b"Auth", 1, 0x3030), short]).unwrap();
        assert!(common.iter().all(|l| l.function != 0x8000_0008));
        assert_eq!(masked.len(), 1);
    }

    #[test]
    fn vendors_do_not_mix() {
        let error = common_subset(&[offer(b"Auth", 1, 0), offer(b"Genu", 1, 0)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("one vendor"), "{error}");
        assert!(common_subset(&[]).is_err());
        assert!(common_subset(&[vec![]]).is_err());
    }
}
