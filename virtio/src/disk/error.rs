//! Errors of disk images: one line that names the image, the reason and the way out.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// Why a disk image could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused an operation on the image.
    #[error("disk {}: cannot {action}: {}", path.display(), describe(source))]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried: "open", "read", ...
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The path is no regular file and no block device.
    #[error("disk {}: is {kind}, not a disk image or block device", path.display())]
    NotADisk {
        /// The path as given.
        path: PathBuf,
        /// "a directory", "a socket", ...
        kind: &'static str,
    },
    /// The file holds something that cannot be used as a disk as it is.
    #[error("disk {}: {what}; {remedy}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// What was found.
        what: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The image ends before its contents do, or its tables contradict each other.
    #[error("disk {}: damaged or truncated: {what}; copy the image again or check it with qemu-img check", path.display())]
    Corrupt {
        /// The image.
        path: PathBuf,
        /// Which table or field is wrong.
        what: String,
    },
    /// Another process holds the image's lock.
    #[error("disk {}: in use by another process (flock: EWOULDBLOCK); stop that process or use a copy", path.display())]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// A request that reaches beyond the end of the disk.
    #[error("disk {}: request of {len} bytes at {offset} ends beyond the disk's {size} bytes", path.display())]
    OutOfRange {
        /// The image.
        path: PathBuf,
        /// Start of the request in bytes.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A write to a disk that only allows reads.
    #[error("disk {}: opened read-only, cannot write", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
    },
    /// The temporary file of a private overlay could not be made.
    #[error("disk {}: no private overlay in {}: {}; set TMPDIR to a directory with free space", path.display(), directory.display(), describe(source))]
    Overlay {
        /// The image.
        path: PathBuf,
        /// Where the overlay was to be.
        directory: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A saved overlay does not belong to this image or was written by another version.
    #[error("disk {}: saved overlay cannot be restored: {what}", path.display())]
    State {
        /// The image.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

impl DiskError {
    /// Builder for `map_err`: `action` failed on `path`.
    pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> DiskError {
        move |source| DiskError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }

    pub(super) fn corrupt(path: &Path, what: impl Into<String>) -> DiskError {
        DiskError::Corrupt {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

/// The errno's name and its usual text, or the error's own text if it is none of the system's.
fn describe(error: &io::Error) -> String {
    let Some(code) = error.raw_os_error() else { return error.to_string() };
    match Errno::from_raw(code) {
        Errno::UnknownErrno => format!("errno {code} ({})", plain_text(error)),
        errno => format!("{errno:?} ({})", plain_text(error)),
    }
}

/// The system's text without Rust's "(os error N)": the errno's name says more.
fn plain_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_names_path_action_and_errno() {
        let error = DiskError::io(Path::new("/img"), "open")(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(
            error.to_string(),
            "disk /img: cannot open: ENOENT (No such file or directory)"
        );
    }
}
