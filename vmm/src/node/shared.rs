//! A machine over several hosts: this node's part of it.
//!
//! Start: everybody says how its hardware walks page tables; node 0 loads the guest's memory and
//! tells what it wrote; everybody measures its clock against node 0's, makes its memory coherent
//! and says it is ready; then node 0's vCPU 0 runs, and the others wait for its SIPI.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use krg_dsm::memory::{GuestRam, PAGE_SHIFT};
use krg_dsm::node::{Dsm, DsmError, Start, TABLES_REST};
use krg_dsm::transport::rdma::{RdmaError, RdmaTransport};
use krg_dsm::transport::{Config, PeerEvent, Streams, TcpTransport, Transport, TransportError};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::console::Console;
use super::fabric::Cluster;
use super::measure::{self, Measure};
use super::{
    Happening, NodeEnd, NodeInput, NodeOutput, NodeSpec, NodeTransport, PageTables, boot, devices, end_of, forward, migrate, report, tsc,
};
use crate::cluster::offer;
use crate::machine::layout::ram_ranges;
use crate::machine::{Machine, MachineConfig};

/// Longest wait for the others while starting. Loading a large image takes node 0 a while.
const START_LIMIT: Duration = Duration::from_secs(120);

/// A block of memory that no other node asked for a page of in this time goes back into one huge page.
const MERGE_AFTER: Duration = Duration::from_secs(10);

/// Counters are told this often: to the front end, and in the log (KRG_LOG=info).
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Messages while starting and ending, outside the protocol's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Setup {
    /// To node 0: whether my hardware's walks write page tables, and how I know.
    Walks { write: bool, why: String },
    /// From node 0: guest memory is loaded.
    Loaded { preloaded: Vec<Range<u32>>, image: Range<u32>, replicate: bool, tsc_offset: u64 },
    /// To node 0: what is your TSC?
    Clock,
    /// From node 0: this.
    Tsc(u64),
    /// To node 0: my memory is coherent and my vCPUs wait.
    Ready { error_ns: u64 },
    /// The machine has ended, and not because somebody was lost.
    Ended,
}

/// A node while it starts, runs and stops.
struct Node<'a> {
    spec: &'a NodeSpec,
    output: &'a Arc<dyn NodeOutput>,
    dsm: Arc<Dsm>,
    machine: Arc<Machine>,
    happenings: Receiver<Happening>,
    peers: Vec<usize>,
}

/// Why starting stopped: an end, rather than an error, if something else ended the machine.
enum Stop {
    End(NodeEnd),
    Error(String),
}

impl From<String> for Stop {
    fn from(line: String) -> Self {
        Stop::Error(line)
    }
}

pub(super) fn run(
    spec: &NodeSpec,
    peers: Vec<Option<Streams>>,
    input: Receiver<NodeInput>,
    output: &Arc<dyn NodeOutput>,
) -> Result<NodeEnd, String> {
    let ranges: Vec<_> = ram_ranges(spec.placement.memory()).iter().map(|r| (r.start, r.end - r.start)).collect();
    let ram = Arc::new(GuestRam::new(&ranges, true).map_err(|e| e.to_string())?);
    let others: Vec<usize> = (0..spec.placement.hosts.len()).filter(|n| *n != spec.node).collect();
    let transport = match transport(spec.transport, peers) {
        Ok(transport) => transport,
        // It tells the front end why.
        Err(TransportError::Rdma { peer, error: RdmaError::GaveUp }) => return Ok(NodeEnd::PeerEnded(peer)),
        Err(error) => return Err(error.to_string()),
    };
    let (happen, happenings) = channel();
    let (ends, ended) = channel();
    let cluster = Cluster::new(happen.clone());
    let config = MachineConfig {
        placement: spec.placement.clone(),
        node: spec.node,
        tsc_khz: spec.tsc_khz,
        cpuid: spec.cpuid.clone(),
        console: Box::new(Console::new(Arc::clone(output))),
        ends,
    };
    let machine = Machine::new(config, ram.memory().clone(), cluster.clone()).map_err(|e| e.to_string())?;
    let machine = Arc::new(machine);
    let dsm = Dsm::new(spec.node, ram, transport.clone());
    cluster.join(&dsm, &machine);
    transport.start(dsm.handler(cluster.clone())).map_err(|e| e.to_string())?;
    forward(input, happen.clone(), Happening::Input);
    forward(ended, happen, Happening::Machine);
    let node = Node { spec, output, dsm, machine, happenings, peers: others };
    let mut pci = None;
    let end = match node.start(&mut pci) {
        Ok(()) => node.wait(),
        Err(Stop::End(end)) => end,
        Err(Stop::Error(line)) => NodeEnd::Failed(line),
    };
    // The first to end has told everybody.
    if !matches!(end, NodeEnd::PeerLost(_) | NodeEnd::PeerEnded(_)) {
        node.tell_all(&Setup::Ended);
    }
    report::counters(spec, &node.machine, Some(&node.dsm), output);
    node.stop(&cluster, pci.as_deref());
    transport.shutdown();
    Ok(end)
}

