//! The connections among the nodes of a session: every node dials those with lower numbers and
//! accepts those with higher ones, on the port it listens on anyway. Over TCP there are two for each pair: one for
//! messages, one for whole blocks of memory. RDMA is agreed on over one.

use std::net::{SocketAddr, TcpStream};
use std::thread;

use krg_dsm::transport::Streams;

use super::handshake::{self, PeerStream, Role};
use super::message::Prepare;
use super::secret::Secret;
use crate::node::NodeTransport;

/// A peer connection that came about, or one line why it can't.
pub type PeerResult = Result<(usize, PeerStream, TcpStream), String>;

/// The connections that each pair of nodes has.
pub fn streams(transport: NodeTransport) -> &'static [PeerStream] {
    match transport {
        NodeTransport::Tcp => &[PeerStream::Messages, PeerStream::Blocks],
        NodeTransport::Rdma => &[PeerStream::Messages],
    }
}

/// The connections of one node that have come about.
pub struct Mesh {
    node: usize,
    streams: &'static [PeerStream],
    /// By the peer, then as in `streams`.
    peers: Vec<Vec<Option<TcpStream>>>,
}

impl Mesh {
    /// None of those that `prepare` asks for.
    pub fn new(prepare: &Prepare) -> Self {
        let streams = streams(prepare.spec.transport);
        let peer = |_| streams.iter().map(|_| None).collect();
        Mesh { node: prepare.spec.node, streams, peers: (0..prepare.addresses.len()).map(peer).collect() }
    }

    /// Takes one. A second one of the same kind is dropped: the first one counts.
    pub fn add(&mut self, peer: usize, kind: PeerStream, stream: TcpStream) {
        let at = self.streams.iter().position(|other| *other == kind);
        match at.and_then(|at| self.peers.get_mut(peer)?.get_mut(at)) {
            Some(place @ None) => *place = Some(stream),
            _ => tracing::warn!("node {peer} connected twice"),
        }
    }

    /// The first node to which a connection is missing.
    pub fn missing(&self) -> Option<usize> {
        let is_missing = |(peer, streams): (usize, &Vec<Option<TcpStream>>)| peer != self.node && streams.iter().any(Option::is_none);
        self.peers.iter().enumerate().position(is_missing)
    }

    /// The streams by node; `None` at this node's own place.
    pub fn into_streams(self) -> Vec<Option<Streams>> {
        let streams = |peer: Vec<Option<TcpStream>>| {
            let mut streams = peer.into_iter();
            Some(Streams { messages: streams.next()??, blocks: streams.next().flatten() })
        };
        self.peers.into_iter().map(streams).collect()
    }
}

/// Which peers a node accepts.
pub struct Acceptance {
    session: [u8; 32],
    node: usize,
    hosts: usize,
    key: Secret,
    streams: &'static [PeerStream],
    deliver: Box<dyn Fn(PeerResult) + Send + Sync>,
}

impl Acceptance {
    /// Accepts the peers of `prepare`'s session and gives each to `deliver`.
    pub fn new(prepare: &Prepare, secret: &Secret, deliver: impl Fn(PeerResult) + Send + Sync + 'static) -> Self {
        Self {
            session: prepare.session,
            node: prepare.spec.node,
            hosts: prepare.addresses.len(),
            key: secret.peer_key(&prepare.session),
            streams: streams(prepare.spec.transport),
            deliver: Box::new(deliver),
        }
    }

    /// The key for `role`, if it is a peer that has to dial this node.
    pub fn key(&self, role: &Role) -> Option<Secret> {
        self.number(role).map(|_| self.key.clone())
    }

    /// Takes an authenticated peer.
    pub fn deliver(&self, role: &Role, stream: TcpStream) {
        if let (Some(from), Role::Peer { stream: kind, .. }) = (self.number(role), role) {
            (self.deliver)(Ok((from, *kind, stream)));
        }
    }

    fn number(&self, role: &Role) -> Option<usize> {
        let Role::Peer { from, to, session, stream } = role else {
            return None;
        };
        let (from, to) = (*from as usize, *to as usize);
        let is_ours = *session == self.session && to == self.node && self.streams.contains(stream);
        (is_ours && from > self.node && from < self.hosts).then_some(from)
    }
}

/// Dials every node below `prepare`'s own, each on a thread of its own, and gives the results to
/// `deliver`.
///
/// # Errors
/// When the system gives no thread.
pub fn dial_lower(
    prepare: &Prepare,
    secret: &Secret,
    deliver: impl Fn(PeerResult) + Clone + Send + 'static,
) -> std::io::Result<()> {
    let key = secret.peer_key(&prepare.session);
    let from = prepare.spec.node;
    let streams = streams(prepare.spec.transport);
    for (to, address) in prepare.addresses.iter().copied().enumerate().take(from) {
        let (key, deliver, session) = (key.clone(), deliver.clone(), prepare.session);
        let name = prepare.spec.host_names.get(to).cloned().unwrap_or_default();
        let dial_all = move || {
            for stream in streams {
                let role = Role::Peer { from: from as u32, to: to as u32, session, stream: *stream };
                let dialled = dial(to, role, address, &name, &key);
                let failed = dialled.is_err();
                deliver(dialled.map(|dialled| (to, *stream, dialled)));
                if failed {
                    return;
                }
            }
        };
        thread::Builder::new().name(format!("dial-{to}")).spawn(dial_all)?;
    }
    Ok(())
}

fn dial(to: usize, role: Role, address: SocketAddr, name: &str, key: &Secret) -> Result<TcpStream, String> {
    handshake::dial(address, role, key).map_err(|error| format!("can't connect to node {to} ({name}) at {address}: {error}"))
}
