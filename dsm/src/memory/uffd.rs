//! The userfaultfd(2) requests we use (include/uapi/linux/userfaultfd.h), typed.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::errno::Errno;
use crate::memory::{MemoryError, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS};

const UFFD_API: u64 = 0xaa;
/// UFFD_FEATURE_PAGEFAULT_FLAG_WP.
const FEATURE_WP: u64 = 1 << 0;
/// UFFD_FEATURE_THREAD_ID.
const FEATURE_THREAD_ID: u64 = 1 << 8;
/// UFFD_FEATURE_MOVE (Linux 6.8).
const FEATURE_MOVE: u64 = 1 << 16;

const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
const COPY_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1 << 0;

/// UFFD_EVENT_PAGEFAULT.
pub const EVENT_PAGEFAULT: u8 = 0x12;
/// UFFD_PAGEFAULT_FLAG_WRITE.
pub const FAULT_WRITE: u64 = 1 << 0;
/// UFFD_PAGEFAULT_FLAG_WP.
pub const FAULT_WP: u64 = 1 << 1;

/// How often a request that the kernel puts off (EAGAIN) is repeated before it counts as failed.
const ATTEMPTS: usize = 10_000;

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

/// `struct uffd_msg` of a page fault; packed in the header, but every field is aligned anyway.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Message {
    /// UFFD_EVENT_*.
    pub event: u8,
    reserved: [u8; 7],
    /// UFFD_PAGEFAULT_FLAG_*.
    pub flags: u64,
    /// Host address.
    pub address: u64,
    /// Thread id if [`Features::thread_id`], else 0.
    pub thread: u32,
    padding: u32,
}

const fn request(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | UFFD_API << 8 | number) as libc::Ioctl
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const USERFAULTFD_IOC_NEW: libc::Ioctl = request(0, 0x00, 0);
const UFFDIO_REGISTER: libc::Ioctl = request(READ_WRITE, 0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::Ioctl = request(READ, 0x01, size_of::<Range>());
const UFFDIO_WAKE: libc::Ioctl = request(READ, 0x02, size_of::<Range>());
const UFFDIO_COPY: libc::Ioctl = request(READ_WRITE, 0x03, size_of::<Copy>());
const UFFDIO_MOVE: libc::Ioctl = request(READ_WRITE, 0x05, size_of::<Move>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = request(READ_WRITE, 0x06, size_of::<WriteProtect>());
const UFFDIO_API: libc::Ioctl = request(READ_WRITE, 0x3f, size_of::<Api>());

/// What this kernel's userfaultfd offers beyond what we require.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Faults carry the id of the thread that took them.
    pub thread_id: bool,
    /// Memory can be moved in instead of being copied.
    pub moves: bool,
}

/// One userfaultfd that also gets faults taken inside the kernel (KVM's are). Not blocking.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
}

impl Uffd {
    /// Opens one, with write-protect faults.
    ///
    /// # Errors
    /// No permission, or a kernel without write protection.
    pub fn open() -> Result<Self, MemoryError> {
        // The first UFFDIO_API on a descriptor settles its features for good, and asking for an
        // unknown one is an error: so a first descriptor only asks what there is.
        let offered = api(&new_fd()?, 0)?;
        if offered & FEATURE_WP == 0 {
            return Err(MemoryError::Unsupported {
                feature: "write protection (UFFD_FEATURE_PAGEFAULT_FLAG_WP)",
            });
        }
        let wanted = FEATURE_WP | offered & (FEATURE_THREAD_ID | FEATURE_MOVE);
        let fd = new_fd()?;
        api(&fd, wanted)?;
        Ok(Self {
            fd,
            features: Features {
                thread_id: wanted & FEATURE_THREAD_ID != 0,
                moves: wanted & FEATURE_MOVE != 0,
            },
        })
    }

