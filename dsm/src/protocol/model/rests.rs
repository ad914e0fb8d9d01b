//! Tables that rest: replicas which are write-protected and not compared.

use super::super::memory::Quiet;
use super::super::{Access, Bug, Engine, Geometry, Input, Message, Output, Patience, pte};
use super::scenarios::{FLAG, NEW, PATH, ROOT, TABLE, TABLE_HOMES, UPPER, cold, counted, holds, is_caught, published, require, warmed};
use super::world::{Cpu, Op, W, World};

use Op::*;

/// The tables are replicated, and all at rest on every node.
fn rested(homes: &[u32], programs: &[&[Op]]) -> World {
    let mut world = warmed(homes, programs);
    world.let_tables_rest();
    assert!(world.engines.iter().all(|engine| engine.resting() == 3), "all of them rest");
    world
}

/// The same, and the same with tables that leave at the next flush or merge.
fn rested_and_leaving(homes: &[u32], programs: &[&[Op]]) -> [World; 2] {
    let mut leaving = rested(homes, programs);
    leaving.leave_at_once();
    [rested(homes, programs), leaving]
}

#[test]
fn a_change_of_a_table_at_rest_is_in_place_before_what_tells_of_it() {
    for homes in TABLE_HOMES {
        let by_page: [&[Op]; 2] = [&[Store(TABLE, 1, NEW), Store(FLAG, 0, 1)], &[Wait(FLAG, 0, 1), Walk(ROOT, PATH)]];
        let by_interrupt: [&[Op]; 2] = [&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Walk(ROOT, PATH)]];
        for programs in [by_page, by_interrupt] {
            for world in rested_and_leaving(homes, &programs) {
                holds("change of a resting table", world, 2, published);
            }
        }
    }
}

/// What node 0 changes in the table ends its rest there; it is found by the first flush, gone unchanged at the second, and
/// comes to rest at the third, while or after which it is changed again.
const CHANGED_AS_IT_RESTS: &[Op] =
    &[Store(TABLE, 2, NEW), Interrupt(1), Interrupt(1), Interrupt(1), Store(TABLE, 1, NEW), Store(FLAG, 0, 1)];

#[test]
fn a_table_that_changes_as_it_comes_to_rest_is_no_less_coherent() {
    for homes in TABLE_HOMES {
        for world in rested_and_leaving(homes, &[CHANGED_AS_IT_RESTS, &[Wait(FLAG, 0, 1), Walk(ROOT, PATH)]]) {
            holds("a table that comes to rest", world, 2, published);
        }
    }
}

#[test]
fn a_change_reaches_a_resting_table_of_a_third_node() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        for world in rested_and_leaving(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Interrupt(2)], &[AwaitInterrupt, Walk(ROOT, PATH)]],
        ) {
            holds("change of a resting table through a third node", world, 1, published);
        }
    }
}

#[test]
fn both_nodes_may_write_one_table_that_rests() {
    for homes in TABLE_HOMES {
        for world in rested_and_leaving(
            homes,
            &[
                &[Store(TABLE, 1, NEW), Store(FLAG, 0, 1), Wait(FLAG, 1, 1), Load(TABLE, 2)],
                &[Store(TABLE, 2, NEW), Wait(FLAG, 0, 1), Store(FLAG, 1, 1), Load(TABLE, 1)],
            ],
        ) {
            holds("two writers of one resting table", world, 1, |w| {
                let clean = |v: u64| v & !(pte::ACCESSED | pte::DIRTY);
                let (a, b) = (clean(w.cpus[0].results[1]), clean(w.cpus[1].results[1]));
                require(a == NEW && b == NEW, || format!("{a:#x} {b:#x}"))
            });
        }
    }
}

