//! What is checked: small guests whose outcomes tell whether the memory was coherent.

use super::super::{Bug, PageData, pte};
use super::world::{Cpu, Op, W, World};
use super::{Report, explore};

use Op::*;

const LIMIT: usize = 3_000_000;

fn check(name: &str, world: World, intrusions: usize, end: impl Fn(&World) -> Result<(), String>) -> Report {
    let report = explore(world, LIMIT, intrusions, &end);
    println!("{name}: {} states, {} ends{}", report.states, report.ends, if report.failure.is_some() { ", FAILED" } else { "" });
    report
}

pub(super) fn holds(name: &str, world: World, intrusions: usize, end: impl Fn(&World) -> Result<(), String>) {
    let report = check(name, world, intrusions, end);
    assert!(report.ends > 0 || report.failure.is_some(), "{name}: no end was reached");
    if let Some(failure) = report.failure {
        panic!("{name}: {failure}");
    }
}

pub(super) fn is_caught(name: &str, mut world: World, bug: Bug, intrusions: usize, end: impl Fn(&World) -> Result<(), String>) {
    world.plant(bug);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(name, world, intrusions, end)));
    match caught {
        Ok(report) => {
            assert!(report.failure.is_some(), "{name}: the planted bug {bug:?} was not found");
            assert!(report.states <= LIMIT, "{name}: with the planted bug {bug:?} there are too many states to look at");
        }
        Err(_) => println!("{name}: the planted bug {bug:?} broke an assertion"),
    }
}

pub(super) fn require(ok: bool, what: impl Fn() -> String) -> Result<(), String> {
    if ok { Ok(()) } else { Err(what()) }
}

pub(super) fn results(world: &World) -> Vec<Vec<u64>> {
    world.cpus.iter().map(|c| c.results.clone()).collect()
}

/// Two data pages, homed at different nodes, nothing loaded.
pub(super) fn data(homes: &[u32], cpus: Vec<Cpu>) -> World {
    World::new(homes, &[], 0..0, cpus).only_data()
}

pub(super) const X: u32 = 0;
pub(super) const Y: u32 = 1;

fn store_buffering() -> (World, impl Fn(&World) -> Result<(), String>) {
    let world = data(&[1, 1], vec![Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0)]), Cpu::new(1, &[Store(Y, 0, 1), Load(X, 0)])]);
    (world, |w: &World| require(results(w) != [[0], [0]], || "both loads missed both stores".into()))
}

#[test]
fn store_buffering_is_sequential() {
    let (world, end) = store_buffering();
    holds("store buffering", world, 1, end);
}

#[test]
fn messages_are_passed_in_order() {
    for homes in [&[2, 0][..], &[0, 2], &[1, 1]] {
        let world =
            data(homes, vec![Cpu::new(0, &[Load(X, 0), Store(X, 0, 1), Store(Y, 0, 1)]), Cpu::new(1, &[Load(X, 0), Wait(Y, 0, 1), Load(X, 0)])]);
        holds("message passing", world, 1, |w| require(w.cpus[1].results[1] == 1, || "flag seen, data not".into()));
    }
}

#[test]
fn independent_readers_agree_on_the_order_of_writes() {
    let world = data(
        &[1, 1, 0],
        vec![
            Cpu::new(0, &[Store(X, 0, 1)]),
            Cpu::new(1, &[Load(X, 0), Load(Y, 0)]),
            Cpu::new(2, &[Load(Y, 0), Load(X, 0)]),
            Cpu::new(0, &[Store(Y, 0, 1)]),
        ],
    );
    holds("independent reads", world, 0, |w| {
        let r = results(w);
        require(!(r[1] == [1, 0] && r[2] == [1, 0]), || format!("{r:?}"))
    });
}

#[test]
fn three_nodes_lose_no_increment() {
    for homes in [&[1, 0, 0][..], &[0, 0, 1]] {
        let cpus = (0..3).map(|n| Cpu::new(n, &[Load(X, 0), Increment(X, 0), Increment(X, 0)])).collect();
        holds("increments", data(homes, cpus), 0, |w| require(w.value(X, 0) == 6, || format!("{} of 6", w.value(X, 0))));
    }
}

