//! A deterministic simulator of many nodes: the engines that ship, under random loads, delays and losses.
//! A run is given by its seed; `KRG_SIM_SEED=n` runs that one again and tells every event.

mod counters;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use fastrand::Rng;
use krg_dsm::protocol::Bug;
use world::{Figures, Plan, World};

/// Runs in one test.
const RUNS: u64 = 1500;

/// Some machine with some load.
fn plan(seed: u64, losses: bool) -> Plan {
    let mut rng = Rng::with_seed(seed ^ 0x5151_5151);
    let nodes = if rng.u8(..8) == 0 { rng.usize(8..24) } else { rng.usize(2..8) };
    Plan {
        nodes,
        pages: rng.u32(1..6),
        cpus: rng.usize(1..3),
        operations: rng.u32(10..60),
        stores: rng.u8(5..60),
        losses: if losses { rng.usize(1..3) } else { 0 },
        zero_group: 1 << rng.u32(..4),
        zero_block: 1 << rng.u32(..4),
        bug: None,
        seed,
        told: false,
    }
}

fn run(plan: Plan) -> Result<Figures, String> {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(plan);
        world.run();
        world.figures
    }));
    ran.map_err(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(what), _) => what.clone(),
        (_, what) => what.copied().unwrap_or("a panic").to_string(),
    })
}

/// Runs thousands of plans, or the one that is asked for.
fn all_hold(name: &str, losses: bool) {
    if let Some(seed) = std::env::var("KRG_SIM_SEED").ok().map(|seed| seed.parse().expect("KRG_SIM_SEED is a number")) {
        let plan = Plan { told: true, ..plan(seed, losses) };
        println!("{name}: {plan:?}");
        println!("{name}: {:?}", run(plan).expect("the run holds"));
        return;
    }
    let mut sum = Figures::default();
    for seed in 0..RUNS {
        let figures = run(plan(seed, losses)).unwrap_or_else(|what| {
            panic!("{name}: {what}\nseed {seed}, again by KRG_SIM_SEED={seed}: {:?}", plan(seed, losses));
        });
        sum.faults += figures.faults;
        sum.messages += figures.messages;
        sum.failed += figures.failed;
        sum.blocks += figures.blocks;
        sum.chain = sum.chain.max(figures.chain);
    }
    println!("{name}: {RUNS} runs, {} faults, {} messages, {} blocks, {} failed", sum.faults, sum.messages, sum.blocks, sum.failed);
    assert!(sum.faults > 100 * RUNS, "the load does nothing");
    assert!(sum.blocks > 50, "blocks stay where they are");
    assert_eq!(sum.failed > 0, losses);
    assert!(losses || sum.chain == 3, "{} messages on the critical path of a fault", sum.chain);
}

#[test]
fn every_load_returns_what_was_stored_last() {
    all_hold("no loss", false);
}

#[test]
fn nobody_waits_for_nodes_that_are_lost() {
    all_hold("losses", true);
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..20 {
        let (one, other) = (run(plan(seed, true)), run(plan(seed, true)));
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
    }
}

#[test]
fn planted_bugs_are_found() {
    let bugs = [
        (Bug::AckBeforeInvalidate, false),
        (Bug::SendBeforeFreeze, false),
        (Bug::DoneNotAwaited, false),
        (Bug::KeepWhileUpgrading, false),
        (Bug::AwaitLostSharer, true),
        (Bug::BlockBeforeFreeze, false),
        (Bug::EarlyForgotten, false),
        (Bug::BlockDespiteReaders, false),
        (Bug::GivenDespiteReaders, false),
    ];
    for (bug, losses) in bugs {
        let found = (0..RUNS).find_map(|seed| {
            let ran = run(Plan { bug: Some(bug), ..plan(seed, losses) });
            ran.err().map(|what| (seed, what))
        });
        let (seed, what) = found.unwrap_or_else(|| panic!("{bug:?} was not found in {RUNS} runs"));
        println!("{bug:?}: found by seed {seed}: {what}");
    }
}
