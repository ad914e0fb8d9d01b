//! The front end: from the command line's options to the guest's power-off.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use krg_dsm::transport::Streams;
use krg_scheduler::{Placement, Request};
use serde_json::{Value, json};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::admin::Admin;
use super::api::Api;
use super::attend::{Attended, FrontEvent, NodeEvent, Port, Statistics};
use super::control;
use super::console::{RawMode, read_input};
use super::daemon::Runner;
use super::errno;
use super::error::FrontError;
use super::front_session::Cluster;
use super::gather::{self, Gathered, Gathering};
use super::hosts::HostsFile;
use super::local::name_in;
use super::plan::{self, Candidate};
use super::report::Reporter;
use super::schedule::{Schedule, Wanted};
use super::secret::Secret;
use super::size;
use super::transport::{self, Wish};
use super::vcpus::Wishes;
use super::verdict::Ending;
use crate::machine::cpuid_common::common_subset;
use crate::node::{BootSpec, CpuidLeaf, DiskSpec, MoveAnswer, NodeEnd, NodeLoad, NodeOutput, NodeSpec, NodeTransport, PageTables};

/// Most memory that a machine on this host alone gets without `--memory`.
const DEFAULT_MEMORY: u64 = 4 << 30;

/// What the command line asks for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hosts file; `None`: this host alone, in this process.
    pub nodes: Option<PathBuf>,
    /// Guest disk images, the boot image first.
    pub disks: Vec<PathBuf>,
    /// Write through to the images.
    pub persist: bool,
    /// vCPUs and memory.
    pub request: Request,
    /// The machine's name.
    pub name: String,
    /// What to boot.
    pub boot: BootSpec,
    /// Tap interface.
    pub net: Option<String>,
    /// Control socket; `None`: where [`super::sockets`] are by default, if that is possible.
    pub api: Option<PathBuf>,
    /// Where metrics can be scraped.
    pub metrics: Option<SocketAddr>,
    /// Page-table protocol.
    pub page_tables: PageTables,
    /// What the nodes are to talk over.
    pub transport: Wish,
    /// Who decides where vCPUs run.
    pub sched: Wanted,
    /// Secret file.
    pub secret_file: Option<PathBuf>,
    /// This program, to be started as a node.
    pub program: PathBuf,
    /// Take the terminal, standard input and signals; a program that embeds the front end may
    /// keep them.
    pub attach: bool,
}

/// The events of one front end and where they come from.
struct Events {
    sender: Sender<FrontEvent>,
    receiver: Receiver<FrontEvent>,
    reporter: Reporter,
}

/// Runs the machine until the guest powers off. `runner` runs it where there is no hosts file.
/// Call it from the main thread (see [`super::local::LocalNode::start`]).
///
/// # Errors
/// Anything but the guest's power-off.
pub fn run(options: &Options, runner: Arc<dyn Runner>, reporter: Reporter) -> Result<(), FrontError> {
    let (sender, receiver) = channel();
    let events = Events {
        sender,
        receiver,
        reporter,
    };
    for disk in &options.disks {
        check_image(disk)?;
    }
    for file in [&options.boot.kernel, &options.boot.initrd].into_iter().flatten() {
        File::open(file).map_err(|source| FrontError::File {
            path: file.clone(),
            source,
        })?;
    }
    match &options.nodes {
        Some(path) => over_hosts(options, path, &events),
        None => here(options, runner, &events),
    }
}

/// What outlives restarts of the guest: where vCPUs are, what users and the scheduler want of them, and the user's
/// ways to the machine, which are closed when it is dropped.
struct Steering {
    placement: Placement,
    statistics: Statistics,
    wishes: Wishes,
    schedule: Schedule,
    _guards: (Option<Api>, Option<RawMode>),
}

impl Steering {
    /// Opens the control socket and gives the guest the terminal. `offline`: hosts of the file that did not answer.
    fn new(
        options: &Options,
        events: &Events,
        candidates: &[Candidate],
        placement: Placement,
        names: Vec<String>,
        offline: Vec<String>,
    ) -> Result<Self, FrontError> {
        let statistics = Statistics::default();
        let wishes = Wishes::new(placement.cpus());
        let schedule = Schedule::new(&options.sched, plan::cpus(candidates), wishes.clone())?;
        let admin = Admin {
            name: options.name.clone(),
            placement: placement.clone(),
            names,
            offline,
            statistics: statistics.clone(),
            wishes: wishes.clone(),
            scheduling: Arc::new(schedule.clone()),
            events: events.sender.clone(),
        };
        let guards = attend_user(options, events, admin)?;
        Ok(Self { placement, statistics, wishes, schedule, _guards: guards })
    }

