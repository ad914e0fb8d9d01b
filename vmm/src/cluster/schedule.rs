//! The global scheduler of a running machine: measurements of all nodes go in, moves come out.
//!
//! A decision is made when every node has reported since the last one. Nothing is decided while a node is silent,
//! while a move is under way, or about a vCPU that nobody has measured where it is now. Whoever attends the machine
//! carries the moves out and says what came of them.

mod join;
mod log;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use krg_scheduler::{Decision, Load, NAMES, Policy, Record, VcpuLoad, decide, named};
use serde_json::{Value, json};

use super::admin::{Scheduling, no_policy};
use super::api::Failure;
use super::error::FrontError;
use super::vcpus::{Why, Wish, Wishes};
use crate::node::{INTERVAL, MoveAnswer, NodeLoad};

use join::{BadReport, Parts};
use log::Log;

/// What switches the scheduler off.
pub const OFF: &str = "off";
/// A report that is older than this many milliseconds when all others have come is not used.
const STALE: u64 = 3 * INTERVAL.as_millis() as u64;
/// Moves that are remembered.
const REMEMBERED: usize = 64;
/// Of those, how many are shown.
const SHOWN: usize = 16;
/// Milliseconds a vCPU is left alone after a move that failed, at first and at most; twice as long each time.
const PAUSE: u64 = 1_000;
const LONGEST_PAUSE: u64 = 60_000;

/// What the command line says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Name of the policy, or `off`.
    pub policy: String,
    /// File for all decisions with their inputs.
    pub log: Option<PathBuf>,
}

impl Default for Wanted {
    fn default() -> Self {
        Wanted { policy: NAMES[0].into(), log: None }
    }
}

/// The scheduler of one machine; clones are one.
#[derive(Clone)]
pub struct Schedule(Arc<Mutex<Scheduler>>);

/// What came of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    UnderWay,
    Moved,
    /// Why not.
    Failed(String),
}

/// A decision and what came of it.
struct Made {
    at: u64,
    decision: Decision,
    outcome: Outcome,
}

/// After a move that failed.
#[derive(Clone, Copy)]
struct Pause {
    until: u64,
    length: u64,
}

struct Scheduler {
    policy: Box<dyn Policy>,
    off: bool,
    cpus: Vec<u32>,
    wishes: Wishes,
    begun: Instant,
    /// Of each node since the last decision: when it came, and what it says.
    reports: Vec<Option<(u64, NodeLoad)>>,
    /// What was decided from last.
    last: Option<Load>,
    made: VecDeque<Made>,
    under_way: usize,
    pauses: BTreeMap<u32, Pause>,
    decisions: u64,
    moves: u64,
    failures: u64,
    log: Option<Log>,
}

impl Schedule {
    /// For a machine whose nodes have so many CPUs for vCPUs each. `wishes` is looked at before every move.
    ///
    /// # Errors
    /// The log can't be written.
    pub fn new(wanted: &Wanted, cpus: Vec<u32>, wishes: Wishes) -> Result<Self, FrontError> {
        let log = wanted.log.as_deref().map(Log::create).transpose()?;
        let policy = named(&wanted.policy).or_else(|| named(NAMES[0]));
        let off = wanted.policy == OFF;
        let policy = policy.ok_or_else(|| FrontError::System("there is no policy".into()))?;
        Ok(Schedule(Arc::new(Mutex::new(Scheduler {
            policy,
            off,
            reports: vec![None; cpus.len()],
            cpus,
            wishes,
            begun: Instant::now(),
            last: None,
            made: VecDeque::new(),
            under_way: 0,
            pauses: BTreeMap::new(),
            decisions: 0,
            moves: 0,
            failures: 0,
            log,
        }))))
    }

    /// The guest starts, perhaps again: no move is under way. What was learnt of an earlier run stays, as does the
    /// time, so that the log is one.
    pub fn start(&self) {
        let mut scheduler = self.lock();
        scheduler.reports.iter_mut().for_each(|report| *report = None);
        scheduler.pauses.clear();
        scheduler.under_way = 0;
        let left = scheduler.made.iter_mut().filter(|made| made.outcome == Outcome::UnderWay);
        left.for_each(|made| made.outcome = Outcome::Failed("the guest restarted".into()));
    }

    /// A node reported; the moves to make now, if any.
    ///
    /// # Errors
    /// The report can't be true; it is not used.
    pub(super) fn report(&self, node: usize, load: NodeLoad, owners: &[(usize, u64)]) -> Result<Vec<Decision>, BadReport> {
        let mut scheduler = self.lock();
        let at = scheduler.now();
        scheduler.report(node, load, owners, at)
    }

