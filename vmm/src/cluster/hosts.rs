//! The hosts file: which hosts make up the cluster.
//!
//! One host a line, `address[:port] [id=N] [cpus=N] [mem=SIZE] [cache=SIZE] [disk=PATH]...`; `#` starts a
//! comment; a line `nbmin=N` says how many hosts have to answer before the machine boots.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// TCP port of a node daemon when a line names none.
pub const DEFAULT_PORT: u16 = 7447;

/// Most hosts one cluster may have. It bounds what a node accepts in a session.
pub const MAX_HOSTS: usize = 64;

/// One line of the hosts file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLine {
    /// Line number in the file, from 1.
    pub line: usize,
    /// Address of the node daemon.
    pub address: IpAddr,
    /// Port, if the line names one.
    pub port: Option<u16>,
    /// Number people know the host by: unique in the file.
    pub id: u32,
    /// Limit on the vCPUs it runs.
    pub cpus: Option<u32>,
    /// Limit on the guest memory it holds, in bytes.
    pub memory: Option<u64>,
    /// Limit on the copies of other hosts' pages it holds beside that, in bytes.
    pub cache: Option<u64>,
    /// Disk images on that host.
    pub disks: Vec<PathBuf>,
}

impl HostLine {
    /// The socket address to try first.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.unwrap_or(DEFAULT_PORT))
    }
}

impl fmt::Display for HostLine {
    /// The host as the user wrote it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.address, port)),
            None => write!(f, "{}", self.address),
        }
    }
}

/// A hosts file that was read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostsFile {
    /// The hosts in file order; never empty.
    pub hosts: Vec<HostLine>,
    /// Hosts that have to answer before boot; `None`: all of them.
    pub nbmin: Option<usize>,
}

/// Why a hosts file can't be used. `line` counts from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostsError {
    /// Nothing but comments.
    #[error("no host in it: write one address a line")]
    Empty,
    /// More lines than [`MAX_HOSTS`].
    #[error("line {line}: more than {MAX_HOSTS} hosts")]
    TooMany {
        /// The first line too many.
        line: usize,
    },
    /// A word that means nothing.
    #[error("line {line}: {word:?}: {reason}")]
    Word {
        /// Where.
        line: usize,
        /// The word.
        word: String,
        /// What is wrong with it and what to write.
        reason: String,
    },
    /// Two hosts with one id.
    #[error("line {line}: id={id} is already the id of line {first}: give every host its own")]
    DuplicateId {
        /// The second line.
        line: usize,
        /// The line that has it.
        first: usize,
        /// The id.
        id: u32,
    },
    /// One daemon named twice.
    #[error("line {line}: {address} is already on line {first}: a host takes part once")]
    DuplicateAddress {
        /// The second line.
        line: usize,
        /// The line that has it.
        first: usize,
        /// Address and port.
        address: SocketAddr,
    },
    /// `nbmin` asks for more hosts than there are.
    #[error("line {line}: nbmin={nbmin}, but the file has {hosts} host(s)")]
    Nbmin {
        /// Where.
        line: usize,
        /// What it says.
        nbmin: usize,
        /// Hosts in the file.
        hosts: usize,
    },
}

