//! A Linux kernel file, made ready to be loaded: a bzImage is unpacked here, so that the guest does
//! not spend its first seconds on it, and an ELF vmlinux is taken as it is.

mod elf;
mod header;
mod unpack;

pub use header::SetupHeader;
pub use unpack::{MAX_UNPACKED, UnpackError};

/// Why a file is no kernel that can be booted: one line.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file is neither a bzImage nor an ELF file.
    #[error("{name} is not a kernel: {what}; give a Linux bzImage or an ELF vmlinux for x86-64")]
    NotAKernel {
        /// What the file is called.
        name: String,
        /// What it is instead, or what it lacks.
        what: String,
    },
    /// A bzImage whose payload does not unpack.
    #[error("kernel {name}: payload does not unpack: {source}")]
    Unpack {
        /// What the file is called.
        name: String,
        /// The reason.
        source: UnpackError,
    },
}

/// A kernel as ELF, with what the boot protocol wants to know about it.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF64 file for x86-64: its headers and program headers have been checked, and every
    /// segment's file range is inside. Bytes beyond the segments (the relocations that a bzImage
    /// carries) may follow.
    pub elf: Vec<u8>,
    /// The setup header if the file was a bzImage.
    pub setup: Option<SetupHeader>,
    /// The release, "6.1.0-56-amd64", if the file tells it.
    pub version: Option<String>,
}

impl Kernel {
    /// Reads a kernel file. `name` is what messages call it.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Kernel, KernelError> {
        let not_a_kernel = |what| KernelError::NotAKernel {
            name: name.into(),
            what,
        };
        if bytes.starts_with(elf::MAGIC) {
            elf::check(bytes).map_err(not_a_kernel)?;
            return Ok(Kernel {
                elf: bytes.to_vec(),
                setup: None,
                version: elf_version(bytes),
            });
        }
        let setup = SetupHeader::parse(bytes).map_err(not_a_kernel)?;
        let elf =
            unpack::unpack(setup.payload(bytes).map_err(not_a_kernel)?).map_err(|source| KernelError::Unpack {
                name: name.into(),
                source,
            })?;
        elf::check(&elf).map_err(not_a_kernel)?;
        let version = setup.version(bytes).or_else(|| elf_version(&elf));
        Ok(Kernel {
            elf,
            setup: Some(setup),
            version,
        })
    }
}

/// The release out of the banner "Linux version 6.1.0-56-amd64 (...)" in the kernel's data.
fn elf_version(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    // Candidates start with a digit: format strings ("Linux version %s") contain the words, too.
    let mut from = 0;
    while let Some(at) = find(&elf[from..], BANNER) {
        let text = &elf[from + at + BANNER.len()..];
        let end = text
            .iter()
            .take(128)
            .position(|byte| !byte.is_ascii_graphic())
            .unwrap_or(0);
        if text.first().is_some_and(u8::is_ascii_digit) && end > 0 {
            return String::from_utf8(text[..end].to_vec()).ok();
        }
        from += at + BANNER.len();
    }
    None
}

/// Where `needle` first occurs. Looks for its first byte fast, as the haystack is large.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, _) = needle.split_first()?;
    let mut at = 0;
    while let Some(skip) = haystack[at..].iter().position(|&byte| byte == first) {
        at += skip;
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_named_as_what_they_are() {
        for (bytes, what) in [
            (&b""[..], "is empty"),
            (b"#!/bin/sh\necho", "no boot sector"),
            (&[0; 4096], "no boot sector"),
            (b"\x1f\x8b\x08\0", "compressed"),
            (b"\x7fELF\x01\x01\x01", "ELF"),
        ] {
            let error = Kernel::from_bytes("file", bytes).unwrap_err().to_string();
            assert!(
                error.starts_with("file is not a kernel: ") && error.contains(what),
                "{error}"
            );
        }
    }

    #[test]
    fn the_release_is_read_from_the_banner() {
        assert_eq!(
            elf_version(b"LLinux version %s\0Linux version 6.1.0-9 (gcc)"),
            Some("6.1.0-9".into())
        );
        assert_eq!(elf_version(b"Linux version "), None);
    }
}
