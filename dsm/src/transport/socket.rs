//! Socket options and waits beyond the standard library.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::errno::Errno;

/// Socket buffers in bytes, where we may set them: a few hundred pages on the way.
const BUFFER: i32 = 4 << 20;
/// TCP_RTO_MAX_MS (Linux 6.15), not in the libc crate yet.
const TCP_RTO_MAX_MS: i32 = 44;

/// Prepares a connected stream; the name of the option that failed with an error.
///
/// # Errors
/// Only options that coherence needs; the others are asked for and do without.
pub fn prepare(stream: &TcpStream, receive_timeout: Duration) -> Result<(), (&'static str, Errno)> {
    let needed = |name, result: std::io::Result<()>| result.map_err(|error| (name, Errno::of(&error)));
    needed("blocking mode", stream.set_nonblocking(false))?;
    // Every frame is urgent: a vCPU waits for it.
    needed("TCP_NODELAY", stream.set_nodelay(true))?;
    needed("SO_RCVTIMEO", stream.set_read_timeout(Some(receive_timeout)))?;
    let best_effort = [
        // The plain options would cap buffers below what the kernel's own tuning reaches.
        (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, BUFFER),
        (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER),
        // Early acknowledgements open the congestion window sooner.
        (libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1),
        // A link that comes back after 2 s must be found before the peer counts as lost, so
        // retransmission must not back off: for streams with little under way, and for all.
        (libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 1),
        (libc::IPPROTO_TCP, TCP_RTO_MAX_MS, 1000),
    ];
    for (level, option, value) in best_effort {
        if let Err(errno) = set(stream, level, option, value) {
            tracing::debug!(level, option, %errno, "socket option not available");
        }
    }
    Ok(())
}

/// What the stream has, without waiting; `None` if there is nothing.
pub fn receive_now(stream: &TcpStream, buffer: &mut [u8]) -> Option<io::Result<usize>> {
    // SAFETY: the pointer and the length describe the buffer, whose bytes may take any value.
    let got = unsafe { libc::recv(stream.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    if got >= 0 {
        return Some(Ok(got as usize));
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => None,
        error => Some(Err(error)),
    }
}

/// Has [`wait_readable`] wait until there are so many bytes: each time a reader is woken costs both sides. A refusal
/// means more wake-ups, nothing else. More than are going to come would be waited for in vain: so a blocking read would
/// be, which takes what there is and then waits for as much again.
pub fn wake_at(stream: &TcpStream, bytes: usize) {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    if let Err(errno) = set(stream, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes) {
        tracing::debug!(%errno, "SO_RCVLOWAT not available");
    }
}

/// Waits until the stream takes more bytes, breaks, or `timeout` has passed.
pub fn wait_writable(stream: &TcpStream, timeout: Duration) {
    wait(stream, libc::POLLOUT, timeout);
}

/// Waits until the stream has as many bytes as [`wake_at`] said, ends, or `timeout` has passed.
pub fn wait_readable(stream: &TcpStream, timeout: Duration) {
    wait(stream, libc::POLLIN, timeout);
}

fn wait(stream: &TcpStream, events: i16, timeout: Duration) {
    let mut entry = libc::pollfd {
        fd: stream.as_raw_fd(),
        events,
        revents: 0,
    };
    let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the pointer and the count describe one entry. However the wait ends, the caller
    // tries again.
    unsafe { libc::poll(&raw mut entry, 1, millis) };
}

fn set(stream: &TcpStream, level: i32, option: i32, value: i32) -> Result<(), Errno> {
    let size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the pointer and the size describe one integer, which all our options take.
    let result = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(Errno::last()) }
}
