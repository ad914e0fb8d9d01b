//! Which file system, or other thing, a partition holds: by its magic numbers, so that what cannot
//! be read is at least named.

use super::Window;

/// What a partition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// ext2, ext3 or ext4: readable.
    Ext,
    /// FAT12, FAT16 or FAT32: readable.
    Fat,
    /// Something else that is known by name.
    Other(&'static str),
}

/// Offset, bytes there, name.
const MAGICS: [(u64, &[u8], &str); 19] = [
    (0, b"XFSB", "XFS"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (0x218, b"LVM2 001", "LVM"),
    (0x018, b"LVM2 001", "LVM"),
    (0x418, b"LVM2 001", "LVM"),
    (0x618, b"LVM2 001", "LVM"),
    (4086, b"SWAPSPACE2", "swap space"),
    (0x400, b"\x10\x20\xf5\xf2", "F2FS"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x8001, b"CD001", "ISO 9660"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (0x1_0034, b"ReIsErFs", "ReiserFS"),
    (0x1_0034, b"ReIsEr2Fs", "ReiserFS"),
    (
        0x1018,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        "bcachefs",
    ),
];

/// Looks for every magic number; `None` if nothing known is there.
pub(crate) fn probe(window: &Window) -> Option<Kind> {
    let has = |at: u64, magic: &[u8]| {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..magic.len()];
        window.read_at(bytes, at).is_ok() && bytes == magic
    };
    if let Some((_, _, name)) = MAGICS.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Some(Kind::Other(name));
    }
    if has(0x438, b"\x53\xef") {
        return Some(Kind::Ext);
    }
    if has(510, b"\x55\xaa") && (has(0x36, b"FAT1") || has(0x52, b"FAT32   ")) {
        return Some(Kind::Fat);
    }
    None
}
