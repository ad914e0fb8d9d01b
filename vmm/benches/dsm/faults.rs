//! Times of single faults.

use krg_dsm::protocol::Counters;

use super::Bench;
use super::breakdown::Breakdown;
use super::figures::{Beside, Figure, Times};
use super::guest::{ARENA, Job, Touch};
use super::node::{Kind, SHARE};
use super::peer::Request;

/// Pages that take part in one kind of measurement: more than are touched, so that no two touches of
/// a round are neighbours often.
const PAGES: u64 = 4096;
const ARENA_BYTES: u64 = PAGES * 4096;
/// Touches in a round.
const TOUCHES: u64 = 250;
/// Rounds of ping-pong at a time.
const TURNS: u64 = 250;
/// Mean fault of GiantVM over each transport in microseconds: KVM Forum 2025, slides.
fn giantvm(transport: Kind) -> f64 {
    match transport {
        Kind::Tcp => 304.65,
        Kind::Rdma => 10.91,
    }
}

/// Where the `n`th kind's pages are: the second node is their home.
fn arena(n: u64) -> u64 {
    SHARE + ARENA + n * ARENA_BYTES
}

impl Bench {
    /// Adds what a job of vCPU 0 took, touch by touch.
    pub fn add(&self, job: Job, times: &mut Times) -> anyhow::Result<()> {
        self.add_all(&self.node.run(&[(0, job)])?, times);
        Ok(())
    }

    fn add_all(&self, pairs: &[Vec<(u64, u64)>], times: &mut Times) {
        let ticks = self.node.ticks_per_us();
        pairs
            .iter()
            .flatten()
            .for_each(|(from, to)| times.add(to.saturating_sub(*from) as f64 / ticks));
    }

    /// Frames and bytes that went over the wire, in both directions.
    pub fn traffic(&self) -> (u64, u64) {
        let total = self.node.dsm.traffic(1).class(krg_dsm::node::PROTOCOL);
        (total.frames_out + total.frames_in, total.bytes_out + total.bytes_in)
    }

    pub fn counters(&self) -> Counters {
        self.node.dsm.counters().unwrap_or_default().0
    }
}

/// What one kind of fault took and moved.
struct Fault {
    name: &'static str,
    times: Times,
    frames: u64,
    bytes: u64,
    touches: u64,
}

impl Fault {
    fn new(name: &'static str) -> Self {
        Fault {
            name,
            times: Times::new(),
            frames: 0,
            bytes: 0,
            touches: 0,
        }
    }

    fn run(&mut self, bench: &Bench, job: Job) -> anyhow::Result<()> {
        let (frames, bytes) = bench.traffic();
        bench.add(job, &mut self.times)?;
        let now = bench.traffic();
        self.frames += now.0 - frames;
        self.bytes += now.1 - bytes;
        self.touches += job.count;
        Ok(())
    }

    fn put(&self, bench: &Bench, floor: Option<[f64; 3]>) {
        let figures = &bench.figures;
        figures.times(self.name, &self.times, floor);
        figures.plain(
            &format!("{}, messages", self.name),
            self.frames as f64 / self.touches as f64,
            "a fault",
        );
        figures.plain(
            &format!("{}, bytes", self.name),
            self.bytes as f64 / self.touches as f64,
            "a fault",
        );
    }
}

