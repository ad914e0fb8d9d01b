//! The floor over RDMA: frames of a second transport like the nodes', with nothing above it. Requests and
//! answers go from receiver to receiver, without another thread in between.

use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use krg_dsm::memory::PAGE_SIZE;
use krg_dsm::transport::rdma::RdmaTransport;
use krg_dsm::transport::{Config, Handler, PeerEvent, Transport};

use super::floor;

/// Any class that is no heartbeat.
const CLASS: u8 = 1;
/// What takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(120);

/// The answering side's receiver.
struct Answering {
    transport: OnceLock<Weak<RdmaTransport>>,
    chunk: Vec<u8>,
    gone: Mutex<bool>,
    changed: Condvar,
}

impl Handler for Answering {
    fn frame(&self, peer: usize, _: u8, payload: &[u8]) {
        let Some(transport) = self.transport.get().and_then(Weak::upgrade) else { return };
        let mut left = payload.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        while left > 0 {
            let len = left.min(floor::CHUNK as u64);
            // The other side notices what is missing.
            if transport.send(peer, CLASS, &[&self.chunk[..len as usize]]).is_err() {
                return;
            }
            left -= len;
        }
    }

    fn event(&self, _: PeerEvent) {
        *self.gone.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// Answers a peer's requests until it is gone: each with as many bytes as it asks for.
pub fn serve(stream: TcpStream) -> anyhow::Result<()> {
    let handler = Arc::new(Answering {
        transport: OnceLock::new(),
        chunk: vec![7; floor::CHUNK],
        gone: Mutex::default(),
        changed: Condvar::new(),
    });
    let transport = Arc::new(RdmaTransport::connect(vec![Some(stream), None], Config::default())?);
    let _ = handler.transport.set(Arc::downgrade(&transport));
    transport.start(handler.clone())?;
    let gone = handler.gone.lock().unwrap();
    drop(handler.changed.wait_while(gone, |gone| !*gone).unwrap());
    transport.shutdown();
    Ok(())
}

/// What the asking side waits for.
#[derive(Default)]
struct Awaited {
    /// For the one page that is asked for by itself.
    then: Option<floor::Then>,
    /// Bytes of the answer under way that are still to come, and what each answer has.
    left: u64,
    each: u64,
    /// Requests still to be sent.
    more: usize,
    begun: Option<Instant>,
    times: Vec<Duration>,
    gone: Option<String>,
}

struct Receiver {
    transport: OnceLock<Weak<RdmaTransport>>,
    awaited: Mutex<Awaited>,
    changed: Condvar,
}

impl Receiver {
    fn ask(&self, bytes: u64) {
        if let Some(transport) = self.transport.get().and_then(Weak::upgrade) {
            // A lost peer is an event.
            let _ = transport.send(1, CLASS, &[&floor::request(bytes)]);
        }
    }
}

impl Handler for Receiver {
    fn frame(&self, _: usize, _: u8, payload: &[u8]) {
        let mut awaited = self.awaited.lock().unwrap();
        if let Some(then) = awaited.then.take() {
            drop(awaited);
            return then(payload);
        }
        awaited.left = awaited.left.saturating_sub(payload.len() as u64);
        let Some(begun) = awaited.begun.filter(|_| awaited.left == 0) else { return };
        let now = Instant::now();
        awaited.times.push(now - begun);
        if awaited.more == 0 {
            awaited.begun = None;
            return self.changed.notify_all();
        }
        awaited.more -= 1;
        (awaited.begun, awaited.left) = (Some(now), awaited.each);
        let bytes = awaited.each;
        drop(awaited);
        self.ask(bytes);
    }

    fn event(&self, event: PeerEvent) {
        self.awaited.lock().unwrap().gone = Some(event.to_string());
        self.changed.notify_all();
    }
}

/// The asking side.
pub struct Asking {
    transport: Arc<RdmaTransport>,
    receiver: Arc<Receiver>,
}

impl Asking {
    pub fn new(stream: TcpStream) -> anyhow::Result<Self> {
        let transport = Arc::new(RdmaTransport::connect(vec![None, Some(stream)], Config::default())?);
        let receiver = Arc::new(Receiver {
            transport: OnceLock::from(Arc::downgrade(&transport)),
            awaited: Mutex::default(),
            changed: Condvar::new(),
        });
        transport.start(receiver.clone())?;
        Ok(Asking { transport, receiver })
    }

    /// `count` requests for `bytes`, each sent when the answer to the one before is here.
    fn requests(&mut self, count: usize, bytes: u64) -> anyhow::Result<Vec<Duration>> {
        *self.receiver.awaited.lock().unwrap() = Awaited {
            left: bytes,
            each: bytes,
            more: count - 1,
            begun: Some(Instant::now()),
            ..Awaited::default()
        };
        self.receiver.ask(bytes);
        let awaited = self.receiver.awaited.lock().unwrap();
        let waits = |awaited: &mut Awaited| awaited.begun.is_some() && awaited.gone.is_none();
        let (mut awaited, _) = self.receiver.changed.wait_timeout_while(awaited, PATIENCE, waits).unwrap();
        if let Some(line) = awaited.gone.take() {
            bail!(line);
        }
        if awaited.begun.is_some() {
            bail!("the second node did not answer for {PATIENCE:?}");
        }
        Ok(std::mem::take(&mut awaited.times))
    }

    /// Asks for a page, which `then` is called with.
    pub fn fetch(&self, then: floor::Then) {
        self.receiver.awaited.lock().unwrap().then = Some(then);
        self.receiver.ask(PAGE_SIZE as u64);
    }

    pub fn round_trips(&mut self, count: usize) -> anyhow::Result<Vec<Duration>> {
        self.requests(count, PAGE_SIZE as u64)
    }

    pub fn stream(&mut self, bytes: u64) -> anyhow::Result<Duration> {
        self.requests(1, bytes)?.pop().context("no answer")
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.transport.shutdown();
    }
}
