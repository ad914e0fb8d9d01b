//! The user's terminal: raw while the guest has it, as it was before on every way out.

use std::io::{self, IsTerminal, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The terminal's settings to go back to, where a panic on any thread finds them.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
/// Lines of ours need a carriage return while the terminal is raw.
static RAW: AtomicBool = AtomicBool::new(false);
static HOOK: Once = Once::new();

/// Line end for text of ours on the terminal as it is now.
pub fn line_end() -> &'static str {
    if RAW.load(Ordering::Relaxed) { "\r\n" } else { "\n" }
}

/// Holds the terminal in raw mode; dropping it puts the old settings back. A panic anywhere does
/// so before its message is printed. Signals have to be handled by ending the program's main
/// function, which drops it.
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw. `None` when that is no terminal.
    ///
    /// # Errors
    /// When the terminal doesn't let itself be set.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        // From here on the drop undoes what was done.
        let guard = Self(());
        tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing more can be done when the terminal itself is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
        RAW.store(false, Ordering::Relaxed);
    }
}

/// What the user did at the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h, or ? instead of h.
    Help,
}

/// What Ctrl-A does.
pub const HELP: &str = "Ctrl-A x: end the machine   Ctrl-A h: this help   Ctrl-A Ctrl-A: a Ctrl-A for the guest";

const CTRL_A: u8 = 1;

/// Finds the escape key in what is typed; it may come in pieces.
#[derive(Debug, Default)]
pub struct EscapeKey {
    pending: bool,
}

impl EscapeKey {
    /// Splits `bytes` into what the guest gets and what we do, in order.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        let mut plain = Vec::new();
        for &byte in bytes {
            let action = match (std::mem::take(&mut self.pending), byte) {
                (false, CTRL_A) => {
                    self.pending = true;
                    continue;
                }
                (true, b'x' | b'X') => Typed::Quit,
                (true, b'h' | b'H' | b'?') => Typed::Help,
                // Ctrl-A twice, or any key in the first place; other escapes mean nothing.
                (true, CTRL_A) | (false, _) => {
                    plain.push(byte);
                    continue;
                }
                (true, _) => continue,
            };
            if !plain.is_empty() {
                typed.push(Typed::Bytes(std::mem::take(&mut plain)));
            }
            typed.push(action);
        }
        if !plain.is_empty() {
            typed.push(Typed::Bytes(plain));
        }
        typed
    }
}

/// Reads standard input on a thread of its own until its end or until `take` says no. With
/// `escape`, Ctrl-A is ours; without (a script's input), every byte is the guest's. The end of
/// the input does not end the machine.
///
/// # Errors
/// When the system gives no thread.
pub fn read_input(escape: bool, take: impl Fn(Typed) -> bool + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("console-input".into()).spawn(move || {
        let mut key = EscapeKey::default();
        let mut buffer = [0; 4096];
        let mut stdin = io::stdin().lock();
        loop {
            let typed = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) if escape => key.feed(&buffer[..count]),
                Ok(count) => vec![Typed::Bytes(buffer[..count].to_vec())],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::warn!("standard input: {}", super::errno::describe(&error)),
            };
            if !typed.into_iter().all(&take) {
                return;
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &[u8]) -> Typed {
        Typed::Bytes(text.to_vec())
    }

    #[test]
    fn plain_input_passes() {
        assert_eq!(EscapeKey::default().feed(b"ls\r\x03"), [bytes(b"ls\r\x03")]);
    }

    #[test]
    fn the_escape_key_in_pieces() {
        let mut key = EscapeKey::default();
        assert_eq!(key.feed(b"ab\x01"), [bytes(b"ab")]);
        assert_eq!(
            key.feed(b"hcd\x01\x01e\x01qf\x01x"),
            [Typed::Help, bytes(b"cd\x01ef"), Typed::Quit]
        );
        assert_eq!(key.feed(b"x"), [bytes(b"x")]);
    }
}
