//! Puts a Linux kernel into guest memory and says where vCPU 0 starts (Linux's
//! Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use std::io::Cursor;
use std::ops::Range;

use krg_scheduler::Placement;
use kvm_bindings::{kvm_regs, kvm_segment};
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{KernelLoader, elf::Elf};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::acpi;
use super::error::MachineError;
use super::layout::{
    ACPI, BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK, COMMAND_LINE, ECAM, HIGH_MEMORY, LOW_BOOT_END, LOW_RAM_END,
    REGISTERS, STUB, ZERO_PAGE, ram_ranges,
};
use super::vcpu::Vcpu;

/// Highest end of an initrd that every 64-bit kernel takes (`initrd_addr_max`).
const INITRD_END: u64 = 0x8000_0000;
/// Memory the initial page tables map one to one.
const IDENTITY_MAPPED: u64 = 1 << 30;
const PAGE: u64 = 0x1000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What to boot.
pub struct Kernel<'a> {
    /// An uncompressed x86-64 ELF kernel.
    pub elf: &'a [u8],
    /// The initrd; empty: none.
    pub initrd: &'a [u8],
    /// Command line, as [`super::command_line`] completes it.
    pub command_line: &'a str,
}

/// What [`load`] put where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Where vCPU 0 starts.
    pub entry: Entry,
    /// Guest-physical ranges that were written, page by page, ascending.
    pub written: Vec<Range<u64>>,
    /// The kernel image, with its zero-filled end.
    pub kernel: Range<u64>,
    /// The initrd.
    pub initrd: Range<u64>,
}

/// Initial state of vCPU 0: 64-bit mode on the tables [`write_tables`] made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// RSI: address of `boot_params`.
    pub rsi: u64,
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct ZeroPage(boot_params);

// SAFETY: boot_params is a repr(C, packed) structure of integers and arrays of them: it has no
// padding, and every bit pattern is a value of it.
unsafe impl ByteValued for ZeroPage {}

/// Loads `kernel` with everything it needs to start: page tables, ACPI tables, memory map,
/// command line.
///
/// # Errors
/// When something isn't what it claims to be, or doesn't fit.
pub fn load(memory: &GuestMemoryMmap<()>, placement: &Placement, kernel: &Kernel<'_>) -> Result<Loaded, MachineError> {
    let boot = |e: String| MachineError::Boot(e);
    let write = |bytes: &[u8], at: u64, what: &str| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(|e| boot(format!("{what} at {at:#x}: {e}")))
    };
    let low_end = placement.memory().min(LOW_RAM_END);
    let image = load_elf(memory, kernel.elf, low_end)?;
    let initrd = place_initrd(placement, kernel.initrd.len() as u64, image.range.end)?;
    write(kernel.initrd, initrd.start, "initrd")?;
    let room = (COMMAND_LINE.end - COMMAND_LINE.start) as usize - 1;
    if kernel.command_line.len() > room {
        return Err(boot(format!(
            "command line of {} bytes; the kernel takes {room}",
            kernel.command_line.len()
        )));
    }
    if kernel.command_line.contains('\0') {
        return Err(boot("command line has a NUL in it".into()));
    }
    write(
        &[kernel.command_line.as_bytes(), &[0]].concat(),
        COMMAND_LINE.start,
        "command line",
    )?;
    let tables = acpi::tables(placement)?;
    write(&tables, ACPI.start, "ACPI tables")?;
    write_tables(memory)?;
    let zero_page = ZeroPage(parameters(placement, kernel.command_line.len(), &initrd));
    write(zero_page.as_slice(), ZERO_PAGE, "boot parameters")?;
    let pages = |start: u64, len: usize| start & !(PAGE - 1)..(start + len as u64).next_multiple_of(PAGE);
    let written = vec![
        pages(0, (BOOT_PAGE_TABLES + 3 * PAGE) as usize),
        pages(COMMAND_LINE.start, kernel.command_line.len() + 1),
        pages(ACPI.start, tables.len()),
        image.range.start & !(PAGE - 1)..image.range.end.next_multiple_of(PAGE),
        initrd.start..initrd.end.next_multiple_of(PAGE),
    ];
    let written = written.into_iter().filter(|range| !range.is_empty()).collect();
    Ok(Loaded {
        entry: Entry {
            rip: image.entry,
            rsi: ZERO_PAGE,
        },
        written,
        kernel: image.range,
        initrd,
    })
}

