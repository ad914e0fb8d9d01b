//! Pages asked for ahead of need.

use super::super::Bug;
use super::scenarios::{FLAG, NEW, PATH, ROOT, TABLE, X, Y, data, holds, is_caught, require, results, warmed};
use super::world::{Cpu, Op, World};

use Op::*;

#[test]
fn pages_asked_for_ahead_are_as_coherent() {
    for homes in [&[0, 2][..], &[2, 0], &[1, 1]] {
        let world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Ahead(X, 0b11), Load(Y, 0), Store(Y, 1, 1)]),
                Cpu::new(1, &[Store(Y, 0, 1), Ahead(X, 0b11), Load(X, 0), Store(X, 1, 1)]),
            ],
        );
        holds("asked ahead", world, 1, |w| {
            require(results(w) != [[0], [0]], || "both loads missed both stores".into())?;
            require(w.value(X, 0) == 1 && w.value(X, 1) == 1 && w.value(Y, 0) == 1 && w.value(Y, 1) == 1, || "a store is lost".into())
        });
    }
}

#[test]
fn pages_asked_for_ahead_pass_messages_in_order() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0], &[0, 0, 2]] {
        let world = data(
            homes,
            vec![
                Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]),
                Cpu::new(1, &[Ahead(X, 0b11), Wait(Y, 0, 1), Load(X, 0)]),
                Cpu::new(2, &[Ahead(X, 0b11), Load(Y, 0)]),
            ],
        );
        holds("asked ahead, message passing", world, 0, |w| require(w.cpus[1].results[0] == 1, || "flag seen, data not".into()));
    }
}

/// The same with pages that become the asker's.
#[test]
fn pages_asked_for_ahead_to_write_are_as_coherent() {
    for homes in [&[0, 2][..], &[2, 0], &[1, 1], &[2, 0, 0]] {
        for first in [Store(Y, 1, 1), Load(X, 1)] {
            let world = data(
                homes,
                vec![
                    Cpu::new(0, &[Store(X, 0, 1), AheadToWrite(X, 0b11), Load(Y, 0), Store(Y, 1, 1)]),
                    Cpu::new(1, &[first, AheadToWrite(X, 0b11), Store(Y, 0, 1), Load(X, 0)]),
                ],
            );
            holds("asked ahead to write", world, 1, |w| {
                let last = w.cpus[1].results.last();
                require(w.cpus[0].results != [0] || last != Some(&0), || "both loads missed both stores".into())?;
                require((w.value(X, 0), w.value(Y, 0), w.value(Y, 1)) == (1, 1, 1), || "a store is lost".into())
            });
        }
    }
}

/// Home writes, two others expect to, and do so or read.
#[test]
fn pages_asked_for_ahead_to_write_lose_no_increment() {
    for (second, third) in [(AheadToWrite(X, 0b11), AheadToWrite(X, 0b11)), (AheadToWrite(X, 0b11), Ahead(X, 0b11))] {
        let world = data(
            &[2, 0, 0],
            vec![
                Cpu::new(0, &[Increment(X, 0), Increment(Y, 0)]),
                Cpu::new(1, &[second, Increment(X, 0), Evict(Y)]),
                Cpu::new(2, &[third, Increment(Y, 0)]),
            ],
        );
        holds("asked ahead to write, increments", world, 0, |w| {
            require((w.value(X, 0), w.value(Y, 0)) == (2, 2), || format!("{} and {} of 2 each", w.value(X, 0), w.value(Y, 0)))
        });
    }
}

#[test]
fn pages_asked_for_ahead_to_write_pass_messages_in_order() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0], &[0, 0, 2]] {
        let world = data(
            homes,
            vec![
                Cpu::new(0, &[AheadToWrite(X, 0b11), Store(X, 0, 1), Store(Y, 0, 1)]),
                Cpu::new(1, &[AheadToWrite(X, 0b01), Wait(Y, 0, 1), Load(X, 0)]),
                Cpu::new(2, &[AheadToWrite(X, 0b11), Load(Y, 0)]),
            ],
        );
        holds("asked ahead to write, message passing", world, 0, |w| {
            require(w.cpus[1].results[0] == 1, || "flag seen, data not".into())
        });
    }
}

