//! Who runs a vCPU, as one node knows it: a pure state machine for each vCPU at each node.
//!
//! One node is the **owner** of a vCPU; on the others a proxy stands for it. The owner hands the vCPU to
//! another node by one message, [`Message::State`], which is the right to run it: there is only ever one,
//! so there are never two owners. Each carries an **epoch**, one more than the last.
//!
//! # Events
//! What other nodes send a vCPU (interrupts, INIT, SIPI) is numbered by its **origin**, per vCPU. Whoever
//! owns the vCPU takes each origin's events in the order of their numbers, each once; those that come too
//! early wait. The next number of each origin moves with the vCPU. So it doesn't matter which way an event
//! takes, nor in what order messages arrive: nobody is asked to stop sending before a move, and none of
//! these messages has to be in order with another.
//!
//! A node that doesn't own the vCPU sends an event on to the owner it knows, and tells the origin. Events
//! name the epoch of the owner they are for: one that is newer than what the receiver knows is for an owner
//! to be, and waits there for the vCPU.
//!
//! # States
//! - `Away`: another node is the owner; the newest one known, and its epoch.
//! - `Here`: this node is the owner. Events are delivered as they come.
//! - `Leaving`: still the owner. The vCPU's thread was asked to stop ([`Output::leave`]). Once it has
//!   ([`Input::Stopped`]) events are kept. It saves the vCPU, takes out what is pending in its local APIC
//!   (which vCPUs of this node may have sent without this state machine), and hands over both
//!   ([`Input::Saved`]). What was kept follows. Or it can't be saved now ([`Input::Refused`]): then it is `Here`
//!   again, and what was kept is delivered.
//! - `Arriving`: the vCPU's state is here; it doesn't run yet. This node's own vCPUs reach its local APIC
//!   directly from now on. What they sent before went to the owner before: it has to come back first, so
//!   the thread is told to restore ([`Output::restore`]) when this node's own events are complete. What
//!   the proxy still takes out is delivered last.
//!
//! # Invariants
//! 1. At most one node is `Here` or `Leaving`, or has a vCPU's state that is to be restored, or one
//!    [`Message::State`] is on its way.
//! 2. Every event is delivered once, an origin's in the order in which it sent them.
//! 3. Every move that is asked for is answered, by one [`Outcome`].
//! 4. After the loss of a node 1 and 3 hold, and no event is delivered twice. Some are lost with the node, and
//!    nothing waits for them, so the order of others may change, too: the machine ends.
//!
//! `model.rs` checks them in every state that can be reached.

mod machine;
#[cfg(test)]
mod model;
mod state;
mod streams;

pub use machine::Ownership;
pub use state::OwnershipError;

use crate::machine::Event;

/// An event with its place among those of its origin.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Numbered {
    /// The node that sent it first.
    pub origin: usize,
    /// How many events for this vCPU it had sent before.
    pub sequence: u64,
    /// What it is.
    pub event: Event,
}

/// Who asked for a move, and his number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Ticket {
    /// The node he asked.
    pub node: usize,
    /// That node's number for it.
    pub id: u64,
}

/// What nodes tell each other about one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// An event for the vCPU.
    Event {
        /// Epoch of the owner that it is for, as its sender knows.
        epoch: u64,
        /// The event.
        event: Numbered,
    },
    /// To an origin: the vCPU has another owner.
    Moved {
        /// The owner.
        owner: usize,
        /// Its epoch.
        epoch: u64,
    },
    /// You are the owner.
    State(Box<Handover>),
    /// Move the vCPU, if you are its owner; else pass this on.
    Move {
        /// Epoch of the owner that it is for.
        epoch: u64,
        /// Whom the outcome is for.
        ticket: Ticket,
        /// The node to move to.
        to: usize,
    },
    /// What came of a move you asked for.
    Outcome {
        /// Your number for it.
        id: u64,
        /// What came of it.
        outcome: Outcome,
    },
}

/// A vCPU on its way from one owner to the next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handover {
    /// Epoch of the new owner.
    pub epoch: u64,
    /// Who asked for the move.
    pub ticket: Option<Ticket>,
    /// For each origin that has sent any: how many of its events have been delivered.
    pub next: Vec<(usize, u64)>,
    /// A node was lost: events may be missing.
    pub lossy: bool,
    /// Events that were delivered and not taken by the vCPU; the next to be delivered.
    pub pending: Vec<Event>,
    /// The vCPU's state. Not looked at here.
    pub state: Vec<u8>,
}

/// What came of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Outcome {
    /// The vCPU runs on the node.
    Moved {
        /// That node's epoch.
        epoch: u64,
    },
    /// It ran there already.
    AlreadyThere,
    /// The vCPU is being started; a moment later it may be moved.
    Busy,
    /// The node is lost.
    NodeLost,
    /// The vCPU's owner is lost, or may be.
    OwnerLost,
}

/// What happens to a vCPU's ownership at this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// This node has an event for the vCPU: one of its devices, or taken out of the proxy.
    Raise(Event),
    /// Somebody at this node wants the vCPU on node `to`; answered under `id`.
    Move {
        /// His number for it; used once.
        id: u64,
        /// The node, one of the machine's.
        to: usize,
    },
    /// From another node.
    Message {
        /// The node.
        from: usize,
        /// What it says.
        message: Message,
    },
    /// The vCPU's thread, which was asked to leave, is outside KVM_RUN and stays there.
    Stopped,
    /// It has stopped and can't save the vCPU now: the move is off, and it goes on.
    Refused,
    /// It has saved the vCPU and made a proxy of it.
    Saved {
        /// The state.
        state: Vec<u8>,
        /// What was pending in its local APIC.
        pending: Vec<Event>,
    },
    /// It has restored the vCPU and is about to run it.
    Restored,
    /// A node is lost.
    Lost(usize),
}

/// What has to be done, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// To be raised in the vCPU's local APIC here, before another input is given.
    pub deliver: Vec<Event>,
    /// The vCPU's thread is to stop and save, or (`false`) to go on.
    pub leave: Option<bool>,
    /// The vCPU's thread is to restore this.
    pub restore: Option<Vec<u8>>,
    /// Messages to other nodes.
    pub sends: Vec<(usize, Message)>,
    /// Outcomes of moves asked for here.
    pub answers: Vec<(u64, Outcome)>,
    /// This node has become the owner, with this epoch.
    pub arrived: Option<u64>,
}

/// A peer broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A node that is none of the machine's.
    #[error("a message names node {0}, which is none of this machine's")]
    Node(usize),
    /// An event that was delivered already.
    #[error("node {0} sent an event twice")]
    Twice(usize),
    /// More events ahead of their turn than any run of the protocol has.
    #[error("too many events of node {0} are ahead of their turn")]
    Flood(usize),
    /// Another owner or a vCPU's state while this node is the owner, or an old one.
    #[error("node {0} takes a vCPU to be where it is not")]
    Epoch(usize),
    /// The vCPU's thread said what it was not asked for.
    #[error("internal error: a vCPU's thread moved out of turn")]
    Thread,
}

/// Bugs that can be planted, to show that the model check finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Events are delivered as they come, whatever their numbers.
    OrderIgnored,
    /// An arriving vCPU doesn't wait for this node's own events.
    OwnEventsNotAwaited,
    /// Events that come after the thread has stopped are delivered.
    DeliveredAfterStop,
    /// What was kept while the vCPU was leaving is forgotten.
    KeptForgotten,
    /// A node that has sent the state still takes itself for the owner.
    StaysOwner,
    /// An arriving vCPU waits for events that were lost with a node.
    LossIgnored,
}
