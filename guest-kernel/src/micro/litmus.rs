//! Litmus tests of the memory model: a few loads and stores on each vCPU, run very often, with the
//! outcomes counted in guest memory.
//!
//! One round runs `batch` iterations, each on locations of its own, between two barriers. In round r
//! every store writes r and every load sees r (1) or r - 1 (0): nothing has to be reset. After the
//! second barrier vCPU 0 counts the outcomes.

use iced_x86::code_asm::{
    AsmRegister64, CodeAssembler, eax, qword_ptr, r8, r9, r11, r12, r13, r14, rax, rbx, rcx, rdx, registers,
};

use super::{Barrier, MicroError, done};

/// One instruction of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Stores this round's value to variable 0 or 1.
    Store(usize),
    /// Loads variable 0 or 1. The loads of a test are numbered in the order of its text, from 0.
    Load(usize),
    /// `mfence`.
    Fence,
}

/// Variables a test may use.
const VARIABLES: usize = 2;
/// Most loads of one thread.
const THREAD_LOADS: usize = 2;
/// Most loads of a test: an outcome is a bit mask of them.
const LOADS: usize = 4;

/// A test: the instructions of each vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Litmus {
    /// The usual name.
    pub name: &'static str,
    /// What each vCPU does.
    pub threads: &'static [&'static [Op]],
}

use Op::{Fence, Load, Store};

/// Store buffering: both loads may see the old value, as stores wait in a buffer.
pub const SB: Litmus = Litmus {
    name: "SB",
    threads: &[&[Store(0), Load(1)], &[Store(1), Load(0)]],
};
/// Store buffering with fences: at least one load sees the new value.
pub const SB_FENCED: Litmus = Litmus {
    name: "SB+mfences",
    threads: &[&[Store(0), Fence, Load(1)], &[Store(1), Fence, Load(0)]],
};
/// Message passing: who sees the flag sees the data.
pub const MP: Litmus = Litmus {
    name: "MP",
    threads: &[&[Store(0), Store(1)], &[Load(1), Load(0)]],
};
/// Load buffering: no load sees a store that comes after the other one.
pub const LB: Litmus = Litmus {
    name: "LB",
    threads: &[&[Load(0), Store(1)], &[Load(1), Store(0)]],
};
/// Independent reads of independent writes: all see the two stores in the same order.
pub const IRIW: Litmus = Litmus {
    name: "IRIW",
    threads: &[&[Store(0)], &[Store(1)], &[Load(0), Load(1)], &[Load(1), Load(0)]],
};
/// Coherence of reads: one location never goes back.
pub const CORR: Litmus = Litmus {
    name: "CoRR",
    threads: &[&[Store(0)], &[Load(0), Load(0)]],
};

/// All tests.
pub const ALL: [Litmus; 6] = [SB, SB_FENCED, MP, LB, IRIW, CORR];

/// How a test runs and where its data is. All addresses are guest-physical, multiples of 8, and
/// zero at the start; the ranges must not overlap.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Rounds.
    pub rounds: u32,
    /// Iterations in a round.
    pub batch: u32,
    /// Where the two variables are: `batch * stride` bytes each.
    pub variables: [u64; VARIABLES],
    /// Bytes from one iteration's location to the next; a multiple of 8.
    pub stride: u32,
    /// The barrier's counter: 8 bytes.
    pub barrier: u64,
    /// What was loaded: `batch * 8` bytes for each load of the test.
    pub loaded: u64,
    /// The result: [`COUNTS`] 64-bit counters.
    pub counts: u64,
}

/// Counters of a result: one for each outcome, then [`TORN`].
pub const COUNTS: usize = (1 << LOADS) + 1;

/// The counter of iterations in which a load saw neither the old nor the new value: never right.
pub const TORN: usize = 1 << LOADS;

impl Litmus {
    /// Loads of the test.
    pub fn loads(&self) -> usize {
        self.threads
            .iter()
            .flat_map(|thread| thread.iter())
            .filter(|op| matches!(op, Load(_)))
            .count()
    }

    /// "10" for an outcome in which load 0 saw the new value and load 1 the old one.
    pub fn outcome_text(&self, outcome: usize) -> String {
        (0..self.loads())
            .map(|load| if outcome >> load & 1 == 1 { '1' } else { '0' })
            .collect()
    }

