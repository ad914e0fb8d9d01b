//! From what each node measured to what a policy is given. Pure. Reports come from other hosts: they are checked,
//! and what a node says of vCPUs that it does not run is left out.

use std::collections::{BTreeMap, HashMap};

use krg_scheduler::{Fight, HostLoad, Load, VcpuLoad};

use crate::cluster::vcpus::Wish;
use crate::node::{MOST_PAGES, NodeLoad, VcpuMeasure};

/// Most entries of one page, or sources of one vCPU, that a report may have.
const MOST_ENTRIES: usize = 16;
/// Highest rate a second that can be: nobody faults faster.
const MOST_RATE: f64 = 1e9;
/// Fights of fewer faults a second are none.
const LEAST_RATE: f64 = 1.0;

/// Why a report is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReport {
    /// A time, fraction or rate that can't be.
    #[error("{0} is out of range")]
    Number(&'static str),
    /// A node or vCPU that does not exist, or is named twice.
    #[error("there is no such {0}, or it is named twice")]
    Unknown(&'static str),
    /// More than is asked for.
    #[error("it has too many {0}")]
    Many(&'static str),
}

/// Checks what a node of a machine with so many nodes and vCPUs reported.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(load: &NodeLoad, nodes: usize, vcpus: usize) -> Result<(), BadReport> {
    let number = |what, value: f64, most: f64| if (0.0..=most).contains(&value) { Ok(()) } else { Err(BadReport::Number(what)) };
    let below = |what, value: usize, end: usize| if value < end { Ok(()) } else { Err(BadReport::Unknown(what)) };
    let few = |what, count: usize, most: usize| if count <= most { Ok(()) } else { Err(BadReport::Many(what)) };
    number("the time of a fetch", load.fetch_us, 1e9)?;
    few("vCPUs", load.vcpus.len(), vcpus)?;
    let mut last = None;
    for measured in &load.vcpus {
        below("vCPU", measured.vcpu as usize, vcpus)?;
        if last.replace(measured.vcpu).is_some_and(|last| last >= measured.vcpu) {
            return Err(BadReport::Unknown("vCPU"));
        }
        [measured.ran, measured.waited, measured.stalled].into_iter().try_for_each(|part| number("a vCPU's time", part, 1.0))?;
        few("sources of a vCPU's pages", measured.faults.len(), MOST_ENTRIES)?;
        for (n, (node, rate)) in measured.faults.iter().enumerate() {
            below("node", *node, nodes)?;
            number("a rate of faults", *rate, MOST_RATE)?;
            if measured.faults[..n].iter().any(|(before, _)| before == node) {
                return Err(BadReport::Unknown("node"));
            }
        }
    }
    few("pages", load.pages.len(), MOST_PAGES)?;
    for page in &load.pages {
        few("vCPUs that fetch a page", page.fetches.len(), MOST_ENTRIES)?;
        for (vcpu, node, rate) in &page.fetches {
            below("vCPU", *vcpu as usize, vcpus)?;
            below("node", *node, nodes)?;
            number("a rate of faults", *rate, MOST_RATE)?;
        }
    }
    Ok(())
}

/// What every node reported, and what else a policy has to know.
pub struct Parts<'a> {
    /// Milliseconds since the machine's start.
    pub at: u64,
    /// CPUs that each node has for vCPUs.
    pub cpus: &'a [u32],
    /// Reports by node, checked.
    pub loads: &'a [&'a NodeLoad],
    /// Node and epoch of each vCPU's owner.
    pub owners: &'a [(usize, u64)],
    /// What the user wants of each vCPU.
    pub wishes: &'a [Wish],
    /// Whether each vCPU may move now for all that the scheduler knows.
    pub free: &'a dyn Fn(u32) -> bool,
}

