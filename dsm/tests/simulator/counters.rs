//! What a fault costs, counted.

use krg_dsm::protocol::Input;

use super::run;
use super::world::{Plan, World};

fn quiet(nodes: usize, pages: u32) -> Plan {
    Plan { nodes, pages, cpus: 1, operations: 0, stores: 0, losses: 0, zero_group: 1, zero_block: 1, bug: None, seed: 1, told: false }
}

/// Messages per fault and bytes of the directory a page stay what they are, however many nodes there are.
#[test]
fn cost_does_not_grow_with_the_machine() {
    println!("nodes    faults  messages/fault  bytes/fault  longest chain  directory bytes/page");
    let mut costs = Vec::new();
    for nodes in [2, 8, 64, 256, 1000] {
        // As many operations in every machine: a few nodes run longer.
        let plan = Plan { operations: (100_000 / nodes as u32).clamp(100, 20_000), stores: 25, ..quiet(nodes, 8) };
        let figures = run(plan).expect("the run holds");
        let messages = figures.messages as f64 / figures.faults as f64;
        let bytes = figures.bytes as f64 / figures.faults as f64;
        let directory = figures.directory_bytes as f64 / (nodes * 8) as f64;
        println!(
            "{nodes:5} {:9} {messages:15.2} {bytes:12.1} {:14} {directory:21.2}",
            figures.faults, figures.chain
        );
        assert!(figures.chain <= 3);
        costs.push((nodes, messages, directory));
    }
    let (_, messages, directory) = costs[1];
    for &(nodes, m, d) in &costs {
        assert!(m < 1.5 * messages, "{nodes} nodes: {m} messages a fault, {messages} with 8");
        assert!(d < 1.5 * directory, "{nodes} nodes: {d} bytes a page, {directory} with 8");
    }
}

/// The fault of `node`, and all that follows.
fn fault(world: &mut World, node: usize, page: u32, write: bool) {
    world.step(node, Input::Fault { page, write });
    world.settle();
}

#[test]
fn invalidating_any_number_of_sharers_takes_one_round() {
    for sharers in [1, 2, 8, 62, 500] {
        // Home, the sharers, and one that writes: with a copy, without one, and home itself.
        for writer in [1, sharers + 1, 0] {
            let mut world = World::new(quiet(sharers + 3, 1));
            fault(&mut world, sharers + 2, 0, true);
            (1..=sharers).for_each(|node| fault(&mut world, node, 0, false));
            let before = world.figures.messages;
            world.figures.chain = 0;
            fault(&mut world, writer, 0, true);
            // All at once: of a sharer that writes, the other sharers and the owner; else the owner sends its copy.
            assert_eq!(world.figures.burst, sharers, "{sharers} sharers, node {writer} writes");
            assert!(world.figures.chain <= 3, "{sharers} sharers: {} messages deep", world.figures.chain);
            // An invalidation and an acknowledgement each, beside Get, Fetch, Data or Grant, and Done.
            assert!(world.figures.messages - before <= 2 * sharers as u64 + 4);
        }
    }
}

#[test]
fn a_page_nobody_wrote_costs_no_page_data() {
    let nodes = 20;
    let mut world = World::new(quiet(nodes, 1));
    // Each node writes another's page first.
    (0..nodes).for_each(|node| fault(&mut world, node, (node as u32 + 1) % nodes as u32, true));
    assert_eq!(world.figures.data, 0);
    assert_eq!(world.figures.messages, 2 * nodes as u64, "a request and a grant each");
    // All read one page that nobody ever writes.
    let mut world = World::new(quiet(nodes, 1));
    (0..nodes).for_each(|node| fault(&mut world, node, 7, false));
    assert!(world.figures.data > 0, "copies are sent");
    assert!(world.figures.longest <= 12, "a copy of zeros has {} bytes", world.figures.longest);
}
