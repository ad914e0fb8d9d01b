//! Micro guests: a few dozen machine instructions per vCPU, with page tables and descriptor tables
//! of their own, for tests of KVM and of the DSM without an operating system.
//!
//! Programs run at CPL 3, natively even where a KVM emulates kernel mode, and report by port I/O,
//! which they are allowed ([`PORT_DONE`], [`PORT_YIELD`], [`PORT_FAULT`]).

pub mod boot;
pub mod counter;
pub mod litmus;
pub mod load;
mod regs;
mod sync;
mod tables;
pub mod tso;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al};

pub use iced_x86::code_asm;
pub use regs::InitialRegs;
pub use sync::{Barrier, done, wait_until};
pub use tables::PageSize;

/// `out` of the vCPU's index (its low 8 bits) to this port: the program has ended. It repeats if the
/// vCPU is run again.
pub const PORT_DONE: u8 = 0xe0;

/// `out` to this port: the vCPU has been spinning for a while. Give others the processor and go on.
pub const PORT_YIELD: u8 = 0xe1;

/// `out` of an exception's vector to this port: the program has failed; the vCPU halts.
pub const PORT_FAULT: u8 = 0xe2;

/// Stack of each vCPU in bytes, for each of the two privilege levels.
const STACK_LEN: u64 = 4096;

/// Why a micro guest cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MicroError {
    /// The assembler refused an instruction.
    #[error("micro guest: cannot assemble: {0}")]
    Assemble(#[from] IcedError),
    /// Tables, code and stacks do not fit below `end`.
    #[error("micro guest: tables and code reach up to {used:#x}, beyond {end:#x}")]
    TooLarge {
        /// First free address they would need.
        used: u64,
        /// End of the room they have.
        end: u64,
    },
    /// A parameter out of range.
    #[error("micro guest: {0}")]
    Parameter(&'static str),
}

/// A guest ready to be put into memory and run.
#[derive(Clone, Debug)]
pub struct MicroGuest {
    /// Guest-physical address and bytes: to be written before any vCPU runs. They do not overlap.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// How each vCPU starts.
    pub vcpus: Vec<InitialRegs>,
    /// Guest-physical addresses of the top-level page tables in use.
    pub roots: Vec<u64>,
}

/// Lays out a micro guest. Everything the guest needs to run lies in `base..end`; the rest of its
/// memory is the programs' to use.
#[derive(Clone, Debug)]
pub struct Builder {
    /// First byte of tables, code and stacks; a multiple of 4096.
    pub base: u64,
    /// Where they must end.
    pub end: u64,
    /// Bytes of guest-physical memory from 0 on that are mapped one to one, user-accessible and
    /// writable; a multiple of 2 MiB.
    pub memory: u64,
    /// Size of the mappings.
    pub page_size: PageSize,
    /// Set the accessed and dirty bits from the start, so that walks write nothing.
    pub accessed_dirty: bool,
    /// A top-level table for each vCPU instead of one for all.
    pub own_roots: bool,
}

impl Builder {
    /// A guest with `memory` bytes and its tables from 64 KiB to 1 MiB.
    pub fn new(memory: u64) -> Builder {
        Builder {
            base: 0x1_0000,
            end: 0x10_0000,
            memory,
            page_size: PageSize::Large,
            accessed_dirty: false,
            own_roots: false,
        }
    }

    /// Assembles `program` once for each vCPU and lays everything out. The program gets the
    /// assembler and the vCPU's index; it must not return: [`done`] ends it.
    pub fn build(
        &self,
        vcpus: usize,
        mut program: impl FnMut(&mut CodeAssembler, usize) -> Result<(), MicroError>,
    ) -> Result<MicroGuest, MicroError> {
        if vcpus == 0 || vcpus > tables::MAX_VCPUS {
            return Err(MicroError::Parameter("the number of vCPUs is not 1 to 1024"));
        }
        if self.base % 4096 != 0 || self.memory % (2 << 20) != 0 || self.memory == 0 || self.end > self.memory {
            return Err(MicroError::Parameter(
                "base is not page-aligned, or memory no multiple of 2 MiB above end",
            ));
        }
        let mut layout = Layout {
            next: self.base,
            writes: Vec::new(),
        };
        let roots = tables::page_tables(self, &mut layout, vcpus);
        let faults = layout.put(&fault_handlers(layout.next)?);
        let kernel_stacks = layout.reserve(STACK_LEN * vcpus as u64);
        let descriptors = tables::descriptor_tables(&mut layout, vcpus, faults, |vcpu| {
            kernel_stacks + STACK_LEN * (vcpu as u64 + 1)
        });
        let user_stacks = layout.reserve(STACK_LEN * vcpus as u64);
        let mut starts = Vec::with_capacity(vcpus);
        for vcpu in 0..vcpus {
            let mut assembler = CodeAssembler::new(64)?;
            program(&mut assembler, vcpu)?;
            let code = assembler.assemble(layout.next)?;
            starts.push(InitialRegs {
                rip: layout.put(&code),
                rsp: user_stacks + STACK_LEN * (vcpu as u64 + 1),
                cr3: roots[vcpu % roots.len()],
                rdi: vcpu as u64,
                gdt: descriptors.gdt,
                idt: descriptors.idt,
                tss: descriptors.tss[vcpu],
            });
        }
        if layout.next > self.end {
            return Err(MicroError::TooLarge {
                used: layout.next,
                end: self.end,
            });
        }
        Ok(MicroGuest {
            writes: layout.writes,
            vcpus: starts,
            roots,
        })
    }
}

/// Hands out guest memory from `base` up, page by page.
struct Layout {
    next: u64,
    writes: Vec<(u64, Vec<u8>)>,
}

impl Layout {
    fn reserve(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next += len.next_multiple_of(4096);
        at
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.reserve(bytes.len() as u64);
        self.writes.push((at, bytes.to_vec()));
        at
    }
}

/// Bytes between two fault handlers.
const HANDLER_LEN: usize = 16;

/// One handler for each exception: reports the vector and halts for good.
fn fault_handlers(at: u64) -> Result<Vec<u8>, MicroError> {
    let mut all = Vec::new();
    for vector in 0..tables::EXCEPTIONS {
        let mut assembler = CodeAssembler::new(64)?;
        let mut halt = assembler.create_label();
        assembler.mov(al, i32::from(vector))?;
        assembler.out(u32::from(PORT_FAULT), al)?;
        assembler.set_label(&mut halt)?;
        assembler.hlt()?;
        assembler.jmp(halt)?;
        all.extend(assembler.assemble(at + all.len() as u64)?);
        all.resize((usize::from(vector) + 1) * HANDLER_LEN, 0xcc);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_fit() {
        for page_size in [PageSize::Large, PageSize::Small] {
            let builder = Builder {
                page_size,
                own_roots: true,
                ..Builder::new(64 << 20)
            };
            let guest = builder.build(4, done).unwrap();
            let mut end = builder.base;
            for (at, bytes) in &guest.writes {
                assert!(*at >= end, "{at:#x} overlaps what ends at {end:#x}");
                end = at + bytes.len() as u64;
            }
            assert!(end <= builder.end);
            assert_eq!((guest.vcpus.len(), guest.roots.len()), (4, 4));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let small = Builder {
            end: 0x1_2000,
            ..Builder::new(64 << 20)
        };
        assert!(matches!(small.build(1, done), Err(MicroError::TooLarge { .. })));
        for (builder, vcpus) in [(Builder::new(1 << 20), 1), (Builder::new(64 << 20), 0)] {
            assert!(matches!(builder.build(vcpus, done), Err(MicroError::Parameter(_))));
        }
    }
}