#[test]
fn pages_taken_beside_another_are_as_coherent() {
    for (homes, group, block) in [(&[2, 0][..], 2, 1), (&[0, 2], 2, 1), (&[3, 0], 2, 1), (&[2, 0], 1, 2), (&[1, 2], 1, 2)] {
        let mut world = data(
            homes,
            vec![
                Cpu::new(0, &[Load(X, 0), Store(X, 0, 1), Store(Y, 0, 1), Load(Y, 1)]),
                Cpu::new(1, &[Load(Y, 1), Store(Y, 1, 1), Load(X, 0)]),
            ],
        );
        world.take_zeros_by(group, block);
        holds("neighbours taken", world, 1, |w| {
            require(w.cpus[0].results[1] == 1 || w.cpus[1].results[1] == 1, || "both loads missed both stores".into())?;
            require(w.value(Y, 0) == 1 && w.value(Y, 1) == 1, || "a store is lost".into())
        });
    }
}

#[test]
fn prefetches_change_nothing_that_a_guest_can_see() {
    for homes in [&[2, 0][..], &[1, 1]] {
        let world = data(
            homes,
            vec![
                Cpu::new(0, &[Prefetch(Y, Y + 1, false), Store(X, 0, 1), Load(Y, 0)]),
                Cpu::new(1, &[Prefetch(X, X + 1, true), Store(Y, 0, 1), Load(X, 0)]),
            ],
        );
        holds("prefetches", world, 1, |w| require(results(w) != [[0], [0]], || "both loads missed both stores".into()));
    }
}

/// One CPU of each node uses the pages, a further one wants to be rid of them at any moment.
#[test]
fn evictions_change_nothing_that_a_guest_can_see() {
    for homes in [&[2, 0][..], &[1, 1]] {
        let world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0)]),
                Cpu::new(0, &[Evict(Y), Evict(X)]),
                Cpu::new(1, &[Store(Y, 0, 1), Load(X, 0)]),
                Cpu::new(1, &[Evict(X), Evict(Y)]),
            ],
        );
        holds("evictions", world, 1, |w| {
            let r = results(w);
            require([&r[0], &r[2]] != [&[0], &[0]], || "both loads missed both stores".into())
        });
    }
}

#[test]
fn three_nodes_lose_no_increment_to_evictions() {
    // A page homed at node 1: node 0 writes, reads, gives up and writes again; node 2 gives up what it has.
    let cpus = vec![
        Cpu::new(0, &[Increment(X, 0), Evict(X), Increment(X, 0)]),
        Cpu::new(1, &[Load(X, 0), Increment(X, 0)]),
        Cpu::new(2, &[Load(X, 0), Increment(X, 0)]),
        Cpu::new(2, &[Evict(X)]),
    ];
    holds("evicted increments", data(&[0, 1, 0], cpus), 0, |w| require(w.value(X, 0) == 4, || format!("{} of 4", w.value(X, 0))));
}

/// A page is used on two nodes, given up by one of them, and used again: it is zero, and nothing that is
/// written then is lost.
#[test]
fn a_page_that_was_given_up_is_zero_and_then_as_good_as_any() {
    for homes in [&[1, 0, 0][..], &[0, 1, 0], &[0, 0, 1]] {
        let world = World::new(
            homes,
            &[],
            0..0,
            vec![
                Cpu::new(0, &[AwaitInterrupt, Load(X, 0), Free(X), AwaitInterrupt, Interrupt(1), Increment(X, 1)]),
                Cpu::new(1, &[Store(X, 0, 5), Interrupt(0), AwaitInterrupt, Load(X, 0), Increment(X, 1)]),
            ],
        );
        holds("given up", world, 1, |w| {
            require(w.cpus[1].results == [0], || format!("read {:?} after it was given up", w.cpus[1].results))?;
            require((w.value(X, 0), w.value(X, 1)) == (0, 2), || format!("{} of 2 increments", w.value(X, 1)))
        });
    }
}

