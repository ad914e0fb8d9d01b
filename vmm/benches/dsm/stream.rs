//! Bandwidth of reading and writing another node's memory.

use super::Bench;
use super::figures::Times;
use super::floor::Of;
use super::guest::{ARENA, Job, Touch};
use super::node::SHARE;

/// Read at a time: 32 MiB, and once 128 MiB.
const PAGES: u64 = 8192;
const MANY_PAGES: u64 = 32768;
const STRIDE: u64 = 4;
/// Pages among which there are misses beside a stream: a quarter of them in each round.
const MISSES: u64 = 4096;
/// Pages of which the same are read again.
const AGAIN: u64 = 512;
const BASE: u64 = SHARE + ARENA;

/// Bytes and microseconds, and the rate of each time.
#[derive(Default)]
struct Moved {
    bytes: f64,
    us: f64,
    rates: Vec<f64>,
}

impl Moved {
    fn add(&mut self, pages: u64, us: f64) {
        let bytes = (pages * 4096) as f64;
        self.bytes += bytes;
        self.us += us;
        self.rates.push(bytes / us);
    }

    /// In MB/s.
    fn rate(&self) -> f64 {
        self.bytes / self.us
    }

    /// The median of the times, in MB/s.
    fn median(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or_default()
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

/// One way of going through the pages.
struct Scan {
    name: &'static str,
    job: Job,
    /// Pages from the first to the last.
    pages: u64,
    /// Pages are asked for ahead of need.
    ahead: bool,
    moved: Moved,
    /// As much by the transport alone, right before each time: of memory, and of the same bytes again and again.
    bare: Moved,
    again: Moved,
    faults: u64,
    /// Blocks that came whole.
    blocks: u64,
}

impl Scan {
    fn new(name: &'static str, pages: u64, stride: u64, ahead: bool) -> Self {
        let job = Job::strided(Touch::Scan, BASE, pages / stride, stride);
        Scan { name, job, pages, ahead, moved: Moved::default(), bare: Moved::default(), again: Moved::default(), faults: 0, blocks: 0 }
    }

    fn run(&mut self, bench: &mut Bench) -> anyhow::Result<()> {
        for (of, moved) in [(Of::Memory, &mut self.bare), (Of::Chunk, &mut self.again)] {
            moved.add(self.pages, bench.network.lock().unwrap().stream(self.pages * 4096, of)?.as_secs_f64() * 1e6);
        }
        // The owner writes its pages again, so that it alone has them.
        bench.peer.run(Job::forward(Touch::Fill, BASE, self.pages))?;
        bench.node.dsm.read_ahead(self.ahead);
        let before = bench.counters();
        self.moved.add(self.job.count, bench.took(self.job)?);
        let after = bench.counters();
        bench.node.dsm.read_ahead(true);
        self.faults += after.read_faults + after.write_faults - before.read_faults - before.write_faults;
        self.blocks += after.blocks_in - before.blocks_in;
        Ok(())
    }
}

/// Read misses of vCPU 0 while vCPU 1 reads a long stream, and those before and after it.
fn beside_a_stream(bench: &mut Bench) -> anyhow::Result<()> {
    let (mut alone, mut beside, mut moved) = (Times::new(), Times::new(), Moved::default());
    let scattered = |round: u64| Job::scattered(Touch::Read, BASE + MANY_PAGES * 4096, MISSES, MISSES / 4, round * 977);
    let scan = Job::forward(Touch::Scan, BASE, MANY_PAGES);
    for round in 0..bench.rounds {
        let misses = scattered(round);
        bench.peer.run(Job::forward(Touch::Fill, BASE, MANY_PAGES))?;
        bench.peer.run(Job { touch: Touch::Write, ..misses })?;
        let pairs = bench.node.run(&[(0, misses), (1, scan)])?;
        let ticks = bench.node.ticks_per_us();
        let us = |(from, to): (u64, u64)| to.saturating_sub(from) as f64 / ticks;
        let (from, to) = pairs[1].first().copied().unwrap_or_default();
        moved.add(MANY_PAGES, us((from, to)));
        for touch in &pairs[0] {
            // Who is through while the other reads on, or begins later, has it to itself.
            let times = if touch.0 >= from && touch.1 <= to { &mut beside } else { &mut alone };
            times.add(us(*touch));
        }
        bench.peer.run(Job { touch: Touch::Write, ..misses })?;
        for touch in bench.node.run(&[(0, misses)])?.iter().flatten() {
            alone.add(us(*touch));
        }
    }
    let figures = &bench.figures;
    figures.section("Read misses of one vCPU while another reads 128 MiB; the floor is the same without it");
    figures.times("read miss beside a stream", &beside, Some(alone.three()));
    figures.plain("the stream", moved.rate(), "MB/s");
    Ok(())
}

/// The same scattered pages read again and again, and written by the other node in between.
fn measure_again(bench: &mut Bench) -> anyhow::Result<()> {
    let pages = Job::scattered(Touch::Read, BASE, MANY_PAGES, AGAIN, 0);
    // With what is asked for ahead of need, and without.
    let (mut us, mut faults) = ([0.0; 2], [0; 2]);
    let rounds = bench.rounds.div_ceil(2) * 4;
    for round in 0..2 * rounds {
        bench.peer.run(Job { touch: Touch::Write, ..pages })?;
        let way = (round % 2) as usize;
        bench.node.dsm.read_ahead(way == 0);
        let before = bench.counters();
        let pairs = bench.node.run(&[(0, pages)])?;
        bench.node.dsm.read_ahead(true);
        faults[way] += bench.counters().read_faults - before.read_faults;
        let (from, to) = (pairs[0].first().map_or(0, |pair| pair.0), pairs[0].last().map_or(0, |pair| pair.1));
        us[way] += (to - from) as f64 / bench.node.ticks_per_us();
    }
    let figures = &bench.figures;
    figures.section("The same scattered pages read again, which the other node has written meanwhile; the floor is without prefetch");
    let reads = (rounds * AGAIN) as f64;
    figures.floor("scattered pages again", us[0] / reads, "us a page", us[1] / reads);
    figures.floor("scattered pages again, faults", faults[0] as f64 / reads, "a page", faults[1] as f64 / reads);
    Ok(())
}

/// One way of writing pages of which the guest has no use before.
struct Fresh {
    name: &'static str,
    base: u64,
    ahead: bool,
    moved: Moved,
    faults: u64,
    bytes: u64,
}

impl Fresh {
    fn new(name: &'static str, base: u64, ahead: bool) -> Self {
        Fresh { name, base, ahead, moved: Moved::default(), faults: 0, bytes: 0 }
    }

    fn run(&mut self, bench: &mut Bench) -> anyhow::Result<()> {
        bench.node.dsm.free(self.base, PAGES * 4096);
        bench.node.dsm.read_ahead(self.ahead);
        let (before, bytes) = (bench.counters(), bench.node.dsm.traffic(1).total().bytes_in);
        self.moved.add(PAGES, bench.took(Job::forward(Touch::Fill, self.base, PAGES))?);
        bench.node.dsm.read_ahead(true);
        self.faults += bench.counters().write_faults - before.write_faults;
        self.bytes += bench.node.dsm.traffic(1).total().bytes_in - bytes;
        Ok(())
    }
}

/// Writing to memory of the other node.
fn measure_writes(bench: &mut Bench) -> anyhow::Result<()> {
    let fill = |name, ahead| Scan { job: Job::forward(Touch::Fill, BASE, PAGES), ..Scan::new(name, PAGES, 1, ahead) };
    let mut scans = [fill("written by the other before", true), fill("written by the other before, no prefetch", false)];
    let mut fresh = [
        Fresh::new("never written", BASE, true),
        Fresh::new("never written, no prefetch", BASE, false),
        Fresh::new("the node's own, never written", ARENA, true),
    ];
    let rounds = bench.rounds.div_ceil(2);
    for _ in 0..rounds {
        scans.iter_mut().try_for_each(|scan| scan.run(bench))?;
        fresh.iter_mut().try_for_each(|fresh| fresh.run(bench))?;
    }
    let figures = &bench.figures;
    let transport = bench.transport.name();
    figures.section(&format!("Writing to the other node's memory in order; the floor is as much memory by {transport}, or of the node's own"));
    let pages = (rounds * PAGES) as f64;
    for Scan { name, moved, bare, faults, blocks, .. } in &scans {
        figures.floor(name, moved.rate(), "MB/s", bare.rate());
        figures.floor(&format!("{name}, median"), moved.median(), "MB/s", bare.median());
        figures.plain(&format!("{name}, faults"), *faults as f64 / pages, "a page");
        figures.plain(&format!("{name}, in whole blocks"), *blocks as f64 * 512.0 / pages, "of the pages");
    }
    let own = fresh[2].moved.rate();
    for Fresh { name, base, moved, faults, bytes, .. } in &fresh {
        match *base {
            BASE => figures.floor(name, moved.rate(), "MB/s", own),
            _ => figures.plain(name, moved.rate(), "MB/s"),
        }
        figures.plain(&format!("{name}, faults"), *faults as f64 / pages, "a page");
        figures.plain(&format!("{name}, bytes received"), *bytes as f64 / pages, "a page");
    }
    Ok(())
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let mut scans = [
        Scan::new("sequential", PAGES, 1, true),
        Scan::new("sequential, no prefetch", PAGES, 1, false),
        Scan::new("sequential, 128 MiB", MANY_PAGES, 1, true),
        Scan::new("strided", PAGES, STRIDE, true),
        Scan::new("strided, no prefetch", PAGES, STRIDE, false),
    ];
    let rounds = bench.rounds.div_ceil(2);
    let mut present = Moved::default();
    for _ in 0..rounds {
        let times = bench.faults.run_present(Job::forward(Touch::Scan, ARENA, PAGES))?;
        let (from, to) = times.first().copied().unwrap_or_default();
        present.add(PAGES, (to - from) as f64 / bench.node.ticks_per_us());
        for scan in &mut scans {
            scan.run(bench)?;
        }
    }
    let figures = &bench.figures;
    let transport = bench.transport.name();
    figures.section(&format!("Reading the other node's memory; the floor is as much memory by {transport} alone"));
    figures.plain("guest reading pages that are here", present.rate(), "MB/s");
    for Scan { name, job, moved, bare, again, faults, blocks, .. } in &scans {
        figures.floor(name, moved.rate(), "MB/s", bare.rate());
        figures.floor(&format!("{name}, median"), moved.median(), "MB/s", bare.median());
        figures.plain(&format!("{name}, {transport} with the same 256 KiB"), again.rate(), "MB/s");
        figures.plain(&format!("{name}, faults"), *faults as f64 / (rounds * job.count) as f64, "a page");
        figures.plain(&format!("{name}, in whole blocks"), *blocks as f64 * 512.0 / (rounds * job.count) as f64, "of the pages");
    }
    let (accuracy, counters) = (bench.node.dsm.accuracy(), bench.counters());
    figures.plain("whole blocks asked for", counters.blocks_asked as f64, "blocks");
    figures.plain("of those not given", counters.blocks_refused as f64, "blocks");
    figures.plain("pages asked for ahead of need", counters.prefetches as f64, "pages");
    figures.plain("of those not given", counters.prefetches_refused as f64, "pages");
    figures.plain("of those used", accuracy.used as f64, "pages");
    figures.plain("of those wasted", accuracy.wasted as f64, "pages");
    measure_writes(bench)?;
    measure_again(bench)?;
    match bench.vcpus {
        1 => Ok(()),
        _ => beside_a_stream(bench),
    }
}
