//! Threads of the transports.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::errno::Errno;
use crate::transport::TransportError;

/// How long shutdown waits for queued bytes to leave, and then for the peers to end.
pub const FLUSH: Duration = Duration::from_millis(300);
/// See [`FLUSH`].
pub const LINGER: Duration = Duration::from_millis(200);

/// Starts one.
///
/// # Errors
/// The system gives none.
pub fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, TransportError> {
    thread::Builder::new()
        .name(name)
        .spawn(work)
        .map_err(|error| TransportError::Thread {
            errno: Errno::of(&error),
        })
}

/// Waits for its end.
pub fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a transport thread panicked");
    }
}
