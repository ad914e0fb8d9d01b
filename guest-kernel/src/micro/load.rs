//! Loads by which schedulers are tried: vCPUs that share pages, or don't, and change what they do with time.
//!
//! A vCPU tells its progress on the serial console, now and then: how many rounds of its work it has done, as
//! [`DIGITS`] hexadecimal digits. Each vCPU has characters of its own for them, so that [`Progress`] tells them apart
//! however they are mixed.

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, dx, eax, ecx, edx, qword_ptr, r8, r9, r12, r13, r13d, r14, r15, rax, rcx, rdx,
};

use super::MicroError;

/// Port of the first serial line.
const COM1: u32 = 0x3f8;
/// Digits of a number on the console: its lowest 32 bits.
pub const DIGITS: u32 = 8;
/// vCPUs whose progress can be told apart.
pub const MOST: usize = 4;
/// The character that says that vCPU 0 begins a phase, and that of its digit 0.
const BEGINS: u8 = b' ';
const ZERO: u8 = b'0';

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
    /// Counts in registers: shares nothing.
    Count,
    /// Halts, for good.
    Halt,
}

/// A part of a vCPU's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// What it does.
    pub work: Work,
    /// Until the TSC has made so many ticks since the vCPU began; the last phase has no end.
    pub until: u64,
}

/// What a console showed of the vCPUs' progress.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rounds of each vCPU, modulo 2^32, when it last told.
    pub rounds: [u32; MOST],
    /// Phases each vCPU has begun.
    pub phases: [u32; MOST],
    digits: [(u32, u32); MOST],
}

impl Progress {
    /// Takes a byte of the console's output; the vCPU that has told a whole number with it. What no vCPU of such a
    /// guest says is ignored.
    pub fn take(&mut self, byte: u8) -> Option<usize> {
        if let Some(phases) = byte.checked_sub(BEGINS).and_then(|vcpu| self.phases.get_mut(usize::from(vcpu))) {
            *phases += 1;
            return None;
        }
        let symbol = byte.checked_sub(ZERO)?;
        let vcpu = usize::from(symbol / 16);
        let (value, digits) = self.digits.get_mut(vcpu)?;
        (*value, *digits) = (*value << 4 | u32::from(symbol % 16), *digits + 1);
        if *digits < DIGITS {
            return None;
        }
        self.rounds[vcpu] = *value;
        (*value, *digits) = (0, 0);
        Some(vcpu)
    }
}

/// Instructions of a round of [`Work::Count`].
const COUNTED: u64 = 1000;

/// The program of a vCPU: these phases one after the other. It tells its progress every `every` ticks of the TSC.
///
/// # Errors
/// The assembler refused an instruction, there is no phase, the vCPU's number is [`MOST`] or more, or `every` 2^31 or
/// more.
pub fn program(asm: &mut CodeAssembler, vcpu: usize, phases: &[Phase], every: u32) -> Result<(), MicroError> {
    let (Some((last, before)), true, Ok(every)) = (phases.split_last(), vcpu < MOST, i32::try_from(every)) else {
        return Err(MicroError::Parameter("a load without a phase, of too many vCPUs, or that tells too rarely"));
    };
    asm.xor(r12, r12)?;
    asm.xor(r14, r14)?;
    time(asm)?;
    asm.mov(r15, rax)?;
    for phase in before {
        one(asm, vcpu, phase, true, every)?;
    }
    one(asm, vcpu, last, false, every)
}

/// One phase. r8: the word. r9: the end. r12: rounds. r14: when progress is told next.
fn one(asm: &mut CodeAssembler, vcpu: usize, phase: &Phase, ends: bool, every: i32) -> Result<(), MicroError> {
    let [mut again, mut end, mut digit] = std::array::from_fn(|_| asm.create_label());
    // A phase before may have ended here.
    asm.nop()?;
    asm.mov(edx, COM1)?;
    asm.mov(al, i32::from(BEGINS) + vcpu as i32)?;
    asm.out(dx, al)?;
    asm.mov(r9, phase.until)?;
    if let Work::Turns { word, .. } = phase.work {
        asm.mov(r8, word)?;
    }
    asm.nop()?;
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
            if ends {
                time(asm)?;
                until(asm, end)?;
            }
            asm.jmp(wait)?;
            asm.set_label(&mut mine)?;
            asm.inc(qword_ptr(r8))?;
        }
        Work::Count => {
            let mut count = asm.create_label();
            asm.mov(rcx, COUNTED)?;
            asm.set_label(&mut count)?;
            asm.dec(rcx)?;
            asm.jnz(count)?;
        }
        // The handler of any exception halts; a program can't.
        Work::Halt => asm.int3()?,
    }
    asm.inc(r12)?;
    time(asm)?;
    if ends {
        until(asm, end)?;
    }
    asm.cmp(rax, r14)?;
    asm.jb(again)?;
    asm.add(rax, every)?;
    asm.mov(r14, rax)?;
    asm.mov(r13, r12)?;
    asm.mov(ecx, DIGITS)?;
    asm.mov(edx, COM1)?;
    asm.set_label(&mut digit)?;
    asm.rol(r13d, 4)?;
    asm.mov(eax, r13d)?;
    asm.and(eax, 0xf)?;
    asm.add(eax, i32::from(ZERO) + 16 * vcpu as i32)?;
    asm.out(dx, al)?;
    asm.dec(ecx)?;
    asm.jnz(digit)?;
    asm.jmp(again)?;
    asm.set_label(&mut end)?;
    asm.nop()?;
    Ok(())
}

/// rax: the TSC. Destroys rdx.
fn time(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)?;
    Ok(())
}

/// Goes to `end` once rax is as far from r15, the beginning, as r9. Destroys r13.
fn until(asm: &mut CodeAssembler, end: CodeLabel) -> Result<(), MicroError> {
    asm.mov(r13, rax)?;
    asm.sub(r13, r15)?;
    asm.cmp(r13, r9)?;
    asm.jae(end)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_several_is_told_apart_and_noise_is_ignored() {
        let mut progress = Progress::default();
        let digits = |vcpu: u8, number: u32| (0..DIGITS).rev().map(move |n| ZERO + 16 * vcpu + (number >> (4 * n) & 15) as u8);
        let told = |progress: &mut Progress, bytes: Vec<u8>| bytes.into_iter().filter_map(|byte| progress.take(byte)).collect::<Vec<_>>();
        let mixed: Vec<u8> = digits(0, 0x0123_4567).zip(digits(3, 0xffff_fff0)).flat_map(|(a, b)| [a, b]).collect();
        assert_eq!(told(&mut progress, mixed), [0, 3]);
        assert_eq!(progress.rounds, [0x0123_4567, 0, 0, 0xffff_fff0]);
        let noise = [vec![BEGINS + 1, b'\n', 0xff], digits(1, 9).collect()].concat();
        assert_eq!(told(&mut progress, noise), [1]);
        assert_eq!((progress.phases, progress.rounds[1]), ([0, 1, 0, 0], 9));
    }

    #[test]
    fn a_load_has_a_phase() {
        let mut asm = CodeAssembler::new(64).unwrap();
        assert!(program(&mut asm, 0, &[], 1).is_err());
        let phase = Phase { work: Work::Count, until: 0 };
        assert!(program(&mut asm, MOST, &[phase], 1).is_err() && program(&mut asm, 0, &[phase], 1 << 31).is_err());
        assert!(program(&mut asm, 0, &[phase, phase], 1).is_ok() && asm.assemble(0).is_ok());
    }
}
