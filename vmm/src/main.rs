//! `krg-vmm`: the front end, or with `node` one host's node daemon.

mod cli;

use std::io::{self, IsTerminal, Read};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Parser;
use krg_vmm::cluster::daemon::{Daemon, DaemonError};
use krg_vmm::cluster::front;
use krg_vmm::cluster::local::die_with_parent;
use krg_vmm::cluster::offer::Offer;
use krg_vmm::cluster::report::Reporter;
use krg_vmm::cluster::secret::Secret;
use krg_vmm::node;
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, Guest, Node};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let daemon = matches!(&cli.command, Some(Command::Node(node)) if !node.child);
    let filter = EnvFilter::try_from_env("KRG_LOG").unwrap_or_else(|_| EnvFilter::new(if daemon { "info" } else { "error" }));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).init();
    match cli.command {
        Some(Command::Node(node)) if node.child => serve_parent(&node),
        Some(Command::Node(node)) => serve(&node),
        None => run(cli.guest),
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

/// A node daemon that a user or the init system started.
fn serve(node: &Node) -> ExitCode {
    let result = (|| {
        let path = node.secret_file.clone().or_else(Secret::default_file);
        let path = path.ok_or("no secret: make ~/.config/krg-vmm/secret or use --secret-file, the same on every host")?;
        let secret = Secret::from_file(&path).map_err(|error| error.to_string())?;
        let daemon = Daemon::bind(node.listen, secret, Arc::new(node::run)).map_err(|error| error.to_string())?;
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(|error| error.to_string())?;
        let handle = daemon.handle();
        thread::spawn(move || {
            if signals.forever().next().is_some() {
                handle.stop("its node daemon was told to end");
            }
        });
        let offer = Offer::of_this_host();
        tracing::info!("listening on {}: {}", daemon.address(), front::describe_offer(&offer));
        if let Some(reason) = offer.obstacle(false) {
            tracing::warn!("this host can't take part yet: {reason}");
        }
        daemon.serve().map_err(|error| error.to_string())
    })();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            Reporter::new(false).error(&line, 1);
            ExitCode::FAILURE
        }
    }
}

/// A node that a front end on this machine started: it ends with it, and speaks to it alone.
fn serve_parent(node: &Node) -> ExitCode {
    let mut key = [0; 32];
    let ready = die_with_parent().and_then(|()| io::stdin().lock().read_exact(&mut key));
    if let Err(error) = ready {
        println!("failed its front end gave it no secret: {error}");
        return ExitCode::FAILURE;
    }
    let secret = Secret::from_bytes(key);
    let daemon = match Daemon::bind(node.listen, secret.clone(), Arc::new(node::run)) {
        Err(DaemonError::Listen { mut address, source }) if source.kind() == io::ErrorKind::AddrInUse && !node.fixed_port => {
            address.set_port(0);
            Daemon::bind(address, secret, Arc::new(node::run))
        }
        other => other,
    };
    let daemon = match daemon {
        Ok(daemon) => daemon,
        Err(error) => {
            println!("failed {error}");
            return ExitCode::FAILURE;
        }
    };
    let handle = daemon.handle();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        handle.stop("the front end ended");
    });
    println!("listening {}", daemon.address());
    match daemon.serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
