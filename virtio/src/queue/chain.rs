//! A descriptor chain, checked before anything of it is used.

use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::QueueError;
use crate::{GuestMemory, Prefetch};

/// Most descriptors of one chain. A queue has at most 256 descriptors here, but drivers put more
/// into an indirect table than the queue is long.
const MAX_DESCRIPTORS: usize = 1024;

/// A run of guest-physical memory, within RAM when it was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// A whole chain: what the device reads, then what it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// Walks and checks a chain.
    pub(super) fn collect(
        memory: &GuestMemory,
        descriptors: DescriptorChain<&GuestMemory>,
    ) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let error = |reason| QueueError::Chain { head, reason };
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut more = true;
        for (count, descriptor) in descriptors.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(error("more than 1024 descriptors"));
            }
            let segment = Segment {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            if segment.len == 0 {
                return Err(error("an empty descriptor"));
            }
            if !GuestMemoryBackend::check_range(memory, descriptor.addr(), segment.len as usize) {
                return Err(error("a descriptor outside of guest memory"));
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(error("a readable descriptor after a writable one"));
            }
            more = u32::from(descriptor.flags()) & VRING_DESC_F_NEXT != 0;
        }
        // The walk ends early at whatever is not allowed: an index beyond the table, a loop, a
        // nested or malformed indirect table, more than 4 GiB in all.
        if more {
            return Err(error("it is broken, a loop or nested"));
        }
        Ok(chain)
    }

    /// The chain's name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may write, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes the device may read, less than 4 GiB.
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes the device may write, less than 4 GiB.
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// Copies from byte `offset` of the readable part. May block until guest memory arrives.
    ///
    /// # Errors
    /// If the part is shorter than that.
    pub fn read(&self, memory: &GuestMemory, offset: u64, buffer: &mut [u8]) -> Result<(), QueueError> {
        self.each_piece(&self.readable, offset, buffer.len(), |address, from, to| {
            memory.read_slice(&mut buffer[from..to], address).is_ok()
        })
    }

    /// Copies to byte `offset` of the writable part. May block until guest memory arrives.
    ///
    /// # Errors
    /// If the part is shorter than that.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), QueueError> {
        self.each_piece(&self.writable, offset, data.len(), |address, from, to| {
            memory.write_slice(&data[from..to], address).is_ok()
        })
    }

    /// Announces the first `most` bytes of each part.
    pub fn prefetch(&self, prefetch: &dyn Prefetch, most: u64) {
        for (segments, write) in [(&self.readable, false), (&self.writable, true)] {
            let mut left = most;
            for segment in segments {
                let len = left.min(segment.len.into());
                if len == 0 {
                    break;
                }
                prefetch.prefetch(segment.address, len, write);
                left -= len;
            }
        }
    }

    /// Calls `copy(address, from, to)` for every piece of `len` bytes at `offset` of `segments`,
    /// where `from..to` is the piece's place in the caller's buffer.
    fn each_piece(
        &self,
        segments: &[Segment],
        offset: u64,
        len: usize,
        mut copy: impl FnMut(GuestAddress, usize, usize) -> bool,
    ) -> Result<(), QueueError> {
        let error = |reason| QueueError::Chain {
            head: self.head,
            reason,
        };
        let mut skip = offset;
        let mut done = 0;
        for segment in segments {
            if done == len {
                break;
            }
            let segment_len = u64::from(segment.len);
            if skip >= segment_len {
                skip -= segment_len;
                continue;
            }
            let piece = (len - done).min((segment_len - skip) as usize);
            // The segment was checked to lie in guest memory, so this cannot wrap around.
            if !copy(GuestAddress(segment.address + skip), done, done + piece) {
                return Err(error("its memory cannot be accessed"));
            }
            skip = 0;
            done += piece;
        }
        if done < len {
            return Err(error("it is too short"));
        }
        Ok(())
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}
