//! From the hosts' offers to the machine: what each host gives, and whether that can work.

use krg_scheduler::{HostOffer, Placement, PlacementError, Request};

use super::hosts::HostLine;
use super::offer::Offer;
use super::size;

/// Of the memory a host could give without swapping, this part is the guest's unless its line
/// says `mem=`; the rest is for the host and for the copies of other hosts' pages.
const SHARE: (u64, u64) = (3, 4);

/// Of what is left then, this part is for copies of other hosts' pages unless its line says `cache=`.
const CACHE: (u64, u64) = (3, 4);
/// The least room for copies; with less, hosts only pass pages to and fro.
const LEAST_CACHE: u64 = 8 << 20;

/// One host that takes part.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its line.
    pub line: HostLine,
    /// What its node offers.
    pub offer: Offer,
}

/// Why the hosts can't run the machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A host lacks something.
    #[error("host {host}: {reason}")]
    Unfit {
        /// The host.
        host: String,
        /// One line: what and what to do.
        reason: String,
    },
    /// A host has less memory than its line or its share of the machine needs.
    #[error("host {host}: {needed} of guest memory needed, {available} available: lower --memory or mem=")]
    Memory {
        /// The host.
        host: String,
        /// What it would have to hold.
        needed: String,
        /// What it has.
        available: String,
    },
    /// Processors of different makers.
    #[error("host {host} has a {vendor} processor, host {first} a {first_vendor} one: a machine needs one maker")]
    Vendor {
        /// The host.
        host: String,
        /// Its vendor.
        vendor: String,
        /// Another host.
        first: String,
        /// That host's vendor.
        first_vendor: String,
    },
    /// More vCPUs than a host's KVM can hold; every host creates all.
    #[error("host {host}: its KVM can have {possible} vCPUs, the machine has {asked}: lower --cpus")]
    TooManyCpus {
        /// The host.
        host: String,
        /// KVM_CAP_MAX_VCPUS.
        possible: u32,
        /// vCPUs of the machine.
        asked: u32,
    },
    /// The request doesn't fit what is offered.
    #[error("{0}")]
    Placement(#[from] PlacementError),
}

/// Places a machine of `request` on `hosts`; `hosts[0]` is node 0.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(hosts: &[Candidate], request: Request) -> Result<Placement, PlanError> {
    check_fitness(hosts)?;
    let offers = hosts
        .iter()
        .map(|host| share_of(host, hosts))
        .collect::<Result<Vec<_>, _>>()?;
    let placement = Placement::new(&offers, request)?;
    for (host, share) in hosts.iter().zip(&placement.hosts) {
        let (_, on_machine) = neighbours(host, hosts);
        let together: u64 = hosts
            .iter()
            .zip(&placement.hosts)
            .filter(|(other, _)| on_machine && other.offer.boot_id == host.offer.boot_id)
            .map(|(_, share)| share.memory)
            .sum();
        check_memory(host, together.max(share.memory))?;
        if let Ok(kvm) = &host.offer.kvm {
            if placement.cpus() > kvm.max_vcpus {
                let (possible, asked) = (kvm.max_vcpus, placement.cpus());
                return Err(PlanError::TooManyCpus {
                    host: host.line.to_string(),
                    possible,
                    asked,
                });
            }
        }
    }
    Ok(placement)
}

/// CPUs that each host has for vCPUs.
pub fn cpus(hosts: &[Candidate]) -> Vec<u32> {
    hosts.iter().map(|host| cpus_of(host, neighbours(host, hosts).0)).collect()
}

/// Bytes of copies of other hosts' pages that each host may hold.
///
/// # Errors
/// A `cache=` that is too small, or does not fit beside the host's share.
pub fn caches(hosts: &[Candidate], placement: &Placement) -> Result<Vec<u64>, PlanError> {
    let each = hosts.iter().zip(&placement.hosts).map(|(host, share)| {
        let (count, _) = neighbours(host, hosts);
        let rest = (host.offer.memory / count).saturating_sub(share.memory);
        match host.line.cache {
            None => Ok((rest / CACHE.1 * CACHE.0).max(LEAST_CACHE)),
            Some(asked) if asked < LEAST_CACHE => Err(PlanError::Unfit {
                host: host.line.to_string(),
                reason: format!("cache={} is too little; it needs at least {}", size::show(asked), size::show(LEAST_CACHE)),
            }),
            Some(asked) => check_memory(host, share.memory.saturating_add(asked)).map(|()| asked),
        }
    });
    each.collect()
}