/// A guest that uses a page while it gives it up finds anything in it, but waits for nothing.
#[test]
fn giving_up_a_page_in_use_stops_nobody() {
    for homes in [&[1, 0, 0][..], &[0, 1, 0], &[0, 0, 1]] {
        let world = World::new(
            homes,
            &[],
            0..0,
            vec![
                Cpu::new(0, &[Increment(X, 0), Free(X), Load(X, 0), AwaitInterrupt]),
                Cpu::new(1, &[Load(X, 0), Increment(X, 0)]),
                Cpu::new(1, &[Evict(X), Free(X), AwaitInterrupt]),
            ],
        );
        holds("given up in use", world, 0, |w| require(w.value(X, 0) <= 2, || "more than was counted".into()));
    }
}

/// Both nodes read and write the pages of a block while one of them, or both, ask for it whole.
#[test]
fn blocks_asked_for_whole_are_as_coherent() {
    for homes in [&[2, 0][..], &[0, 2], &[2, 0, 0]] {
        for write_first in [true, false] {
            let second = if write_first { Store(Y, 1, 1) } else { Load(X, 1) };
            let mut world = data(
                homes,
                vec![
                    Cpu::new(0, &[Store(X, 0, 1), AheadBlock(X), Load(Y, 0), Store(Y, 1, 1)]),
                    Cpu::new(1, &[second, AheadBlock(X), Store(Y, 0, 1), Load(X, 0)]),
                ],
            );
            world.take_zeros_by(1, 2);
            holds("a block asked for whole", world, 1, |w| {
                let last = w.cpus[1].results.last();
                require(w.cpus[0].results != [0] || last != Some(&0), || "both loads missed both stores".into())?;
                require((w.value(X, 0), w.value(Y, 0), w.value(Y, 1)) == (1, 1, 1), || "a store is lost".into())
            });
        }
    }
}

/// Home writes, two others stream, one of them writes, copies are evicted and the block is asked for again.
#[test]
fn blocks_that_are_asked_for_again_lose_no_increment() {
    let mut world = data(
        &[2, 0, 0],
        vec![
            Cpu::new(0, &[Increment(X, 0), Increment(Y, 0)]),
            Cpu::new(1, &[AheadBlock(X), Increment(X, 0), Evict(Y)]),
            Cpu::new(2, &[AheadBlock(X), Increment(Y, 0)]),
        ],
    );
    world.take_zeros_by(1, 2);
    holds("a block asked for again", world, 0, |w| {
        require((w.value(X, 0), w.value(Y, 0)) == (2, 2), || format!("{} and {} of 2 each", w.value(X, 0), w.value(Y, 0)))
    });
}

#[test]
fn blocks_asked_for_whole_pass_messages_in_order() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0], &[0, 0, 2]] {
        let mut world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]),
                Cpu::new(1, &[AheadBlock(X), Wait(Y, 0, 1), Load(X, 0)]),
                Cpu::new(2, &[AheadBlock(X), Load(Y, 0)]),
            ],
        );
        world.take_zeros_by(1, 2);
        holds("a block asked for whole, message passing", world, 0, |w| {
            require(w.cpus[1].results[0] == 1, || "flag seen, data not".into())
        });
    }
}

#[test]
fn a_block_read_before_it_is_frozen_is_caught() {
    let mut world = data(&[2, 0], vec![Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]), Cpu::new(1, &[AheadBlock(X), Load(Y, 0)])]);
    world.take_zeros_by(1, 2);
    is_caught("a block before it is frozen", world, Bug::BlockBeforeFreeze, 1, |_| Ok(()));
}

/// What home asks of the block's new owner, for others and for itself, comes before the block.
#[test]
fn what_a_blocks_new_owner_is_asked_is_kept_until_it_has_the_block() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0]] {
        let mut world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Load(X, 0), Increment(Y, 0)]),
                Cpu::new(1, &[AheadBlock(X), Increment(Y, 0)]),
                Cpu::new(2, &[Load(X, 0), Load(X, 0), Increment(Y, 0)]),
            ],
        );
        world.take_zeros_by(1, 2);
        holds("a block's new owner is asked", world, 0, |w| {
            require(w.value(Y, 0) == 3, || format!("{} of 3 increments", w.value(Y, 0)))
        });
    }
}