    /// The program of one vCPU.
    pub fn assemble(&self, asm: &mut CodeAssembler, vcpu: usize, run: &Run) -> Result<(), MicroError> {
        let thread = *self
            .threads
            .get(vcpu)
            .ok_or(MicroError::Parameter("the test has fewer vCPUs"))?;
        if run.rounds == 0 || run.batch == 0 || run.stride % 8 != 0 || run.stride > 1 << 20 || run.batch > 1 << 24 {
            return Err(MicroError::Parameter(
                "rounds, batch or stride of the litmus test out of range",
            ));
        }
        let loads = |thread: &[Op]| thread.iter().filter(|op| matches!(op, Load(_))).count();
        if self.loads() > LOADS || loads(thread) > THREAD_LOADS {
            return Err(MicroError::Parameter("the litmus test has too many loads"));
        }
        let first_load: usize = self.threads[..vcpu].iter().map(|thread| loads(thread)).sum();
        let barrier = Barrier {
            address: run.barrier,
            vcpus: self.threads.len(),
        };
        let column = u64::from(run.batch) * 8;
        let (mut round, mut iteration) = (asm.create_label(), asm.create_label());

        asm.mov(r12, 1u64)?;
        // Each vCPU's delays differ.
        asm.mov(r14, 0x9e37_79b9 * (vcpu as u64 + 1))?;
        asm.set_label(&mut round)?;
        barrier.wait(asm)?;
        asm.mov(r8, run.variables[0])?;
        asm.mov(r9, run.variables[1])?;
        asm.mov(r11, run.loaded + first_load as u64 * column)?;
        asm.mov(rcx, u64::from(run.batch))?;
        asm.set_label(&mut iteration)?;
        self.delay(asm)?;
        let mut results: Vec<AsmRegister64> = Vec::new();
        for op in thread {
            match *op {
                Fence => asm.mfence()?,
                Store(variable) => asm.mov(qword_ptr(pointer(variable)?), r12)?,
                Load(variable) => {
                    let register = [rax, rbx][results.len()];
                    asm.mov(register, qword_ptr(pointer(variable)?))?;
                    results.push(register);
                }
            }
        }
        for (index, register) in results.into_iter().enumerate() {
            asm.mov(qword_ptr(r11) + index as u64 * column, register)?;
        }
        asm.add(r8, run.stride as i32)?;
        asm.add(r9, run.stride as i32)?;
        asm.add(r11, 8)?;
        asm.dec(rcx)?;
        asm.jnz(iteration)?;
        barrier.wait(asm)?;
        if vcpu == 0 {
            self.count(asm, run)?;
        }
        asm.inc(r12)?;
        asm.cmp(r12, run.rounds as i32)?;
        asm.jbe(round)?;
        barrier.wait(asm)?;
        done(asm, vcpu)
    }

    /// Up to 7 pauses, by a linear congruential generator in r14: the vCPUs meet in other ways each
    /// time.
    fn delay(&self, asm: &mut CodeAssembler) -> Result<(), MicroError> {
        let (mut again, mut end) = (asm.create_label(), asm.create_label());
        asm.imul_3(r14, r14, 1_103_515_245)?;
        asm.add(r14, 12345)?;
        asm.mov(r13, r14)?;
        asm.shr(r13, 24)?;
        asm.and(r13, 7)?;
        asm.jz(end)?;
        asm.set_label(&mut again)?;
        asm.pause()?;
        asm.dec(r13)?;
        asm.jnz(again)?;
        asm.set_label(&mut end)?;
        asm.nop()?;
        Ok(())
    }

    /// Counts the outcomes of a round.
    fn count(&self, asm: &mut CodeAssembler, run: &Run) -> Result<(), MicroError> {
        let (mut iteration, mut torn, mut next) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.mov(r11, run.loaded)?;
        asm.mov(rbx, run.counts)?;
        asm.mov(rcx, u64::from(run.batch))?;
        asm.set_label(&mut iteration)?;
        asm.xor(eax, eax)?;
        for load in 0..self.loads() {
            asm.mov(rdx, qword_ptr(r11) + load as u64 * u64::from(run.batch) * 8)?;
            // 1 for this round's value, 0 for the one before.
            asm.sub(rdx, r12)?;
            asm.inc(rdx)?;
            asm.cmp(rdx, 1)?;
            asm.ja(torn)?;
            asm.shl(rdx, load as u32)?;
            asm.or(rax, rdx)?;
        }
        asm.inc(qword_ptr(rbx + rax * 8))?;
        asm.jmp(next)?;
        asm.set_label(&mut torn)?;
        asm.inc(qword_ptr(rbx) + TORN as u64 * 8)?;
        asm.set_label(&mut next)?;
        asm.add(r11, 8)?;
        asm.dec(rcx)?;
        asm.jnz(iteration)?;
        Ok(())
    }
}

/// The register that points to a variable.
fn pointer(variable: usize) -> Result<AsmRegister64, MicroError> {
    match variable {
        0 => Ok(registers::r8),
        1 => Ok(registers::r9),
        _ => Err(MicroError::Parameter("a litmus test has two variables")),
    }
}
