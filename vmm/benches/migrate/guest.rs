//! The measured guest: a vCPU that reads its clock again and again, and so sees how long it did not run.

use krg_guest_kernel::micro::code_asm::*;
use krg_guest_kernel::micro::{Builder, MicroError, MicroGuest, done};

/// The host's orders: a number that is new each time; pages to write to from then on.
pub const ORDER: u64 = 32 << 20;
/// What the guest answers to an order: see [`Answer`].
pub const ANSWER: u64 = ORDER + 4096;
/// Pages that it writes to.
pub const PAGES: u64 = 40 << 20;
/// Nothing is mapped there.
const NO_STACK: u64 = 1 << 40;
/// Longer than this between two readings, in TSC ticks, the vCPU stood still.
pub const STOOD_STILL: u32 = 20_000;

/// Words at [`ANSWER`].
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Longest time between two readings since the last order, in ticks.
    pub longest: u64,
    /// All times of more than [`STOOD_STILL`].
    pub stood_still: u64,
}

/// The guest: vCPU 0 measures, the others halt.
pub fn build(memory: u64, end: u64, vcpus: usize) -> Result<MicroGuest, MicroError> {
    let builder = Builder { end, accessed_dirty: true, ..Builder::new(memory) };
    builder.build(vcpus, |asm, vcpu| if vcpu == 0 { program(asm) } else { done(asm, vcpu) })
}

/// r8: the last reading. r9: longest time. r10: the last order. r11: time stood still. r15: pages to write to.
fn program(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    let [mut outer, mut inner, mut short, mut touch, mut touched] = std::array::from_fn(|_| asm.create_label());
    let read = |asm: &mut CodeAssembler| -> Result<(), MicroError> {
        asm.rdtsc()?;
        asm.shl(rdx, 32)?;
        asm.or(rax, rdx)?;
        Ok(())
    };
    for register in [r9, r10, r11, r15] {
        asm.mov(register, 0u64)?;
    }
    // It has no use for a stack: nothing is fetched for it that its floor doesn't fetch.
    asm.mov(rsp, NO_STACK)?;
    read(asm)?;
    asm.mov(r8, rax)?;
    asm.set_label(&mut outer)?;
    asm.mov(r13, 256u64)?;
    asm.set_label(&mut inner)?;
    read(asm)?;
    asm.mov(rcx, rax)?;
    asm.sub(rcx, r8)?;
    asm.mov(r8, rax)?;
    asm.cmp(rcx, r9)?;
    asm.cmova(r9, rcx)?;
    asm.cmp(rcx, STOOD_STILL as i32)?;
    asm.jb(short)?;
    asm.add(r11, rcx)?;
    asm.set_label(&mut short)?;
    asm.dec(r13)?;
    asm.jnz(inner)?;
    asm.mov(r12, r15)?;
    asm.mov(r14, PAGES)?;
    asm.test(r12, r12)?;
    asm.jz(touched)?;
    asm.set_label(&mut touch)?;
    asm.inc(qword_ptr(r14))?;
    asm.add(r14, 4096)?;
    asm.dec(r12)?;
    asm.jnz(touch)?;
    asm.set_label(&mut touched)?;
    asm.mov(rbx, ORDER)?;
    asm.mov(rax, qword_ptr(rbx))?;
    asm.cmp(rax, r10)?;
    asm.je(outer)?;
    asm.mov(r15, qword_ptr(rbx + 8))?;
    asm.mov(r10, rax)?;
    asm.mov(rbx, ANSWER)?;
    asm.mov(qword_ptr(rbx), r9)?;
    asm.mov(qword_ptr(rbx + 8), r11)?;
    asm.mov(qword_ptr(rbx + 16), r10)?;
    asm.mov(r9, 0u64)?;
    asm.mov(r11, 0u64)?;
    // What that took doesn't count.
    read(asm)?;
    asm.mov(r8, rax)?;
    asm.jmp(outer)?;
    Ok(())
}
