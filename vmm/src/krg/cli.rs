//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand};
use serde_json::Value;

/// See and change where a running krg-vmm machine runs its vCPUs.
///
/// Each command waits until what it asks for has happened.
#[derive(Debug, Parser)]
#[command(name = "krg", version, after_help = AFTER)]
pub struct Cli {
    /// The machine's control socket [default: that of the only machine running here]
    #[arg(long, global = true, value_name = "SOCKET", env = "KRG_API")]
    pub api: Option<PathBuf>,
    /// The machine of this name, where several run on this host
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "api")]
    pub machine: Option<String>,
    /// Print the answer as one JSON document
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
vCPUs are written as vcpu2 or 2, nodes as their numbers in `krg nodes status`, pages as guest-physical
addresses, 0x1f000.

Control sockets are in $KRG_RUNTIME_DIR, for root in /run/krg-vmm, for others in $XDG_RUNTIME_DIR/krg-vmm:
NAME.sock of the machine's --name, NAME-2.sock if a second machine has it.

Exit status: 0 done (or nothing was to be done), 1 refused or failed, at least in part, 2 wrong usage, 3 no
machine to talk to. What was refused is said on standard error, a line each, with the error's name:
EINVAL no such node, policy or address; ENONET the node is not online; ESRCH no such vCPU; EPERM pinned
elsewhere, or without the capability MIGRATE; EAGAIN the vCPU is being started; EHOSTDOWN a node was lost;
EFAULT not guest memory.

A figure that is not known is shown as -.";

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The hosts
    #[command(subcommand)]
    Nodes(Nodes),
    /// The vCPUs: where each runs, its load, why it is there
    Ps,
    /// Move a vCPU to a node, or to where the machine's start put it
    Migrate {
        /// Which, or `all` that may move
        #[arg(value_name = "VCPU|all", allow_hyphen_values = true)]
        vcpu: String,
        /// Where to
        #[arg(value_name = "NODE|home", allow_hyphen_values = true)]
        node: String,
    },
    /// Who decides where vCPUs run
    #[command(subcommand)]
    Sched(Sched),
    /// Move a vCPU to a node and keep it there, or lift that
    Pin {
        /// Which
        #[arg(value_name = "VCPU", allow_hyphen_values = true)]
        vcpu: String,
        /// Where
        #[arg(value_name = "NODE|none", allow_hyphen_values = true)]
        node: String,
    },
    /// Give (+) or take (-) a capability; without MIGRATE nothing moves a vCPU
    Capset {
        /// Which capability
        #[arg(value_name = "[+|-]MIGRATE", allow_hyphen_values = true, action = ArgAction::Set, value_parser = capability)]
        migrate: bool,
        /// Whose
        #[arg(value_name = "VCPU|all", allow_hyphen_values = true)]
        vcpu: String,
    },
    /// Why a vCPU is where it is, or who fights for a page
    Explain {
        /// vcpu2 or 2; or a page's address, 0x1f000
        #[arg(value_name = "VCPU|PAGE", allow_hyphen_values = true)]
        what: String,
    },
    /// Watch hosts, vCPUs and the pages that hosts fight for; q ends it
    Top {
        /// Print one picture, when all nodes have told their figures twice or after 12 s
        #[arg(long)]
        once: bool,
    },
}

/// `krg nodes`.
#[derive(Debug, Subcommand)]
pub enum Nodes {
    /// Every host of the machine: whether it is online, its vCPUs and memory, what it counted since the start
    Status,
}

/// `krg sched`.
#[derive(Debug, Subcommand)]
pub enum Sched {
    /// The policy at work
    Show,
    /// Have another policy decide from now on
    Set {
        /// Its name, or `off`: vCPUs stay where they are
        #[arg(value_name = "NAME|off")]
        policy: String,
    },
}

fn capability(word: &str) -> Result<bool, String> {
    let (give, name) = match word.split_at_checked(1) {
        Some(("+", name)) => (true, name),
        Some(("-", name)) => (false, name),
        _ => (true, word),
    };
    if name.eq_ignore_ascii_case("MIGRATE") {
        Ok(give)
    } else {
        Err("EINVAL: there is no such capability; there is MIGRATE".into())
    }
}

/// What to explain.
#[derive(Debug, PartialEq)]
pub enum Explained {
    /// A vCPU.
    Vcpu(Value),
    /// A page, by its address.
    Page(Value),
}

/// Addresses are hexadecimal with 0x; all else is a vCPU.
pub fn explained(word: &str) -> Explained {
    if word.starts_with("0x") || word.starts_with("0X") {
        Explained::Page(word.into())
    } else {
        Explained::Vcpu(vcpu(word))
    }
}

/// `vcpu2` or `2`; what is none is for the machine to refuse.
pub fn vcpu(word: &str) -> Value {
    number(word.strip_prefix("vcpu").filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())).unwrap_or(word))
}

/// A node; what is none is for the machine to refuse.
pub fn node(word: &str) -> Value {
    number(word)
}

fn number(word: &str) -> Value {
    if word.starts_with('+') {
        return word.into();
    }
    word.parse::<i64>().map_or_else(|_| word.into(), Value::from)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use serde_json::json;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(words.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn capabilities_with_their_signs() {
        let of = |words: &str| match parse(words).map(|cli| (cli.json, cli.command)) {
            Ok((json, Command::Capset { migrate, vcpu })) => Some((json, migrate, vcpu)),
            _ => None,
        };
        assert_eq!(of("krg capset -MIGRATE vcpu1"), Some((false, false, "vcpu1".into())));
        assert_eq!(of("krg capset +MIGRATE all"), Some((false, true, "all".into())));
        assert_eq!(of("krg capset migrate 1"), Some((false, true, "1".into())));
        assert_eq!(of("krg --json capset -MIGRATE -1"), Some((true, false, "-1".into())));
        assert_eq!(of("krg capset --json -MIGRATE 1"), Some((true, false, "1".into())));
        assert_eq!(of("krg capset -MIGRATE vcpu1 --json"), Some((true, false, "vcpu1".into())));
        for wrong in ["krg capset -FLY vcpu1", "krg capset + vcpu1", "krg capset -MIGRATE", "krg capset é 1"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_number_goes_to_the_machine_as_it_is() {
        assert!(matches!(parse("krg migrate vcpu1 -1").unwrap().command, Command::Migrate { node, .. } if node == "-1"));
        assert_eq!([vcpu("vcpu2"), vcpu("2"), vcpu("-1"), vcpu("99")], [json!(2), json!(2), json!(-1), json!(99)]);
        let words = ["all", "vcpu", "vcpu-1", "vcpux", "+2", "vcpu2x", "", "184467440737095516150"];
        for word in words {
            assert!(vcpu(word).is_string(), "{word}");
        }
        assert_eq!([node("1"), node("abc"), node("home")], [json!(1), json!("abc"), json!("home")]);
        assert_eq!(explained("vcpu3"), Explained::Vcpu(json!(3)));
        assert_eq!(explained("0x1f000"), Explained::Page(json!("0x1f000")));
        assert_eq!(explained("nobody"), Explained::Vcpu(json!("nobody")));
    }

    #[test]
    fn wrong_usage() {
        for wrong in ["krg", "krg migrate vcpu1", "krg nodes", "krg sched set", "krg fly", "krg ps --api a --machine b"] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