    /// The optional features in use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// From now on touches of absent pages and writes to protected pages of `len` bytes at `start`
    /// (whole pages) wait for us.
    ///
    /// # Safety
    /// The memory must be a private anonymous mapping that stays mapped until the process ends,
    /// and nobody may hold references to plain data in it: page requests change its content.
    ///
    /// # Errors
    /// The kernel's refusal, or missing requests for this kind of memory.
    pub unsafe fn register(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        let mut register = Register {
            range: Range { start, len },
            mode: REGISTER_MISSING | REGISTER_WP,
            ioctls: 0,
        };
        // SAFETY: the request matches the structure; the caller vouches for the memory.
        let result = unsafe { ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &mut register) };
        result.map_err(|errno| self.failed("registration", start, errno))?;
        let needed = [UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_WRITEPROTECT];
        if needed
            .iter()
            .any(|request| register.ioctls & 1 << (request & 0x3f) == 0)
        {
            return Err(MemoryError::Unsupported {
                feature: "COPY, WAKE and WRITEPROTECT of anonymous memory",
            });
        }
        Ok(())
    }

    /// From now on nothing in `len` bytes at `start` waits for us: what is absent is filled with zeros by
    /// the kernel, what was protected becomes writable. Wakes those who wait for it.
    ///
    /// # Errors
    /// The kernel's refusal (ENOMEM: too many mappings), after which the memory is registered as before.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), MemoryError> {
        let mut range = Range { start, len };
        // SAFETY: the request matches the structure. It drops no content, and the memory was registered
        // by `register`, whose caller vouched for it.
        let result = unsafe { ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &mut range) };
        result.map_err(|errno| self.failed("end of registration", start, errno))
    }

    /// Fills the absent pages from `address` on with `data`, read-only unless `writable`, and wakes
    /// those who wait for them.
    ///
    /// # Errors
    /// A page that is present (EEXIST), memory not registered (ENOENT), no memory (ENOMEM).
    pub fn copy(&self, address: u64, data: &[[u64; PAGE_WORDS]], writable: bool) -> Result<(), MemoryError> {
        let mut done = 0;
        // A request that was interrupted has filled some pages; the next one fills the rest.
        self.repeat("copy", address, || {
            let mut copy = Copy {
                dst: address + done,
                src: data.as_ptr() as u64 + done,
                len: size_of_val(data) as u64 - done,
                mode: if writable { 0 } else { COPY_WP },
                copied: 0,
            };
            // SAFETY: the request matches the structure and reads what is left of `data`. The kernel
            // fills only memory that was registered, for which `register`'s caller vouched.
            let result = unsafe { ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &mut copy) };
            // Negative: an error number.
            done += u64::try_from(copy.copied).unwrap_or(0);
            result
        })
    }

    /// Fills the absent memory at `address`, writable, with the very memory of `len` bytes at `from`, and wakes those
    /// who wait for it. Returns how many bytes, from the start on, were filled so: a kernel that can't take all
    /// leaves the rest as it was.
    ///
    /// # Safety
    /// `from` must be private anonymous memory of this process that nobody refers to: what is taken reads as zeros
    /// afterwards. For the other end `register`'s caller vouched.
    pub unsafe fn take_over(&self, address: u64, from: u64, len: u64) -> u64 {
        let mut done = 0;
        for _ in 0..ATTEMPTS {
            let mut request = Move { dst: address + done, src: from + done, len: len - done, mode: 0, moved: 0 };
            // SAFETY: the request matches the structure; the caller vouches for the memory.
            let result = unsafe { ioctl(self.fd.as_raw_fd(), UFFDIO_MOVE, &mut request) };
            // Negative: an error number.
            done += u64::try_from(request.moved).unwrap_or(0);
            match result {
                Err(Errno(libc::EAGAIN | libc::EINTR)) if done < len => std::thread::yield_now(),
                _ => break,
            }
        }
        done.min(len)
    }

    /// Makes `pages` present pages from `address` on read-only, or writable again; the latter wakes those
    /// who wait for them. All CPUs, and KVM's guests, see the change when this returns.
    ///
    /// # Errors
    /// Memory that is not registered (ENOENT).
    pub fn write_protect(&self, address: u64, pages: usize, protect: bool) -> Result<(), MemoryError> {
        let mut change = WriteProtect {
            range: Range {
                start: address,
                len: (pages * PAGE_SIZE) as u64,
            },
            mode: if protect { WRITEPROTECT_WP } else { 0 },
        };
        // SAFETY: the request matches the structure, and changes protection only.
        self.repeat("write protection", address, || unsafe {
            ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut change)
        })
    }

    /// Lets those who wait for the page at `address` try again.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn wake(&self, address: u64) -> Result<(), MemoryError> {
        let mut range = Range {
            start: address,
            len: PAGE_SIZE as u64,
        };
        // SAFETY: the request matches the structure, and changes no memory.
        let result = unsafe { ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &mut range) };
        result.map_err(|errno| self.failed("wake", address, errno))
    }

    /// Reads the events that are there into `messages`; 0 if there are none.
    ///
    /// # Errors
    /// Any other failure of read(2).
    pub fn read(&self, messages: &mut [Message]) -> Result<usize, MemoryError> {
        let len = size_of_val(messages);
        // SAFETY: the buffer is `len` bytes of plain integers, valid for any content.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), len) };
        if got >= 0 {
            return Ok(got as usize / size_of::<Message>());
        }
        match Errno::last() {
            Errno(libc::EAGAIN | libc::EINTR) => Ok(0),
            errno => Err(MemoryError::Events { errno }),
        }
    }

    fn repeat(
        &self,
        request: &'static str,
        address: u64,
        mut attempt: impl FnMut() -> Result<(), Errno>,
    ) -> Result<(), MemoryError> {
        for _ in 0..ATTEMPTS {
            match attempt() {
                // The address space is changing (fork, mremap), or a signal came.
                Err(Errno(libc::EAGAIN | libc::EINTR)) => std::thread::yield_now(),
                result => return result.map_err(|errno| self.failed(request, address, errno)),
            }
        }
        Err(self.failed(request, address, Errno(libc::EAGAIN)))
    }

    fn failed(&self, request: &'static str, address: u64, errno: Errno) -> MemoryError {
        MemoryError::Request {
            request,
            page: address >> PAGE_SHIFT,
            errno,
        }
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A descriptor that is not limited to faults of user mode: from the device (Linux 6.1), whose
/// file permissions decide, else from the system call, which needs CAP_SYS_PTRACE.
fn new_fd() -> Result<OwnedFd, MemoryError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/userfaultfd");
    if let Ok(device) = device {
        // SAFETY: the request takes its flags by value and touches no memory of ours.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd >= 0 {
            // SAFETY: the kernel just made this descriptor for us; nobody else has it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    // SAFETY: the call takes its flags by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(match Errno::last() {
            Errno(libc::ENOSYS) => MemoryError::Unsupported {
                feature: "userfaultfd (CONFIG_USERFAULTFD)",
            },
            errno => MemoryError::Denied { errno },
        });
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// UFFDIO_API: settles the descriptor's features, returns what the kernel offers.
fn api(fd: &OwnedFd, features: u64) -> Result<u64, MemoryError> {
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the request matches the structure.
    match unsafe { ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) } {
        Ok(()) => Ok(api.features),
        Err(Errno(libc::EPERM)) => Err(MemoryError::Denied {
            errno: Errno(libc::EPERM),
        }),
        Err(_) => Err(MemoryError::Unsupported {
            feature: "userfaultfd API 0xAA",
        }),
    }
}

/// # Safety
/// `request` must take a pointer to a `T`, and what it does must be sound.
unsafe fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: `argument` is a valid, exclusive pointer to a T; the caller vouches for the rest.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}
