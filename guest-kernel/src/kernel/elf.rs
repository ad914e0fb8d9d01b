//! What an ELF file must fulfil to be loaded as a kernel (System V ABI, "Object Files").

/// First bytes of every ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const PT_LOAD: u64 = 1;

/// Checks the file header and that the file has every loadable segment. The error says what is
/// wrong.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(MAGIC) {
        return Err("no ELF header in its packed part".into());
    }
    let Some(header) = bytes.get(..HEADER_LEN) else {
        return Err("ELF header is cut off".into());
    };
    let field = |from: &[u8], at: usize, len: usize| {
        from[at..at + len]
            .iter()
            .rev()
            .fold(0, |all, &byte| all << 8 | u64::from(byte))
    };
    if header[4] != 2 || header[5] != 1 {
        return Err("an ELF file, but not 64-bit little-endian".into());
    }
    if field(header, 18, 2) != 62 {
        return Err("an ELF file for another machine than x86-64".into());
    }
    if !matches!(field(header, 16, 2), 2 | 3) {
        return Err("an ELF file that is not executable (an object, module or core file)".into());
    }
    if field(header, 54, 2) != PROGRAM_HEADER_LEN as u64 {
        return Err("an ELF file with program headers of unknown size".into());
    }
    let (offset, count) = (field(header, 32, 8), field(header, 56, 2) as usize);
    let table = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
    let Some(table) = table.and_then(|rest| rest.get(..count * PROGRAM_HEADER_LEN)) else {
        return Err("ELF program headers are cut off".into());
    };
    let mut loadable = 0;
    for (index, segment) in table.chunks_exact(PROGRAM_HEADER_LEN).enumerate() {
        if field(segment, 0, 4) != PT_LOAD {
            continue;
        }
        loadable += 1;
        let (at, file_len, memory_len) = (field(segment, 8, 8), field(segment, 32, 8), field(segment, 40, 8));
        if at.checked_add(file_len).is_none_or(|end| end > bytes.len() as u64) {
            return Err(format!("ELF segment {index} is cut off"));
        }
        if file_len > memory_len || field(segment, 24, 8).checked_add(memory_len).is_none() {
            return Err(format!("ELF segment {index} has impossible sizes"));
        }
    }
    match loadable {
        0 => Err("an ELF file without loadable segments".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable() -> Vec<u8> {
        let mut elf = vec![0; HEADER_LEN + PROGRAM_HEADER_LEN + 16];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16] = 2;
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        elf[64 + 8] = 120;
        elf[64 + 32] = 16;
        elf[64 + 40] = 32;
        elf
    }

    #[test]
    fn every_field_that_is_relied_on_is_checked() {
        assert_eq!(check(&executable()), Ok(()));
        for (at, value, reason) in [
            (0, 0, "no ELF"),
            (4, 1, "64-bit"),
            (5, 2, "little-endian"),
            (18, 40, "machine"),
            (16, 1, "not executable"),
            (54, 32, "unknown size"),
            (39, 1, "program headers are cut off"),
            (57, 1, "program headers are cut off"),
            (64 + 8, 121, "segment 0 is cut off"),
            (64 + 15, 0xff, "segment 0 is cut off"),
            (64 + 40, 15, "impossible sizes"),
            (64, 4, "without loadable"),
        ] {
            let mut elf = executable();
            elf[at] = value;
            let error = check(&elf).unwrap_err();
            assert!(error.contains(reason), "byte {at}: {error}");
        }
        for len in 0..executable().len() {
            assert!(check(&executable()[..len]).is_err(), "cut to {len}");
        }
    }
}
