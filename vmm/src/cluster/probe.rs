//! Whether this process gets a userfaultfd for faults that the kernel takes.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::errno;

/// KVM touches guest memory in kernel mode, so a descriptor for user-mode faults alone would
/// never report its faults. The kernel gives a full one through `/dev/userfaultfd`, to
/// CAP_SYS_PTRACE, or with `vm.unprivileged_userfaultfd=1`.
///
/// # Errors
/// One line for people.
pub fn userfaultfd() -> Result<(), String> {
    if File::options().read(true).write(true).open("/dev/userfaultfd").is_ok() {
        return Ok(());
    }
    // SAFETY: userfaultfd(2) takes one integer of flags and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if let Ok(fd @ 0..) = i32::try_from(fd) {
        // SAFETY: the kernel just gave us this descriptor and nobody else knows its number.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        return Ok(());
    }
    let error = io::Error::last_os_error();
    let advice = match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has none (CONFIG_USERFAULTFD)",
        _ => "give access to /dev/userfaultfd or the capability CAP_SYS_PTRACE",
    };
    Err(format!(
        "userfaultfd for kernel faults: {}; {advice}",
        errno::describe(&error)
    ))
}
