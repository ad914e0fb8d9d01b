//! What x86 promises of memory, between vCPUs of different nodes.
//!
//! `KRG_LITMUS_ITERATIONS` sets how often each test runs in its dense form, where one page holds 512
//! iterations and is fought over as a whole; in the sparse form every iteration has two pages of its
//! own, so every access of it is a page's way between nodes. Each test prints how many pages moved.

use std::time::{Duration, Instant};

use krg_dsm::node::TABLES_REST;
use krg_dsm::protocol::Bug;
use krg_guest_kernel::micro::code_asm::{CodeAssembler, qword_ptr, r8, r9, r10, rbx};
use krg_guest_kernel::micro::litmus::{self, Litmus, Run};
use krg_guest_kernel::micro::{Builder, MicroError, MicroGuest, counter, done, tso, wait_until};

use super::nodes::{LOADED, MEMORY, Nodes, Plan, load_pieces};

/// A run that does nothing for this long is stuck.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const BARRIER: u64 = 10 << 20;
const COUNTS: u64 = 11 << 20;
const LOADED_VALUES: u64 = 12 << 20;
/// Homed at the first and at the last node.
pub const VARIABLES: [u64; 2] = [4 << 20, 40 << 20];

/// Iterations of a dense test.
fn iterations() -> u32 {
    match std::env::var("KRG_LITMUS_ITERATIONS") {
        Ok(text) => text.parse().expect("KRG_LITMUS_ITERATIONS is a number"),
        Err(_) => 50_000,
    }
}

fn build(vcpus: usize, program: impl FnMut(&mut CodeAssembler, usize) -> Result<(), MicroError>) -> MicroGuest {
    let builder = Builder {
        end: LOADED,
        accessed_dirty: true,
        ..Builder::new(MEMORY)
    };
    builder.build(vcpus, program).unwrap()
}

pub fn plan(nodes: usize, vcpus: usize) -> Plan {
    Plan {
        nodes,
        vcpus: vcpus as u32,
        replicate: true,
        tables_rest: TABLES_REST,
        bug: None,
        cache: u64::MAX,
    }
}

/// Runs a guest until its barrier has counted to `end`; the error says what went wrong.
pub fn run(plan: Plan, guest: &MicroGuest, end: u64, patience: Duration) -> Result<Nodes, String> {
    let nodes = Nodes::new(plan, |memory| load_pieces(memory, &guest.writes));
    nodes.run_micro(&guest.vcpus);
    let (mut last, mut since) = (0, Instant::now());
    loop {
        std::thread::sleep(Duration::from_millis(20));
        if let Ok(failure) = nodes.failures.try_recv() {
            return Err(format!("{failure}; {}", nodes.describe()));
        }
        let now = nodes.word(BARRIER);
        if now >= end {
            return Ok(nodes);
        }
        if now != last {
            (last, since) = (now, Instant::now());
        }
        if since.elapsed() > patience {
            return Err(format!("no progress at {now} of {end}; {}", nodes.describe()));
        }
    }
}

/// Runs a litmus test; the error names a forbidden outcome, or says that there was none.
fn check(test: &Litmus, plan: Plan, run_as: Run, patience: Duration) -> Result<(), String> {
    let guest = build(test.threads.len(), |asm, vcpu| test.assemble(asm, vcpu, &run_as));
    let end = (2 * u64::from(run_as.rounds) + 1) * test.threads.len() as u64;
    let started = Instant::now();
    let nodes = run(plan, &guest, end, patience).map_err(|error| format!("{}: {error}", test.name))?;
    let transfers = nodes.transfers();
    let counts = nodes.words(run_as.counts, litmus::COUNTS);
    let total = u64::from(run_as.rounds) * u64::from(run_as.batch);
    let seen: Vec<String> = (0..litmus::TORN)
        .filter(|&outcome| counts[outcome] > 0)
        .map(|outcome| format!("{} {}", test.outcome_text(outcome), counts[outcome]))
        .collect();
    println!(
        "{} on {} nodes: {total} iterations, {transfers} page transfers, {:?}: {}",
        test.name,
        plan.nodes,
        started.elapsed(),
        seen.join(", ")
    );
    let allowed = tso::allowed(test);
    match (0..litmus::TORN).find(|outcome| counts[*outcome] > 0 && !allowed.contains(outcome)) {
        Some(outcome) => {
            return Err(format!(
                "{}: forbidden outcome {}: {counts:?}",
                test.name,
                test.outcome_text(outcome)
            ));
        }
        None if counts[litmus::TORN] > 0 => {
            return Err(format!("{}: a load saw a value of no round: {counts:?}", test.name));
        }
        None => {}
    }
    assert!(nodes.contended(BARRIER), "{}: nobody tells of the barrier, which all fight for", test.name);
    assert_eq!(counts.iter().sum::<u64>(), total, "{}: {counts:?}", test.name);
    assert!(
        transfers > u64::from(run_as.rounds),
        "{}: the nodes hardly met",
        test.name
    );
    Ok(())
}

/// One page holds many iterations.
fn dense() -> Run {
    const BATCH: u32 = 512;
    Run {
        rounds: iterations().div_ceil(BATCH),
        batch: BATCH,
        variables: VARIABLES,
        stride: 8,
        barrier: BARRIER,
        loaded: LOADED_VALUES,
        counts: COUNTS,
    }
}

/// Every iteration has pages of its own.
fn sparse() -> Run {
    Run {
        rounds: 4,
        batch: 100,
        stride: 4096,
        ..dense()
    }
}

