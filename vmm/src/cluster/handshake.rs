//! Mutual authentication, before anything else is read from a connection.
//!
//! ```text
//! connector -> acceptor   hello   magic, version, role, from, to, session, nonce
//! acceptor  -> connector  hello   magic, version, nonce               (only after a good magic)
//! connector -> acceptor   proof   keyed hash over both hellos, "connector"
//! acceptor  -> connector  verdict 1 and keyed hash over both hellos, "acceptor"; or 0 and zeros
//! ```
//!
//! All frames have a fixed size. A stranger sees magic and version, and otherwise only whether
//! its proof was right. The magic and the version stay where they are in every later version,
//! as does the size of a hello, so that two versions can tell each other apart.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use krg_dsm::transport::Deadline;

use super::secret::{Secret, random_bytes};

/// Version of everything that nodes and front ends say to each other.
pub const PROTOCOL_VERSION: u16 = 12;
/// A handshake that takes longer is dropped, however slowly its bytes trickle in.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// First bytes of either side.
pub const MAGIC: [u8; 8] = *b"KRGVMM\r\n";
/// Bytes of a hello.
pub const HELLO_SIZE: usize = 96;
const PROOF_SIZE: usize = 32;
const VERDICT_SIZE: usize = 33;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A front end that directs the node.
    Control,
    /// Another node of a session, with its number and that of the node it means to reach.
    Peer {
        /// The connector's number.
        from: u32,
        /// The acceptor's number.
        to: u32,
        /// Which session.
        session: [u8; 32],
        /// What goes over it.
        stream: PeerStream,
    },
}

/// What goes over a connection between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerStream {
    /// All messages, in their order.
    Messages,
    /// Whole blocks of memory, behind which nothing else is to wait.
    Blocks,
}

/// Why a connection was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other side is something else.
    #[error("what listens there is not krg-vmm: a wrong port?")]
    NotOurs,
    /// Another version of this program.
    #[error(
        "version skew: it speaks protocol version {theirs}, this program {PROTOCOL_VERSION}; install the same krg-vmm on every host"
    )]
    Version {
        /// The other side's version.
        theirs: u16,
    },
    /// A hello that no program of this version sends.
    #[error("a malformed hello")]
    Malformed,
    /// The proof was wrong, or the other side says that ours was.
    #[error("the secrets differ: use the same --secret-file on every host")]
    Secret,
    /// A peer of a session that this node is not in.
    #[error("a peer of another session")]
    Session,
    /// Not done within [`HANDSHAKE_LIMIT`].
    #[error("ETIMEDOUT (no complete handshake within {} s)", HANDSHAKE_LIMIT.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("the connection broke during the handshake: {}", super::errno::describe(.0))]
    Io(io::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Timeout,
            _ => Self::Io(error),
        }
    }
}

/// A hello of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What for; acceptors answer with [`Role::Control`].
    pub role: Role,
    /// Fresh for every connection.
    pub nonce: [u8; 32],
}

impl Hello {
    /// The frame.
    pub fn encode(&self) -> [u8; HELLO_SIZE] {
        let mut frame = [0; HELLO_SIZE];
        frame[..8].copy_from_slice(&MAGIC);
        frame[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        if let Role::Peer { from, to, session, stream } = self.role {
            frame[10] = match stream {
                PeerStream::Messages => 1,
                PeerStream::Blocks => 2,
            };
            frame[12..16].copy_from_slice(&from.to_le_bytes());
            frame[16..20].copy_from_slice(&to.to_le_bytes());
            frame[32..64].copy_from_slice(&session);
        }
        frame[64..].copy_from_slice(&self.nonce);
        frame
    }

    /// Reads a frame, version first.
    ///
    /// # Errors
    /// `NotOurs`, `Version`, or `Malformed` when a field that has to be zero isn't.
    pub fn decode(frame: &[u8; HELLO_SIZE]) -> Result<Self, HandshakeError> {
        if frame[..8] != MAGIC {
            return Err(HandshakeError::NotOurs);
        }
        let theirs = u16::from_le_bytes([frame[8], frame[9]]);
        if theirs != PROTOCOL_VERSION {
            return Err(HandshakeError::Version { theirs });
        }
        let word = |at: usize| u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let mut session = [0; 32];
        session.copy_from_slice(&frame[32..64]);
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&frame[64..]);
        let role = match frame[10] {
            0 => Role::Control,
            kind @ (1 | 2) => Role::Peer {
                from: word(12),
                to: word(16),
                session,
                stream: if kind == 1 { PeerStream::Messages } else { PeerStream::Blocks },
            },
            _ => return Err(HandshakeError::Malformed),
        };
        let hello = Self { role, nonce };
        // Every bit has one meaning: what encodes differently was not made by this version.
        if hello.encode() == *frame {
            Ok(hello)
        } else {
            Err(HandshakeError::Malformed)
        }
    }
}

