//! The clock all vCPUs share: this host's TSC, and how far it is from node 0's.

use std::time::{Duration, Instant};

use krg_dsm::clock::{ClockError, Offset, Sample, estimate};

/// Round trips measured: the shortest decide.
const ROUNDS: usize = 64;
/// Longest time spent on them.
const LIMIT: Duration = Duration::from_millis(500);

/// This CPU's time-stamp counter.
pub(super) fn read() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU, and no one forbids it to user space here (PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Node 0's TSC minus ours, by asking it again and again.
pub(super) fn measure(mut ask: impl FnMut() -> Option<u64>) -> Result<Offset, ClockError> {
    let start = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < ROUNDS && (start.elapsed() < LIMIT || samples.len() < 3) {
        let sent = read();
        let Some(remote) = ask() else { break };
        samples.push(Sample { sent, remote, received: read() });
    }
    estimate(&samples)
}