struct Image {
    entry: u64,
    range: Range<u64>,
}

fn load_elf(memory: &GuestMemoryMmap<()>, elf: &[u8], low_end: u64) -> Result<Image, MachineError> {
    let loaded = Elf::load(memory, None, &mut Cursor::new(elf), Some(GuestAddress(HIGH_MEMORY)))
        .map_err(|e| MachineError::Boot(format!("kernel: {e}; an uncompressed x86-64 ELF kernel is needed")))?;
    let (start, end) =
        segments(elf).ok_or_else(|| MachineError::Boot("kernel: ELF program headers are broken".into()))?;
    let end = end.max(loaded.kernel_end);
    if start < HIGH_MEMORY || end > low_end.min(IDENTITY_MAPPED) {
        return Err(MachineError::Boot(format!(
            "kernel: takes {start:#x} to {end:#x}, guest memory has room from {HIGH_MEMORY:#x} to {:#x}",
            low_end.min(IDENTITY_MAPPED)
        )));
    }
    Ok(Image {
        entry: loaded.kernel_load.0,
        range: start..end,
    })
}

/// Lowest and highest physical address of the loadable segments, zero-filled ends included
/// (ELF-64: e_phoff at 32, e_phnum at 56; p_type, p_paddr at 24, p_memsz at 40).
fn segments(elf: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(elf.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let table = usize::try_from(word(32)?).ok()?;
    let count = u16::from_le_bytes(elf.get(56..58)?.try_into().ok()?);
    let (mut start, mut end) = (u64::MAX, 0);
    for header in 0..usize::from(count) {
        let at = table.checked_add(header * 56)?;
        if word(at)? as u32 == 1 {
            let address = word(at.checked_add(24)?)?;
            start = start.min(address);
            end = end.max(address.checked_add(word(at.checked_add(40)?)?)?);
        }
    }
    (start < end).then_some((start, end))
}

/// At the top of what node 0 has below the limit, so that it is loaded without crossing hosts.
fn place_initrd(placement: &Placement, len: u64, kernel_end: u64) -> Result<Range<u64>, MachineError> {
    let own = placement.hosts.first().map_or(0, |host| host.memory);
    for top in [own, placement.memory()] {
        let top = top.min(LOW_RAM_END).min(INITRD_END) & !(PAGE - 1);
        let Some(start) = top.checked_sub(len).map(|s| s & !(PAGE - 1)) else {
            continue;
        };
        if start >= kernel_end {
            return Ok(start..start + len);
        }
    }
    Err(MachineError::Boot(format!(
        "initrd of {} MiB doesn't fit above the kernel; give the guest more memory",
        len >> 20
    )))
}

fn parameters(placement: &Placement, command_line: usize, initrd: &Range<u64>) -> boot_params {
    let mut p = boot_params::default();
    p.hdr.boot_flag = 0xaa55;
    p.hdr.header = u32::from_le_bytes(*b"HdrS");
    p.hdr.kernel_alignment = 0x100_0000;
    p.hdr.type_of_loader = 0xff;
    p.hdr.loadflags = 1;
    p.hdr.cmd_line_ptr = COMMAND_LINE.start as u32;
    p.hdr.cmdline_size = command_line as u32;
    p.hdr.ramdisk_image = initrd.start as u32;
    p.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    p.acpi_rsdp_addr = ACPI.start;
    let map = memory_map(placement.memory());
    p.e820_entries = map.len() as u8;
    for (slot, (range, kind)) in p.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            r#type: kind,
        };
    }
    p
}

/// The e820 map. Firmware tables and device registers are reserved; the stubs' slot as well, so
/// that no guest places a device there.
fn memory_map(memory: u64) -> Vec<(Range<u64>, u32)> {
    let mut map = vec![(0..LOW_BOOT_END, E820_RAM), (ACPI, E820_RESERVED)];
    for range in ram_ranges(memory) {
        map.push((range.start.max(HIGH_MEMORY)..range.end, E820_RAM));
    }
    map.extend([ECAM, REGISTERS, STUB].map(|range| (range, E820_RESERVED)));
    map
}