    /// A guest is about to start: its vCPUs are where they were placed.
    fn start(&self) {
        self.statistics.start(&self.placement);
        self.wishes.restarted();
        self.schedule.start();
    }

    /// Attends the machine that runs now; how it ended, or `None` if the guest restarts.
    fn attend(&self, events: &Events, ports: Vec<Port>, names: Vec<String>) -> Option<Ending> {
        events.reporter.event("the machine runs", &json!({"event": "started"}));
        let attended = Attended {
            ports,
            names,
            events: &events.receiver,
            reporter: events.reporter,
            statistics: self.statistics.clone(),
            schedule: self.schedule.clone(),
        };
        match attended.run() {
            (Ending::Reset, true) => {
                events.reporter.event("the guest restarts", &json!({"event": "reset"}));
                None
            }
            (ending, _) => Some(ending),
        }
    }
}

/// Runs the machine over the hosts of the file at `path`.
fn over_hosts(options: &Options, path: &Path, events: &Events) -> Result<(), FrontError> {
    let file = read_hosts(path)?;
    let secret = match options.secret_file.clone().or_else(Secret::default_file) {
        Some(path) => Some(Secret::from_file(&path)?),
        None => None,
    };
    let Gathering {
        nodes,
        started,
        missing,
    } = gather::gather(&file, secret, &options.program, &options.name)?;
    for line in missing {
        events.reporter.event(
            &format!("left out: {line}"),
            &json!({"event": "missing", "message": line}),
        );
    }
    for (number, node) in nodes.iter().enumerate() {
        show_host(
            events.reporter,
            number,
            node,
            started.iter().any(|local| local.address == node.address),
        );
    }
    let offline = file.hosts.iter().filter(|host| nodes.iter().all(|node| node.line.line != host.line));
    let offline = offline.map(ToString::to_string).collect();
    let candidates: Vec<_> = nodes
        .iter()
        .map(|node| Candidate {
            line: node.line.clone(),
            offer: node.offer.clone(),
        })
        .collect();
    let transport = transport_of(options.transport, &nodes, events.reporter)?;
    let placement = plan::plan(&candidates, options.request)?;
    let specs = specs(options, &candidates, &placement, transport, events.reporter)?;
    let names = specs[0].host_names.clone();
    let mut cluster = Cluster::new(nodes, &events.sender)?;
    let steering = Steering::new(options, events, &candidates, placement, names.clone(), offline)?;
    let ending = loop {
        steering.start();
        let running = cluster
            .prepare(specs.clone(), &events.receiver)?
            .connect(&events.receiver)?
            .start()?;
        match steering.attend(events, running.ports(), names.clone()) {
            Some(ending) => break ending,
            None => cluster = running.ended(),
        }
    };
    finish(ending, &names)
    // The connections close before `started` is dropped: those nodes then end by themselves.
}

/// Runs the machine on this host alone, in this process.
fn here(options: &Options, runner: Arc<dyn Runner>, events: &Events) -> Result<(), FrontError> {
    let line = HostsFile::parse("127.0.0.1", |_| None)
        .map(|mut file| file.hosts.remove(0))
        .map_err(|source| FrontError::Hosts {
            path: "127.0.0.1".into(),
            source,
        })?;
    let offer = runner.offer();
    let memory = options
        .request
        .memory
        .unwrap_or_else(|| (offer.memory / 2).min(DEFAULT_MEMORY));
    let request = Request {
        memory: Some(memory),
        ..options.request
    };
    let candidates = [Candidate { line, offer }];
    let placement = plan::plan(&candidates, request)?;
    let spec = specs(options, &candidates, &placement, NodeTransport::Tcp, events.reporter)?.remove(0);
    let names = spec.host_names.clone();
    let steering = Steering::new(options, events, &candidates, placement, names.clone(), Vec::new())?;
    let ending = loop {
        steering.start();
        let (input, typed) = channel();
        let (runner, spec, sender) = (runner.clone(), spec.clone(), events.sender.clone());
        let output = Arc::new(Here(sender.clone()));
        let peers: Vec<Option<Streams>> = vec![None];
        thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                let run = AssertUnwindSafe(|| runner.run(spec, peers, typed, output));
                let end = catch_unwind(run)
                    .unwrap_or_else(|_| NodeEnd::Failed("internal error: the machine panicked".into()));
                let _ = sender.send(FrontEvent::Node(0, NodeEvent::Ended(end)));
            })
            .map_err(|error| FrontError::System(format!("no thread: {}", errno::describe(&error))))?;
        if let Some(ending) = steering.attend(events, vec![Port::Here(input)], names.clone()) {
            break ending;
        }
    };
    finish(ending, &names)
}