/// Who asks for a block has read some of it, and asked for more by the page.
#[test]
fn a_block_takes_the_place_of_the_copies_there_are_of_it() {
    for homes in [&[2, 0][..], &[2, 0, 0]] {
        for write in [true, false] {
            let writer = if write { Store(X, 1, 1) } else { Evict(X) };
            let mut cpus = vec![
                Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0), Store(Y, 0, 1)]),
                Cpu::new(1, &[Load(X, 0), Ahead(Y, 1), AheadBlock(X), writer, Load(Y, 0)]),
            ];
            if homes.len() > 2 {
                cpus.push(Cpu::new(2, &[Load(X, 0), Increment(X, 0)]));
            }
            let mut world = data(homes, cpus);
            world.take_zeros_by(1, 2);
            let three = homes.len() > 2;
            holds("a block in the place of copies", world, u8::from(!three).into(), |w| {
                require(w.value(X, 1) == u64::from(write) && w.value(Y, 0) == 1, || "a store is lost".into())?;
                require(!three || w.value(X, 0) >= 1, || "an increment is lost".into())
            });
        }
    }
}

#[test]
fn a_block_given_while_another_reads_a_page_of_it_is_caught() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]),
        Cpu::new(1, &[AheadBlock(X), Store(X, 0, 2)]),
        Cpu::new(2, &[Load(X, 0), Load(X, 0)]),
    ];
    let mut world = data(&[2, 0, 0], cpus);
    world.take_zeros_by(1, 2);
    is_caught("a block despite its readers", world, Bug::BlockDespiteReaders, 0, |_| Ok(()));
}

#[test]
fn a_block_on_its_way_is_given_up_when_it_has_come() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1), Free(X), AwaitInterrupt, Load(X, 0)]),
        Cpu::new(1, &[AheadBlock(X), Load(Y, 0)]),
    ];
    for homes in [&[2, 0][..], &[2, 0, 0]] {
        let mut world = World::new(homes, &[], 0..0, cpus.clone());
        world.take_zeros_by(1, 2);
        holds("a block on its way given up", world, 1, |_| Ok(()));
    }
}

#[test]
fn what_is_asked_of_the_owner_of_a_block_on_its_way_forgotten_is_caught() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1), Load(X, 0)]),
        Cpu::new(1, &[AheadBlock(X), Load(Y, 0)]),
    ];
    let mut world = data(&[2, 0], cpus);
    world.take_zeros_by(1, 2);
    is_caught("a request before its block forgotten", world, Bug::EarlyForgotten, 0, |_| Ok(()));
}

#[test]
fn pages_fetched_together_and_taken_beside_others_are_as_coherent() {
    for homes in [&[2, 0][..], &[0, 2], &[3, 0]] {
        for write in [false, true] {
            let mut world = data(
                homes,
                vec![
                    Cpu::new(0, &[Prefetch(X, Y + 1, write), Store(X, 0, 1), Load(Y, 0)]),
                    Cpu::new(1, &[Prefetch(X, Y + 1, !write), Store(Y, 0, 1), Load(X, 0)]),
                ],
            );
            world.take_zeros_by(2, 1);
            holds("two pages fetched together", world, 1, |w| {
                require(results(w) != [[0], [0]], || "both loads missed both stores".into())
            });
        }
    }
}

/// Three nodes read a page and then write it, all at once.
fn increments() -> World {
    data(&[1, 0, 0], (0..3).map(|n| Cpu::new(n, &[Load(X, 0), Increment(X, 0)])).collect())
}

fn incremented(w: &World) -> Result<(), String> {
    require(w.value(X, 0) == 3, || format!("{} of 3", w.value(X, 0)))
}

#[test]
fn sending_a_page_before_it_is_frozen_is_caught() {
    let world = data(&[1, 1], vec![Cpu::new(0, &[Store(X, 0, 1), Store(X, 1, 1)]), Cpu::new(1, &[Load(X, 0)])]);
    is_caught("sent before frozen", world, Bug::SendBeforeFreeze, 1, |_| Ok(()));
}

#[test]
fn serving_the_next_request_too_early_is_caught() {
    is_caught("done not awaited", increments(), Bug::DoneNotAwaited, 0, incremented);
}

