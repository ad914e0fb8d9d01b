//! The serial console: a 16550A at COM1.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use super::error::MachineError;

/// Where the guest's console output goes.
pub type Output = Box<dyn Write + Send>;

/// Most typed bytes kept for a guest that doesn't read them.
const MAX_WAITING: usize = 64 << 10;

/// Remembers that the UART wants to interrupt; the interrupt itself is raised after the UART's
/// lock is released, because raising it may have to wait for another node.
#[derive(Clone, Default)]
struct Wanted(Arc<AtomicBool>);

impl Trigger for Wanted {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The output, kept when the UART is replaced by a restored one.
#[derive(Clone)]
struct Sink(Arc<Mutex<Output>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).flush()
    }
}

struct Uart {
    serial: Serial<Wanted, NoEvents, Sink>,
    /// Typed bytes that don't fit the FIFO yet.
    waiting: VecDeque<u8>,
}

/// The console port.
pub struct Com1 {
    uart: Mutex<Uart>,
    wanted: Wanted,
    output: Sink,
}

/// Saved form of the console port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Com1State {
    /// Layout of this structure: [`Com1State::VERSION`].
    pub version: u32,
    /// Divisor latch, low and high byte.
    pub divisor: [u8; 2],
    /// IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 7],
    /// Receive FIFO.
    pub fifo: Vec<u8>,
    /// Typed bytes behind the FIFO.
    pub waiting: Vec<u8>,
}

impl Com1State {
    /// Layout written by this program.
    pub const VERSION: u32 = 1;
}

impl Com1 {
    /// A console whose output goes to `output`.
    pub fn new(output: Output) -> Self {
        let wanted = Wanted::default();
        let output = Sink(Arc::new(Mutex::new(output)));
        let serial = Serial::new(wanted.clone(), output.clone());
        Com1 {
            uart: Mutex::new(Uart {
                serial,
                waiting: VecDeque::new(),
            }),
            wanted,
            output,
        }
    }

    /// Reads register `offset` (0-7). The second value says whether the UART raises its interrupt.
    pub fn read(&self, offset: u8) -> (u8, bool) {
        let mut uart = self.lock();
        let value = uart.serial.read(offset);
        uart.refill();
        drop(uart);
        (value, self.take_interrupt())
    }

    /// Writes register `offset` (0-7); returns whether the UART raises its interrupt. Output that
    /// nobody takes is lost: a console that went away must not stop the guest.
    pub fn write(&self, offset: u8, value: u8) -> bool {
        let mut uart = self.lock();
        if let Err(e) = uart.serial.write(offset, value) {
            tracing::debug!("console output lost: {e}");
        }
        drop(uart);
        self.take_interrupt()
    }

    /// Types `bytes`; returns how many were taken and whether the UART raises its interrupt.
    pub fn type_in(&self, bytes: &[u8]) -> (usize, bool) {
        let mut uart = self.lock();
        let taken = bytes.len().min(MAX_WAITING - uart.waiting.len().min(MAX_WAITING));
        uart.waiting.extend(&bytes[..taken]);
        uart.refill();
        drop(uart);
        (taken, self.take_interrupt())
    }

    /// The state as of now.
    pub fn save(&self) -> Com1State {
        let uart = self.lock();
        let s = uart.serial.state();
        Com1State {
            version: Com1State::VERSION,
            divisor: [s.baud_divisor_low, s.baud_divisor_high],
            registers: [
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            fifo: s.in_buffer,
            waiting: uart.waiting.iter().copied().collect(),
        }
    }

    /// Takes over a saved state. Interrupts it had raised are in the vCPUs' state already.
    ///
    /// # Errors
    /// When the state has another layout or more in its FIFO than fits.
    pub fn restore(&self, saved: &Com1State) -> Result<(), MachineError> {
        let refuse = |reason: String| MachineError::State {
            object: "serial console".into(),
            reason,
        };
        if saved.version != Com1State::VERSION {
            return Err(refuse(format!("version {} is not known here", saved.version)));
        }
        let [
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = saved.registers;
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: saved.fifo.clone(),
        };
        let serial = Serial::from_state(&state, self.wanted.clone(), NoEvents, self.output.clone())
            .map_err(|e| refuse(e.to_string()))?;
        let waiting = saved.waiting.iter().copied().take(MAX_WAITING).collect();
        *self.lock() = Uart { serial, waiting };
        self.take_interrupt();
        Ok(())
    }

    fn take_interrupt(&self) -> bool {
        self.wanted.0.swap(false, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Uart {
    /// Moves waiting bytes into the FIFO as far as they fit.
    fn refill(&mut self) {
        let fits = self.serial.fifo_capacity().min(self.waiting.len());
        if fits == 0 {
            return;
        }
        let (front, _) = self.waiting.as_slices();
        let chunk: Vec<u8> = front[..fits.min(front.len())].to_vec();
        // In loop-back mode the UART takes nothing; the bytes stay for later.
        if let Ok(taken) = self.serial.enqueue_raw_bytes(&chunk) {
            self.waiting.drain(..taken);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_reaches_the_sink_and_interrupts_only_if_enabled() {
        let sink = Screen::default();
        let com1 = Com1::new(Box::new(sink.clone()));
        assert!(!com1.write(0, b'h'));
        assert!(com1.write(1, 2), "the transmitter is empty");
        assert_eq!(com1.read(2).0 & 2, 2);
        assert!(com1.write(0, b'i'));
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
    }

    #[test]
    fn typed_bytes_beyond_the_fifo_wait_and_none_is_lost() {
        let com1 = Com1::new(Box::new(Screen::default()));
        com1.write(1, 1);
        let text: Vec<u8> = (0..200u8).collect();
        assert_eq!(com1.type_in(&text), (200, true));
        let saved = com1.save();
        assert_eq!(saved.fifo.len() + saved.waiting.len(), 200);
        let restored = Com1::new(Box::new(Screen::default()));
        restored.restore(&saved).unwrap();
        let read: Vec<u8> = (0..200).map(|_| restored.read(0).0).collect();
        assert_eq!(read, text);
        assert_eq!(restored.read(5).0 & 1, 0, "nothing left");
    }

    #[test]
    fn a_guest_that_never_reads_bounds_the_buffer() {
        let com1 = Com1::new(Box::new(Screen::default()));
        let flood = vec![b'x'; 2 * MAX_WAITING];
        assert_eq!(com1.type_in(&flood).0, MAX_WAITING);
        let more = com1.type_in(&flood).0;
        assert!(more <= 64, "only what the FIFO took: {more}");
    }
}