/// Output of a machine in this process.
struct Here(Sender<FrontEvent>);

impl NodeOutput for Here {
    fn console(&self, bytes: &[u8]) {
        let _ = self.0.send(FrontEvent::Node(0, NodeEvent::Console(bytes.to_vec())));
    }

    fn event(&self, line: &str, json: Value) {
        let _ = self.0.send(FrontEvent::Node(0, NodeEvent::Event(line.into(), json)));
    }

    fn moved(&self, id: u64, answer: MoveAnswer) {
        let _ = self.0.send(FrontEvent::Node(0, NodeEvent::Migrated(id, answer)));
    }

    fn load(&self, load: NodeLoad) {
        let _ = self.0.send(FrontEvent::Node(0, NodeEvent::Load(Box::new(load))));
    }
}

fn finish(ending: Ending, names: &[String]) -> Result<(), FrontError> {
    let host = |node: usize| names.get(node).cloned().unwrap_or_default();
    match ending {
        Ending::PowerOff => Ok(()),
        Ending::Reset => Err(FrontError::Stopped(
            "the guest asked for a reset, and not every node could start again".into(),
        )),
        Ending::TripleFault => Err(FrontError::TripleFault),
        Ending::Lost { node, reason } => Err(FrontError::Lost {
            node,
            host: host(node),
            reason,
        }),
        Ending::Failed { node, line } => Err(FrontError::Failed {
            node,
            host: host(node),
            line,
        }),
        Ending::Stopped(reason) => Err(FrontError::Stopped(reason)),
    }
}

fn read_hosts(path: &Path) -> Result<HostsFile, FrontError> {
    let text = std::fs::read(path).map_err(|source| FrontError::File {
        path: path.into(),
        source,
    })?;
    let text = String::from_utf8_lossy(&text);
    let names = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    HostsFile::parse(&text, |name| name_in(&names, name)).map_err(|source| FrontError::Hosts {
        path: path.into(),
        source,
    })
}

/// A disk image has to be a file or a block device that can be read. The virtio side looks at
/// the content.
fn check_image(path: &Path) -> Result<(), FrontError> {
    let failed = |source| FrontError::File {
        path: path.into(),
        source,
    };
    let metadata = File::open(path).and_then(|file| file.metadata()).map_err(failed)?;
    let kind = metadata.file_type();
    let reason = if kind.is_dir() {
        "EISDIR (a directory, not a disk image)"
    } else if !kind.is_file() && !kind.is_block_device() {
        "neither a file nor a block device"
    } else if kind.is_file() && metadata.len() == 0 {
        "an empty file, not a disk image"
    } else {
        return Ok(());
    };
    Err(FrontError::Image {
        path: path.into(),
        reason,
    })
}

fn show_host(reporter: Reporter, number: usize, node: &Gathered, started: bool) {
    let Gathered {
        line,
        address,
        offer,
        round_trip,
        ..
    } = node;
    let micros = round_trip.as_micros();
    let started_here = if started { " (started here)" } else { "" };
    let text = format!(
        "node {number}: {address}{started_here}: {}, round trip {micros} us",
        offer.line()
    );
    let kvm = offer.kvm.as_ref().ok();
    let event = json!({
        "event": "host", "node": number, "id": line.id, "address": address.to_string(), "started": started,
        "cpus": offer.cpus, "memory": offer.memory, "kernel": offer.kernel, "software": offer.software,
        "kvm": kvm.map(|kvm| &kvm.module), "nested_paging": kvm.map(|kvm| kvm.nested_paging),
        "eptad": kvm.map(|kvm| kvm.eptad), "round_trip_us": micros as u64,
    });
    reporter.event(&text, &event);
}

/// What the nodes talk over; alone there is nobody to talk to.
fn transport_of(wish: Wish, nodes: &[Gathered], reporter: Reporter) -> Result<NodeTransport, FrontError> {
    if nodes.len() < 2 {
        return Ok(NodeTransport::Tcp);
    }
    let hosts: Vec<_> = nodes.iter().map(|node| (&node.offer, node.address.ip())).collect();
    let choice = transport::choose(wish, &hosts).map_err(|lacking| FrontError::NoRdma {
        host: nodes[lacking.node].line.to_string(),
        reason: lacking.reason,
    })?;
    let how = match choice.transport {
        NodeTransport::Tcp => "tcp",
        NodeTransport::Rdma => "rdma",
    };
    let event = json!({"event": "transport", "how": how, "auto": wish == Wish::Auto, "message": choice.line});
    reporter.event(&choice.line, &event);
    Ok(choice.transport)
}

