//! Attending a running machine: console, events, requests to end, and the nodes' ends.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use krg_scheduler::Placement;
use serde_json::{Value, json};

use super::console::{self, Typed};
use super::daemon::STOP_LIMIT;
use super::link::LinkSender;
use super::message::{FromNode, ToNode};
use super::report::Reporter;
use super::verdict::{Ending, Ends};
use crate::node::{MoveAnswer, NodeEnd, NodeInput};

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
    /// Node and epoch of each vCPU's owner.
    owners: Vec<(usize, u64)>,
}

impl Default for Told {
    fn default() -> Self {
        Self { begun: Instant::now(), counted: BTreeMap::new(), owners: Vec::new() }
    }
}

impl Statistics {
    /// A machine starts: its vCPUs are where they were placed.
    pub fn start(&self, placement: &Placement) {
        let owners = (0..placement.cpus()).map(|vcpu| (placement.owner(vcpu).unwrap_or(0), 0));
        self.lock().owners = owners.collect();
    }

    /// The last word of a node; null if it has said nothing yet.
    pub fn of(&self, node: usize) -> Value {
        self.lock().counted.get(&node).cloned().unwrap_or_default()
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
}

impl Attended<'_> {
    /// Attends the machine until it ended, on every node that could still say so. The flag says
    /// whether all nodes reported and can run another machine.
    pub fn run(self) -> (Ending, bool) {
        let mut ends = Ends::new(self.names.clone());
        let mut quit: Option<String> = None;
        let mut end_by: Option<Instant> = None;
        let mut moves: BTreeMap<u64, (u32, usize, Sender<MoveAnswer>)> = BTreeMap::new();
        let mut next_move = 0;
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
                    if let Some((vcpu, node, reply)) = moves.remove(&id) {
                        if let MoveAnswer::Moved(epoch) = answer {
                            self.statistics.moved(vcpu.into(), node, epoch);
                        }
                        // Who asked may be gone.
                        let _ = reply.send(answer);
                    }
                    None
                }
                FrontEvent::Migrate { vcpu, node, reply } => {
                    // Node 0 passes it on to the node that runs the vCPU.
                    self.ports[0].migrate(next_move, vcpu, node);
                    moves.insert(next_move, (vcpu, node, reply));
                    next_move += 1;
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

    use super::*;

    /// Attends two nodes in this process to which `events` happen; returns what each was told too.
    fn attend(events: Vec<FrontEvent>) -> (Ending, bool, Vec<Vec<NodeInput>>) {
        attend_with(events, Statistics::default())
    }

    fn attend_with(events: Vec<FrontEvent>, statistics: Statistics) -> (Ending, bool, Vec<Vec<NodeInput>>) {
        let (sender, receiver) = channel();
        let (ports, inputs): (Vec<_>, Vec<_>) = (0..2).map(|_| channel()).unzip();
        for event in events {
            sender.send(event).unwrap();
        }
        let attended = Attended {
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
