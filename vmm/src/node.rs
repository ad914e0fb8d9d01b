//! One node: the machine's part on this host, joined to its peers.
//!
//! The cluster side (`crate::cluster`) authenticates, agrees on a [`NodeSpec`] and connects the
//! peers; [`run`] then builds memory, machine and devices and runs until the machine ends.

mod boot;
mod console;
mod devices;
mod fabric;
mod measure;
mod report;
mod shared;
mod single;
mod tsc;
pub mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use krg_dsm::node::DsmError;
use krg_dsm::transport::Streams;
use krg_scheduler::Placement;
use serde::{Deserialize, Serialize};

use crate::machine::{End, Machine, MoveError};
use crate::ownership::Outcome;

pub use measure::{INTERVAL, MOST_PAGES, NodeLoad, PageFetches, VcpuMeasure, VcpuState};

/// How page-table pages that several hosts walk are kept (`--page-tables`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageTables {
    /// Chosen by CPU vendor and `kvm_intel.eptad`.
    Auto,
    /// Every host keeps a writable copy; differences are merged before anything leaves a host.
    Replicate,
    /// Like any other page: one writer.
    Share,
}

/// What the nodes of a machine talk over, as the front end chose (`--transport`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeTransport {
    /// The connections of the mesh themselves.
    Tcp,
    /// RDMA connections beside them.
    Rdma,
}

/// A disk of the guest, opened by node 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Path on node 0's host.
    pub path: PathBuf,
    /// Write through to the image instead of to a private overlay.
    pub persist: bool,
}

/// What the guest boots, read by node 0 on its own host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSpec {
    /// Kernel file; `None`: found inside the first disk.
    pub kernel: Option<PathBuf>,
    /// Initrd file, with `kernel`.
    pub initrd: Option<PathBuf>,
    /// With `kernel`: the whole command line. Without: appended to the image's own.
    pub append: Option<String>,
}

/// Everything one node has to know to run its part of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The machine's name (`--name`).
    pub name: String,
    /// This node's number: its place in `placement.hosts`. Node 0 has the devices.
    pub node: usize,
    /// vCPUs and memory of every host.
    pub placement: Placement,
    /// What people call each host (`address` of the hosts file), for messages.
    pub host_names: Vec<String>,
    /// Guest disks in order; used by node 0.
    pub disks: Vec<DiskSpec>,
    /// Name of a tap interface on node 0's host for virtio-net.
    pub net: Option<String>,
    /// What to boot; used by node 0.
    pub boot: BootSpec,
    /// Page-table protocol.
    pub page_tables: PageTables,
    /// Transport between the nodes.
    pub transport: NodeTransport,
    /// CPUID leaves all hosts have in common, as computed by the front end from the nodes' offers;
    /// empty for a single host: its own.
    pub cpuid: Vec<CpuidLeaf>,
    /// Bytes of copies of other hosts' pages that this node may hold.
    pub cache: u64,
    /// TSC frequency of node 0 in kHz.
    pub tsc_khz: u32,
}

/// One CPUID leaf, as KVM_GET_SUPPORTED_CPUID gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input.
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// Output registers.
    pub eax: u32,
    /// Output registers.
    pub ebx: u32,
    /// Output registers.
    pub ecx: u32,
    /// Output registers.
    pub edx: u32,
}

/// What the world around a node may tell it while it runs.
pub enum NodeInput {
    /// Bytes typed on the console (node 0).
    Console(Vec<u8>),
    /// Move a vCPU; answered by [`NodeOutput::moved`].
    Migrate {
        /// The front end's number for it.
        id: u64,
        /// The vCPU.
        vcpu: u32,
        /// The node it is to run on.
        node: usize,
    },
    /// Stop now: the front end is gone or the user asked; the text says which.
    Stop(String),
}

