//! What this node's vCPUs did in the last moment, for whoever decides where they run.
//!
//! Running and waiting for a CPU is what the host's scheduler says of the vCPU's thread; waiting for pages is what
//! the shared memory says of it. A halted vCPU does none of these.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krg_dsm::node::Dsm;
use krg_dsm::stalls::ThreadStalls;
use serde::{Deserialize, Serialize};

use super::NodeOutput;
use crate::machine::Machine;

/// How often it is measured.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// A vCPU that has been here for less is not measured yet.
const LEAST: Duration = Duration::from_millis(100);
/// Most pages in one report: those fetched most.
pub const MOST_PAGES: usize = 64;
/// Weight of the newest time of a fetch in the mean.
const NEWEST: f64 = 0.5;
/// Demand below which a vCPU counts as halted, for people.
const HARDLY: f64 = 0.02;

/// What one node measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Mean time in microseconds that a thread here waited for a page of another node; 0: none has yet.
    pub fetch_us: f64,
    /// Pages of copies there is room for.
    pub room: u64,
    /// The vCPUs that ran here all the time since they were measured last.
    pub vcpus: Vec<VcpuMeasure>,
    /// The pages fetched most, if more than once; [`MOST_PAGES`] at most.
    pub pages: Vec<PageFetches>,
}

/// What one vCPU did. Fractions are of the time that has passed, of which it may have been halted in the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuMeasure {
    /// Its number.
    pub vcpu: u32,
    /// Of its ownership: which stay here was measured.
    pub epoch: u64,
    /// Fraction spent running.
    pub ran: f64,
    /// Fraction it could have run, but waited for a CPU.
    pub waited: f64,
    /// Fraction it waited for pages of other nodes.
    pub stalled: f64,
    /// Pages fetched a second, by the node that had them.
    pub faults: Vec<(usize, f64)>,
    /// Different pages it fetched in the last seconds, roughly.
    pub footprint: u64,
    /// What it did for the most part.
    pub state: VcpuState,
}

/// What a vCPU did for the most part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VcpuState {
    /// It ran, or would have if there had been a CPU.
    Running,
    /// It waited for pages.
    Waiting,
    /// Hardly anything.
    Halted,
}

/// A page that vCPUs of this node fetched from others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PageFetches {
    /// Guest-physical address.
    pub gpa: u64,
    /// A vCPU, the node that had the page, and how often a second.
    pub fetches: Vec<(u32, usize, f64)>,
}

/// The host's clocks of one thread, in nanoseconds: time on a CPU, time on a run queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Clocks {
    ran: u64,
    waited: u64,
}

/// The host's CPU time in ticks: used, and stolen by its own host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HostTime {
    busy: u64,
    stolen: u64,
}

/// A vCPU as it was measured last.
struct Before {
    thread: u32,
    epoch: u64,
    clocks: Clocks,
    at: Instant,
    file: File,
}

/// Measures a node, again and again.
pub(super) struct Measure {
    /// This node.
    node: usize,
    /// Of every vCPU that ran here last time.
    vcpus: Vec<Option<Before>>,
    host: HostTime,
    at: Instant,
    fetch_us: f64,
}

impl Measure {
    /// For node `node` of a machine of `vcpus` vCPUs.
    pub fn new(node: usize, vcpus: u32) -> Self {
        let vcpus = (0..vcpus).map(|_| None).collect();
        Measure { node, vcpus, host: host_time(), at: Instant::now(), fetch_us: 0.0 }
    }

    /// A vCPU has come: it is measured from now on.
    pub fn arrived(&mut self, machine: &Machine, vcpu: u32) {
        if let Some(place) = self.vcpus.get_mut(vcpu as usize) {
            *place = machine.running(vcpu).and_then(|(thread, epoch)| Before::now(thread, epoch));
        }
    }

    /// Measures, and tells.
    pub fn tell(&mut self, machine: &Machine, dsm: Option<&Dsm>, output: &Arc<dyn NodeOutput>) {
        output.load(self.take(machine, dsm));
    }

