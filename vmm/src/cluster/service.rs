//! Node daemons as processes: one that a user or the init system starts, and one that a front
//! end starts on its own machine.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::daemon::{Daemon, DaemonError, Runner};
use super::errno;
use super::local::die_with_parent;
use super::offer::Offer;
use super::secret::Secret;

/// Serves front ends on `listen` until a signal asks for the end.
///
/// # Errors
/// One line for people.
pub fn serve(listen: SocketAddr, secret_file: Option<PathBuf>, runner: Arc<dyn Runner>) -> Result<(), String> {
    let path = secret_file
        .or_else(Secret::default_file)
        .ok_or("no secret: make ~/.config/krg-vmm/secret or use --secret-file, the same on every host")?;
    let secret = Secret::from_file(&path).map_err(|error| error.to_string())?;
    let daemon = Daemon::bind(listen, secret, runner).map_err(|error| error.to_string())?;
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(|error| format!("signals: {}", errno::describe(&error)))?;
    let handle = daemon.handle();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            handle.stop("its node daemon was told to end");
        }
    });
    let offer = Offer::of_this_host();
    tracing::info!("listening on {}: {}", daemon.address(), offer.line());
    if let Some(reason) = offer.obstacle(false) {
        tracing::warn!("this host can't take part yet: {reason}");
    }
    daemon.serve().map_err(|error| error.to_string())
}

/// Serves the front end that started this process: the secret comes on standard input, whose end
/// is the end of this node; where it listens, or why it doesn't, goes to standard output. Unless
/// `fixed_port`, another port is taken when that of `listen` is in use.
///
/// # Errors
/// One line for people, when the machine had to be given up.
pub fn serve_parent(listen: SocketAddr, fixed_port: bool, runner: Arc<dyn Runner>) -> Result<(), String> {
    let daemon = match start(listen, fixed_port, runner) {
        Ok(daemon) => daemon,
        Err(line) => {
            // The front end says it; once is enough.
            println!("failed {line}");
            return Ok(());
        }
    };
    let handle = daemon.handle();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        handle.stop("the front end ended");
    });
    println!("listening {}", daemon.address());
    daemon.serve().map_err(|error| error.to_string())
}

fn start(listen: SocketAddr, fixed_port: bool, runner: Arc<dyn Runner>) -> Result<Daemon, String> {
    let mut key = [0; 32];
    die_with_parent()
        .and_then(|()| io::stdin().lock().read_exact(&mut key))
        .map_err(|error| format!("no secret from the front end: {}", errno::describe(&error)))?;
    let secret = Secret::from_bytes(key);
    let bound = match Daemon::bind(listen, secret.clone(), runner.clone()) {
        Err(DaemonError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrInUse && !fixed_port => {
            Daemon::bind(SocketAddr::new(listen.ip(), 0), secret, runner)
        }
        other => other,
    };
    bound.map_err(|error| error.to_string())
}
