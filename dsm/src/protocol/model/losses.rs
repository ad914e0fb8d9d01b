//! The loss of any one node at any step.

use super::super::Bug;
use super::scenarios::{FLAG, NEW, PATH, ROOT, TABLE, UPPER, X, Y, data, holds, is_caught, require, warmed};
use super::world::{Cpu, Op, World};

use Op::*;

pub(super) const ANY: &[usize] = &[0, 1, 2];

pub(super) fn ends(_: &World) -> Result<(), String> {
    Ok(())
}

#[test]
fn readers_and_a_writer_survive_the_loss_of_any_node() {
    for homes in [&[1, 1, 0][..], &[0, 1, 1], &[0, 0, 2]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0)]),
            Cpu::new(1, &[Load(X, 0), Store(X, 0, 2)]),
            Cpu::new(2, &[Load(X, 0), Store(Y, 0, 3)]),
        ];
        holds("readers, a writer and a loss", data(homes, cpus).losing(ANY), 0, ends);
    }
}

#[test]
fn upgrades_survive_the_loss_of_any_node() {
    for homes in [&[1, 0, 0][..], &[0, 0, 1]] {
        let cpus = (0..3).map(|n| Cpu::new(n, &[Load(X, 0), Increment(X, 0)])).collect();
        holds("upgrades and a loss", data(homes, cpus).losing(ANY), 0, ends);
    }
}

#[test]
fn a_guest_that_runs_in_the_middle_of_a_step_changes_nothing() {
    for homes in [&[2, 0][..], &[1, 1]] {
        let cpus = vec![Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0), Store(X, 1, 2)]), Cpu::new(1, &[Store(Y, 0, 1), Load(X, 0), Store(X, 0, 3)])];
        holds("stores in the middle of a step, and a loss", data(homes, cpus).losing(&[0, 1]), 2, ends);
    }
}

/// A home, an owner, a reader and a writer that is lost, each on its own node: what the reader has must have gone when
/// somebody else writes.
fn a_reader_whose_copy_a_lost_writer_wanted() -> World {
    let cpus = vec![
        Cpu::new(1, &[Store(X, 0, 1)]),
        Cpu::new(2, &[Wait(X, 0, 1)]),
        Cpu::new(3, &[Wait(X, 0, 1), Store(X, 0, 2)]),
        Cpu::new(1, &[Wait(X, 0, 1), Store(X, 0, 3)]),
    ];
    data(&[1, 0, 0, 0], cpus).losing(&[3])
}

#[test]
fn copies_that_a_lost_writer_wanted_are_gone_before_another_writes() {
    holds("a copy for a lost writer", a_reader_whose_copy_a_lost_writer_wanted(), 0, ends);
    let bug = Bug::SharersOfLostForgotten;
    is_caught("a sharer forgotten", a_reader_whose_copy_a_lost_writer_wanted(), bug, 0, ends);
}

#[test]
fn copies_given_up_survive_the_loss_of_any_node() {
    for homes in [&[1, 0, 0][..], &[0, 1, 0]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Load(X, 0), Evict(X)]),
            Cpu::new(1, &[Load(X, 0), Evict(X), Load(X, 0)]),
            Cpu::new(2, &[Load(X, 0)]),
        ];
        holds("copies given up, and a loss", data(homes, cpus).losing(ANY), 0, ends);
    }
}

#[test]
fn pages_fetched_ahead_survive_the_loss_of_any_node() {
    for homes in [&[2, 0, 0][..], &[0, 1, 1]] {
        let mut world = data(
            homes,
            vec![
                Cpu::new(0, &[Prefetch(X, Y + 1, true), Load(X, 0)]),
                Cpu::new(1, &[Store(X, 0, 1)]),
                Cpu::new(2, &[Prefetch(X, Y + 1, false), Store(Y, 0, 1)]),
            ],
        );
        world.take_zeros_by(2, 1);
        holds("pages fetched ahead, and a loss", world.losing(ANY), 0, ends);
    }
}

#[test]
fn blocks_asked_for_whole_survive_the_loss_of_any_node() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0], &[0, 0, 2]] {
        let mut world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0)]),
                Cpu::new(1, &[AheadBlock(X), Load(X, 0), Store(Y, 1, 1)]),
                Cpu::new(2, &[AheadBlock(X), Store(Y, 0, 1)]),
            ],
        );
        world.take_zeros_by(1, 2);
        holds("blocks asked for whole, and a loss", world.losing(ANY), 0, ends);
    }
}

