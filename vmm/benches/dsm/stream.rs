//! Bandwidth of reading another node's memory.

use super::Bench;
use super::guest::{ARENA, Job, Touch};
use super::node::SHARE;

/// Read at a time: 32 MiB.
const PAGES: u64 = 8192;
const STRIDE: u64 = 4;
const BASE: u64 = SHARE + ARENA;

/// Bytes and microseconds.
#[derive(Default)]
struct Moved {
    bytes: f64,
    us: f64,
}

impl Moved {
    fn add(&mut self, pages: u64, us: f64) {
        self.bytes += (pages * 4096) as f64;
        self.us += us;
    }

    /// In MB/s.
    fn rate(&self) -> f64 {
        self.bytes / self.us
    }
}

impl Bench {
    /// How long vCPU 0 takes for a job that is timed as a whole.
    fn took(&self, job: Job) -> anyhow::Result<f64> {
        let pairs = self.node.run(&[(0, job)])?;
        let (from, to) = pairs[0].first().copied().unwrap_or_default();
        Ok((to - from) as f64 / self.node.ticks_per_us())
    }
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let (mut bare, mut local) = (Moved::default(), Moved::default());
    let (mut sequential, mut strided) = (Moved::default(), Moved::default());
    let mut faults = [0; 2];
    for _ in 0..bench.rounds.div_ceil(2) {
        bare.add(PAGES, bench.network.stream(PAGES * 4096)?.as_secs_f64() * 1e6);
        bench.peer.run(Job::forward(Touch::Fill, BASE, PAGES))?;
        let misses = |bench: &Bench| bench.counters().read_faults;
        let before = misses(bench);
        sequential.add(PAGES, bench.took(Job::forward(Touch::Scan, BASE, PAGES))?);
        faults[0] += misses(bench) - before;
        // The same again, all of it here now.
        local.add(PAGES, bench.took(Job::forward(Touch::Scan, BASE, PAGES))?);
        bench.peer.run(Job::forward(Touch::Fill, BASE, PAGES))?;
        let before = misses(bench);
        strided.add(
            PAGES / STRIDE,
            bench.took(Job::strided(Touch::Scan, BASE, PAGES / STRIDE, STRIDE))?,
        );
        faults[1] += misses(bench) - before;
    }
    let figures = &bench.figures;
    let rounds = bench.rounds.div_ceil(2) as f64;
    figures.section("Reading 32 MiB of the other node's memory; the floor is what TCP carries");
    figures.plain("bare TCP stream", bare.rate(), "MB/s");
    figures.plain("the same pages again, here", local.rate(), "MB/s");
    figures.floor("sequential", sequential.rate(), "MB/s", bare.rate());
    figures.plain("sequential, faults", faults[0] as f64 / rounds / PAGES as f64, "a page");
    figures.floor("strided", strided.rate(), "MB/s", bare.rate());
    figures.plain(
        "strided, faults",
        faults[1] as f64 / rounds / (PAGES / STRIDE) as f64,
        "a page",
    );
    Ok(())
}
