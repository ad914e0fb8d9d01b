//! A disk image opened for a look: its readable volumes, and what else was seen on it.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use crate::filesystem::{FileSystem, Kind, MAX_FILE, ReadError, Source, Window, mount, probe};
use crate::partition::partitions;

/// Longest configuration file that is read, in bytes.
const MAX_TEXT: u64 = 4 << 20;

/// A mounted file system.
pub(crate) struct Volume {
    /// "partition 2 (ext4)", or "the disk (ext4)" without partition table.
    pub label: String,
    /// What it holds.
    pub kind: Kind,
    fs: Box<dyn FileSystem>,
}

/// Something that cannot be read.
pub(crate) struct Unreadable {
    /// "partition 2", or "the disk".
    pub place: String,
    /// "holds XFS, which is not read" and the like.
    pub reason: String,
    /// PARTUUID, if it is a partition that may be a root file system.
    pub root_uuid: Option<String>,
}

/// What was found on the disk.
pub(crate) struct Image {
    /// In the order of their partitions.
    pub volumes: Vec<Volume>,
    /// The rest.
    pub unreadable: Vec<Unreadable>,
}

impl Image {
    pub(crate) fn open(source: Source) -> Image {
        let source = Rc::new(RefCell::new(source));
        let mut image = Image {
            volumes: Vec::new(),
            unreadable: Vec::new(),
        };
        let whole = Window::new(&source, 0, u64::MAX);
        // FAT's boot sector looks like an MBR, so it counts first, unless there is a GPT; any other file
        // system's magic number may be left over from before the disk was partitioned.
        let bare = probe(&whole);
        let found = match bare {
            Some(Kind::Fat) if has_no_gpt(&source) => Vec::new(),
            _ => partitions(&mut source.borrow_mut()),
        };
        if let (Some(kind), true) = (bare, found.is_empty()) {
            image.add("the disk", None, kind, whole);
        }
        for partition in found {
            let window = Window::new(&source, partition.start, partition.len);
            let place = format!("partition {}", partition.number);
            if window.len() < partition.len {
                let reason = "reaches beyond the end of the disk: the image is truncated".into();
                image.unreadable.push(Unreadable {
                    place,
                    reason,
                    root_uuid: None,
                });
            } else if let Some(kind) = probe(&window) {
                image.add(&place, Some(partition.uuid), kind, window);
            }
        }
        image
    }

    fn add(&mut self, place: &str, uuid: Option<String>, kind: Kind, window: Window) {
        let name = match kind {
            Kind::Ext => "ext4",
            Kind::Fat => "FAT",
            Kind::Other(name) => {
                let root_uuid = uuid.filter(|_| matches!(name, "XFS" | "btrfs" | "F2FS" | "erofs" | "squashfs"));
                let reason = format!("holds {name}, which is not read");
                self.unreadable.push(Unreadable {
                    place: place.into(),
                    reason,
                    root_uuid,
                });
                return;
            }
        };
        match mount(kind, window) {
            Ok(fs) => self.volumes.push(Volume {
                label: format!("{place} ({name})"),
                kind,
                fs,
            }),
            Err(error) => {
                let reason = format!("holds {name}, which cannot be mounted: {error}");
                self.unreadable.push(Unreadable {
                    place: place.into(),
                    reason,
                    root_uuid: None,
                });
            }
        }
    }
}

/// Whether the disk lacks a GPT, at either sector size.
fn has_no_gpt(source: &Rc<RefCell<Source>>) -> bool {
    let mut magic = [0; 8];
    let mut source = source.borrow_mut();
    !([512, 4096]
        .into_iter()
        .any(|at| source.read_at(&mut magic, at).is_ok() && &magic == b"EFI PART"))
}

impl Volume {
    /// A whole file, such as a kernel.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, ReadError> {
        self.fs.read(path, MAX_FILE)
    }

    /// A configuration file; `None` if it is not there or too long. What is not UTF-8 is replaced.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        self.fs
            .read(path, MAX_TEXT)
            .ok()
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Names in a directory, sorted.
    pub(crate) fn list(&self, path: &str) -> Vec<String> {
        self.fs.list(path)
    }

    /// Whether a file or directory is there.
    pub(crate) fn exists(&self, path: &str) -> bool {
        self.fs.exists(path)
    }

    /// The file system's UUID.
    pub(crate) fn uuid(&self) -> String {
        self.fs.uuid()
    }
}

/// Opens an image; the error is the disk's own.
pub(crate) fn open(disk: Box<dyn crate::filesystem::ReadSeek>) -> io::Result<Image> {
    Ok(Image::open(Source::new(disk)?))
}
