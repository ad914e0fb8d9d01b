//! Loads by which schedulers are tried: vCPUs that share pages, or don't, and change what they do with time.
//!
//! A vCPU shows its progress on the serial console: a letter (`A` for vCPU 0) for so many rounds of its work.

use iced_x86::code_asm::{CodeAssembler, CodeLabel, al, dx, edx, qword_ptr, r8, r9, r12, r13, rax, rcx, rdx};

use super::MicroError;

/// Port of the first serial line.
const COM1: u32 = 0x3f8;

/// What a vCPU does for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Waits until the word at this address is even (odd), then raises it: two vCPUs write to one page in turn.
    Turns {
        /// The word's address, a multiple of 8.
        word: u64,
        /// Waits until it is odd.
        odd: bool,
    },
    /// Raises the word at this address, whoever else does.
    Raise {
        /// The word's address, a multiple of 8.
        word: u64,
    },
    /// Counts in registers: shares nothing.
    Count,
}

/// A part of a vCPU's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// What it does.
    pub work: Work,
    /// Until the TSC is so high; the last phase has no end.
    pub until: u64,
    /// Rounds for a letter; not 0.
    pub rounds: u64,
}

/// Instructions of a round of [`Work::Count`].
const COUNTED: u64 = 1000;

/// The program of a vCPU: these phases one after the other.
///
/// # Errors
/// The assembler refused an instruction, or there is no phase.
pub fn program(asm: &mut CodeAssembler, vcpu: usize, phases: &[Phase]) -> Result<(), MicroError> {
    let Some((last, before)) = phases.split_last() else { return Err(MicroError::Parameter("a load without a phase")) };
    for phase in before {
        one(asm, vcpu, phase, true)?;
    }
    one(asm, vcpu, last, false)
}

/// One phase. r8: the word. r9: the end. r12: rounds left for a letter.
fn one(asm: &mut CodeAssembler, vcpu: usize, phase: &Phase, ends: bool) -> Result<(), MicroError> {
    let (mut again, mut end) = (asm.create_label(), asm.create_label());
    // A phase before may have ended here.
    asm.nop()?;
    asm.mov(r9, phase.until)?;
    asm.mov(r12, phase.rounds)?;
    match phase.work {
        Work::Turns { word, .. } | Work::Raise { word } => asm.mov(r8, word)?,
        Work::Count => asm.nop()?,
    }
    asm.set_label(&mut again)?;
    asm.nop()?;
    match phase.work {
        Work::Turns { odd, .. } => {
            let (mut wait, mut mine) = (asm.create_label(), asm.create_label());
            asm.set_label(&mut wait)?;
            asm.mov(rax, qword_ptr(r8))?;
            asm.and(rax, 1)?;
            asm.cmp(rax, i32::from(odd))?;
            asm.je(mine)?;
            asm.pause()?;
            until(asm, ends, end)?;
            asm.jmp(wait)?;
            asm.set_label(&mut mine)?;
            asm.inc(qword_ptr(r8))?;
        }
        Work::Raise { .. } => asm.lock().inc(qword_ptr(r8))?,
        Work::Count => {
            let mut count = asm.create_label();
            asm.mov(rcx, COUNTED)?;
            asm.set_label(&mut count)?;
            asm.dec(rcx)?;
            asm.jnz(count)?;
        }
    }
    until(asm, ends, end)?;
    asm.dec(r12)?;
    asm.jnz(again)?;
    asm.mov(r12, phase.rounds)?;
    asm.mov(edx, COM1)?;
    asm.mov(al, i32::from(b'A') + vcpu as i32)?;
    asm.out(dx, al)?;
    asm.jmp(again)?;
    asm.set_label(&mut end)?;
    asm.nop()?;
    Ok(())
}

/// Goes to `end` once the TSC has come to r9. Destroys rax, rdx and r13.
fn until(asm: &mut CodeAssembler, ends: bool, end: CodeLabel) -> Result<(), MicroError> {
    if !ends {
        return Ok(());
    }
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.mov(r13, rdx)?;
    asm.or(rax, r13)?;
    asm.cmp(rax, r9)?;
    asm.jae(end)?;
    Ok(())
}
