//! vCPUs that move between nodes while they send each other interrupts, take timer interrupts, halt, and
//! compare their clocks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use krg_dsm::node::TABLES_REST;
use krg_guest_kernel::micro::code_asm::{
    CodeAssembler, al, dword_ptr, eax, ebx, ecx, edx, esi, ptr, qword_ptr, r14, r14d, r15, rax, rbx, rcx, rdi, rdx,
};
use krg_guest_kernel::micro::{MicroError, PORT_YIELD};
use krg_vmm::machine::boot::{self, Entry};
use krg_vmm::machine::state::Registers;
use krg_vmm::ownership::Outcome;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::nodes::{Nodes, Plan, migrate};

const PATIENCE: Duration = Duration::from_secs(60);
/// If set, how many moves each test asks for.
const MOVES: &str = "KRG_MOVES";

const CODE: u64 = 0x8_0000;
const HANDLERS: u64 = 0x8_2000;
const IDT: u64 = 0x3000;
const IDT_POINTER: u64 = 0x610;
/// One for each vCPU.
const STACKS: u64 = 0x100_0000;
/// A page that only its vCPU writes, for each.
const PAGES: u64 = 0x200_0000;
/// A lock, and the latest time anybody read under it.
const CLOCK: u64 = 0x280_0000;
/// Not zero: the vCPUs are to end.
const STOP: u64 = 0x281_0000;

/// In a vCPU's page: interrupts of each vCPU it took, and those it sent to each.
const TAKEN: u64 = 0;
const SENT: u64 = 0x100;
/// Timer: how often it was armed and has fired; what it was armed for.
const ARMED: u64 = 0x200;
const FIRED: u64 = 0x204;
const DEADLINE: u64 = 0x208;
/// Interrupts that came when none was due, timers that fired when none was armed, or too early, times that
/// were before others.
const DOUBLED: u64 = 0x210;
const TIMER_WRONG: u64 = 0x214;
const EARLY: u64 = 0x218;
const CLOCK_BACK: u64 = 0x21c;
const ROUNDS: u64 = 0x220;
const ENDED: u64 = 0x224;

/// Vector of vCPU 0's interrupts; the timer's.
const VECTORS: u32 = 0x40;
const TIMER: u32 = 0x70;

/// How a vCPU's timer works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timer {
    Deadline,
    OneShot,
}

/// Ticks of the TSC, or of the timer, from one timer interrupt to the next.
const PERIOD: i32 = 4_000_000;

/// Arms the timer anew: eax has the time's lower half, rdx is free. Destroys rax, rcx, rdx.
fn arm(asm: &mut CodeAssembler, timer: Timer) -> Result<(), MicroError> {
    asm.inc(dword_ptr(r15 + ARMED))?;
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)?;
    match timer {
        Timer::Deadline => {
            asm.add(rax, PERIOD)?;
            asm.mov(qword_ptr(r15 + DEADLINE), rax)?;
            asm.mov(rdx, rax)?;
            asm.shr(rdx, 32)?;
            asm.mov(ecx, 0x6e0)?;
        }
        Timer::OneShot => {
            asm.mov(qword_ptr(r15 + DEADLINE), rax)?;
            asm.mov(eax, PERIOD / 4)?;
            asm.xor(edx, edx)?;
            asm.mov(ecx, 0x838)?;
        }
    }
    asm.wrmsr()?;
    Ok(())
}

fn write_msr(asm: &mut CodeAssembler, index: u32, value: u32) -> Result<(), MicroError> {
    asm.mov(ecx, index)?;
    asm.mov(eax, value)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    Ok(())
}

