//! Attending a running machine: console, events, requests to end, and the nodes' ends.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use krg_scheduler::{Decision, Placement};
use serde_json::{Value, json};

use super::console::{self, Typed};
use super::daemon::STOP_LIMIT;
use super::link::LinkSender;
use super::message::{FromNode, ToNode};
use super::report::Reporter;
use super::schedule::Schedule;
use super::verdict::{Ending, Ends};
use crate::node::{MoveAnswer, NodeEnd, NodeInput, NodeLoad, VcpuMeasure};

/// How long the other nodes may take to report after a loss or failure. With the silence that
/// shows a loss it stays under 5 s.
const LOSS_SETTLE: Duration = Duration::from_millis(300);
/// How long node 0 may take to write out its disks after another node saw the guest end.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);
/// How long a node may take beyond its own limit to say that it stopped.
const REPORT_MARGIN: Duration = Duration::from_millis(500);

/// What the front end waits for.
#[derive(Debug)]
pub enum FrontEvent {
    /// From a node.
    Node(usize, NodeEvent),
    /// From the user.
    Typed(Typed),
    /// A request on the control socket to move a vCPU.
    Migrate {
        /// The vCPU.
        vcpu: u32,
        /// The node it is to run on.
        node: usize,
        /// Where the answer goes; dropped if the machine ends first.
        reply: Sender<MoveAnswer>,
    },
    /// A signal, or a request on the control socket, to end the machine; says which.
    Quit(String),
}

/// What a node says while it runs.
#[derive(Debug)]
pub enum NodeEvent {
    /// The guest's console output.
    Console(Vec<u8>),
    /// A line worth showing.
    Event(String, Value),
    /// What its vCPUs did.
    Load(Box<NodeLoad>),
    /// What came of a move.
    Migrated(u64, MoveAnswer),
    /// It ended.
    Ended(NodeEnd),
    /// It is gone.
    Lost(String),
    /// An answer to a step towards running, or a refusal.
    Answer(FromNode),
}

/// The way to a running node.
pub enum Port {
    /// Over its control connection.
    Linked(LinkSender<ToNode>),
    /// In this process.
    Here(Sender<NodeInput>),
}

impl Port {
    fn console(&self, bytes: Vec<u8>) {
        // A node that is gone is noticed where its events come from.
        match self {
            Self::Linked(link) => drop(link.send(ToNode::Console(bytes))),
            Self::Here(input) => drop(input.send(NodeInput::Console(bytes))),
        }
    }

    fn migrate(&self, id: u64, vcpu: u32, node: usize) {
        match self {
            Self::Linked(link) => drop(link.send(ToNode::Migrate { id, vcpu, node })),
            Self::Here(input) => drop(input.send(NodeInput::Migrate { id, vcpu, node })),
        }
    }

    fn stop(&self, reason: &str) {
        match self {
            Self::Linked(link) => drop(link.send(ToNode::Stop(reason.into()))),
            Self::Here(input) => drop(input.send(NodeInput::Stop(reason.into()))),
        }
    }
}

/// What each node counted when it last told, and where the vCPUs are.
#[derive(Clone, Debug, Default)]
pub struct Statistics(Arc<Mutex<Told>>);

#[derive(Debug)]
struct Told {
    begun: Instant,
    counted: BTreeMap<usize, Value>,
    /// What each node's vCPUs did when they were measured last.
    measured: BTreeMap<usize, Vec<VcpuMeasure>>,
    /// Node and epoch of each vCPU's owner.
    owners: Vec<(usize, u64)>,
}

impl Default for Told {
    fn default() -> Self {
        Self { begun: Instant::now(), counted: BTreeMap::new(), measured: BTreeMap::new(), owners: Vec::new() }
    }
}

impl Statistics {
    /// A machine starts: its vCPUs are where they were placed.
    pub fn start(&self, placement: &Placement) {
        let owners = (0..placement.cpus()).map(|vcpu| (placement.owner(vcpu).unwrap_or(0), 0));
        let mut told = self.lock();
        told.owners = owners.collect();
        told.measured.clear();
    }

    /// The last word of a node, with the newest measurements of its vCPUs as `vcpu_loads`; null if it has said
    /// nothing yet.
    pub fn of(&self, node: usize) -> Value {
        let told = self.lock();
        let mut figures = told.counted.get(&node).cloned().unwrap_or_default();
        if let Some(measured) = told.measured.get(&node) {
            let here = |m: &&VcpuMeasure| told.owners.get(m.vcpu as usize) == Some(&(node, m.epoch));
            figures["vcpu_loads"] = measured.iter().filter(here).map(|measured| json!(measured)).collect();
        }
        figures
    }

