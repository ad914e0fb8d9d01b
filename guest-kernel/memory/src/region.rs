//! Memory of the kernel's, mapped for the whole life of the process, by huge pages where there are any.

use std::io;

/// Words of zeros, by the kernel's leave; one NUMA node's, if asked.
pub struct Region {
    start: *mut u64,
    words: usize,
}

/// Who sees what is written to a region.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// This process.
    Here,
    /// This process and those forked from it.
    ByAll,
}

impl Region {
    /// Maps `bytes`, rounded down to whole words, on NUMA node `node` alone if one is given.
    pub fn new(bytes: usize, seen: Seen, node: Option<usize>) -> io::Result<Self> {
        let sharing = if seen == Seen::ByAll { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, where the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes.max(1), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Advice: a kernel without huge pages takes small ones.
        // SAFETY: of the mapping above.
        unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        if let Some(node) = node {
            let mask = 1u64.checked_shl(node as u32).ok_or(io::ErrorKind::InvalidInput)?;
            // SAFETY: of the mapping above; the kernel reads 64 bits of mask (it takes the number for one more).
            let result = unsafe { libc::syscall(libc::SYS_mbind, start, bytes.max(1), libc::MPOL_BIND, &raw const mask, 65, 0) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Region { start: start.cast(), words: bytes / 8 })
    }

    /// The words, which no other process may touch meanwhile.
    pub fn words(&mut self) -> &mut [u64] {
        // SAFETY: mapped until the process ends, aligned to a page, initialized by the kernel; borrowed for as long
        // as the region is. Processes that share it take turns.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.words) }
    }
}
