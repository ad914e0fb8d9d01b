//! Page tables that vCPUs of two nodes write and walk, replicated and shared.
//!
//! Each vCPU maps pages in turn and tells the other by a flag, who touches them at once. A KVM that
//! shadows page tables (kvm_pvm) does not see a table entry change that arrives as page content, so
//! nothing here changes an entry that the other node has walked: entries go from not present to
//! present once, and a table that was unlinked is not walked again.

use std::time::Instant;

use krg_dsm::protocol::{Bug, Counters, Patience};
use krg_guest_kernel::micro::code_asm::{
    CodeAssembler, eax, qword_ptr, r8, r9, r10, r12, r13, r14, r15, rax, rcx, rdx,
};
use krg_guest_kernel::micro::{Barrier, Builder, MicroError, MicroGuest, done, wait_until};

use super::litmus::{BARRIER, PATIENCE, VARIABLES, plan, run};
use super::nodes::{MEMORY, Nodes, Plan};

/// Tables of the window, one page each, and the directory above them.
const TABLES: u64 = 0xe_0000;
const TABLE_COUNT: u64 = 2;
const DIRECTORY: u64 = 0xd_f000;
/// Guest-virtual addresses that [`TABLES`] map: page n by entry n.
const WINDOW: u64 = 1 << 30;
const PAGES: u64 = TABLE_COUNT * 512;
/// The frame behind all of the window.
const FRAME: u64 = VARIABLES[0];
/// Number of the page mapped last; on the same page, a word that says one is about to be.
const FLAG: u64 = VARIABLES[1];
const ABOUT: u64 = FLAG + 64;
/// A word of a table that is counted in once the table is none.
const COUNTER: u64 = 8 * 3;
/// Long enough that both count at the same time.
const COUNT: u32 = 100_000;
/// How often each vCPU found something else than the other had written.
const WRONG: u64 = VARIABLES[1] + (1 << 20);
const MEETING: u64 = VARIABLES[1] + (2 << 20);
/// Present, writable, user; without and with the accessed bit.
const LEAF: u64 = 0b111;
const LINK: u64 = 0b111 | 1 << 5;

/// Maps page r12 and raises the flag. r13: its number, from 1. `upper`: the tables above.
fn publish(asm: &mut CodeAssembler, upper: &[u64]) -> Result<(), MicroError> {
    // A processor whose walks count as writes makes the upper tables go back and forth, which is when
    // they are replicated. Here the program writes to them: a last entry that is empty and stays so.
    asm.xor(eax, eax)?;
    for table in upper {
        asm.mov(r9, *table + 511 * 8)?;
        asm.mov(qword_ptr(r9), rax)?;
    }
    // Takes the flag's page first: the other, who waits for the flag, asks for it back right away, and
    // meets what follows at any point.
    asm.mov(r8, ABOUT)?;
    asm.mov(qword_ptr(r8), r13)?;
    let (mut again, mut end) = (asm.create_label(), asm.create_label());
    asm.imul_3(r14, r14, 1_103_515_245)?;
    asm.add(r14, 12345)?;
    asm.mov(rcx, r14)?;
    asm.shr(rcx, 20)?;
    asm.and(rcx, 0x7ff)?;
    asm.jz(end)?;
    asm.set_label(&mut again)?;
    asm.pause()?;
    asm.dec(rcx)?;
    asm.jnz(again)?;
    asm.set_label(&mut end)?;
    asm.mov(r9, FRAME)?;
    asm.mov(qword_ptr(r9), r13)?;
    asm.mov(r9, TABLES)?;
    asm.mov(rdx, FRAME | LEAF)?;
    asm.mov(qword_ptr(r9 + r12 * 8), rdx)?;
    asm.mov(qword_ptr(r8 - (ABOUT - FLAG) as i32), r13)?;
    Ok(())
}

