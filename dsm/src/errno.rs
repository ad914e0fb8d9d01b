//! Error numbers by their names, for one-line messages.

use std::fmt;

/// An operating system error number, shown by its name (`ENOMEM`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// The calling thread's last error number.
    pub fn last() -> Self {
        Self::of(&std::io::Error::last_os_error())
    }

    /// The number inside `error`; 0 if it did not come from the operating system.
    pub fn of(error: &std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nix::errno::Errno::from_raw(self.0) {
            nix::errno::Errno::UnknownErrno => write!(f, "errno {}", self.0),
            known => write!(f, "{known:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_known_numbers_and_prints_the_others() {
        assert_eq!(Errno(libc::ENOMEM).to_string(), "ENOMEM");
        assert_eq!(Errno(4095).to_string(), "errno 4095");
        let error = std::io::Error::from_raw_os_error(libc::EPIPE);
        assert_eq!(Errno::of(&error), Errno(libc::EPIPE));
    }
}
