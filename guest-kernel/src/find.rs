//! Finds what a stock disk image boots.
//!
//! Sources are tried in this order, each on every readable volume (partitions by number) before the
//! next one:
//!
//! 1. GRUB: `grub.cfg` in `/boot/grub`, `/grub`, `/boot/grub2`, `/grub2`, `/EFI/*`;
//! 2. Boot Loader Specification entries: `/loader/entries`, `/boot/loader/entries` (systemd-boot,
//!    and Fedora, whose grub.cfg has no entries of its own);
//! 3. extlinux and syslinux;
//! 4. unified kernel images in `/EFI/Linux` and `/boot/EFI/Linux`, the newest by name;
//! 5. without any configuration: `/vmlinuz`, `/boot/vmlinuz`, the newest `/boot/vmlinuz-*` or
//!    `/vmlinuz-*`, with the root file system guessed.
//!
//! Paths belong to the volume that the configuration names by UUID, else to its own, else to any
//! volume that has them: with `/boot` on a partition of its own all three come to the same.

use std::io::{self, Read, Seek};

use crate::config::{self, Entry, bls, extlinux, grub, uki};
use crate::filesystem::{Kind, ReadError};
use crate::image::{self, Image, Volume};

/// What an image boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel file as it is in the image: for [`crate::kernel::Kernel::from_bytes`].
    pub kernel: Vec<u8>,
    /// Its path, for messages.
    pub kernel_path: String,
    /// The initrds, joined as a boot loader does: each starts at a multiple of 4 bytes.
    pub initrd: Option<Vec<u8>>,
    /// The kernel command line of the image.
    pub cmdline: String,
    /// Where this was found, for people: "Debian GNU/Linux (/boot/grub/grub.cfg, partition 1 (ext4))".
    pub source: String,
}

/// What to do when the image cannot be booted by itself.
const REMEDY: &str = "give --kernel, --initrd and --append";

/// Why an image boots nothing: one line.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The image itself cannot be read.
    #[error("cannot read the disk: {0}")]
    Disk(#[from] io::Error),
    /// Neither partitions nor a file system.
    #[error("the disk has no partition table and no file system that is known; {REMEDY}")]
    NothingKnown,
    /// Only volumes that are not read, or readable ones without kernel.
    #[error("no kernel found: {0}; {REMEDY}")]
    NoKernel(String),
    /// A configuration was found, but not what it boots.
    #[error("{config} boots {path}, which cannot be read: {reason}; {REMEDY}")]
    Missing {
        /// The configuration and its volume.
        config: String,
        /// The file it names.
        path: String,
        /// The reason.
        reason: String,
    },
}

/// Finds kernel, initrd and command line in an image (see the module's text for the order). The image
/// is not trusted: work and memory are bounded.
pub fn find<D: Read + Seek + 'static>(disk: D) -> Result<BootFiles, FindError> {
    let image = image::open(Box::new(disk))?;
    let mut missing = None;
    for source in [from_grub, from_bls, from_extlinux, from_uki, from_plain_files] {
        for volume in &image.volumes {
            for found in source(&image, volume) {
                match load(&image, volume, found) {
                    Ok(files) => return Ok(files),
                    Err(error) => missing = missing.or(Some(error)),
                }
            }
        }
    }
    Err(missing.unwrap_or_else(|| nothing(&image)))
}

/// A configuration's choice.
struct Found {
    /// The file it comes from.
    config: String,
    entry: Entry,
}

fn nothing(image: &Image) -> FindError {
    if image.volumes.is_empty() && image.unreadable.is_empty() {
        return FindError::NothingKnown;
    }
    let readable = image
        .volumes
        .iter()
        .map(|volume| format!("{} has no boot configuration", volume.label));
    let unreadable = image
        .unreadable
        .iter()
        .map(|other| format!("{} {}", other.place, other.reason));
    FindError::NoKernel(unreadable.chain(readable).collect::<Vec<_>>().join(", "))
}

/// Reads what an entry names.
fn load(image: &Image, own: &Volume, found: Found) -> Result<BootFiles, FindError> {
    let Found { config, entry } = found;
    let config = format!("{config} in {}", own.label);
    let read = |path: &str| {
        let named = image.volumes.iter().filter(|volume| {
            entry
                .fs_uuid
                .as_ref()
                .is_some_and(|uuid| uuid.eq_ignore_ascii_case(&volume.uuid()))
        });
        let mut reason = ReadError::NotFound;
        for volume in named.chain([own]).chain(&image.volumes) {
            match volume.read(path) {
                Ok(data) => return Ok(data),
                Err(ReadError::NotFound) => {}
                Err(error) => reason = error,
            }
        }
        Err(FindError::Missing {
            config: config.clone(),
            path: path.to_owned(),
            reason: reason.to_string(),
        })
    };
    let mut kernel = read(&entry.kernel)?;
    let mut initrd = Vec::new();
    let mut cmdline = entry.cmdline.clone();
    let mut title = entry.title.clone();
    if let Some(unified) = uki::parse(&kernel) {
        kernel = unified.kernel;
        initrd = unified.initrd.unwrap_or_default();
        if cmdline.is_empty() {
            cmdline = unified.cmdline;
        }
        if title.is_empty() {
            title = unified
                .release
                .map_or_else(|| "unified kernel image".into(), |release| format!("Linux {release}"));
        }
    }
    for path in &entry.initrds {
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend(read(path)?);
    }
    Ok(BootFiles {
        kernel,
        kernel_path: entry.kernel,
        initrd: (!initrd.is_empty()).then_some(initrd),
        cmdline,
        source: format!("{title} ({config})"),
    })
}

