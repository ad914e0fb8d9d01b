//! Addresses of this machine, and node daemons started on it for one front end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::errno;
use super::secret::Secret;

/// How long a started node may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long a node may take to stop by itself when its front end lets go of it.
const STOP_LIMIT: Duration = Duration::from_millis(300);

/// Whether `address` is one of this machine's. The kernel's routing decides, since it sends
/// from the address itself exactly when that is its own; nothing is sent.
pub fn is_local(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr = if address.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, super::hosts::DEFAULT_PORT))?;
        socket.local_addr()
    };
    source().is_ok_and(|source: SocketAddr| source.ip() == address)
}

/// The address of `name` in the text of an /etc/hosts file. The program is linked statically and
/// doesn't load the system's resolver.
pub fn name_in(etc_hosts: &str, name: &str) -> Option<IpAddr> {
    etc_hosts.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    })
}

/// A node daemon that this process started. Dropping it stops the daemon and waits for its end.
pub struct LocalNode {
    child: Child,
    // The daemon ends when this pipe closes.
    stdin: Option<ChildStdin>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl LocalNode {
    /// Starts `program` (this program) as a node on `address`. Without `fixed_port` it takes
    /// another port if that one is in use. The kernel kills the daemon when the calling *thread*
    /// ends: call it from one that lives as long as the session.
    ///
    /// # Errors
    /// One line for people.
    pub fn start(program: &Path, address: SocketAddr, fixed_port: bool, secret: &Secret) -> Result<Self, String> {
        let failed = |error: &io::Error| format!("can't start a node: {}", errno::describe(error));
        let mut command = Command::new(program);
        command
            .arg("node")
            .arg("--listen")
            .arg(address.to_string())
            .arg("--child");
        if fixed_port {
            command.arg("--fixed-port");
        }
        // A process group of its own: Ctrl-C on the terminal is for the front end to handle.
        let mut child = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let mut node = Self { child, stdin, address };
        let pipe = node.stdin.as_mut().ok_or("can't start a node: no pipe to it")?;
        pipe.write_all(secret.bytes()).map_err(|error| failed(&error))?;
        let stdout = stdout.ok_or("can't start a node: no pipe from it")?;
        let (line, first_line) = mpsc::channel();
        thread::spawn(move || {
            let mut text = String::new();
            let read = BufReader::new(stdout.take(4096)).read_line(&mut text);
            let _ = line.send(read.map(|_| text));
        });
        let text = match first_line.recv_timeout(START_LIMIT) {
            Ok(read) => read.map_err(|error| failed(&error))?,
            Err(_) => return Err(format!("the node started on {address} does not answer")),
        };
        match text.trim().split_once(' ') {
            Some(("listening", at)) => {
                node.address = at
                    .parse()
                    .map_err(|_| "the started node says an address that is none")?;
                Ok(node)
            }
            Some(("failed", reason)) => Err(reason.into()),
            _ => Err(format!("the node started on {address} ended at once")),
        }
    }

    /// Process id, for messages.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for LocalNode {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let end = Instant::now() + STOP_LIMIT;
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the kernel kill this process when the thread that started it ends, and ends it when
/// that has happened before: then `stdin` is at its end already, which the caller watches.
///
/// # Errors
/// When the kernel refuses.
pub fn die_with_parent() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_here_and_a_documentation_address_is_not() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(is_local("127.1.2.3".parse().unwrap()));
        assert!(!is_local("198.51.100.1".parse().unwrap()));
    }

    #[test]
    fn names() {
        let text = "127.0.0.1 localhost\n# 10.0.0.1 no\n10.0.0.2 Alpha alpha.example # x beta\nbroken gamma\n";
        assert_eq!(name_in(text, "alpha"), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(name_in(text, "localhost"), Some("127.0.0.1".parse().unwrap()));
        assert_eq!(name_in(text, "no"), None);
        assert_eq!(name_in(text, "beta"), None);
        assert_eq!(name_in(text, "gamma"), None);
    }
}
