//! Counters that all vCPUs raise: by a locked instruction, and under a spinlock.

use iced_x86::code_asm::{CodeAssembler, eax, qword_ptr, r8, r9, r10, r11, r12, r13, rax, rbx, rcx};

use super::{Barrier, MicroError, done, wait_until};

/// Where the data of a counting program is: guest-physical addresses, multiples of 8, zero at the
/// start.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// vCPUs that take part.
    pub vcpus: usize,
    /// How often each raises the counter.
    pub count: u32,
    /// The barrier's counter: 8 bytes.
    pub barrier: u64,
    /// The counter: ends as `vcpus * count`.
    pub counter: u64,
    /// [`spinlock`]: a second counter, best on another page, that must always equal the first.
    pub twin: u64,
    /// [`spinlock`]: the lock, 8 bytes.
    pub lock: u64,
    /// 8 bytes for each vCPU: see the programs.
    pub results: u64,
}

/// `lock xadd`. Result of each vCPU: the sum of the values it found. Every value from 0 on is found
/// exactly once, so all results add up to n(n - 1)/2 for n = `vcpus * count`.
pub fn locked_add(asm: &mut CodeAssembler, vcpu: usize, run: &Run) -> Result<(), MicroError> {
    let barrier = Barrier {
        address: run.barrier,
        vcpus: run.vcpus,
    };
    let mut again = asm.create_label();
    barrier.wait(asm)?;
    asm.mov(r8, run.counter)?;
    asm.mov(rcx, u64::from(run.count))?;
    asm.mov(rbx, 0u64)?;
    asm.set_label(&mut again)?;
    asm.mov(eax, 1)?;
    asm.lock().xadd(qword_ptr(r8), rax)?;
    asm.add(rbx, rax)?;
    asm.dec(rcx)?;
    asm.jnz(again)?;
    finish(asm, vcpu, run, &barrier)
}

/// A spinlock by `xchg`, released by a plain store, around plain increments of the counter and its
/// twin. Result of each vCPU: how often it found the two different, which must be never.
pub fn spinlock(asm: &mut CodeAssembler, vcpu: usize, run: &Run) -> Result<(), MicroError> {
    let barrier = Barrier {
        address: run.barrier,
        vcpus: run.vcpus,
    };
    let (mut again, mut equal) = (asm.create_label(), asm.create_label());
    barrier.wait(asm)?;
    asm.mov(r8, run.counter)?;
    asm.mov(r9, run.twin)?;
    asm.mov(r10, run.lock)?;
    asm.mov(rcx, u64::from(run.count))?;
    asm.mov(rbx, 0u64)?;
    asm.set_label(&mut again)?;
    wait_until(asm, |asm, success| {
        asm.mov(eax, 1)?;
        asm.xchg(qword_ptr(r10), rax)?;
        asm.test(rax, rax)?;
        asm.jz(success)?;
        Ok(())
    })?;
    asm.mov(r12, qword_ptr(r8))?;
    asm.mov(r13, qword_ptr(r9))?;
    asm.inc(r12)?;
    asm.mov(qword_ptr(r8), r12)?;
    asm.inc(r13)?;
    asm.mov(qword_ptr(r9), r13)?;
    asm.cmp(r12, r13)?;
    asm.je(equal)?;
    asm.inc(rbx)?;
    asm.set_label(&mut equal)?;
    asm.xor(eax, eax)?;
    asm.mov(qword_ptr(r10), rax)?;
    asm.dec(rcx)?;
    asm.jnz(again)?;
    finish(asm, vcpu, run, &barrier)
}

/// Stores the result in rbx, waits for the others and ends.
fn finish(asm: &mut CodeAssembler, vcpu: usize, run: &Run, barrier: &Barrier) -> Result<(), MicroError> {
    asm.mov(r11, run.results + vcpu as u64 * 8)?;
    asm.mov(qword_ptr(r11), rbx)?;
    barrier.wait(asm)?;
    done(asm, vcpu)
}