/// It is unlinked while it rests on both nodes, and nobody compares it: it has one writer again all the same, whichever node
/// uses it first.
#[test]
fn a_resting_table_freed_and_reused_as_data_has_one_writer_again() {
    for homes in TABLE_HOMES {
        let here: [&[Op]; 2] = [
            &[Store(UPPER, 0, 0), Store(FLAG, 0, 1), Increment(TABLE, 3)],
            &[Wait(FLAG, 0, 1), Increment(TABLE, 3)],
        ];
        let there: [&[Op]; 2] = [
            &[Store(UPPER, 0, 0), Store(FLAG, 0, 1), Wait(FLAG, 1, 1), Increment(TABLE, 3)],
            &[Wait(FLAG, 0, 1), Store(TABLE, 0, 0), Store(FLAG, 1, 1), Increment(TABLE, 3)],
        ];
        for programs in [here, there] {
            for world in rested_and_leaving(homes, &programs) {
                holds("resting table reused as data", world, 1, counted);
            }
        }
    }
}

#[test]
fn what_was_written_to_a_freed_table_that_rested_is_kept() {
    for homes in TABLE_HOMES {
        for world in rested_and_leaving(
            homes,
            &[
                &[Store(UPPER, 0, 0), Store(TABLE, 1, 8), Interrupt(1), Load(TABLE, 1)],
                &[Interrupt(0), AwaitInterrupt, Load(TABLE, 1)],
            ],
        ) {
            holds("a freed resting table's data", world, 1, |w| {
                let last: Vec<_> = w.cpus.iter().filter_map(|cpu| cpu.results.last().copied()).collect();
                require(last == [8, 8] && w.value(TABLE, 1) == 8, || format!("{last:?}"))
            });
        }
    }
}

#[test]
fn one_word_of_a_resting_table_changed_by_two_nodes_falls_back_to_one_writer() {
    for homes in TABLE_HOMES {
        let other = NEW + 0x1000;
        for world in rested_and_leaving(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(1), AwaitInterrupt], &[Store(TABLE, 1, other), Interrupt(0), AwaitInterrupt]],
        ) {
            holds("a conflict in a resting table", world, 1, |w| {
                let v = w.value(TABLE, 1) & !(pte::ACCESSED | pte::DIRTY);
                require(v == NEW || v == other, || format!("{v:#x}"))
            });
        }
    }
}

#[test]
fn resting_tables_and_pages_together_buffer_no_stores() {
    for homes in TABLE_HOMES {
        for world in rested_and_leaving(
            homes,
            &[&[Store(TABLE, 1, NEW), Load(FLAG, 0)], &[Load(FLAG, 0), Store(FLAG, 0, 1), Walk(ROOT, PATH)]],
        ) {
            holds("store buffering with a resting table", world, 2, |w| {
                let (a, b) = (w.cpus[0].results[1], w.cpus[1].results[2]);
                require(a == 1 || b == NEW, || format!("load {a}, walk {b:#x}"))
            });
        }
    }
}

/// Two CPUs of one node meet at a table that rests, and the other node tells them of its own change.
#[test]
fn two_cpus_of_a_node_rouse_one_table() {
    for homes in TABLE_HOMES {
        for mut world in rested_and_leaving(homes, &[&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Walk(ROOT, PATH), Interrupt(2)]]) {
            world.cpus.push(Cpu::new(1, &[Store(TABLE, 2, NEW), AwaitInterrupt, Walk(ROOT, PATH)]));
            holds("two CPUs and a resting table", world, 1, published);
        }
    }
}

/// Nothing is replicated at the start; what becomes so rests at the first chance, and leaves.
#[test]
fn cold_tables_that_rest_at_once_are_replicated_on_demand_under_every_order() {
    for leave in [false, true] {
        let mut world = cold(&[2, 3]);
        if leave { world.leave_at_once() } else { world.rest_at_once() }
        holds("cold tables that rest", world, 1, published);
    }
}

/// Each node gives up what it has not used, unless the other was first, who need not compare it then.
#[test]
fn tables_that_nobody_walks_are_replicated_no_more() {
    for homes in TABLE_HOMES {
        let programs: [&[Op]; 2] = [&[Interrupt(1); 6], &[Interrupt(0); 6]];
        let mut world = rested(homes, &programs);
        world.leave_at_once();
        holds("tables given up", world, 0, |w| {
            let replicas = [TABLE, UPPER].map(|page| w.engines.iter().filter(|engine| engine.access(page) == Access::Replicated).count());
            // One that is alone with it gives it back at its next flush, of which there may be none.
            require(replicas.iter().all(|count| *count < 2), || format!("replicas of the tables: {replicas:?}"))
        });
    }
}

