//! Interrupts between vCPUs of different nodes, ordered among the messages of the shared memory.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_msi;
use krg_dsm::node::TABLES_REST;
use krg_guest_kernel::micro::MicroError;
use krg_guest_kernel::micro::code_asm::{
    CodeAssembler, al, ax, ds, dword_ptr, dx, eax, ebx, ecx, edx, esi, ptr, rax, rbx, rcx, rdx,
};
use krg_vmm::machine::boot::{self, Entry};
use krg_vmm::machine::{End, Event};
use krg_vmm::ownership::Outcome;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest;
use super::nodes::{Nodes, Plan, migrate};

const PATIENCE: Duration = Duration::from_secs(30);
const BOOT_CODE: u64 = 0x8_0000;
const HANDLERS: u64 = 0x8_1000;
/// Halts for good: cli; hlt; jmp there.
const HALTING: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
const HALT: u64 = 0x8_2000;
const IDT: u64 = 0x3000;
/// IDT register, and what the guests count.
const IDT_POINTER: u64 = 0x610;
const STARTED: u64 = 0x600;
const FINISHED: u64 = 0x604;

fn plan(nodes: usize, vcpus: u32) -> Plan {
    Plan {
        nodes,
        vcpus,
        replicate: true,
        tables_rest: TABLES_REST,
        bug: None,
        cache: u64::MAX,
    }
}

fn put(memory: &GuestMemoryMmap<()>, bytes: &[u8], at: u64) {
    memory.write_slice(bytes, GuestAddress(at)).unwrap();
}