/// Waits until page r12 is mapped, and looks at it. r15 counts what is wrong.
fn consume(asm: &mut CodeAssembler) -> Result<(), MicroError> {
    let mut right = asm.create_label();
    asm.mov(r8, FLAG)?;
    wait_until(asm, |asm, success| {
        asm.cmp(qword_ptr(r8), r13)?;
        asm.jae(success)?;
        Ok(())
    })?;
    asm.mov(rdx, r12)?;
    asm.shl(rdx, 12)?;
    asm.mov(r9, WINDOW)?;
    asm.mov(rax, qword_ptr(r9 + rdx))?;
    asm.cmp(rax, r13)?;
    asm.je(right)?;
    asm.inc(r15)?;
    asm.set_label(&mut right)?;
    asm.nop()?;
    Ok(())
}

/// The program of both vCPUs: all pages in turn; then vCPU 0 unlinks the tables, one after the other,
/// and both count in what was one.
fn program(asm: &mut CodeAssembler, vcpu: usize, upper: &[u64]) -> Result<(), MicroError> {
    let barrier = Barrier {
        address: MEETING,
        vcpus: 2,
    };
    let (mut map, mut reuse, mut count) = (asm.create_label(), asm.create_label(), asm.create_label());
    asm.mov(r12, 0u64)?;
    asm.mov(r14, 0x9e37_79b9u64 + vcpu as u64)?;
    asm.mov(r15, 0u64)?;
    asm.set_label(&mut map)?;
    for turn in 0..2 {
        asm.lea(r13, qword_ptr(r12 + 1))?;
        if turn == vcpu {
            publish(asm, upper)?
        } else {
            consume(asm)?
        }
        asm.inc(r12)?;
    }
    if vcpu == 0 {
        asm.mov(r8, BARRIER)?;
        asm.mov(qword_ptr(r8), r12)?;
    }
    asm.cmp(r12, PAGES as i32)?;
    asm.jb(map)?;
    asm.mov(r8, WRONG + vcpu as u64 * 8)?;
    asm.mov(qword_ptr(r8), r15)?;
    barrier.wait(asm)?;

    asm.mov(r10, TABLES)?;
    asm.mov(r9, DIRECTORY)?;
    asm.set_label(&mut reuse)?;
    if vcpu == 0 {
        asm.xor(eax, eax)?;
        asm.mov(qword_ptr(r9), rax)?;
        asm.mov(qword_ptr(r10 + COUNTER), rax)?;
    }
    barrier.wait(asm)?;
    asm.mov(rcx, u64::from(COUNT))?;
    asm.set_label(&mut count)?;
    asm.lock().inc(qword_ptr(r10 + COUNTER))?;
    asm.dec(rcx)?;
    asm.jnz(count)?;
    barrier.wait(asm)?;
    asm.add(r9, 8)?;
    asm.add(r10, 0x1000)?;
    asm.cmp(r10, (TABLES + TABLE_COUNT * 0x1000) as i32)?;
    asm.jb(reuse)?;
    if vcpu == 0 {
        asm.mov(r8, BARRIER)?;
        asm.mov(rax, PAGES + 1)?;
        asm.mov(qword_ptr(r8), rax)?;
    }
    done(asm, vcpu)
}

/// The guest, with the window's tables linked and empty.
fn guest() -> MicroGuest {
    let builder = Builder {
        end: DIRECTORY,
        accessed_dirty: true,
        ..Builder::new(MEMORY)
    };
    // The tables come before the code, so any program tells where they are.
    let plain = builder.build(2, done).unwrap();
    let root = plain.roots[0];
    let (_, bytes) = plain
        .writes
        .iter()
        .find(|(at, _)| *at == root)
        .expect("the root is written");
    let pointers = u64::from_le_bytes(bytes[..8].try_into().unwrap()) & !0xfff;
    let upper = [root, pointers, DIRECTORY];
    let mut guest = builder.build(2, |asm, vcpu| program(asm, vcpu, &upper)).unwrap();
    assert_eq!(guest.roots, [root]);
    let (_, bytes) = guest
        .writes
        .iter_mut()
        .find(|(at, _)| *at == pointers)
        .expect("the table is written");
    bytes[8..16].copy_from_slice(&(DIRECTORY | LINK).to_le_bytes());
    let links = (0..TABLE_COUNT).flat_map(|table| ((TABLES + table * 0x1000) | LINK).to_le_bytes());
    guest.writes.push((DIRECTORY, links.collect()));
    guest
}