    /// What came of a move that was decided.
    pub(super) fn ended(&self, decision: &Decision, answer: MoveAnswer) {
        let mut scheduler = self.lock();
        let at = scheduler.now();
        scheduler.ended(decision, answer, at);
    }

    fn lock(&self) -> MutexGuard<'_, Scheduler> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scheduler {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    fn report(&mut self, node: usize, load: NodeLoad, owners: &[(usize, u64)], at: u64) -> Result<Vec<Decision>, BadReport> {
        join::check(&load, self.cpus.len(), owners.len())?;
        let place = self.reports.get_mut(node).ok_or(BadReport::Unknown("node"))?;
        // One node has nobody to move to.
        if self.off || self.cpus.len() < 2 {
            return Ok(Vec::new());
        }
        *place = Some((at, load));
        Ok(self.decide(owners, at))
    }

    /// Decides, if all that is needed for it is there.
    fn decide(&mut self, owners: &[(usize, u64)], at: u64) -> Vec<Decision> {
        for report in &mut self.reports {
            if report.as_ref().is_some_and(|(came, _)| came + STALE < at) {
                *report = None;
            }
        }
        let later = self.last.as_ref().is_none_or(|last| last.at < at);
        if self.under_way > 0 || !later || self.reports.iter().any(Option::is_none) {
            return Vec::new();
        }
        let Some(load) = self.join(owners, at) else { return Vec::new() };
        self.reports.iter_mut().for_each(|report| *report = None);
        self.last = Some(load.clone());
        match decide(&mut *self.policy, load) {
            Ok(record) => self.carry_out(record),
            Err(error) => {
                tracing::warn!(%error, "measurements that can't be are not used");
                Vec::new()
            }
        }
    }

    fn join(&self, owners: &[(usize, u64)], at: u64) -> Option<Load> {
        let loads: Vec<&NodeLoad> = self.reports.iter().flatten().map(|(_, load)| load).collect();
        let wish = |vcpu: usize| self.wishes.of(vcpu as u32);
        let wishes: Vec<Wish> = (0..owners.len()).map(wish).collect::<Option<_>>()?;
        let free = |vcpu: u32| self.pauses.get(&vcpu).is_none_or(|pause| pause.until <= at);
        Parts { at, cpus: &self.cpus, loads: &loads, owners, wishes: &wishes, free: &free }.join()
    }

    /// Notes a decision; the moves of it that the user still permits.
    fn carry_out(&mut self, record: Record) -> Vec<Decision> {
        self.decisions += 1;
        if let Some(log) = &mut self.log {
            if let Err(line) = log.write(&record) {
                tracing::error!("{line}: no more decisions are logged");
                self.log = None;
            }
        }
        let permitted = |decision: &Decision| self.wishes.of(decision.vcpu).is_some_and(|wish| wish.permits(decision.to).is_ok());
        let moves: Vec<Decision> = record.decisions.into_iter().filter(permitted).collect();
        for decision in &moves {
            if self.made.len() == REMEMBERED {
                self.made.pop_front();
            }
            self.made.push_back(Made { at: record.load.at, decision: decision.clone(), outcome: Outcome::UnderWay });
        }
        self.under_way += moves.len();
        moves
    }

    fn ended(&mut self, decision: &Decision, answer: MoveAnswer, at: u64) {
        self.under_way = self.under_way.saturating_sub(1);
        let outcome = match answer {
            MoveAnswer::Moved(_) => {
                self.moves += 1;
                self.pauses.remove(&decision.vcpu);
                self.wishes.came(decision.vcpu, Why::Scheduled(decision.why()));
                Outcome::Moved
            }
            // The user, or a pin, was quicker.
            MoveAnswer::AlreadyThere => Outcome::Failed("it was there already".into()),
            other => {
                self.failures += 1;
                let length = self.pauses.get(&decision.vcpu).map_or(PAUSE, |pause| (pause.length * 2).min(LONGEST_PAUSE));
                self.pauses.insert(decision.vcpu, Pause { until: at.saturating_add(length), length });
                Outcome::Failed(why_not(other).into())
            }
        };
        let of_it = |made: &&mut Made| made.outcome == Outcome::UnderWay && made.decision == *decision;
        if let Some(made) = self.made.iter_mut().rev().find(of_it) {
            made.outcome = outcome;
        }
    }

    fn policy_name(&self) -> &'static str {
        if self.off { OFF } else { self.policy.name() }
    }
}