    /// Node and epoch of each vCPU's owner.
    fn owners(&self) -> Vec<(usize, u64)> {
        self.lock().owners.clone()
    }

    /// The node that runs a vCPU; `None`: there is no such vCPU.
    pub fn owner(&self, vcpu: u32) -> Option<usize> {
        self.lock().owners.get(vcpu as usize).map(|owner| owner.0)
    }

    /// Milliseconds since some moment before the machine's start; the `at_ms` of a node's figures is when they came.
    pub fn now_ms(&self) -> u64 {
        self.lock().begun.elapsed().as_millis() as u64
    }

    /// The vCPUs that run on a node.
    pub fn vcpus(&self, node: usize) -> Vec<usize> {
        let told = self.lock();
        told.owners.iter().enumerate().filter(|(_, (owner, _))| *owner == node).map(|(vcpu, _)| vcpu).collect()
    }

    /// Keeps what a node told.
    pub(super) fn keep(&self, node: usize, json: &Value) {
        if json["event"] == "statistics" {
            let mut figures = json.clone();
            figures["at_ms"] = self.now_ms().into();
            self.lock().counted.insert(node, figures);
        }
        if let ("migrated", Some(vcpu), Some(epoch)) =
            (json["event"].as_str().unwrap_or_default(), json["vcpu"].as_u64(), json["epoch"].as_u64())
        {
            self.moved(vcpu, node, epoch);
        }
    }