/// An interrupt gate of the boot processor.
fn put_gate(memory: &GuestMemoryMmap<()>, vector: u64, handler: u64) {
    let low = handler & 0xffff | 0x10 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    put(
        memory,
        &[low, handler >> 32].map(u64::to_le_bytes).concat(),
        IDT + vector * 16,
    );
    put(
        memory,
        &[&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat(),
        IDT_POINTER,
    );
}

/// Runs until the guest resets.
fn run(nodes: &Nodes) {
    nodes.first().set_entry(&Entry { rip: BOOT_CODE, rsi: 0 }).unwrap();
    nodes.run();
    match nodes.ends.recv_timeout(PATIENCE) {
        Ok(end) => assert_eq!(end, End::Reset),
        Err(error) => panic!("no end ({error}): {} {}", nodes.word(STARTED), nodes.describe()),
    }
    assert_eq!(nodes.failures.try_iter().collect::<Vec<_>>(), Vec::<String>::new());
}

/// INIT, SIPI, so many interrupts there and back in lock step, NMI; so many times.
#[derive(Clone, Copy)]
struct Exchange {
    cycles: u32,
    rounds: u32,
}

fn exchange(Exchange { cycles, rounds }: Exchange) -> Nodes {
    Nodes::new(plan(2, 2), |memory| {
        boot::write_tables(memory).unwrap();
        let pieces = [
            (guest::BOOT, BOOT_CODE),
            (guest::BOOT_HANDLER, HANDLERS),
            (&HALTING, HALT),
            (guest::SECOND, 0x8000),
            (guest::SECOND_HANDLER, 0x8100),
            (guest::SECOND_NMI, 0x8200),
            (guest::SECOND_FLOOD, 0x8300),
        ];
        pieces.iter().for_each(|(bytes, at)| put(memory, bytes, *at));
        // Real-mode vectors: NMI, 0x40, and 0x41, which must not come.
        put(memory, &0x8200u32.to_le_bytes(), 2 * 4);
        put(memory, &[0x8100u32, 0x8300].map(u32::to_le_bytes).concat(), 0x40 * 4);
        put_gate(memory, 0x50, HANDLERS);
        put(memory, &[cycles, rounds].map(u32::to_le_bytes).concat(), 0x620);
    })
}

/// Everything happened as often as it should have.
fn assert_exchanged(nodes: &Nodes, Exchange { cycles, rounds }: Exchange) {
    let counts = [nodes.word(STARTED), nodes.word(0x608)]
        .map(|two| [two as u32, (two >> 32) as u32])
        .concat();
    assert_eq!(
        counts,
        [cycles, cycles * rounds, cycles * rounds, cycles],
        "started, asked, answered, NMIs"
    );
    assert_eq!(nodes.word(0x628) as u32, 0, "interrupts nobody sent");
}

#[test]
fn two_nodes_exchange_a_thousand_interrupts() {
    let plan = Exchange { cycles: 5, rounds: 200 };
    let nodes = exchange(plan);
    run(&nodes);
    assert_exchanged(&nodes, plan);
    let mut expected = Vec::new();
    for _ in 0..plan.cycles {
        expected.extend([(1, Event::Init), (1, Event::Sipi(8))]);
        expected.extend((0..plan.rounds).map(|_| (1, Event::Fixed(0x40))));
        expected.push((1, Event::Nmi));
    }
    assert_eq!(nodes.sent(0), expected);
    assert_eq!(nodes.sent(1), vec![(0, Event::Fixed(0x50)); (plan.cycles * plan.rounds) as usize]);
    println!("exchange: {} page transfers", nodes.transfers());
}

/// What node 0's vCPU 0 does if it is there already, while vCPU 1 is on its way from the other node: its proxy takes INIT
/// and SIPI, or hasn't yet.
#[test]
fn a_vcpu_that_comes_where_it_is_being_started_is_started() {
    let plan = Exchange { cycles: 3, rounds: 3 };
    let nodes = exchange(plan);
    let machines = nodes.machines();
    machines[1].run().unwrap();
    let (reply, outcome) = std::sync::mpsc::channel();
    let reply = Box::new(move |outcome| {
        let _ = reply.send(outcome);
    });
    machines[0].migrate(1, 0, reply).unwrap();
    // It leaves at once; node 0's vCPUs are not running yet, so nothing takes it in.
    let until = Instant::now() + PATIENCE;
    while machines[1].owner(1).is_none_or(|(node, _)| node != 0) {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(1));
    }
    // As the proxy's own node sends them: INIT and SIPI for 0x8000.
    for data in [0x4500, 0x4608] {
        let msi = kvm_msi { address_lo: 0xfee0_1000, data, ..Default::default() };
        assert_eq!(machines[0].vm().signal_msi(msi).unwrap(), 1);
    }
    // vCPU 0 halts until then.
    nodes.first().set_entry(&Entry { rip: HALT, rsi: 0 }).unwrap();
    machines[0].run().unwrap();
    assert!(matches!(outcome.recv_timeout(PATIENCE), Ok(Outcome::Moved { .. })));
    while nodes.dword(STARTED) == 0 {
        assert!(Instant::now() < until, "not started");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// vCPU 0: when it is told to, sends INIT to vCPU 1, says so, and when it is told to, SIPI.
fn slow_start() -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let mut halt = asm.create_label();
    asm.mov(ecx, 0x830)?;
    asm.mov(edx, 1)?;
    asm.mov(rbx, STEP)?;
    for (step, command) in [(1, 0x4500), (3, 0x4608)] {
        let mut wait = asm.create_label();
        asm.set_label(&mut wait)?;
        asm.pause()?;
        asm.cmp(dword_ptr(rbx), step)?;
        asm.jne(wait)?;
        asm.mov(eax, command)?;
        asm.wrmsr()?;
        asm.inc(dword_ptr(rbx))?;
    }
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(BOOT_CODE)?)
}

/// 1, 3: it is to send INIT, SIPI; 2, 4: it has.
const STEP: u64 = 0x640;