/// Who asks for a block reads some of it, while another writes that or is lost.
#[test]
fn a_block_in_the_place_of_copies_survives_the_loss_of_any_node() {
    for homes in [&[2, 0, 0][..], &[0, 0, 2]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]),
            Cpu::new(1, &[Load(X, 0), AheadBlock(X), Load(Y, 0)]),
            Cpu::new(2, &[Store(X, 0, 2)]),
        ];
        let mut world = data(homes, cpus);
        world.take_zeros_by(1, 2);
        holds("a block in the place of copies, and a loss", world.losing(ANY), 0, ends);
    }
}

/// Who has given a page to one that is lost asks for its block: home's question about that page may come meanwhile.
#[test]
fn a_block_is_asked_for_by_the_last_owner_of_a_lost_page() {
    for homes in [&[2, 0, 0][..], &[0, 0, 2]] {
        let cpus = vec![
            Cpu::new(0, &[Load(Y, 0)]),
            Cpu::new(1, &[Store(X, 0, 1), AheadBlock(X)]),
            Cpu::new(2, &[Store(X, 0, 2)]),
        ];
        let mut world = data(homes, cpus);
        world.take_zeros_by(1, 2);
        holds("a block asked for by a page's last owner", world.losing(ANY), 0, ends);
    }
}

#[test]
fn a_lost_sharers_acknowledgement_awaited_is_caught() {
    let cpus = (0..3).map(|n| Cpu::new(n, &[Load(X, 0), Increment(X, 0)])).collect();
    is_caught("a lost sharer awaited", data(&[1, 0, 0], cpus).losing(&[2]), Bug::AwaitLostSharer, 0, ends);
}

/// Whoever lives to walk after it was told finds the change.
fn published(w: &World) -> Result<(), String> {
    let told = w.cpus.iter().filter(|cpu| !cpu.dead && cpu.finished() && cpu.results.len() > 1);
    let stale = told.flat_map(|cpu| cpu.results.last()).find(|last| **last != NEW);
    require(stale.is_none(), || format!("the walk after the signal found {stale:x?}"))
}

#[test]
fn a_table_change_is_in_place_or_its_table_lost_whichever_node_is() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 0, 5]] {
        let world = warmed(
            homes,
            &[&[Store(TABLE, 1, NEW), Interrupt(1)], &[AwaitInterrupt, Interrupt(2), Walk(ROOT, PATH)], &[AwaitInterrupt, Walk(ROOT, PATH)]],
        );
        holds("table change through a third node, and a loss", world.losing(ANY), 1, published);
    }
}

#[test]
fn a_table_reused_as_data_is_let_go_whichever_node_is_lost() {
    for homes in [&[5, 0, 0][..], &[0, 5, 0], &[0, 2, 3]] {
        let world = warmed(
            homes,
            &[
                &[Store(UPPER, 0, 0), Store(TABLE, 0, 0), Store(FLAG, 0, 1), Increment(TABLE, 3)],
                &[Wait(FLAG, 0, 1), Increment(TABLE, 3)],
                &[],
            ],
        );
        holds("table reused as data, and a loss", world.losing(ANY), 0, ends);
    }
}

#[test]
fn copies_on_their_way_home_survive_the_loss_of_any_node() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Evict(X), Load(X, 0)]),
        Cpu::new(1, &[Load(X, 0)]),
        Cpu::new(2, &[Load(X, 0), Evict(X)]),
    ];
    holds("evictions and a loss", data(&[0, 1, 0], cpus).losing(ANY), 0, ends);
}

#[test]
fn giving_pages_up_ends_whichever_node_is_lost() {
    for homes in [&[1, 0, 0][..], &[0, 1, 0]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Free(X), AwaitInterrupt, Load(X, 0)]),
            Cpu::new(1, &[Load(X, 0)]),
            Cpu::new(2, &[Load(X, 0)]),
        ];
        holds("given up, and a loss", World::new(homes, &[], 0..0, cpus).losing(ANY), 0, ends);
    }
}
