//! Unified kernel images (UAPI.5): an EFI program (PE, Microsoft's "PE Format") whose sections are
//! kernel, initrd and command line.

/// What a unified kernel image holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Uki {
    /// Section `.linux`: a bzImage.
    pub kernel: Vec<u8>,
    /// Section `.initrd`.
    pub initrd: Option<Vec<u8>>,
    /// Section `.cmdline`.
    pub cmdline: String,
    /// Section `.uname`: the kernel's release.
    pub release: Option<String>,
}

/// Most sections that are looked at.
const MAX_SECTIONS: usize = 96;

/// Takes an image apart; `None` if it is no PE file or has no kernel in it.
pub(crate) fn parse(file: &[u8]) -> Option<Uki> {
    let text = |section: &[u8]| {
        let text = String::from_utf8_lossy(section);
        text.trim_matches(|c: char| c == '\0' || c.is_whitespace()).to_owned()
    };
    let (mut kernel, mut initrd, mut cmdline, mut release) = (None, None, None, None);
    for (name, data) in sections(file)? {
        // Further profiles of the same image follow after ".profile": the first is the default.
        match name {
            b".profile" if kernel.is_some() => break,
            b".linux" => kernel = kernel.or(Some(data.to_vec())),
            b".initrd" => initrd = initrd.or(Some(data.to_vec())),
            b".cmdline" => cmdline = cmdline.or(Some(text(data))),
            b".uname" => release = release.or(Some(text(data))),
            _ => {}
        }
    }
    Some(Uki {
        kernel: kernel?,
        initrd,
        cmdline: cmdline.unwrap_or_default(),
        release,
    })
}

/// Name and data of every section; `None` if the headers are none.
fn sections(file: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let word = |at: usize| Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?) as usize);
    let long = |at: usize| Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?) as usize);
    if !file.starts_with(b"MZ") {
        return None;
    }
    let coff = long(0x3c)?.checked_add(4)?;
    if file.get(coff - 4..coff)? != b"PE\0\0" {
        return None;
    }
    let count = word(coff + 2)?.min(MAX_SECTIONS);
    let table = coff + 20 + word(coff + 16)?;
    let mut found = Vec::new();
    for index in 0..count {
        let at = table + index * 40;
        let name = file.get(at..at + 8)?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(8);
        // The data is padded to the file's alignment; its own length is the virtual size.
        let len = long(at + 8)?.min(long(at + 16)?);
        let start = long(at + 20)?;
        found.push((&name[..end], file.get(start..)?.get(..len)?));
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PE file with these sections.
    fn pe(sections: &[(&str, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; 0x400];
        file[..2].copy_from_slice(b"MZ");
        file[0x3c] = 0x80;
        file[0x80..0x84].copy_from_slice(b"PE\0\0");
        file[0x86] = sections.len() as u8;
        file[0x94] = 16;
        for (index, (name, data)) in sections.iter().enumerate() {
            let (start, at) = (file.len() as u32, 0x98 + 16 + index * 40);
            file.extend(*data);
            file.resize(file.len().next_multiple_of(512), 0);
            let stored = file.len() as u32 - start;
            file[at..at + name.len()].copy_from_slice(name.as_bytes());
            file[at + 8..at + 12].copy_from_slice(&(data.len() as u32).to_le_bytes());
            file[at + 16..at + 20].copy_from_slice(&stored.to_le_bytes());
            file[at + 20..at + 24].copy_from_slice(&start.to_le_bytes());
        }
        file
    }

    #[test]
    fn sections_are_taken_apart() {
        let file = pe(&[
            (".cmdline", b"root=/dev/vda1 ro\n\0"),
            (".uname", b"6.1.0"),
            (".linux", b"kernel"),
            (".initrd", b"initrd"),
            (".profile", b"ID=other"),
            (".cmdline", b"other"),
        ]);
        let expected = Uki {
            kernel: b"kernel".to_vec(),
            initrd: Some(b"initrd".to_vec()),
            cmdline: "root=/dev/vda1 ro".into(),
            release: Some("6.1.0".into()),
        };
        assert_eq!(parse(&file), Some(expected));
        for len in 0..file.len() - 1024 {
            assert!(
                parse(&file[..len]).is_none_or(|uki| uki.kernel == b"kernel"),
                "cut to {len}"
            );
        }
    }

    #[test]
    fn other_programs_are_none() {
        assert_eq!(parse(&pe(&[(".text", b"code")])), None);
        assert_eq!(parse(b"MZ"), None);
        assert_eq!(parse(b""), None);
    }
}
