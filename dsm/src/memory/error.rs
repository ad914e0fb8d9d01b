//! What can go wrong with guest RAM.

use crate::errno::Errno;
use crate::memory::Access;

/// An error of guest RAM or of userfaultfd. Those of page operations are fatal to the node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A RAM range does not start and end on a page boundary, or is empty.
    #[error("RAM range {gpa:#x}+{len:#x}: not a whole number of 4 KiB pages; align its start and length")]
    Unaligned {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// RAM ranges overlap, are not in ascending order, or end beyond the address space.
    #[error(
        "RAM range {gpa:#x}+{len:#x}: overlaps its neighbour or is out of order; list disjoint ranges in ascending order"
    )]
    Order {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// No RAM at all, or more pages than a page index can number.
    #[error("guest RAM of {pages} pages: the size must be between 4 KiB and 16 TiB")]
    Size {
        /// Pages asked for.
        pages: u64,
    },
    /// The host would not map the RAM.
    #[error(
        "guest RAM of {len:#x} bytes: mmap failed with {errno}; give this host less of the guest's memory or raise its limits (ulimit -v, vm.max_map_count)"
    )]
    Map {
        /// Length in bytes.
        len: u64,
        /// Why.
        errno: Errno,
    },
    /// madvise refused an advice that coherence depends on.
    #[error("guest RAM: madvise({advice}) failed with {errno}")]
    Advise {
        /// Name of the advice.
        advice: &'static str,
        /// Why.
        errno: Errno,
    },
    /// vm-memory did not take the mapping.
    #[error("guest RAM: the mapping is not usable: {reason}")]
    Regions {
        /// vm-memory's words.
        reason: String,
    },
    /// RAM made for a single host was put under userfaultfd.
    #[error("guest RAM was mapped for a single host; map it as coherent RAM to share it")]
    NotCoherent,
    /// No userfaultfd for faults taken inside the kernel.
    #[error(
        "userfaultfd: {errno}; run as root or with CAP_SYS_PTRACE, or grant access to /dev/userfaultfd (vm.unprivileged_userfaultfd=1 also helps)"
    )]
    Denied {
        /// Why.
        errno: Errno,
    },
    /// This kernel cannot do what coherence needs.
    #[error("userfaultfd: the kernel lacks {feature}; Linux 5.19 or newer on x86-64 has it")]
    Unsupported {
        /// Name of the feature.
        feature: &'static str,
    },
    /// A request to userfaultfd failed on memory at a host address.
    #[error("userfaultfd: {request} of page {page:#x} failed with {errno}{}", advice(*errno))]
    Request {
        /// Name of the request.
        request: &'static str,
        /// Host page number (address >> 12).
        page: u64,
        /// Why.
        errno: Errno,
    },
    /// Reading events failed.
    #[error("userfaultfd: reading faults failed with {errno}")]
    Events {
        /// Why.
        errno: Errno,
    },
    /// An event that is no page fault, or one for memory that is not guest RAM.
    #[error("userfaultfd: unexpected event {event:#x} at address {address:#x}")]
    Event {
        /// UFFD_EVENT_*.
        event: u8,
        /// Host address.
        address: u64,
    },
    /// The protocol asked for something that the page's state does not allow.
    #[error("guest page {page}: {operation} while it is {access}; the coherence state is broken")]
    State {
        /// Page index.
        page: u32,
        /// Name of the operation.
        operation: &'static str,
        /// What the page was.
        access: Access,
    },
    /// A page or word index beyond the RAM.
    #[error("guest page {page}, word {word}: beyond the machine's {pages} pages of 512 words")]
    Bounds {
        /// Page index.
        page: u32,
        /// Word index inside the page.
        word: usize,
        /// Pages of RAM.
        pages: u32,
    },
    /// A saved state that does not fit this RAM or this version.
    #[error("saved memory state: {reason}")]
    Saved {
        /// What does not fit.
        reason: String,
    },
}

fn advice(errno: Errno) -> &'static str {
    match errno.0 {
        libc::ENOMEM => "; the host is out of memory: give it less of the guest's memory",
        libc::EEXIST => "; the page was filled behind the protocol's back",
        libc::ENOENT => "; the address is not registered guest RAM",
        _ => "",
    }
}