/// Why a move failed, for people.
fn why_not(answer: MoveAnswer) -> &'static str {
    match answer {
        MoveAnswer::Moved(_) | MoveAnswer::AlreadyThere => "it is there",
        MoveAnswer::Busy => "it, or one that its host is starting, waits for its start-up",
        MoveAnswer::NoVcpu => "there is no such vCPU",
        MoveAnswer::NoNode => "there is no such node",
        MoveAnswer::NodeLost => "the node is lost",
        MoveAnswer::OwnerLost => "a node was lost, perhaps with it",
    }
}

impl Made {
    fn json(&self) -> Value {
        let Decision { vcpu, from, to, .. } = self.decision;
        let (outcome, failed) = match &self.outcome {
            Outcome::UnderWay => ("under way", None),
            Outcome::Moved => ("moved", None),
            Outcome::Failed(why) => ("failed", Some(why)),
        };
        json!({"at_ms": self.at, "vcpu": vcpu, "from": from, "to": to, "reason": self.decision.why(), "outcome": outcome,
            "failure": failed})
    }
}

impl Scheduling for Schedule {
    fn show(&self) -> Value {
        let s = self.lock();
        let last: Vec<Value> = s.made.iter().rev().take(SHOWN).map(Made::json).collect();
        json!({"policy": s.policy_name(), "policies": NAMES, "interval_ms": INTERVAL.as_millis() as u64, "at_ms": s.now(),
            "decisions": s.decisions, "moves": s.moves, "failures": s.failures, "last": last,
            "log": s.log.as_ref().map(Log::path)})
    }

    fn set(&self, policy: &str) -> Result<(), Failure> {
        let mut s = self.lock();
        if policy == OFF {
            s.off = true;
            s.reports.iter_mut().for_each(|report| *report = None);
        } else if policy == s.policy.name() {
            s.off = false;
        } else {
            s.policy = named(policy).ok_or_else(|| no_policy(policy))?;
            s.off = false;
        }
        Ok(())
    }

    fn explain(&self, vcpu: u32) -> Value {
        let s = self.lock();
        let moved = s.made.iter().rev().find(|made| made.decision.vcpu == vcpu);
        let Some(load) = s.last.as_ref() else {
            return match s.off {
                true => Value::Null,
                false => json!({"message": "nothing has been decided yet"}),
            };
        };
        let Some(measured) = load.vcpus.get(vcpu as usize) else { return Value::Null };
        let fights = load.fights.iter().filter(|fight| fight.vcpus.0 == vcpu || fight.vcpus.1 == vcpu);
        let fights: Vec<(u32, f64)> =
            fights.map(|f| (if f.vcpus.0 == vcpu { f.vcpus.1 } else { f.vcpus.0 }, f.per_second)).collect();
        let mut message = format!("{}: {}", s.policy_name(), describe(measured, &fights));
        if let Some(moved) = moved {
            let ago = s.now().saturating_sub(moved.at) / 1000;
            let Decision { from, to, .. } = moved.decision;
            message += &match &moved.outcome {
                // Why it is where it is has been said.
                Outcome::Moved if s.wishes.why(vcpu) == Some(Why::Scheduled(moved.decision.why())) => {
                    format!("; moved from node {from} {ago} s ago")
                }
                Outcome::Moved => format!("; moved from node {from} to node {to} {ago} s ago: {}", moved.decision.why()),
                Outcome::UnderWay => format!("; it is moving to node {to}: {}", moved.decision.why()),
                Outcome::Failed(why) => format!("; it was to go to node {to} {ago} s ago: {why}"),
            };
        }
        json!({"message": message, "policy": s.policy_name(), "at_ms": load.at, "load": measured,
            "fights": fights.iter().map(|(with, per_second)| json!({"vcpu": with, "per_second": per_second})).collect::<Vec<_>>(),
            "last_move": moved.map(Made::json)})
    }
}

/// What was measured of a vCPU, for people.
fn describe(measured: &VcpuLoad, fights: &[(u32, f64)]) -> String {
    let percent = |part: f64| (part * 100.0).round();
    let mut text = format!(
        "it last ran {} % of the time, waited {} % for a CPU and {} % for pages",
        percent(measured.ran),
        percent(measured.waited),
        percent(measured.stalled)
    );
    let most = |rates: &[(usize, f64)]| rates.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((node, rate)) = most(&measured.faults).filter(|(_, rate)| *rate >= 1.0) {
        text += &format!(", most of them from node {node} ({rate:.0} a second)");
    }
    if let Some((with, rate)) = fights.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
        text += &format!("; it fights for pages with vCPU {with} ({rate:.0} faults a second)");
    }
    text
}

#[cfg(test)]
mod tests;
