//! `krg-vmm`: the front end, or with `node` one host's node daemon.

mod cli;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use krg_vmm::cluster::report::Reporter;
use krg_vmm::cluster::{front, service};
use krg_vmm::node;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, Guest};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let daemon = matches!(&cli.command, Some(Command::Node(node)) if !node.child);
    let filter = EnvFilter::try_from_env("KRG_LOG").unwrap_or_else(|_| EnvFilter::new(if daemon { "info" } else { "error" }));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).init();
    allow_many_files();
    match cli.command {
        Some(Command::Node(options)) if options.child => {
            ended(service::serve_parent(options.listen, options.fixed_port, Arc::new(node::run)))
        }
        Some(Command::Node(options)) => {
            ended(service::serve(options.listen, options.secret_file, Arc::new(node::run)))
        }
        None => run(cli.guest),
    }
}

/// Takes all open files this process may have: a node has some for every vCPU, and two for every other node. The usual
/// 1,024 are meant for programs that use select(2).
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

/// The front end.
fn run(guest: Guest) -> ExitCode {
    let reporter = Reporter::new(guest.json);
    let options = std::env::current_exe()
        .map_err(|error| error.to_string())
        .and_then(|program| guest.options(program).map_err(Into::into));
    let options = match options {
        Ok(options) => options,
        Err(line) => {
            reporter.error(&line, 2);
            return ExitCode::from(2);
        }
    };
    match front::run(&options, Arc::new(node::run), reporter) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            reporter.error(&error.to_string(), error.status());
            ExitCode::from(error.status())
        }
    }
}

fn ended(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            Reporter::new(false).error(&line, 1);
            ExitCode::FAILURE
        }
    }
}
