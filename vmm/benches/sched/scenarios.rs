//! Loads that a scheduler has to find a good place for.

use std::thread;
use std::time::Duration;

use anyhow::bail;
use krg_guest_kernel::micro::boot::{Begin, DATA};
use krg_guest_kernel::micro::load::{Phase, Work};
use serde_json::json;

use super::Bench;
use super::figures::{Beside, Figure};
use super::machine::{Machine, tsc_hz};

/// The policy that is measured, and the one it is measured beside.
const POLICY: &str = "affinity";
const RIVAL: &str = "static";
/// A pair has to be together by then.
const BAR_TOGETHER: f64 = 2000.0;
/// Times a load is given to settle in.
const SETTLE: Duration = Duration::from_secs(1);
/// Pages that vCPUs share, each in a 2 MiB block of its own.
const BLOCK: u64 = 2 << 20;

fn forever(work: Work) -> (Begin, Vec<Phase>) {
    (Begin::Now, vec![Phase { work, until: u64::MAX }])
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn together(machine: &Machine, a: usize, b: usize) -> anyhow::Result<bool> {
    let places = machine.places()?;
    Ok(places[a] == places[b])
}

/// Two vCPUs that write to one page in turn: pinned apart, then as the scheduler likes.
pub fn pair(bench: &Bench) -> anyhow::Result<()> {
    bench.figures.section("Two vCPUs write to one page in turn");
    let turns = |odd| forever(Work::Turns { word: DATA + BLOCK, odd });
    let machine = Machine::start(&[turns(false), turns(true)])?;
    let (mut times, mut apart, mut close) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        // A policy that starts anew has to find out anew.
        machine.policy(RIVAL)?;
        for vcpu in 0..2 {
            machine.pin(vcpu, Some(vcpu))?;
        }
        thread::sleep(SETTLE);
        apart.push(machine.rate(&[0, 1], bench.time)?);
        for vcpu in 0..2 {
            machine.pin(vcpu, None)?;
        }
        machine.policy(POLICY)?;
        times.push(machine.wait("the pair does not come together", |machine| together(machine, 0, 1))?.as_secs_f64() * 1000.0);
        thread::sleep(SETTLE);
        close.push(machine.rate(&[0, 1], bench.time)?);
        if !together(&machine, 0, 1)? {
            bail!("the pair did not stay together");
        }
    }
    let longest = times.iter().copied().fold(0.0, f64::max);
    bench.bar("until they are together, mean", mean(&times), "ms", BAR_TOGETHER);
    bench.bar("until they are together, longest", longest, "ms", BAR_TOGETHER);
    bench.rival("turns a second with the scheduler, beside pinned apart", mean(&close), "1/s", mean(&apart));
    Ok(())
}

/// Four vCPUs that need a CPU each, all put on the first of two hosts of two CPUs.
pub fn skew(bench: &Bench) -> anyhow::Result<()> {
    bench.figures.section("Four vCPUs crowd the first of two hosts with two CPUs each");
    let machine = Machine::start(&[const { Work::Count }; 4].map(forever))?;
    machine.migrate(json!("all"), 0)?;
    machine.policy(RIVAL)?;
    thread::sleep(SETTLE);
    let crowded = machine.rate(&[0, 1, 2, 3], bench.time)?;
    machine.policy(POLICY)?;
    let even = |machine: &Machine| Ok(machine.places()?.iter().filter(|node| **node == 0).count() == 2);
    let took = machine.wait("the load does not get even", even)?;
    thread::sleep(SETTLE);
    let (before, spread) = (machine.moves()?, machine.rate(&[0, 1, 2, 3], bench.time)?);
    let demands = machine.demands()?;
    thread::sleep(bench.quiet);
    let later = machine.moves()? - before;
    bench.figures.plain("until two are on each", took.as_secs_f64(), "s");
    bench.figures.floor("highest load of a host, beside the ideal", demands[0].max(demands[1]), "CPUs", (demands[0] + demands[1]) / 2.0);
    bench.figures.plain("moves", before as f64, "");
    bench.figures.plain(&format!("moves in the {} s after", bench.quiet.as_secs()), later as f64, "");
    // Both hosts are this one: what can be seen is whether moving them costs anything.
    bench.rival("rounds a second afterwards, beside crowded", spread, "1/s", crowded);
    Ok(())
}

