//! Names of operating system errors, as manual pages and search engines know them.

use std::io;

use nix::errno::Errno;

/// `error` with its errno name where it has one: `ECONNREFUSED (connection refused)`.
pub fn describe(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(number) => name(number),
        // The standard library's own time limits carry no number.
        None => match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Some("ETIMEDOUT".to_owned()),
            _ => None,
        },
    };
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_lowercase();
    match name {
        Some(name) => format!("{name} ({text})"),
        None => text,
    }
}

fn name(number: i32) -> Option<String> {
    let errno = Errno::from_raw(number);
    (errno != Errno::UnknownErrno).then(|| format!("{errno:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named() {
        let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert_eq!(describe(&refused), "ECONNREFUSED (connection refused)");
        assert!(describe(&io::ErrorKind::TimedOut.into()).starts_with("ETIMEDOUT"));
        assert_eq!(describe(&io::Error::other("odd")), "odd");
    }
}