#[test]
fn a_copy_kept_for_an_upgrade_is_caught() {
    is_caught("kept while upgrading", increments(), Bug::KeepWhileUpgrading, 0, incremented);
}

#[test]
fn an_early_acknowledgement_is_caught() {
    let world = data(
        &[1, 1],
        vec![Cpu::new(0, &[Load(X, 0), Store(X, 0, 1), Store(Y, 0, 1)]), Cpu::new(1, &[Load(X, 0), Wait(Y, 0, 1), Load(X, 0)])],
    );
    is_caught("early acknowledgement", world, Bug::AckBeforeInvalidate, 1, |w| {
        require(w.cpus[1].results[1] == 1, || "flag seen, data not".into())
    });
}

// Page tables: a root of the kernel image, a table below it, one below that, and data pages.
pub(super) const ROOT: u32 = 0;
pub(super) const UPPER: u32 = 1;
pub(super) const TABLE: u32 = 2;
pub(super) const FLAG: u32 = 4;

const LINK: u64 = pte::PRESENT | pte::WRITABLE | pte::ACCESSED | pte::DIRTY;
pub(super) const NEW: u64 = 9 << 12 | pte::PRESENT;

fn link(page: u32) -> u64 {
    u64::from(page) << 12 | LINK
}

fn words(first: u64) -> PageData<W> {
    [first, 0, 0, 0]
}

/// Path from the root to entry 1 of TABLE, which starts empty.
pub(super) const PATH: &[usize] = &[0, 0, 1];

fn tables(homes: &[u32], cpus: Vec<Cpu>) -> World {
    let loaded = [(ROOT, words(link(UPPER))), (UPPER, words(link(TABLE))), (TABLE, [0; W])];
    let mut world = World::new(homes, &loaded, 0..1, cpus);
    world.set_root(ROOT);
    world
}

/// Replicates what a scenario needs first: every node walks the tables in turn, before the programs.
pub(super) fn warmed(homes: &[u32], programs: &[&[Op]]) -> World {
    let cpus = programs
        .iter()
        .enumerate()
        .map(|(n, p)| Cpu::new(n, &[&[Walk(ROOT, PATH)], *p].concat()))
        .collect();
    let mut world = tables(homes, cpus);
    // Two rounds: a table is replicated once its parent is, on both sides.
    for _ in 0..2 {
        for c in 0..programs.len() {
            world.cpus[c].at = 0;
            world.cpus[c].results.clear();
            while world.cpus[c].at == 0 {
                let action = world
                    .actions()
                    .into_iter()
                    .find(|a| !matches!(a, super::world::Action::Cpu(other) if *other != c))
                    .expect("the walk goes on");
                world.act(action, None);
            }
        }
    }
    assert_eq!(world.engines.iter().map(|e| e.replicas()).max(), Some(3), "the tables are replicated");
    world
}

pub(super) fn published(w: &World) -> Result<(), String> {
    let last = w.cpus.last().expect("a CPU").results.last().copied();
    require(last == Some(NEW), || format!("the walk after the signal found {last:x?}"))
}

pub(super) const TABLE_HOMES: [&[u32]; 3] = [&[5, 0], &[0, 5], &[2, 3]];

#[test]
fn a_table_change_is_in_place_before_the_page_that_tells_of_it() {
    for homes in TABLE_HOMES {
        let world = warmed(
            homes,
            &[&[Store(TABLE, 1, NEW), Store(FLAG, 0, 1)], &[Wait(FLAG, 0, 1), Walk(ROOT, PATH)]],
        );
        holds("table change, then page", world, 3, published);
    }
}

#[test]
fn a_table_change_is_in_place_before_the_block_that_tells_of_it() {
    for homes in [&[6, 0][..], &[0, 6], &[6, 0, 0]] {
        let signal: &[Op] = &[Store(TABLE, 1, NEW), Store(FLAG, 0, 1)];
        let wait: &[Op] = &[AheadBlock(FLAG), Wait(FLAG, 0, 1), Walk(ROOT, PATH)];
        let programs = [signal, wait, &[]];
        let mut world = warmed(homes, &programs[..homes.len()]);
        world.take_zeros_by(1, 2);
        holds("table change, then block", world, 2, |w| {
            let last = w.cpus[1].results.last().copied();
            require(last == Some(NEW), || format!("the walk after the signal found {last:x?}"))
        });
    }
}

