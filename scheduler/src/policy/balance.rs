//! Load balancing as Kerrighed and MOSIX do it: by load alone.

use super::{Decision, Policy, Reason, to_pins};
use crate::load::Load;

/// Hosts' loads may differ by this factor.
const RATIO: f64 = 1.5;
/// Milliseconds between two moves: the first has to show in the loads before the next is decided.
const PAUSE: u64 = 2000;

/// When a host has more than 1.5 times another's work for each CPU, moves the vCPU that evens them out
/// best; one move in 2 s.
#[derive(Clone, Debug, Default)]
pub struct Balance {
    last: Option<u64>,
}

impl Policy for Balance {
    fn name(&self) -> &'static str {
        "balance"
    }

    fn decide(&mut self, load: &Load) -> Vec<Decision> {
        let pins = to_pins(load);
        if !pins.is_empty() {
            self.last = Some(load.at);
            return pins;
        }
        if self.last.is_some_and(|last| load.at < last.saturating_add(PAUSE)) {
            return Vec::new();
        }
        let demands = load.demands();
        let of = |host: usize, demand: f64| demand / f64::from(load.hosts[host].cpus);
        let host_load = |host: usize| of(host, demands[host]);
        let hosts = 0..load.hosts.len();
        let Some(from) = hosts.clone().max_by(|a, b| host_load(*a).total_cmp(&host_load(*b))) else { return Vec::new() };
        let open = hosts.filter(|host| load.hosts[*host].online && *host != from);
        let Some(to) = open.min_by(|a, b| host_load(*a).total_cmp(&host_load(*b))) else { return Vec::new() };
        let (from_load, to_load) = (host_load(from), host_load(to));
        if from_load <= RATIO * to_load {
            return Vec::new();
        }
        // The pair's higher load after the move; it has to be lower than now.
        let after = |vcpu: u32| {
            let demand = load.vcpus[vcpu as usize].demand();
            of(from, demands[from] - demand).max(of(to, demands[to] + demand))
        };
        let may = |vcpu: &u32| {
            let v = &load.vcpus[*vcpu as usize];
            v.host == from && v.may_migrate && v.pin.is_none() && v.demand() > 0.0 && after(*vcpu) < from_load
        };
        let best = (0..load.vcpus.len() as u32).filter(may).min_by(|a, b| after(*a).total_cmp(&after(*b)));
        let Some(vcpu) = best else { return Vec::new() };
        self.last = Some(load.at);
        vec![Decision { vcpu, from, to, reason: Reason::Imbalance { from_load, to_load } }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{HostLoad, VcpuLoad};

    fn load(at: u64, hosts: usize, vcpus: &[(usize, f64)]) -> Load {
        let vcpu = |&(host, ran): &(usize, f64)| VcpuLoad {
            host,
            ran,
            waited: 0.0,
            stalled: 0.0,
            faults: Vec::new(),
            footprint: 0,
            pin: None,
            may_migrate: true,
        };
        let host = HostLoad { online: true, cpus: 2, room: 1 << 20, fetch_us: 100.0 };
        Load { at, hosts: vec![host; hosts], vcpus: vcpus.iter().map(vcpu).collect(), fights: Vec::new() }
    }

    #[test]
    fn the_vcpu_that_evens_it_out_moves_and_then_nobody_for_two_seconds() {
        let mut balance = Balance::default();
        let skewed = load(0, 2, &[(0, 1.0), (0, 0.5), (0, 0.4), (1, 0.1)]);
        let moves = balance.decide(&skewed);
        assert_eq!(moves.iter().map(|d| (d.vcpu, d.from, d.to)).collect::<Vec<_>>(), [(0, 0, 1)]);
        assert_eq!(balance.decide(&Load { at: 1999, ..skewed.clone() }), []);
        assert_eq!(balance.decide(&Load { at: 2000, ..skewed }).len(), 1);
    }

    #[test]
    fn what_would_only_turn_the_imbalance_round_stays() {
        let mut balance = Balance::default();
        assert_eq!(balance.decide(&load(0, 2, &[(0, 1.0)])), [], "the only one");
        assert_eq!(balance.decide(&load(0, 2, &[(0, 1.0), (0, 0.4), (1, 1.0)])), [], "1.4 times");
        assert_eq!(balance.decide(&load(0, 1, &[(0, 1.0), (0, 1.0)])), [], "one host");
        assert_eq!(balance.decide(&load(0, 0, &[])), []);
    }

    #[test]
    fn pins_capabilities_and_hosts_that_are_going_are_respected() {
        let mut balance = Balance::default();
        let mut skewed = load(0, 3, &[(0, 1.0), (0, 1.0), (0, 1.0)]);
        skewed.vcpus[0].pin = Some(0);
        skewed.vcpus[1].may_migrate = false;
        skewed.hosts[1].online = false;
        let moves = balance.decide(&skewed);
        assert_eq!(moves.iter().map(|d| (d.vcpu, d.to)).collect::<Vec<_>>(), [(2, 2)]);
        skewed.vcpus[0].pin = Some(2);
        let moves = Balance::default().decide(&skewed);
        assert_eq!(moves, [Decision { vcpu: 0, from: 0, to: 2, reason: Reason::Pinned }]);
    }
}
