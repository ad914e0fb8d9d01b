//! File systems inside a disk image, for reading a few files by path.

mod ext4;
mod fat;
mod probe;
mod window;

pub(crate) use probe::{Kind, probe};
pub(crate) use window::{ReadSeek, Source, Window};

/// Most bytes of one file: an initrd of a desktop distribution has 200 MiB at times.
pub(crate) const MAX_FILE: u64 = 512 << 20;

/// Why a file of the image could not be read: the end of a line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// There is no such file.
    #[error("not found")]
    NotFound,
    /// The file system or the disk is damaged, or the file is no file.
    #[error("{0}")]
    Other(String),
}

/// A mounted file system, read-only. Paths are absolute, separated by '/'.
pub(crate) trait FileSystem {
    /// The whole file, at most `limit` bytes.
    fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, ReadError>;

    /// Names in a directory, sorted; none if it is not there or cannot be read. Names that are no
    /// UTF-8 are left out.
    fn list(&self, path: &str) -> Vec<String>;

    /// Whether a file or directory is there.
    fn exists(&self, path: &str) -> bool;

    /// The UUID as Linux and GRUB write it: lower case for ext4, "1234-ABCD" for FAT.
    fn uuid(&self) -> String;
}

/// Mounts a file system that is one of the readable kinds.
pub(crate) fn mount(kind: Kind, window: Window) -> Result<Box<dyn FileSystem>, ReadError> {
    match kind {
        Kind::Ext => Ok(Box::new(ext4::Ext4::mount(window)?)),
        Kind::Fat => Ok(Box::new(fat::Fat::mount(window)?)),
        Kind::Other(name) => Err(ReadError::Other(format!("{name} is not read"))),
    }
}