/// With vCPU 1 on the other node, whose proxy waits for SIPI, and on the same, where nothing does.
#[test]
fn a_vcpu_that_starts_another_stays_until_it_has() {
    for together in [false, true] {
        let nodes = Nodes::new(plan(2, 2), |memory| {
            boot::write_tables(memory).unwrap();
            put(memory, &slow_start().unwrap(), BOOT_CODE);
            put(memory, guest::SECOND, 0x8000);
        });
        let machines = nodes.machines();
        nodes.first().set_entry(&Entry { rip: BOOT_CODE, rsi: 0 }).unwrap();
        nodes.run();
        if together {
            assert!(matches!(migrate(&machines[0], 1, 0), Ok(Outcome::Moved { .. })));
        }
        let until = Instant::now() + PATIENCE;
        let wait = |word: u64, value: u32| {
            while nodes.dword(word) != value {
                assert!(Instant::now() < until, "together {together}: {word:#x} is {}", nodes.dword(word));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        nodes.store(STEP, 1);
        wait(STEP, 2);
        assert_eq!(migrate(&machines[0], 0, 1), Ok(Outcome::Busy), "together {together}");
        nodes.store(STEP, 3);
        wait(STARTED, 1);
        assert!(matches!(migrate(&machines[0], 0, 1), Ok(Outcome::Moved { .. })), "together {together}");
    }
}

/// The same while vCPU 1 moves all the time: before it is started, while it runs and halts. Between INIT and
/// SIPI it can't.
#[test]
fn vcpus_are_started_and_interrupted_wherever_they_are() {
    let plan = Exchange { cycles: 50, rounds: 20 };
    let nodes = exchange(plan);
    let machines = nodes.machines();
    let (stop, moved) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let (stop, moved) = (&stop, &moved);
        let machines = &machines;
        scope.spawn(move || {
            for round in 0.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let outcome = migrate(&machines[round % 2], 1, (round / 2) % 2);
                assert!(outcome.is_ok() || stop.load(Ordering::SeqCst), "{outcome:?}");
                moved.fetch_add(u32::from(matches!(outcome, Ok(Outcome::Moved { .. }))), Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(500 * (round as u64 % 7)));
            }
        });
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&nodes)));
        stop.store(true, Ordering::SeqCst);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert_exchanged(&nodes, plan);
    println!("exchange: {} moves, {} page transfers", moved.load(Ordering::SeqCst), nodes.transfers());
}

/// Vectors of one sender, the highest first: a LAPIC takes them in that order.
const VECTORS: u32 = 32;
const FIRST_VECTOR: u32 = 0x40;
/// What the target expects next of each sender; how often that was wrong; how many came.
const EXPECTED: u64 = 0x2000;
const WRONG: u64 = 0x2040;
const CAME: u64 = 0x2044;
/// Bursts of each sender that are through: a page each.
const THROUGH: u64 = 0x4000;

/// A sender: bursts of all its vectors, as fast as it can; then it waits until the burst has come.
fn sender(number: u32, bursts: u32) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(16)?;
    let (mut burst, mut send, mut wait, mut halt) = (
        asm.create_label(),
        asm.create_label(),
        asm.create_label(),
        asm.create_label(),
    );
    let last = FIRST_VECTOR + number * VECTORS;
    asm.cli()?;
    asm.xor(ax, ax)?;
    asm.mov(ds, ax)?;
    asm.lock().inc(dword_ptr(STARTED))?;
    asm.xor(esi, esi)?;
    asm.set_label(&mut burst)?;
    asm.mov(ebx, last + VECTORS - 1)?;
    asm.set_label(&mut send)?;
    asm.mov(ecx, 0x830)?;
    asm.xor(edx, edx)?;
    asm.mov(eax, 0x4000)?;
    asm.or(eax, ebx)?;
    asm.wrmsr()?;
    asm.dec(ebx)?;
    asm.cmp(ebx, last as i32)?;
    asm.jae(send)?;
    asm.inc(esi)?;
    asm.set_label(&mut wait)?;
    asm.pause()?;
    asm.cmp(dword_ptr(THROUGH + u64::from(number) * 0x1000), esi)?;
    asm.jne(wait)?;
    asm.cmp(esi, bursts as i32)?;
    asm.jne(burst)?;
    asm.lock().inc(dword_ptr(FINISHED))?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(0)?)
}

/// Start-up vector of a sender.
fn startup(number: u32) -> u32 {
    0x10 + number
}

/// The target: starts the senders, takes what comes, resets.
fn target(senders: u32) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut wait, mut halt) = (asm.create_label(), asm.create_label());
    asm.mov(rbx, IDT_POINTER)?;
    asm.lidt(ptr(rbx))?;
    asm.sti()?;
    for number in 0..senders {
        asm.mov(ecx, 0x830)?;
        asm.mov(edx, number + 1)?;
        asm.mov(eax, 0x4500)?;
        asm.wrmsr()?;
        asm.mov(eax, 0x4600 | startup(number))?;
        asm.wrmsr()?;
    }
    asm.mov(rbx, FINISHED)?;
    asm.set_label(&mut wait)?;
    asm.pause()?;
    asm.cmp(dword_ptr(rbx), senders as i32)?;
    asm.jne(wait)?;
    asm.mov(dx, 0xcf9)?;
    asm.mov(al, 6)?;
    asm.out(dx, al)?;
    asm.set_label(&mut halt)?;
    asm.hlt()?;
    asm.jmp(halt)?;
    Ok(asm.assemble(BOOT_CODE)?)
}

