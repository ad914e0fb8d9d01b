//! Threads that others wait for, on this host or another, run before those that compute.

/// Makes the calling thread real-time at the lowest priority: a fault is answered at once even if a
/// vCPU would use its CPU to the end of its time slice. Without the right to do so it stays as it is.
pub(crate) fn raise() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure is initialised and outlives the call; 0 names the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameters) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no real-time priority: faults may wait for time slices");
    }
}
