//! The first decision: which host owns which vCPUs and which guest memory is its NUMA node's.

use serde::{Deserialize, Serialize};

/// Memory and CPU blocks are handed out in this granule (bytes): Linux's memory block size, so
/// that a NUMA node's range can later be removed whole.
pub const MEMORY_GRANULE: u64 = 128 << 20;

/// What one host can give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOffer {
    /// Number of vCPUs it is willing to run.
    pub cpus: u32,
    /// Bytes of guest memory it is willing to hold.
    pub memory: u64,
}

/// What the user asked the machine to be; `None` means "all that the hosts offer".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Total vCPUs.
    pub cpus: Option<u32>,
    /// Total guest memory in bytes.
    pub memory: Option<u64>,
}

/// One host's part of the machine. Hosts are numbered by their place in the placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostShare {
    /// vCPU numbers (also APIC ids) this host owns at boot, ascending.
    pub vcpus: Vec<u32>,
    /// Bytes of guest memory whose home is this host, a multiple of [`MEMORY_GRANULE`]
    /// except on the last host.
    pub memory: u64,
}

/// The whole machine: `hosts[i]` is NUMA node `i`. vCPUs are numbered host by host, and memory
/// is laid out in guest-physical order host by host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// One share a host, in the order of the hosts file.
    pub hosts: Vec<HostShare>,
}

/// Why the request can't be placed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No host was given.
    #[error("no host to place the machine on")]
    NoHost,
    /// Fewer vCPUs than hosts: a host without a CPU would be a NUMA node nobody runs on.
    #[error("{asked} vCPUs over {hosts} hosts: every host needs at least one")]
    TooFewCpus {
        /// vCPUs asked for.
        asked: u32,
        /// Hosts in the file.
        hosts: usize,
    },
    /// More memory than the hosts offer.
    #[error("{asked} MiB of guest memory asked, the hosts offer {offered} MiB")]
    TooLittleMemory {
        /// MiB asked for.
        asked: u64,
        /// MiB offered.
        offered: u64,
    },
    /// Less memory than one granule a host.
    #[error("{asked} MiB of guest memory over {hosts} hosts: each needs at least 128 MiB")]
    MemoryTooSmall {
        /// MiB asked for.
        asked: u64,
        /// Hosts in the file.
        hosts: usize,
    },
}

impl Placement {
    /// Splits the machine over `offers` in proportion to what each host offers.
    ///
    /// # Errors
    /// When there is no host, or the request doesn't fit what is offered.
    pub fn new(offers: &[HostOffer], request: Request) -> Result<Self, PlacementError> {
        let hosts = offers.len();
        if hosts == 0 {
            return Err(PlacementError::NoHost);
        }
        let offered_cpus: u32 = offers.iter().map(|o| o.cpus).sum();
        let cpus = request.cpus.unwrap_or(offered_cpus);
        if (cpus as usize) < hosts {
            return Err(PlacementError::TooFewCpus { asked: cpus, hosts });
        }
        let rounded: Vec<u64> = offers.iter().map(|o| o.memory / MEMORY_GRANULE * MEMORY_GRANULE).collect();
        let offered: u64 = rounded.iter().sum();
        let memory = request.memory.unwrap_or(offered) & !0xfff;
        if memory > offers.iter().map(|o| o.memory).sum() {
            return Err(PlacementError::TooLittleMemory { asked: memory >> 20, offered: offered >> 20 });
        }
        if memory < MEMORY_GRANULE * hosts as u64 {
            return Err(PlacementError::MemoryTooSmall { asked: memory >> 20, hosts });
        }
        let cpu_counts = proportional(u64::from(cpus), 1, &offers.iter().map(|o| u64::from(o.cpus.max(1))).collect::<Vec<_>>());
        let sizes = proportional(memory, MEMORY_GRANULE, &rounded);
        let mut next = 0;
        let hosts = cpu_counts
            .into_iter()
            .zip(sizes)
            .map(|(count, memory)| {
                let first = next;
                next += count as u32;
                HostShare { vcpus: (first..next).collect(), memory }
            })
            .collect();
        Ok(Placement { hosts })
    }

    /// Total vCPUs.
    pub fn cpus(&self) -> u32 {
        self.hosts.iter().map(|h| h.vcpus.len() as u32).sum()
    }

    /// Total guest memory in bytes.
    pub fn memory(&self) -> u64 {
        self.hosts.iter().map(|h| h.memory).sum()
    }

    /// The host that owns `vcpu` at boot.
    pub fn owner(&self, vcpu: u32) -> Option<usize> {
        self.hosts.iter().position(|h| h.vcpus.contains(&vcpu))
    }
}

/// Splits `total` by `weights` into multiples of `granule`, at least one granule each; what is
/// left over (less than a granule) goes to the last.
fn proportional(total: u64, granule: u64, weights: &[u64]) -> Vec<u64> {
    let units = total / granule;
    let n = weights.len() as u64;
    let sum: u64 = weights.iter().sum::<u64>().max(1);
    let spare = units - n;
    let mut parts: Vec<u64> = weights.iter().map(|w| 1 + spare * w / sum).collect();
    let mut left = units - parts.iter().sum::<u64>();
    for part in parts.iter_mut() {
        if left == 0 {
            break;
        }
        *part += 1;
        left -= 1;
    }
    let mut sizes: Vec<u64> = parts.into_iter().map(|p| p * granule).collect();
    *sizes.last_mut().expect("weights is not empty") += total % granule;
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(cpus: u32, mib: u64) -> HostOffer {
        HostOffer { cpus, memory: mib << 20 }
    }

    #[test]
    fn two_equal_hosts_share_evenly() {
        let p = Placement::new(&[offer(2, 512), offer(2, 512)], Request::default()).unwrap();
        assert_eq!(p.hosts[0].vcpus, [0, 1]);
        assert_eq!(p.hosts[1].vcpus, [2, 3]);
        assert_eq!((p.hosts[0].memory, p.hosts[1].memory), (512 << 20, 512 << 20));
        assert_eq!((p.owner(1), p.owner(2), p.owner(4)), (Some(0), Some(1), None));
    }

    #[test]
    fn every_host_gets_a_cpu_and_all_memory_is_placed() {
        let p = Placement::new(&[offer(8, 4096), offer(1, 256)], Request { cpus: Some(2), memory: Some(1000 << 20) }).unwrap();
        assert_eq!(p.hosts.iter().map(|h| h.vcpus.len()).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(p.memory(), 1000 << 20);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(Placement::new(&[], Request::default()), Err(PlacementError::NoHost));
        let two = [offer(1, 256), offer(1, 256)];
        assert!(matches!(Placement::new(&two, Request { cpus: Some(1), memory: None }), Err(PlacementError::TooFewCpus { .. })));
        assert!(matches!(Placement::new(&two, Request { cpus: None, memory: Some(1 << 40) }), Err(PlacementError::TooLittleMemory { .. })));
        assert!(matches!(Placement::new(&two, Request { cpus: None, memory: Some(1 << 20) }), Err(PlacementError::MemoryTooSmall { .. })));
    }
}
