//! A working set that two vCPUs share: on two nodes beside the same two on one.

use super::Bench;
use super::guest::{ARENA, Job, Touch};
use super::node::SHARE;
use super::peer::Request;

/// Pages of the set, a power of two: 16 MiB.
const PAGES: u64 = 4096;
/// How often each vCPU goes through it at a time.
const PASSES: u64 = 1024;
/// Beside what the other measurements use.
const BASE: u64 = SHARE + ARENA + (192 << 20);

/// What both vCPUs do.
struct Load {
    name: &'static str,
    touch: Touch,
}

/// Which vCPUs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Two of the first node.
    OneNode,
    /// One of each.
    TwoNodes,
}

impl Bench {
    /// Pages a second of both together.
    fn both(&mut self, place: Place, touch: Touch, passes: u64) -> anyhow::Result<f64> {
        let job = |start| Job { start, count: passes * PAGES, mask: PAGES - 1, ..Job::forward(touch, BASE, PAGES) };
        let (first, second) = (job(0), job(PAGES / 2));
        let mut pairs = match place {
            Place::OneNode => self.node.run(&[(0, first), (1, second)])?,
            Place::TwoNodes => {
                self.peer.ask(&Request::Run(second))?;
                let mut pairs = self.node.run(&[(0, first)])?;
                pairs.push(self.peer.times()?);
                pairs
            }
        };
        let took = pairs.iter_mut().filter_map(|times| times.pop()).map(|(from, to)| to.saturating_sub(from)).max();
        let us = took.unwrap_or_default() as f64 / self.node.ticks_per_us();
        Ok(2.0 * (passes * PAGES) as f64 / us * 1e6)
    }
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let loads = [
        Load { name: "both read it", touch: Touch::Scan },
        Load { name: "both write to every 512th page of it", touch: Touch::Mixed },
    ];
    bench.figures.section("Two vCPUs share 16 MiB; the floor is both on one node");
    bench.peer.run(Job::forward(Touch::Fill, BASE, PAGES))?;
    for Load { name, touch } in loads {
        let (mut one, mut two) = (0.0, 0.0);
        let (before, messages) = (bench.counters(), bench.traffic().0);
        for _ in 0..bench.rounds {
            for (place, sum) in [(Place::OneNode, &mut one), (Place::TwoNodes, &mut two)] {
                // Whose pages they are from now on is found out first.
                bench.both(place, touch, 2)?;
                *sum += bench.both(place, touch, PASSES)?;
            }
        }
        let (after, messages) = (bench.counters(), bench.traffic().0 - messages);
        let rounds = bench.rounds as f64;
        let figures = &bench.figures;
        figures.floor(name, two / rounds, "pages/s", one / rounds);
        let each = |count: u64| count as f64 / rounds;
        let faults = |c: &krg_dsm::protocol::Counters| c.read_faults + c.write_faults + c.upgrade_faults;
        figures.plain(&format!("{name}: faults"), each(faults(&after) - faults(&before)), "a round");
        figures.plain(&format!("{name}: messages"), each(messages), "a round");
    }
    Ok(())
}
