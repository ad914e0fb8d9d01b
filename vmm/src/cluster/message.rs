//! What a front end and a node say to each other after the handshake.
//!
//! ```text
//! front end   Hello  -> Ping* -> Prepare -> Connect -> Start -> Console*, Migrate*, Stop
//! node        Offer  -> Pong* -> Prepared -> Ready  -> Console*, Event*, Load*, Migrated*, Ended
//! ```
//!
//! After `Ended` the node waits for another `Prepare`. `Refused` may take the place of any answer
//! before `Start`; the connection is closed after it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::frame::latin1;
use super::hosts::MAX_HOSTS;
use super::offer::Offer;
use crate::node::{MoveAnswer, NodeEnd, NodeLoad, NodeSpec};

/// From the front end to a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToNode {
    /// First message: who asks.
    Hello {
        /// Version of the program, for people.
        software: String,
        /// Name of the machine to be run.
        machine: String,
    },
    /// Asks for a `Pong` with the same number.
    Ping(u32),
    /// What to run; the node then accepts its peers.
    Prepare(Box<Prepare>),
    /// Every node is prepared: connect the peers.
    Connect,
    /// Every node is ready: run.
    Start,
    /// Bytes typed on the console.
    Console(#[serde(with = "latin1")] Vec<u8>),
    /// Move a vCPU; answered by `Migrated` with the same `id`, unless the machine ends first.
    Migrate {
        /// The front end's number for it.
        id: u64,
        /// The vCPU.
        vcpu: u32,
        /// The node it is to run on.
        node: usize,
    },
    /// End the machine now; the text says why.
    Stop(String),
}

/// One node's part in a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// Random; the peers' key follows from it and the secret.
    pub session: [u8; 32],
    /// What to run.
    pub spec: NodeSpec,
    /// Where every node listens, in the order of the placement.
    pub addresses: Vec<SocketAddr>,
}

impl Prepare {
    /// Checks what the parts say about each other.
    ///
    /// # Errors
    /// One line saying what doesn't fit.
    pub fn check(&self) -> Result<(), String> {
        let hosts = self.spec.placement.hosts.len();
        if hosts == 0 || hosts > MAX_HOSTS {
            return Err(format!("a session of {hosts} hosts: 1 to {MAX_HOSTS} are possible"));
        }
        if self.spec.node >= hosts || self.addresses.len() != hosts || self.spec.host_names.len() != hosts {
            return Err("a session whose node number, addresses or names don't fit its placement".into());
        }
        let shares = &self.spec.placement.hosts;
        let in_order = shares
            .iter()
            .flat_map(|share| &share.vcpus)
            .zip(0..)
            .all(|(vcpu, number)| *vcpu == number);
        if !in_order || shares.iter().any(|share| share.vcpus.is_empty()) {
            return Err("a placement whose vCPUs are not numbered host by host".into());
        }
        let total = self
            .spec
            .placement
            .hosts
            .iter()
            .try_fold(0u64, |sum, share| sum.checked_add(share.memory));
        if total.is_none_or(|total| total >= 1 << 52) {
            return Err("a placement with more memory than an x86 processor can address".into());
        }
        Ok(())
    }
}

/// From a node to the front end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromNode {
    /// What the host can give.
    Offer(Box<Offer>),
    /// Answer to `Ping`.
    Pong(u32),
    /// Not possible; one line for people.
    Refused(String),
    /// The node accepts its peers.
    Prepared,
    /// All peers are connected.
    Ready,
    /// Bytes the guest wrote on the console.
    Console(#[serde(with = "latin1")] Vec<u8>),
    /// Something worth showing.
    Event {
        /// For people.
        line: String,
        /// For programs.
        json: serde_json::Value,
    },
    /// What its vCPUs did since the last time.
    Load(Box<NodeLoad>),
    /// What came of a move.
    Migrated {
        /// The front end's number for it.
        id: u64,
        /// What came of it.
        answer: MoveAnswer,
    },
    /// The node's run is over.
    Ended(NodeEnd),
}

impl ToNode {
    /// The message's name, for error lines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Ping(_) => "Ping",
            Self::Prepare(_) => "Prepare",
            Self::Connect => "Connect",
            Self::Start => "Start",
            Self::Console(_) => "Console",
            Self::Migrate { .. } => "Migrate",
            Self::Stop(_) => "Stop",
        }
    }
}

impl FromNode {
    /// The message's name, for error lines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::Pong(_) => "Pong",
            Self::Refused(_) => "Refused",
            Self::Prepared => "Prepared",
            Self::Ready => "Ready",
            Self::Console(_) => "Console",
            Self::Event { .. } => "Event",
            Self::Load(_) => "Load",
            Self::Migrated { .. } => "Migrated",
            Self::Ended(_) => "Ended",
        }
    }
}