    /// What was done since the last time.
    fn take(&mut self, machine: &Machine, dsm: Option<&Dsm>) -> NodeLoad {
        let passed = self.at.elapsed().as_secs_f64().max(1e-3);
        self.at = Instant::now();
        let host = host_time();
        let stolen = host.stolen_since(self.host);
        self.host = host;
        let (stalls, pages) = dsm.map(|dsm| dsm.take_stalls(MOST_PAGES)).unwrap_or_default();
        self.learn_fetch(&stalls);
        let waits: HashMap<u32, &ThreadStalls> = stalls.iter().map(|stalls| (stalls.thread, stalls)).collect();
        let (mut vcpus, mut by) = (Vec::new(), HashMap::new());
        for (vcpu, place) in (0..).zip(&mut self.vcpus) {
            let Some((thread, epoch)) = machine.running(vcpu) else {
                *place = None;
                continue;
            };
            by.insert(thread, vcpu);
            match place.as_mut().filter(|before| (before.thread, before.epoch) == (thread, epoch)) {
                None => *place = Before::now(thread, epoch),
                Some(before) => {
                    vcpus.extend(before.measure(vcpu, stolen, waits.get(&thread).copied(), self.node));
                }
            }
        }
        let fetches = |page: krg_dsm::contention::FetchedPage| {
            let fetch = |(thread, node, count): (u32, u16, u32)| {
                Some((*by.get(&thread)?, usize::from(node), rounded(f64::from(count) / passed)))
            };
            let fetches: Vec<_> = page.fetches.into_iter().filter_map(fetch).collect();
            let gpa = dsm.and_then(|dsm| dsm.ram().gpa_of(page.page))?;
            (!fetches.is_empty()).then_some(PageFetches { gpa, fetches })
        };
        let pages = pages.into_iter().filter_map(fetches).collect();
        let room = dsm.map(Dsm::copies).map_or(0, |copies| u64::from(copies.limit.saturating_sub(copies.pages)));
        NodeLoad { fetch_us: rounded(self.fetch_us), room, vcpus, pages }
    }

    fn learn_fetch(&mut self, stalls: &[ThreadStalls]) {
        let faults: u64 = stalls.iter().flat_map(|s| s.sources).map(|(_, count)| u64::from(count)).sum();
        let waited: u64 = stalls.iter().map(|s| s.stalled).sum();
        if faults > 0 {
            let newest = waited as f64 / 1e3 / faults as f64;
            let before = if self.fetch_us > 0.0 { self.fetch_us } else { newest };
            self.fetch_us = NEWEST * newest + (1.0 - NEWEST) * before;
        }
    }
}

impl Before {
    fn now(thread: u32, epoch: u64) -> Option<Self> {
        let path = format!("/proc/self/task/{thread}/schedstat");
        let file = File::open(&path).inspect_err(|error| tracing::warn!(path, %error, "a vCPU can't be measured")).ok()?;
        Some(Before { thread, epoch, clocks: clocks(&file)?, at: Instant::now(), file })
    }

    /// What was done since the last measurement, which this one takes the place of. `None`: it is too early.
    fn measure(&mut self, vcpu: u32, stolen: f64, stalls: Option<&ThreadStalls>, node: usize) -> Option<VcpuMeasure> {
        let passed = self.at.elapsed();
        if passed < LEAST {
            return None;
        }
        let now = clocks(&self.file)?;
        let of = |nanos: u64| (nanos as f64 / passed.as_nanos() as f64).min(1.0);
        let on_cpu = of(now.ran.saturating_sub(self.clocks.ran));
        // What the host's own host took is in the time on its CPUs.
        let ran = on_cpu * (1.0 - stolen);
        let waited = (of(now.waited.saturating_sub(self.clocks.waited)) + on_cpu * stolen).min(1.0);
        let stalled = stalls.map_or(0.0, |stalls| of(stalls.stalled));
        (self.clocks, self.at) = (now, Instant::now());
        let state = match (ran + waited, stalled) {
            (runs, stalled) if runs + stalled < HARDLY => VcpuState::Halted,
            (runs, stalled) if stalled > runs => VcpuState::Waiting,
            _ => VcpuState::Running,
        };
        let faults = stalls.map(|stalls| stalls.sources).unwrap_or_default();
        let faults = faults.into_iter().map(|(from, count)| (usize::from(from), count));
        let rate = |(from, count)| (from, rounded(f64::from(count) / passed.as_secs_f64()));
        Some(VcpuMeasure {
            vcpu,
            epoch: self.epoch,
            ran: rounded(ran),
            waited: rounded(waited),
            stalled: rounded(stalled),
            faults: faults.filter(|(from, count)| *count > 0 && *from != node).map(rate).collect(),
            footprint: stalls.map_or(0, |stalls| stalls.footprint),
            state,
        })
    }
}