/// What every vCPU runs. r14: its number. r15: its page.
fn program(vcpus: u32, timer: Timer) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let [
        mut again,
        mut next,
        mut skip,
        mut spin,
        mut locked,
        mut forward,
        mut end,
        mut wait,
        mut idle,
    ] = std::array::from_fn(|_| asm.create_label());
    asm.mov(rbx, IDT_POINTER)?;
    asm.lidt(ptr(rbx))?;
    // Divided by one.
    write_msr(&mut asm, 0x83e, 0xb)?;
    write_msr(
        &mut asm,
        0x832,
        TIMER | if timer == Timer::Deadline { 2 << 17 } else { 0 },
    )?;
    arm(&mut asm, timer)?;
    asm.sti()?;
    asm.set_label(&mut again)?;
    asm.inc(dword_ptr(r15 + ROUNDS))?;
    asm.xor(ebx, ebx)?;
    asm.xor(esi, esi)?;
    asm.set_label(&mut next)?;
    asm.cmp(ebx, r14d)?;
    asm.je(skip)?;
    // One at a time to each: the last has been taken.
    asm.mov(rdi, rbx)?;
    asm.shl(rdi, 12)?;
    asm.add(rdi, PAGES as i32)?;
    asm.mov(eax, dword_ptr(rdi + r14 * 4 + TAKEN))?;
    asm.cmp(eax, dword_ptr(r15 + rbx * 4 + SENT))?;
    asm.jne(skip)?;
    asm.inc(dword_ptr(r15 + rbx * 4 + SENT))?;
    asm.mfence()?;
    asm.inc(esi)?;
    asm.mov(ecx, 0x830)?;
    asm.mov(edx, ebx)?;
    asm.lea(eax, ptr(r14 + (0x4000 + VECTORS) as i32))?;
    asm.wrmsr()?;
    asm.set_label(&mut skip)?;
    asm.inc(ebx)?;
    asm.cmp(ebx, vcpus as i32)?;
    asm.jb(next)?;
    // No time read under the lock is before the last.
    asm.mov(rdi, CLOCK)?;
    asm.set_label(&mut spin)?;
    asm.mov(eax, 1)?;
    asm.xchg(dword_ptr(rdi), eax)?;
    asm.test(eax, eax)?;
    asm.jz(locked)?;
    asm.pause()?;
    asm.jmp(spin)?;
    asm.set_label(&mut locked)?;
    asm.lfence()?;
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)?;
    asm.cmp(rax, qword_ptr(rdi + 8))?;
    asm.jae(forward)?;
    asm.inc(dword_ptr(r15 + CLOCK_BACK))?;
    asm.set_label(&mut forward)?;
    asm.mov(qword_ptr(rdi + 8), rax)?;
    asm.mov(dword_ptr(rdi), 0)?;
    asm.mov(rdi, STOP)?;
    asm.cmp(dword_ptr(rdi), 0)?;
    asm.jne(end)?;
    asm.test(esi, esi)?;
    asm.jnz(again)?;
    // The timer ends it at the latest.
    asm.hlt()?;
    asm.jmp(again)?;
    asm.set_label(&mut end)?;
    asm.xor(ebx, ebx)?;
    asm.set_label(&mut wait)?;
    asm.mov(rdi, rbx)?;
    asm.shl(rdi, 12)?;
    asm.add(rdi, PAGES as i32)?;
    asm.pause()?;
    asm.mov(eax, dword_ptr(rdi + r14 * 4 + TAKEN))?;
    asm.cmp(eax, dword_ptr(r15 + rbx * 4 + SENT))?;
    asm.jne(wait)?;
    asm.inc(ebx)?;
    asm.cmp(ebx, vcpus as i32)?;
    asm.jb(wait)?;
    asm.mov(dword_ptr(r15 + ENDED), 1)?;
    asm.set_label(&mut idle)?;
    asm.hlt()?;
    asm.jmp(idle)?;
    Ok(asm.assemble(CODE)?)
}

fn enter(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    [rax, rcx, rdx, rbx]
        .into_iter()
        .try_for_each(|register| asm.push(register))?;
    // The vCPU leaves KVM_RUN with an interrupt in service.
    asm.out(u32::from(PORT_YIELD), al)?;
    Ok(())
}

fn leave(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    asm.cli()?;
    write_msr(asm, 0x80b, 0)?;
    [rbx, rdx, rcx, rax]
        .into_iter()
        .try_for_each(|register| asm.pop(register))?;
    asm.iretq()?;
    Ok(())
}

