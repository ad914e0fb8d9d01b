//! When the parts of a vCPU's last move were over: what a move takes, told apart. And, for tests, a node that is
//! lost right after one of them.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Names a part of a move, in lower case: this process is killed when the first vCPU has it behind it.
pub const KILL_AT: &str = "KRG_KILL_AT";

/// A part of a move that is over; those of the source first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Asked,
    Stopped,
    Saved,
    Sent,
    Came,
    Woken,
    Alone,
    Restored,
    Entered,
}

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
pub struct MoveTimes {
    /// The vCPU's thread was asked to leave KVM_RUN.
    pub asked: Option<Instant>,
    /// It had left.
    pub stopped: Option<Instant>,
    /// Its state was saved and packed, and the proxy stood in its place.
    pub saved: Option<Instant>,
    /// The state was given to the transport.
    pub sent: Option<Instant>,
    /// The state had come, with all that this node had sent the vCPU before.
    pub came: Option<Instant>,
    /// The proxy's thread had it.
    pub woken: Option<Instant>,
    /// No vCPU of this node was in KVM_RUN.
    pub alone: Option<Instant>,
    /// The state was restored.
    pub restored: Option<Instant>,
    /// KVM_RUN was called.
    pub entered: Option<Instant>,
}

/// Where a vCPU's times are noted.
#[derive(Debug, Default)]
pub(crate) struct Stopwatch(Mutex<MoveTimes>);

impl Stopwatch {
    /// `part` is over now.
    pub fn over(&self, part: Part) {
        let now = Some(Instant::now());
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if part == Part::Entered && times.restored.is_none() {
            // It did not come from elsewhere.
            return;
        }
        kill_after(part);
        match part {
            Part::Asked => times.asked = now,
            Part::Stopped => times.stopped = now,
            Part::Saved => times.saved = now,
            Part::Sent => times.sent = now,
            Part::Came => times.came = now,
            Part::Woken => times.woken = now,
            Part::Alone => times.alone = now,
            Part::Restored => times.restored = now,
            Part::Entered => times.entered = now,
        }
    }

    pub fn read(&self) -> MoveTimes {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
