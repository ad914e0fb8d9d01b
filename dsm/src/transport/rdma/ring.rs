//! Memory that the device reads and writes by itself.

use std::ptr;

use super::credits::SLOT;
use crate::errno::Errno;

/// The slots of one direction. No reference to its bytes is ever made, since the device (and through
/// it the peer) may change them at any time: they are only copied in and out.
#[derive(Debug)]
pub struct Ring {
    start: *mut u8,
    slots: usize,
}

// SAFETY: the address is that of a mapping that this value owns; the mapping may be used from any thread.
unsafe impl Send for Ring {}
// SAFETY: the methods copy bytes that anybody may change meanwhile by their nature; what is copied out is
// checked by its user. Two threads that copy into one slot would mix their bytes, nothing worse; callers
// prevent it by their own lock.
unsafe impl Sync for Ring {}

impl Ring {
    /// A ring of so many slots of zeros, all of it present.
    ///
    /// # Errors
    /// No memory.
    pub fn new(slots: u16) -> Result<Self, Errno> {
        let slots = usize::from(slots);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                slots * SLOT,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self {
            start: start.cast(),
            slots,
        })
    }

    /// Its bytes.
    pub fn size(&self) -> usize {
        self.slots * SLOT
    }

    /// Where it begins.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Address of a slot in this process.
    pub fn address(&self, slot: usize) -> u64 {
        assert!(slot < self.slots, "slot {slot}");
        self.start as u64 + (slot * SLOT) as u64
    }

    /// Copies `bytes` into a slot, from `at` on.
    pub fn copy_in(&self, slot: usize, at: usize, bytes: &[u8]) {
        assert!(
            slot < self.slots && at <= SLOT && bytes.len() <= SLOT - at,
            "slot {slot}, {at}+{}",
            bytes.len()
        );
        // SAFETY: the range is inside the slot by the assertion, and so inside the mapping, which lives as
        // long as this value. `bytes` is not in it: no reference into it exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(slot * SLOT + at), bytes.len()) };
    }

    /// Copies bytes of a slot, from `at` on, into `to`.
    pub fn copy_out(&self, slot: usize, at: usize, to: &mut [u8]) {
        assert!(
            slot < self.slots && at <= SLOT && to.len() <= SLOT - at,
            "slot {slot}, {at}+{}",
            to.len()
        );
        // SAFETY: as above. A peer that breaks the rules may change the bytes while they are copied; then
        // any bytes arrive in `to`, which are only looked at there.
        unsafe { ptr::copy_nonoverlapping(self.start.add(slot * SLOT + at).cast_const(), to.as_mut_ptr(), to.len()) };
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it exists; the owner has ended the device's
        // use of it before (`Endpoint` deregisters first).
        unsafe { libc::munmap(self.start.cast(), self.size()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_in_their_slot() {
        let ring = Ring::new(4).unwrap();
        let last = 3;
        assert_eq!(ring.size(), 4 * SLOT);
        ring.copy_in(last, SLOT - 3, &[1, 2, 3]);
        ring.copy_in(0, 0, &[9; SLOT]);
        let mut got = [0; 4];
        ring.copy_out(last, SLOT - 4, &mut got);
        assert_eq!(got, [0, 1, 2, 3]);
        ring.copy_out(0, SLOT, &mut []);
        assert_eq!(ring.address(1) - ring.address(0), SLOT as u64);
        for (slot, at, len) in [(last + 1, 0, 0), (0, SLOT + 1, 0), (0, SLOT, 1), (0, usize::MAX, 1)] {
            let out = std::panic::catch_unwind(|| ring.copy_out(slot, at, &mut vec![0; len]));
            assert!(out.is_err(), "slot {slot}, {at}+{len}");
        }
    }
}
