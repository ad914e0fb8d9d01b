//! Guests that use more memory than a node has room for, and memory that only one node uses.

use std::time::Duration;

use krg_guest_kernel::micro::code_asm::{CodeAssembler, qword_ptr, r8, r9, r10, r11, r12, rbx};
use krg_guest_kernel::micro::{Barrier, Builder, MicroError, MicroGuest, done};

use super::litmus::{BARRIER, plan, run};
use super::nodes::{LOADED, MEMORY, Plan};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// What each vCPU found wrong.
const RESULTS: u64 = 11 * MIB;
/// Bytes between two words that are written.
const STEP: i32 = 512;

/// Each vCPU fills its range with what depends on the address and the round, and checks all of it.
fn fill(asm: &mut CodeAssembler, vcpu: usize, ranges: &[(u64, u64)], rounds: u64) -> Result<(), MicroError> {
    let barrier = Barrier { address: BARRIER, vcpus: ranges.len() };
    let (start, end) = ranges[vcpu];
    let (mut round, mut write) = (asm.create_label(), asm.create_label());
    let (mut check, mut good) = (asm.create_label(), asm.create_label());
    barrier.wait(asm)?;
    asm.mov(rbx, 0u64)?;
    asm.mov(r10, end)?;
    asm.mov(r12, rounds)?;
    asm.set_label(&mut round)?;
    asm.mov(r8, start)?;
    asm.set_label(&mut write)?;
    asm.mov(r9, r8)?;
    asm.add(r9, r12)?;
    asm.mov(qword_ptr(r8), r9)?;
    asm.add(r8, STEP)?;
    asm.cmp(r8, r10)?;
    asm.jb(write)?;
    asm.mov(r8, start)?;
    asm.set_label(&mut check)?;
    asm.mov(r9, r8)?;
    asm.add(r9, r12)?;
    asm.cmp(qword_ptr(r8), r9)?;
    asm.je(good)?;
    asm.inc(rbx)?;
    asm.set_label(&mut good)?;
    asm.add(r8, STEP)?;
    asm.cmp(r8, r10)?;
    asm.jb(check)?;
    asm.dec(r12)?;
    asm.jnz(round)?;
    asm.mov(r11, RESULTS + vcpu as u64 * 8)?;
    // One more, so that a result that was never written is no success.
    asm.inc(rbx)?;
    asm.mov(qword_ptr(r11), rbx)?;
    barrier.wait(asm)?;
    done(asm, vcpu)
}

fn guest(ranges: &[(u64, u64)], rounds: u64) -> MicroGuest {
    let builder = Builder { end: LOADED, accessed_dirty: true, ..Builder::new(MEMORY) };
    builder.build(ranges.len(), |asm, vcpu| fill(asm, vcpu, ranges, rounds)).unwrap()
}

#[test]
fn a_guest_fills_and_checks_more_than_a_node_has_room_for() {
    const ROOM: u64 = MIB;
    // Each on the memory of the other's node, and with room for a small part of it.
    let ranges = [(25 * MIB, 47 * MIB), (12 * MIB, 23 * MIB)];
    let small = Plan { cache: ROOM, ..plan(2, 2) };
    let nodes = run(small, &guest(&ranges, 2), 4, PATIENCE).unwrap();
    assert_eq!(nodes.words(RESULTS, 2), [1, 1], "all that was written is there");
    for (copies, counters) in nodes.copies().iter().zip(nodes.counters()) {
        println!("{copies:?}, {} evictions, {} pages in, {} out", counters.evictions, counters.pages_in, counters.pages_out);
        assert_eq!((u64::from(copies.limit), copies.overruns), (ROOM >> 12, 0));
        assert!(copies.peak <= copies.limit + copies.limit / 16 + 64, "far more copies than there is room for: {copies:?}");
        assert!(counters.evictions > 2000, "hardly anything was evicted: {counters:?}");
    }
}

#[test]
fn one_node_uses_twice_what_it_has_room_for() {
    const ROOM: u64 = MIB;
    // A vCPU on node 0, which is at home in the first 16 MiB.
    let ranges = [(12 * MIB, MEMORY)];
    assert!(ranges[0].1 - ranges[0].0 >= 2 * (MEMORY / 3 + ROOM));
    let nodes = run(Plan { cache: ROOM, ..plan(3, 1) }, &guest(&ranges, 2), 2, PATIENCE).unwrap();
    assert_eq!(nodes.words(RESULTS, 1), [1], "all that was written is there");
    let (copies, counters) = (&nodes.copies()[0], &nodes.counters()[0]);
    println!("{copies:?}, {} evictions", counters.evictions);
    assert_eq!(copies.overruns, 0, "{copies:?}");
    assert!(copies.peak <= copies.limit + copies.limit / 16 + 64, "far more copies than there is room for: {copies:?}");
    assert!(counters.evictions > 8000, "32 MiB came, but hardly anything went: {counters:?}");
}

#[test]
fn memory_that_only_its_home_uses_faults_once_a_block() {
    // Five blocks and eight, at each node's own home.
    let ranges = [(12 * MIB, 22 * MIB), (28 * MIB, 44 * MIB)];
    let nodes = run(plan(2, 2), &guest(&ranges, 1), 4, PATIENCE).unwrap();
    assert_eq!(nodes.words(RESULTS, 2), [1, 1]);
    let (blocks, counters) = (nodes.blocks(), nodes.counters());
    println!("{blocks:?} {counters:?}");
    assert!(blocks[0].taken >= 5 && blocks[1].taken >= 8, "{blocks:?}");
    let faults = |n: usize| counters[n].read_faults + counters[n].write_faults + counters[n].upgrade_faults;
    assert!(faults(1) < 100, "node 1 took {} faults for 4096 pages", faults(1));
}
