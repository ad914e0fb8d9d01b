//! The command line.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use krg_scheduler::{NAMES, Request};
use krg_vmm::cluster::front::Options;
use krg_vmm::cluster::hosts::DEFAULT_PORT;
use krg_vmm::cluster::schedule::{self, Wanted};
use krg_vmm::cluster::size;
use krg_vmm::cluster::transport::Wish;
use krg_vmm::node::{BootSpec, PageTables};

/// One large SMP machine over several hosts.
///
/// With --nodes, the hosts of that file together run one Linux guest that sees all their CPUs and
/// memory as one machine. Without, the guest runs on this host alone.
#[derive(Debug, Parser)]
#[command(name = "krg-vmm", version, args_conflicts_with_subcommands = true, after_help = AFTER)]
pub struct Cli {
    /// Other than running a guest.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Running a guest.
    #[command(flatten)]
    pub guest: Guest,
}

const AFTER: &str = "\
Hosts file: one host a line, `address[:port] [id=N] [cpus=N] [mem=SIZE] [cache=SIZE] [disk=PATH]...`; `#`
starts a comment. mem= is the guest memory that is at home on a host, cache= what it may hold of other
hosts' beside that. `nbmin=N` on a line of its own boots as soon as N hosts can be reached, without the rest.
Nodes on this machine are started when none listens; on other hosts run `krg-vmm node`.

Console: the guest's console is standard input and output. On a terminal, Ctrl-A x ends the machine
and Ctrl-A h shows help.

Exit status: 0 the guest powered off, 1 it could not run, 2 wrong usage, 3 a node or host was lost,
4 the guest crashed, 5 stopped by the user, a signal or the control socket. The last line on standard
error says why.

Log: KRG_LOG=info (or debug, or module=level) on standard error.";

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this host's node and wait for front ends
    Node(Node),
}

/// `krg-vmm node`.
#[derive(Debug, Args)]
pub struct Node {
    /// Address to listen on, as the hosts file names it
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = listen_address)]
    pub listen: SocketAddr,
    /// File with the cluster's secret, at least 32 bytes [default: ~/.config/krg-vmm/secret]
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Started by a front end: the secret comes on standard input, whose end is the node's end
    #[arg(long, hide = true)]
    pub child: bool,
    /// With --child: take no other port than that of --listen
    #[arg(long, hide = true, requires = "child")]
    pub fixed_port: bool,
}

/// Running a guest.
#[derive(Debug, Args)]
pub struct Guest {
    /// Disk image to boot (raw or qcow2)
    #[arg(value_name = "IMAGE")]
    pub image: Option<PathBuf>,
    /// Hosts that make up the machine; the first that is this machine has the devices
    #[arg(long, value_name = "FILE")]
    pub nodes: Option<PathBuf>,
    /// vCPUs in total [default: all that the hosts offer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: Option<u32>,
    /// Memory in total, as in 512M or 8G [default: 3/4 of what the hosts have free; alone: half, at most 4G]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub memory: Option<u64>,
    /// The machine's name, for `krg --machine`
    #[arg(long, default_value = "krg")]
    pub name: String,
    /// Kernel to boot instead of the image's own
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line: the whole with --kernel, else added to the image's own
    #[arg(long, value_name = "TEXT")]
    pub append: Option<String>,
    /// One more disk image (may be repeated)
    #[arg(long, value_name = "PATH")]
    pub disk: Vec<PathBuf>,
    /// Write the guest's changes to the images; without, they are gone when it ends
    #[arg(long)]
    pub persist: bool,
    /// Connect a network card to this tap interface
    #[arg(long, value_name = "TAP")]
    pub net: Option<String>,
    /// Control socket for `krg` and other programs [default: in /run/krg-vmm or $XDG_RUNTIME_DIR/krg-vmm, by --name]
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Metrics for Prometheus at http://ADDR:PORT/metrics; without ADDR, for this host alone
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = metrics_address)]
    pub metrics: Option<SocketAddr>,
    /// Events and errors on standard error as JSON lines
    #[arg(long)]
    pub json: bool,
    /// How page-table pages that several hosts use are kept
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub page_tables: PageTableOption,
    /// What the hosts talk over
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub transport: TransportOption,
    /// Who decides where vCPUs run: a policy of the scheduler, or nobody but the user (off)
    #[arg(long, value_name = "POLICY", default_value = NAMES[0], value_parser = policies())]
    pub sched: String,
    /// Write all of the scheduler's decisions with their inputs here, a JSON object a line
    #[arg(long, value_name = "FILE")]
    pub sched_log: Option<PathBuf>,
    /// File with the cluster's secret, the same on every host [default: ~/.config/krg-vmm/secret]
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
}