/// Every node's part of the machine.
fn specs(
    options: &Options,
    hosts: &[Candidate],
    placement: &Placement,
    transport: NodeTransport,
    reporter: Reporter,
) -> Result<Vec<NodeSpec>, FrontError> {
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).map_err(|source| FrontError::File {
            path: path.clone(),
            source,
        })
    };
    let disks: Result<Vec<_>, FrontError> = (options.disks.iter().chain(&hosts[0].line.disks))
        .map(|path| {
            Ok(DiskSpec {
                path: absolute(path)?,
                persist: options.persist,
            })
        })
        .collect();
    let boot = BootSpec {
        kernel: options.boot.kernel.as_ref().map(absolute).transpose()?,
        initrd: options.boot.initrd.as_ref().map(absolute).transpose()?,
        append: options.boot.append.clone(),
    };
    let spec = NodeSpec {
        name: options.name.clone(),
        node: 0,
        placement: placement.clone(),
        host_names: hosts.iter().map(|host| host.line.to_string()).collect(),
        disks: disks?,
        net: options.net.clone(),
        boot,
        page_tables: options.page_tables,
        transport,
        cpuid: common_cpuid(hosts, reporter)?,
        cache: 0,
        tsc_khz: hosts[0].offer.kvm.as_ref().map_or(0, |kvm| kvm.tsc_khz),
    };
    let caches = plan::caches(hosts, placement)?;
    for (number, share) in placement.hosts.iter().enumerate() {
        let (first, last) = (share.vcpus.first().unwrap_or(&0), share.vcpus.last().unwrap_or(&0));
        let text = format!(
            "node {number} has vCPUs {first}-{last} and {}{}",
            size::show(share.memory),
            if hosts.len() > 1 { format!(", with room for {} of the others'", size::show(caches[number])) } else { String::new() }
        );
        let event = json!({"event": "placement", "node": number, "vcpus": share.vcpus, "memory": share.memory,
            "cache": caches[number]});
        reporter.event(&text, &event);
    }
    Ok((0..hosts.len()).map(|node| NodeSpec { node, cache: caches[node], ..spec.clone() }).collect())
}

/// The CPUID leaves all hosts share; empty for one host: its own.
fn common_cpuid(hosts: &[Candidate], reporter: Reporter) -> Result<Vec<CpuidLeaf>, FrontError> {
    if hosts.len() == 1 {
        return Ok(Vec::new());
    }
    let offers: Vec<_> = hosts
        .iter()
        .filter_map(|h| h.offer.kvm.as_ref().ok())
        .map(|kvm| kvm.cpuid.clone())
        .collect();
    let (leaves, differences) = common_subset(&offers).map_err(|error| FrontError::Cpuid(error.to_string()))?;
    for line in differences {
        reporter.event(&line, &json!({"event": "cpuid", "message": line}));
    }
    Ok(leaves)
}

/// Opens the control socket, catches signals, and gives the guest the terminal; what it returns
/// undoes that when dropped.
fn attend_user(
    options: &Options,
    events: &Events,
    admin: Admin,
) -> Result<(Option<Api>, Option<RawMode>), FrontError> {
    let no_thread = |error: io::Error| FrontError::System(format!("no thread: {}", errno::describe(&error)));
    let api = control::open(options, admin, events.reporter)?;
    if !options.attach {
        return Ok((api, None));
    }
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])
        .map_err(|error| FrontError::System(format!("signals: {}", errno::describe(&error))))?;
    let quit = events.sender.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                let name = match signal {
                    SIGHUP => "SIGHUP",
                    SIGINT => "SIGINT",
                    SIGQUIT => "SIGQUIT",
                    _ => "SIGTERM",
                };
                let _ = quit.send(FrontEvent::Quit(name.into()));
            }
        })
        .map_err(no_thread)?;
    let raw = RawMode::enter().map_err(|error| FrontError::System(format!("terminal: {}", errno::describe(&error))))?;
    let typed = events.sender.clone();
    read_input(io::stdin().is_terminal(), move |what| {
        typed.send(FrontEvent::Typed(what)).is_ok()
    })
    .map_err(no_thread)?;
    Ok((api, raw))
}
