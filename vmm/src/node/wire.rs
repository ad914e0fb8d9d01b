//! Machine messages between nodes: what concerns a vCPU, and device accesses, as bytes.
//!
//! Little-endian, a tag byte first. They travel among the DSM's messages, which keeps them behind
//! everything the guest did before.

use crate::machine::{Access, Direction, Event, Space, Touch};
use crate::ownership::{Handover, Message, Numbered, Outcome, Ticket};

/// One machine message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wire {
    /// About a vCPU: an interrupt, who owns it, the vCPU itself.
    Vcpu {
        /// Its number.
        vcpu: u32,
        /// What.
        message: Message,
    },
    /// Do this device access; answer with `id` unless it is posted.
    Access {
        /// The asking node's number for it.
        id: u64,
        /// What to do.
        access: Access,
    },
    /// The access `id` is done.
    Answer {
        /// The number it was asked under.
        id: u64,
        /// The value read; 0 for writes.
        value: u64,
    },
    /// A vCPU that goes to the receiver is about to touch these pages: at most [`MOST_TOUCHES`].
    Announce {
        /// The pages.
        touches: Vec<Touch>,
    },
}

/// Most pages that one message announces.
pub const MOST_TOUCHES: usize = 8;

const EVENT: u8 = 1;
const ACCESS: u8 = 2;
const ANSWER: u8 = 3;
const MOVED: u8 = 4;
const STATE: u8 = 5;
const MOVE: u8 = 6;
const OUTCOME: u8 = 7;
const ANNOUNCE: u8 = 8;

