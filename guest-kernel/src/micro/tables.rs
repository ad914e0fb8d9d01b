//! Page tables and descriptor tables (Intel SDM vol. 3, 4.5 "4-Level Paging", 3.4.5 "Segment
//! Descriptors", 7.7 "Task Management in 64-bit Mode").

use super::{Builder, HANDLER_LEN, Layout};

/// Size of the mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB: four levels of tables.
    Small,
    /// 2 MiB: three levels.
    Large,
}

/// vCPUs whose TSS descriptors fit the GDT.
pub(super) const MAX_VCPUS: usize = 1024;

/// Exceptions that have a handler: all that the processor defines.
pub(super) const EXCEPTIONS: u8 = 32;

pub(super) const KERNEL_CODE: u16 = 1 << 3;
pub(super) const USER_DATA: u16 = 3 << 3 | 3;
pub(super) const USER_CODE: u16 = 4 << 3 | 3;
/// First GDT entry of the TSS descriptors, two entries each.
const FIRST_TSS: u16 = 6;

/// Ports that programs may use: the serial line's are the last.
const PORTS: u16 = 0x400;

/// The TSS proper, then its I/O bitmap for [`PORTS`] and the byte of ones that ends it. IOPL 3
/// alone is not enough: a KVM that runs CPL 3 in the host's user mode does not keep it.
pub(super) const TSS_LEN: u16 = TSS_FIXED + PORTS / 8 + 1;
const TSS_FIXED: u16 = 104;
/// Bytes from one TSS to the next.
const TSS_STRIDE: u64 = 256;

const PRESENT_WRITABLE_USER: u64 = 0b111;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Maps the guest's memory one to one. Returns the top-level tables: one, or one for each vCPU.
pub(super) fn page_tables(builder: &Builder, layout: &mut Layout, vcpus: usize) -> Vec<u64> {
    let accessed = if builder.accessed_dirty { ACCESSED } else { 0 };
    let leaf = PRESENT_WRITABLE_USER | if builder.accessed_dirty { ACCESSED | DIRTY } else { 0 };
    let (step, leaf) = match builder.page_size {
        PageSize::Small => (4096, leaf),
        PageSize::Large => (2 << 20, leaf | LARGE),
    };
    // From the leaves up: the entries of one level are the tables of the level below.
    let mut entries: Vec<u64> = (0..builder.memory / step).map(|index| (index * step) | leaf).collect();
    let levels_above = if builder.page_size == PageSize::Small { 3 } else { 2 };
    for _ in 0..levels_above {
        entries = entries
            .chunks(512)
            .map(|table| {
                let mut table = table.to_vec();
                table.resize(512, 0);
                layout.put(&words(&table)) | PRESENT_WRITABLE_USER | accessed
            })
            .collect();
    }
    entries.resize(512, 0);
    let roots = if builder.own_roots { vcpus } else { 1 };
    (0..roots).map(|_| layout.put(&words(&entries))).collect()
}

/// Where the descriptor tables are.
pub(super) struct Descriptors {
    pub gdt: (u64, u16),
    pub idt: (u64, u16),
    /// Selector and base for each vCPU.
    pub tss: Vec<(u16, u64)>,
}

/// GDT, IDT with a handler for each exception at `handlers`, and TSSs with the kernel stacks that end
/// at `stack(vcpu)`.
pub(super) fn descriptor_tables(
    layout: &mut Layout,
    vcpus: usize,
    handlers: u64,
    stack: impl Fn(usize) -> u64,
) -> Descriptors {
    let mut tss_bytes = Vec::new();
    for vcpu in 0..vcpus {
        let mut tss = [0; TSS_STRIDE as usize];
        tss[4..12].copy_from_slice(&stack(vcpu).to_le_bytes());
        tss[102..104].copy_from_slice(&TSS_FIXED.to_le_bytes());
        tss[usize::from(TSS_LEN) - 1] = 0xff;
        tss_bytes.extend(tss);
    }
    let tss_at = layout.put(&tss_bytes);

    let mut gdt = vec![
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
    ];
    let mut tss = Vec::new();
    for vcpu in 0..vcpus as u64 {
        let base = tss_at + vcpu * TSS_STRIDE;
        tss.push(((FIRST_TSS + 2 * vcpu as u16) << 3, base));
        // Type 11: busy, as it is loaded.
        gdt.push(u64::from(TSS_LEN - 1) | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56);
        gdt.push(base >> 32);
    }
    let gdt = words(&gdt);
    let gdt_limit = gdt.len() as u16 - 1;
    let gdt_at = layout.put(&gdt);

    let mut idt = Vec::new();
    for vector in 0..u64::from(EXCEPTIONS) {
        let handler = handlers + vector * HANDLER_LEN as u64;
        // Interrupt gate, DPL 3: `int3` is allowed.
        idt.push(handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48);
        idt.push(handler >> 32);
    }
    let idt = words(&idt);
    let idt_limit = idt.len() as u16 - 1;
    Descriptors {
        gdt: (gdt_at, gdt_limit),
        idt: (layout.put(&idt), idt_limit),
        tss,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(writes: &[(u64, Vec<u8>)], root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for level in (0..4).rev() {
            let index = (address >> (12 + 9 * level) & 511) as usize;
            let (_, bytes) = writes.iter().find(|(at, _)| *at == table)?;
            let entry = u64::from_le_bytes(bytes[index * 8..][..8].try_into().ok()?);
            if entry & PRESENT_WRITABLE_USER != PRESENT_WRITABLE_USER {
                return None;
            }
            let offset_bits = 12 + 9 * level;
            table = entry & 0x000f_ffff_ffff_f000;
            if level == 0 || entry & LARGE != 0 {
                return Some(table | address & ((1 << offset_bits) - 1));
            }
        }
        None
    }

    #[test]
    fn memory_is_mapped_one_to_one_and_nothing_else() {
        for page_size in [PageSize::Small, PageSize::Large] {
            for accessed_dirty in [false, true] {
                let builder = Builder {
                    page_size,
                    accessed_dirty,
                    ..Builder::new(6 << 20)
                };
                let mut layout = Layout {
                    next: 0x1000,
                    writes: Vec::new(),
                };
                let roots = page_tables(&builder, &mut layout, 3);
                assert_eq!(roots.len(), 1);
                for address in [0, 0x1234, 0x20_0000, 0x5f_ffff] {
                    assert_eq!(translate(&layout.writes, roots[0], address), Some(address));
                }
                assert_eq!(translate(&layout.writes, roots[0], 0x60_0000), None);
                assert_eq!(translate(&layout.writes, roots[0], 1 << 40), None);
            }
        }
    }
}
