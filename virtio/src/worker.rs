//! The thread behind a device: takes commands in order, serves queues, sleeps.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Activation, Queues, ResetToken};
use crate::error::{Error, Result};
use crate::queue::QueueError;
use crate::queue::state::RingState;

/// What a [`Service`] waits for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing: there is more to do.
    More,
    /// A kick.
    Kick,
    /// A kick, or something to read from this descriptor.
    KickOr(RawFd),
}

/// Why a [`Service`] can't go on.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The device is being stopped.
    Stopped,
    /// The driver broke a queue.
    Broken(QueueError),
}

impl From<QueueError> for Halt {
    fn from(error: QueueError) -> Self {
        Halt::Broken(error)
    }
}

/// The work of a device thread.
pub(crate) trait Service: Send + 'static {
    /// Called once with new queues, before the first [`Self::serve`].
    fn begin(&mut self, _active: &Activation) {}

    /// Does a bounded amount of work, so that commands are seen in time.
    fn serve(&mut self, active: &mut Activation, stop: &StopFlag) -> std::result::Result<Next, Halt>;
}

/// Tells a thread that it is to end. Once set, it must let nothing out of the device.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Fails once the device is being stopped. To be asked *after* reading guest memory and
    /// before using what was read: a touch that was blocked may have been ended with any content.
    pub(crate) fn check(&self) -> std::result::Result<(), Halt> {
        match self.0.load(Ordering::SeqCst) {
            true => Err(Halt::Stopped),
            false => Ok(()),
        }
    }
}

enum Command {
    Activate(Activation),
    Reset(ResetToken),
    Pause(SyncSender<Vec<RingState>>),
    Resume,
}

/// `None` once the thread has ended.
type Commands = Option<VecDeque<Command>>;

struct Mailbox {
    event: EventFd,
    kicked: AtomicBool,
    commands: Mutex<Commands>,
}

impl Mailbox {
    fn commands(&self) -> MutexGuard<'_, Commands> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A full counter wakes as well as one more would.
    fn wake(&self) {
        let _ = self.event.write(1);
    }
}

/// A device thread. Dropping it stops and joins it.
pub(crate) struct Worker {
    name: String,
    mailbox: Arc<Mailbox>,
    stop: StopFlag,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts a thread; it has no queues until [`Queues::activate`].
    pub(crate) fn spawn(name: String, service: impl Service) -> Result<Self> {
        let start = |source| Error::Start {
            device: name.clone(),
            source,
        };
        let mailbox = Arc::new(Mailbox {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(start)?,
            kicked: AtomicBool::new(false),
            commands: Mutex::new(Some(VecDeque::new())),
        });
        let stop = StopFlag::default();
        let body = Body {
            poller: Poller::new(&mailbox.event).map_err(start)?,
            mailbox: mailbox.clone(),
            stop: stop.clone(),
            name: name.clone(),
            service,
            active: None,
            broken: false,
            paused: false,
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || body.run())
            .map_err(start)?;
        Ok(Worker {
            name,
            mailbox,
            stop,
            thread: Mutex::new(Some(thread)),
        })
    }

    fn command(&self, command: Command) -> bool {
        let taken = match self.mailbox.commands().as_mut() {
            Some(commands) => {
                commands.push_back(command);
                true
            }
            None => false,
        };
        self.mailbox.wake();
        taken
    }
}

/// One thread serves all queues.
impl Queues for Worker {
    fn activate(&self, activation: Activation) {
        self.command(Command::Activate(activation));
    }

    fn reset(&self, token: ResetToken) {
        self.command(Command::Reset(token));
    }

    fn kick(&self, _index: u16) {
        // One wake-up is enough until the thread has taken it.
        if !self.mailbox.kicked.swap(true, Ordering::SeqCst) {
            self.mailbox.wake();
        }
    }

    fn pause(&self) -> Result<Vec<RingState>> {
        let (reply, answer) = sync_channel(1);
        self.command(Command::Pause(reply));
        answer.recv().map_err(|_| Error::Stopped(self.name.clone()))
    }

