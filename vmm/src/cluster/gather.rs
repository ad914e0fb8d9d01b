//! Gathering the hosts: nodes on other machines are connected, nodes on this one found or started.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::error::FrontError;
use super::handshake::{self, DialError, Role};
use super::hosts::{DEFAULT_PORT, HostLine, HostsFile};
use super::link::{Incoming, Link};
use super::local::{LocalNode, is_local};
use super::message::{FromNode, ToNode};
use super::offer::{OFFER_VERSION, Offer};
use super::secret::Secret;

/// How long a node may take to look at its host.
const OFFER_LIMIT: Duration = Duration::from_secs(10);
/// Round trips measured; the shortest counts.
const PINGS: u32 = 5;

/// A node that offered its host.
pub struct Gathered {
    /// Its line in the hosts file.
    pub line: HostLine,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it offers.
    pub offer: Offer,
    /// Shortest round trip on its control connection.
    pub round_trip: Duration,
    /// Its control connection.
    pub link: Link<ToNode, FromNode>,
}

/// All nodes, node 0 first; and those that this process started, to be dropped last.
pub struct Gathering {
    /// In the order of the machine's nodes.
    pub nodes: Vec<Gathered>,
    /// Started here.
    pub started: Vec<LocalNode>,
    /// Hosts left out, with the reason.
    pub missing: Vec<String>,
}

/// Gathers the hosts of `file` for the machine `name`. `program` is started for nodes on this
/// machine, from the calling thread (see [`LocalNode::start`]).
///
/// # Errors
/// The first thing that keeps the machine from being put together.
pub fn gather(file: &HostsFile, secret: Option<Secret>, program: &Path, name: &str) -> Result<Gathering, FrontError> {
    let lines = node_order(file)?;
    let remote = lines.iter().find(|line| !is_local(line.address));
    let own_secret = secret.is_some();
    let secret = match (secret, remote) {
        (Some(secret), _) => secret,
        (None, Some(line)) => return Err(FrontError::NoSecret(line.to_string())),
        (None, None) => Secret::random()?,
    };
    let mut starter = Starter {
        program,
        secret: &secret,
        own_secret,
        started: Vec::new(),
        used: reserved(&lines),
    };
    // Other machines take their time in parallel with this one.
    let results: Vec<Result<Gathered, Failure>> = thread::scope(|scope| {
        let remote: Vec<_> = lines
            .iter()
            .map(|line| {
                let secret = &secret;
                (!is_local(line.address)).then(|| scope.spawn(move || reach(line, line.socket(), secret, name)))
            })
            .collect();
        let local: Vec<_> = lines
            .iter()
            .map(|line| is_local(line.address).then(|| starter.find_or_start(line, name)))
            .collect();
        let panicked = || Err(Failure::Unfit("internal error: its thread panicked".into()));
        let joined = remote
            .into_iter()
            .map(|thread| thread.map(|t| t.join().unwrap_or_else(|_| panicked())));
        joined
            .zip(local)
            .filter_map(|(remote, local)| remote.or(local))
            .collect()
    });
    let started = starter.started;
    let mut nodes = Vec::new();
    let mut missing = Vec::new();
    for (line, result) in lines.iter().zip(results) {
        match result {
            Ok(node) => nodes.push(node),
            // Node 0 can't be done without, and what is wrong rather than away is always said.
            Err(Failure::Away(reason)) if file.nbmin.is_some() && line.line != lines[0].line => {
                missing.push(format!("host {line}: {reason}"));
            }
            Err(Failure::Away(reason) | Failure::Unfit(reason)) => {
                return Err(FrontError::Host {
                    host: line.to_string(),
                    reason,
                });
            }
        }
    }
    match (file.nbmin, missing.first()) {
        (Some(needed), Some(first)) if nodes.len() < needed => Err(FrontError::Nbmin {
            found: nodes.len(),
            needed,
            missing: first.clone(),
        }),
        _ => Ok(Gathering {
            nodes,
            started,
            missing,
        }),
    }
}

/// The hosts in node order: the first one here, then the others as in the file.
fn node_order(file: &HostsFile) -> Result<Vec<HostLine>, FrontError> {
    let mut lines = file.hosts.clone();
    let first = lines
        .iter()
        .position(|line| is_local(line.address))
        .ok_or(FrontError::NoLocalHost)?;
    let node_0 = lines.remove(first);
    lines.insert(0, node_0);
    let remote = lines.iter().find(|line| !is_local(line.address));
    let loopback = lines.iter().find(|line| line.address.is_loopback());
    if let (Some(remote), Some(loopback)) = (remote, loopback) {
        return Err(FrontError::Loopback {
            loopback: loopback.to_string(),
            remote: remote.to_string(),
        });
    }
    match lines[1..].iter().find(|line| !line.disks.is_empty()) {
        Some(line) => Err(FrontError::DiskElsewhere(line.to_string())),
        None => Ok(lines),
    }
}

