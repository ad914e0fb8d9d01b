//! `ci/bench migrate`: how long a vCPU stands still when it moves, beside what that can't be less than.
//!
//! Two nodes in this process, each with a VM on this machine's KVM, joined by TCP over loopback. A guest's vCPU reads
//! its clock all the time, so it sees the move itself: from the last instruction on one node to the first on the
//! other. Floors are measured in between: the same guest taken from one VM to another of the same memory by nothing but
//! KVM's calls, as it sees it itself, and a round trip of the state's bytes; and, apart, the calls that read and write
//! the state.

mod bare;
#[path = "../dsm/figures.rs"]
#[expect(dead_code, reason = "shared with another benchmark, which has rivals")]
mod figures;
mod floor;
mod guest;
#[path = "../../tests/local_cluster/nodes.rs"]
#[expect(dead_code, reason = "shared with the tests, which look at more")]
mod nodes;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use krg_dsm::node::TABLES_REST;
use krg_vmm::machine::{MoveTimes, Part};
use krg_vmm::ownership::Outcome;
use vm_memory::{Bytes, GuestAddress};

use figures::{Figures, Times};
use guest::{ANSWER, Answer, ORDER};
use nodes::{LOADED, MEMORY, Nodes, Plan, migrate};

#[derive(Parser)]
#[command(name = "ci/bench migrate", about = "Times moves of a vCPU beside their floor")]
struct Options {
    /// One line of JSON a figure
    #[arg(long)]
    json: bool,
    /// Moves that are timed
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(8..))]
    moves: u32,
    /// Pages that the vCPU writes to all the time, for what it fetches in the first 10 ms
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pages: u64,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// After a move, how long faults are counted.
const FIRST: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(30);
const VCPUS: u32 = 2;

/// The measured machine.
struct Measured {
    nodes: Nodes,
    orders: u64,
}

impl Measured {
    fn new() -> anyhow::Result<Self> {
        let micro = guest::build(MEMORY, LOADED, VCPUS as usize)?;
        let plan = Plan { nodes: 2, vcpus: VCPUS, replicate: true, tables_rest: TABLES_REST, cache: u64::MAX, bug: None };
        let nodes = Nodes::new(plan, |memory| {
            for (at, bytes) in &micro.writes {
                memory.write_slice(bytes, GuestAddress(*at)).expect("below the end of memory");
            }
        });
        nodes.set_tsc_offset(0);
        nodes.run_micro(&micro.vcpus);
        Ok(Measured { nodes, orders: 0 })
    }

    /// What the guest saw since the last order; it writes to `pages` pages from now on.
    fn order(&mut self, pages: u64) -> anyhow::Result<Answer> {
        self.orders += 1;
        self.nodes.store(ORDER + 8, pages);
        self.nodes.store(ORDER, self.orders);
        let until = Instant::now() + PATIENCE;
        while self.nodes.word(ANSWER + 16) != self.orders {
            if let Ok(failure) = self.nodes.failures.try_recv() {
                bail!(failure);
            }
            ensure!(Instant::now() < until, "the guest doesn't answer: {}", self.nodes.describe());
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(Answer { longest: self.nodes.word(ANSWER), stood_still: self.nodes.word(ANSWER + 8) })
    }

    /// Moves vCPU 0 and waits until it runs; how long that took for who asked.
    fn go(&self, to: usize) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        match migrate(&self.nodes.machines()[0], 0, to) {
            Ok(Outcome::Moved { .. }) => Ok(begun.elapsed()),
            other => bail!("vCPU 0 to node {to}: {other:?}"),
        }
    }

    fn times(&self, node: usize) -> anyhow::Result<MoveTimes> {
        self.nodes.machines()[node].move_times(0).context("vCPU 0")
    }

    fn faults(&self) -> u64 {
        self.nodes.counters().iter().map(|c| c.read_faults + c.write_faults + c.upgrade_faults).sum()
    }
}

/// The parts of a move, each with the two times it lies between.
const PARTS: [&str; 8] = [
    "stop: asked, until out of KVM_RUN",
    "save: state read and packed, proxy in place",
    "send: until it had come",
    "wake: until the proxy's thread had it",
    "alone: the target's vCPUs out of KVM_RUN",
    "restore: state written",
    "enter: until KVM_RUN",
    "first instruction, as the guest saw it",
];

