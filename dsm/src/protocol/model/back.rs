//! Whole blocks that their home takes back. Where node 0 is not the home, it owns all pages at first.

use super::super::{Bug, PageData};
use super::losses::{ANY, ends};
use super::scenarios::{FLAG, NEW, PATH, ROOT, TABLE, X, Y, holds, is_caught, require, warmed};
use super::world::{Cpu, Op, W, World};

use Op::*;

/// Pages in blocks of two; node 0 has all of them.
fn blocks(homes: &[u32], cpus: Vec<Cpu>) -> World {
    let zero: PageData<W> = [0; W];
    let loaded: Vec<_> = (0..homes.iter().sum()).map(|page| (page, zero)).collect();
    let mut world = World::new(homes, &loaded, 0..0, cpus);
    world.take_zeros_by(1, 2);
    world
}

/// The same, and no page is ever given up.
fn owned(homes: &[u32], cpus: Vec<Cpu>) -> World {
    blocks(homes, cpus).only_data()
}

#[test]
fn blocks_taken_back_are_as_coherent() {
    for first in [Load(X, 0), Load(Y, 1), Store(Y, 1, 1)] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0), AheadBlock(X), Store(X, 1, 1)]),
            Cpu::new(1, &[first, AheadBlock(X), Store(Y, 0, 1), Load(X, 0)]),
        ];
        holds("a block taken back", owned(&[0, 2], cpus), 1, |w| {
            let last = w.cpus[1].results.last();
            require(w.cpus[0].results != [0] || last != Some(&0), || "both loads missed both stores".into())?;
            require((w.value(X, 0), w.value(X, 1), w.value(Y, 0)) == (1, 1, 1), || "a store is lost".into())
        });
    }
}

/// A third node reads, writes, or asks for the block itself.
#[test]
fn blocks_taken_back_while_others_want_them_lose_no_increment() {
    for third in [&[Increment(X, 0)][..], &[Load(X, 0), Increment(X, 0)], &[AheadBlock(X), Increment(X, 0)], &[Ahead(X, 0b11), Increment(X, 0)]] {
        let cpus = vec![
            Cpu::new(0, &[Increment(X, 0), Increment(Y, 0)]),
            Cpu::new(1, &[AheadBlock(X), Increment(X, 0), Load(Y, 0)]),
            Cpu::new(2, third),
        ];
        holds("a block taken back, three nodes", owned(&[0, 2, 0], cpus), 0, |w| {
            require((w.value(X, 0), w.value(Y, 0)) == (3, 1), || format!("{} of 3 and {} of 1", w.value(X, 0), w.value(Y, 0)))
        });
    }
}

#[test]
fn blocks_taken_back_pass_messages_in_order() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1), AheadBlock(X)]),
        Cpu::new(1, &[AheadBlock(X), Wait(Y, 0, 1), Load(X, 0)]),
        Cpu::new(2, &[Load(Y, 0), Load(X, 0)]),
    ];
    holds("a block taken back, message passing", owned(&[0, 2, 0], cpus), 0, |w| {
        require(w.cpus[1].results[0] == 1, || "flag seen, data not".into())?;
        require(w.cpus[2].results != [1, 0], || "the third saw the flag and not the data".into())
    });
}

/// What its owner evicts or gives up meanwhile is on its way already.
#[test]
fn blocks_taken_back_may_be_evicted_fetched_and_freed_meanwhile() {
    for owner in [&[Store(X, 0, 1), EvictRun(X, Y + 1)][..], &[Store(X, 0, 1), EvictRun(X, Y + 1), AheadBlock(X)], &[Store(X, 0, 1), Free(Y), AwaitInterrupt]] {
        for home in [&[AheadBlock(X), Load(X, 0), Increment(X, 1)][..], &[Prefetch(X, Y + 1, false), AheadBlock(X), Increment(X, 1)]] {
            let world = blocks(&[0, 2, 0], vec![Cpu::new(0, owner), Cpu::new(1, home), Cpu::new(2, &[Load(X, 0)])]);
            holds("a block taken back and evicted", world, 0, |w| {
                require((w.value(X, 0), w.value(X, 1)) == (1, 1), || "a store is lost".into())
            });
        }
    }
}

/// Home has given it away, and it is still on its way.
#[test]
fn blocks_taken_back_before_they_have_come_are_as_coherent() {
    for losing in [false, true] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1), AheadBlock(X), Load(X, 0), Increment(Y, 1)]),
            Cpu::new(1, &[AheadBlock(X), Increment(Y, 1)]),
            Cpu::new(2, &[Load(X, 0)]),
        ];
        let world = owned(&[2, 0, 0], cpus);
        let world = if losing { world.losing(ANY) } else { world };
        holds("a block taken back before it has come", world, 0, |w| match losing {
            true => Ok(()),
            false => require(w.value(Y, 1) == 2, || "an increment is lost".into()),
        });
    }
}

#[test]
fn a_table_change_is_in_place_before_the_block_that_its_home_takes_back() {
    for homes in [&[0, 6][..], &[0, 6, 0]] {
        let signal: &[Op] = &[Store(TABLE, 1, NEW), Store(FLAG, 0, 1), Store(FLAG + 1, 0, 1)];
        let wait: &[Op] = &[AheadBlock(FLAG), Wait(FLAG, 0, 1), Walk(ROOT, PATH)];
        let programs = [signal, wait, &[]];
        let mut world = warmed(homes, &programs[..homes.len()]);
        world.take_zeros_by(1, 2);
        holds("table change, then block taken back", world, 1, |w| {
            let last = w.cpus[1].results.last().copied();
            require(last == Some(NEW), || format!("the walk after the signal found {last:x?}"))
        });
    }
}

#[test]
fn blocks_taken_back_survive_the_loss_of_any_node() {
    for third in [&[Store(Y, 0, 1)][..], &[AheadBlock(X), Load(X, 0)]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), AheadBlock(X), Load(Y, 0)]),
            Cpu::new(1, &[AheadBlock(X), Load(X, 0), Store(Y, 1, 1)]),
            Cpu::new(2, third),
        ];
        holds("a block taken back, and a loss", owned(&[0, 2, 0], cpus).losing(ANY), 0, ends);
    }
}

#[test]
fn a_block_taken_back_before_it_is_frozen_is_caught() {
    let cpus = vec![Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]), Cpu::new(1, &[AheadBlock(X), Load(Y, 0)])];
    is_caught("a block taken back before it is frozen", owned(&[0, 2], cpus), Bug::BlockBeforeFreeze, 1, |_| Ok(()));
}

#[test]
fn a_block_taken_back_while_another_reads_a_page_of_it_is_caught() {
    let cpus = vec![
        Cpu::new(0, &[Load(X, 0)]),
        Cpu::new(1, &[AheadBlock(X), Store(X, 0, 2)]),
        Cpu::new(2, &[Load(X, 0), Load(X, 0)]),
    ];
    is_caught("a block taken back despite its readers", owned(&[0, 2, 0], cpus), Bug::BlockDespiteReaders, 0, |_| Ok(()));
}
