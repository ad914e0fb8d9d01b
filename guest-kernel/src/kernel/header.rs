//! The setup header of a bzImage (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel
//! Header").

/// Where the header starts in the file, and in the zero page.
const START: usize = 0x1f1;

/// Protocol 2.12 and later: tells in `xloadflags` whether there is a 64-bit entry point.
const PROTOCOL_2_12: u16 = 0x020c;

/// What a loader for the 64-bit boot protocol needs of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    /// The header's bytes as they are in the file from 0x1f1 on: to be copied to the same offset of
    /// the zero page before the loader changes fields. At most 0x290 - 0x1f1 bytes.
    pub bytes: Vec<u8>,
    /// Boot protocol version: 0x020f is 2.15.
    pub protocol: u16,
    /// Bytes of the file before the protected-mode code.
    pub setup_len: usize,
    /// Start of the packed kernel, from the protected-mode code on, in bytes.
    pub payload_offset: u32,
    /// Length of the packed kernel in bytes.
    pub payload_len: u32,
    /// Highest address of the initrd's last byte.
    pub initrd_addr_max: u32,
    /// Longest command line in bytes, without the final NUL.
    pub cmdline_size: u32,
    /// Alignment of the kernel in memory in bytes.
    pub kernel_alignment: u32,
    /// XLF_* bits; bit 0: has a 64-bit entry point at +0x200 of the protected-mode code; bit 1: kernel,
    /// boot parameters, command line and initrd may be above 4 GiB.
    pub xloadflags: u16,
    /// Address the kernel would like to run at.
    pub pref_address: u64,
    /// Memory from the run address on that the kernel uses before it reads the memory map, bytes.
    pub init_size: u32,
}

impl SetupHeader {
    /// Reads the header from the file's beginning. The error says what the file is or lacks.
    pub(super) fn parse(bytes: &[u8]) -> Result<SetupHeader, String> {
        if bytes.is_empty() {
            return Err("is empty".into());
        }
        const PACKED: [(&[u8], &str); 4] = [
            (b"\x1f\x8b", "gzip"),
            (b"\xfd7zXZ", "xz"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"BZh", "bzip2"),
        ];
        if let Some((_, name)) = PACKED.iter().find(|(magic, _)| bytes.starts_with(magic)) {
            return Err(format!("is compressed with {name}, unpack it first"));
        }
        if bytes.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) {
            return Err("no boot sector and no ELF header".into());
        }
        if bytes.get(0x202..0x206) != Some(b"HdrS") {
            return Err("a boot sector without Linux setup header".into());
        }
        let field = |at: usize, len: usize| -> Result<u64, String> {
            let field = bytes.get(at..at + len).ok_or("setup header is cut off")?;
            Ok(field.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)))
        };
        let protocol = field(0x206, 2)? as u16;
        if protocol < PROTOCOL_2_12 {
            return Err(format!(
                "boot protocol {}.{:02} is older than 2.12",
                protocol >> 8,
                protocol & 0xff
            ));
        }
        let xloadflags = field(0x236, 2)? as u16;
        if xloadflags & 1 == 0 {
            return Err("a kernel for 32 bits, without 64-bit entry point".into());
        }
        // The second byte of the jump at 0x200 is the distance from 0x202 to the header's end.
        let end = (0x202 + field(0x201, 1)? as usize).min(0x290);
        let header = bytes.get(START..end).ok_or("setup header is cut off")?;
        let sectors = match field(START, 1)? as usize {
            0 => 4,
            n => n,
        };
        Ok(SetupHeader {
            bytes: header.to_vec(),
            protocol,
            setup_len: (sectors + 1) * 512,
            payload_offset: field(0x248, 4)? as u32,
            payload_len: field(0x24c, 4)? as u32,
            initrd_addr_max: field(0x22c, 4)? as u32,
            cmdline_size: field(0x238, 4)? as u32,
            kernel_alignment: field(0x230, 4)? as u32,
            xloadflags,
            pref_address: field(0x258, 8)?,
            init_size: field(0x260, 4)? as u32,
        })
    }

    /// The packed kernel inside the file.
    pub(super) fn payload<'a>(&self, file: &'a [u8]) -> Result<&'a [u8], String> {
        let start = self.setup_len + self.payload_offset as usize;
        let payload = file.get(start..).and_then(|rest| rest.get(..self.payload_len as usize));
        payload.ok_or_else(|| {
            format!(
                "is truncated: {} bytes, its packed part is {} bytes at {start}",
                file.len(),
                self.payload_len
            )
        })
    }

    /// The release out of the version string in the setup code, which ends in NUL.
    pub(super) fn version(&self, file: &[u8]) -> Option<String> {
        let pointer = usize::from(u16::from_le_bytes(file.get(0x20e..0x210)?.try_into().ok()?));
        if pointer == 0 {
            return None;
        }
        let text = file.get(..self.setup_len)?.get(0x200 + pointer..)?;
        let end = text.iter().take(128).position(|byte| !byte.is_ascii_graphic())?;
        if end == 0 {
            return None;
        }
        String::from_utf8(text[..end].to_vec()).ok()
    }
}