/// How long each part took, in microseconds; the last is what is left of `downtime`.
fn parts(source: &MoveTimes, target: &MoveTimes, downtime: f64) -> Option<[f64; 8]> {
    let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?).as_secs_f64() * 1e6);
    let mut parts = [
        between(source.at(Part::Asked), source.at(Part::Stopped))?,
        between(source.at(Part::Stopped), source.at(Part::Saved))?,
        between(source.at(Part::Saved), target.at(Part::Came))?,
        between(target.at(Part::Came), target.at(Part::Woken))?,
        between(target.at(Part::Woken), target.at(Part::Alone))?,
        between(target.at(Part::Alone), target.at(Part::Restored))?,
        between(target.at(Part::Restored), target.at(Part::Entered))?,
        0.0,
    ];
    // The guest ran until it was stopped: that part is not of its downtime.
    parts[7] = (downtime - parts[1..7].iter().sum::<f64>()).max(0.0);
    Some(parts)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let figures = Figures::new(options.json);
    let mut machine = Measured::new()?;
    let ticks = f64::from(machine.nodes.machines()[0].tsc_khz()) / 1000.0;
    machine.order(0)?;
    for to in [1, 0, 1, 0] {
        machine.go(to)?;
    }
    let bytes = machine.nodes.largest_state();
    let (mut handover, mut wire) = (bare::Handover::new()?, floor::Wire::new(bytes)?);
    let [mut downtime, mut whole, mut calls, mut trip, mut bare_move, mut least, mut least_calls] = std::array::from_fn(|_| Times::new());
    let mut split: Vec<Times> = PARTS.iter().map(|_| Times::new()).collect();
    for n in 0..options.moves {
        let (from, to) = (n as usize % 2, (n as usize + 1) % 2);
        machine.order(0)?;
        whole.add(machine.go(to)?.as_secs_f64() * 1e6);
        std::thread::sleep(Duration::from_millis(1));
        let stood = machine.order(0)?.longest as f64 / ticks;
        downtime.add(stood);
        if let Some(parts) = parts(&machine.times(from)?, &machine.times(to)?, stood) {
            split.iter_mut().zip(parts).for_each(|(times, us)| times.add(us));
        }
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let (bare_ticks, bare_calls) = handover.go()?;
        let (bare_us, calls_us, trip_us) = (bare_ticks as f64 / ticks, us(bare_calls), us(wire.round_trip()?));
        calls.add(calls_us);
        trip.add(trip_us);
        bare_move.add(bare_us);
        least_calls.add(calls_us + trip_us);
        least.add(bare_us + trip_us);
    }
    figures.section(&format!("a vCPU that moves between two nodes, {} times (floor: a bare move and a round trip)", options.moves));
    figures.times("downtime", &downtime, Some(least.three()));
    figures.floor("downtime beside the state's calls and a round trip, p50", downtime.three()[1], "us", least_calls.three()[1]);
    figures.times("asked until it runs there", &whole, None);
    figures.section("the parts");
    for (name, times) in PARTS.iter().zip(&split) {
        figures.plain(&format!("{name}, p50"), times.three()[1], "us");
    }
    figures.section("the floors");
    figures.plain("a bare move, last to first instruction, p50", bare_move.three()[1], "us");
    figures.plain(&format!("KVM's calls, {} MSRs, p50", handover.msrs()), calls.three()[1], "us");
    figures.plain("round trip of the state, p50", trip.three()[1], "us");
    figures.plain("state", bytes as f64, "bytes");
    first_10_ms(&mut machine, &figures, &options, ticks)
}

/// What a vCPU that writes to some pages waits for them after a move.
fn first_10_ms(machine: &mut Measured, figures: &Figures, options: &Options, ticks: f64) -> anyhow::Result<()> {
    let (mut stood, mut faults) = (Times::new(), 0);
    let rounds = options.moves.div_ceil(4).max(2);
    machine.order(options.pages)?;
    for n in 0..rounds {
        machine.order(options.pages)?;
        std::thread::sleep(FIRST);
        machine.order(options.pages)?;
        let before = machine.faults();
        machine.go((n as usize + 1) % 2)?;
        std::thread::sleep(FIRST);
        faults += machine.faults() - before;
        stood.add(machine.order(options.pages)?.stood_still as f64 / ticks);
    }
    figures.section(&format!("the first 10 ms of a vCPU that writes to {} pages all the time", options.pages));
    figures.times("stood still, the move included", &stood, None);
    figures.plain("faults", faults as f64 / f64::from(rounds), "a move");
    Ok(())
}
