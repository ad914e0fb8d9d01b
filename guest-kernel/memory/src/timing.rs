//! Loops that do nothing but touch memory, timed.
//!
//! A *chase* reads a word of a cache line that says which line is next, in an order without a pattern: each read
//! waits for the last, and most need a translation of their own. A *stream* adds up all words in order, a *store*
//! writes them.

use std::hint::black_box;
use std::time::Instant;

use crate::region::{Region, Seen};

/// Words of a cache line.
const LINE: usize = 8;

/// Times each loop over `bytes`, `rounds` times, and prints a line a round.
pub fn run(bytes: usize, rounds: usize) -> Result<bool, String> {
    let mut region = Region::new(bytes, Seen::Here, None).map_err(|e| format!("{bytes} bytes of memory: {e}"))?;
    let words = region.words();
    link(words);
    for round in 0..=rounds {
        let lines = words.len() / LINE;
        let chase = nanoseconds(lines, || chase(words, lines));
        let stream = nanoseconds(words.len(), || words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word)));
        // What is there already, so that the links stay; the compiler can't know that.
        let store = nanoseconds(lines, || {
            for word in words.iter_mut().step_by(LINE) {
                *word = black_box(*word);
            }
            0
        });
        // The first round warms up.
        if round > 0 {
            println!("loop: {} MiB: chase {chase:.3} ns, stream {stream:.3} ns, store {store:.3} ns", bytes >> 20);
        }
    }
    Ok(true)
}

/// As process 1: runs, says how it ended, and switches off.
pub fn init() -> Result<bool, String> {
    let done = numbers().and_then(|(mib, rounds)| run(mib << 20, rounds));
    match &done {
        Ok(_) => println!("loop: done"),
        Err(error) => println!("loop: failed: {error}"),
    }
    // SAFETY: nothing of this process is needed any more.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    done
}

/// `memory=MIB,ROUNDS` of the kernel's command line, which process 1 gets as a variable.
fn numbers() -> Result<(usize, usize), String> {
    let value = std::env::var("memory").map_err(|_| "no memory=MIB,ROUNDS on the command line")?;
    let pair = value.split_once(',').and_then(|(mib, rounds)| Some((mib.parse().ok()?, rounds.parse().ok()?)));
    pair.filter(|(mib, rounds)| *mib > 0 && *rounds > 0).ok_or(format!("memory={value}: not MIB,ROUNDS"))
}

/// Makes one ring of all lines, by Sattolo's shuffle: a permutation of one cycle.
fn link(words: &mut [u64]) {
    let lines = words.len() / LINE;
    for line in 0..lines {
        words[line * LINE] = line as u64;
    }
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for line in (1..lines).rev() {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        words.swap(line * LINE, (random % line as u64) as usize * LINE);
    }
}

/// Goes `steps` lines along the ring.
fn chase(words: &[u64], steps: usize) -> u64 {
    let mut line = 0;
    for _ in 0..steps {
        line = words[line as usize * LINE];
    }
    line
}

/// Time of one of `count` accesses.
fn nanoseconds(count: usize, body: impl FnOnce() -> u64) -> f64 {
    let begun = Instant::now();
    black_box(body());
    begun.elapsed().as_nanos() as f64 / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_has_all_lines() {
        let mut words = vec![0; 1000 * LINE];
        link(&mut words);
        assert_eq!(chase(&words, 1000), 0, "round once");
        let mut line = 0;
        for step in 1..1000 {
            line = words[line * LINE] as usize;
            assert_ne!(line, 0, "back too early, after {step}");
        }
    }
}