#[test]
fn a_table_change_is_in_place_before_the_interrupt_that_tells_of_it() {
    for homes in TABLE_HOMES {
        let world = warmed(homes, &[&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Walk(ROOT, PATH)]]);
        holds("table change, then interrupt", world, 3, published);
    }
}

#[test]
fn a_table_change_reaches_a_third_node_before_a_second_can_tell_it() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        let world = warmed(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Interrupt(2)], &[AwaitInterrupt, Walk(ROOT, PATH)]],
        );
        holds("table change through a third node", world, 1, published);
    }
}

#[test]
fn tables_and_pages_together_buffer_no_stores() {
    for homes in TABLE_HOMES {
        let world = warmed(
            homes,
            &[&[Store(TABLE, 1, NEW), Load(FLAG, 0)], &[Load(FLAG, 0), Store(FLAG, 0, 1), Walk(ROOT, PATH)]],
        );
        holds("store buffering with a table", world, 2, |w| {
            let (a, b) = (w.cpus[0].results[1], w.cpus[1].results[2]);
            require(a == 1 || b == NEW, || format!("load {a}, walk {b:#x}"))
        });
    }
}

#[test]
fn both_nodes_may_write_one_table() {
    for homes in TABLE_HOMES {
        let world = warmed(
            homes,
            &[
                &[Store(TABLE, 1, NEW), Store(FLAG, 0, 1), Wait(FLAG, 1, 1), Load(TABLE, 2)],
                &[Store(TABLE, 2, NEW), Wait(FLAG, 0, 1), Store(FLAG, 1, 1), Load(TABLE, 1)],
            ],
        );
        holds("two writers of one table", world, 1, |w| {
            let clean = |v: u64| v & !(pte::ACCESSED | pte::DIRTY);
            let (a, b) = (clean(w.cpus[0].results[1]), clean(w.cpus[1].results[1]));
            require(a == NEW && b == NEW, || format!("{a:#x} {b:#x}"))
        });
    }
}

/// Node 0 unlinks TABLE, reuses it as data holding a counter, and tells node 1.
fn reuse(homes: &[u32]) -> World {
    warmed(
        homes,
        &[
            &[Store(UPPER, 0, 0), Store(TABLE, 0, 0), Store(FLAG, 0, 1), Increment(TABLE, 3)],
            &[Wait(FLAG, 0, 1), Increment(TABLE, 3)],
        ],
    )
}

pub(super) fn counted(w: &World) -> Result<(), String> {
    require(w.value(TABLE, 3) == 2, || format!("{} of 2 increments", w.value(TABLE, 3)))
}

#[test]
fn a_table_freed_and_reused_as_data_has_one_writer_again() {
    for homes in TABLE_HOMES {
        holds("table reused as data", reuse(homes), 2, counted);
    }
}

#[test]
fn a_table_reused_as_data_on_the_other_node_has_one_writer_again() {
    for homes in TABLE_HOMES {
        let world = warmed(
            homes,
            &[
                &[Store(UPPER, 0, 0), Store(FLAG, 0, 1), Wait(FLAG, 1, 1), Increment(TABLE, 3)],
                &[Wait(FLAG, 0, 1), Store(TABLE, 0, 0), Store(FLAG, 1, 1), Increment(TABLE, 3)],
            ],
        );
        holds("table reused as data elsewhere", world, 1, counted);
    }
}

#[test]
fn what_was_written_to_a_freed_table_before_it_was_found_out_is_kept() {
    for homes in TABLE_HOMES {
        // Whichever node asks first, the new owner has what node 0 wrote: node 1 may learn of the unlinked table, and
        // find it out by a flush of its own, before home hears of it from node 0.
        let world = warmed(
            homes,
            &[
                &[Store(UPPER, 0, 0), Store(TABLE, 1, 8), Interrupt(1), Load(TABLE, 1)],
                &[Interrupt(0), AwaitInterrupt, Load(TABLE, 1)],
            ],
        );
        holds("a freed table's data", world, 1, |w| {
            let last: Vec<_> = w.cpus.iter().filter_map(|cpu| cpu.results.last().copied()).collect();
            require(last == [8, 8] && w.value(TABLE, 1) == 8, || format!("{last:?}"))
        });
    }
}

