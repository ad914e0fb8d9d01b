//! Moves vCPUs to their pages and to each other, as far as there are CPUs.
//!
//! What a placement costs is the CPU time it wastes: vCPUs that wait for pages, vCPUs without a CPU, and,
//! with little weight, uneven loads. A vCPU moves where that cost falls, if it falls by enough to pay for
//! fetching its working set anew.
//!
//! vCPUs on one host cause each other no faults, so what they would cause apart is remembered from when they
//! were: a memory that fades only while they are apart. What begins is believed little by little: two vCPUs that spin on
//! one page waste so much that a moment of it is reason enough where CPUs are free, but no burst brings them onto one CPU.
//! A vCPU rests after a move, twice as long after each that took it back to where it had been.

use std::collections::BTreeMap;

use super::{Decision, Policy, Reason, to_pins};
use crate::load::Load;

/// The least that a move has to bring, in CPUs.
const LEAST_GAIN: f64 = 0.05;
/// Fetching the working set may take what the move brings in so many seconds.
const PAYS_IN: f64 = 10.0;
/// Milliseconds a vCPU stays where it has come to, at first and at most.
const REST: u64 = 5_000;
const LONGEST_REST: u64 = 300_000;
/// A move back to the host it left, within this many milliseconds after its rest, is one to and fro.
const TO_AND_FRO: u64 = 120_000;
/// One in so many vCPUs moves at a time, and always one.
const AT_ONCE: usize = 16;
/// Half of what was seen of a fight that is over is forgotten after so many milliseconds apart.
const HALF_LIFE: f64 = 10_000.0;
/// Half of what begins is believed after so many milliseconds, and the first load is taken for so long.
const BELIEVED: f64 = 3_000.0;
const FIRST: f64 = 1_000.0;
/// Fights of fewer faults a second are forgotten.
const FORGOTTEN: f64 = 1.0;
/// Weights of uneven loads beside time that is lost: where CPUs are left, and where there are none.
const UNEVEN: f64 = 0.06;
const CROWDED: f64 = 0.2;

/// What a fault in a fight costs, in times of the wait for the page: the vCPU that lost it waits for its turn
/// meanwhile, and threads of both hosts wake up for it. Measured: two vCPUs that spin and write in turns need 0.8 ms a
/// turn where a fault takes 0.18 ms, both all the time.
const HANDOVER: f64 = 6.0;

/// What is known of one vCPU.
#[derive(Clone, Debug, Default)]
struct Past {
    moved: Option<u64>,
    left: Option<usize>,
    rest: u64,
    /// Faults a second on pages that each host had, as last seen from elsewhere.
    fetches: BTreeMap<usize, f64>,
}

/// The default policy; see the module.
#[derive(Clone, Debug, Default)]
pub struct Affinity {
    past: Vec<Past>,
    /// Faults a second of pairs of vCPUs, as last seen while they were apart.
    fights: BTreeMap<(u32, u32), f64>,
    last: Option<u64>,
}

/// A measurement as moves decided from it would change it.
struct Plan<'a> {
    load: &'a Load,
    hosts: Vec<usize>,
    demands: Vec<f64>,
    /// Of every vCPU: whom it fights, and how often.
    partners: Vec<Vec<(u32, f64)>>,
}

/// A move and what it brings.
struct Move {
    vcpu: u32,
    to: usize,
    gain: f64,
}