/// The handler of vCPU `sender`'s interrupts. A timer's may come in the middle of it.
fn taken(sender: u32, at: u64) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let mut right = asm.create_label();
    enter(&mut asm)?;
    asm.mov(rbx, PAGES + u64::from(sender) * 0x1000)?;
    asm.mov(edx, dword_ptr(r15 + TAKEN + u64::from(sender) * 4))?;
    asm.inc(edx)?;
    asm.sti()?;
    asm.cmp(edx, dword_ptr(rbx + r14 * 4 + SENT))?;
    asm.je(right)?;
    asm.inc(dword_ptr(r15 + DOUBLED))?;
    asm.set_label(&mut right)?;
    // From here on another may be sent.
    asm.mov(dword_ptr(r15 + TAKEN + u64::from(sender) * 4), edx)?;
    leave(&mut asm)?;
    Ok(asm.assemble(at)?)
}

/// The timer's handler: it must be the one that was armed last.
fn fired(at: u64, timer: Timer) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut right, mut late) = (asm.create_label(), asm.create_label());
    enter(&mut asm)?;
    asm.inc(dword_ptr(r15 + FIRED))?;
    asm.mov(eax, dword_ptr(r15 + FIRED))?;
    asm.cmp(eax, dword_ptr(r15 + ARMED))?;
    asm.je(right)?;
    asm.inc(dword_ptr(r15 + TIMER_WRONG))?;
    asm.set_label(&mut right)?;
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)?;
    asm.cmp(rax, qword_ptr(r15 + DEADLINE))?;
    asm.jae(late)?;
    asm.inc(dword_ptr(r15 + EARLY))?;
    asm.set_label(&mut late)?;
    arm(&mut asm, timer)?;
    leave(&mut asm)?;
    Ok(asm.assemble(at)?)
}

