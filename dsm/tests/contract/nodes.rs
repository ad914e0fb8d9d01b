//! The two nodes of a scenario, on one host or two.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use krg_dsm::transport::rdma::RdmaTransport;
use krg_dsm::transport::{Config, Handler, PeerEvent, Streams, TcpTransport, Transport};

use super::scenarios::{SCENARIOS, Scenario};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The transport under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Rdma,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Tcp => "tcp",
            Kind::Rdma => "rdma",
        })
    }
}

/// What a handler heard.
#[derive(Debug, PartialEq)]
pub enum News {
    Frame(u8, Vec<u8>),
    Event(PeerEvent),
}

/// One node: its end of the transport, not started, and a connection to the other node beside it.
pub struct Side {
    pub kind: Kind,
    /// The other node's number: 1 for the near one, 0 for the far one.
    pub peer: usize,
    pub transport: Arc<dyn Transport>,
    beside: TcpStream,
}

impl Side {
    /// `next` makes one connection after the other to the other node: as many as the transport needs.
    fn new(kind: Kind, node: usize, mut next: impl FnMut() -> TcpStream, beside: TcpStream, config: Config) -> Self {
        fn to_other<T>(node: usize, streams: T) -> Vec<Option<T>> {
            let mut peers = vec![None, None];
            peers[1 - node] = Some(streams);
            peers
        }
        let messages = next();
        let transport: Arc<dyn Transport> = match kind {
            Kind::Tcp => {
                let streams = Streams { messages, blocks: Some(next()) };
                Arc::new(TcpTransport::new(to_other(node, streams), config).unwrap())
            }
            Kind::Rdma => Arc::new(RdmaTransport::connect(to_other(node, messages), config).unwrap()),
        };
        beside.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            kind,
            peer: 1 - node,
            transport,
            beside,
        }
    }

    /// Starts with a handler that passes everything on.
    pub fn record(&self) -> Recorded {
        let (sender, receiver) = mpsc::channel();
        self.transport.start(Arc::new(Recorder(Mutex::new(sender)))).unwrap();
        Recorded(receiver)
    }

    pub fn send(&self, class: u8, payload: &[u8]) {
        self.transport.send(self.peer, class, &[payload]).unwrap();
    }

    /// Tells the other node's program to go on, beside the transport.
    pub fn tell(&self) {
        (&self.beside).write_all(b"!").unwrap();
    }

    /// Waits for that.
    pub fn hear(&self) {
        (&self.beside).read_exact(&mut [0]).unwrap();
    }
}

struct Recorder(Mutex<mpsc::Sender<News>>);

impl Handler for Recorder {
    fn frame(&self, _: usize, class: u8, payload: &[u8]) {
        // The test may have seen enough.
        let _ = self.0.lock().unwrap().send(News::Frame(class, payload.to_vec()));
    }

    fn event(&self, event: PeerEvent) {
        let _ = self.0.lock().unwrap().send(News::Event(event));
    }
}

/// What came to a node.
pub struct Recorded(mpsc::Receiver<News>);

impl Recorded {
    pub fn next(&self) -> News {
        self.0.recv_timeout(PATIENCE).expect("nothing came")
    }

    /// The next frame, which must be of this class.
    pub fn frame(&self, class: u8) -> Vec<u8> {
        match self.next() {
            News::Frame(got, payload) if got == class => payload,
            News::Frame(got, payload) => panic!("class {got} with {} bytes instead of {class}", payload.len()),
            News::Event(event) => panic!("{event}"),
        }
    }

    /// The next event, frames before it left out.
    pub fn event(&self) -> PeerEvent {
        loop {
            if let News::Event(event) = self.next() {
                return event;
            }
        }
    }

    /// What has come and was not looked at.
    pub fn rest(&self) -> Vec<News> {
        self.0.try_iter().collect()
    }
}

/// Plays the near node of a scenario, against the listener at `far`.
pub fn near(kind: Kind, far: SocketAddr, scenario: &Scenario) -> Result<(), String> {
    let connect = || TcpStream::connect(far).map_err(|error| error.to_string());
    let beside = connect()?;
    writeln!(&beside, "{kind} {}", scenario.name).unwrap();
    let verdict = beside.try_clone().unwrap();
    let next = || connect().expect("the far node listens");
    let mine = attempt(|| (scenario.near)(&Side::new(kind, 0, next, beside, scenario.config)));
    if mine.is_err() {
        // The other one waits for what will not come.
        let _ = verdict.shutdown(std::net::Shutdown::Write);
    }
    let mut theirs = String::new();
    BufReader::new(&verdict)
        .read_line(&mut theirs)
        .map_err(|error| error.to_string())?;
    match (mine, theirs.trim_end_matches('\n')) {
        (Ok(()), ".ok") => Ok(()),
        (Err(reason), ".ok") => Err(reason),
        (Ok(()), theirs) => Err(format!("far node: {theirs}")),
        (Err(mine), theirs) => Err(format!("{mine}; far node: {theirs}")),
    }
}

/// Where the far node waits.
pub struct Listener(TcpListener);

impl Listener {
    pub fn bind(address: SocketAddr) -> Self {
        Self(TcpListener::bind(address).expect("ADDRESS can be listened on"))
    }

    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Plays the far node of one scenario after the other.
    pub fn serve(&self) {
        loop {
            let (beside, _) = self.0.accept().unwrap();
            let mut line = Vec::new();
            // By the byte: what follows the line is the scenario's.
            while line.last() != Some(&b'\n') {
                let mut byte = [0];
                if (&beside).read_exact(&mut byte).is_err() {
                    break;
                }
                line.extend(byte);
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            let Some((kind, name)) = line.trim().split_once(' ') else {
                continue;
            };
            let kind = if kind == "rdma" { Kind::Rdma } else { Kind::Tcp };
            let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == name) else {
                continue;
            };
            let next = || self.0.accept().unwrap().0;
            let verdict = beside.try_clone().unwrap();
            let result = attempt(|| (scenario.far)(&Side::new(kind, 1, next, beside, scenario.config)));
            let line = match result {
                Ok(()) => "ok".to_owned(),
                Err(reason) => reason.replace('\n', " "),
            };
            // The dot tells it from what the program told before.
            let _ = writeln!(&verdict, ".{line}");
        }
    }
}

fn attempt(run: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}
