//! The crate's error.

use std::io;

/// Why a device could not be made, saved or restored. What a guest does wrong is never an error
/// of this kind: it ends in the device's NEEDS_RESET state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every device number of bus 0 is taken.
    #[error("PCI bus 0: no free device number; attach at most 31 devices")]
    BusFull,
    /// The 32-bit window has no room for a BAR.
    #[error("PCI window: no room for a BAR of {size:#x} bytes; attach fewer devices")]
    WindowFull {
        /// Size of the BAR in bytes.
        size: u64,
    },
    /// A host resource (thread, event descriptor) was refused.
    #[error("{device}: cannot start: {source}")]
    Start {
        /// The device's name.
        device: String,
        /// What the host said.
        source: io::Error,
    },
    /// The tap interface could not be opened.
    #[error("tap interface {name}: {step}: {source}; create it with `ip tuntap add {name} mode tap`")]
    Tap {
        /// Interface name.
        name: String,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Not a name a network interface can have.
    #[error("tap interface {0:?}: not an interface name; use 1 to 15 characters without '/' or blanks")]
    TapName(String),
    /// Saved state does not fit the devices it is restored to.
    #[error("saved state of {object}: {reason}; restore it to the machine it was saved from")]
    BadState {
        /// Whose state.
        object: String,
        /// What does not fit.
        reason: String,
    },
    /// State was asked for while the device works.
    #[error("{0}: state can be saved only while the device is paused; pause it first")]
    NotPaused(String),
    /// The device's threads have ended.
    #[error("{0}: the device has stopped; it cannot be paused or resumed any more")]
    Stopped(String),
}

impl Error {
    pub(crate) fn bad_state(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::BadState {
            object: object.into(),
            reason: reason.into(),
        }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