impl Wire {
    /// The wire form.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        match self {
            Wire::Vcpu { vcpu, message } => encode_message(*vcpu, message, &mut out),
            Wire::Access { id, access } => {
                let (kind, value) = match access.direction {
                    Direction::Read => (0, 0),
                    Direction::Write(value) => (1, value),
                    Direction::Posted(value) => (2, value),
                };
                out.push(ACCESS);
                out.extend(id.to_le_bytes());
                out.extend([u8::from(access.space == Space::Memory), kind, access.size]);
                out.extend(access.address.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Wire::Answer { id, value } => {
                out.push(ANSWER);
                out.extend(id.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Wire::Announce { touches } => {
                out.push(ANNOUNCE);
                let words = touches.iter().take(MOST_TOUCHES).map(|touch| touch.gpa & !1 | u64::from(touch.write));
                words.for_each(|word| out.extend(word.to_le_bytes()));
            }
        }
        out
    }

    /// Reads one message that fills `bytes`; `None` if it is none. Whether the nodes and vCPUs it names are the
    /// machine's is for the receiver to see.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = Reader(bytes);
        let tag = rest.byte()?;
        let wire = match tag {
            ACCESS => {
                let id = rest.long()?;
                let space = match rest.byte()? {
                    0 => Space::Port,
                    1 => Space::Memory,
                    _ => return None,
                };
                let (kind, size) = (rest.byte()?, rest.byte()?);
                let (address, value) = (rest.long()?, rest.long()?);
                let direction = match kind {
                    0 => Direction::Read,
                    1 => Direction::Write(value),
                    2 => Direction::Posted(value),
                    _ => return None,
                };
                let size = Some(size).filter(|size| (1..=8).contains(size))?;
                Wire::Access { id, access: Access { space, address, size, direction } }
            }
            ANSWER => Wire::Answer { id: rest.long()?, value: rest.long()? },
            ANNOUNCE => {
                let mut touches = Vec::new();
                while !rest.0.is_empty() {
                    let word = rest.long().filter(|_| touches.len() < MOST_TOUCHES)?;
                    touches.push(Touch { gpa: word & !1, write: word & 1 != 0 });
                }
                Wire::Announce { touches }
            }
            _ => Wire::Vcpu { vcpu: rest.word()?, message: decode_message(tag, &mut rest)? },
        };
        rest.0.is_empty().then_some(wire)
    }
}

fn encode_message(vcpu: u32, message: &Message, out: &mut Vec<u8>) {
    let mut begin = |tag: u8| {
        out.push(tag);
        out.extend(vcpu.to_le_bytes());
    };
    match message {
        Message::Event { epoch, event } => {
            begin(EVENT);
            out.extend(epoch.to_le_bytes());
            out.extend((event.origin as u16).to_le_bytes());
            out.extend(event.sequence.to_le_bytes());
            out.extend(event_bytes(event.event));
        }
        Message::Moved { owner, epoch } => {
            begin(MOVED);
            out.extend((*owner as u16).to_le_bytes());
            out.extend(epoch.to_le_bytes());
        }
        Message::State(handover) => {
            begin(STATE);
            out.extend(handover.epoch.to_le_bytes());
            out.push(u8::from(handover.ticket.is_some()) | u8::from(handover.lossy) << 1);
            ticket_bytes(handover.ticket.unwrap_or(Ticket { node: 0, id: 0 }), out);
            out.extend((handover.next.len() as u16).to_le_bytes());
            for (origin, next) in &handover.next {
                out.extend((*origin as u16).to_le_bytes());
                out.extend(next.to_le_bytes());
            }
            out.extend((handover.pending.len() as u32).to_le_bytes());
            handover.pending.iter().for_each(|event| out.extend(event_bytes(*event)));
            out.extend(&handover.state);
        }
        Message::Move { epoch, ticket, to } => {
            begin(MOVE);
            out.extend(epoch.to_le_bytes());
            ticket_bytes(*ticket, out);
            out.extend((*to as u16).to_le_bytes());
        }
        Message::Outcome { id, outcome } => {
            begin(OUTCOME);
            out.extend(id.to_le_bytes());
            let (kind, epoch) = match outcome {
                Outcome::Moved { epoch } => (0, *epoch),
                Outcome::AlreadyThere => (1, 0),
                Outcome::NodeLost => (2, 0),
                Outcome::OwnerLost => (3, 0),
                Outcome::Busy => (4, 0),
            };
            out.push(kind);
            out.extend(epoch.to_le_bytes());
        }
    }
}

fn decode_message(tag: u8, rest: &mut Reader<'_>) -> Option<Message> {
    Some(match tag {
        EVENT => {
            let epoch = rest.long()?;
            let (origin, sequence, event) = (rest.node()?, rest.long()?, rest.event()?);
            // The next number must be one, too.
            let sequence = Some(sequence).filter(|sequence| *sequence < u64::MAX)?;
            Message::Event { epoch, event: Numbered { origin, sequence, event } }
        }
        MOVED => Message::Moved { owner: rest.node()?, epoch: rest.long()? },
        STATE => {
            let epoch = rest.long()?;
            let flags = Some(rest.byte()?).filter(|flags| *flags < 4)?;
            let ticket = rest.ticket()?;
            let origins = rest.node()?;
            let next = (0..origins).map(|_| Some((rest.node()?, rest.long()?))).collect::<Option<_>>()?;
            let pending = rest.word()?;
            let pending = (0..pending).map(|_| rest.event()).collect::<Option<_>>()?;
            let state = std::mem::take(&mut rest.0).to_vec();
            let ticket = (flags & 1 != 0).then_some(ticket);
            Message::State(Box::new(Handover { epoch, ticket, next, lossy: flags & 2 != 0, pending, state }))
        }
        MOVE => Message::Move { epoch: rest.long()?, ticket: rest.ticket()?, to: rest.node()? },
        OUTCOME => {
            let id = rest.long()?;
            let (kind, epoch) = (rest.byte()?, rest.long()?);
            let outcome = match kind {
                0 => Outcome::Moved { epoch },
                1 => Outcome::AlreadyThere,
                2 => Outcome::NodeLost,
                3 => Outcome::OwnerLost,
                4 => Outcome::Busy,
                _ => return None,
            };
            Message::Outcome { id, outcome }
        }
        _ => return None,
    })
}

fn event_bytes(event: Event) -> [u8; 2] {
    match event {
        Event::Fixed(vector) => [0, vector],
        Event::Nmi => [1, 0],
        Event::Init => [2, 0],
        Event::Sipi(vector) => [3, vector],
    }
}

fn ticket_bytes(ticket: Ticket, out: &mut Vec<u8>) {
    out.extend((ticket.node as u16).to_le_bytes());
    out.extend(ticket.id.to_le_bytes());
}

/// What is left of a message.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn node(&mut self) -> Option<usize> {
        self.take().map(|bytes| usize::from(u16::from_le_bytes(bytes)))
    }

    fn ticket(&mut self) -> Option<Ticket> {
        Some(Ticket { node: self.node()?, id: self.long()? })
    }

    fn event(&mut self) -> Option<Event> {
        match self.take()? {
            [0, vector] => Some(Event::Fixed(vector)),
            [1, 0] => Some(Event::Nmi),
            [2, 0] => Some(Event::Init),
            [3, vector] => Some(Event::Sipi(vector)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_survives_and_no_other_length_parses() {
        let access = |direction| Access { space: Space::Memory, address: 0xC000_0000, size: 4, direction };
        let vcpu = |message| Wire::Vcpu { vcpu: 300, message };
        let numbered = |event| vcpu(Message::Event { epoch: 9, event: Numbered { origin: 1000, sequence: 77, event } });
        let handover = Handover {
            epoch: 5,
            ticket: Some(Ticket { node: 3, id: u64::MAX }),
            next: vec![(0, 7), (1023, u64::MAX)],
            lossy: true,
            pending: vec![Event::Init, Event::Sipi(8)],
            state: vec![],
        };
        let all = [
            numbered(Event::Fixed(0xf2)),
            numbered(Event::Nmi),
            numbered(Event::Init),
            numbered(Event::Sipi(0x99)),
            vcpu(Message::Moved { owner: 2, epoch: 1 << 40 }),
            vcpu(Message::Move { epoch: 1, ticket: Ticket { node: 3, id: 4 }, to: 5 }),
            vcpu(Message::Outcome { id: 6, outcome: Outcome::Moved { epoch: 7 } }),
            vcpu(Message::Outcome { id: 6, outcome: Outcome::AlreadyThere }),
            vcpu(Message::Outcome { id: 6, outcome: Outcome::Busy }),
            vcpu(Message::Outcome { id: 6, outcome: Outcome::NodeLost }),
            vcpu(Message::Outcome { id: 6, outcome: Outcome::OwnerLost }),
            Wire::Access { id: 7, access: access(Direction::Read) },
            Wire::Access { id: 8, access: access(Direction::Write(u64::MAX)) },
            Wire::Access { id: 0, access: Access { space: Space::Port, ..access(Direction::Posted(3)) } },
            Wire::Answer { id: u64::MAX, value: 5 },
        ];
        for message in all {
            let mut bytes = message.encode();
            assert_eq!(Wire::decode(&bytes), Some(message.clone()));
            bytes.push(0);
            assert_eq!(Wire::decode(&bytes), None);
            for cut in 0..bytes.len() - 1 {
                assert_eq!(Wire::decode(&bytes[..cut]), None);
            }
        }
        // As many pages as there are.
        let touches = |count: u64| Wire::Announce { touches: (0..count).map(|n| Touch { gpa: n << 12, write: n % 2 == 0 }).collect() };
        let bytes = touches(MOST_TOUCHES as u64).encode();
        assert_eq!(Wire::decode(&bytes), Some(touches(MOST_TOUCHES as u64)));
        (1..bytes.len()).for_each(|cut| assert_eq!(Wire::decode(&bytes[..cut]).is_some(), cut % 8 == 1));
        assert_eq!(Wire::decode(&[&bytes[..], &[0; 8]].concat()), None, "too many");
        // A vCPU's state is whatever is left.
        let bytes = vcpu(Message::State(Box::new(handover.clone()))).encode();
        (0..bytes.len()).for_each(|cut| assert_eq!(Wire::decode(&bytes[..cut]), None));
        let more = [&bytes[..], &[1, 2, 3]].concat();
        let state = vcpu(Message::State(Box::new(Handover { state: vec![1, 2, 3], ..handover })));
        assert_eq!(Wire::decode(&more), Some(state));
    }

    #[test]
    fn impossible_fields_are_refused() {
        let mut bytes = Wire::Access { id: 0, access: Access { space: Space::Port, address: 1, size: 1, direction: Direction::Read } }.encode();
        bytes[11] = 9;
        assert_eq!(Wire::decode(&bytes), None, "nine bytes wide");
        let event = Numbered { origin: 0, sequence: 0, event: Event::Nmi };
        let mut bytes = Wire::Vcpu { vcpu: 0, message: Message::Event { epoch: 0, event } }.encode();
        let at = bytes.len() - 2;
        bytes[at] = 4;
        assert_eq!(Wire::decode(&bytes), None, "unknown event");
        assert_eq!(Wire::decode(&[]), None);
    }
}
