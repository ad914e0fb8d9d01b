//! Memory tests for a Linux guest: does it keep all that is written to it, and how fast is it.
//!
//! `guest-memory fill KEEP FAR CPU CPU...` fills the free memory of those CPUs' NUMA nodes, but for KEEP MiB of
//! each, and checks all of it; FAR MiB a CPU are on the next CPU's node (`fill.rs`).
//!
//! `guest-memory loop MIB ROUNDS` times loops over MIB MiB, ROUNDS times each (`timing.rs`). `guest-memory init` does
//! that as process 1: it takes the numbers from the kernel's command line (`memory=MIB,ROUNDS`), and switches the
//! machine off in the end.
//!
//! The exit status is 0 if all was well, 1 if a word was wrong, 2 if something could not be done.

mod fill;
mod region;
mod timing;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let numbers: Option<Vec<usize>> = words.iter().skip(2).map(|word| word.parse().ok()).collect();
    let numbers = numbers.unwrap_or_default();
    let done = match (words.get(1).map(String::as_str), numbers.as_slice()) {
        (Some("fill"), &[keep, far, ref cpus @ ..]) if !cpus.is_empty() => fill::run(keep << 20, far << 20, cpus),
        (Some("loop"), &[mib, rounds]) if mib > 0 && rounds > 0 => timing::run(mib << 20, rounds),
        _ if std::process::id() == 1 => timing::init(),
        _ => Err("usage: guest-memory fill KEEP FAR CPU... | guest-memory loop MIB ROUNDS".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("guest-memory: {error}");
            ExitCode::from(2)
        }
    }
}
