//! The measured guest: a vCPU that waits for jobs and times every touch of a page.
//!
//! Between jobs a vCPU is in an `out`, which the node holds back until there is a job; it costs no
//! processor time then. A job and its results lie in memory of the vCPU's own node.

use krg_guest_kernel::micro::code_asm::*;
use krg_guest_kernel::micro::{Builder, MicroError, MicroGuest, PORT_YIELD};
use serde::{Deserialize, Serialize};

/// What node 0 writes before the start: tables and code.
pub const LOADED: u64 = 1 << 20;
/// From the start of a node's share: a page for each vCPU's job.
const JOBS: u64 = 2 << 20;
/// From the start of a node's share: results, [`RESULTS_LEN`] for each vCPU.
const RESULTS: u64 = 4 << 20;
const RESULTS_LEN: u64 = 1 << 20;
/// From the start of a node's share: the pages that are measured.
pub const ARENA: u64 = 16 << 20;

/// Most touches of a job whose times are kept.
pub const MOST_TIMED: u64 = RESULTS_LEN / 16;

/// What a vCPU does with each page of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Touch {
    /// Loads a word; timed.
    Read = 0,
    /// Stores a word; timed.
    Write = 1,
    /// Loads a word of every cache line; only the whole job is timed.
    Scan = 2,
    /// Stores a word of every cache line; only the whole job is timed.
    Fill = 3,
    /// Waits until the word at the job's base is even (odd, with `add` 1), then raises it; timed.
    Turns = 4,
    /// Loads a word of every cache line, and of every 512th page stores one; only the whole job is timed.
    Mixed = 5,
    /// Stores the word that is there; timed.
    Rewrite = 6,
}

impl Touch {
    fn is_timed_as_a_whole(self) -> bool {
        matches!(self, Touch::Scan | Touch::Fill | Touch::Mixed)
    }
}

/// A job: touches of pages `base + 4096 * index`, where `index` starts at `start` and becomes
/// `(index * multiply + add) & mask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    pub touch: Touch,
    pub base: u64,
    pub count: u64,
    pub start: u64,
    pub multiply: u64,
    pub add: u64,
    pub mask: u64,
}

impl Job {
    /// One page after the other.
    pub fn forward(touch: Touch, base: u64, count: u64) -> Job {
        Job {
            touch,
            base,
            count,
            start: 0,
            multiply: 1,
            add: 1,
            mask: u64::MAX >> 16,
        }
    }

    /// Every `stride`th page, `count` in all.
    pub fn strided(touch: Touch, base: u64, count: u64, stride: u64) -> Job {
        Job {
            add: stride,
            ..Job::forward(touch, base, count)
        }
    }

    /// `count` of the first `pages` pages, a power of two, each once, in an order without a pattern
    /// that differs with `seed`.
    pub fn scattered(touch: Touch, base: u64, pages: u64, count: u64, seed: u64) -> Job {
        // A full-period congruential generator: multiplier 1 modulo 4, odd increment.
        Job {
            start: seed & (pages - 1),
            multiply: 1_664_525,
            add: 1_013_904_223,
            mask: pages - 1,
            ..Job::forward(touch, base, count)
        }
    }

    /// The job as the guest reads it.
    pub fn words(&self, results: u64) -> [u64; 8] {
        [
            self.touch as u64,
            self.base,
            self.count,
            self.multiply,
            self.add,
            self.mask,
            results,
            self.start,
        ]
    }

    /// The pages it touches, in order: page frame numbers.
    pub fn frames(&self) -> impl Iterator<Item = u64> + '_ {
        let next = |index: &u64| Some(index.wrapping_mul(self.multiply).wrapping_add(self.add) & self.mask);
        std::iter::successors(Some(self.start), next)
            .take(self.count as usize)
            .map(|index| (self.base >> 12) + index)
    }

    /// Pairs of times it leaves behind.
    pub fn timed(&self) -> u64 {
        if self.touch.is_timed_as_a_whole() {
            1
        } else {
            self.count
        }
    }
}

/// Where the jobs of a vCPU whose node's share starts at `share` are put.
pub fn job_at(share: u64, vcpu: usize) -> u64 {
    share + JOBS + vcpu as u64 * 4096
}

/// Where its results are: two words for each timed touch, the TSC before and after.
pub fn results_at(share: u64, vcpu: usize) -> u64 {
    share + RESULTS + vcpu as u64 * RESULTS_LEN
}

