//! The state machine.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::streams::Streams;
use super::{Bug, Handover, Input, Message, Numbered, Outcome, Output, ProtocolError, Ticket};
use crate::machine::Event;

/// Events for an owner to be, and moves, that one node keeps at most for one vCPU.
const MOST_KEPT: usize = 1 << 16;

/// One vCPU's ownership as one node knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ownership {
    pub(super) me: usize,
    pub(super) nodes: usize,
    pub(super) place: Place,
    /// The newest owner known, and its epoch.
    pub(super) owner: usize,
    pub(super) epoch: u64,
    /// Events this node has sent to other nodes' owners: the number of the next.
    pub(super) sent: u64,
    /// Origins that were told of this owner.
    pub(super) told: BTreeSet<usize>,
    /// For the owner that this node is to be.
    pub(super) early: Vec<Numbered>,
    /// Moves that wait for the one under way.
    pub(super) moves: Vec<(Ticket, usize)>,
    /// Moves asked for here.
    pub(super) asked: BTreeSet<u64>,
    /// Lost nodes.
    pub(super) lost: BTreeSet<usize>,
    #[serde(skip)]
    bug: Option<Bug>,
}

/// Where the vCPU is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Place {
    Away,
    Here(Streams),
    Leaving(Box<Leaving>),
    Arriving(Box<Arriving>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Leaving {
    streams: Streams,
    ticket: Ticket,
    to: usize,
    /// Its thread has stopped: events are kept.
    stopped: bool,
    kept: Vec<Numbered>,
    kept_own: Vec<Event>,
    /// Events that a loss let go after the thread had stopped.
    late: Vec<Event>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Arriving {
    streams: Streams,
    ticket: Option<Ticket>,
    /// The state, until the thread was told to restore it.
    state: Option<Vec<u8>>,
    /// To be delivered once it is restored: first these, then what the proxy took out meanwhile.
    first: Vec<Event>,
    own: Vec<Event>,
}

impl Ownership {
    /// At the machine's start: `owner` has the vCPU, in epoch 0.
    pub fn new(me: usize, nodes: usize, owner: usize) -> Self {
        Ownership {
            me,
            nodes,
            place: if owner == me {
                Place::Here(Streams::default())
            } else {
                Place::Away
            },
            owner,
            epoch: 0,
            sent: 0,
            told: BTreeSet::new(),
            early: Vec::new(),
            moves: Vec::new(),
            asked: BTreeSet::new(),
            lost: BTreeSet::new(),
            bug: None,
        }
    }

    /// Plants a bug.
    pub fn plant(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }

    /// The newest owner this node knows.
    pub fn owner(&self) -> usize {
        self.owner
    }

    /// That owner's epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether this node may run the vCPU.
    pub fn runs_here(&self) -> bool {
        match &self.place {
            Place::Here(_) => true,
            Place::Leaving(leaving) => !leaving.stopped,
            Place::Away | Place::Arriving(_) => false,
        }
    }

    /// Whether the vCPU's thread has stopped in order to save it.
    pub fn is_leaving(&self) -> bool {
        matches!(&self.place, Place::Leaving(leaving) if leaving.stopped)
    }

    /// Whether the vCPU is here and waits for something that other nodes send.
    #[cfg(test)]
    pub(super) fn is_stuck(&self) -> bool {
        matches!(&self.place, Place::Arriving(arriving) if arriving.state.is_some())
    }

    /// One step.
    ///
    /// # Errors
    /// A peer broke the protocol; the machine can't go on.
    pub fn step(&mut self, input: Input, out: &mut Output) -> Result<(), ProtocolError> {
        match input {
            Input::Raise(event) => self.raise(event, out),
            Input::Move { id, to } => {
                self.asked.insert(id);
                if !self.lost.is_empty() && matches!(self.place, Place::Away) {
                    // The way to the owner may lead over a lost node, and nobody would tell.
                    self.answer(Ticket { node: self.me, id }, Outcome::OwnerLost, out);
                    return Ok(());
                }
                self.ask(Ticket { node: self.me, id }, to, self.epoch, out)?;
            }
            Input::Message { from, message } => self.message(from, message, out)?,
            Input::Stopped => match &mut self.place {
                Place::Leaving(leaving) => leaving.stopped = true,
                // Undone before the thread looked.
                _ => out.leave = Some(false),
            },
            Input::Refused => self.refused(out)?,
            Input::Saved { state, pending } => self.saved(state, pending, out)?,
            Input::Restored => self.restored(out)?,
            Input::Lost(node) => self.lose(node, out),
        }
        Ok(())
    }

    fn raise(&mut self, event: Event, out: &mut Output) {
        match &mut self.place {
            Place::Here(_) => out.deliver.push(event),
            Place::Leaving(leaving) if leaving.stopped && self.bug != Some(Bug::DeliveredAfterStop) => {
                leaving.kept_own.push(event);
            }
            Place::Leaving(_) => out.deliver.push(event),
            Place::Arriving(arriving) => arriving.own.push(event),
            Place::Away => self.send_own(event, out),
        }
    }

    fn send_own(&mut self, event: Event, out: &mut Output) {
        let event = Numbered {
            origin: self.me,
            sequence: self.sent,
            event,
        };
        self.sent += 1;
        self.send(
            Message::Event {
                epoch: self.epoch,
                event,
            },
            out,
        );
    }

    /// To the owner, unless it is lost.
    fn send(&self, message: Message, out: &mut Output) {
        if !self.lost.contains(&self.owner) {
            out.sends.push((self.owner, message));
        }
    }

    fn message(&mut self, from: usize, message: Message, out: &mut Output) -> Result<(), ProtocolError> {
        let node = |node: usize| {
            if node < self.nodes {
                Ok(node)
            } else {
                Err(ProtocolError::Node(node))
            }
        };
        match message {
            Message::Event { epoch, event } => {
                node(event.origin)?;
                self.event(from, epoch, event, out)
            }
            Message::Moved { owner, epoch } => {
                node(owner)?;
                self.moved(from, owner, epoch)
            }
            Message::State(handover) => {
                handover
                    .next
                    .iter()
                    .try_for_each(|(origin, _)| node(*origin).map(drop))?;
                handover.ticket.map_or(Ok(0), |ticket| node(ticket.node))?;
                self.handed(from, *handover, out)
            }
            Message::Move { epoch, ticket, to } => {
                node(ticket.node).and(node(to))?;
                self.ask(ticket, to, epoch, out)
            }
            Message::Outcome { id, outcome } => {
                self.answer(Ticket { node: self.me, id }, outcome, out);
                Ok(())
            }
        }
    }

    fn event(&mut self, from: usize, epoch: u64, event: Numbered, out: &mut Output) -> Result<(), ProtocolError> {
        if epoch > self.epoch && !matches!(self.place, Place::Away) {
            return Err(ProtocolError::Epoch(from));
        }
        match &mut self.place {
            Place::Here(streams) => streams.take(event, &mut out.deliver, self.bug),
            Place::Leaving(leaving) if leaving.stopped && self.bug != Some(Bug::DeliveredAfterStop) => {
                leaving.kept.push(event);
                within(leaving.kept.len(), from)
            }
            Place::Leaving(leaving) => leaving.streams.take(event, &mut out.deliver, self.bug),
            Place::Arriving(arriving) => {
                arriving.streams.take(event, &mut arriving.first, self.bug)?;
                self.restore_if_complete(out);
                Ok(())
            }
            Place::Away if epoch > self.epoch => {
                self.early.push(event);
                within(self.early.len(), from)
            }
            Place::Away => {
                self.pass_on(event, out);
                Ok(())
            }
        }
    }

    /// Sends an event to the owner and tells its origin who that is.
    fn pass_on(&mut self, event: Numbered, out: &mut Output) {
        let (origin, owner, epoch) = (event.origin, self.owner, self.epoch);
        let knows = origin == self.me || origin == owner || self.lost.contains(&origin);
        if !knows && self.told.insert(origin) {
            out.sends.push((origin, Message::Moved { owner, epoch }));
        }
        self.send(Message::Event { epoch, event }, out);
    }

    fn moved(&mut self, from: usize, owner: usize, epoch: u64) -> Result<(), ProtocolError> {
        // About this node it learns by the state itself.
        if epoch <= self.epoch || owner == self.me {
            return Ok(());
        }
        match self.place {
            Place::Away => {
                (self.owner, self.epoch) = (owner, epoch);
                self.told.clear();
                Ok(())
            }
            _ => Err(ProtocolError::Epoch(from)),
        }
    }

    fn handed(&mut self, from: usize, handover: Handover, out: &mut Output) -> Result<(), ProtocolError> {
        if !matches!(self.place, Place::Away) || handover.epoch <= self.epoch {
            return Err(ProtocolError::Epoch(from));
        }
        (self.owner, self.epoch) = (self.me, handover.epoch);
        self.told.clear();
        let mut arriving = Arriving {
            streams: Streams::new(&handover.next, handover.lossy || !self.lost.is_empty()),
            ticket: handover.ticket,
            state: Some(handover.state),
            first: handover.pending,
            own: Vec::new(),
        };
        for event in std::mem::take(&mut self.early) {
            arriving.streams.take(event, &mut arriving.first, self.bug)?;
        }
        self.place = Place::Arriving(Box::new(arriving));
        self.restore_if_complete(out);
        Ok(())
    }

    /// Has the thread restore the vCPU once all that this node sent it has come back. What was lost with a
    /// node doesn't come.
    fn restore_if_complete(&mut self, out: &mut Output) {
        let Place::Arriving(arriving) = &mut self.place else {
            return;
        };
        let complete = arriving.streams.due(self.me) >= self.sent
            || !self.lost.is_empty() && self.bug != Some(Bug::LossIgnored)
            || self.bug == Some(Bug::OwnEventsNotAwaited);
        if complete {
            out.restore = arriving.state.take().or(out.restore.take());
        }
    }

    fn ask(&mut self, ticket: Ticket, to: usize, epoch: u64, out: &mut Output) -> Result<(), ProtocolError> {
        match &self.place {
            Place::Here(_) => self.begin(ticket, to, out),
            Place::Away if epoch <= self.epoch => {
                if self.lost.contains(&self.owner) {
                    self.answer(ticket, Outcome::OwnerLost, out);
                } else {
                    self.send(
                        Message::Move {
                            epoch: self.epoch,
                            ticket,
                            to,
                        },
                        out,
                    );
                }
            }
            // Until it has come, or gone.
            _ => {
                self.moves.push((ticket, to));
                within(self.moves.len(), ticket.node)?;
            }
        }
        Ok(())
    }

    /// Begins a move; the vCPU is here.
    fn begin(&mut self, ticket: Ticket, to: usize, out: &mut Output) {
        if to == self.me {
            self.answer(ticket, Outcome::AlreadyThere, out);
        } else if self.lost.contains(&to) {
            self.answer(ticket, Outcome::NodeLost, out);
        } else if let Place::Here(streams) = &mut self.place {
            let streams = std::mem::take(streams);
            let leaving = Leaving {
                streams,
                ticket,
                to,
                stopped: false,
                kept: Vec::new(),
                kept_own: Vec::new(),
                late: Vec::new(),
            };
            self.place = Place::Leaving(Box::new(leaving));
            out.leave = Some(true);
        }
    }

    /// Begins what was asked for meanwhile.
    fn begin_next(&mut self, out: &mut Output) {
        while matches!(self.place, Place::Here(_)) && !self.moves.is_empty() {
            let (ticket, to) = self.moves.remove(0);
            self.begin(ticket, to, out);
        }
    }

    fn answer(&mut self, ticket: Ticket, outcome: Outcome, out: &mut Output) {
        if ticket.node != self.me {
            if !self.lost.contains(&ticket.node) {
                out.sends
                    .push((ticket.node, Message::Outcome { id: ticket.id, outcome }));
            }
        } else if self.asked.remove(&ticket.id) {
            out.answers.push((ticket.id, outcome));
        }
    }

    /// Takes out what is kept of a vCPU whose thread has stopped to save it.
    fn take_leaving(&mut self) -> Result<Box<Leaving>, ProtocolError> {
        match std::mem::replace(&mut self.place, Place::Away) {
            Place::Leaving(leaving) if leaving.stopped => Ok(leaving),
            place => {
                self.place = place;
                Err(ProtocolError::Thread)
            }
        }
    }

    fn refused(&mut self, out: &mut Output) -> Result<(), ProtocolError> {
        let Leaving {
            mut streams,
            ticket,
            kept,
            kept_own,
            late,
            ..
        } = *self.take_leaving()?;
        out.deliver.extend(late);
        for event in kept {
            streams.take(event, &mut out.deliver, self.bug)?;
        }
        out.deliver.extend(kept_own);
        self.place = Place::Here(streams);
        self.answer(ticket, Outcome::Busy, out);
        self.begin_next(out);
        Ok(())
    }

    fn saved(&mut self, state: Vec<u8>, mut pending: Vec<Event>, out: &mut Output) -> Result<(), ProtocolError> {
        let Leaving {
            mut streams,
            ticket,
            to,
            mut kept,
            kept_own,
            late,
            ..
        } = *self.take_leaving()?;
        pending.extend(late);
        if self.bug == Some(Bug::KeptForgotten) {
            kept.clear();
        }
        if self.lost.contains(&to) {
            // Undone: it arrives where it was.
            self.answer(ticket, Outcome::NodeLost, out);
            let mut arriving = Arriving {
                streams,
                ticket: None,
                state: Some(state),
                first: pending,
                own: kept_own,
            };
            for event in kept {
                arriving.streams.take(event, &mut arriving.first, self.bug)?;
            }
            self.place = Place::Arriving(Box::new(arriving));
            self.restore_if_complete(out);
            return Ok(());
        }
        let mut waiting = streams.take_waiting();
        let next = streams.all_due();
        let lossy = streams.is_lossy();
        let handover = Handover {
            epoch: self.epoch + 1,
            ticket: Some(ticket),
            next,
            lossy,
            pending,
            state,
        };
        if self.bug == Some(Bug::StaysOwner) {
            self.place = Place::Here(streams);
            out.sends.push((to, Message::State(Box::new(handover))));
            return Ok(());
        }
        (self.owner, self.epoch) = (to, handover.epoch);
        self.told.clear();
        self.send(Message::State(Box::new(handover)), out);
        waiting.append(&mut kept);
        waiting.into_iter().for_each(|event| self.pass_on(event, out));
        kept_own.into_iter().for_each(|event| self.send_own(event, out));
        for (ticket, to) in std::mem::take(&mut self.moves) {
            self.send(
                Message::Move {
                    epoch: self.epoch,
                    ticket,
                    to,
                },
                out,
            );
        }
        Ok(())
    }

    fn restored(&mut self, out: &mut Output) -> Result<(), ProtocolError> {
        let Place::Arriving(arriving) = std::mem::replace(&mut self.place, Place::Away) else {
            return Err(ProtocolError::Thread);
        };
        if arriving.state.is_some() {
            return Err(ProtocolError::Thread);
        }
        let Arriving {
            streams,
            ticket,
            first,
            own,
            ..
        } = *arriving;
        out.deliver.extend(first);
        out.deliver.extend(own);
        out.arrived = Some(self.epoch);
        self.place = Place::Here(streams);
        if let Some(ticket) = ticket {
            self.answer(ticket, Outcome::Moved { epoch: self.epoch }, out);
        }
        self.begin_next(out);
        Ok(())
    }

    fn lose(&mut self, node: usize, out: &mut Output) {
        if node == self.me || !self.lost.insert(node) || self.bug == Some(Bug::LossIgnored) {
            return;
        }
        match &mut self.place {
            Place::Away => {}
            Place::Here(streams) => streams.give_up_gaps(&mut out.deliver),
            Place::Leaving(leaving) if leaving.stopped => leaving.streams.give_up_gaps(&mut leaving.late),
            Place::Leaving(leaving) => {
                leaving.streams.give_up_gaps(&mut out.deliver);
                if leaving.to == node {
                    let (streams, ticket) = (std::mem::take(&mut leaving.streams), leaving.ticket);
                    self.place = Place::Here(streams);
                    out.leave = Some(false);
                    self.answer(ticket, Outcome::NodeLost, out);
                    self.begin_next(out);
                }
            }
            Place::Arriving(arriving) => {
                arriving.streams.give_up_gaps(&mut arriving.first);
                self.restore_if_complete(out);
            }
        }
        // Whether the lost node had a part in them nobody can know.
        for id in std::mem::take(&mut self.asked) {
            out.answers.push((id, Outcome::OwnerLost));
        }
        if matches!(self.place, Place::Away) {
            for (ticket, _) in std::mem::take(&mut self.moves) {
                self.answer(ticket, Outcome::OwnerLost, out);
            }
        }
    }
}

/// What a peer makes this node keep has a limit.
fn within(kept: usize, from: usize) -> Result<(), ProtocolError> {
    if kept > MOST_KEPT {
        Err(ProtocolError::Flood(from))
    } else {
        Ok(())
    }
}
