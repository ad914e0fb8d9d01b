//! The second node's process: does what the first asks for over a connection of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, bail};
use krg_dsm::trace::Mark;
use serde::{Deserialize, Serialize};

use super::floor;
use super::guest::Job;
use super::node::{Kind, Node};

/// Connections between the two processes; the first byte says which one it is.
const ROLES: [u8; 4] = [CONTROL, MEMORY, FLOOR, BLOCKS];
const CONTROL: u8 = 1;
const MEMORY: u8 = 2;
const FLOOR: u8 = 3;
const BLOCKS: u8 = 4;

/// What the first node asks of the second.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Has the vCPU do a job.
    Run(Job),
    /// Switches the trace.
    Trace(bool),
    /// Asks for what was noted.
    TakeTrace,
    /// Asks for its replicas of page tables.
    Replicas,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// The times of the touches.
    Times(Vec<(u64, u64)>),
    Marks(Vec<Mark>),
    /// Replicas: all, and those at rest.
    Replicas(usize, usize),
    Failed(String),
}

/// Connections to the other process.
pub struct Streams {
    pub control: TcpStream,
    pub memory: TcpStream,
    pub floor: TcpStream,
    /// For whole blocks of the memory.
    pub blocks: TcpStream,
}

impl Streams {
    /// Waits for the second process.
    pub fn accept(listener: &TcpListener) -> anyhow::Result<Self> {
        let mut streams = ROLES.map(|_| None);
        while streams.iter().any(Option::is_none) {
            let (mut stream, from) = listener.accept()?;
            let mut role = [0];
            stream.read_exact(&mut role)?;
            let at = ROLES
                .iter()
                .position(|r| *r == role[0])
                .with_context(|| format!("{from} is no node of ours"))?;
            streams[at] = Some(stream);
        }
        let [Some(control), Some(memory), Some(floor), Some(blocks)] = streams else {
            bail!("a connection is missing")
        };
        Ok(Streams { control, memory, floor, blocks })
    }

    /// Goes to the first process.
    fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let connect = |role: u8| -> anyhow::Result<TcpStream> {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(&[role])?;
            Ok(stream)
        };
        Ok(Streams {
            control: connect(CONTROL)?,
            memory: connect(MEMORY)?,
            floor: connect(FLOOR)?,
            blocks: connect(BLOCKS)?,
        })
    }
}

/// The second process: works until the first closes its connection. `vcpus`: those of node 0; `one_stream`: blocks
/// go among the messages.
pub fn work(address: SocketAddr, vcpus: usize, kind: Kind, one_stream: bool) -> anyhow::Result<()> {
    let streams = Streams::connect(address)?;
    let node = Node::new(1, vcpus, kind, streams.memory, Some(streams.blocks).filter(|_| !one_stream))?;
    let floor = streams.floor;
    std::thread::spawn(move || floor::serve(kind, floor));
    let mut answer = streams.control.try_clone()?;
    writeln!(answer, "{}", serde_json::to_string(&Reply::Done)?)?;
    for line in BufReader::new(streams.control).lines() {
        let request = serde_json::from_str(&line?)?;
        let reply = match request {
            Request::Run(job) => match node.run(&[(vcpus, job)]) {
                Ok(times) => Reply::Times(times.into_iter().next().unwrap_or_default()),
                Err(error) => Reply::Failed(format!("{error:#}")),
            },
            Request::Trace(on) => {
                node.dsm.trace(on);
                Reply::Done
            }
            Request::TakeTrace => Reply::Marks(node.dsm.take_trace()),
            Request::Replicas => {
                let replicas = node.dsm.counters().unwrap_or_default().1;
                Reply::Replicas(replicas.held, replicas.resting)
            }
        };
        writeln!(answer, "{}", serde_json::to_string(&reply)?)?;
    }
    Ok(())
}

/// The first process's side of the control connection.
pub struct Peer {
    asked: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Peer {
    /// Waits until the second node is ready.
    pub fn new(control: TcpStream) -> anyhow::Result<Self> {
        Ok(Peer {
            asked: control.try_clone()?,
            answers: BufReader::new(control),
        })
    }

    /// Asks, without waiting for the answer.
    pub fn ask(&mut self, request: &Request) -> anyhow::Result<()> {
        Ok(writeln!(self.asked, "{}", serde_json::to_string(request)?)?)
    }

    /// The next answer.
    pub fn answer(&mut self) -> anyhow::Result<Reply> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the second node is gone");
        }
        match serde_json::from_str(&line)? {
            Reply::Failed(reason) => bail!("second node: {reason}"),
            reply => Ok(reply),
        }
    }

    /// Has the second node's vCPU do a job.
    pub fn run(&mut self, job: Job) -> anyhow::Result<Vec<(u64, u64)>> {
        self.ask(&Request::Run(job))?;
        self.times()
    }

    /// The answer to a [`Request::Run`].
    pub fn times(&mut self) -> anyhow::Result<Vec<(u64, u64)>> {
        match self.answer()? {
            Reply::Times(times) => Ok(times),
            other => bail!("second node: {other:?} is no answer to a job"),
        }
    }

    /// Replicas of page tables there: all, and those at rest.
    pub fn replicas(&mut self) -> anyhow::Result<(usize, usize)> {
        self.ask(&Request::Replicas)?;
        match self.answer()? {
            Reply::Replicas(held, resting) => Ok((held, resting)),
            other => bail!("second node: {other:?} tells of no replicas"),
        }
    }

    /// Switches the trace there.
    pub fn trace(&mut self, on: bool) -> anyhow::Result<()> {
        self.ask(&Request::Trace(on))?;
        self.answer().map(drop)
    }

    /// What the trace there has.
    pub fn take_trace(&mut self) -> anyhow::Result<Vec<Mark>> {
        self.ask(&Request::TakeTrace)?;
        match self.answer()? {
            Reply::Marks(marks) => Ok(marks),
            other => bail!("second node: {other:?} is no trace"),
        }
    }
}
