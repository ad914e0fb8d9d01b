//! What is measured of a running machine: the input of a [`crate::Policy`].

use serde::{Deserialize, Serialize};

/// One host at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostLoad {
    /// Whether vCPUs may move to it.
    pub online: bool,
    /// CPUs it has for vCPUs; at least 1.
    pub cpus: u32,
    /// Pages of copies it has room for.
    pub room: u64,
    /// Mean time in microseconds that a vCPU here waits for a page of another host.
    pub fetch_us: f64,
}

/// One vCPU since the measurement before. Fractions are of the time that has passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuLoad {
    /// The host that runs it.
    pub host: usize,
    /// Fraction spent running.
    pub ran: f64,
    /// Fraction it could have run but waited for a CPU: run queue and steal time.
    pub waited: f64,
    /// Fraction it waited for pages of other hosts.
    pub stalled: f64,
    /// Faults a second, by the host that had the page; each host at most once.
    pub faults: Vec<(usize, f64)>,
    /// Pages it would have to fetch if it moved: its working set.
    pub footprint: u64,
    /// The only host it may run on.
    pub pin: Option<usize>,
    /// It may move.
    pub may_migrate: bool,
}

impl VcpuLoad {
    /// The CPUs it would use if nothing held it up: 0 to 1.
    pub fn demand(&self) -> f64 {
        (self.ran + self.waited + self.stalled).clamp(0.0, 1.0)
    }
}

/// Two vCPUs of different hosts that take pages from each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fight {
    /// The vCPUs, the lower number first.
    pub vcpus: (u32, u32),
    /// Faults of both a second on pages the other had had.
    pub per_second: f64,
}

/// A measurement of the whole machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Milliseconds since the machine's start.
    pub at: u64,
    /// All hosts by number.
    pub hosts: Vec<HostLoad>,
    /// All vCPUs by number.
    pub vcpus: Vec<VcpuLoad>,
    /// Who fights for pages.
    pub fights: Vec<Fight>,
}

/// Why a measurement is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLoad {
    /// A vCPU on, pinned to or faulting on a host that does not exist.
    #[error("vCPU {vcpu}: there is no host {host}")]
    Host {
        /// The vCPU.
        vcpu: u32,
        /// The host.
        host: usize,
    },
    /// A fight of vCPUs that don't exist, or of one with itself.
    #[error("there is no pair of vCPUs {0} and {1}")]
    Pair(u32, u32),
    /// A number that is none, or negative.
    #[error("{0} is not a number from 0 up")]
    Number(&'static str),
    /// A host without CPUs.
    #[error("host {0} has no CPUs")]
    NoCpus(usize),
}

impl Load {
    /// Checks what policies rely on: measurements come from other hosts.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), BadLoad> {
        let number = |what, value: f64| if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(BadLoad::Number(what)) };
        for (n, host) in self.hosts.iter().enumerate() {
            number("the time of a fetch", host.fetch_us)?;
            if host.cpus == 0 {
                return Err(BadLoad::NoCpus(n));
            }
        }
        for (vcpu, load) in (0..).zip(&self.vcpus) {
            let named = load.faults.iter().map(|(host, _)| *host).chain(load.pin).chain([load.host]);
            if let Some(host) = named.into_iter().find(|host| *host >= self.hosts.len()) {
                return Err(BadLoad::Host { vcpu, host });
            }
            number("a vCPU's time", load.ran.min(load.waited).min(load.stalled))?;
            number("a vCPU's time", load.ran + load.waited + load.stalled)?;
            load.faults.iter().try_for_each(|(_, rate)| number("a rate of faults", *rate))?;
        }
        for Fight { vcpus: (a, b), per_second } in &self.fights {
            if a >= b || *b as usize >= self.vcpus.len() {
                return Err(BadLoad::Pair(*a, *b));
            }
            number("a rate of faults", *per_second)?;
        }
        Ok(())
    }

    /// The CPUs that vCPUs of each host would use.
    pub fn demands(&self) -> Vec<f64> {
        let mut demands = vec![0.0; self.hosts.len()];
        self.vcpus.iter().for_each(|vcpu| demands[vcpu.host] += vcpu.demand());
        demands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        let host = HostLoad { online: true, cpus: 2, room: 0, fetch_us: 1.0 };
        let vcpu = VcpuLoad {
            host: 1,
            ran: 0.5,
            waited: 0.75,
            stalled: 0.0,
            faults: vec![(0, 10.0)],
            footprint: 0,
            pin: None,
            may_migrate: true,
        };
        let fights = vec![Fight { vcpus: (0, 1), per_second: 1.0 }];
        Load { at: 0, hosts: vec![host.clone(), host], vcpus: vec![vcpu.clone(), vcpu], fights }
    }

    #[test]
    fn demand_is_at_most_one_cpu() {
        assert_eq!(load().check(), Ok(()));
        assert_eq!(load().demands(), [0.0, 2.0]);
    }

    #[test]
    fn what_other_hosts_say_is_checked() {
        let bad = |change: fn(&mut Load)| {
            let mut load = load();
            change(&mut load);
            load.check().unwrap_err()
        };
        assert_eq!(bad(|l| l.vcpus[1].host = 2), BadLoad::Host { vcpu: 1, host: 2 });
        assert_eq!(bad(|l| l.vcpus[0].pin = Some(9)), BadLoad::Host { vcpu: 0, host: 9 });
        assert_eq!(bad(|l| l.vcpus[0].faults[0].0 = 3), BadLoad::Host { vcpu: 0, host: 3 });
        assert_eq!(bad(|l| l.fights[0].vcpus = (1, 1)), BadLoad::Pair(1, 1));
        assert_eq!(bad(|l| l.fights[0].vcpus = (1, 2)), BadLoad::Pair(1, 2));
        assert_eq!(bad(|l| l.hosts[1].cpus = 0), BadLoad::NoCpus(1));
        assert!(matches!(bad(|l| l.vcpus[0].ran = f64::NAN), BadLoad::Number(_)));
        assert!(matches!(bad(|l| l.vcpus[0].stalled = -1.0), BadLoad::Number(_)));
        assert!(matches!(bad(|l| l.fights[0].per_second = f64::INFINITY), BadLoad::Number(_)));
    }
}