impl Parts<'_> {
    /// The measurement of the whole machine; `None` if some vCPU was measured by nobody: it moves, or has just moved.
    pub fn join(&self) -> Option<Load> {
        let measured = self.owners.iter().enumerate().map(|(vcpu, owner)| self.measure_of(vcpu, *owner));
        let measured: Vec<&VcpuMeasure> = measured.collect::<Option<_>>()?;
        let vcpus = measured.iter().zip(self.owners).zip(self.wishes).map(|((measured, (host, _)), wish)| VcpuLoad {
            host: *host,
            ran: measured.ran,
            waited: measured.waited,
            stalled: measured.stalled,
            faults: measured.faults.clone(),
            footprint: measured.footprint,
            pin: wish.pin.filter(|pin| *pin < self.cpus.len()),
            may_migrate: wish.may_migrate && (self.free)(measured.vcpu),
        });
        let vcpus: Vec<VcpuLoad> = vcpus.collect();
        Some(Load { at: self.at, hosts: self.hosts(), fights: self.fights(), vcpus })
    }

    /// What the owner of a vCPU measured of it, in this stay.
    fn measure_of(&self, vcpu: usize, (owner, epoch): (usize, u64)) -> Option<&VcpuMeasure> {
        let vcpus = &self.loads.get(owner)?.vcpus;
        let place = vcpus.binary_search_by_key(&(vcpu as u32), |measured| measured.vcpu).ok()?;
        Some(&vcpus[place]).filter(|measured| measured.epoch == epoch)
    }

    fn hosts(&self) -> Vec<HostLoad> {
        // A node that has fetched nothing yet would need as long as the others do.
        let known: Vec<f64> = self.loads.iter().map(|load| load.fetch_us).filter(|us| *us > 0.0).collect();
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let host = |(cpus, load): (&u32, &&NodeLoad)| HostLoad {
            online: true,
            cpus: (*cpus).max(1),
            room: load.room,
            fetch_us: if load.fetch_us > 0.0 { load.fetch_us } else { mean },
        };
        self.cpus.iter().zip(self.loads).map(host).collect()
    }

    /// Pairs of vCPUs that take pages from each other: a fetch from a node counts for those vCPUs there that fetch
    /// the same page, each by its part in their fetches.
    fn fights(&self) -> Vec<Fight> {
        let mut pages: HashMap<u64, Vec<(usize, u32, usize, f64)>> = HashMap::new();
        for (node, load) in self.loads.iter().enumerate() {
            for page in &load.pages {
                let own = page.fetches.iter().filter(|(vcpu, _, _)| self.owners[*vcpu as usize].0 == node);
                pages.entry(page.gpa).or_default().extend(own.map(|(vcpu, from, rate)| (node, *vcpu, *from, *rate)));
            }
        }
        let mut pairs: BTreeMap<(u32, u32), f64> = BTreeMap::new();
        for fetches in pages.values() {
            for (_, vcpu, from, rate) in fetches.iter().filter(|(node, _, from, _)| node != from) {
                let there = || fetches.iter().filter(|(at, ..)| at == from);
                let all: f64 = there().map(|(.., rate)| rate).sum();
                for (_, other, _, part) in there().filter(|(_, other, _, part)| other != vcpu && *part > 0.0) {
                    *pairs.entry((*vcpu.min(other), *vcpu.max(other))).or_default() += rate * part / all;
                }
            }
        }
        pairs.retain(|_, rate| *rate >= LEAST_RATE);
        pairs.into_iter().map(|(vcpus, per_second)| Fight { vcpus, per_second }).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::node::{PageFetches, VcpuState};

    pub fn measured(vcpu: u32, ran: f64, stalled: f64) -> VcpuMeasure {
        VcpuMeasure { vcpu, epoch: 0, ran, waited: 0.0, stalled, faults: vec![], footprint: 3, state: VcpuState::Running }
    }

    /// A report with these vCPUs and page fetches: (address, vCPU, node that had it, rate).
    pub fn report(vcpus: Vec<VcpuMeasure>, fetches: &[(u64, u32, usize, f64)]) -> NodeLoad {
        let page = |&(gpa, vcpu, node, rate): &(u64, u32, usize, f64)| PageFetches { gpa, fetches: vec![(vcpu, node, rate)] };
        NodeLoad { fetch_us: 200.0, room: 1000, vcpus, pages: fetches.iter().map(page).collect() }
    }

    const ANY: Wish = Wish { pin: None, may_migrate: true };

    fn join(loads: &[NodeLoad], owners: &[(usize, u64)]) -> Option<Load> {
        let wishes = vec![ANY; owners.len()];
        let loads: Vec<&NodeLoad> = loads.iter().collect();
        let cpus = vec![2; loads.len()];
        Parts { at: 5, cpus: &cpus, loads: &loads, owners, wishes: &wishes, free: &|_| true }.join()
    }

    #[test]
    fn reports_of_all_nodes_make_one_load() {
        let mut two = report(vec![measured(1, 0.1, 0.8)], &[(0x1000, 1, 0, 300.0)]);
        two.fetch_us = 0.0;
        two.vcpus[0].faults = vec![(0, 300.0)];
        let load = join(&[report(vec![measured(0, 0.5, 0.25)], &[(0x1000, 0, 1, 500.0), (0x2000, 0, 1, 9.0)]), two], &[(0, 0), (1, 0)]).unwrap();
        assert_eq!(load.check(), Ok(()));
        assert_eq!(load.fights, [Fight { vcpus: (0, 1), per_second: 800.0 }]);
        assert_eq!((load.vcpus[0].host, load.vcpus[0].stalled, load.vcpus[1].faults.clone()), (0, 0.25, vec![(0, 300.0)]));
        assert_eq!((load.hosts[1].fetch_us, load.hosts[1].cpus, load.at), (200.0, 2, 5));
    }

    #[test]
    fn a_fetch_counts_for_those_who_had_the_page() {
        // Two writers on node 1, one of them three times as busy; a reader on node 2 takes nothing from node 0.
        let loads = [
            report(vec![measured(0, 1.0, 0.0)], &[(0x1000, 0, 1, 100.0)]),
            report(vec![measured(1, 1.0, 0.0), measured(2, 1.0, 0.0)], &[(0x1000, 1, 0, 30.0), (0x1000, 2, 0, 10.0)]),
            report(vec![measured(3, 1.0, 0.0)], &[(0x1000, 3, 1, 40.0)]),
        ];
        let load = join(&loads, &[(0, 0), (1, 0), (1, 0), (2, 0)]).unwrap();
        let fights: Vec<_> = load.fights.iter().map(|fight| (fight.vcpus, fight.per_second)).collect();
        assert_eq!(fights, [((0, 1), 105.0), ((0, 2), 35.0), ((1, 3), 30.0), ((2, 3), 10.0)]);
    }

    #[test]
    fn a_vcpu_that_nobody_measured_makes_no_load() {
        let loads = [report(vec![measured(0, 1.0, 0.0)], &[]), report(vec![measured(1, 1.0, 0.0)], &[])];
        assert!(join(&loads, &[(0, 0), (1, 0)]).is_some());
        assert_eq!(join(&loads, &[(0, 0), (0, 0)]), None, "it is on the other node");
        assert_eq!(join(&loads, &[(0, 0), (1, 1)]), None, "that was an earlier stay");
        assert_eq!(join(&loads[..1], &[(0, 0), (1, 0)]), None, "its node is silent");
        // What a node says of other nodes' vCPUs counts for nothing.
        let both = vec![measured(0, 1.0, 0.0), measured(1, 0.0, 1.0)];
        let load = join(&[report(both, &[(0, 1, 0, 1e6), (0, 0, 1, 1e6)]), loads[1].clone()], &[(0, 0), (1, 0)]).unwrap();
        assert_eq!((load.vcpus[1].ran, load.fights), (1.0, vec![]));
    }

    #[test]
    fn what_the_user_wants_is_in_it() {
        let loads = [report((0..3).map(|vcpu| measured(vcpu, 1.0, 0.0)).collect(), &[])];
        let wishes = [Wish { pin: Some(0), ..ANY }, Wish { may_migrate: false, ..ANY }, Wish { pin: Some(9), ..ANY }];
        let load = Parts { at: 0, cpus: &[1], loads: &[&loads[0]], owners: &[(0, 0); 3], wishes: &wishes, free: &|vcpu| vcpu != 2 }.join();
        let got: Vec<_> = load.unwrap().vcpus.iter().map(|v| (v.pin, v.may_migrate)).collect();
        assert_eq!(got, [(Some(0), true), (None, false), (None, false)]);
    }

    #[test]
    fn what_nodes_report_is_checked() {
        let good = || {
            let mut good = report(vec![measured(0, 1.0, 0.0), measured(1, 0.0, 1.0)], &[(0x1000, 1, 1, 5.0)]);
            good.vcpus[0].faults = vec![(1, 2.0), (0, 3.0)];
            good
        };
        assert_eq!(check(&good(), 2, 2), Ok(()));
        let bad = |change: fn(&mut NodeLoad)| {
            let mut load = good();
            change(&mut load);
            check(&load, 2, 2).unwrap_err()
        };
        for change in [
            (|l| l.fetch_us = f64::NAN) as fn(&mut NodeLoad),
            |l| l.fetch_us = -1.0,
            |l| l.vcpus[1].ran = 1.5,
            |l| l.vcpus[1].waited = f64::INFINITY,
            |l| l.vcpus[1].stalled = -0.1,
            |l| l.vcpus[0].faults[0].1 = f64::NAN,
            |l| l.pages[0].fetches[0].2 = 1e12,
        ] {
            assert!(matches!(bad(change), BadReport::Number(_)));
        }
        for change in [
            (|l| l.vcpus[1].vcpu = 2) as fn(&mut NodeLoad),
            |l| l.vcpus[1].vcpu = 0,
            |l| l.vcpus.swap(0, 1),
            |l| l.vcpus[0].faults[0].0 = 2,
            |l| l.vcpus[0].faults[0].0 = 0,
            |l| l.pages[0].fetches[0].0 = 2,
            |l| l.pages[0].fetches[0].1 = 2,
        ] {
            assert!(matches!(bad(change), BadReport::Unknown(_)));
        }
        for change in [
            (|l| l.vcpus.push(measured(2, 0.0, 0.0))) as fn(&mut NodeLoad),
            |l| l.vcpus[0].faults = (0..=MOST_ENTRIES).map(|node| (node, 0.0)).collect(),
            |l| l.pages = vec![l.pages[0].clone(); MOST_PAGES + 1],
            |l| l.pages[0].fetches = vec![(0, 1, 1.0); MOST_ENTRIES + 1],
        ] {
            assert!(matches!(bad(change), BadReport::Many(_)));
        }
    }
}