pub fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let (mut trip, mut resolve, mut turns) = (Times::new(), Times::new(), Times::new());
    let (mut fetched, mut within) = (Times::new(), Times::new());
    let (mut read, mut write) = (Fault::new("read miss"), Fault::new("write miss"));
    let (mut upgrade, mut untouched) = (Fault::new("upgrade"), Fault::new("page nobody wrote"));
    let mut breakdown = Breakdown::default();
    let scattered = |touch, n, seed| Job::scattered(touch, arena(n), PAGES, TOUCHES, seed * 977);
    for round in 0..bench.rounds {
        let trips = bench.network.lock().unwrap().round_trips(TOUCHES as usize)?;
        trips.into_iter().for_each(|time| trip.took(time));
        let bare = bench
            .faults
            .run(Job::scattered(Touch::Read, ARENA, PAGES, TOUCHES, round * 977))?;
        bench.add_all(&[bare], &mut resolve);
        let job = Job::scattered(Touch::Read, ARENA, PAGES, TOUCHES, round * 977 + 1);
        let over = bench.faults.run_over(&bench.network, job)?;
        bench.add_all(&[over.touches], &mut fetched);
        over.trips.into_iter().for_each(|time| within.took(time));

        // The owner writes its pages again, so that it alone has them.
        let job = scattered(Touch::Read, 0, round);
        bench.peer.run(Job {
            touch: Touch::Write,
            ..job
        })?;
        read.run(bench, job)?;

        let job = scattered(Touch::Write, 1, round);
        bench.peer.run(job)?;
        write.run(bench, job)?;

        // Pages of their own each round: after an upgrade the next read would bring the right to write. In order, but
        // a fault each.
        bench.node.dsm.read_ahead(false);
        let job = Job::forward(Touch::Read, arena(2) + round * TOUCHES * 2 * 4096, TOUCHES);
        bench.peer.run(Job {
            touch: Touch::Write,
            ..job
        })?;
        bench.node.run(&[(0, job)])?;
        upgrade.run(
            bench,
            Job {
                touch: Touch::Write,
                ..job
            },
        )?;
        untouched.run(
            bench,
            Job {
                base: job.base + TOUCHES * 4096,
                touch: Touch::Write,
                ..job
            },
        )?;
        bench.node.dsm.read_ahead(true);

        let page = arena(0) - 4096;
        let turn = |parity| Job {
            touch: Touch::Turns,
            base: page,
            count: TURNS,
            start: 0,
            multiply: 1,
            add: parity,
            mask: 0,
        };
        bench.peer.ask(&Request::Run(turn(1)))?;
        let pairs = bench.node.run(&[(0, turn(0))])?;
        bench.peer.times()?;
        // From one of our turns to the next there are two ways.
        let ticks = bench.node.ticks_per_us();
        pairs[0]
            .windows(2)
            .for_each(|w| turns.add((w[1].1 - w[0].1) as f64 / ticks / 2.0));

        let job = scattered(Touch::Read, 3, round);
        bench.peer.run(Job {
            touch: Touch::Write,
            ..job
        })?;
        breakdown.run(bench, job)?;
    }
    let floor = |n: usize| trip.three()[n] + resolve.three()[n];
    let floor = [floor(0), floor(1), floor(2)];
    let figures = &bench.figures;
    figures.section("Floors");
    figures.times("4 KiB round trip, bare transport", &trip, None);
    figures.times("userfaultfd resolve, bare", &resolve, None);
    // The same messages; what is more comes of the guest that ran before: caches that are cold, threads that sleep longer.
    figures.times("the same round trip for a fault of a guest", &within, Some(trip.three()));
    figures.times("both as one: a fault answered by the bare transport", &fetched, Some(floor));
    figures.section("Faults; the floor is the sum of the two above");
    read.put(bench, Some(floor));
    figures.put(Figure {
        name: format!("read miss beside GiantVM over {}, mean", bench.transport.name()),
        value: read.times.mean(),
        unit: "us",
        beside: Beside::Rival(giantvm(bench.transport)),
    });
    figures.times("read miss beside a fault answered by the bare transport", &read.times, Some(fetched.three()));
    write.put(bench, Some(floor));
    upgrade.put(bench, None);
    untouched.put(bench, None);
    figures.times("ping-pong, one way", &turns, Some(floor));
    figures.section("A read miss in parts (traced, so a little longer)");
    breakdown.put(bench);
    many_vcpus(bench)
}

/// 1 to N vCPUs that read at the same time.
fn many_vcpus(bench: &mut Bench) -> anyhow::Result<()> {
    bench.figures.section("Read misses of several vCPUs at once");
    for vcpus in (1..=bench.vcpus).filter(|n| n.is_power_of_two() || *n == bench.vcpus) {
        let (mut times, mut took) = (Times::new(), 0.0);
        for round in 0..bench.rounds {
            let mut jobs = Vec::new();
            for vcpu in 0..vcpus {
                let base = arena(4) + vcpu as u64 * ARENA_BYTES;
                let job = Job::scattered(Touch::Read, base, PAGES, TOUCHES, round * 977);
                bench.peer.run(Job {
                    touch: Touch::Write,
                    ..job
                })?;
                jobs.push((vcpu, job));
            }
            let pairs = bench.node.run(&jobs)?;
            let first = pairs.iter().filter_map(|p| p.first()).map(|p| p.0).min().unwrap_or(0);
            let last = pairs.iter().filter_map(|p| p.last()).map(|p| p.1).max().unwrap_or(0);
            took += (last - first) as f64 / bench.node.ticks_per_us();
            bench.add_all(&pairs, &mut times);
        }
        let faults = (bench.rounds * TOUCHES * vcpus as u64) as f64;
        bench.figures.plain(&format!("{vcpus} vCPU, mean"), times.mean(), "us");
        bench
            .figures
            .plain(&format!("{vcpus} vCPU, together"), faults / took * 1e3, "faults/ms");
    }
    Ok(())
}