/// A vCPU writes to a page in turn with its neighbour, later with one on the other host; who has no partner halts.
pub fn phases(bench: &Bench) -> anyhow::Result<()> {
    bench.figures.section("A vCPU that takes turns changes its partner: from its neighbour to one on the other host");
    let change = tsc_hz()? * bench.change.as_secs();
    let turns = |page: u64, odd| Work::Turns { word: DATA + BLOCK * page, odd };
    let load = |first, then| (Begin::Now, vec![Phase { work: first, until: change }, Phase { work: then, until: u64::MAX }]);
    let late = (Begin::At(change), vec![Phase { work: turns(2, true), until: u64::MAX }]);
    let start = |policy: &str| -> anyhow::Result<Machine> {
        let machine = Machine::start(&[load(turns(1, false), turns(2, false)), load(turns(1, true), Work::Halt), late.clone()])?;
        if machine.places()? != [0, 0, 1] {
            bail!("the vCPUs are not where they are expected");
        }
        machine.policy(policy)?;
        machine.wait("the partners don't change", |machine| Ok(machine.phases(0) == 2 && machine.phases(2) == 1))?;
        Ok(machine)
    };
    let turns = |machine: &Machine| machine.rate(&[0, 2], bench.time);
    let machine = start(POLICY)?;
    let early = machine.moves()?;
    let took = machine.wait("the new partners don't come together", |machine| together(machine, 0, 2))?;
    thread::sleep(SETTLE);
    let moves = machine.moves()? - early;
    let follows = turns(&machine)?;
    thread::sleep(bench.quiet);
    let later = machine.moves()? - early - moves;
    drop(machine);
    let machine = start(RIVAL)?;
    thread::sleep(SETTLE);
    let stays = turns(&machine)?;
    bench.figures.plain("moves before the change", early as f64, "");
    bench.figures.plain("until the new partners are together", took.as_secs_f64(), "s");
    bench.figures.plain("moves for it", moves as f64, "");
    bench.figures.plain(&format!("moves in the {} s after", bench.quiet.as_secs()), later as f64, "");
    bench.rival("turns a second afterwards, beside nobody moving", follows, "1/s", stays);
    Ok(())
}

/// Two vCPUs that share nothing, one on each host: the scheduler has nothing to do and must cost nothing.
pub fn apart(bench: &Bench) -> anyhow::Result<()> {
    bench.figures.section("Two vCPUs share nothing, one on each host");
    let machine = Machine::start(&[const { Work::Count }; 2].map(forever))?;
    let (mut on, mut off) = (Vec::new(), Vec::new());
    // In turns, since this host is not equally fast all the time.
    for round in 0..4 * bench.rounds {
        let order = if round % 2 == 0 { [POLICY, RIVAL] } else { [RIVAL, POLICY] };
        for policy in order {
            machine.policy(policy)?;
            let rate = machine.rate(&[0, 1], bench.time)?;
            if policy == POLICY { on.push(rate) } else { off.push(rate) }
        }
    }
    bench.rival("rounds a second with the scheduler, beside static", mean(&on), "1/s", mean(&off));
    bench.figures.plain("moves", machine.moves()? as f64, "");
    Ok(())
}

impl Bench {
    /// Beside what was promised.
    fn bar(&self, name: &str, value: f64, unit: &'static str, bar: f64) {
        self.figures.put(Figure { name: format!("{name}, beside the bar"), value, unit, beside: Beside::Rival(bar) });
    }

    fn rival(&self, name: &str, value: f64, unit: &'static str, rival: f64) {
        self.figures.put(Figure { name: name.into(), value, unit, beside: Beside::Rival(rival) });
    }
}