/// The guest, for a machine of `memory` bytes; `share[vcpu]`: where the vCPU's node's memory starts.
pub fn build(memory: u64, shares: &[u64]) -> Result<MicroGuest, MicroError> {
    let builder = Builder {
        end: LOADED,
        accessed_dirty: true,
        ..Builder::new(memory)
    };
    builder.build(shares.len(), |asm, vcpu| program(asm, vcpu, job_at(shares[vcpu], vcpu)))
}

fn program(asm: &mut CodeAssembler, vcpu: usize, job: u64) -> Result<(), MicroError> {
    let mut next = asm.create_label();
    let kinds = [Touch::Read, Touch::Write, Touch::Scan, Touch::Fill, Touch::Turns, Touch::Mixed, Touch::Rewrite];
    let mut labels = kinds.map(|_| asm.create_label());
    asm.mov(rbx, job)?;
    asm.set_label(&mut next)?;
    asm.mov(al, vcpu as u32 & 0xff)?;
    asm.out(u32::from(PORT_YIELD), al)?;
    for (register, at) in [
        (r9, 8),
        (r10, 16),
        (r11, 24),
        (r12, 32),
        (r13, 40),
        (r14, 48),
        (r15, 56),
    ] {
        asm.mov(register, qword_ptr(rbx + at))?;
    }
    asm.mov(r8, qword_ptr(rbx))?;
    for (kind, label) in kinds.iter().zip(&labels) {
        asm.cmp(r8, *kind as i32)?;
        asm.je(*label)?;
    }
    asm.jmp(next)?;
    for (kind, label) in kinds.into_iter().zip(&mut labels) {
        asm.set_label(label)?;
        body(asm, kind)?;
        asm.jmp(next)?;
    }
    Ok(())
}

/// rdi: the TSC, once everything before is through. Destroys rax, rdx.
fn time(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    asm.mfence()?;
    asm.lfence()?;
    asm.rdtsc()?;
    asm.lfence()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)?;
    Ok(())
}

/// One kind of job: base r9, count r10, multiplier r11, increment r12, mask r13, results r14, index r15.
fn body(asm: &mut CodeAssembler, touch: Touch) -> Result<(), MicroError> {
    let (mut again, mut line, mut only_read) = (asm.create_label(), asm.create_label(), asm.create_label());
    let whole = touch.is_timed_as_a_whole();
    if whole {
        time(asm)?;
        asm.mov(rdi, rax)?;
    }
    asm.nop()?;
    asm.set_label(&mut again)?;
    asm.mov(rcx, r15)?;
    asm.shl(rcx, 12)?;
    asm.add(rcx, r9)?;
    if !whole && touch != Touch::Turns {
        time(asm)?;
        asm.mov(rdi, rax)?;
    }
    match touch {
        Touch::Read => asm.mov(rax, qword_ptr(rcx))?,
        Touch::Write => asm.mov(qword_ptr(rcx), rcx)?,
        Touch::Rewrite => asm.lock().add(qword_ptr(rcx), 0)?,
        Touch::Scan | Touch::Fill | Touch::Mixed => {
            if touch == Touch::Mixed {
                asm.test(r15, 511)?;
                asm.jnz(only_read)?;
                asm.mov(qword_ptr(rcx), rcx)?;
                asm.set_label(&mut only_read)?;
            }
            asm.mov(rsi, 64u64)?;
            asm.set_label(&mut line)?;
            if touch == Touch::Fill {
                asm.mov(qword_ptr(rcx), rcx)?;
            } else {
                asm.mov(rax, qword_ptr(rcx))?;
            }
            asm.add(rcx, 64)?;
            asm.dec(rsi)?;
            asm.jnz(line)?;
        }
        Touch::Turns => {
            time(asm)?;
            asm.mov(rdi, rax)?;
            asm.set_label(&mut line)?;
            asm.pause()?;
            asm.mov(rax, qword_ptr(r9))?;
            asm.and(rax, 1)?;
            asm.cmp(rax, r12)?;
            asm.jne(line)?;
            asm.inc(qword_ptr(r9))?;
        }
    }
    if !whole {
        time(asm)?;
        asm.mov(qword_ptr(r14), rdi)?;
        asm.mov(qword_ptr(r14 + 8), rax)?;
        asm.add(r14, 16)?;
    }
    asm.imul_2(r15, r11)?;
    asm.add(r15, r12)?;
    asm.and(r15, r13)?;
    asm.dec(r10)?;
    asm.jnz(again)?;
    if whole {
        time(asm)?;
        asm.mov(qword_ptr(r14), rdi)?;
        asm.mov(qword_ptr(r14 + 8), rax)?;
    }
    Ok(())
}