/// Proves `secret` to the acceptor on `stream` and has it prove it too.
///
/// # Errors
/// Any [`HandshakeError`]; the connection is of no more use then.
pub fn connect(stream: &mut (impl Read + Write), role: Role, secret: &Secret) -> Result<(), HandshakeError> {
    let ours = Hello {
        role,
        nonce: random_bytes()?,
    }
    .encode();
    stream.write_all(&ours)?;
    let mut theirs = [0; HELLO_SIZE];
    read_hello(stream, &mut theirs)?;
    Hello::decode(&theirs)?;
    stream.write_all(proof(secret, "connector", &ours, &theirs).as_bytes())?;
    let mut verdict = [0; VERDICT_SIZE];
    stream.read_exact(&mut verdict)?;
    let (accepted, answer) = (verdict[0] == 1, hash_of(&verdict[1..]));
    if accepted && answer == proof(secret, "acceptor", &ours, &theirs) {
        Ok(())
    } else {
        Err(HandshakeError::Secret)
    }
}

/// Lets the connector on `stream` prove itself and proves ourselves to it. `key` gives the key
/// for a role, or `None` when nobody of that role may connect now.
///
/// # Errors
/// Any [`HandshakeError`]; the connection is of no more use then.
pub fn accept(stream: &mut (impl Read + Write), key: impl Fn(&Role) -> Option<Secret>) -> Result<Role, HandshakeError> {
    let mut theirs = [0; HELLO_SIZE];
    read_hello(stream, &mut theirs)?;
    let ours = Hello {
        role: Role::Control,
        nonce: random_bytes()?,
    }
    .encode();
    let hello = match Hello::decode(&theirs) {
        // Our version is all that a stranger of another version needs, and gets.
        Err(error @ HandshakeError::Version { .. }) => {
            stream.write_all(&ours)?;
            return Err(error);
        }
        other => other?,
    };
    stream.write_all(&ours)?;
    let mut given = [0; PROOF_SIZE];
    stream.read_exact(&mut given)?;
    let secret = key(&hello.role);
    let mut verdict = [0; VERDICT_SIZE];
    let refusal = match &secret {
        None => Some(HandshakeError::Session),
        Some(secret) if hash_of(&given) != proof(secret, "connector", &theirs, &ours) => Some(HandshakeError::Secret),
        Some(secret) => {
            verdict[0] = 1;
            verdict[1..].copy_from_slice(proof(secret, "acceptor", &theirs, &ours).as_bytes());
            None
        }
    };
    stream.write_all(&verdict)?;
    refusal.map_or(Ok(hello.role), Err)
}

/// Reads a hello; stops at the first bytes that are not ours, for those may be all that come.
fn read_hello(stream: &mut impl Read, frame: &mut [u8; HELLO_SIZE]) -> Result<(), HandshakeError> {
    let mut filled = 0;
    while filled < HELLO_SIZE {
        match stream.read(&mut frame[filled..]) {
            Ok(0) if filled == 0 => return Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(0) => return Err(HandshakeError::NotOurs),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        }
        let seen = filled.min(MAGIC.len());
        if frame[..seen] != MAGIC[..seen] {
            return Err(HandshakeError::NotOurs);
        }
    }
    Ok(())
}

fn hash_of(bytes: &[u8]) -> blake3::Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(bytes);
    // Comparing blake3::Hash values takes constant time.
    blake3::Hash::from_bytes(hash)
}

fn proof(secret: &Secret, side: &str, connector: &[u8], acceptor: &[u8]) -> blake3::Hash {
    let mut message = Vec::with_capacity(2 * HELLO_SIZE + side.len());
    message.extend_from_slice(connector);
    message.extend_from_slice(acceptor);
    message.extend_from_slice(side.as_bytes());
    secret.mac(&message)
}

/// Connects to `address` and authenticates, within [`HANDSHAKE_LIMIT`] each. The stream comes
/// back without time limits and without Nagle's delay.
///
/// # Errors
/// Says whether the host could not be reached or did not accept us.
pub fn dial(address: SocketAddr, role: Role, secret: &Secret) -> Result<TcpStream, DialError> {
    let stream = TcpStream::connect_timeout(&address, HANDSHAKE_LIMIT).map_err(DialError::Unreachable)?;
    connect(&mut Deadline::new(&stream, Instant::now() + HANDSHAKE_LIMIT), role, secret)?;
    settle(&stream).map_err(HandshakeError::Io)?;
    Ok(stream)
}

/// Why [`dial`] has no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No TCP connection.
    #[error("unreachable: {}", super::errno::describe(.0))]
    Unreachable(io::Error),
    /// Connected, but not accepted.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

/// Takes the handshake's time limits off a stream.
pub(super) fn settle(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)
}
