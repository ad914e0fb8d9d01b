//! When the parts of a vCPU's last move were over: what a move takes, told apart. And, for tests, a node that is
//! lost right after one of them.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Names a part of a move, in lower case: this process is killed when the first vCPU has it behind it.
pub const KILL_AT: &str = "KRG_KILL_AT";

/// A part of a move that is over: those of the source, then those of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The vCPU's thread was asked to leave KVM_RUN.
    Asked,
    /// It had left.
    Stopped,
    /// Its state was saved and packed.
    Saved,
    /// The state was given to the transport.
    Sent,
    /// The state had come, with all that this node had sent the vCPU before.
    Came,
    /// The proxy's thread had it.
    Woken,
    /// No vCPU of this node was in KVM_RUN.
    Alone,
    /// The state was restored.
    Restored,
    /// KVM_RUN was called.
    Entered,
}

/// Number of [`Part`]s.
const PARTS: usize = Part::Entered as usize + 1;

/// Ends this process as a power failure would, if it is to end after `part`.
fn kill_after(part: Part) {
    static KILL: OnceLock<Option<String>> = OnceLock::new();
    let kill = KILL.get_or_init(|| std::env::var(KILL_AT).ok());
    if kill.as_ref().is_some_and(|name| name.eq_ignore_ascii_case(&format!("{part:?}"))) {
        tracing::error!("{KILL_AT}: killed after {part:?}");
        // SAFETY: kill takes numbers only; the process has no say in it.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
}

/// Times of one vCPU's last move away from a node, and of its last one to it, as that node saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MoveTimes([Option<Instant>; PARTS]);

impl MoveTimes {
    /// When `part` was over; `None`: there was no such move.
    pub fn at(&self, part: Part) -> Option<Instant> {
        self.0[part as usize]
    }
}

/// Where a vCPU's times are noted.
#[derive(Debug, Default)]
pub(crate) struct Stopwatch(Mutex<MoveTimes>);

impl Stopwatch {
    /// `part` is over now.
    pub fn over(&self, part: Part) {
        let now = Instant::now();
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if part == Part::Entered && times.at(Part::Restored).is_none() {
            // It did not come from elsewhere.
            return;
        }
        kill_after(part);
        times.0[part as usize] = Some(now);
    }

    pub fn read(&self) -> MoveTimes {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
