//! A node's side of a session, from the front end's first message to its last.
//!
//! The states are types: what may be done next is what the type offers, and each step consumes
//! the one before.

use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::Streams;

use super::daemon::{Claim, STOP_LIMIT, Shared};
use super::handshake::HANDSHAKE_LIMIT;
use super::link::{Incoming, Link, LinkSender};
use super::mesh::{self, Acceptance, Mesh, PeerResult};
use super::message::{FromNode, Prepare, ToNode};
use crate::node::{MoveAnswer, NodeEnd, NodeInput, NodeLoad, NodeOutput};

/// How long the peers may take to connect.
const MESH_LIMIT: Duration = Duration::from_secs(10);
/// Console bytes in one message, far below the frame limit whatever they are.
const CONSOLE_CHUNK: usize = 64 << 10;

/// What a session waits for.
enum Event {
    FrontEnd(Incoming<ToNode>),
    Peer(PeerResult),
    Ended(NodeEnd),
}

/// Why a session is over.
enum Over {
    /// The front end left or was lost.
    Gone(String),
    /// We can't go on; the front end is told.
    Refuse(String),
    /// The machine doesn't stop.
    Stuck,
}

/// The front end may send `Prepare`.
struct Offered;
/// Peers may connect; the front end may send `Connect`.
struct Prepared(Box<Prepare>);
/// All peers are here; the front end may send `Start`.
struct Ready(Box<Prepare>, Vec<Option<Streams>>);

struct Session<S> {
    shared: Arc<Shared>,
    // The link itself outlives the session, so that a refusal still gets through.
    link: LinkSender<FromNode>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    state: S,
}

/// Frees the node for the next session.
struct Release<'a>(&'a Shared);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        *self.0.claim() = None;
    }
}

/// Serves the authenticated front end on `stream` until it leaves.
pub(super) fn serve(shared: &Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let mut link = match Link::<FromNode, ToNode>::new(stream) {
        Ok(link) => link,
        Err(error) => return tracing::error!("front end {from}: {}", super::errno::describe(&error)),
    };
    let Some(Incoming::Message(ToNode::Hello { machine, .. })) = link.receive(HANDSHAKE_LIMIT) else {
        return tracing::warn!("front end {from} said no hello");
    };
    {
        let mut claim = shared.claim();
        if let Some(other) = claim.as_ref() {
            let line = format!(
                "busy: it runs machine {:?} for the front end at {}",
                other.machine,
                other.front_end.ip()
            );
            drop(claim);
            let _ = link.send(FromNode::Refused(line));
            return;
        }
        *claim = Some(Claim {
            machine,
            front_end: from,
            acceptance: None,
            input: None,
        });
    }
    let _release = Release(shared);
    let (sender, events) = channel();
    let forward = sender.clone();
    if let Err(error) = link.forward(move |incoming| forward.send(Event::FrontEnd(incoming)).is_ok()) {
        return tracing::error!("front end {from}: {}", super::errno::describe(&error));
    }
    let _ = link.send(FromNode::Offer(Box::new(shared.runner.offer())));
    let mut session = Session {
        shared: shared.clone(),
        link: link.sender(),
        events,
        sender,
        state: Offered,
    };
    let over = loop {
        session = match session.prepare().and_then(Session::connect).and_then(Session::run) {
            Ok(session) => session,
            Err(over) => break over,
        };
    };
    match over {
        Over::Gone(reason) => tracing::info!("front end {from} is gone: {reason}"),
        Over::Refuse(line) => {
            tracing::error!("session of {from}: {line}");
            let _ = link.send(FromNode::Refused(line));
        }
        Over::Stuck => shared.give_up(),
    }
}

impl<S> Session<S> {
    fn with<T>(self, state: T) -> Session<T> {
        Session {
            shared: self.shared,
            link: self.link,
            events: self.events,
            sender: self.sender,
            state,
        }
    }

    fn send(&self, message: FromNode) -> Result<(), Over> {
        self.link.send(message).map_err(|error| Over::Gone(error.to_string()))
    }

