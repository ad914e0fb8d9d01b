//! `ci/bench dsm`: what a page that another host has costs, beside what it can't cost less than.
//!
//! Two node processes, each with a VM on this machine's KVM, joined by TCP over loopback (or, with
//! `--listen` and `--peer`, on two hosts, by TCP or RDMA). The guest's vCPUs touch pages and read the time before and after. Floors are
//! measured in between, in the same run: a round trip of a small request and a page over a connection
//! like the nodes', and a fault that a thread answers at once.

mod breakdown;
mod faults;
mod figures;
mod floor;
mod frames;
mod guest;
mod node;
mod one_host;
mod peer;
mod shared;
mod stream;
mod tables;

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

use anyhow::Context;
use clap::Parser;

use figures::Figures;
use node::{Kind, Node};
use peer::{Peer, Streams};

#[derive(Parser)]
#[command(
    name = "ci/bench dsm",
    about = "Times faults on pages of another node beside their floors"
)]
struct Options {
    /// One line of JSON a figure
    #[arg(long)]
    json: bool,
    /// Times everything is measured
    #[arg(long, default_value_t = 8)]
    rounds: u64,
    /// vCPUs of the first node
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    vcpus: u8,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// What joins the nodes; RDMA needs --listen and --peer at addresses of RDMA devices
    #[arg(long, value_enum, default_value_t = Kind::Tcp)]
    transport: Kind,
    /// Whole blocks go over the same TCP stream as all else
    #[arg(long)]
    one_stream: bool,
    /// Wait here for a second node on another host, instead of starting one on this
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Be the second node of the one that listens here
    #[arg(long, value_name = "ADDRESS:PORT")]
    peer: Option<SocketAddr>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Times of single faults
    Faults,
    /// Bandwidth of reading the other node's memory
    Stream,
    /// A working set that two vCPUs share
    Shared,
    /// Single faults beside many replicated page tables
    Tables,
    /// What a transport for nodes on one host could bring
    OneHost,
}

/// Everything a measurement needs.
struct Bench {
    node: Node,
    peer: Peer,
    network: Arc<Mutex<floor::Bare>>,
    faults: node::Bare,
    figures: Figures,
    rounds: u64,
    vcpus: usize,
    transport: Kind,
    /// Both nodes read the same clock.
    one_clock: bool,
}

/// The second process, ended with the first.
struct Second(Child);

impl Drop for Second {
    fn drop(&mut self) {
        // It has ended if the connection is closed; otherwise something went wrong.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let vcpus = usize::from(options.vcpus);
    if let Some(address) = options.peer {
        return peer::work(address, vcpus, options.transport, options.one_stream);
    }
    let listener = TcpListener::bind(options.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))))?;
    let second = match options.listen {
        Some(_) => None,
        None => {
            let program = std::env::current_exe().context("this program's path")?;
            let mut words = vec![
                "--peer".into(),
                listener.local_addr()?.to_string(),
                "--vcpus".into(),
                vcpus.to_string(),
                "--transport".into(),
                options.transport.name().to_lowercase(),
            ];
            words.extend(options.one_stream.then(|| "--one-stream".into()));
            Some(Second(
                Command::new(program)
                    .args(words)
                    .spawn()
                    .context("starting the second node")?,
            ))
        }
    };
    let streams = Streams::accept(&listener)?;
    let blocks = Some(streams.blocks).filter(|_| !options.one_stream);
    let node = Node::new(0, vcpus, options.transport, streams.memory, blocks)?;
    let mut peer = Peer::new(streams.control)?;
    peer.answer().context("starting the second node")?;
    let mut bench = Bench {
        node,
        peer,
        network: Arc::new(Mutex::new(floor::Bare::new(options.transport, streams.floor)?)),
        faults: node::Bare::new()?,
        figures: Figures::new(options.json),
        rounds: options.rounds.max(1),
        vcpus,
        transport: options.transport,
        one_clock: second.is_some(),
    };
    let wanted = |part| options.only.is_none_or(|only| only == part);
    if wanted(Part::Faults) {
        faults::measure(&mut bench)?;
    }
    if wanted(Part::Stream) {
        stream::measure(&mut bench)?;
    }
    if wanted(Part::Shared) && vcpus > 1 {
        shared::measure(&mut bench)?;
    }
    // Their replicas stay.
    if wanted(Part::Tables) {
        tables::measure(&mut bench)?;
    }
    if wanted(Part::OneHost) && bench.one_clock {
        one_host::measure(&mut bench)?;
    }
    Ok(())
}
