//! `ci/bench sched`: what the scheduler does for vCPUs that share pages, crowd a host or change what they do, and
//! that it costs nothing where there is nothing to do.
//!
//! The program itself with two node processes on this machine, and micro guests that tell their progress. The nodes
//! share this machine's CPUs: with two of those, two vCPUs at a time can really run, wherever they are. So speeds are
//! compared where two vCPUs run (a pair, and two that share nothing); for loads of four, placements are.

#[expect(dead_code, reason = "what other benchmarks print")]
#[path = "../dsm/figures.rs"]
mod figures;
mod machine;
mod scenarios;

use std::time::Duration;

use clap::Parser;

use figures::Figures;

#[derive(Parser)]
#[command(name = "ci/bench sched", about = "What the scheduler does to loads of vCPUs, beside leaving them where they are")]
struct Options {
    /// One line of JSON a figure
    #[arg(long)]
    json: bool,
    /// Times a pair is parted and comes together
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds for which progress is measured at a time
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Seconds after the load is even in which moves are counted
    #[arg(long, default_value_t = 60)]
    quiet: u64,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Two vCPUs that write to one page in turn
    Pair,
    /// Four vCPUs that crowd a host
    Skew,
    /// A vCPU that changes its partner
    Phases,
    /// Two vCPUs that share nothing
    Apart,
}

/// How much is measured, and where it is told.
struct Bench {
    figures: Figures,
    rounds: u32,
    time: Duration,
    quiet: Duration,
    /// Of the guest's time, when partners change.
    change: Duration,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let bench = Bench {
        figures: Figures::new(options.json),
        rounds: options.rounds,
        time: Duration::from_secs(options.seconds),
        quiet: Duration::from_secs(options.quiet),
        change: Duration::from_secs(8),
    };
    let wanted = |part| options.only.is_none_or(|only| only == part);
    if wanted(Part::Pair) {
        scenarios::pair(&bench)?;
    }
    if wanted(Part::Skew) {
        scenarios::skew(&bench)?;
    }
    if wanted(Part::Phases) {
        scenarios::phases(&bench)?;
    }
    if wanted(Part::Apart) {
        scenarios::apart(&bench)?;
    }
    Ok(())
}