/// What `--sched` takes.
fn policies() -> PossibleValuesParser {
    NAMES.into_iter().chain([schedule::OFF]).collect::<Vec<_>>().into()
}

/// `--page-tables`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PageTableOption {
    /// By CPU vendor and kvm_intel.eptad
    Auto,
    /// A copy on every host, differences merged
    Replicate,
    /// One writer, as for any page
    Share,
}

/// `--transport`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TransportOption {
    /// RDMA where every host has a device for it, else TCP
    Auto,
    /// RDMA (RoCE version 2), in software, too
    Rdma,
    /// TCP
    Tcp,
}

impl Guest {
    /// What the front end is to do; `program` is this program's path.
    ///
    /// # Errors
    /// One line when there is nothing to boot.
    pub fn options(self, program: PathBuf) -> Result<Options, &'static str> {
        if self.image.is_none() && self.kernel.is_none() {
            return Err("nothing to boot: name a disk image, or a kernel with --kernel (see --help)");
        }
        Ok(Options {
            nodes: self.nodes,
            disks: self.image.into_iter().chain(self.disk).collect(),
            persist: self.persist,
            request: Request {
                cpus: self.cpus,
                memory: self.memory,
            },
            name: self.name,
            boot: BootSpec {
                kernel: self.kernel,
                initrd: self.initrd,
                append: self.append,
            },
            net: self.net,
            api: self.api,
            metrics: self.metrics,
            page_tables: match self.page_tables {
                PageTableOption::Auto => PageTables::Auto,
                PageTableOption::Replicate => PageTables::Replicate,
                PageTableOption::Share => PageTables::Share,
            },
            transport: match self.transport {
                TransportOption::Auto => Wish::Auto,
                TransportOption::Rdma => Wish::Rdma,
                TransportOption::Tcp => Wish::Tcp,
            },
            sched: Wanted { policy: self.sched, log: self.sched_log },
            secret_file: self.secret_file,
            program,
            attach: true,
        })
    }
}

fn listen_address(text: &str) -> Result<SocketAddr, &'static str> {
    match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
        (Ok(address), _) => Ok(address),
        (_, Ok(address)) => Ok(SocketAddr::new(address, DEFAULT_PORT)),
        _ => Err("write an IP address, and a port if it isn't the usual one: 10.0.0.1 or 10.0.0.1:7447"),
    }
}

fn metrics_address(text: &str) -> Result<SocketAddr, &'static str> {
    match (text.parse::<SocketAddr>(), text.parse::<u16>()) {
        (Ok(address), _) => Ok(address),
        (_, Ok(port)) => Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)),
        _ => Err("write a port, 9100, or an IP address with one, 10.0.0.1:9100"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn listen_addresses() {
        assert_eq!(listen_address("10.0.0.1"), Ok("10.0.0.1:7447".parse().unwrap()));
        assert_eq!(listen_address("[::1]:9"), Ok("[::1]:9".parse().unwrap()));
        assert!(listen_address("host").is_err());
    }

    #[test]
    fn metrics_are_for_this_host_unless_the_user_says_otherwise() {
        assert_eq!(metrics_address("9100"), Ok("127.0.0.1:9100".parse().unwrap()));
        assert_eq!(metrics_address("10.0.0.1:9100"), Ok("10.0.0.1:9100".parse().unwrap()));
        assert_eq!(metrics_address("[::1]:1"), Ok("[::1]:1".parse().unwrap()));
        assert!(["", "host:9100", "10.0.0.1", ":9100", "65536"].iter().all(|text| metrics_address(text).is_err()));
    }

    #[test]
    fn something_has_to_boot() {
        let parse = |args: &[&str]| Cli::parse_from(args).guest.options("/p".into());
        assert!(parse(&["krg-vmm"]).is_err());
        let options = parse(&["krg-vmm", "a.img", "--disk", "b.img", "--memory", "1G"]).unwrap();
        assert_eq!(options.disks, [PathBuf::from("a.img"), PathBuf::from("b.img")]);
        assert_eq!(options.request.memory, Some(1 << 30));
    }
}