    /// The next event until `end`; pings are answered here.
    fn next(&self, end: Option<Instant>) -> Result<Option<Event>, Over> {
        loop {
            let event = match end {
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => self.events.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::FrontEnd(Incoming::Message(ToNode::Ping(number)))) => self.send(FromNode::Pong(number))?,
                Ok(event) => return Ok(Some(event)),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(Over::Gone("its connection was closed".into())),
            }
        }
    }
}

/// What ends a session in any state before it runs.
fn unexpected(event: Event) -> Over {
    match event {
        Event::FrontEnd(Incoming::Lost(reason)) => Over::Gone(reason),
        Event::FrontEnd(Incoming::Message(ToNode::Stop(reason))) => Over::Gone(reason),
        Event::FrontEnd(Incoming::Message(other)) => Over::Refuse(format!("message {} out of turn", other.name())),
        Event::Peer(Err(line)) => Over::Refuse(line),
        Event::Peer(Ok((from, ..))) => Over::Refuse(format!("node {from} connected out of turn")),
        Event::Ended(_) => Over::Refuse("a machine ended that was not running".into()),
    }
}

impl Session<Offered> {
    fn prepare(self) -> Result<Session<Prepared>, Over> {
        loop {
            match self.next(None)? {
                Some(Event::FrontEnd(Incoming::Message(ToNode::Prepare(prepare)))) => {
                    prepare.check().map_err(Over::Refuse)?;
                    let deliver = self.sender.clone();
                    let deliver = move |peer| drop(deliver.send(Event::Peer(peer)));
                    if let Some(claim) = self.shared.claim().as_mut() {
                        claim.acceptance = Some(Acceptance::new(&prepare, &self.shared.secret, deliver));
                    }
                    self.send(FromNode::Prepared)?;
                    return Ok(self.with(Prepared(prepare)));
                }
                // Said to the machine before, while it was ending.
                Some(Event::FrontEnd(Incoming::Message(ToNode::Console(_) | ToNode::Migrate { .. } | ToNode::Stop(_)))) | None => {}
                Some(event) => return Err(unexpected(event)),
            }
        }
    }
}

impl Session<Prepared> {
    fn connect(self) -> Result<Session<Ready>, Over> {
        let prepare = &self.state.0;
        let mut mesh = Mesh::new(prepare);
        let mut end = None;
        while mesh.missing().is_some() || end.is_none() {
            match self.next(end)? {
                Some(Event::FrontEnd(Incoming::Message(ToNode::Connect))) if end.is_none() => {
                    end = Some(Instant::now() + MESH_LIMIT);
                    let deliver = self.sender.clone();
                    mesh::dial_lower(prepare, &self.shared.secret, move |peer| {
                        drop(deliver.send(Event::Peer(peer)))
                    })
                    .map_err(|error| Over::Refuse(format!("no thread to dial: {}", super::errno::describe(&error))))?;
                }
                Some(Event::Peer(Ok((from, kind, stream)))) => mesh.add(from, kind, stream),
                Some(event) => return Err(unexpected(event)),
                None => {
                    let from = mesh.missing().unwrap_or_default();
                    let name = &prepare.spec.host_names[from];
                    let seconds = MESH_LIMIT.as_secs();
                    return Err(Over::Refuse(format!(
                        "node {from} ({name}) did not connect to it within {seconds} s"
                    )));
                }
            }
        }
        if let Some(claim) = self.shared.claim().as_mut() {
            claim.acceptance = None;
        }
        self.send(FromNode::Ready)?;
        let Session {
            shared,
            link,
            events,
            sender,
            state: Prepared(prepare),
        } = self;
        Ok(Session {
            shared,
            link,
            events,
            sender,
            state: Ready(prepare, mesh.into_streams()),
        })
    }
}

