//! Machine messages between nodes: interrupts and device accesses, as bytes.
//!
//! Little-endian, a tag byte first. They travel among the DSM's messages, which keeps them behind
//! everything the guest did before.

use crate::machine::{Access, Direction, Event, Space};

/// One machine message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Raise this on a vCPU that you run.
    Interrupt {
        /// Its number.
        vcpu: u32,
        /// What.
        event: Event,
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
}

impl Wire {
    /// The wire form.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        match *self {
            Wire::Interrupt { vcpu, event } => {
                let (kind, vector) = match event {
                    Event::Fixed(vector) => (0, vector),
                    Event::Nmi => (1, 0),
                    Event::Init => (2, 0),
                    Event::Sipi(vector) => (3, vector),
                };
                out.push(1);
                out.extend(vcpu.to_le_bytes());
                out.extend([kind, vector]);
            }
            Wire::Access { id, access } => {
                let (kind, value) = match access.direction {
                    Direction::Read => (0, 0),
                    Direction::Write(value) => (1, value),
                    Direction::Posted(value) => (2, value),
                };
                out.push(2);
                out.extend(id.to_le_bytes());
                out.extend([u8::from(access.space == Space::Memory), kind, access.size]);
                out.extend(access.address.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Wire::Answer { id, value } => {
                out.push(3);
                out.extend(id.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
        }
        out
    }

    /// Reads one message that fills `bytes`; `None` if it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (&tag, body) = bytes.split_first()?;
        let word = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        match (tag, body.len()) {
            (1, 6) => {
                let vcpu = u32::from_le_bytes(body[..4].try_into().ok()?);
                let event = match (body[4], body[5]) {
                    (0, vector) => Event::Fixed(vector),
                    (1, 0) => Event::Nmi,
                    (2, 0) => Event::Init,
                    (3, vector) => Event::Sipi(vector),
                    _ => return None,
                };
                Some(Wire::Interrupt { vcpu, event })
            }
            (2, 27) => {
                let space = match body[8] {
                    0 => Space::Port,
                    1 => Space::Memory,
                    _ => return None,
                };
                let value = word(19)?;
                let direction = match body[9] {
                    0 => Direction::Read,
                    1 => Direction::Write(value),
                    2 => Direction::Posted(value),
                    _ => return None,
                };
                let size = Some(body[10]).filter(|size| (1..=8).contains(size))?;
                Some(Wire::Access { id: word(0)?, access: Access { space, address: word(11)?, size, direction } })
            }
            (3, 16) => Some(Wire::Answer { id: word(0)?, value: word(8)? }),
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
        let all = [
            Wire::Interrupt { vcpu: 300, event: Event::Fixed(0xf2) },
            Wire::Interrupt { vcpu: 1, event: Event::Nmi },
            Wire::Interrupt { vcpu: 1, event: Event::Init },
            Wire::Interrupt { vcpu: 1, event: Event::Sipi(0x99) },
            Wire::Access { id: 7, access: access(Direction::Read) },
            Wire::Access { id: 8, access: access(Direction::Write(u64::MAX)) },
            Wire::Access { id: 0, access: Access { space: Space::Port, ..access(Direction::Posted(3)) } },
            Wire::Answer { id: u64::MAX, value: 5 },
        ];
        for message in all {
            let mut bytes = message.encode();
            assert_eq!(Wire::decode(&bytes), Some(message));
            bytes.push(0);
            assert_eq!(Wire::decode(&bytes), None);
            for cut in 0..bytes.len() - 1 {
                assert_eq!(Wire::decode(&bytes[..cut]), None);
            }
        }
    }

    #[test]
    fn impossible_fields_are_refused() {
        let mut bytes = Wire::Access { id: 0, access: Access { space: Space::Port, address: 1, size: 1, direction: Direction::Read } }.encode();
        bytes[11] = 9;
        assert_eq!(Wire::decode(&bytes), None, "nine bytes wide");
        assert_eq!(Wire::decode(&[1, 0, 0, 0, 0, 4, 0]), None, "unknown event");
        assert_eq!(Wire::decode(&[]), None);
    }
}