/// The target's handlers: what they share at [`HANDLERS`], then each vector's start.
fn handlers(senders: u32) -> Result<Vec<u8>, MicroError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut right, mut more, mut end) = (asm.create_label(), asm.create_label(), asm.create_label());
    // The vector is in ecx.
    asm.push(rax)?;
    asm.push(rdx)?;
    asm.push(rbx)?;
    asm.mov(edx, ecx)?;
    asm.sub(edx, FIRST_VECTOR as i32)?;
    asm.shr(edx, VECTORS.ilog2())?;
    asm.mov(rbx, EXPECTED)?;
    asm.cmp(ecx, dword_ptr(rbx + rdx * 4))?;
    asm.je(right)?;
    asm.inc(dword_ptr(rbx + (WRONG - EXPECTED)))?;
    asm.set_label(&mut right)?;
    asm.inc(dword_ptr(rbx + (CAME - EXPECTED)))?;
    asm.mov(eax, ecx)?;
    asm.dec(eax)?;
    asm.test(ecx, VECTORS as i32 - 1)?;
    asm.jnz(more)?;
    asm.add(eax, VECTORS as i32)?;
    asm.set_label(&mut more)?;
    asm.mov(dword_ptr(rbx + rdx * 4), eax)?;
    asm.test(ecx, VECTORS as i32 - 1)?;
    asm.jnz(end)?;
    asm.shl(edx, 12)?;
    asm.mov(rbx, THROUGH)?;
    asm.lock().inc(dword_ptr(rbx + rdx))?;
    asm.set_label(&mut end)?;
    asm.mov(ecx, 0x80b)?;
    asm.xor(eax, eax)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.pop(rbx)?;
    asm.pop(rdx)?;
    asm.pop(rax)?;
    asm.pop(rcx)?;
    asm.iretq()?;
    let mut code = asm.assemble(HANDLERS)?;
    for vector in FIRST_VECTOR..FIRST_VECTOR + senders * VECTORS {
        let at = start_of(vector);
        let mut asm = CodeAssembler::new(64)?;
        asm.push(rcx)?;
        asm.mov(ecx, vector)?;
        asm.jmp(HANDLERS)?;
        code.resize((at - HANDLERS) as usize, 0xcc);
        code.extend(asm.assemble(at)?);
    }
    Ok(code)
}

/// Where a vector's handler starts.
fn start_of(vector: u32) -> u64 {
    HANDLERS + 0x100 + u64::from(vector - FIRST_VECTOR) * 16
}

/// Bursts of interrupts: none lost, none doubled, each sender's in order.
fn storm(nodes: usize, bursts: u32) {
    let senders = nodes as u32 - 1;
    let machine = Nodes::new(plan(nodes, nodes as u32), |memory| {
        boot::write_tables(memory).unwrap();
        put(memory, &target(senders).unwrap(), BOOT_CODE);
        put(memory, &handlers(senders).unwrap(), HANDLERS);
        let vectors = FIRST_VECTOR..FIRST_VECTOR + senders * VECTORS;
        vectors.for_each(|vector| put_gate(memory, vector.into(), start_of(vector)));
        for number in 0..senders {
            let code = sender(number, bursts).unwrap();
            put(memory, &code, u64::from(startup(number)) << 12);
            let first = FIRST_VECTOR + (number + 1) * VECTORS - 1;
            put(memory, &first.to_le_bytes(), EXPECTED + u64::from(number) * 4);
        }
    });
    run(&machine);
    let all = u64::from(senders * bursts * VECTORS);
    assert_eq!(
        machine.word(WRONG),
        all << 32,
        "interrupts that came, and how many of them were wrong"
    );
    for number in 0..senders {
        let last = FIRST_VECTOR + number * VECTORS;
        let burst = (last..last + VECTORS)
            .rev()
            .map(|vector| (0, Event::Fixed(vector as u8)));
        let expected: Vec<_> = (0..bursts).flat_map(|_| burst.clone()).collect();
        assert_eq!(machine.sent(number as usize + 1), expected);
    }
    println!(
        "storm of {all} interrupts to node 0 from {senders} nodes: {} page transfers",
        machine.transfers()
    );
}

#[test]
fn a_storm_of_interrupts_loses_none() {
    storm(2, 40);
    storm(3, 30);
}
