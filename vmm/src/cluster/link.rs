//! An authenticated control connection with signs of life in both directions.
//!
//! Threads and blocking sockets: a cluster has tens of connections at most, and a thread that
//! blocks in `read` is the simplest thing that can't miss a message.

use std::io;
use std::marker::PhantomData;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::{self, Envelope, FrameError};

/// How often each side says that it is alive.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// Silence after which the other side counts as lost. TCP keeps trying for longer than that, so
/// a link that is down for 2 s only stalls.
pub const SILENCE: Duration = Duration::from_millis(4200);
/// Messages read ahead of whoever handles them; more make the sender wait.
const QUEUE: usize = 256;

/// What comes over a link.
#[derive(Debug)]
pub enum Incoming<R> {
    /// A message.
    Message(R),
    /// The last one: the other side is gone; the text says how that was noticed.
    Lost(String),
}

/// The sending half. Dropping all of them does not close the connection; [`Link`] does.
pub struct LinkSender<S> {
    stream: Arc<Mutex<TcpStream>>,
    sends: PhantomData<fn(S)>,
}

impl<S> Clone for LinkSender<S> {
    fn clone(&self) -> Self {
        Self {
            stream: self.stream.clone(),
            sends: PhantomData,
        }
    }
}

impl<S: Serialize> LinkSender<S> {
    /// Sends a message. May block while the network is stalled, until the reading side of the
    /// link gives the connection up.
    ///
    /// # Errors
    /// When the connection is gone or the message too long.
    pub fn send(&self, message: S) -> Result<(), FrameError> {
        self.write(&Envelope::Message(message))
    }

    fn write(&self, envelope: &Envelope<S>) -> Result<(), FrameError> {
        let bytes = frame::encode(envelope)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        io::Write::write_all(&mut *stream, &bytes).map_err(FrameError::Io)
    }
}

/// A connection that sends `S` and receives `R`. Dropping it closes the connection and ends its
/// threads.
pub struct Link<S, R> {
    sender: LinkSender<S>,
    incoming: Option<Receiver<Incoming<R>>>,
    socket: TcpStream,
    _beat: SyncSender<()>,
}

impl<S, R> Link<S, R>
where
    S: Serialize + Send + 'static,
    R: DeserializeOwned + Send + 'static,
{
    /// Starts the threads of an authenticated connection.
    ///
    /// # Errors
    /// When the system gives no thread or descriptor.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(SILENCE))?;
        let socket = stream.try_clone()?;
        let mut reading = stream.try_clone()?;
        let sender = LinkSender {
            stream: Arc::new(Mutex::new(stream)),
            sends: PhantomData,
        };
        let (queue, incoming) = sync_channel(QUEUE);
        thread::Builder::new().name("link-read".into()).spawn(move || {
            let lost = loop {
                match frame::read(&mut reading) {
                    Ok(Envelope::Heartbeat) => {}
                    Ok(Envelope::Message(message)) => {
                        if queue.send(Incoming::Message(message)).is_err() {
                            break None;
                        }
                    }
                    Err(error) => break Some(why_lost(&error)),
                }
            };
            // Wakes a sender that is stuck in the same connection.
            let _ = reading.shutdown(Shutdown::Both);
            if let Some(reason) = lost {
                let _ = queue.send(Incoming::Lost(reason));
            }
        })?;
        let (beat, stop) = sync_channel::<()>(0);
        let beating = sender.clone();
        thread::Builder::new().name("link-beat".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(HEARTBEAT) {
                if beating.write(&Envelope::Heartbeat).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self {
            sender,
            incoming: Some(incoming),
            socket,
            _beat: beat,
        })
    }

    /// The sending half.
    pub fn sender(&self) -> LinkSender<S> {
        self.sender.clone()
    }

    /// Sends a message; see [`LinkSender::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send(&self, message: S) -> Result<(), FrameError> {
        self.sender.send(message)
    }

    /// The next thing that comes, or `None` after `limit`, after the loss was reported, and after
    /// [`Link::forward`].
    pub fn receive(&self, limit: Duration) -> Option<Incoming<R>> {
        self.incoming.as_ref()?.recv_timeout(limit).ok()
    }

    /// Hands all that comes from now on to `take`, on a thread of its own, until `take` says no
    /// or the connection is lost.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn forward(&mut self, take: impl Fn(Incoming<R>) -> bool + Send + 'static) -> io::Result<()> {
        if let Some(incoming) = self.incoming.take() {
            thread::Builder::new()
                .name("link-forward".into())
                .spawn(move || while incoming.recv().is_ok_and(&take) {})?;
        }
        Ok(())
    }
}

impl<S, R> Drop for Link<S, R> {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn why_lost(error: &FrameError) -> String {
    match error {
        FrameError::Io(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            format!("no sign of life for {} s", SILENCE.as_secs_f32())
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (a, listener.accept().unwrap().0)
    }

    #[test]
    fn messages_go_both_ways_and_a_drop_is_noticed_at_once() {
        let (a, b) = pair();
        let a = Link::<String, u32>::new(a).unwrap();
        let b = Link::<u32, String>::new(b).unwrap();
        a.send("x".into()).unwrap();
        b.send(7).unwrap();
        assert!(matches!(b.receive(SILENCE), Some(Incoming::Message(text)) if text == "x"));
        assert!(matches!(a.receive(SILENCE), Some(Incoming::Message(7))));
        drop(b);
        let start = Instant::now();
        assert!(matches!(a.receive(SILENCE), Some(Incoming::Lost(_))));
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn silence_is_a_loss_but_heartbeats_are_not_silence() {
        let (a, b) = pair();
        let (c, d) = pair();
        let silent = Link::<u32, u32>::new(a).unwrap();
        let lively = Link::<u32, u32>::new(c).unwrap();
        let _other = Link::<u32, u32>::new(d).unwrap();
        let start = Instant::now();
        let lost = silent.receive(SILENCE * 2);
        assert!(
            matches!(&lost, Some(Incoming::Lost(reason)) if reason.contains("4.2 s")),
            "{lost:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(lively.receive(Duration::from_millis(300)).is_none());
        drop(b);
    }

    #[test]
    fn nonsense_is_a_loss() {
        let (a, mut b) = pair();
        let link = Link::<u32, u32>::new(a).unwrap();
        io::Write::write_all(&mut b, &[0xff; 16]).unwrap();
        assert!(matches!(link.receive(SILENCE), Some(Incoming::Lost(reason)) if reason.contains("at most")));
    }
}