fn check_fitness(hosts: &[Candidate]) -> Result<(), PlanError> {
    for host in hosts {
        if let Some(reason) = host.offer.obstacle(hosts.len() == 1) {
            return Err(PlanError::Unfit {
                host: host.line.to_string(),
                reason: reason.into(),
            });
        }
        let (vendor, first_vendor) = (vendor(&host.offer), vendor(&hosts[0].offer));
        if vendor != first_vendor {
            let (host, first) = (host.line.to_string(), hosts[0].line.to_string());
            return Err(PlanError::Vendor {
                host,
                vendor,
                first,
                first_vendor,
            });
        }
    }
    Ok(())
}

/// How many nodes of the cluster are on `host`'s machine, and whether that is more than one.
fn neighbours(host: &Candidate, hosts: &[Candidate]) -> (u64, bool) {
    let id = &host.offer.boot_id;
    let count = hosts
        .iter()
        .filter(|other| !id.is_empty() && other.offer.boot_id == *id)
        .count()
        .max(1);
    (count as u64, count > 1)
}

/// CPUs of a host that is one of `count` on its machine: what its line says, or its part.
fn cpus_of(host: &Candidate, count: u64) -> u32 {
    let part = u32::try_from(count).unwrap_or(u32::MAX);
    host.line.cpus.unwrap_or((host.offer.cpus / part).max(1))
}

/// What `host` puts in: what its line says, or its part of what its machine has.
fn share_of(host: &Candidate, hosts: &[Candidate]) -> Result<HostOffer, PlanError> {
    let (count, _) = neighbours(host, hosts);
    if let Some(asked) = host.line.memory {
        check_memory(host, asked)?;
    }
    Ok(HostOffer {
        cpus: cpus_of(host, count),
        memory: host
            .line
            .memory
            .unwrap_or(host.offer.memory / SHARE.1 * SHARE.0 / count),
    })
}

fn check_memory(host: &Candidate, needed: u64) -> Result<(), PlanError> {
    if needed <= host.offer.memory {
        return Ok(());
    }
    let (needed, available) = (size::show(needed), size::show(host.offer.memory));
    Err(PlanError::Memory {
        host: host.line.to_string(),
        needed,
        available,
    })
}