impl HostsFile {
    /// Reads the text of a hosts file. `resolve` turns a name that isn't an IP address into one.
    ///
    /// # Errors
    /// The first thing wrong, with its line.
    pub fn parse(text: &str, resolve: impl Fn(&str) -> Option<IpAddr>) -> Result<Self, HostsError> {
        let mut hosts: Vec<HostLine> = Vec::new();
        let mut explicit_ids = Vec::new();
        let mut nbmin = None;
        for (index, raw) in text.lines().enumerate() {
            let line = index + 1;
            let mut words = raw.split('#').next().unwrap_or_default().split_whitespace();
            let Some(first) = words.next() else { continue };
            if let Some(value) = first.strip_prefix("nbmin=") {
                let count = number(line, first, value)?;
                if let Some(word) = words.next() {
                    return Err(bad(line, word, "nothing may follow nbmin=N"));
                }
                nbmin = Some((line, count as usize));
                continue;
            }
            if hosts.len() == MAX_HOSTS {
                return Err(HostsError::TooMany { line });
            }
            let (address, port) = parse_address(line, first, &resolve)?;
            let mut host = HostLine {
                line,
                address,
                port,
                id: 0,
                cpus: None,
                memory: None,
                cache: None,
                disks: Vec::new(),
            };
            let mut id = None;
            for word in words {
                match word.split_once('=') {
                    Some(("id", value)) => id = Some(number(line, word, value)?),
                    Some(("cpus", value)) => match number(line, word, value)? {
                        0 => return Err(bad(line, word, "a host runs at least one vCPU")),
                        count => host.cpus = Some(count),
                    },
                    Some((name @ ("mem" | "cache"), value)) => {
                        let size = super::size::parse(value).map_err(|reason| bad(line, word, &reason.to_string()))?;
                        let limit = if name == "mem" { &mut host.memory } else { &mut host.cache };
                        *limit = Some(size);
                    }
                    Some(("disk", value)) if !value.is_empty() => host.disks.push(value.into()),
                    _ => return Err(bad(line, word, "not one of id=N, cpus=N, mem=SIZE, cache=SIZE, disk=PATH")),
                }
            }
            explicit_ids.push(id);
            hosts.push(host);
        }
        if hosts.is_empty() {
            return Err(HostsError::Empty);
        }
        number_hosts(&mut hosts, &explicit_ids)?;
        check_addresses(&hosts)?;
        if let Some((line, count)) = nbmin {
            if count == 0 || count > hosts.len() {
                return Err(HostsError::Nbmin {
                    line,
                    nbmin: count,
                    hosts: hosts.len(),
                });
            }
        }
        Ok(Self {
            hosts,
            nbmin: nbmin.map(|(_, count)| count),
        })
    }
}

fn bad(line: usize, word: &str, reason: &str) -> HostsError {
    HostsError::Word {
        line,
        word: word.chars().take(80).collect(),
        reason: reason.into(),
    }
}

fn number(line: usize, word: &str, value: &str) -> Result<u32, HostsError> {
    value.parse().map_err(|_| bad(line, word, "not a whole number"))
}

/// `1.2.3.4`, `1.2.3.4:7447`, `::1`, `[::1]:7447`, `name`, `name:7447`.
fn parse_address(
    line: usize,
    word: &str,
    resolve: impl Fn(&str) -> Option<IpAddr>,
) -> Result<(IpAddr, Option<u16>), HostsError> {
    let (address, port) = if let Ok(address) = word.parse::<IpAddr>() {
        (address, None)
    } else if let Ok(socket) = word.parse::<SocketAddr>() {
        (socket.ip(), Some(socket.port()))
    } else {
        let (name, port) = match word.split_once(':') {
            Some((name, port)) => (
                name,
                Some(port.parse().map_err(|_| bad(line, word, "not an address[:port]"))?),
            ),
            None => (word, None),
        };
        let unknown = "neither an IP address nor a name in /etc/hosts (DNS is not asked)";
        (resolve(name).ok_or_else(|| bad(line, word, unknown))?, port)
    };
    if address.is_unspecified() || address.is_multicast() {
        return Err(bad(line, word, "not the address of a host"));
    }
    if port == Some(0) {
        return Err(bad(line, word, "port 0 is no port to connect to"));
    }
    Ok((address, port))
}

/// Hosts without `id=` take the lowest free numbers, in file order.
fn number_hosts(hosts: &mut [HostLine], explicit: &[Option<u32>]) -> Result<(), HostsError> {
    for (index, id) in explicit.iter().enumerate() {
        let Some(id) = *id else { continue };
        if let Some(first) = explicit[..index].iter().position(|other| *other == Some(id)) {
            return Err(HostsError::DuplicateId {
                line: hosts[index].line,
                first: hosts[first].line,
                id,
            });
        }
    }
    let mut free = (0..).filter(|id| !explicit.contains(&Some(*id)));
    for (host, id) in hosts.iter_mut().zip(explicit) {
        host.id = id.or_else(|| free.next()).unwrap_or_default();
    }
    Ok(())
}

