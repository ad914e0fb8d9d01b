//! The advisory lock (flock) that keeps two machines from writing one image.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::DiskError;

/// Locks an image for as long as `file` is open: exclusively for a writer, shared for a reader.
/// Never waits.
pub(super) fn lock(file: &File, path: &Path, exclusive: bool) -> Result<(), DiskError> {
    let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    loop {
        // SAFETY: flock takes no pointers; the descriptor is open because `file` is borrowed.
        if unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EWOULDBLOCK) => return Err(DiskError::Locked { path: path.to_owned() }),
            // Some network file systems know no locks: then there is nothing to conflict with.
            Some(libc::EOPNOTSUPP | libc::ENOLCK) => return Ok(()),
            _ => return Err(DiskError::io(path, "lock")(error)),
        }
    }
}