/// Some of a block is asked for by the page, to write, and all of it whole.
#[test]
fn pages_and_blocks_asked_for_to_write_are_as_coherent() {
    for homes in [&[2, 0][..], &[0, 2], &[2, 0, 0]] {
        let mut cpus = vec![
            Cpu::new(0, &[Increment(X, 0), Increment(Y, 0)]),
            Cpu::new(1, &[AheadToWrite(X, 0b01), AheadBlock(X), Increment(Y, 0), Increment(X, 0)]),
        ];
        if homes.len() > 2 {
            cpus.push(Cpu::new(2, &[AheadBlock(X), Increment(Y, 0)]));
        }
        let mut world = data(homes, cpus);
        world.take_zeros_by(1, 2);
        let y = homes.len() as u64;
        holds("pages and blocks asked for to write", world, u8::from(homes.len() < 3).into(), move |w| {
            require((w.value(X, 0), w.value(Y, 0)) == (2, y), || "an increment is lost".into())
        });
    }
}

#[test]
fn what_is_given_up_on_its_way_to_a_writer_is_zero_again() {
    for homes in [&[2, 0][..], &[2, 0, 0]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Free(X), AwaitInterrupt, Load(X, 0)]),
            Cpu::new(1, &[AheadToWrite(X, 0b11), Load(Y, 0)]),
        ];
        holds("given up on its way to a writer", World::new(homes, &[], 0..0, cpus), 1, |_| Ok(()));
    }
}

#[test]
fn a_page_given_to_write_while_another_reads_it_is_caught() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1)]),
        Cpu::new(1, &[AheadToWrite(X, 0b1), Store(X, 0, 2)]),
        Cpu::new(2, &[Load(X, 0), Load(X, 0)]),
    ];
    is_caught("given despite its readers", data(&[2, 0, 0], cpus), Bug::GivenDespiteReaders, 0, |_| Ok(()));
}

#[test]
fn a_table_change_is_in_place_before_the_page_given_to_write_that_tells_of_it() {
    for homes in [&[6, 0][..], &[0, 6], &[6, 0, 0]] {
        let signal: &[Op] = &[Store(TABLE, 1, NEW), Store(FLAG, 0, 1)];
        let wait: &[Op] = &[AheadToWrite(FLAG, 1), Wait(FLAG, 0, 1), Walk(ROOT, PATH)];
        let programs = [signal, wait, &[]];
        let world = warmed(homes, &programs[..homes.len()]);
        holds("table change, then page given to write", world, 2, |w| {
            let last = w.cpus[1].results.last().copied();
            require(last == Some(NEW), || format!("the walk after the signal found {last:x?}"))
        });
    }
}

#[test]
fn pages_asked_for_ahead_to_write_survive_the_loss_of_any_node() {
    for homes in [&[2, 0, 0][..], &[0, 2, 0], &[0, 0, 2]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Load(Y, 0)]),
            Cpu::new(1, &[AheadToWrite(X, 0b11), Load(X, 0), Store(Y, 1, 1)]),
            Cpu::new(2, &[AheadToWrite(X, 0b11), Store(Y, 0, 1)]),
        ];
        holds("asked ahead to write, and a loss", data(homes, cpus).losing(&[0, 1, 2]), 0, |_| Ok(()));
    }
}

/// What home asks of one owner together goes and comes together, in the midst of all else.
#[test]
fn runs_of_pages_are_as_coherent() {
    for (homes, others) in [(&[2, 0][..], false), (&[2, 0, 0], false), (&[2, 0, 0], true)] {
        let home: &[Op] = if others { &[Prefetch(X, Y + 1, true), Increment(Y, 0)] } else { &[AheadToWrite(X, 0b11), Increment(X, 0), Load(Y, 0)] };
        let mut cpus = vec![Cpu::new(0, home), Cpu::new(1, &[Increment(X, 0), Increment(Y, 0), EvictRun(X, Y + 1), Increment(X, 0)])];
        if homes.len() > 2 {
            cpus.push(Cpu::new(2, if others { &[Load(X, 0), Increment(Y, 0)] } else { &[Increment(Y, 0)] }));
        }
        let (x, y) = (2 + u64::from(!others), 1 + u64::from(others) + u64::from(homes.len() > 2));
        holds("runs of pages", data(homes, cpus), u8::from(homes.len() < 3).into(), move |w| {
            require((w.value(X, 0), w.value(Y, 0)) == (x, y), || format!("{} and {} of {x} and {y}", w.value(X, 0), w.value(Y, 0)))
        });
    }
}