fn load(memory: &GuestMemoryMmap<()>, vcpus: u32, timer: Timer) {
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    boot::write_tables(memory).unwrap();
    put(CODE, &program(vcpus, timer).unwrap());
    let gate = |vector: u32, handler: u64| {
        let low = handler & 0xffff | 0x10 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
        put(
            IDT + u64::from(vector) * 16,
            &[low, handler >> 32].map(u64::to_le_bytes).concat(),
        );
    };
    for sender in 0..vcpus {
        let at = HANDLERS + u64::from(sender) * 0x100;
        put(at, &taken(sender, at).unwrap());
        gate(VECTORS + sender, at);
    }
    let at = HANDLERS + 0x1000;
    put(at, &fired(at, timer).unwrap());
    gate(TIMER, at);
    put(IDT_POINTER, &[&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat());
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// A guest of `vcpus` vCPUs on `nodes` nodes; `movers` threads ask for `moves` moves together.
fn storm(nodes: usize, vcpus: u32, timer: Timer, movers: u64, moves: u32) {
    let moves = std::env::var(MOVES)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(moves);
    let plan = Plan {
        nodes,
        vcpus,
        replicate: true,
        tables_rest: TABLES_REST,
        bug: None,
        cache: u64::MAX,
    };
    let machine = Nodes::new(plan, |memory| load(memory, vcpus, timer));
    machine.set_tsc_offset(0);
    machine.run_all(&Entry { rip: CODE, rsi: 0 }, |vcpu, Registers { regs, .. }| {
        regs.rsp = STACKS + u64::from(vcpu + 1) * 0x1000;
        (regs.r14, regs.r15) = (vcpu.into(), PAGES + u64::from(vcpu) * 0x1000);
    });
    let page = |vcpu: u32| PAGES + u64::from(vcpu) * 0x1000;
    let until = Instant::now() + PATIENCE;
    while (0..vcpus).any(|vcpu| machine.dword(page(vcpu) + FIRED) == 0) {
        assert!(
            Instant::now() < until,
            "the guest doesn't start: {}",
            machine.describe()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let machines = machine.machines();
    let (failed, wrong) = channel();
    let (left, moved, begun) = (AtomicU32::new(moves), AtomicU32::new(0), Instant::now());
    std::thread::scope(|scope| {
        for mover in 0..movers {
            let (machines, left, moved, failed) = (&machines, &left, &moved, failed.clone());
            scope.spawn(move || {
                let mut random = Random(mover);
                while left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                    .is_ok()
                {
                    let (asked, vcpu, to) = (random.below(nodes), random.below(vcpus as usize), random.below(nodes));
                    match migrate(&machines[asked], vcpu as u32, to) {
                        Ok(Outcome::Moved { .. }) => drop(moved.fetch_add(1, Ordering::SeqCst)),
                        Ok(Outcome::AlreadyThere) => {}
                        other => {
                            failed.send(format!("{other:?}: vCPU {vcpu} to node {to}")).unwrap();
                            left.store(0, Ordering::SeqCst);
                        }
                    }
                }
            });
        }
    });
    let took = begun.elapsed();
    if let Ok(wrong) = wrong.try_recv() {
        panic!(
            "{wrong}, after {} moves: {:?} {}",
            moved.load(Ordering::SeqCst),
            machine.failures.try_iter().collect::<Vec<_>>(),
            machine.describe()
        );
    }
    machine.store(STOP, 1);
    let until = Instant::now() + PATIENCE;
    while (0..vcpus).any(|vcpu| machine.dword(page(vcpu) + ENDED) == 0) {
        assert!(Instant::now() < until, "an interrupt was lost: {}", machine.describe());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut interrupts, mut timers, mut rounds) = (0, 0, 0);
    for vcpu in 0..vcpus {
        let wrong = [DOUBLED, TIMER_WRONG, EARLY, CLOCK_BACK].map(|at| machine.dword(page(vcpu) + at));
        assert_eq!(
            wrong, [0; 4],
            "vCPU {vcpu}: doubled, wrong timers, early timers, steps back of the clock"
        );
        for other in 0..vcpus {
            let sent = machine.dword(page(vcpu) + SENT + u64::from(other) * 4);
            assert_eq!(
                machine.dword(page(other) + TAKEN + u64::from(vcpu) * 4),
                sent,
                "from {vcpu} to {other}"
            );
            interrupts += sent;
        }
        timers += machine.dword(page(vcpu) + FIRED);
        rounds += machine.dword(page(vcpu) + ROUNDS);
    }
    assert!(moves < 100 || moved.load(Ordering::SeqCst) > moves / 4);
    assert_eq!(machine.failures.try_iter().collect::<Vec<_>>(), Vec::<String>::new());
    let prefetches: u64 = machine.counters().iter().map(|counters| counters.prefetches).sum();
    assert!(prefetches > 0, "no page that a vCPU was about to touch was fetched before");
    println!(
        "{nodes} nodes, {vcpus} vCPUs: {} of {moves} moves asked for moved one, in {took:?}; {interrupts} interrupts, {timers} timers, {rounds} rounds; states of up to {} bytes",
        moved.load(Ordering::SeqCst),
        machine.largest_state()
    );
}

#[test]
fn a_vcpu_moves_and_comes_back() {
    storm(2, 2, Timer::Deadline, 1, 20);
}

#[test]
fn vcpus_that_move_between_two_nodes_lose_and_double_no_interrupt() {
    storm(2, 3, Timer::Deadline, 1, 8000);
}

#[test]
fn vcpus_that_move_between_three_nodes_at_once_lose_and_double_no_interrupt() {
    storm(3, 4, Timer::Deadline, 3, 8000);
}

#[test]
fn a_counting_timer_moves_with_its_vcpu() {
    storm(2, 2, Timer::OneShot, 1, 2500);
}

/// The vCPU waits until it may go on, with one interrupt in service and lower ones pending: they must not come
/// before it says that the first has ended, and then the one that the task priority lets through.
fn blocked() -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let [mut again, mut wait, mut halt] = std::array::from_fn(|_| asm.create_label());
    asm.mov(rbx, IDT_POINTER)?;
    asm.lidt(ptr(rbx))?;
    asm.sti()?;
    write_msr(&mut asm, 0x83f, LOW)?;
    write_msr(&mut asm, 0x83f, HIGH)?;
    asm.mov(rdi, STOP)?;
    asm.set_label(&mut again)?;
    asm.inc(dword_ptr(r15 + ROUNDS))?;
    asm.mov(eax, dword_ptr(r15 + TAKEN))?;
    asm.or(dword_ptr(r15 + DOUBLED), eax)?;
    asm.cmp(dword_ptr(rdi), 0)?;
    asm.je(again)?;
    write_msr(&mut asm, 0x80b, 0)?;
    asm.set_label(&mut wait)?;
    asm.pause()?;
    asm.cmp(dword_ptr(r15 + TAKEN), HIGH as i32)?;
    asm.jne(wait)?;
    asm.mov(dword_ptr(r15 + ENDED), 1)?;
    // Lets the last one through.
    write_msr(&mut asm, 0x808, 0)?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(CODE)?)
}

/// Vectors in service, and pending below it; the task priority is that of the lower.
const IN_SERVICE: u32 = 0x91;
const HIGH: u32 = 0x62;
const LOW: u32 = 0x51;
const PRIORITY: u32 = 0x50;

#[test]
fn what_is_in_service_and_what_is_blocked_stay_so() {
    let moves = 100;
    let plan = Plan {
        nodes: 2,
        vcpus: 2,
        replicate: true,
        tables_rest: TABLES_REST,
        bug: None,
        cache: u64::MAX,
    };
    let machine = Nodes::new(plan, |memory| {
        load(memory, 2, Timer::Deadline);
        memory.write_slice(&blocked().unwrap(), GuestAddress(CODE)).unwrap();
        for vector in [HIGH, LOW] {
            let at = HANDLERS + u64::from(vector) * 0x100 - 0x4000;
            let handler = || {
                let mut asm = CodeAssembler::new(64)?;
                enter(&mut asm)?;
                asm.add(dword_ptr(r15 + TAKEN), vector as i32)?;
                leave(&mut asm)?;
                Ok::<_, MicroError>(asm.assemble(at)?)
            };
            memory.write_slice(&handler().unwrap(), GuestAddress(at)).unwrap();
            let low = at & 0xffff | 0x10 << 16 | 0x8e << 40 | (at >> 16 & 0xffff) << 48;
            let gate = [low, at >> 32].map(u64::to_le_bytes).concat();
            memory
                .write_slice(&gate, GuestAddress(IDT + u64::from(vector) * 16))
                .unwrap();
        }
    });
    machine.set_tsc_offset(0);
    machine.run_all(&Entry { rip: CODE, rsi: 0 }, |vcpu, Registers { regs, lapic, .. }| {
        regs.rsp = STACKS + u64::from(vcpu + 1) * 0x1000;
        (regs.r14, regs.r15) = (vcpu.into(), PAGES + u64::from(vcpu) * 0x1000);
        let byte = 0x100 + (IN_SERVICE as usize / 32) * 16 + IN_SERVICE as usize % 32 / 8;
        lapic.regs[byte] = 1 << (IN_SERVICE % 8);
        lapic.regs[0x80] = PRIORITY as _;
    });
    let page = |vcpu: u32| PAGES + u64::from(vcpu) * 0x1000;
    let machines = machine.machines();
    for round in 0..moves {
        for vcpu in 0..2 {
            let to = (round + vcpu as usize + 1) % 2;
            let outcome = migrate(&machines[0], vcpu, to);
            assert!(
                matches!(outcome, Ok(Outcome::Moved { .. })),
                "{outcome:?} {}",
                machine.describe()
            );
        }
    }
    machine.store(STOP, 1);
    let until = Instant::now() + PATIENCE;
    while (0..2).any(|vcpu| machine.dword(page(vcpu) + TAKEN) != HIGH + LOW) {
        assert!(Instant::now() < until, "an interrupt was lost: {}", machine.describe());
        std::thread::sleep(Duration::from_millis(1));
    }
    for vcpu in 0..2 {
        assert_eq!(
            machine.dword(page(vcpu) + DOUBLED),
            0,
            "an interrupt came that was blocked"
        );
        assert_eq!(machine.dword(page(vcpu) + ENDED), 1);
        assert!(machine.dword(page(vcpu) + ROUNDS) > 0);
    }
    assert_eq!(machine.failures.try_iter().collect::<Vec<_>>(), Vec::<String>::new());
}
