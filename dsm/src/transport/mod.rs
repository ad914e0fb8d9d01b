//! Frames between nodes: one ordered, reliable stream per pair of nodes.
//!
//! A frame is a class (what kind of message, for dispatch and counting) and a payload. The
//! coherence protocol relies on the order: what node A sends to node B arrives in the order in
//! which A's calls of [`Transport::send`] returned, or the stream ends. Long frames that somebody waits for less
//! urgently ([`Transport::send_from`]) may go another way, on which only they keep their order.

mod counters;
mod deadline;
mod ends;
mod frame;
mod link;
mod queue;
pub mod rdma;
mod socket;
mod tcp;
mod threads;

pub use counters::{ClassCount, PeerCount};
pub use deadline::Deadline;
pub use frame::{HEARTBEAT, MAX_PAYLOAD, Malformed};
pub use queue::Body;
pub use socket::prepare;
pub use tcp::{Config, Streams, TcpTransport};

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use crate::errno::Errno;

/// Carries frames to the other nodes: over TCP ([`TcpTransport`]) or RDMA ([`rdma::RdmaTransport`]).
pub trait Transport: Send + Sync {
    /// Starts receiving, queued sending and heartbeats. Frames sent before may leave before.
    ///
    /// # Errors
    /// Called before, or no threads; then none is left running.
    fn start(&self, handler: Arc<dyn Handler>) -> Result<(), TransportError>;

    /// Sends `parts`, one after the other, as one frame to node `to`. May be called with any lock
    /// held: it does not wait for the peer and does not call the [`Handler`]. What the network
    /// does not take at once is copied and sent later, in order.
    ///
    /// # Errors
    /// Nothing is sent, or the peer is lost: then the handler hears of it once, from another
    /// thread, and later frames to that peer are refused.
    fn send(&self, to: usize, class: u8, parts: &[&[u8]]) -> Result<(), SendError>;

    /// Like [`Transport::send`] for several frames of one class, in order. They leave together: on a
    /// network that takes packets, in as few as possible.
    ///
    /// # Errors
    /// As for [`Transport::send`]; frames before one that is refused may have been sent.
    fn send_together(&self, to: usize, class: u8, frames: &[Vec<u8>]) -> Result<(), SendError> {
        frames.iter().try_for_each(|frame| self.send(to, class, &[frame]))
    }

    /// Like [`Transport::send`] for a frame of `head` and a part of `body` that may be sent later, from where it is.
    /// Such frames arrive in their order, but before or after others that were sent at other times.
    ///
    /// # Errors
    /// As for [`Transport::send`].
    fn send_from(&self, to: usize, class: u8, head: &[u8], body: &Body, part: Range<usize>) -> Result<(), SendError> {
        let bytes = (**body).as_ref();
        self.send(to, class, &[head, &bytes[part.start.min(bytes.len())..part.end.min(bytes.len())]])
    }

    /// What went to and came from a node so far.
    fn count(&self, peer: usize) -> PeerCount;

    /// Sends what is queued, for a moment at most, ends all streams and waits for all threads
    /// (except the calling one). After it returns the handler is not called any more.
    fn shutdown(&self);
}

/// Receives frames and news of peers. Calls for one peer come one at a time and in order, those
/// for different peers at the same time, and so do those for frames of [`Transport::send_from`] and others of the
/// same peer. It may send; the longer it takes, the longer frames of
/// that peer wait, but the peer does not count as silent meanwhile.
pub trait Handler: Send + Sync {
    /// A frame has come. The payload may hold anything: check it.
    fn frame(&self, peer: usize, class: u8, payload: &[u8]);
    /// Instead of [`Handler::frame`] for one of [`Transport::send_from`] whose payload, `len` bytes, is still coming, where
    /// it can be put straight to where it belongs. What the handler does not read is skipped.
    ///
    /// # Errors
    /// Those of `payload`, which mean that the stream has ended.
    fn long_frame(&self, peer: usize, class: u8, len: usize, payload: &mut dyn Read) -> io::Result<()> {
        let mut bytes = vec![0; len];
        payload.read_exact(&mut bytes)?;
        self.frame(peer, class, &bytes);
        Ok(())
    }
    /// The last news of a peer; no frame of it follows.
    fn event(&self, event: PeerEvent);
}

/// How the stream of a peer ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerEvent {
    /// The peer or the way to it is gone.
    #[error("node {peer}: {reason}")]
    Lost {
        /// Node number.
        peer: usize,
        /// How it showed.
        reason: LostReason,
    },
    /// The peer sent something that is no frame.
    #[error("node {peer}: {reason}; its version may differ from ours")]
    Malformed {
        /// Node number.
        peer: usize,
        /// What was wrong.
        reason: Malformed,
    },
}

/// How the loss of a peer showed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// It closed its end: the process ended.
    #[error("connection closed by the peer")]
    Closed,
    /// Nothing came, not even heartbeats.
    #[error("nothing heard for {millis} ms; check the host and the network")]
    Silent {
        /// For how long.
        millis: u64,
    },
    /// The connection broke.
    #[error("connection broke with {0}; check the host and the network")]
    Broken(Errno),
    /// It took too little of what we sent for too long.
    #[error("{bytes} bytes wait to be sent; the network or the peer is too slow")]
    Overrun {
        /// Bytes in the queue.
        bytes: usize,
    },
}

/// Why a frame was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// There is no such peer, or it is this node.
    #[error("node {peer}: not a peer of this node")]
    NoPeer {
        /// Node number.
        peer: usize,
    },
    /// The payload is too long.
    #[error("frame for node {peer}: {len} bytes are more than {MAX_PAYLOAD}; send it in parts")]
    TooLong {
        /// Node number.
        peer: usize,
        /// Payload length in bytes.
        len: usize,
    },
    /// The class is the transport's own.
    #[error("frame for node {peer}: class {HEARTBEAT:#x} is reserved for heartbeats")]
    Reserved {
        /// Node number.
        peer: usize,
    },
    /// The stream has ended.
    #[error("node {peer}: the connection is gone")]
    Gone {
        /// Node number.
        peer: usize,
    },
}

/// Why a transport could not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// A socket refused an option that we need.
    #[error("connection to node {peer}: setting {option} failed with {errno}")]
    Option {
        /// Node number.
        peer: usize,
        /// Name of the option.
        option: &'static str,
        /// Why.
        errno: Errno,
    },
    /// No thread.
    #[error("transport: starting a thread failed with {errno}; raise the limit of processes")]
    Thread {
        /// Why.
        errno: Errno,
    },
    /// [`Transport::start`] was called twice, or after shutdown.
    #[error("transport: started already")]
    Started,
    /// No RDMA connection came about.
    #[error("RDMA connection to node {peer}: {error}")]
    Rdma {
        /// Node number.
        peer: usize,
        /// Why.
        error: rdma::RdmaError,
    },
}