impl Session<Ready> {
    fn run(self) -> Result<Session<Offered>, Over> {
        match self.next(None)? {
            Some(Event::FrontEnd(Incoming::Message(ToNode::Start))) => {}
            Some(event) => return Err(unexpected(event)),
            None => return Err(Over::Gone("silent".into())),
        }
        let Session {
            shared,
            link,
            events,
            sender,
            state: Ready(prepare, peers),
        } = self;
        let (input, typed) = channel();
        if let Some(claim) = shared.claim().as_mut() {
            claim.input = Some(input.clone());
        }
        let runner = shared.runner.clone();
        let output = Arc::new(Output(link.clone()));
        let ended = sender.clone();
        thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                let run = AssertUnwindSafe(|| runner.run(prepare.spec, peers, typed, output));
                let end = catch_unwind(run).unwrap_or_else(|_| {
                    NodeEnd::Failed("internal error: the machine panicked; its log says where".into())
                });
                let _ = ended.send(Event::Ended(end));
            })
            .map_err(|error| Over::Refuse(format!("no thread for the machine: {}", super::errno::describe(&error))))?;
        let session = Session {
            shared,
            link,
            events,
            sender,
            state: Offered,
        };
        let (end, gone) = session.attend(&input)?;
        if let Some(claim) = session.shared.claim().as_mut() {
            claim.input = None;
        }
        tracing::info!("machine ended: {end:?}");
        match gone {
            Some(reason) => Err(Over::Gone(reason)),
            None => session.send(FromNode::Ended(end)).map(|()| session),
        }
    }
}

impl Session<Offered> {
    /// Passes the front end's words to the running machine until it ends. The text is there when
    /// the front end is not any more.
    fn attend(&self, input: &Sender<NodeInput>) -> Result<(NodeEnd, Option<String>), Over> {
        let mut gone = None;
        let mut stop_by = None;
        let stop = |reason: String| {
            let _ = input.send(NodeInput::Stop(reason));
            Some(Instant::now() + STOP_LIMIT)
        };
        loop {
            match self.next(stop_by) {
                Ok(Some(Event::Ended(end))) => return Ok((end, gone)),
                Ok(Some(Event::FrontEnd(Incoming::Message(ToNode::Console(bytes))))) => {
                    let _ = input.send(NodeInput::Console(bytes));
                }
                Ok(Some(Event::FrontEnd(Incoming::Message(ToNode::Migrate { id, vcpu, node })))) => {
                    let _ = input.send(NodeInput::Migrate { id, vcpu, node });
                }
                Ok(Some(Event::FrontEnd(Incoming::Message(ToNode::Stop(reason))))) => stop_by = stop(reason),
                Ok(Some(Event::FrontEnd(Incoming::Lost(reason)))) => {
                    stop_by = stop(format!("the front end is lost: {reason}"));
                    gone = Some(reason);
                }
                Ok(Some(Event::FrontEnd(Incoming::Message(other)))) => {
                    stop_by = stop(format!("the front end sent message {} out of turn", other.name()));
                }
                Ok(Some(Event::Peer(_))) => {}
                Ok(None) => return Err(Over::Stuck),
                // A pong could not be sent; the loss itself follows as an event.
                Err(Over::Gone(_)) => {}
                Err(over) => return Err(over),
            }
        }
    }
}

/// A running machine's way to its front end.
struct Output(LinkSender<FromNode>);

impl NodeOutput for Output {
    fn console(&self, bytes: &[u8]) {
        for chunk in bytes.chunks(CONSOLE_CHUNK) {
            // A front end that is lost is noticed where its link is read.
            let _ = self.0.send(FromNode::Console(chunk.to_vec()));
        }
    }

    fn event(&self, line: &str, json: serde_json::Value) {
        let _ = self.0.send(FromNode::Event {
            line: line.into(),
            json,
        });
    }

    fn moved(&self, id: u64, answer: MoveAnswer) {
        let _ = self.0.send(FromNode::Migrated { id, answer });
    }

    fn load(&self, load: NodeLoad) {
        let _ = self.0.send(FromNode::Load(Box::new(load)));
    }
}