/// The vendor name in CPUID leaf 0.
fn vendor(offer: &Offer) -> String {
    let leaf = offer
        .kvm
        .as_ref()
        .ok()
        .and_then(|kvm| kvm.cpuid.iter().find(|leaf| leaf.function == 0));
    let Some(leaf) = leaf else { return "unknown".into() };
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    bytes
        .iter()
        .filter(|b| b.is_ascii_graphic())
        .map(|b| char::from(*b))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::hosts::HostsFile;
    use crate::cluster::offer::{KvmInfo, OFFER_VERSION};
    use crate::node::CpuidLeaf;

    fn leaf(name: &[u8; 12]) -> CpuidLeaf {
        let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
        CpuidLeaf {
            function: 0,
            index: 0,
            flags: 0,
            eax: 1,
            ebx: word(0),
            ecx: word(8),
            edx: word(4),
        }
    }

    fn host(line: &str, boot_id: &str, cpus: u32, mib: u64) -> Candidate {
        let kvm = KvmInfo {
            module: "kvm_amd".into(),
            nested_paging: Some(true),
            eptad: None,
            max_vcpus: 16,
            tsc_khz: 1,
            cpuid: vec![leaf(b"AuthenticAMD")],
        };
        let offer = Offer {
            version: OFFER_VERSION,
            software: "1".into(),
            kernel: "6.1".into(),
            boot_id: boot_id.into(),
            cpus,
            memory: mib << 20,
            kvm: Ok(kvm),
            userfaultfd: Ok(()),
            rdma: Ok(Vec::new()),
        };
        Candidate {
            line: HostsFile::parse(line, |_| None).unwrap().hosts.remove(0),
            offer,
        }
    }

    #[test]
    fn two_machines_give_what_they_have() {
        let placement = plan(
            &[host("10.0.0.1", "a", 2, 1024), host("10.0.0.2 cpus=3", "b", 2, 1024)],
            Request::default(),
        );
        let placement = placement.unwrap();
        assert_eq!(placement.cpus(), 5);
        assert_eq!(placement.memory(), (2 * 768) << 20);
    }

    #[test]
    fn what_is_left_is_for_copies() {
        let caches = |lines: [&str; 2]| {
            let hosts = lines.map(|line| host(line, line, 1, 1024));
            caches(&hosts, &plan(&hosts, Request::default()).unwrap())
        };
        assert_eq!(caches(["10.0.0.1", "10.0.0.2 mem=512M"]), Ok(vec![192 << 20, 384 << 20]));
        assert_eq!(caches(["10.0.0.1 cache=16M", "10.0.0.2"]), Ok(vec![16 << 20, 192 << 20]));
        assert_eq!(caches(["10.0.0.1 mem=1G", "10.0.0.2 mem=1G"]), Ok(vec![LEAST_CACHE; 2]));
        assert!(matches!(caches(["10.0.0.1", "10.0.0.2 cache=1M"]), Err(PlanError::Unfit { .. })));
        assert!(matches!(caches(["10.0.0.1 mem=1G", "10.0.0.2 mem=1G cache=16M"]), Err(PlanError::Memory { .. })));
    }

    #[test]
    fn nodes_on_one_machine_share_it() {
        let two = [host("127.0.0.1", "a", 4, 2048), host("127.0.0.1", "a", 4, 2048)];
        let placement = plan(&two, Request::default()).unwrap();
        assert_eq!((placement.cpus(), placement.memory()), (4, 1536 << 20));
        let two = [
            host("127.0.0.1 mem=1536M", "a", 4, 2048),
            host("127.0.0.1 mem=1536M", "a", 4, 2048),
        ];
        let error = plan(&two, Request::default()).unwrap_err().to_string();
        assert_eq!(
            error,
            "host 127.0.0.1: 3 GiB of guest memory needed, 2 GiB available: lower --memory or mem="
        );
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let good = host("10.0.0.1", "a", 2, 1024);
        let mut no_kvm = host("10.0.0.2", "b", 2, 1024);
        no_kvm.offer.kvm = Err("/dev/kvm: ENOENT".into());
        let error = plan(&[good.clone(), no_kvm], Request::default()).unwrap_err();
        assert_eq!(error.to_string(), "host 10.0.0.2: /dev/kvm: ENOENT");
        let mut no_uffd = host("10.0.0.2", "b", 2, 1024);
        no_uffd.offer.userfaultfd = Err("userfaultfd: EPERM".into());
        assert!(matches!(
            plan(&[good.clone(), no_uffd.clone()], Request::default()),
            Err(PlanError::Unfit { .. })
        ));
        assert!(plan(&[no_uffd], Request::default()).is_ok());
        let mut intel = host("10.0.0.2", "b", 2, 1024);
        intel.offer.kvm.as_mut().unwrap().cpuid = vec![leaf(b"GenuineIntel")];
        assert!(matches!(
            plan(&[good.clone(), intel], Request::default()),
            Err(PlanError::Vendor { .. })
        ));
        let little = host("10.0.0.2 mem=4G", "b", 2, 1024);
        assert!(matches!(
            plan(&[good.clone(), little], Request::default()),
            Err(PlanError::Memory { .. })
        ));
        assert!(matches!(
            plan(
                &[good],
                Request {
                    cpus: Some(17),
                    memory: None
                }
            ),
            Err(PlanError::TooManyCpus {
                possible: 16,
                asked: 17,
                ..
            })
        ));
    }
}