    /// A vCPU came to a node.
    pub(super) fn moved(&self, vcpu: u64, node: usize, epoch: u64) {
        let mut told = self.lock();
        let owner = usize::try_from(vcpu).ok().and_then(|vcpu| told.owners.get_mut(vcpu));
        // News of an older move may come later.
        if let Some(owner) = owner.filter(|owner| owner.1 < epoch) {
            *owner = (node, epoch);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running machine as the front end sees it; `ports[i]` is node `i`.
pub struct Attended<'a> {
    /// The way to each node.
    pub ports: Vec<Port>,
    /// What each host is called.
    pub names: Vec<String>,
    /// All that happens.
    pub events: &'a Receiver<FrontEvent>,
    /// Where events are told.
    pub reporter: Reporter,
    /// Where the nodes' figures are kept.
    pub statistics: Statistics,
    /// Who decides where vCPUs run.
    pub schedule: Schedule,
}

/// Who asked for a move.
enum Asker {
    User(Sender<MoveAnswer>),
    Scheduler(Decision),
}

/// Moves that are under way, by number.
#[derive(Default)]
struct Moves {
    asked: BTreeMap<u64, (u32, usize, Asker)>,
    next: u64,
}

impl Attended<'_> {
    /// Attends the machine until it ended, on every node that could still say so. The flag says
    /// whether all nodes reported and can run another machine.
    pub fn run(self) -> (Ending, bool) {
        let mut ends = Ends::new(self.names.clone());
        let mut quit: Option<String> = None;
        let mut end_by: Option<Instant> = None;
        let mut moves = Moves::default();
        while !ends.all() {
            let event = match end_by {
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => self.events.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            let Ok(event) = event else { break };
            let wish = match event {
                FrontEvent::Node(_, NodeEvent::Console(bytes)) => show(&bytes).err(),
                FrontEvent::Node(node, NodeEvent::Event(line, json)) => {
                    let json = with_node(json, node);
                    self.statistics.keep(node, &json);
                    self.reporter.event(&line, &json);
                    None
                }
                FrontEvent::Node(node, NodeEvent::Ended(end)) => {
                    ends.ended(node, end);
                    self.settle(&mut ends, quit.is_some(), &mut end_by);
                    None
                }
                FrontEvent::Node(node, NodeEvent::Lost(reason)) => {
                    ends.lost(node, reason);
                    self.settle(&mut ends, quit.is_some(), &mut end_by);
                    None
                }
                FrontEvent::Node(_, NodeEvent::Migrated(id, answer)) => {
                    self.moved(&mut moves, id, answer);
                    None
                }
                FrontEvent::Node(node, NodeEvent::Load(load)) => {
                    self.measured(node, *load, end_by.is_some(), &mut moves);
                    None
                }
                FrontEvent::Migrate { vcpu, node, reply } => {
                    self.migrate(&mut moves, vcpu, node, Asker::User(reply));
                    None
                }
                FrontEvent::Node(node, NodeEvent::Answer(answer)) => {
                    let line = match answer {
                        FromNode::Refused(line) => line,
                        other => format!("its node sent {} out of turn", other.name()),
                    };
                    ends.ended(node, NodeEnd::Failed(line));
                    self.settle(&mut ends, quit.is_some(), &mut end_by);
                    None
                }
                FrontEvent::Typed(Typed::Bytes(bytes)) => {
                    self.ports[0].console(bytes);
                    None
                }
                FrontEvent::Typed(Typed::Help) => {
                    self.reporter.event(console::HELP, &json!({"event": "help"}));
                    None
                }
                FrontEvent::Typed(Typed::Quit) => Some("Ctrl-A x was typed".into()),
                FrontEvent::Quit(reason) => Some(reason),
            };
            if let Some(reason) = wish {
                if quit.is_some() {
                    // Asked twice: no more patience.
                    break;
                }
                self.stop(&mut ends, &reason);
                end_by = Some(Instant::now() + STOP_LIMIT + REPORT_MARGIN);
                quit = Some(reason);
            }
        }
        let all = ends.all_reported();
        match (quit, ends.verdict()) {
            (_, Some(Ending::PowerOff)) => (Ending::PowerOff, all),
            (Some(reason), _) => (Ending::Stopped(reason), all),
            (None, Some(ending)) => (ending, all),
            (None, None) => (Ending::Stopped("no node is left".into()), all),
        }
    }

    /// Has a vCPU moved: node 0 passes it on to the node that runs it.
    fn migrate(&self, moves: &mut Moves, vcpu: u32, node: usize, asker: Asker) {
        self.ports[0].migrate(moves.next, vcpu, node);
        moves.asked.insert(moves.next, (vcpu, node, asker));
        moves.next += 1;
    }

    /// A move is over.
    fn moved(&self, moves: &mut Moves, id: u64, answer: MoveAnswer) {
        let Some((vcpu, node, asker)) = moves.asked.remove(&id) else { return };
        if let MoveAnswer::Moved(epoch) = answer {
            self.statistics.moved(vcpu.into(), node, epoch);
        }
        match asker {
            // Who asked may be gone.
            Asker::User(reply) => drop(reply.send(answer)),
            Asker::Scheduler(decision) => {
                self.schedule.ended(&decision, answer);
                let event = json!({"event": "scheduled", "vcpu": vcpu, "from": decision.from, "to": node,
                    "reason": decision.why(), "moved": matches!(answer, MoveAnswer::Moved(_))});
                self.reporter.event("", &event);
            }
        }
    }

    /// A node measured its vCPUs: the scheduler may want some moved, unless the machine is ending.
    fn measured(&self, node: usize, load: NodeLoad, ending: bool, moves: &mut Moves) {
        let vcpus = load.vcpus.clone();
        let decisions = match self.schedule.report(node, load, &self.statistics.owners()) {
            Ok(decisions) => decisions,
            Err(error) => return tracing::warn!(node, %error, "a node's measurement is not used"),
        };
        self.statistics.lock().measured.insert(node, vcpus);
        for decision in decisions.into_iter().filter(|_| !ending) {
            let (vcpu, to) = (decision.vcpu, decision.to);
            self.migrate(moves, vcpu, to, Asker::Scheduler(decision));
        }
    }

    fn stop(&self, ends: &mut Ends, reason: &str) {
        ends.tell();
        for port in &self.ports {
            port.stop(reason);
        }
    }

    /// Decides, after something was heard of a node's end, how long to wait for the others.
    fn settle(&self, ends: &mut Ends, quitting: bool, end_by: &mut Option<Instant>) {
        if quitting {
            return;
        }
        let limit = match (ends.guest_ended(), ends.node_0()) {
            _ if ends.only_followers() => POWER_OFF_LIMIT,
            (true, false) => POWER_OFF_LIMIT,
            (true, true) => {
                self.stop(ends, "the guest ended");
                STOP_LIMIT + REPORT_MARGIN
            }
            (false, _) => {
                let cause = match ends.verdict() {
                    Some(Ending::Lost { node, .. }) => format!("node {node} is lost"),
                    Some(Ending::Failed { node, .. }) => format!("node {node} failed"),
                    _ => "another node ended".into(),
                };
                self.stop(ends, &cause);
                LOSS_SETTLE
            }
        };
        let end = Instant::now() + limit;
        // Later news may shorten the wait for the rest, never lengthen it.
        *end_by = Some(end_by.map_or(end, |before| before.min(end)));
    }
}

/// Writes the guest's output; the error says that nobody reads it any more.
fn show(bytes: &[u8]) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("standard output: {}", super::errno::describe(&error)))
}