/// Node 0 tells node 2 of what it wrote to a table it had unlinked; the home of that may be a third node.
fn told_of_a_freed_table(homes: &[u32]) -> World {
    let programs: [&[Op]; 3] = [&[Store(UPPER, 0, 0), Store(TABLE, 3, 5), Interrupt(2)], &[], &[AwaitInterrupt, Load(TABLE, 3)]];
    warmed(homes, &programs)
}

fn told(w: &World) -> Result<(), String> {
    let last = w.cpus[2].results.last().copied();
    require(last == Some(5), || format!("node 2 found {last:?}"))
}

#[test]
fn a_third_node_finds_what_was_written_to_a_freed_table() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        holds("told of a freed table", told_of_a_freed_table(homes), 1, told);
    }
}

#[test]
fn a_loss_while_a_freed_table_is_given_up_leaves_nobody_waiting() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        holds("a freed table and a loss", told_of_a_freed_table(homes).losing(&[0, 1, 2]), 0, |_| Ok(()));
    }
}

#[test]
fn telling_of_a_freed_table_that_others_still_hold_is_caught() {
    is_caught("settled not awaited", told_of_a_freed_table(&[0, 5, 0]), Bug::SettledNotAwaited, 0, told);
}

/// All three nodes count in what one of them unlinked, told by it or by each other.
#[test]
fn three_nodes_reuse_a_freed_table_as_data() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        let programs: [&[Op]; 3] = [
            &[Store(UPPER, 0, 0), Interrupt(1), Increment(TABLE, 3)],
            &[Interrupt(2), AwaitInterrupt, Increment(TABLE, 3), Interrupt(2)],
            &[AwaitInterrupt, AwaitInterrupt, Increment(TABLE, 3)],
        ];
        holds("three nodes reuse a table", warmed(homes, &programs), 0, |w| {
            require(w.value(TABLE, 3) == 3, || format!("{} of 3 increments", w.value(TABLE, 3)))
        });
    }
}

#[test]
fn one_word_changed_by_two_nodes_falls_back_to_one_writer() {
    for homes in TABLE_HOMES {
        let other = NEW + 0x1000;
        let world = warmed(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(1), AwaitInterrupt], &[Store(TABLE, 1, other), Interrupt(0), AwaitInterrupt]],
        );
        holds("a conflict", world, 1, |w| {
            let v = w.value(TABLE, 1) & !(pte::ACCESSED | pte::DIRTY);
            require(v == NEW || v == other, || format!("{v:#x}"))
        });
    }
}

#[test]
fn merging_before_freezing_is_caught() {
    let world = warmed(
        &[5, 0],
        &[&[Store(FLAG, 1, 1), Store(TABLE, 1, NEW), Store(FLAG, 0, 1)], &[Wait(FLAG, 0, 1), Walk(ROOT, PATH)]],
    );
    is_caught("merge before freeze", world, Bug::MergeBeforeFreeze, 3, published);
}

#[test]
fn keeping_a_freed_table_replicated_is_caught() {
    is_caught("freed table kept", reuse(&[5, 0]), Bug::NoReachability, 1, counted);
}

/// Two nodes walk tables that node 0 alone has, and one of them changes one.
pub(super) fn cold(homes: &[u32]) -> World {
    let programs: [&[Op]; 2] = [&[Walk(ROOT, PATH), Store(TABLE, 1, NEW), Store(FLAG, 0, 1)], &[Walk(ROOT, PATH), Wait(FLAG, 0, 1), Walk(ROOT, PATH)]];
    tables(homes, programs.iter().enumerate().map(|(n, p)| Cpu::new(n, p)).collect())
}

#[test]
fn cold_tables_are_replicated_on_demand_under_every_order() {
    holds("cold tables", cold(&[2, 3]), 1, published);
}
