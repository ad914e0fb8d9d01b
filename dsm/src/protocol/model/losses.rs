//! The loss of any one node at any step.

use super::super::Bug;
use super::scenarios::{FLAG, NEW, PATH, ROOT, TABLE, UPPER, X, data, holds, is_caught, require, warmed};
use super::world::{Cpu, Op, World};

use Op::*;

const ANY: &[usize] = &[0, 1, 2];

fn ends(_: &World) -> Result<(), String> {
    Ok(())
}

#[test]
fn upgrades_survive_the_loss_of_any_node() {
    let cpus = (0..3).map(|n| Cpu::new(n, &[Load(X, 0), Increment(X, 0)])).collect();
    holds("upgrades and a loss", data(&[1, 0, 0], cpus).losing(ANY), 0, ends);
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
