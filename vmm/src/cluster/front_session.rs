//! The front end's side of a session with all nodes at once. The states are types, as on the
//! nodes' side: a step is possible only from the state before it.

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::attend::{FrontEvent, NodeEvent, Port};
use super::console::Typed;
use super::error::FrontError;
use super::gather::Gathered;
use super::link::{Incoming, Link};
use super::message::{FromNode, Prepare, ToNode};
use super::secret::random_bytes;
use crate::node::NodeSpec;

/// How long all nodes may take for one step; more than a node itself waits for its peers.
const STEP_LIMIT: Duration = Duration::from_secs(15);

/// The nodes wait for a session.
pub struct Offered;
/// The nodes accept their peers.
pub struct Prepared;
/// The nodes are connected to each other.
pub struct Ready;

/// The machine runs.
pub struct Running;

/// One node of the session.
struct Member {
    host: String,
    address: SocketAddr,
    link: Link<ToNode, FromNode>,
}

/// All nodes, in one state.
pub struct Cluster<S> {
    members: Vec<Member>,
    state: PhantomData<S>,
}

impl Cluster<Offered> {
    /// Takes over the gathered nodes. What they say goes to `sender` from now on.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(nodes: Vec<Gathered>, sender: &Sender<FrontEvent>) -> Result<Self, FrontError> {
        let mut members = Vec::new();
        for (number, node) in nodes.into_iter().enumerate() {
            let mut link = node.link;
            let sender = sender.clone();
            link.forward(move |incoming| sender.send(FrontEvent::Node(number, event_of(incoming))).is_ok())
                .map_err(|error| FrontError::System(format!("no thread: {}", super::errno::describe(&error))))?;
            members.push(Member {
                host: node.line.to_string(),
                address: node.address,
                link,
            });
        }
        Ok(Self {
            members,
            state: PhantomData,
        })
    }

    /// Tells every node its part; `specs[i]` is node `i`'s.
    ///
    /// # Errors
    /// When a node refuses or is lost, or the user wants to stop.
    pub fn prepare(self, specs: Vec<NodeSpec>, events: &Receiver<FrontEvent>) -> Result<Cluster<Prepared>, FrontError> {
        let session = random_bytes()
            .map_err(|error| FrontError::System(format!("/dev/urandom: {}", super::errno::describe(&error))))?;
        let addresses: Vec<_> = self.members.iter().map(|member| member.address).collect();
        for (node, (member, spec)) in self.members.iter().zip(specs).enumerate() {
            let prepare = Prepare {
                session,
                spec,
                addresses: addresses.clone(),
            };
            self.send(node, member, ToNode::Prepare(Box::new(prepare)))?;
        }
        self.answers(events, |answer| matches!(answer, FromNode::Prepared))?;
        Ok(self.now())
    }
}

impl Cluster<Prepared> {
    /// Has the nodes connect to each other.
    ///
    /// # Errors
    /// As for `prepare`; a connection that can't be made is named.
    pub fn connect(self, events: &Receiver<FrontEvent>) -> Result<Cluster<Ready>, FrontError> {
        self.send_all(|| ToNode::Connect)?;
        self.answers(events, |answer| matches!(answer, FromNode::Ready))?;
        Ok(self.now())
    }
}

impl Cluster<Ready> {
    /// Starts the machine.
    ///
    /// # Errors
    /// When a node is lost.
    pub fn start(self) -> Result<Cluster<Running>, FrontError> {
        self.send_all(|| ToNode::Start)?;
        Ok(self.now())
    }
}

impl Cluster<Running> {
    /// The ways to the nodes.
    pub fn ports(&self) -> Vec<Port> {
        self.members
            .iter()
            .map(|member| Port::Linked(member.link.sender()))
            .collect()
    }

    /// After every node reported its end: ready for another session.
    pub fn ended(self) -> Cluster<Offered> {
        self.now()
    }
}

impl<S> Cluster<S> {
    fn now<T>(self) -> Cluster<T> {
        Cluster {
            members: self.members,
            state: PhantomData,
        }
    }

    fn lost(&self, node: usize, reason: String) -> FrontError {
        let host = self
            .members
            .get(node)
            .map(|member| member.host.clone())
            .unwrap_or_default();
        FrontError::Lost { node, host, reason }
    }

    fn send(&self, node: usize, member: &Member, message: ToNode) -> Result<(), FrontError> {
        member
            .link
            .send(message)
            .map_err(|error| self.lost(node, error.to_string()))
    }

    fn send_all(&self, message: impl Fn() -> ToNode) -> Result<(), FrontError> {
        self.members
            .iter()
            .enumerate()
            .try_for_each(|(node, member)| self.send(node, member, message()))
    }

    /// Waits until every node gave the answer that is `due`.
    fn answers(&self, events: &Receiver<FrontEvent>, due: impl Fn(&FromNode) -> bool) -> Result<(), FrontError> {
        let end = Instant::now() + STEP_LIMIT;
        let mut answered = vec![false; self.members.len()];
        while let Some(waiting) = answered.iter().position(|answered| !answered) {
            let (node, answer) = match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(FrontEvent::Node(node, NodeEvent::Answer(answer))) => (node, answer),
                Ok(FrontEvent::Node(node, NodeEvent::Lost(reason))) => return Err(self.lost(node, reason)),
                Ok(FrontEvent::Quit(reason)) => return Err(FrontError::Stopped(reason)),
                Ok(FrontEvent::Typed(Typed::Quit)) => return Err(FrontError::Stopped("Ctrl-A x was typed".into())),
                Ok(_) => continue,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let line = format!("no answer within {} s", STEP_LIMIT.as_secs());
                    return Err(self.failed(waiting, line));
                }
            };
            match answer {
                FromNode::Refused(line) => return Err(self.failed(node, line)),
                answer if due(&answer) => {
                    if let Some(answered) = answered.get_mut(node) {
                        *answered = true;
                    }
                }
                answer => return Err(self.failed(node, format!("its node sent {} out of turn", answer.name()))),
            }
        }
        Ok(())
    }

    fn failed(&self, node: usize, line: String) -> FrontError {
        let host = self
            .members
            .get(node)
            .map(|member| member.host.clone())
            .unwrap_or_default();
        FrontError::Failed { node, host, line }
    }
}

fn event_of(incoming: Incoming<FromNode>) -> NodeEvent {
    match incoming {
        Incoming::Lost(reason) => NodeEvent::Lost(reason),
        Incoming::Message(FromNode::Console(bytes)) => NodeEvent::Console(bytes),
        Incoming::Message(FromNode::Event { line, json }) => NodeEvent::Event(line, json),
        Incoming::Message(FromNode::Load(load)) => NodeEvent::Load(load),
        Incoming::Message(FromNode::Migrated { id, answer }) => NodeEvent::Migrated(id, answer),
        Incoming::Message(FromNode::Ended(end)) => NodeEvent::Ended(end),
        Incoming::Message(answer) => NodeEvent::Answer(answer),
    }
}
