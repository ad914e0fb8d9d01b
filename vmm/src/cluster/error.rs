//! Why the front end could not run a machine to the guest's power-off, and its exit status.

use std::io;
use std::path::PathBuf;

use super::errno;
use super::hosts::HostsError;
use super::plan::PlanError;
use super::secret::SecretError;

/// The front end's error; its text is the one line the user sees.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// A file named on the command line.
    #[error("{}: {}", path.display(), errno::describe(source))]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file that is no disk image.
    #[error("{}: {reason}", path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// What it is instead.
        reason: &'static str,
    },
    /// The hosts file's content.
    #[error("{}: {source}", path.display())]
    Hosts {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: HostsError,
    },
    /// The secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Hosts on other machines, but no secret.
    #[error(
        "host {0} is another machine: a secret is needed; make ~/.config/krg-vmm/secret or use --secret-file, the same on every host"
    )]
    NoSecret(String),
    /// No host is this machine.
    #[error(
        "no line of the hosts file is an address of this machine: node 0, with the disks and the console, has to be here"
    )]
    NoLocalHost,
    /// A loopback address that other hosts would have to connect to.
    #[error("host {loopback} can't be reached from host {remote}: write this machine's own address in its place")]
    Loopback {
        /// The loopback line.
        loopback: String,
        /// A line that is not here.
        remote: String,
    },
    /// Disks where no devices are.
    #[error("host {0}: disk= is possible only on node 0, the first line that is this machine")]
    DiskElsewhere(String),
    /// A host that can't take part.
    #[error("host {host}: {reason}")]
    Host {
        /// The line as written.
        host: String,
        /// One line.
        reason: String,
    },
    /// Too few hosts.
    #[error("only {found} of the {needed} hosts that nbmin asks for can be reached; {missing}")]
    Nbmin {
        /// Hosts reached.
        found: usize,
        /// Hosts needed.
        needed: usize,
        /// The first one missing and why.
        missing: String,
    },
    /// The hosts can't make up the machine.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// RDMA was asked for.
    #[error("host {host}: {reason}; without --transport rdma the nodes use TCP")]
    NoRdma {
        /// The host that lacks it.
        host: String,
        /// What it lacks.
        reason: String,
    },
    /// The hosts' processors.
    #[error("the hosts' processors have too little in common: {0}")]
    Cpuid(String),
    /// Something of this machine.
    #[error("{0}")]
    System(String),
    /// A node was lost.
    #[error("node {node} ({host}) is lost: {reason}")]
    Lost {
        /// Its number.
        node: usize,
        /// Its host.
        host: String,
        /// How that was noticed.
        reason: String,
    },
    /// A node could not go on.
    #[error("node {node} ({host}): {line}")]
    Failed {
        /// Its number.
        node: usize,
        /// Its host.
        host: String,
        /// Its line.
        line: String,
    },
    /// The guest crashed.
    #[error("the guest crashed: a vCPU took a triple fault")]
    TripleFault,
    /// Somebody ended it.
    #[error("stopped: {0}")]
    Stopped(String),
}

impl FrontError {
    /// The program's exit status, as `--help` lists them.
    pub fn status(&self) -> u8 {
        match self {
            Self::Lost { .. } => 3,
            Self::TripleFault => 4,
            Self::Stopped(_) => 5,
            _ => 1,
        }
    }
}
