//! The node daemon: listens, authenticates, and gives each connection to its session.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::{Deadline, Streams};

use super::errno;
use super::handshake::{self, HANDSHAKE_LIMIT, Role};
use super::mesh::Acceptance;
use super::node_session;
use super::offer::Offer;
use super::secret::Secret;
use crate::node::{NodeEnd, NodeInput, NodeOutput, NodeSpec};

/// Connections that may be in their handshake at one time. One more costs the oldest its place,
/// so that strangers who hold theirs for long can't keep others out.
const MAX_HANDSHAKES: usize = 64;
/// How long a machine may take to stop when it is told to.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(3);

/// What runs a node's part of a machine: [`crate::node::run`], or something simpler in tests.
pub trait Runner: Send + Sync + 'static {
    /// What this host can give.
    fn offer(&self) -> Offer {
        Offer::of_this_host()
    }

    /// Runs until the machine ends; see [`crate::node::run`].
    fn run(
        &self,
        spec: NodeSpec,
        peers: Vec<Option<Streams>>,
        input: Receiver<NodeInput>,
        output: Arc<dyn NodeOutput>,
    ) -> NodeEnd;
}

impl<F> Runner for F
where
    F: Fn(NodeSpec, Vec<Option<Streams>>, Receiver<NodeInput>, Arc<dyn NodeOutput>) -> NodeEnd
        + Send
        + Sync
        + 'static,
{
    fn run(
        &self,
        spec: NodeSpec,
        peers: Vec<Option<Streams>>,
        input: Receiver<NodeInput>,
        output: Arc<dyn NodeOutput>,
    ) -> NodeEnd {
        self(spec, peers, input, output)
    }
}

/// Why a daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The address can't be listened on.
    #[error("can't listen on {address}: {}", errno::describe(source))]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A machine did not stop; only the end of the process gets rid of it.
    #[error("the machine did not stop within {} s; the node gives up", STOP_LIMIT.as_secs())]
    Stuck,
}

/// The session that has this node.
pub(super) struct Claim {
    /// For whoever comes second.
    pub machine: String,
    /// Where its front end is.
    pub front_end: SocketAddr,
    /// Which peers may connect, between `Prepare` and the last of them.
    pub acceptance: Option<Acceptance>,
    /// The running machine's input.
    pub input: Option<Sender<NodeInput>>,
}

/// What the daemon's threads have in common.
pub(super) struct Shared {
    pub secret: Secret,
    pub runner: Arc<dyn Runner>,
    claim: Mutex<Option<Claim>>,
    handshakes: Mutex<VecDeque<(u64, TcpStream)>>,
    next_handshake: AtomicU64,
    ending: AtomicBool,
    stuck: AtomicBool,
    address: SocketAddr,
}

impl Shared {
    pub fn claim(&self) -> MutexGuard<'_, Option<Claim>> {
        self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the daemon because a machine won't stop.
    pub fn give_up(&self) {
        self.stuck.store(true, Ordering::SeqCst);
        self.end();
    }

    fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, HANDSHAKE_LIMIT);
    }

    fn handshakes(&self) -> MutexGuard<'_, VecDeque<(u64, TcpStream)>> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A node daemon that listens, but doesn't accept yet.
pub struct Daemon {
    listener: TcpListener,
    shared: Arc<Shared>,
}

/// Ends a [`Daemon`] from another thread.
#[derive(Clone)]
pub struct DaemonHandle(Arc<Shared>);

impl DaemonHandle {
    /// Stops the machine if one runs, with `reason` as its text, waits for it for a limited time,
    /// and makes [`Daemon::serve`] return.
    pub fn stop(&self, reason: &str) {
        if let Some(input) = self.0.claim().as_ref().and_then(|claim| claim.input.as_ref()) {
            let _ = input.send(NodeInput::Stop(reason.into()));
        }
        let end = Instant::now() + STOP_LIMIT;
        while self.0.claim().as_ref().is_some_and(|claim| claim.input.is_some()) && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        self.0.end();
    }
}

impl Daemon {
    /// Listens on `address`.
    ///
    /// # Errors
    /// [`DaemonError::Listen`].
    pub fn bind(address: SocketAddr, secret: Secret, runner: Arc<dyn Runner>) -> Result<Self, DaemonError> {
        let failed = |source| DaemonError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Shared {
            secret,
            runner,
            claim: Mutex::new(None),
            handshakes: Mutex::new(VecDeque::new()),
            next_handshake: AtomicU64::new(0),
            ending: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            address,
        };
        Ok(Self {
            listener,
            shared: Arc::new(shared),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// For ending it.
    pub fn handle(&self) -> DaemonHandle {
        DaemonHandle(self.shared.clone())
    }

    /// Serves one session after another until [`DaemonHandle::stop`].
    ///
    /// # Errors
    /// [`DaemonError::Stuck`].
    pub fn serve(self) -> Result<(), DaemonError> {
        loop {
            let accepted = self.listener.accept();
            if self.shared.ending.load(Ordering::SeqCst) {
                return if self.shared.stuck.load(Ordering::SeqCst) {
                    Err(DaemonError::Stuck)
                } else {
                    Ok(())
                };
            }
            match accepted {
                Ok((stream, from)) => self.take(stream, from),
                Err(error) => {
                    tracing::warn!("accept: {}", errno::describe(&error));
                    // Out of descriptors, most likely: those of handshakes come back in seconds.
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Gives a new connection its thread, and its place among the handshakes.
    fn take(&self, stream: TcpStream, from: SocketAddr) {
        let Ok(clone) = stream.try_clone() else { return };
        let number = self.shared.next_handshake.fetch_add(1, Ordering::Relaxed);
        let oldest = {
            let mut handshakes = self.shared.handshakes();
            handshakes.push_back((number, clone));
            if handshakes.len() > MAX_HANDSHAKES {
                handshakes.pop_front()
            } else {
                None
            }
        };
        if let Some((_, oldest)) = oldest {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        let shared = self.shared.clone();
        let spawned = thread::Builder::new().name("connection".into()).spawn(move || {
            let result = handshake::accept(&mut Deadline::new(&stream, Instant::now() + HANDSHAKE_LIMIT), |role| key_for(&shared, role));
            shared.handshakes().retain(|(other, _)| *other != number);
            match result {
                Ok(role) => admit(&shared, stream, from, role),
                Err(error) => tracing::warn!("connection from {from} refused: {error}"),
            }
        });
        if spawned.is_err() {
            self.shared.handshakes().retain(|(other, _)| *other != number);
        }
    }
}

/// The key somebody of `role` has to prove now.
fn key_for(shared: &Shared, role: &Role) -> Option<Secret> {
    match role {
        Role::Control => Some(shared.secret.clone()),
        Role::Peer { .. } => shared.claim().as_ref()?.acceptance.as_ref()?.key(role),
    }
}

/// Gives an authenticated connection to whom it is for.
fn admit(shared: &Arc<Shared>, stream: TcpStream, from: SocketAddr, role: Role) {
    if let Err(error) = handshake::settle(&stream) {
        tracing::warn!("connection from {from}: {}", errno::describe(&error));
        return;
    }
    match role {
        Role::Control => node_session::serve(shared, stream, from),
        Role::Peer { .. } => {
            if let Some(acceptance) = shared.claim().as_ref().and_then(|claim| claim.acceptance.as_ref()) {
                acceptance.deliver(&role, stream);
            }
        }
    }
}