    fn resume(&self) -> Result<()> {
        match self.command(Command::Resume) {
            true => Ok(()),
            false => Err(Error::Stopped(self.name.clone())),
        }
    }

    fn request_stop(&self) {
        self.stop.0.store(true, Ordering::SeqCst);
        self.mailbox.wake();
    }

    fn stop(&self) {
        self.request_stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            if thread.join().is_err() {
                tracing::error!(device = %self.name, "device thread panicked");
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits for the mailbox and sometimes for one more descriptor.
struct Poller {
    epoll: Epoll,
    extra: Option<RawFd>,
}

impl Poller {
    fn new(event: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), readable)?;
        Ok(Poller { epoll, extra: None })
    }

    fn wait(&mut self, extra: Option<RawFd>) -> io::Result<()> {
        if self.extra != extra {
            if let Some(old) = self.extra.take() {
                let none = EpollEvent::default();
                self.epoll.ctl(ControlOperation::Delete, old, none)?;
            }
            if let Some(new) = extra {
                let readable = EpollEvent::new(EventSet::IN, 1);
                self.epoll.ctl(ControlOperation::Add, new, readable)?;
            }
            self.extra = extra;
        }
        let mut events = [EpollEvent::default(); 2];
        match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// What the thread owns.
struct Body<S> {
    name: String,
    mailbox: Arc<Mailbox>,
    stop: StopFlag,
    poller: Poller,
    service: S,
    active: Option<Activation>,
    broken: bool,
    paused: bool,
}

impl<S> Drop for Body<S> {
    /// However the thread ends, nobody waits for it in vain: pending commands are dropped, which
    /// ends pauses with an error and completes resets.
    fn drop(&mut self) {
        self.active = None;
        let pending = self.mailbox.commands().take();
        drop(pending);
    }
}

impl<S: Service> Body<S> {
    fn run(mut self) {
        let mut next = Next::Kick;
        loop {
            let waited = match next {
                Next::More => Ok(()),
                Next::Kick => self.poller.wait(None),
                Next::KickOr(fd) => self.poller.wait(Some(fd)),
            };
            if let Err(error) = waited {
                tracing::error!(device = %self.name, %error, "device thread cannot wait; it ends");
                return;
            }
            // The counter is emptied before the flag: a kick in between leaves the flag set and
            // is served below; one after it wakes again.
            let _ = self.mailbox.event.read();
            self.mailbox.kicked.store(false, Ordering::SeqCst);
            if self.stop.check().is_err() {
                return;
            }
            let more_commands = self.take_command();
            next = match self.serve() {
                Some(_) if more_commands => Next::More,
                Some(next) => next,
                None => return,
            };
        }
    }

    /// Takes one command; queues are served between any two, so that what was available at an
    /// activation is begun before a pause. Returns whether there was one.
    fn take_command(&mut self) -> bool {
        let command = self.mailbox.commands().as_mut().and_then(VecDeque::pop_front);
        match command {
            Some(Command::Activate(activation)) => {
                self.service.begin(&activation);
                self.active = Some(activation);
                self.broken = false;
            }
            Some(Command::Reset(token)) => {
                self.active = None;
                drop(token);
            }
            Some(Command::Pause(reply)) => {
                self.paused = true;
                let rings = self.active.iter().flat_map(|a| &a.rings);
                // Nobody waiting any more is no reason to stop.
                let _ = reply.send(rings.map(|ring| ring.save()).collect());
            }
            Some(Command::Resume) => self.paused = false,
            None => return false,
        }
        true
    }

    /// `None`: the thread is to end.
    fn serve(&mut self) -> Option<Next> {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused && !self.broken) else {
            return Some(Next::Kick);
        };
        match self.service.serve(active, &self.stop) {
            Ok(next) => Some(next),
            Err(Halt::Stopped) => None,
            Err(Halt::Broken(error)) => {
                tracing::warn!(device = %self.name, %error, "the guest's driver broke the device; it needs a reset");
                self.broken = true;
                active.signals.needs_reset();
                Some(Next::Kick)
            }
        }
    }
}