impl HostTime {
    /// The part of the CPU time used since `before` that was stolen.
    fn stolen_since(self, before: HostTime) -> f64 {
        let (busy, stolen) = (self.busy.saturating_sub(before.busy), self.stolen.saturating_sub(before.stolen));
        if stolen == 0 { 0.0 } else { stolen as f64 / (busy + stolen) as f64 }
    }
}

fn clocks(file: &File) -> Option<Clocks> {
    let mut text = [0; 96];
    let len = file.read_at(&mut text, 0).ok()?;
    parse_clocks(std::str::from_utf8(&text[..len]).ok()?)
}

fn parse_clocks(text: &str) -> Option<Clocks> {
    let mut numbers = text.split_whitespace().map(str::parse);
    Some(Clocks { ran: numbers.next()?.ok()?, waited: numbers.next()?.ok()? })
}

fn host_time() -> HostTime {
    parse_host_time(&std::fs::read_to_string("/proc/stat").unwrap_or_default()).unwrap_or_default()
}

/// proc(5): user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user.
fn parse_host_time(text: &str) -> Option<HostTime> {
    let numbers: Vec<u64> = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|n| n.parse().ok()).collect();
    let [user, nice, system, _, _, irq, softirq, stolen, ..] = numbers[..] else { return None };
    Some(HostTime { busy: user + nice + system + irq + softirq, stolen })
}

/// Three digits are more than is known.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_words_are_understood() {
        assert_eq!(parse_clocks("105 42 7\n"), Some(Clocks { ran: 105, waited: 42 }));
        assert_eq!([parse_clocks(""), parse_clocks("1"), parse_clocks("a b")], [None; 3]);
        let time = parse_host_time("cpu  10 1 5 900 3 2 1 6 4 0\ncpu0 1 1 1\n").unwrap();
        assert_eq!(time, HostTime { busy: 19, stolen: 6 });
        assert_eq!([parse_host_time("cpu 1 2"), parse_host_time("intr 5")], [None; 2]);
        let before = HostTime { busy: 9, stolen: 1 };
        assert_eq!((time.stolen_since(before), before.stolen_since(time)), (1.0 / 3.0, 0.0));
    }

    #[test]
    fn a_thread_that_runs_is_told_from_one_that_waits_for_a_page_and_one_that_sleeps() {
        let measure = |work: fn(), stalls: Option<&ThreadStalls>| {
            // SAFETY: it takes nothing and can't fail.
            let thread = unsafe { libc::gettid() } as u32;
            let mut before = Before::now(thread, 3).unwrap();
            assert_eq!(before.measure(1, 0.0, None, 0), None, "too early");
            let until = before.at + 2 * LEAST;
            while Instant::now() < until {
                work();
            }
            before.measure(1, 0.0, stalls, 0).unwrap()
        };
        let busy = measure(std::hint::spin_loop, None);
        assert!(busy.ran + busy.waited > 0.5 && busy.state == VcpuState::Running, "{busy:?}");
        let sleep = || std::thread::sleep(Duration::from_millis(150));
        let mut sources = [(0, 0); krg_dsm::stalls::SOURCES];
        (sources[0], sources[1]) = ((2, 30), (0, 5));
        let stalls = ThreadStalls { thread: 0, stalled: u64::MAX, waits: true, sources, footprint: 9 };
        let waits = measure(sleep, Some(&stalls));
        assert_eq!((waits.stalled, waits.state, waits.footprint), (1.0, VcpuState::Waiting, 9));
        assert_eq!((waits.faults.len(), waits.faults[0].0), (1, 2), "its own node's pages cost nothing");
        let sleeps = measure(sleep, None);
        assert!(sleeps.ran < 0.5 && sleeps.stalled == 0.0, "{sleeps:?}");
    }
}
