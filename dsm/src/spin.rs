//! Looking again and again instead of sleeping, where it pays and costs nobody anything.
//!
//! A thread that sleeps is woken by an interrupt to its CPU, which may have to leave a sleep state, or
//! in a virtual machine to be scheduled by the host first: often more time than all else in a fault. So
//! a thread whose last waits were short looks for a moment before it sleeps. It does so only if a CPU
//! would be idle otherwise: those that are runnable, itself included, are no more than there are CPUs. On
//! a host with one CPU it never does. (Threads that wait for faults do not look: what their vCPU waits for
//! needs the CPU it has left.)

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Longest time of looking.
const LONGEST: Duration = Duration::from_micros(300);
/// Below this it is not worth it.
const SHORTEST: Duration = Duration::from_micros(15);
/// Whether a CPU is idle otherwise is asked for again after so long.
const CHECK: Duration = Duration::from_micros(30);
/// Of each period, a thread looks for so long at most. Kernels stop real-time threads for a while that use
/// 95 % of a CPU for a second (sched_rt_runtime_us).
const PERIOD: Duration = Duration::from_millis(100);
const LOOKING: Duration = Duration::from_millis(75);

/// How long a thread looks before it sleeps.
#[derive(Debug)]
pub(crate) struct Spin {
    window: Duration,
    cpus: usize,
    /// `/proc/loadavg`, which counts what is runnable.
    load: Option<File>,
    slept: Option<Instant>,
    period: Instant,
    /// Spent on looking in this period.
    spent: Duration,
}

impl Spin {
    /// For the calling host. It looks for the first time after the first short sleep.
    pub fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let load = if cpus > 1 { File::open("/proc/loadavg").ok() } else { None };
        Spin { window: Duration::ZERO, cpus, load, slept: None, period: Instant::now(), spent: Duration::ZERO }
    }

    /// What `look` finds, if it finds something while looking pays. `None`: it is time to sleep.
    pub fn look<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let begun = Instant::now();
        if begun - self.period >= PERIOD {
            (self.period, self.spent) = (begun, Duration::ZERO);
        }
        let mut found = None;
        if self.window >= SHORTEST && self.spent < LOOKING && self.has_idle_cpu() {
            let mut checked = begun;
            while found.is_none() {
                found = look();
                let now = Instant::now();
                if now - checked >= CHECK {
                    checked = now;
                    if now - begun >= self.window || !self.has_idle_cpu() {
                        break;
                    }
                }
                // Another thread of the same priority may have been put behind this one.
                std::thread::yield_now();
            }
            self.spent += begun.elapsed();
        }
        if found.is_none() {
            self.slept = Some(Instant::now());
        }
        found
    }

    /// The sleep after [`Spin::look`] is over: was it shorter than looking would have been?
    pub fn woken(&mut self) {
        if let Some(slept) = self.slept.take() {
            self.adapt(slept.elapsed());
        }
    }

    fn adapt(&mut self, slept: Duration) {
        // Grows at once: one long wait a fault is worse than some looking in vain.
        self.window = if slept < LONGEST { LONGEST } else { self.window / 2 };
    }

    fn has_idle_cpu(&self) -> bool {
        let mut text = [0; 64];
        let len = self.load.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        runnable(&text[..len]).is_some_and(|runnable| runnable <= self.cpus)
    }
}

/// The number of runnable threads in the text of `/proc/loadavg`: "0.10 0.20 0.30 2/345 6789".
fn runnable(text: &[u8]) -> Option<usize> {
    let word = text.split(|byte| *byte == b' ').nth(3)?;
    let number = word.split(|byte| *byte == b'/').next()?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_number_of_runnable_threads() {
        assert_eq!(runnable(b"0.10 0.20 0.30 2/345 6789\n"), Some(2));
        assert_eq!(runnable(b"10.10 0.20 0.30 112/345 6789\n"), Some(112));
        assert_eq!((runnable(b""), runnable(b"1 2 3 x/4")), (None, None));
        assert!(runnable(&std::fs::read("/proc/loadavg").unwrap()).is_some_and(|n| n > 0));
    }

    #[test]
    fn looks_after_short_sleeps_only() {
        let mut spin = Spin::new();
        let mut looks = 0;
        assert_eq!(spin.look(|| { looks += 1; Some(()) }), None);
        assert_eq!(looks, 0, "before anything was seen of its waits");
        spin.adapt(Duration::from_micros(50));
        assert_eq!(spin.window, LONGEST);
        for _ in 0..5 {
            spin.adapt(Duration::from_millis(5));
        }
        assert!(spin.window < SHORTEST);
    }

    #[test]
    fn never_looks_on_one_cpu_or_with_none_idle() {
        for cpus in [0, 1] {
            let mut spin = Spin { window: LONGEST, cpus, load: None, ..Spin::new() };
            assert_eq!(spin.look(|| Some(())), None);
        }
        // This thread itself is runnable.
        let mut spin = Spin { window: LONGEST, cpus: 0, load: File::open("/proc/loadavg").ok(), ..Spin::new() };
        assert_eq!(spin.look(|| Some(())), None);
        let mut spin = Spin { cpus: 1 << 20, ..spin };
        assert_eq!(spin.look(|| Some(7)), Some(7));
        assert_eq!(spin.look(|| None::<()>), None);
        spin.spent = LOOKING;
        assert_eq!(spin.look(|| Some(7)), None, "enough for now");
    }
}
