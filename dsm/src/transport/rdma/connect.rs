//! Making the connections to all peers.

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use super::device::RdmaPort;
use super::exchange::{self, BadDescription, Description};
use super::link::{self, Link};
use super::verbs::{Completion, Endpoint, VerbsError};
use super::{Peer, credits};
use crate::errno::Errno;
use crate::transport::{Config, LostReason, TransportError};

/// Slots of each ring for messages: 2 MiB.
const MESSAGE_SLOTS: u16 = 128;
/// Of each for blocks: 512 KiB, as much as 100 Gbit/s carry in 40 us. Less than for messages, because a message may
/// find all of it under way before it, as on `rdma_rxe`. What finds no room waits where it is.
const BLOCK_SLOTS: u16 = 32;

/// How long a peer may take to describe its ends: it may still be busy with its memory.
const DESCRIBE: Duration = Duration::from_secs(20);
/// How long the first message may take once both ends are connected.
const GREET: Duration = Duration::from_secs(3);
/// What a node says when its ends can receive.
const READY: u8 = b'R';

/// Why no RDMA connection to a peer came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RdmaError {
    /// No port at the address.
    #[error("this host has no RDMA device at {0}")]
    NoPort(std::net::IpAddr),
    /// This host's device or library.
    #[error("{0}")]
    Verbs(#[from] VerbsError),
    /// The connection to talk about it.
    #[error("talking about RDMA failed with {0}")]
    Stream(Errno),
    /// The peer gave up.
    #[error("the peer gave up")]
    GaveUp,
    /// The peer's description.
    #[error("{0}")]
    Description(#[from] BadDescription),
    /// Connected, but nothing gets through.
    #[error(
        "nothing gets through by RDMA within {} s; is UDP port 4791 open between the hosts?",
        GREET.as_secs()
    )]
    NoWay,
    /// The first message failed.
    #[error("the first message by RDMA: {0}")]
    First(LostReason),
}

/// A peer's stream and the ends here, for messages and for blocks.
struct Opened {
    stream: TcpStream,
    ends: [Endpoint; 2],
}

/// See [`super::RdmaTransport::connect`].
pub fn connect(peers: Vec<Option<TcpStream>>, config: Config) -> Result<Vec<Option<Peer>>, TransportError> {
    let ports = RdmaPort::of_this_host();
    let random = RandomState::new();
    // Everybody describes all ends before anybody waits for a description: nobody waits in a circle.
    let opened = each(peers, |peer, stream| {
        let packet = |pair: u8| random.hash_one((peer, pair)) as u32;
        Opened::describe(stream, &ports, [packet(0), packet(1)])
    })?;
    let connected = each(opened, |_, opened| opened.connect())?;
    let greeted = each(connected, |peer, connected| connected.greet(peer, config))?;
    each(greeted, |_, peer| {
        peer.links().into_iter().try_for_each(|link| await_greeting(link))?;
        Ok(peer)
    })
}

/// Goes one step on with each peer.
fn each<T, U>(
    peers: Vec<Option<T>>,
    mut step: impl FnMut(usize, T) -> Result<U, RdmaError>,
) -> Result<Vec<Option<U>>, TransportError> {
    let step = |(peer, one): (usize, Option<T>)| {
        let one = one.map(|one| step(peer, one)).transpose();
        one.map_err(|error| TransportError::Rdma { peer, error })
    };
    peers.into_iter().enumerate().map(step).collect()
}

impl Opened {
    /// Opens the ends of a peer and describes them to it.
    fn describe(stream: TcpStream, ports: &[RdmaPort], packets: [u32; 2]) -> Result<Self, RdmaError> {
        let address = stream.local_addr().map_err(stream_error)?.ip();
        let port = RdmaPort::at(ports, address).ok_or(RdmaError::NoPort(address))?;
        let ends = [
            Endpoint::open(port, MESSAGE_SLOTS, packets[0])?,
            Endpoint::open(port, BLOCK_SLOTS, packets[1])?,
        ];
        stream.set_nonblocking(false).map_err(stream_error)?;
        stream.set_nodelay(true).map_err(stream_error)?;
        stream.set_read_timeout(Some(DESCRIBE)).map_err(stream_error)?;
        (&stream)
            .write_all(&ends.each_ref().map(|end| end.describe().encode()).concat())
            .map_err(stream_error)?;
        Ok(Self { stream, ends })
    }

    /// Connects the ends to those that the peer describes.
    fn connect(mut self) -> Result<Self, RdmaError> {
        // One after the other, since another version may have more or less to tell.
        for end in &mut self.ends {
            let mut description = [0; exchange::SIZE];
            self.stream.read_exact(&mut description).map_err(stream_error)?;
            end.connect(&Description::decode(&description, end.slots())?)?;
        }
        self.stream.write_all(&[READY]).map_err(stream_error)?;
        Ok(self)
    }

    /// Sends the first messages, once the peer can receive them.
    fn greet(mut self, peer: usize, config: Config) -> Result<Peer, RdmaError> {
        let mut ready = [0];
        self.stream.read_exact(&mut ready).map_err(stream_error)?;
        if ready != [READY] {
            return Err(BadDescription::Magic.into());
        }
        let peer = Peer::new(peer, self.stream, self.ends, config)?;
        for link in peer.links() {
            link.greet().map_err(RdmaError::First)?;
        }
        Ok(peer)
    }
}

fn stream_error(error: std::io::Error) -> RdmaError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => RdmaError::GaveUp,
        std::io::ErrorKind::WouldBlock => RdmaError::Stream(Errno(libc::ETIMEDOUT)),
        _ => RdmaError::Stream(Errno::of(&error)),
    }
}

/// Waits for the peer's first message, which has no content, and takes no other.
fn await_greeting(link: &Link) -> Result<(), RdmaError> {
    let until = Instant::now() + GREET;
    let broken = |errno| RdmaError::First(LostReason::Broken(errno));
    let mut first = [Completion::default()];
    while link.end.poll_received(&mut first).map_err(broken)? == 0 {
        if Instant::now() >= until {
            return Err(RdmaError::NoWay);
        }
        thread::sleep(Duration::from_micros(200));
    }
    if let Some(failure) = first[0].failure {
        return Err(RdmaError::First(link.cause().unwrap_or_else(|| link::reason(failure))));
    }
    link.end.post_receive().map_err(broken)?;
    match credits::parse(first[0].immediate).and_then(|(len, count)| link.taken(count).map(|()| len)) {
        Ok(0) => Ok(()),
        _ => Err(BadDescription::Values.into()),
    }
}
