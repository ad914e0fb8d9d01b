//! Clocks that may not go back: not on one CPU, and not from one CPU to another.

use std::arch::x86_64::{_mm_lfence, _rdtsc};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Readings on one CPU between two that are compared with all CPUs'.
const BURST: u64 = 256;
/// How long a thread sleeps between bursts.
const SLEEP: Duration = Duration::from_millis(20);

/// A word on a page of its own.
#[derive(Debug, Default)]
#[repr(align(4096))]
struct Latest(AtomicU64);

/// The latest readings of all CPUs.
#[derive(Debug, Default)]
pub struct Watched {
    tsc: Latest,
    monotonic: Latest,
}

/// What one CPU's thread saw.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    readings: u64,
    /// Readings compared with those of all CPUs.
    compared: u64,
    /// Sleeps that ended.
    timers: u64,
    /// Sleeps that ended before their time.
    early: u64,
    /// Longest sleep, in microseconds.
    longest: u64,
    /// Readings lower than an earlier one, and by how much at most (TSC ticks, nanoseconds).
    tsc_back: Back,
    monotonic_back: Back,
}

/// Steps back of one clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Back {
    times: u64,
    most: u64,
}

impl Back {
    /// Takes in a reading, and what had been read before it.
    fn see(&mut self, before: u64, now: u64) {
        if now < before {
            self.times += 1;
            self.most = self.most.max(before - now);
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} readings, {} of them compared with all CPUs', {} timers, the longest sleep {} us",
            self.readings, self.compared, self.timers, self.longest
        )
    }
}

impl Told {
    /// What may not be.
    pub fn wrong(&self) -> impl Iterator<Item = String> {
        let back = |name, back: Back, unit| (back.times > 0).then(|| format!("{name} went back {} times, by {} {unit} at most", back.times, back.most));
        [
            back("the TSC", self.tsc_back, "ticks"),
            back("CLOCK_MONOTONIC", self.monotonic_back, "ns"),
            (self.early > 0).then(|| format!("{} sleeps were too short", self.early)),
            (self.timers == 0).then(|| "no timer fired".into()),
        ]
        .into_iter()
        .flatten()
    }
}

/// The TSC, read after all loads before it.
fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has both instructions, and Linux lets programs read the TSC.
    unsafe {
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec of our own; the clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Watches the clocks on `cpu` until it is `over`.
pub fn watch(cpu: usize, watched: &Watched, over: &AtomicBool) -> Result<Told, String> {
    pin(cpu)?;
    let mut told = Told::default();
    let (mut last_tsc, mut last_monotonic) = (tsc(), monotonic());
    while !over.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let (t, m) = (tsc(), monotonic());
            told.tsc_back.see(last_tsc, t);
            told.monotonic_back.see(last_monotonic, m);
            (last_tsc, last_monotonic) = (t, m);
        }
        // What is in `watched` was read before it was written, and is read here before our clock is.
        let before = watched.tsc.0.load(Ordering::SeqCst);
        let t = tsc();
        told.tsc_back.see(before, t);
        watched.tsc.0.fetch_max(t, Ordering::SeqCst);
        let before = watched.monotonic.0.load(Ordering::SeqCst);
        let m = monotonic();
        told.monotonic_back.see(before, m);
        watched.monotonic.0.fetch_max(m, Ordering::SeqCst);
        told.readings += BURST + 1;
        told.compared += 1;
        let begun = monotonic();
        std::thread::sleep(SLEEP);
        let slept = monotonic().saturating_sub(begun);
        told.timers += 1;
        told.early += u64::from(u128::from(slept) < SLEEP.as_nanos());
        told.longest = told.longest.max(slept / 1000);
    }
    Ok(told)
}

fn pin(cpu: usize) -> Result<(), String> {
    // SAFETY: `set` is a plain bit mask of the size that is given, valid when zero; the number is checked.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if cpu < 8 * size_of_val(&set) {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    if result == 0 { Ok(()) } else { Err("there is no such CPU".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_back_between_cpus_is_seen() {
        let watched = Watched::default();
        watched.monotonic.0.store(monotonic() + 3_600_000_000_000, Ordering::SeqCst);
        let over = AtomicBool::new(false);
        let told = std::thread::scope(|scope| {
            let thread = scope.spawn(|| watch(0, &watched, &over));
            std::thread::sleep(Duration::from_millis(60));
            over.store(true, Ordering::SeqCst);
            thread.join().unwrap().unwrap()
        });
        let wrong: Vec<_> = told.wrong().collect();
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        assert!(wrong[0].starts_with("CLOCK_MONOTONIC went back"), "{wrong:?}");
        assert!(told.timers > 0 && told.compared == told.timers);
    }

    #[test]
    fn nothing_seen_is_wrong() {
        assert_eq!(Told::default().wrong().collect::<Vec<_>>(), ["no timer fired"]);
    }
}
