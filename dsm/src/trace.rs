//! When the parts of a fault happened, for benchmarks: off unless asked for, and cheap then.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A part of a fault that has just ended at this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stage {
    /// The fault thread has the event.
    Detected,
    /// The transport has a message about the page.
    Sent,
    /// A message about the page has arrived.
    Received,
    /// The page is in place, who waits for it is awake.
    Installed,
}

/// One entry of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    /// What happened.
    pub stage: Stage,
    /// Page index.
    pub page: u32,
    /// When, in ticks of this host's TSC.
    pub at: u64,
}

/// Marks in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    on: AtomicBool,
    marks: Mutex<Vec<Mark>>,
}

impl Trace {
    /// Starts anew, or stops.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
        self.lock().clear();
    }

    /// The time, if anybody wants to know.
    pub fn now(&self) -> Option<u64> {
        self.on.load(Ordering::Relaxed).then(ticks)
    }

    /// Notes that `stage` of `page` was over at `at`, which [`Trace::now`] gave.
    pub fn mark(&self, at: Option<u64>, stage: Stage, page: u32) {
        if let Some(at) = at {
            self.lock().push(Mark { stage, page, at });
        }
    }

    /// What was noted since the last time.
    pub fn take(&self) -> Vec<Mark> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Mark>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This host's TSC.
fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and user mode may use it unless the kernel
    // was told otherwise (PR_SET_TSC), which nobody here does.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_only_while_it_is_on() {
        let trace = Trace::default();
        assert_eq!(trace.now(), None);
        trace.mark(trace.now(), Stage::Sent, 1);
        trace.switch(true);
        let at = trace.now();
        trace.mark(at, Stage::Detected, 2);
        trace.mark(trace.now(), Stage::Sent, 2);
        let marks = trace.take();
        assert_eq!(
            marks.iter().map(|m| (m.stage, m.page)).collect::<Vec<_>>(),
            [(Stage::Detected, 2), (Stage::Sent, 2)]
        );
        assert!(Some(marks[0].at) == at && marks[1].at >= marks[0].at);
        assert_eq!(trace.take(), []);
        trace.switch(false);
        assert_eq!(trace.now(), None);
    }
}
