//! Exhaustive search over every order of messages, guest operations, and guest operations in the
//! middle of an engine's step, on the very code that ships.

mod ahead;
mod back;
mod losses;
mod rests;
mod scenarios;
mod world;

use std::collections::HashSet;

use world::{Action, Intrusion, World};

/// One state in so many is written down and read back: it takes longer than all else together.
const WRITTEN_DOWN: usize = 257;

/// What a search found.
#[derive(Debug)]
pub struct Report {
    /// Distinct states seen.
    pub states: usize,
    /// Distinct ends.
    pub ends: usize,
    /// The first thing wrong, with the actions that led there.
    pub failure: Option<String>,
}

/// How a state was reached: its parent's number, the action, what ran in the middle of it.
type Step = (usize, Action, Option<Intrusion>);

/// Visits every reachable state, at most `limit`; `end` judges the states where everything is over.
/// `intrusions`: longest run of guest operations put in the middle of an engine step.
pub fn explore(start: World, limit: usize, intrusions: usize, end: &dyn Fn(&World) -> Result<(), String>) -> Report {
    let mut seen = HashSet::from([start.print()]);
    let mut steps: Vec<Option<Step>> = vec![None];
    let mut ends = 0;
    let mut stack = vec![(start.clone(), 0)];
    while let Some((world, number)) = stack.pop() {
        let mut verdict = world.check();
        if number % WRITTEN_DOWN == 0 {
            verdict = verdict.and_then(|()| world.check_saved());
        }
        let actions = world.actions();
        if actions.is_empty() {
            ends += 1;
            verdict = verdict.and_then(|()| world.check_end()).and_then(|()| end(&world));
        }
        if seen.len() > limit {
            verdict = Err(format!("more than {limit} states: the scenario is too large to be exhausted"));
        }
        if let Err(what) = verdict {
            let failure = Some(format!("{what}\n{}", story(start, &steps, number)));
            return Report { states: seen.len(), ends, failure };
        }
        for action in actions {
            let mut visit = |next: World, intrusion: Option<Intrusion>| {
                if seen.insert(next.print()) {
                    steps.push(Some((number, action, intrusion)));
                    stack.push((next, steps.len() - 1));
                }
            };
            let mut plain = world.clone();
            let operations = plain.act(action, None);
            visit(plain, None);
            let node = world.node_of(action);
            for before in 0..operations {
                for cpu in (0..world.cpus.len()).filter(|&c| world.cpus[c].node == node) {
                    for operations in 1..=intrusions {
                        let intrusion = Some(Intrusion { before, cpu, operations });
                        let mut next = world.clone();
                        next.act(action, intrusion);
                        visit(next, intrusion);
                    }
                }
            }
        }
    }
    Report { states: seen.len(), ends, failure: None }
}

/// The way to state `number`, told action by action.
fn story(start: World, steps: &[Option<Step>], mut number: usize) -> String {
    let mut path = Vec::new();
    while let Some((parent, action, intrusion)) = steps[number] {
        path.push((action, intrusion));
        number = parent;
    }
    let mut world = start;
    let mut lines = Vec::new();
    for (action, intrusion) in path.into_iter().rev() {
        lines.push(match action {
            Action::Deliver(f, t) => format!("  {f} to {t}: {:?} {intrusion:?}", world.channels[f][t].front()),
            Action::DeliverBlock(f, t) => format!("  {f} to {t}, the block: {:?} {intrusion:?}", world.blocks[f][t].front()),
            Action::Lose(node) => format!("  node {node} is lost"),
            Action::Learn(node) => format!("  node {node} learns of it {intrusion:?}"),
            Action::Cpu(c) => format!("  CPU {c}: {:?} {intrusion:?}", world.cpus[c].program[world.cpus[c].at]),
        });
        world.act(action, intrusion);
    }
    lines.join("\n")
}