/// The same address twice without a port means two daemons on one machine, but only where this
/// program starts them itself: on a loopback address.
fn check_addresses(hosts: &[HostLine]) -> Result<(), HostsError> {
    for (index, host) in hosts.iter().enumerate() {
        let same = |other: &&HostLine| {
            other.address == host.address
                && match (other.port, host.port) {
                    (None, None) => !host.address.is_loopback(),
                    (Some(a), Some(b)) => a == b,
                    // On loopback the line without a port takes any free one.
                    _ => !host.address.is_loopback() && other.socket() == host.socket(),
                }
        };
        if let Some(first) = hosts[..index].iter().find(same) {
            return Err(HostsError::DuplicateAddress {
                line: host.line,
                first: first.line,
                address: host.socket(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HostsFile, HostsError> {
        HostsFile::parse(text, |name| (name == "alpha").then(|| IpAddr::from([10, 0, 0, 9])))
    }

    #[test]
    fn a_whole_file() {
        let file = parse(
            "# the lab\n10.0.0.1 id=4 cpus=2 mem=1G cache=64M disk=/a disk=/b\n\nalpha:99 # by name\n[fd00::1]:8000\nfd00::2\nnbmin=2\n",
        )
        .unwrap();
        assert_eq!(file.nbmin, Some(2));
        assert_eq!(file.hosts.len(), 4);
        assert_eq!(file.hosts[0].id, 4);
        assert_eq!(file.hosts[0].socket(), "10.0.0.1:7447".parse().unwrap());
        assert_eq!((file.hosts[0].memory, file.hosts[0].cache), (Some(1 << 30), Some(64 << 20)));
        assert_eq!((file.hosts[1].memory, file.hosts[1].cache), (None, None));
        assert_eq!(file.hosts[0].disks, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(file.hosts[1].socket(), "10.0.0.9:99".parse().unwrap());
        assert_eq!(file.hosts[2].to_string(), "[fd00::1]:8000");
        assert_eq!(file.hosts.iter().map(|h| h.id).collect::<Vec<_>>(), [4, 0, 1, 2]);
        assert_eq!(file.hosts[3].line, 6);
    }

    #[test]
    fn two_loopback_lines_are_two_nodes() {
        assert_eq!(parse("127.0.0.1\n127.0.0.1\n127.0.0.1:7447\n").unwrap().hosts.len(), 3);
        assert!(matches!(
            parse("127.0.0.1:9\n127.0.0.1:9\n"),
            Err(HostsError::DuplicateAddress { line: 2, first: 1, .. })
        ));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        assert_eq!(parse("# nothing\n\n"), Err(HostsError::Empty));
        for (text, at) in [
            ("10.0.0.1\nnot-a-host\n", 2),
            ("10.0.0.1 colour=red", 1),
            ("10.0.0.1 cpus=many", 1),
            ("10.0.0.1 cpus=0", 1),
            ("10.0.0.1 mem=12Q", 1),
            ("10.0.0.1 cache=much", 1),
            ("10.0.0.1 disk=", 1),
            ("10.0.0.1:0", 1),
            ("10.0.0.1:70000", 1),
            ("0.0.0.0", 1),
            ("10.0.0.1\nnbmin=1 x", 2),
            ("10.0.0.1\nnbmin=x", 2),
        ] {
            assert!(
                matches!(parse(text), Err(HostsError::Word { line, .. }) if line == at),
                "{text:?}: {:?}",
                parse(text)
            );
        }
        assert_eq!(
            parse("10.0.0.1 id=3\n10.0.0.2\n10.0.0.3 id=3"),
            Err(HostsError::DuplicateId {
                line: 3,
                first: 1,
                id: 3
            })
        );
        assert!(matches!(
            parse("10.0.0.1\n10.0.0.1:7447"),
            Err(HostsError::DuplicateAddress { line: 2, first: 1, .. })
        ));
        assert!(matches!(
            parse("10.0.0.1\n10.0.0.1"),
            Err(HostsError::DuplicateAddress { line: 2, .. })
        ));
        assert_eq!(
            parse("nbmin=2\n10.0.0.1"),
            Err(HostsError::Nbmin {
                line: 1,
                nbmin: 2,
                hosts: 1
            })
        );
        let many = (0..=MAX_HOSTS).map(|i| format!("10.0.1.{i}\n")).collect::<String>();
        assert_eq!(parse(&many), Err(HostsError::TooMany { line: MAX_HOSTS + 1 }));
    }
}