/// The environment block beside a GRUB configuration, or of any volume: it may be kept apart.
fn grubenv(image: &Image, own: &Volume) -> Vec<(String, String)> {
    const PATHS: [&str; 4] = [
        "/boot/grub/grubenv",
        "/grub/grubenv",
        "/boot/grub2/grubenv",
        "/grub2/grubenv",
    ];
    let mut volumes = [own].into_iter().chain(&image.volumes);
    let text = volumes.find_map(|volume| PATHS.iter().find_map(|path| volume.text(path)));
    text.map_or_else(Vec::new, |text| config::grubenv(&text))
}

fn from_grub(image: &Image, volume: &Volume) -> Vec<Found> {
    let mut paths: Vec<String> = ["/boot/grub", "/grub", "/boot/grub2", "/grub2"]
        .map(|directory| format!("{directory}/grub.cfg"))
        .into();
    if volume.kind == Kind::Fat {
        paths.extend(
            volume
                .list("/EFI")
                .iter()
                .map(|vendor| format!("/EFI/{vendor}/grub.cfg")),
        );
    }
    let found = paths.into_iter().filter_map(|config| {
        let text = volume.text(&config)?;
        let entry = grub::default_entry(&text, &grubenv(image, volume))?;
        Some(Found { config, entry })
    });
    found.collect()
}

fn from_bls(image: &Image, volume: &Volume) -> Vec<Found> {
    let mut found = Vec::new();
    for root in ["", "/boot"] {
        let directory = format!("{root}/loader/entries");
        let names = volume.list(&directory);
        let files: Vec<_> = names
            .into_iter()
            .filter(|name| name.ends_with(".conf"))
            .filter_map(|name| Some((name.clone(), volume.text(&format!("{directory}/{name}"))?)))
            .collect();
        let loader = volume.text(&format!("{root}/loader/loader.conf"));
        if let Some(entry) = bls::default_entry(&files, loader.as_deref(), &grubenv(image, volume)) {
            found.push(Found {
                config: directory,
                entry,
            });
        }
    }
    found
}

fn from_extlinux(_image: &Image, volume: &Volume) -> Vec<Found> {
    const DIRECTORIES: [&str; 6] = [
        "/boot/extlinux",
        "/extlinux",
        "/boot/syslinux",
        "/syslinux",
        "/boot",
        "/",
    ];
    let mut found = Vec::new();
    for directory in DIRECTORIES {
        for name in ["extlinux.conf", "syslinux.cfg"] {
            let config = format!("{}/{name}", directory.trim_end_matches('/'));
            let entry = volume
                .text(&config)
                .and_then(|text| extlinux::default_entry(&text, directory));
            found.extend(entry.map(|entry| Found { config, entry }));
        }
    }
    found
}

fn from_uki(_image: &Image, volume: &Volume) -> Vec<Found> {
    let mut found = Vec::new();
    for directory in ["/EFI/Linux", "/boot/EFI/Linux"] {
        let mut names = volume.list(directory);
        names.retain(|name| name.to_ascii_lowercase().ends_with(".efi"));
        names.sort_by(|a, b| config::compare_versions(b, a));
        found.extend(names.into_iter().map(|name| Found {
            config: directory.to_owned(),
            entry: Entry {
                kernel: format!("{directory}/{name}"),
                ..Entry::default()
            },
        }));
    }
    found
}

/// Kernels by their usual names; only if the root file system can be told.
fn from_plain_files(image: &Image, volume: &Volume) -> Vec<Found> {
    let Some(root) = guess_root(image, volume) else {
        return Vec::new();
    };
    let mut kernels = Vec::new();
    for directory in ["", "/boot"] {
        if volume.exists(&format!("{directory}/vmlinuz")) {
            kernels.push((directory, String::new()));
        }
        let names = volume.list(if directory.is_empty() { "/" } else { directory });
        let mut versions: Vec<String> = names
            .iter()
            .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
            .collect();
        versions.retain(|version| !version.contains("rescue"));
        versions.sort_by(|a, b| config::compare_versions(b, a));
        kernels.extend(versions.into_iter().map(|version| (directory, format!("-{version}"))));
    }
    let found = kernels.into_iter().map(|(directory, suffix)| {
        let initrds = [
            format!("{directory}/initrd.img{suffix}"),
            format!("{directory}/initramfs{suffix}.img"),
            format!("{directory}/initrd{suffix}"),
        ];
        let entry = Entry {
            title: "kernel without boot configuration".into(),
            kernel: format!("{directory}/vmlinuz{suffix}"),
            initrds: initrds
                .into_iter()
                .find(|path| volume.exists(path))
                .into_iter()
                .collect(),
            cmdline: format!("root={root} ro"),
            fs_uuid: None,
        };
        Found {
            config: if directory.is_empty() {
                "/".into()
            } else {
                directory.to_owned()
            },
            entry,
        }
    });
    found.collect()
}

/// The root file system: the volume itself or another readable one that has /etc, else the first
/// partition with a file system that is not read but can hold a root.
fn guess_root(image: &Image, own: &Volume) -> Option<String> {
    let is_root = |volume: &&Volume| volume.kind == Kind::Ext && volume.exists("/etc");
    let root = [own].into_iter().chain(&image.volumes).find(is_root);
    let other = || image.unreadable.iter().find_map(|other| other.root_uuid.as_ref());
    root.map(|volume| format!("UUID={}", volume.uuid()))
        .or_else(|| other().map(|uuid| format!("PARTUUID={uuid}")))
}