/// Writes the GDT and the identity map of the first GiB that [`Entry`] starts on.
///
/// # Errors
/// When there is no memory below 1 MiB.
pub fn write_tables(memory: &GuestMemoryMmap<()>) -> Result<(), MachineError> {
    let put = |value: u64, at: u64| {
        memory
            .write_slice(&value.to_le_bytes(), GuestAddress(at))
            .map_err(|e| MachineError::Boot(format!("initial tables at {at:#x}: {e}")))
    };
    // Null, unused, 64-bit code, data, TSS: the selectors Linux's boot protocol asks for.
    for (slot, descriptor) in [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x008f_8b00_0000_ffff,
    ]
    .iter()
    .enumerate()
    {
        put(*descriptor, BOOT_GDT + 8 * slot as u64)?;
    }
    // Present, writable, accessed, dirty.
    put((BOOT_PAGE_TABLES + PAGE) | 0x63, BOOT_PAGE_TABLES)?;
    put((BOOT_PAGE_TABLES + 2 * PAGE) | 0x63, BOOT_PAGE_TABLES + PAGE)?;
    (0..512).try_for_each(|i| put(i << 21 | 0xe3, BOOT_PAGE_TABLES + 2 * PAGE + 8 * i))
}

impl Entry {
    /// Sets a vCPU's registers.
    pub(crate) fn apply(&self, vcpu: &Vcpu) -> Result<(), MachineError> {
        let segment = |selector, type_, l| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        let mut sregs = vcpu.sregs()?;
        let data = segment(0x18, 3, 0);
        sregs.cs = segment(0x10, 11, 1);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: 0x20,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (BOOT_GDT, 39);
        // Paging and protection on; PAE; long mode enabled and active.
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, BOOT_PAGE_TABLES, sregs.cr4 | 0x20, 0x500);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs {
            rip: self.rip,
            rsi: self.rsi,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: 2,
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krg_scheduler::HostShare;

    fn placement(sizes: &[u64]) -> Placement {
        Placement {
            hosts: sizes
                .iter()
                .map(|m| HostShare {
                    vcpus: vec![],
                    memory: m << 20,
                })
                .collect(),
        }
    }

    #[test]
    fn initrd_goes_to_the_top_of_node_0() {
        let place = |sizes: &[u64], len| place_initrd(&placement(sizes), len, 64 << 20);
        assert_eq!(
            place(&[256, 256], 0x1800).unwrap(),
            (256 << 20) - 0x2000..(256 << 20) - 0x800
        );
        assert_eq!(
            place(&[128, 256], 100 << 20).unwrap().end,
            384 << 20,
            "node 0 is too small"
        );
        assert!(place(&[128], 100 << 20).is_err());
        assert_eq!(place(&[4096], 4096).unwrap().end, INITRD_END);
    }

    #[test]
    fn memory_map_is_disjoint_and_keeps_devices_out() {
        let mut map = memory_map(5 << 30);
        map.sort_by_key(|(range, _)| range.start);
        assert!(map.windows(2).all(|w| w[0].0.end <= w[1].0.start), "{map:x?}");
        let kind = |at| map.iter().find(|(r, _)| r.contains(&at)).map(|(_, kind)| *kind);
        assert_eq!(
            [0x1000, HIGH_MEMORY, 5 << 30, STUB.start, 0xC000_0000].map(kind),
            [Some(1), Some(1), Some(1), Some(2), None]
        );
    }

    #[test]
    fn broken_kernels_are_refused() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 128 << 20)]).unwrap();
        let load = |elf: &[u8]| {
            load(
                &memory,
                &placement(&[128]),
                &Kernel {
                    elf,
                    initrd: &[],
                    command_line: "",
                },
            )
        };
        let text = load(b"not a kernel, not even an ELF file, but long enough to look at its header")
            .unwrap_err()
            .to_string();
        assert!(text.contains("ELF kernel is needed"), "{text}");
        assert!(load(&[]).is_err());
    }
}