impl Plan<'_> {
    /// CPU time lost on a host with this demand, and a little for being loaded at all.
    fn cost(&self, host: usize, demand: f64) -> f64 {
        let cpus = f64::from(self.load.hosts[host].cpus);
        let without = (demand - cpus).max(0.0);
        without + CROWDED * without * without / cpus + UNEVEN * demand * demand / cpus
    }

    /// CPU time a second that would be lost to faults on pages on `host` if `vcpu` were elsewhere; a fetch takes
    /// `fetch` seconds. While one side of a fight waits for a page the other waits for its turn, which looks like work
    /// if it spins: a fight costs both.
    fn ties(&self, vcpu: u32, host: usize, fetch: f64, past: &Past) -> f64 {
        let of = &self.partners[vcpu as usize];
        let fights: f64 = of.iter().filter(|(other, _)| self.hosts[*other as usize] == host).map(|(_, rate)| rate).sum();
        let fetches = past.fetches.get(&host).copied().unwrap_or(0.0);
        // Who waits all the time loses no more than that; both sides of a fight may.
        (fights * fetch * HANDOVER).max(fetches * fetch).min(2.0)
    }

    fn gain(&self, vcpu: u32, to: usize, past: &Past) -> f64 {
        let (v, from) = (&self.load.vcpus[vcpu as usize], self.hosts[vcpu as usize]);
        let fetch = self.load.hosts[from].fetch_us.max(self.load.hosts[to].fetch_us) / 1e6;
        let demand = v.demand();
        let before = self.cost(from, self.demands[from]) + self.cost(to, self.demands[to]);
        let after = self.cost(from, self.demands[from] - demand) + self.cost(to, self.demands[to] + demand);
        let pages = self.ties(vcpu, to, fetch, past) - self.ties(vcpu, from, fetch, past);
        pages + before - after - v.footprint as f64 * fetch / PAYS_IN
    }

    fn may_go(&self, vcpu: u32, to: usize) -> bool {
        let host = &self.load.hosts[to];
        to != self.hosts[vcpu as usize] && host.online && host.room >= self.load.vcpus[vcpu as usize].footprint
    }

    /// Where a vCPU could go with profit: to its partners, to its pages, to the emptiest host.
    fn best(&self, vcpu: u32, emptiest: Option<usize>, past: &Past) -> Option<Move> {
        let partners = self.partners[vcpu as usize].iter().map(|(other, _)| self.hosts[*other as usize]);
        let pages = self.load.vcpus[vcpu as usize].faults.iter().map(|(host, _)| *host);
        let gains = partners.chain(pages).chain(emptiest).filter(|to| self.may_go(vcpu, *to));
        let moves = gains.map(|to| Move { vcpu, to, gain: self.gain(vcpu, to, past) });
        moves.filter(|m| m.gain >= LEAST_GAIN).max_by(|a, b| a.gain.total_cmp(&b.gain))
    }

    fn emptiest(&self) -> Option<usize> {
        let load = |host: &usize| self.demands[*host] / f64::from(self.load.hosts[*host].cpus);
        (0..self.demands.len()).filter(|host| self.load.hosts[*host].online).min_by(|a, b| load(a).total_cmp(&load(b)))
    }

    fn reason(&self, vcpu: u32, to: usize, gain: f64, past: &Past) -> Reason {
        let from = self.hosts[vcpu as usize];
        let there = self.partners[vcpu as usize].iter().filter(|(other, _)| self.hosts[*other as usize] == to);
        let most = there.max_by(|a, b| a.1.total_cmp(&b.1));
        let load = |host: usize| self.demands[host] / f64::from(self.load.hosts[host].cpus);
        match (most, past.fetches.get(&to)) {
            (Some(&(with, per_second)), _) if per_second > FORGOTTEN => Reason::Together { with, per_second, gain },
            (_, Some(&per_second)) if per_second > FORGOTTEN => Reason::Pages { per_second, gain },
            _ => Reason::Imbalance { from_load: load(from), to_load: load(to) },
        }
    }
}

impl Affinity {
    /// Takes note of who faults on what; what concerns those who are together stays as it was.
    fn learn(&mut self, load: &Load) {
        let passed = self.last.map_or(FIRST, |last| load.at.saturating_sub(last) as f64);
        self.last = Some(load.at);
        self.past.resize_with(load.vcpus.len(), || Past { rest: REST, ..Past::default() });
        let host = |vcpu: u32| load.vcpus.get(vcpu as usize).map(|v| v.host);
        let seen = load.fights.iter().map(|fight| (fight.vcpus, fight.per_second)).collect();
        approach(&mut self.fights, &seen, passed, |(a, b)| host(*a) != host(*b));
        for (past, vcpu) in self.past.iter_mut().zip(&load.vcpus) {
            let seen = vcpu.faults.iter().filter(|(from, _)| *from != vcpu.host).copied().collect();
            approach(&mut past.fetches, &seen, passed, |from| *from != vcpu.host);
        }
    }

