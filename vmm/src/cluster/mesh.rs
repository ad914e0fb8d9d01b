//! The connections among the nodes of a session: every node dials those with lower numbers and
//! accepts those with higher ones, on the port it listens on anyway.

use std::net::{SocketAddr, TcpStream};
use std::thread;

use super::handshake::{self, Role};
use super::message::Prepare;
use super::secret::Secret;

/// A peer connection that came about, or one line why it can't.
pub type PeerResult = Result<(usize, TcpStream), String>;

/// Which peers a node accepts.
pub struct Acceptance {
    session: [u8; 32],
    node: usize,
    hosts: usize,
    key: Secret,
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
            deliver: Box::new(deliver),
        }
    }

    /// The key for `role`, if it is a peer that has to dial this node.
    pub fn key(&self, role: &Role) -> Option<Secret> {
        self.number(role).map(|_| self.key.clone())
    }

    /// Takes an authenticated peer.
    pub fn deliver(&self, role: &Role, stream: TcpStream) {
        if let Some(from) = self.number(role) {
            (self.deliver)(Ok((from, stream)));
        }
    }

    fn number(&self, role: &Role) -> Option<usize> {
        let Role::Peer { from, to, session } = role else {
            return None;
        };
        let (from, to) = (*from as usize, *to as usize);
        (*session == self.session && to == self.node && from > self.node && from < self.hosts).then_some(from)
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
    for (to, address) in prepare.addresses.iter().copied().enumerate().take(from) {
        let (key, deliver, session) = (key.clone(), deliver.clone(), prepare.session);
        let name = prepare.spec.host_names.get(to).cloned().unwrap_or_default();
        thread::Builder::new()
            .name(format!("dial-{to}"))
            .spawn(move || deliver(dial(from, to, session, address, &name, &key)))?;
    }
    Ok(())
}

fn dial(from: usize, to: usize, session: [u8; 32], address: SocketAddr, name: &str, key: &Secret) -> PeerResult {
    let role = Role::Peer {
        from: from as u32,
        to: to as u32,
        session,
    };
    match handshake::dial(address, role, key) {
        Ok(stream) => Ok((to, stream)),
        Err(error) => Err(format!("can't connect to node {to} ({name}) at {address}: {error}")),
    }
}
