//! The stream of faults of guest RAM.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::errno::Errno;
use crate::memory::uffd::{EVENT_PAGEFAULT, FAULT_WP, FAULT_WRITE, Message, Uffd};
use crate::memory::{GuestRam, MemoryError};

/// Faults read at once.
const BATCH: usize = 64;

/// Somebody waits for a page. A hint, not a count: it may be out of date when it is read (another
/// thread's fault on the same page was answered meanwhile), and whoever waits asks again after a
/// wake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Page index.
    pub page: u32,
    /// The touch was a write. KVM's asynchronous page faults report reads as writes, too.
    pub write: bool,
    /// The page was present and read-only (a write-protect fault).
    pub protected: bool,
    /// Kernel id of the thread that waits; 0 where the kernel does not tell.
    pub thread: u32,
}

/// Faults of one userfaultfd; belongs to the thread that answers them.
#[derive(Debug)]
pub struct FaultSource {
    ram: Arc<GuestRam>,
    uffd: Arc<Uffd>,
    stop: Arc<Stop>,
    messages: Vec<Message>,
}

/// Ends a [`FaultSource`]'s stream from another thread.
#[derive(Clone, Debug)]
pub struct FaultStop(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    /// Ends a wait; the flag alone is enough between waits, and costs no system call.
    wake: EventFd,
}

impl FaultStop {
    /// Makes every present and later [`FaultSource::next_batch`] return `false`. Who waits for a
    /// page goes on waiting, until it is filled or the [`crate::memory::UffdMemory`] is dropped.
    pub fn stop(&self) {
        self.0.asked.store(true, Ordering::SeqCst);
        if let Err(error) = self.0.wake.write(1) {
            // The counter is full, so it is raised already.
            tracing::debug!(%error, "fault source was told to stop before");
        }
    }
}

impl FaultSource {
    pub(super) fn new(ram: Arc<GuestRam>, uffd: Arc<Uffd>) -> Result<Self, MemoryError> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(|error| MemoryError::Events {
            errno: Errno::of(&error),
        })?;
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            wake,
        });
        Ok(Self {
            ram,
            uffd,
            stop,
            messages: vec![Message::default(); BATCH],
        })
    }

    /// A handle that ends the stream.
    pub fn stopper(&self) -> FaultStop {
        FaultStop(Arc::clone(&self.stop))
    }

    /// Waits for faults and replaces `faults` by them. `false` after [`FaultStop::stop`], with
    /// `faults` empty.
    ///
    /// # Errors
    /// A descriptor that went bad, or an event for memory that is not guest RAM.
    pub fn next_batch(&mut self, faults: &mut Vec<Fault>) -> Result<bool, MemoryError> {
        faults.clear();
        loop {
            let count = self.uffd.read(&mut self.messages)?;
            for message in &self.messages[..count] {
                faults.push(self.fault(message)?);
            }
            // Stop wins over faults, so a stream of them cannot keep the thread alive.
            if self.stop.asked.load(Ordering::SeqCst) {
                faults.clear();
                return Ok(false);
            }
            if !faults.is_empty() {
                return Ok(true);
            }
            self.wait()?;
        }
    }

    fn fault(&self, message: &Message) -> Result<Fault, MemoryError> {
        let (event, address) = (message.event, message.address);
        let page = self.ram.index_of_host(address).filter(|_| event == EVENT_PAGEFAULT);
        Ok(Fault {
            page: page.ok_or(MemoryError::Event { event, address })?,
            write: message.flags & (FAULT_WRITE | FAULT_WP) != 0,
            protected: message.flags & FAULT_WP != 0,
            thread: message.thread,
        })
    }

    /// Waits for a fault or stop.
    fn wait(&self) -> Result<(), MemoryError> {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut entries = [entry(self.stop.wake.as_raw_fd()), entry(self.uffd.as_raw_fd())];
        // SAFETY: the pointer and the count describe the array.
        if unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(MemoryError::Events {
                    errno: Errno::of(&error),
                });
            }
        } else if entries[1].revents & (libc::POLLERR | libc::POLLNVAL) != 0 {
            return Err(MemoryError::Events {
                errno: Errno(libc::EBADF),
            });
        }
        Ok(())
    }
}
