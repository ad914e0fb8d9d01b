//! The code a parked proxy runs for a moment to tell what is pending for its vCPU.
//!
//! An interrupt taken there lands in the stub of its vector, one `out` to the port of that number:
//! the port of the exit *is* the vector. With nothing pending the main code's `out` to
//! [`EMPTY_PORT`] is reached instead. The rest (EOI, parking again) is done from user space; only an
//! NMI goes back by `iretq`, which ends its blocking of further NMIs.
//!
//! The stubs, their page tables and stacks live in memory of this node alone, in a slot the guest
//! isn't told of.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::error::MachineError;
use super::layout::{MAX_VCPUS, STUB};

/// Port of "nothing is pending".
pub const EMPTY_PORT: u16 = 0x1000;

/// Bytes of the stub memory.
const SIZE: usize = (STUB.end - STUB.start) as usize;
const PML4: usize = 0;
const PDPT: usize = 0x1000;
const PD: usize = 0x2000;
const PT: usize = 0x3000;
const IDT: usize = 0x4000;
const GDT: usize = 0x5000;
const MAIN: usize = 0x5100;
/// 8 bytes for each of 256 vectors.
const VECTORS: usize = 0x5800;
/// One stack a vCPU, up to the end: proxies drain at the same time.
const STACKS: usize = 0x8000;
/// Room for two interrupt frames (an NMI on top of an interrupt) of 40 bytes, aligned to 16.
const STACK_SIZE: usize = 96;
const _: () = assert!(STACKS + STACK_SIZE * MAX_VCPUS as usize <= SIZE);

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 0x10;

/// Anonymous memory of this process with the stubs in it.
pub(crate) struct StubMemory(*mut libc::c_void);

// SAFETY: the pointer is only handed to KVM and to munmap; nothing is accessed through it after
// `new` returned.
unsafe impl Send for StubMemory {}
// SAFETY: as above.
unsafe impl Sync for StubMemory {}

impl StubMemory {
    pub fn new() -> Result<Self, MachineError> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(MachineError::last_os("mmap of the proxy stubs"));
        }
        let image = image();
        // SAFETY: `memory` is a writable mapping of SIZE bytes, `image` has exactly SIZE bytes, and
        // the two can't overlap, as the mapping is new.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), memory.cast::<u8>(), SIZE) };
        Ok(StubMemory(memory))
    }

    /// Where it is mapped in this process.
    pub fn host_address(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for StubMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this size and no reference into it exists.
        unsafe { libc::munmap(self.0, SIZE) };
    }
}

/// Content of the stub memory.
fn image() -> Vec<u8> {
    let mut image = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let table = |offset: usize| ((STUB.start + offset as u64) | 0x63).to_le_bytes();
    let index = |shift: u32| (STUB.start >> shift & 511) as usize * 8;
    // Present, writable, accessed, dirty: walks leave the tables alone.
    put(PML4 + index(39), &table(PDPT));
    put(PDPT + index(30), &table(PD));
    put(PD + index(21), &table(PT));
    for page in (0..SIZE).step_by(0x1000) {
        put(PT + index(12) + page / 0x1000 * 8, &table(page));
    }
    put(GDT + CODE_SELECTOR as usize, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(GDT + DATA_SELECTOR as usize, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    for vector in 0..=255u8 {
        let code = VECTORS + usize::from(vector) * 8;
        // out vector, al; iretq
        put(code, &[0xe6, vector, 0x48, 0xcf]);
        let handler = STUB.start + code as u64;
        let mut gate = [0; 16];
        gate[..2].copy_from_slice(&handler.to_le_bytes()[..2]);
        gate[2..4].copy_from_slice(&CODE_SELECTOR.to_le_bytes());
        gate[5] = 0x8e;
        gate[6..12].copy_from_slice(&handler.to_le_bytes()[2..]);
        put(IDT + usize::from(vector) * 16, &gate);
    }
    // out dx, al; jmp back to it
    put(MAIN, &[0xee, 0xeb, 0xfd]);
    image
}

/// General registers of a proxy at the start of the main code. IF is set, without which KVM would
/// not report pending interrupts of a parked vCPU.
pub(crate) fn registers(vcpu: u32) -> kvm_regs {
    let top = STACKS + STACK_SIZE * (vcpu % MAX_VCPUS + 1) as usize;
    kvm_regs {
        rip: STUB.start + MAIN as u64,
        rsp: STUB.start + top as u64,
        rdx: EMPTY_PORT.into(),
        rflags: 0x202,
        ..Default::default()
    }
}

/// Puts a proxy into 64-bit mode on the stubs' tables; `sregs` keeps what doesn't matter.
pub(crate) fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let segment = |selector, type_, l| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = segment(DATA_SELECTOR, 3, 0);
    sregs.cs = segment(CODE_SELECTOR, 11, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt.base = STUB.start + GDT as u64;
    sregs.gdt.limit = 0x17;
    sregs.idt.base = STUB.start + IDT as u64;
    sregs.idt.limit = 0xfff;
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = STUB.start + PML4 as u64;
    sregs.cr4 = 0x620;
    sregs.efer = 0xd00;
    sregs.interrupt_bitmap = [0; 4];
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(image: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn page_tables_map_exactly_the_stub_memory() {
        let image = image();
        let walk = |gpa: u64| {
            let mut table = PML4;
            for shift in [39, 30, 21, 12] {
                let entry = word(&image, table + (gpa >> shift & 511) as usize * 8);
                if entry & 1 == 0 {
                    return None;
                }
                let next = (entry & !0xfff) - STUB.start;
                if shift == 12 {
                    return Some(STUB.start + next);
                }
                table = next as usize;
            }
            None
        };
        for page in (STUB.start..STUB.end).step_by(0x1000) {
            assert_eq!(walk(page), Some(page));
        }
        assert_eq!((walk(STUB.start - 0x1000), walk(STUB.end)), (None, None));
    }

    #[test]
    fn gates_lead_to_the_port_of_their_vector() {
        let image = image();
        for vector in 0..256usize {
            let gate = &image[IDT + vector * 16..][..16];
            let mut address = [0; 8];
            address[..2].copy_from_slice(&gate[..2]);
            address[2..].copy_from_slice(&gate[6..12]);
            let code = (u64::from_le_bytes(address) - STUB.start) as usize;
            assert_eq!(image[code..code + 2], [0xe6, vector as u8]);
        }
    }

    #[test]
    fn stacks_do_not_overlap_and_are_aligned() {
        let tops: Vec<u64> = (0..MAX_VCPUS).map(|v| registers(v).rsp).collect();
        assert!(
            tops.iter()
                .all(|t| t % 16 == 0 && *t <= STUB.end && *t >= STUB.start + (STACKS + STACK_SIZE) as u64)
        );
        assert!(tops.windows(2).all(|w| w[1] - w[0] == STACK_SIZE as u64));
    }
}