fn with_node(mut json: Value, node: usize) -> Value {
    if let Value::Object(members) = &mut json {
        members.entry("node").or_insert_with(|| node.into());
    }
    json
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::super::schedule::Wanted;
    use super::super::vcpus::Wishes;
    use super::*;
    use crate::node::VcpuState;

    /// Attends two nodes in this process to which `events` happen; returns what each was told too.
    fn attend(events: Vec<FrontEvent>) -> (Ending, bool, Vec<Vec<NodeInput>>) {
        attend_with(events, Statistics::default())
    }

    fn attend_with(events: Vec<FrontEvent>, statistics: Statistics) -> (Ending, bool, Vec<Vec<NodeInput>>) {
        attend_by("off", events, statistics)
    }

    fn attend_by(policy: &str, events: Vec<FrontEvent>, statistics: Statistics) -> (Ending, bool, Vec<Vec<NodeInput>>) {
        let (sender, receiver) = channel();
        let (ports, inputs): (Vec<_>, Vec<_>) = (0..2).map(|_| channel()).unzip();
        for event in events {
            sender.send(event).unwrap();
        }
        let wanted = Wanted { policy: policy.into(), log: None };
        let attended = Attended {
            schedule: Schedule::new(&wanted, vec![1, 1], Wishes::new(3)).unwrap(),
            ports: ports.into_iter().map(Port::Here).collect(),
            names: vec!["a".into(), "b".into()],
            events: &receiver,
            reporter: Reporter::new(true),
            statistics,
        };
        let (ending, all) = attended.run();
        (
            ending,
            all,
            inputs.into_iter().map(|input| input.try_iter().collect()).collect(),
        )
    }

    fn ended(node: usize, end: NodeEnd) -> FrontEvent {
        FrontEvent::Node(node, NodeEvent::Ended(end))
    }

    #[test]
    fn power_off_on_all_nodes() {
        let (ending, all, _) = attend(vec![ended(1, NodeEnd::PowerOff), ended(0, NodeEnd::PowerOff)]);
        assert_eq!((ending, all), (Ending::PowerOff, true));
    }

    #[test]
    fn the_last_figures_of_each_node_are_kept() {
        let statistics = Statistics::default();
        let told = |json: Value| FrontEvent::Node(1, NodeEvent::Event(String::new(), json));
        attend_with(
            vec![
                told(json!({"event": "statistics", "bounces": 1})),
                told(json!({"event": "statistics", "bounces": 2})),
                told(json!({"event": "counters", "bounces": 3})),
                ended(1, NodeEnd::PowerOff),
                ended(0, NodeEnd::PowerOff),
            ],
            statistics.clone(),
        );
        let mut told = statistics.of(1);
        assert!(told["at_ms"].take().is_u64());
        assert_eq!(told, json!({"event": "statistics", "bounces": 2, "node": 1, "at_ms": null}));
        assert_eq!(statistics.of(0), Value::Null);
    }

    #[test]
    fn moves_are_answered_and_the_newest_owner_counts() {
        let statistics = Statistics::default();
        statistics.start(&Placement {
            hosts: vec![
                krg_scheduler::HostShare { vcpus: vec![0, 1], memory: 0 },
                krg_scheduler::HostShare { vcpus: vec![2], memory: 0 },
            ],
        });
        let (reply, answer) = channel();
        let came = |node, vcpu: u32, epoch: u64| {
            FrontEvent::Node(node, NodeEvent::Event(String::new(), json!({"event": "migrated", "vcpu": vcpu, "epoch": epoch})))
        };
        let (_, _, told) = attend_with(
            vec![
                FrontEvent::Migrate { vcpu: 1, node: 1, reply },
                FrontEvent::Node(0, NodeEvent::Migrated(0, MoveAnswer::Moved(1))),
                FrontEvent::Node(0, NodeEvent::Migrated(7, MoveAnswer::Moved(9))),
                came(0, 2, 2),
                came(1, 2, 1),
                came(1, 99, 1),
                ended(1, NodeEnd::PowerOff),
                ended(0, NodeEnd::PowerOff),
            ],
            statistics.clone(),
        );
        assert!(matches!(told[0][0], NodeInput::Migrate { id: 0, vcpu: 1, node: 1 }));
        assert_eq!(answer.recv(), Ok(MoveAnswer::Moved(1)));
        assert_eq!((statistics.vcpus(0), statistics.vcpus(1)), (vec![0, 2], vec![1]));
    }

    /// A node's report: these vCPUs run all the time, half of it without a CPU.
    fn crowded(node: usize, vcpus: &[(u32, u64)]) -> FrontEvent {
        let measured = |&(vcpu, epoch): &(u32, u64)| VcpuMeasure {
            vcpu,
            epoch,
            ran: 0.5,
            waited: 0.5,
            stalled: 0.0,
            faults: vec![(1 - node, 2.0)],
            footprint: 0,
            state: VcpuState::Running,
        };
        let vcpus = vcpus.iter().map(measured).collect();
        FrontEvent::Node(node, NodeEvent::Load(Box::new(NodeLoad { vcpus, ..NodeLoad::default() })))
    }

    #[test]
    fn what_nodes_measure_is_kept_and_the_scheduler_has_its_moves_made() {
        let machine = || {
            let statistics = Statistics::default();
            let share = |vcpus: Vec<u32>| krg_scheduler::HostShare { vcpus, memory: 0 };
            statistics.start(&Placement { hosts: vec![share(vec![0, 1, 2]), share(vec![])] });
            statistics
        };
        let ends = || [ended(1, NodeEnd::PowerOff), ended(0, NodeEnd::PowerOff)];
        let (statistics, loads) = (machine(), || [crowded(1, &[]), crowded(0, &[(0, 0), (1, 0), (2, 0)])]);
        let answer = FrontEvent::Node(0, NodeEvent::Migrated(0, MoveAnswer::Moved(1)));
        let events = loads().into_iter().chain([answer]).chain(ends()).collect();
        let (_, _, told) = attend_by("affinity", events, statistics.clone());
        let NodeInput::Migrate { id: 0, vcpu, node: 1 } = told[0][0] else { panic!("nothing moves") };
        assert_eq!(statistics.vcpus(1), [vcpu as usize]);
        let loads_of = |node: usize| statistics.of(node)["vcpu_loads"].as_array().map(Vec::len);
        assert_eq!((loads_of(0), loads_of(1)), (Some(2), Some(0)), "the one that moved is not measured yet");
        assert_eq!(statistics.of(0)["vcpu_loads"][0]["faults"], json!([[1, 2.0]]));
        assert_eq!(statistics.of(0)["vcpu_loads"][0]["state"], "running");
        // Not what can't be, not if it is off, and not when the machine is ending.
        let nonsense = [crowded(1, &[]), crowded(0, &[(0, 0), (1, 0), (7, 0)])];
        for (policy, events) in [
            ("affinity", nonsense.into_iter().chain(ends()).collect::<Vec<_>>()),
            ("off", loads().into_iter().chain(ends()).collect()),
            ("affinity", [FrontEvent::Quit("enough".into())].into_iter().chain(loads()).chain(ends()).collect()),
        ] {
            let (_, _, told) = attend_by(policy, events, machine());
            assert!(told.iter().flatten().all(|input| !matches!(input, NodeInput::Migrate { .. })), "{policy}");
        }
    }

    #[test]
    fn a_follower_may_be_quicker_than_the_node_that_powered_off() {
        let (ending, all, _) = attend(vec![ended(1, NodeEnd::PeerEnded(0)), ended(0, NodeEnd::PowerOff)]);
        assert_eq!((ending, all), (Ending::PowerOff, true));
    }

    #[test]
    fn a_lost_node_stops_the_others() {
        let start = Instant::now();
        let (ending, all, told) = attend(vec![FrontEvent::Node(1, NodeEvent::Lost("closed".into()))]);
        assert_eq!(
            (ending, all),
            (
                Ending::Lost {
                    node: 1,
                    reason: "closed".into()
                },
                false
            )
        );
        assert!(matches!(&told[0][..], [NodeInput::Stop(reason)] if reason == "node 1 is lost"));
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn typed_bytes_go_to_node_0_and_quitting_waits_for_the_nodes() {
        let (ending, all, told) = attend(vec![
            FrontEvent::Typed(Typed::Bytes(b"x".to_vec())),
            FrontEvent::Typed(Typed::Quit),
            ended(0, NodeEnd::Stopped("told".into())),
            ended(1, NodeEnd::PeerLost(0)),
        ]);
        assert_eq!((ending, all), (Ending::Stopped("Ctrl-A x was typed".into()), true));
        assert!(matches!(&told[0][..], [NodeInput::Console(bytes), NodeInput::Stop(_)] if bytes == b"x"));
        assert!(matches!(&told[1][..], [NodeInput::Stop(_)]));
    }
}