/// Addresses that lines with a port have taken.
fn reserved(lines: &[HostLine]) -> Vec<SocketAddr> {
    lines
        .iter()
        .filter(|line| line.port.is_some())
        .map(HostLine::socket)
        .collect()
}

/// Why a host is not there.
enum Failure {
    /// Nobody answers: `nbmin` may allow that.
    Away(String),
    /// Somebody does, but not as needed.
    Unfit(String),
}

struct Starter<'a> {
    program: &'a Path,
    secret: &'a Secret,
    /// The user gave a secret, so daemons on this machine may know it.
    own_secret: bool,
    started: Vec<LocalNode>,
    used: Vec<SocketAddr>,
}

impl Starter<'_> {
    /// The node of a line that is this machine: the daemon that listens there, or a new one.
    fn find_or_start(&mut self, line: &HostLine, name: &str) -> Result<Gathered, Failure> {
        let fixed = line.port.is_some();
        let mut wanted = line.socket();
        if fixed || (self.own_secret && !self.used.contains(&wanted)) {
            match handshake::dial(wanted, Role::Control, self.secret) {
                Ok(stream) => {
                    self.used.push(wanted);
                    return attach(line, wanted, stream, name);
                }
                Err(DialError::Unreachable(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if fixed => return Err(Failure::Unfit(error.to_string())),
                // Somebody else's daemon has the default port; the line leaves us free.
                Err(_) => {}
            }
        }
        while !fixed && self.used.contains(&wanted) && wanted.port() < DEFAULT_PORT + 1000 {
            wanted.set_port(wanted.port() + 1);
        }
        let node = LocalNode::start(self.program, wanted, fixed, self.secret).map_err(Failure::Unfit)?;
        let address = node.address;
        self.used.push(address);
        self.started.push(node);
        reach(line, address, self.secret, name)
    }
}

fn reach(line: &HostLine, address: SocketAddr, secret: &Secret, name: &str) -> Result<Gathered, Failure> {
    let stream = handshake::dial(address, Role::Control, secret).map_err(|error| match &error {
        DialError::Unreachable(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => {
            Failure::Away(format!("{error}; start its node there: krg-vmm node --listen {line}"))
        }
        DialError::Unreachable(_) => Failure::Away(error.to_string()),
        DialError::Handshake(_) => Failure::Unfit(error.to_string()),
    })?;
    attach(line, address, stream, name)
}

/// Says hello on an authenticated connection and hears the node's offer.
fn attach(line: &HostLine, address: SocketAddr, stream: TcpStream, name: &str) -> Result<Gathered, Failure> {
    let broken = |error: &dyn std::fmt::Display| Failure::Unfit(format!("its node gave up: {error}"));
    let link = Link::<ToNode, FromNode>::new(stream).map_err(|error| broken(&super::errno::describe(&error)))?;
    let software = env!("CARGO_PKG_VERSION").into();
    link.send(ToNode::Hello {
        software,
        machine: name.into(),
    })
    .map_err(|error| broken(&error))?;
    let offer = match link.receive(OFFER_LIMIT) {
        Some(Incoming::Message(FromNode::Offer(offer))) if offer.version == OFFER_VERSION => *offer,
        other => return Err(not_what_was_due(other, "Offer")),
    };
    let mut round_trip = Duration::MAX;
    for number in 0..PINGS {
        let start = Instant::now();
        link.send(ToNode::Ping(number)).map_err(|error| broken(&error))?;
        match link.receive(OFFER_LIMIT) {
            Some(Incoming::Message(FromNode::Pong(echo))) if echo == number => {}
            other => return Err(not_what_was_due(other, "Pong")),
        }
        round_trip = round_trip.min(start.elapsed());
    }
    Ok(Gathered {
        line: line.clone(),
        address,
        offer,
        round_trip,
        link,
    })
}

fn not_what_was_due(incoming: Option<Incoming<FromNode>>, due: &str) -> Failure {
    Failure::Unfit(match incoming {
        Some(Incoming::Message(FromNode::Refused(reason))) => reason,
        Some(Incoming::Message(other)) => format!("its node sent {} where {due} was due", other.name()),
        Some(Incoming::Lost(reason)) => format!("its node is lost: {reason}"),
        None => format!("its node sent no {due} within {} s", OFFER_LIMIT.as_secs()),
    })
}
