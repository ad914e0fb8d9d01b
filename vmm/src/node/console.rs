//! The console's way out: bytes are gathered for a moment, so that a line is one message.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::NodeOutput;

/// How long bytes are gathered: less than people notice.
const GATHER: Duration = Duration::from_millis(5);

/// Where the UART writes. Dropping it sends what is left and waits until that is done: a guest's last
/// line is often why it powers off.
pub(super) struct Console {
    to: Option<Sender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    pub(super) fn new(output: Arc<dyn NodeOutput>) -> Self {
        let (to, from) = channel();
        let thread = std::thread::spawn(move || pass_on(&from, &*output));
        Console { to: Some(to), thread: Some(thread) }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.to = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the console's thread panicked");
        }
    }
}

fn pass_on(from: &Receiver<Vec<u8>>, output: &dyn NodeOutput) {
    while let Ok(mut bytes) = from.recv() {
        std::thread::sleep(GATHER);
        bytes.extend(from.try_iter().flatten());
        output.console(&bytes);
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let to = self.to.as_ref().ok_or(std::io::ErrorKind::BrokenPipe)?;
        to.send(bytes.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Slow(Mutex<Vec<u8>>);

    impl NodeOutput for Slow {
        fn console(&self, bytes: &[u8]) {
            std::thread::sleep(Duration::from_millis(20));
            self.0.lock().unwrap().extend(bytes);
        }
        fn event(&self, _: &str, _: serde_json::Value) {}
        fn moved(&self, _: u64, _: crate::node::MoveAnswer) {}
        fn load(&self, _: crate::node::NodeLoad) {}
    }

    #[test]
    fn the_last_bytes_are_out_when_it_is_dropped() {
        let output = Arc::new(Slow::default());
        let mut console = Console::new(output.clone());
        console.write_all(b"reboot: ").unwrap();
        std::thread::sleep(GATHER * 2);
        console.write_all(b"Power down\n").unwrap();
        drop(console);
        assert_eq!(output.0.lock().unwrap().as_slice(), b"reboot: Power down\n");
    }
}