/// Runs the guest; the error says what went wrong.
fn map_and_reuse(plan: Plan) -> Result<Counters, String> {
    let patience = if plan.bug.is_some() { PATIENCE / 4 } else { PATIENCE };
    let nodes: Nodes = run(plan, &guest(), PAGES + 1, patience)?;
    let all = nodes.counters();
    println!(
        "{PAGES} pages mapped in turn, {plan:?}: {} page transfers, {all:?}",
        nodes.transfers()
    );
    let wrong = nodes.words(WRONG, 2);
    if wrong != [0, 0] {
        return Err(format!("pages mapped wrongly: {wrong:?}"));
    }
    let counts: Vec<u64> = (0..TABLE_COUNT)
        .map(|table| nodes.word(TABLES + table * 0x1000 + COUNTER))
        .collect();
    if counts != vec![u64::from(2 * COUNT); TABLE_COUNT as usize] {
        return Err(format!("counts in what was a table: {counts:?}"));
    }
    Ok(all.into_iter().next().unwrap_or_default())
}

/// What a planted bug did, in one of several runs: a few are enough, but for a machine busy with other things.
fn caught(bug: Bug) -> String {
    let buggy = Plan {
        bug: Some(bug),
        ..plan(2, 2)
    };
    let until = Instant::now() + 4 * PATIENCE;
    std::iter::repeat_with(|| map_and_reuse(buggy))
        .take_while(|_| Instant::now() < until)
        .find_map(Result::err)
        .expect("the bug is not seen")
}

#[test]
fn replicated_tables_are_in_place_when_they_are_told_of() {
    let counters = map_and_reuse(plan(2, 2)).unwrap();
    assert!(
        counters.promotions > 0 && counters.words_merged > 0,
        "nothing was replicated: {counters:?}"
    );
}

/// Every table is protected as soon as a flush finds it unchanged, whatever that costs, and given up soon after.
#[test]
fn tables_that_always_come_to_rest_and_leave_are_in_place_when_they_are_told_of() {
    for leave in [0, 4] {
        let restless = Patience { first: 1, most: 1, leave };
        let counters = map_and_reuse(Plan { tables_rest: restless, ..plan(2, 2) }).unwrap();
        assert!(counters.rests > 100 && counters.rests_ended > 0, "hardly any table rested: {counters:?}");
        assert!((counters.departures > 0) == (leave > 0), "{counters:?}");
    }
}

#[test]
fn shared_tables_have_one_writer() {
    let counters = map_and_reuse(Plan {
        replicate: false,
        ..plan(2, 2)
    })
    .unwrap();
    assert_eq!((counters.promotions, counters.words_merged), (0, 0));
}

/// Merged first and frozen then: a page leaves with a flag in it, and the entry it tells of stays.
#[test]
fn merging_before_freezing_is_caught() {
    let caught = caught(Bug::MergeBeforeFreeze);
    // A processor that found no entry: node 1 tells at once, node 0 stands in the handler. The window's
    // addresses all begin alike.
    let fault = format!("cr2 {:#x}", WINDOW >> 24);
    assert!(
        caught.contains("took exception 14") || caught.contains(&fault),
        "{caught}"
    );
    println!("caught: {caught}");
}

/// A table that is kept replicated when it is none any more loses counts.
#[test]
fn keeping_a_freed_table_replicated_is_caught() {
    let caught = caught(Bug::NoReachability);
    assert!(caught.starts_with("counts in what was a table"), "{caught}");
    println!("caught: {caught}");
}