/// What a node tells the world around it.
pub trait NodeOutput: Send + Sync {
    /// Bytes the guest wrote to its console (node 0).
    fn console(&self, bytes: &[u8]);
    /// A line worth showing to people, and its machine form (`{"event": ...}`).
    fn event(&self, line: &str, json: serde_json::Value);
    /// What came of the move that was asked for under `id`. Not called if the machine ends first.
    fn moved(&self, id: u64, answer: MoveAnswer);
    /// What the vCPUs here did since the last time.
    fn load(&self, load: NodeLoad);
}

/// What came of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveAnswer {
    /// The vCPU runs on the node, in this epoch of its ownership: the higher, the newer.
    Moved(u64),
    /// It ran there already.
    AlreadyThere,
    /// The vCPU is being started; a moment later it may be moved.
    Busy,
    /// There is no such vCPU.
    NoVcpu,
    /// There is no such node.
    NoNode,
    /// The node is lost.
    NodeLost,
    /// A node was lost, perhaps with the vCPU.
    OwnerLost,
}

impl From<Outcome> for MoveAnswer {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Moved { epoch } => MoveAnswer::Moved(epoch),
            Outcome::AlreadyThere => MoveAnswer::AlreadyThere,
            Outcome::Busy => MoveAnswer::Busy,
            Outcome::NodeLost => MoveAnswer::NodeLost,
            Outcome::OwnerLost => MoveAnswer::OwnerLost,
        }
    }
}

/// Has `machine` move a vCPU, and `output` told what came of it.
fn migrate(machine: &Machine, id: u64, vcpu: u32, node: usize, output: &Arc<dyn NodeOutput>) {
    let told = Arc::clone(output);
    let answer = match machine.migrate(vcpu, node, Box::new(move |outcome| told.moved(id, outcome.into()))) {
        Ok(()) => return,
        Err(MoveError::NoVcpu(_)) => MoveAnswer::NoVcpu,
        Err(MoveError::NoNode(_)) => MoveAnswer::NoNode,
    };
    output.moved(id, answer);
}

/// How a node's run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeEnd {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset, or triple-faulted (`true`).
    Reset(bool),
    /// A peer was lost: its node number.
    PeerLost(usize),
    /// A peer said that it ended, for a reason it tells the front end: its node number.
    PeerEnded(usize),
    /// Told to stop.
    Stopped(String),
    /// Could not go on: one line for people.
    Failed(String),
}

/// Runs this node's part until the machine ends. `peers[i]` is the authenticated connection to
/// node `i`, `None` at this node's own place. Returns after every vCPU, device and thread has
/// stopped and every file is closed.
pub fn run(
    spec: NodeSpec,
    peers: Vec<Option<Streams>>,
    input: Receiver<NodeInput>,
    output: Arc<dyn NodeOutput>,
) -> NodeEnd {
    let end = if spec.placement.hosts.len() == 1 {
        single::run(&spec, input, &output)
    } else {
        shared::run(&spec, peers, input, &output)
    };
    end.unwrap_or_else(NodeEnd::Failed)
}

/// What can end or change a running node, in the order in which it happened.
enum Happening {
    Input(NodeInput),
    Machine(End),
    Setup(usize, Vec<u8>),
    Dsm(DsmError),
    /// A vCPU came to run here.
    Arrived { vcpu: u32, epoch: u64 },
    /// A node sent a machine message that is none.
    Nonsense(usize),
}

/// Passes everything from one channel on as happenings, until either side is gone.
fn forward<T: Send + 'static>(from: Receiver<T>, to: Sender<Happening>, wrap: fn(T) -> Happening) {
    std::thread::spawn(move || {
        for item in from {
            if to.send(wrap(item)).is_err() {
                return;
            }
        }
    });
}

fn end_of(end: End) -> NodeEnd {
    match end {
        End::PowerOff => NodeEnd::PowerOff,
        End::Reset => NodeEnd::Reset(false),
        End::TripleFault { .. } => NodeEnd::Reset(true),
        End::Error(line) => NodeEnd::Failed(line),
    }
}