    fn rests(&self, vcpu: u32, at: u64) -> bool {
        let past = &self.past[vcpu as usize];
        past.moved.is_some_and(|moved| at < moved.saturating_add(past.rest))
    }

    fn note(&mut self, decision: &Decision, at: u64) {
        let past = &mut self.past[decision.vcpu as usize];
        let soon = past.moved.is_some_and(|moved| at < moved.saturating_add(past.rest + TO_AND_FRO));
        let back = soon && past.left == Some(decision.to);
        past.rest = if back { (past.rest * 2).min(LONGEST_REST) } else { REST };
        (past.moved, past.left) = (Some(at), Some(decision.from));
        if let Reason::Together { with, .. } = decision.reason {
            // What that one fetched from there was this one's: it is no reason to go there now.
            let partner = &mut self.past[with as usize];
            partner.fetches.remove(&decision.from);
            partner.moved = Some(at);
        }
    }
}

/// Takes rates that can be seen now (those of who `are_apart`) nearer to what was seen in the last `passed` milliseconds,
/// and forgets small ones.
fn approach<K: Copy + Ord>(rates: &mut BTreeMap<K, f64>, seen: &BTreeMap<K, f64>, passed: f64, are_apart: impl Fn(&K) -> bool) {
    for key in seen.keys() {
        rates.entry(*key).or_default();
    }
    rates.retain(|key, rate| {
        let seen = seen.get(key).copied().unwrap_or(0.0);
        let half_life = if seen > *rate { BELIEVED } else { HALF_LIFE };
        if are_apart(key) {
            *rate += (seen - *rate) * (1.0 - 0.5_f64.powf(passed / half_life));
        }
        *rate >= FORGOTTEN
    });
}

