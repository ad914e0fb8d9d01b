//! What two nodes tell each other about their ends, over the connection they have already: of the queue
//! pair for messages first, then of the one for blocks.
//!
//! Fixed size, little endian: magic, version, slots, bytes of a slot, queue pair, first packet number,
//! maximum packet size, GID, address and key of the landing ring. The slots tell one queue pair from the
//! other, since their rings differ.

use super::credits::SLOT;

/// Bytes of a [`Description`].
pub const SIZE: usize = 64;
const MAGIC: [u8; 8] = *b"KRGRDMA\n";
/// 2: two queue pairs.
const VERSION: u16 = 2;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Number of the queue pair, 24 bits.
    pub queue_pair: u32,
    /// Number of the first packet, 24 bits.
    pub packet: u32,
    /// Largest packet, as verbs encode it: 1 is 256 bytes, 5 is 4096.
    pub mtu: u8,
    /// Address of the port.
    pub gid: [u8; 16],
    /// Where the landing ring begins, in the address space of its owner.
    pub ring: u64,
    /// Slots of it.
    pub slots: u16,
    /// The key to write there.
    pub key: u32,
}

/// What is wrong with a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDescription {
    /// Something else.
    #[error("what it sent is no description of an RDMA connection")]
    Magic,
    /// Another version.
    #[error("it speaks version {0} of the RDMA transport, this program {VERSION}")]
    Version(u16),
    /// Rings that don't fit ours, or numbers that can't be.
    #[error("its description of an RDMA connection makes no sense")]
    Values,
}

impl Description {
    /// The bytes.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.slots.to_le_bytes());
        bytes[12..16].copy_from_slice(&(SLOT as u32).to_le_bytes());
        bytes[16..20].copy_from_slice(&self.queue_pair.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.packet.to_le_bytes());
        bytes[24] = self.mtu;
        bytes[32..48].copy_from_slice(&self.gid);
        bytes[48..56].copy_from_slice(&self.ring.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.key.to_le_bytes());
        bytes
    }

    /// Reads and checks one of an end for rings of `slots`.
    ///
    /// # Errors
    /// See [`BadDescription`].
    pub fn decode(bytes: &[u8; SIZE], slots: u16) -> Result<Self, BadDescription> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[..8] != MAGIC {
            return Err(BadDescription::Magic);
        }
        if half(8) != VERSION {
            return Err(BadDescription::Version(half(8)));
        }
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[32..48]);
        let ring = u64::from(word(48)) | u64::from(word(52)) << 32;
        let end = ring.checked_add(u64::from(slots) * SLOT as u64);
        let description = Self {
            queue_pair: word(16),
            packet: word(20),
            mtu: bytes[24],
            gid,
            ring,
            slots: half(10),
            key: word(56),
        };
        let fits = description.slots == slots
            && word(12) as usize == SLOT
            && description.queue_pair < 1 << 24
            && description.packet < 1 << 24
            && (1..=5).contains(&description.mtu)
            && end.is_some();
        if fits {
            Ok(description)
        } else {
            Err(BadDescription::Values)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Description = Description {
        queue_pair: 0x123456,
        packet: 0xfedcba,
        mtu: 5,
        gid: [7; 16],
        ring: 0x7f00_1234_5000,
        slots: 128,
        key: 0xdeadbeef,
    };

    #[test]
    fn is_read_back() {
        assert_eq!(Description::decode(&GOOD.encode(), 128), Ok(GOOD));
    }

    #[test]
    fn nonsense_is_refused() {
        let with = |at: usize, byte: u8| {
            let mut bytes = GOOD.encode();
            bytes[at] = byte;
            Description::decode(&bytes, 128)
        };
        assert_eq!(with(0, b'X'), Err(BadDescription::Magic));
        assert_eq!(with(8, 9), Err(BadDescription::Version(9)));
        for (at, byte) in [(10, 0), (13, 1), (19, 1), (23, 1), (24, 0), (24, 6)] {
            assert_eq!(with(at, byte), Err(BadDescription::Values), "byte {at}");
        }
        let far = Description {
            ring: u64::MAX - 5,
            ..GOOD
        };
        assert_eq!(Description::decode(&far.encode(), 128), Err(BadDescription::Values));
        // The end for blocks in the place of that for messages.
        assert_eq!(Description::decode(&GOOD.encode(), 32), Err(BadDescription::Values));
    }
}
