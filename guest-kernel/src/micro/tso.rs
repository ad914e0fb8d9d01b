//! Which outcomes of a litmus test x86 allows: every interleaving of the x86-TSO machine (Sewell et
//! al., "x86-TSO: A Rigorous and Usable Programmer's Model for x86 Multiprocessors", 2010), in which
//! each vCPU has a first-in first-out store buffer.

use std::collections::HashSet;

use super::litmus::{Litmus, Op};

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    /// Next instruction of each thread.
    at: Vec<usize>,
    /// Variables in memory: whether the new value is there.
    memory: Vec<bool>,
    /// Stores not yet in memory, oldest first.
    buffers: Vec<Vec<usize>>,
    /// Loads so far that saw the new value.
    outcome: usize,
}

/// Outcomes (bit n: load n saw the new value) that x86-TSO allows.
pub fn allowed(litmus: &Litmus) -> HashSet<usize> {
    outcomes(litmus, true)
}

/// Outcomes that sequential consistency allows: without store buffers.
pub fn sequentially_consistent(litmus: &Litmus) -> HashSet<usize> {
    outcomes(litmus, false)
}

fn outcomes(litmus: &Litmus, buffered: bool) -> HashSet<usize> {
    let threads = litmus.threads;
    let loads_before: Vec<usize> = (0..threads.len())
        .map(|thread| {
            threads[..thread]
                .iter()
                .flat_map(|ops| ops.iter())
                .filter(is_load)
                .count()
        })
        .collect();
    let variables = threads.iter().flat_map(|ops| ops.iter()).map(|op| match op {
        Op::Store(variable) | Op::Load(variable) => variable + 1,
        Op::Fence => 0,
    });
    let start = State {
        at: vec![0; threads.len()],
        memory: vec![false; variables.max().unwrap_or(0)],
        buffers: vec![Vec::new(); threads.len()],
        outcome: 0,
    };
    let (mut seen, mut open, mut found) = (HashSet::new(), vec![start], HashSet::new());
    while let Some(state) = open.pop() {
        if !seen.insert(state.clone()) {
            continue;
        }
        if state.at.iter().zip(threads).all(|(&at, ops)| at == ops.len()) {
            found.insert(state.outcome);
            continue;
        }
        for (thread, ops) in threads.iter().enumerate() {
            // The oldest store may reach memory at any time.
            if !state.buffers[thread].is_empty() {
                let mut next = state.clone();
                let variable = next.buffers[thread].remove(0);
                next.memory[variable] = true;
                open.push(next);
            }
            let Some(op) = ops.get(state.at[thread]) else { continue };
            let mut next = state.clone();
            next.at[thread] += 1;
            match *op {
                Op::Store(variable) if buffered => next.buffers[thread].push(variable),
                Op::Store(variable) => next.memory[variable] = true,
                Op::Load(variable) => {
                    let load = loads_before[thread] + ops[..state.at[thread]].iter().filter(is_load).count();
                    // The thread's own stores are seen in its buffer.
                    let new = state.buffers[thread].contains(&variable) || state.memory[variable];
                    next.outcome |= usize::from(new) << load;
                }
                Op::Fence if !state.buffers[thread].is_empty() => continue,
                Op::Fence => {}
            }
            open.push(next);
        }
    }
    found
}

fn is_load(op: &&Op) -> bool {
    matches!(op, Op::Load(_))
}

#[cfg(test)]
mod tests {
    use super::super::litmus::{ALL, CORR, IRIW, LB, MP, SB, SB_FENCED};
    use super::*;

    /// Outcomes in which a test's loads saw what `text` says.
    fn outcome(text: &str) -> usize {
        text.bytes()
            .enumerate()
            .map(|(load, bit)| usize::from(bit - b'0') << load)
            .sum()
    }

    #[test]
    fn the_known_verdicts() {
        for (litmus, forbidden) in [(SB_FENCED, "00"), (MP, "10"), (LB, "11"), (CORR, "10"), (IRIW, "1010")] {
            let allowed = allowed(&litmus);
            assert_eq!(allowed.len(), (1 << litmus.loads()) - 1, "{}", litmus.name);
            assert!(!allowed.contains(&outcome(forbidden)), "{}", litmus.name);
        }
        assert_eq!(allowed(&SB).len(), 4);
    }

    #[test]
    fn only_store_buffering_tells_the_machines_apart() {
        for litmus in ALL {
            let same = allowed(&litmus) == sequentially_consistent(&litmus);
            assert_eq!(same, litmus.name != "SB", "{}", litmus.name);
        }
    }
}