impl Policy for Affinity {
    fn name(&self) -> &'static str {
        "affinity"
    }

    fn decide(&mut self, load: &Load) -> Vec<Decision> {
        self.learn(load);
        let mut partners = vec![Vec::new(); load.vcpus.len()];
        for ((a, b), rate) in &self.fights {
            partners[*a as usize].push((*b, *rate));
            partners[*b as usize].push((*a, *rate));
        }
        let hosts = load.vcpus.iter().map(|v| v.host).collect();
        let mut plan = Plan { load, hosts, demands: load.demands(), partners };
        let mut decisions = to_pins(load);
        for d in &decisions {
            plan.hosts[d.vcpu as usize] = d.to;
        }
        let emptiest = plan.emptiest();
        let movable = |vcpu: &u32| {
            let v = &load.vcpus[*vcpu as usize];
            v.may_migrate && v.pin.is_none() && !self.rests(*vcpu, load.at)
        };
        let mut moves: Vec<Move> = (0..load.vcpus.len() as u32)
            .filter(movable)
            .filter_map(|vcpu| plan.best(vcpu, emptiest, &self.past[vcpu as usize]))
            .collect();
        // The best first; each is looked at again, as those before it change what it brings.
        moves.sort_by(|a, b| b.gain.total_cmp(&a.gain).then(a.vcpu.cmp(&b.vcpu)));
        let most = decisions.len() + (load.vcpus.len() / AT_ONCE).max(1);
        for Move { vcpu, .. } in moves {
            if decisions.len() >= most {
                break;
            }
            let past = &self.past[vcpu as usize];
            let Some(Move { to, gain, .. }) = plan.best(vcpu, plan.emptiest(), past) else { continue };
            let from = plan.hosts[vcpu as usize];
            let reason = plan.reason(vcpu, to, gain, past);
            let demand = load.vcpus[vcpu as usize].demand();
            plan.demands[from] -= demand;
            plan.demands[to] += demand;
            plan.hosts[vcpu as usize] = to;
            decisions.push(Decision { vcpu, from, to, reason });
        }
        decisions.iter().for_each(|decision| self.note(decision, load.at));
        decisions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Fight, HostLoad, VcpuLoad};

    fn vcpu(host: usize, ran: f64, stalled: f64) -> VcpuLoad {
        VcpuLoad { host, ran, waited: 0.0, stalled, faults: Vec::new(), footprint: 100, pin: None, may_migrate: true }
    }

    fn load(hosts: usize, vcpus: Vec<VcpuLoad>, fights: &[(u32, u32, f64)]) -> Load {
        let host = HostLoad { online: true, cpus: 2, room: 1 << 20, fetch_us: 500.0 };
        let fights = fights.iter().map(|&(a, b, per_second)| Fight { vcpus: (a, b), per_second }).collect();
        Load { at: 0, hosts: vec![host; hosts], vcpus, fights }
    }

    fn moves(decisions: &[Decision]) -> Vec<(u32, usize, usize)> {
        decisions.iter().map(|d| (d.vcpu, d.from, d.to)).collect()
    }

    #[test]
    fn a_pair_that_fights_comes_together_and_stays() {
        let mut policy = Affinity::default();
        let apart = load(2, vec![vcpu(0, 0.1, 0.9), vcpu(1, 0.1, 0.9)], &[(0, 1, 1800.0)]);
        let decisions = policy.decide(&apart);
        assert_eq!(moves(&decisions), [(0, 0, 1)]);
        assert!(matches!(decisions[0].reason, Reason::Together { with: 1, .. }));
        // Together they fault no more; that is no reason to part, for ever.
        for second in 1..600 {
            let together = Load { at: second * 1000, ..load(2, vec![vcpu(1, 1.0, 0.0), vcpu(1, 1.0, 0.0)], &[]) };
            assert_eq!(policy.decide(&together), [], "after {second} s");
        }
    }

    #[test]
    fn a_vcpu_goes_to_the_pages_it_keeps_fetching_if_there_is_room() {
        let mut one = vcpu(0, 0.4, 0.6);
        one.faults = vec![(1, 1200.0)];
        let apart = load(2, vec![one], &[]);
        let decisions = Affinity::default().decide(&apart);
        assert_eq!(moves(&decisions), [(0, 0, 1)]);
        assert!(matches!(decisions[0].reason, Reason::Pages { .. }));
        for closed in [|h: &mut HostLoad| h.online = false, |h: &mut HostLoad| h.room = 99] {
            let mut apart = apart.clone();
            closed(&mut apart.hosts[1]);
            assert_eq!(Affinity::default().decide(&apart), []);
        }
    }

    #[test]
    fn a_large_working_set_is_not_moved_for_little() {
        let mut one = vcpu(0, 0.7, 0.3);
        (one.faults, one.footprint) = (vec![(1, 600.0)], 4000);
        assert_eq!(within_10_s(&load(2, vec![one.clone()], &[])), [(0, 0, 1)]);
        one.footprint = 20_000;
        assert_eq!(within_10_s(&load(2, vec![one], &[])), []);
    }

    #[test]
    fn whom_another_joined_does_not_go_where_that_one_came_from() {
        let (mut policy, mut hosts, mut decided) = (Affinity::default(), [0, 1], Vec::new());
        for n in 0..60 {
            let mut load = Load { at: n * 500, ..single(hosts, 600.0) };
            // Pages of the one that moved stay behind for a while.
            for v in load.vcpus.iter_mut().filter(|_| n < 20) {
                v.faults = vec![(1 - v.host, 300.0)];
            }
            for d in policy.decide(&load) {
                hosts[d.vcpu as usize] = d.to;
                decided.push((n, d.vcpu, d.from, d.to));
            }
        }
        assert_eq!(decided.len(), 1, "{decided:?}");
    }

    /// What a policy decides of a load that stays the same, until it has decided something.
    fn within_10_s(load: &Load) -> Vec<(u32, usize, usize)> {
        let mut policy = Affinity::default();
        let decisions = (0..20).map(|n| policy.decide(&Load { at: n * 500, ..load.clone() }));
        decisions.map(|of| moves(&of)).find(|of| !of.is_empty()).unwrap_or_default()
    }

    /// Two vCPUs on hosts of one CPU each that fight so many times a second.
    fn single(hosts: [usize; 2], per_second: f64) -> Load {
        let apart = hosts[0] != hosts[1];
        let stalled = if apart { (per_second * 0.0005).min(0.9) } else { 0.0 };
        let one = |host| VcpuLoad { waited: if apart { 0.0 } else { 0.5 }, ..vcpu(host, if apart { 1.0 - stalled } else { 0.5 }, stalled) };
        let fights = if apart { vec![(0, 1, per_second)] } else { vec![] };
        let mut load = load(2, hosts.map(one).to_vec(), &fights);
        load.hosts.iter_mut().for_each(|host| host.cpus = 1);
        load
    }

    #[test]
    fn a_burst_brings_nobody_onto_one_cpu_and_a_fight_that_lasts_does() {
        let mut policy = Affinity::default();
        for n in 0..120 {
            let rate = if n % 20 == 1 { 1500.0 } else { 5.0 };
            assert_eq!(policy.decide(&Load { at: n * 500, ..single([0, 1], rate) }), [], "{n}");
        }
        assert_eq!(within_10_s(&single([0, 1], 1500.0)), [(0, 0, 1)]);
    }

    #[test]
    fn no_host_is_crowded_for_a_little_sharing() {
        let full = vec![vcpu(0, 1.0, 0.0), vcpu(0, 1.0, 0.0), vcpu(1, 1.0, 0.0), vcpu(1, 0.9, 0.1)];
        assert_eq!(Affinity::default().decide(&load(2, full, &[(0, 3, 200.0)])), []);
    }

    #[test]
    fn crowded_hosts_are_relieved_until_the_loads_are_even() {
        let mut policy = Affinity::default();
        let mut now = load(4, (0..16).map(|_| vcpu(0, 0.25, 0.0)).collect(), &[]);
        now.vcpus.iter_mut().for_each(|v| v.waited = 0.75);
        for _ in 0..40 {
            for d in policy.decide(&now) {
                now.vcpus[d.vcpu as usize].host = d.to;
            }
            now.at += 1000;
        }
        assert_eq!(now.demands(), [4.0; 4]);
    }

    #[test]
    fn pins_and_capabilities_hold() {
        let mut apart = load(2, vec![vcpu(0, 0.1, 0.9), vcpu(1, 0.1, 0.9)], &[(0, 1, 1800.0)]);
        apart.vcpus[0].pin = Some(0);
        assert_eq!(moves(&Affinity::default().decide(&apart)), [(1, 1, 0)]);
        apart.vcpus[1].may_migrate = false;
        assert_eq!(Affinity::default().decide(&apart), []);
        apart.vcpus[0].pin = Some(1);
        assert_eq!(Affinity::default().decide(&apart)[0].reason, Reason::Pinned);
    }

    #[test]
    fn who_goes_to_and_fro_rests_longer_each_time() {
        let mut policy = Affinity::default();
        let mut now = load(2, vec![vcpu(0, 0.4, 0.6)], &[]);
        let mut times = Vec::new();
        // Wherever it is, its pages are on the other host.
        for tick in 0..600 {
            now.at = tick * 1000;
            now.vcpus[0].faults = vec![(1 - now.vcpus[0].host, 1200.0)];
            policy.past.iter_mut().for_each(|past| past.fetches.clear());
            for d in policy.decide(&now) {
                now.vcpus[0].host = d.to;
                times.push(tick);
            }
        }
        assert!(times.len() <= 8, "{times:?}");
        assert!(times.windows(3).all(|t| t[2] - t[1] >= t[1] - t[0]), "{times:?}");
    }
}
