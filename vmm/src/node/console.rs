//! The console's way out: bytes are gathered for a moment, so that a line is one message.

use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::Arc;
use std::time::Duration;

use super::NodeOutput;

/// How long bytes are gathered: less than people notice.
const GATHER: Duration = Duration::from_millis(5);

/// Where the UART writes. Dropping it sends what is left.
pub(super) struct Console(Sender<Vec<u8>>);

impl Console {
    pub(super) fn new(output: Arc<dyn NodeOutput>) -> Self {
        let (to, from) = channel();
        std::thread::spawn(move || pass_on(&from, &*output));
        Console(to)
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
        self.0.send(bytes.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