/// Copies that are read go by the run while others write, give up or ask for the pages.
#[test]
fn runs_of_copies_that_go_are_as_coherent() {
    for (homes, other) in [
        (&[2, 0][..], &[Increment(X, 0), Increment(Y, 0)][..]),
        (&[2, 0], &[Prefetch(X, Y + 1, true), Increment(X, 0), Increment(Y, 0)]),
        (&[2, 0, 0], &[Increment(X, 0), Increment(Y, 0)]),
    ] {
        let mut cpus = vec![Cpu::new(0, other), Cpu::new(1, &[Ahead(X, 0b11), Load(Y, 0), EvictRun(X, Y + 1), Load(X, 0), Increment(Y, 0)])];
        if homes.len() > 2 {
            cpus.push(Cpu::new(2, &[Load(X, 0), Increment(X, 0)]));
        }
        let x = homes.len() as u64 - 1;
        holds("runs of copies", data(homes, cpus), u8::from(homes.len() < 3).into(), move |w| {
            require((w.value(X, 0), w.value(Y, 0)) == (x, 2), || format!("{} and {} of {x} and 2", w.value(X, 0), w.value(Y, 0)))
        });
    }
}

#[test]
fn runs_of_copies_that_go_survive_the_loss_of_any_node() {
    for third in [&[Store(X, 0, 3)][..], &[EvictRun(X, Y + 1)], &[Prefetch(X, Y + 1, true)]] {
        let cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Prefetch(X, Y + 1, true)]),
            Cpu::new(1, &[Ahead(X, 0b11), Load(Y, 0), EvictRun(X, Y + 1), Load(X, 0)]),
            Cpu::new(2, third),
        ];
        holds("runs of copies, and a loss", data(&[2, 0, 0], cpus).losing(&[0, 1, 2]), 0, |_| Ok(()));
    }
}

/// The pages may be on their way with their block.
#[test]
fn runs_of_pages_of_a_block_on_its_way_are_as_coherent() {
    for homes in [&[2, 0][..], &[2, 0, 0]] {
        let mut cpus = vec![
            Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1), Prefetch(X, Y + 1, true), Increment(X, 0)]),
            Cpu::new(1, &[AheadBlock(X), Increment(Y, 0), EvictRun(X, Y + 1)]),
        ];
        if homes.len() > 2 {
            cpus.push(Cpu::new(2, &[Load(X, 0)]));
        }
        let mut world = data(homes, cpus);
        world.take_zeros_by(1, 2);
        holds("runs of pages of a block", world, u8::from(homes.len() < 3).into(), |w| require(w.value(X, 0) == 2, || "a store is lost".into()));
    }
}

#[test]
fn runs_of_pages_survive_the_loss_of_any_node() {
    for third in [Load(X, 0), Store(Y, 0, 3)] {
        let cpus = vec![
            Cpu::new(0, &[Prefetch(X, Y + 1, true), Load(X, 0)]),
            Cpu::new(1, &[Store(X, 0, 1), Store(Y, 0, 1), EvictRun(X, Y + 1), Load(Y, 0)]),
            Cpu::new(2, &[third]),
        ];
        holds("runs of pages, and a loss", data(&[2, 0, 0], cpus).losing(&[0, 1, 2]), 0, |_| Ok(()));
    }
}

/// What each of them reads and the other writes, asked for before either comes to it.
#[test]
fn pages_that_are_expected_are_as_coherent() {
    for homes in [&[0, 2][..], &[2, 0], &[1, 1]] {
        let program = [Expect(&[X, Y]), Load(X, 0), Expect(&[Y]), Increment(Y, 0), Increment(X, 0)];
        let world = data(homes, vec![Cpu::new(0, &program), Cpu::new(1, &program)]);
        holds("expected", world, 1, |w| require(w.value(X, 0) == 2 && w.value(Y, 0) == 2, || "a store is lost".into()));
    }
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Store(Y, 0, 1)]),
        Cpu::new(1, &[Expect(&[X, Y]), Wait(Y, 0, 1), Load(X, 0)]),
        Cpu::new(2, &[Expect(&[Y, X]), Load(Y, 0), Store(X, 1, 1)]),
    ];
    holds("expected, message passing", data(&[2, 0, 0], cpus), 0, |w| require(w.cpus[1].results[0] == 1, || "flag seen, data not".into()));
}

#[test]
fn pages_that_are_expected_survive_the_loss_of_any_node() {
    let cpus = vec![
        Cpu::new(0, &[Store(X, 0, 1), Expect(&[Y])]),
        Cpu::new(1, &[Expect(&[X, Y]), Load(Y, 0)]),
        Cpu::new(2, &[Load(X, 0), Store(Y, 0, 3)]),
    ];
    holds("expected, and a loss", data(&[2, 0, 0], cpus).losing(&[0, 1, 2]), 0, |_| Ok(()));
}