fn transport(kind: NodeTransport, peers: Vec<Option<Streams>>) -> Result<Arc<dyn Transport>, TransportError> {
    Ok(match kind {
        NodeTransport::Tcp => Arc::new(TcpTransport::new(peers, Config::default())?),
        NodeTransport::Rdma => {
            let peers = peers.into_iter().map(|streams| Some(streams?.messages)).collect();
            Arc::new(RdmaTransport::connect(peers, Config::default())?)
        }
    })
}

impl Node<'_> {
    fn tell(&self, to: usize, message: &Setup) {
        match serde_json::to_vec(message) {
            // A lost peer is told of by the transport.
            Ok(bytes) => drop(self.dsm.send_setup(to, &bytes)),
            Err(error) => tracing::error!(%error, "a set-up message can't be written"),
        }
    }

    fn tell_all(&self, message: &Setup) {
        self.peers.iter().for_each(|peer| self.tell(*peer, message));
    }

    fn start(&self, pci: &mut Option<Arc<devices::Pci>>) -> Result<(), Stop> {
        let replicate = match self.spec.page_tables {
            PageTables::Replicate => Some(true),
            PageTables::Share => Some(false),
            PageTables::Auto => None,
        };
        let (write, why) = offer::walks_write();
        let limit = Instant::now() + START_LIMIT;
        let (loaded, tsc_offset, error_ns) = if self.spec.node == 0 {
            let mut walks = vec![(write, format!("node 0: {why}"))];
            self.gather(limit, &self.peers, |from, message| match message {
                Setup::Walks { write, why } => {
                    walks.push((write, format!("node {from}: {why}")));
                    true
                }
                _ => false,
            })?;
            let chosen = replicate.unwrap_or_else(|| walks.iter().any(|(write, _)| *write));
            self.say_page_tables(chosen, replicate.is_none(), &walks);
            let booted = boot::load(self.spec, self.dsm.ram().memory(), self.machine.tsc_khz())?;
            self.output.event(&booted.line, json!({"event": "boot", "what": booted.line}));
            let devices = devices::make(self.spec, booted.disks, self.dsm.ram(), &self.machine, Some(&self.dsm))?;
            self.machine.attach(devices.clone());
            *pci = Some(devices);
            self.machine.set_entry(&booted.loaded.entry).map_err(|e| e.to_string())?;
            let pages = |r: &Range<u64>| self.pages(r);
            let preloaded = booted.loaded.written.iter().map(pages).collect::<Result<Vec<_>, _>>()?;
            let image = pages(&booted.loaded.kernel)?;
            // The guest's TSC starts near zero.
            let tsc_offset = tsc::read().wrapping_neg();
            let loaded = Setup::Loaded { preloaded: preloaded.clone(), image: image.clone(), replicate: chosen, tsc_offset };
            self.tell_all(&loaded);
            ((preloaded, image, chosen), tsc_offset, 0)
        } else {
            self.tell(0, &Setup::Walks { write, why });
            let mut got = None;
            self.gather(limit, &[0], |_, message| match message {
                Setup::Loaded { preloaded, image, replicate, tsc_offset } => {
                    got = Some(((preloaded, image, replicate), tsc_offset));
                    true
                }
                _ => false,
            })?;
            let (loaded, base) = got.ok_or_else(|| "node 0 didn't say what it loaded".to_owned())?;
            let mut failed = None;
            let offset = tsc::measure(|| match self.ask_tsc(limit) {
                Ok(tsc) => Some(tsc),
                Err(stop) => {
                    failed = Some(stop);
                    None
                }
            });
            if let Some(stop) = failed {
                return Err(stop);
            }
            let offset = offset.map_err(|e| e.to_string())?;
            let error_ns = offset.error.saturating_mul(1_000_000) / u64::from(self.machine.tsc_khz()).max(1);
            (loaded, base.wrapping_add(offset.ticks as u64), error_ns)
        };
        self.machine.set_tsc_offset(tsc_offset).map_err(|e| e.to_string())?;
        let (preloaded, image, replicate) = loaded;
        let pages = self.dsm.ram().pages();
        if preloaded.iter().chain([&image]).any(|r| r.start > r.end || r.end > pages) {
            return Err(Stop::Error("node 0 says it loaded memory that doesn't exist".into()));
        }
        let shares = self.spec.placement.hosts.iter().map(|h| h.memory).collect();
        let start = Start { me: self.spec.node, shares, preloaded, image, replicate, tables_rest: TABLES_REST, merge_after: MERGE_AFTER, cache: self.spec.cache, bug: None };
        self.dsm.start(start).map_err(|e| e.to_string())?;
        if self.spec.node == 0 {
            let mut errors = Vec::new();
            self.gather(limit, &self.peers, |from, message| match message {
                Setup::Ready { error_ns } => {
                    errors.push((from, error_ns));
                    true
                }
                _ => false,
            })?;
            let text: Vec<_> = errors.iter().map(|(n, ns)| format!("node {n} ±{:.1} µs", *ns as f64 / 1e3)).collect();
            let line = format!("clock: one TSC of {} kHz, offsets known to {}", self.machine.tsc_khz(), text.join(", "));
            self.output.event(&line, json!({"event": "clock", "tsc_khz": self.machine.tsc_khz(), "errors_ns": errors}));
        } else {
            self.tell(0, &Setup::Ready { error_ns });
        }
        self.machine.run().map_err(|e| e.to_string())?;
        Ok(())
    }

    fn say_page_tables(&self, replicate: bool, auto: bool, walks: &[(bool, String)]) {
        let reasons: Vec<_> = walks.iter().map(|(_, why)| why.as_str()).collect();
        let how = if replicate { "replicated" } else { "shared" };
        let line = match auto {
            true => format!("page tables: {how} (auto: {})", reasons.join("; ")),
            false => format!("page tables: {how} (as asked)"),
        };
        self.output.event(&line, json!({"event": "page_tables", "how": how, "auto": auto, "why": reasons}));
    }

    /// The pages of a guest-physical range.
    fn pages(&self, range: &Range<u64>) -> Result<Range<u32>, String> {
        let ram = self.dsm.ram();
        let page = |gpa: u64| ram.index_of(gpa).ok_or_else(|| format!("loaded memory at {gpa:#x} is not RAM"));
        let first = page(range.start)?;
        let last = page(range.end.max(range.start + 1) - 1)?;
        debug_assert!(u64::from(last - first) <= (range.end - range.start) >> PAGE_SHIFT);
        Ok(first..last + 1)
    }

    /// Waits until every one of `from` has sent a message that `take` takes; answers clocks meanwhile.
    fn gather(&self, limit: Instant, from: &[usize], mut take: impl FnMut(usize, Setup) -> bool) -> Result<(), Stop> {
        let mut missing: BTreeSet<usize> = from.iter().copied().collect();
        while !missing.is_empty() {
            let (sender, message) = self.next_setup(limit)?;
            if take(sender, message.clone()) {
                missing.remove(&sender);
            } else {
                self.other_setup(sender, message)?;
            }
        }
        Ok(())
    }

    fn next_setup(&self, limit: Instant) -> Result<(usize, Setup), Stop> {
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            match self.happenings.recv_timeout(left) {
                Ok(Happening::Setup(from, bytes)) => match serde_json::from_slice(&bytes) {
                    Ok(message) => return Ok((from, message)),
                    Err(_) => return Err(Stop::Error(format!("node {from} sent a set-up message that is none"))),
                },
                Ok(other) => {
                    if let Some(end) = self.end_by(other) {
                        return Err(Stop::End(end));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Stop::Error(format!("another node did not get ready within {} s", START_LIMIT.as_secs())));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(Stop::End(NodeEnd::Stopped("the front end is gone".into()))),
            }
        }
    }

    fn other_setup(&self, from: usize, message: Setup) -> Result<(), Stop> {
        match message {
            Setup::Clock if self.spec.node == 0 => self.tell(from, &Setup::Tsc(tsc::read())),
            Setup::Ended => return Err(Stop::End(NodeEnd::PeerEnded(from))),
            other => return Err(Stop::Error(format!("node {from} sent {other:?} out of turn"))),
        }
        Ok(())
    }

    fn ask_tsc(&self, limit: Instant) -> Result<u64, Stop> {
        self.tell(0, &Setup::Clock);
        loop {
            match self.next_setup(limit)? {
                (0, Setup::Tsc(tsc)) => return Ok(tsc),
                (from, message) => self.other_setup(from, message)?,
            }
        }
    }

    /// The end that a happening means, if it means one.
    fn end_by(&self, happening: Happening) -> Option<NodeEnd> {
        match happening {
            Happening::Input(NodeInput::Console(bytes)) => {
                report::type_in(&self.machine, &bytes);
                None
            }
            Happening::Input(NodeInput::Migrate { id, vcpu, node }) => {
                migrate(&self.machine, id, vcpu, node, self.output);
                None
            }
            Happening::Input(NodeInput::Stop(why)) => Some(NodeEnd::Stopped(why)),
            Happening::Arrived { vcpu, epoch } => {
                report::arrived(self.spec, vcpu, epoch, self.output);
                None
            }
            Happening::Machine(end) => Some(end_of(end)),
            Happening::Dsm(DsmError::Peer(PeerEvent::Lost { peer, .. } | PeerEvent::Malformed { peer, .. })) => {
                self.machine.lose(peer);
                Some(NodeEnd::PeerLost(peer))
            }
            Happening::Dsm(error) => Some(NodeEnd::Failed(error.to_string())),
            Happening::Nonsense(from) => Some(NodeEnd::Failed(format!("node {from} sent a machine message that is none"))),
            Happening::Setup(..) => None,
        }
    }

    /// Until the machine ends.
    fn wait(&self) -> NodeEnd {
        let mut next = Instant::now() + REPORT_INTERVAL;
        let mut measure = Measure::new(self.spec.node, self.spec.placement.cpus());
        let mut next_measure = Instant::now() + measure::INTERVAL;
        loop {
            let now = Instant::now();
            if now >= next {
                report::statistics(self.spec, &self.machine, &self.dsm, self.output);
                next = now + REPORT_INTERVAL;
            }
            if now >= next_measure {
                measure.tell(&self.machine, Some(&self.dsm), self.output);
                next_measure = now + measure::INTERVAL;
            }
            match self.happenings.recv_timeout(next.min(next_measure).saturating_duration_since(now)) {
                Ok(Happening::Setup(from, bytes)) => match serde_json::from_slice(&bytes) {
                    Ok(Setup::Ended) => return NodeEnd::PeerEnded(from),
                    Ok(Setup::Clock) if self.spec.node == 0 => self.tell(from, &Setup::Tsc(tsc::read())),
                    _ => return NodeEnd::Failed(format!("node {from} sent a set-up message out of turn")),
                },
                Ok(other) => {
                    if let Happening::Arrived { vcpu, .. } = other {
                        measure.arrived(&self.machine, vcpu);
                    }
                    if let Some(end) = self.end_by(other) {
                        return end;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return NodeEnd::Stopped("the front end is gone".into()),
            }
        }
    }

    /// Ends everything. First of all nothing reaches a disk or the network any more; then those who
    /// wait for a page are let go, with whatever content, and leave no trace of it.
    fn stop(&self, cluster: &Cluster, pci: Option<&devices::Pci>) {
        if let Some(pci) = pci {
            pci.0.request_stop();
        }
        cluster.close();
        self.machine.forget_moves();
        let machine = &self.machine;
        std::thread::scope(|scope| {
            scope.spawn(|| machine.stop());
            // The vCPUs are told to stop before their pages turn to zeros.
            std::thread::sleep(Duration::from_millis(20));
            self.dsm.stop();
        });
        if let Some(pci) = pci {
            pci.0.stop();
        }
    }
}