#[test]
fn two_nodes_show_only_what_tso_allows() {
    for test in litmus::ALL {
        for run_as in [dense(), sparse()] {
            check(&test, plan(2, test.threads.len()), run_as, PATIENCE).unwrap();
        }
    }
}

#[test]
fn three_nodes_show_only_what_tso_allows() {
    for test in [litmus::IRIW, litmus::MP, litmus::SB_FENCED] {
        for run_as in [dense(), sparse()] {
            check(&test, plan(3, test.threads.len()), run_as, PATIENCE).unwrap();
        }
    }
}

/// Both variables on one page, and one location for all rounds.
#[test]
fn one_page_for_both_variables() {
    for test in [litmus::SB_FENCED, litmus::MP, litmus::LB, litmus::CORR] {
        let variables = [VARIABLES[1], VARIABLES[1] + 8];
        let run_as = Run {
            rounds: 100,
            batch: 1,
            stride: 0,
            variables,
            ..dense()
        };
        check(&test, plan(2, test.threads.len()), run_as, PATIENCE).unwrap();
    }
}

fn counting(vcpus: usize, count: u32) -> counter::Run {
    let page = |number: u64| VARIABLES[1] + number * 4096;
    counter::Run {
        vcpus,
        count,
        barrier: BARRIER,
        counter: page(0),
        twin: page(1),
        lock: page(2),
        results: page(3),
    }
}

#[test]
fn locked_additions_of_all_nodes_find_every_value_once() {
    for (nodes, vcpus) in [(2, 2), (3, 4)] {
        let run_as = counting(vcpus, iterations() / vcpus as u32);
        let guest = build(vcpus, |asm, vcpu| counter::locked_add(asm, vcpu, &run_as));
        let machine = run(plan(nodes, vcpus), &guest, 2 * vcpus as u64, PATIENCE).unwrap();
        println!(
            "locked additions: {} by {vcpus} vCPUs, {} page transfers",
            iterations(),
            machine.transfers()
        );
        let n = vcpus as u64 * u64::from(run_as.count);
        assert_eq!(machine.word(run_as.counter), n);
        assert_eq!(
            machine.words(run_as.results, vcpus).iter().sum::<u64>(),
            n * (n - 1) / 2
        );
    }
}

#[test]
fn a_spinlock_keeps_two_counters_equal() {
    for nodes in [2, 3] {
        let run_as = counting(nodes, iterations() / 100);
        let guest = build(nodes, |asm, vcpu| counter::spinlock(asm, vcpu, &run_as));
        let machine = run(plan(nodes, nodes), &guest, 2 * nodes as u64, PATIENCE).unwrap();
        println!(
            "spinlock: {} turns of {nodes} nodes, {} page transfers",
            run_as.count,
            machine.transfers()
        );
        let n = nodes as u64 * u64::from(run_as.count);
        assert_eq!((machine.word(run_as.counter), machine.word(run_as.twin)), (n, n));
        assert!(machine.words(run_as.results, nodes).iter().all(|&errors| errors == 0));
    }
}

/// Two locations, each written by one vCPU and read by the other, back and forth. Nothing else is sent
/// meanwhile, so a store that does not reach the other's copy is never seen.
fn back_and_forth(asm: &mut CodeAssembler, vcpu: usize, rounds: u32) -> Result<(), MicroError> {
    let [mine, theirs] = if vcpu == 0 { [0, 1] } else { [1, 0] }.map(|page| VARIABLES[0] + page * 4096);
    let mut again = asm.create_label();
    asm.mov(rbx, 0u64)?;
    asm.mov(r8, mine)?;
    asm.mov(r9, theirs)?;
    asm.set_label(&mut again)?;
    asm.inc(rbx)?;
    let await_theirs = |asm: &mut CodeAssembler| {
        wait_until(asm, |asm, success| {
            asm.cmp(qword_ptr(r9), rbx)?;
            asm.je(success)?;
            Ok(())
        })
    };
    if vcpu == 1 {
        await_theirs(asm)?;
    }
    asm.mov(qword_ptr(r8), rbx)?;
    if vcpu == 0 {
        await_theirs(asm)?;
    }
    if vcpu == 0 {
        // On a page that nobody else asks for.
        asm.mov(r10, BARRIER)?;
        asm.mov(qword_ptr(r10), rbx)?;
    }
    asm.cmp(rbx, rounds as i32)?;
    asm.jb(again)?;
    done(asm, vcpu)
}

/// A sharer that acknowledges before its copy is gone goes on with that copy until its node takes the
/// next step: a complete store is not seen. Every message is such a step, so no chain of memory
/// accesses shows an older value after a newer one; what shows is that the value may never come.
#[test]
fn an_early_acknowledgement_is_caught() {
    const ROUNDS: u32 = 500;
    let guest = build(2, |asm, vcpu| back_and_forth(asm, vcpu, ROUNDS));
    let started = Instant::now();
    let machine = run(plan(2, 2), &guest, ROUNDS.into(), PATIENCE).unwrap();
    println!(
        "{ROUNDS} times there and back: {} page transfers in {:?}",
        machine.transfers(),
        started.elapsed()
    );
    drop(machine);
    let bug = Plan {
        bug: Some(Bug::AckBeforeInvalidate),
        ..plan(2, 2)
    };
    let caught = run(bug, &guest, ROUNDS.into(), Duration::from_secs(3)).err();
    assert!(
        caught.is_some_and(|error| error.starts_with("no progress")),
        "the bug is not seen"
    );
}