/// Node 1 gives the table up and asks for it as data, while node 0 unlinks it and wants to own it, and node 2 holds it still.
#[test]
fn a_table_that_one_of_three_gave_up_is_reused_as_data() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        let programs: [&[Op]; 3] = [
            &[Store(UPPER, 0, 0), Interrupt(1), Increment(TABLE, 3)],
            &[Interrupt(2), AwaitInterrupt, Increment(TABLE, 3)],
            &[AwaitInterrupt, Interrupt(0), Walk(ROOT, PATH)],
        ];
        for world in std::iter::once(warmed(homes, &programs)).chain(rested_and_leaving(homes, &programs)) {
            holds("a table given up by one of three, reused", world, 0, counted);
        }
    }
}

/// The same node gives it up, is told of a change, and walks it again, while another is told that it is alone.
#[test]
fn a_table_that_was_given_up_is_walked_again() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        let programs: [&[Op]; 3] = [
            &[Store(TABLE, 1, NEW), Interrupt(1), Store(TABLE, 2, NEW), Store(FLAG, 0, 1)],
            &[Interrupt(2), AwaitInterrupt, Walk(ROOT, PATH), Interrupt(2)],
            &[AwaitInterrupt, AwaitInterrupt, Wait(FLAG, 0, 1), Load(TABLE, 2), Walk(ROOT, PATH)],
        ];
        for world in rested_and_leaving(homes, &programs) {
            holds("a table given up and walked again", world, 0, |w| {
                let found = [w.cpus[1].results[1], w.cpus[2].results[1], w.cpus[2].results[2]].map(|v| v & !(pte::ACCESSED | pte::DIRTY));
                require(found == [NEW; 3], || format!("{found:x?}"))
            });
        }
    }
}

#[test]
fn the_loss_of_a_node_leaves_nobody_waiting_for_a_table_that_rests() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0]] {
        for world in rested_and_leaving(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(2)], &[Interrupt(0), Store(TABLE, 2, NEW)], &[Interrupt(1), Walk(ROOT, PATH)]],
        ) {
            holds("a resting table and a loss", world.losing(&[1, 2]), 0, |_| Ok(()));
        }
    }
}

#[test]
fn a_table_compared_before_it_rests_and_not_after_is_caught() {
    let world = rested(&[5, 0], &[CHANGED_AS_IT_RESTS, &[Wait(FLAG, 0, 1), Walk(ROOT, PATH)]]);
    is_caught("compared before it rests", world, Bug::RestBeforeFreeze, 2, published);
}

/// How many of so many replicas in one block come to rest.
fn resting_of(replicas: u32, huge: bool) -> usize {
    let geometry = Geometry::new(&[(0, 64)], &[32, 32]);
    // Roots of the kernel image need no parents.
    let mut engine: Engine<W> = Engine::new(1, geometry, &[], 0..32, true);
    engine.take_zeros_by(1, 32);
    engine.rest_after(Patience { first: 2, most: 4, leave: 0 });
    let (mut memory, mut out) = (Quiet { huge }, Output::default());
    let mut step = |engine: &mut Engine<W>, input| engine.step(input, &mut memory, &mut out).unwrap();
    for page in 0..replicas {
        step(&mut engine, Input::Fault { page, write: true });
        let message = Message::Replica { page, level: pte::ROOT_LEVEL, data: Box::new([0; W]) };
        step(&mut engine, Input::Message { from: 0, message });
    }
    for _ in 0..200 {
        step(&mut engine, Input::Send { to: 0, bytes: vec![] });
    }
    assert_eq!(engine.replicas(), replicas as usize);
    engine.resting()
}

#[test]
fn a_huge_mapping_is_parted_for_many_replicas_only() {
    assert_eq!(resting_of(15, true), 0);
    assert_eq!(resting_of(16, true), 16);
    assert_eq!(resting_of(1, false), 1);
}
