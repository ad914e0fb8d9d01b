//! What each command asks the machine, and says of the answer.

use krg_vmm::cluster::status::{Status, text};
use serde_json::{Value, json};

use crate::cli::{self, Cli, Command, Explained, Nodes, Sched};
use crate::client::Client;
use crate::{Said, Trouble, show, top};

/// Carries out a command.
///
/// # Errors
/// When it was not done, or not all of it.
pub fn run(cli: Cli) -> Result<Said, Trouble> {
    if let Command::Top { once: false } = cli.command {
        top::possible(cli.json)?;
    }
    let mut client = Client::connect(cli.api.as_deref(), cli.machine.as_deref())?;
    match cli.command {
        Command::Nodes(Nodes::Status) => {
            let status = status(&mut client)?;
            Ok(Said { text: show::nodes(&Status::read(&status)), json: json!({"ok": true, "nodes": status["nodes"]}) })
        }
        Command::Ps => {
            let status = status(&mut client)?;
            Ok(Said { text: show::vcpus(&Status::read(&status)), json: json!({"ok": true, "vcpus": status["vcpus"]}) })
        }
        Command::Migrate { vcpu, node } => {
            let request = json!({"cmd": "migrate", "vcpu": cli::vcpu(&vcpu), "node": cli::node(&node)});
            let answer = client.ask(&request)?;
            if vcpu == "all" { all_moved(answer) } else { Ok(said(answer, show::moved)) }
        }
        Command::Pin { vcpu, node } => {
            let node = if node == "none" { Value::Null } else { cli::node(&node) };
            let answer = client.ask(&json!({"cmd": "pin", "vcpu": cli::vcpu(&vcpu), "node": node}))?;
            Ok(said(answer, show::pinned))
        }
        Command::Capset { migrate, vcpu } => {
            let answer = client.ask(&json!({"cmd": "capset", "vcpu": cli::vcpu(&vcpu), "migrate": migrate}))?;
            Ok(said(answer, show::capable))
        }
        Command::Sched(Sched::Show) => Ok(said(client.ask(&json!({"cmd": "sched"}))?, show::sched)),
        Command::Sched(Sched::Set { policy }) => {
            Ok(said(client.ask(&json!({"cmd": "sched", "policy": policy}))?, show::sched))
        }
        Command::Explain { what } => {
            let (request, show): (_, fn(&Value) -> String) = match cli::explained(&what) {
                Explained::Vcpu(vcpu) => (json!({"cmd": "explain", "vcpu": vcpu}), show::vcpu_explained),
                Explained::Page(page) => (json!({"cmd": "explain", "page": page}), show::page_explained),
            };
            Ok(said(client.ask(&request)?, |answer| show(&answer["explain"])))
        }
        Command::Top { once: true } => top::once(client),
        Command::Top { once: false } => top::watch(client),
    }
}

/// What the machine says of itself.
pub fn status(client: &mut Client) -> Result<Value, Trouble> {
    Ok(client.ask(&json!({"cmd": "status"}))?["status"].take())
}

fn said(answer: Value, show: impl Fn(&Value) -> String) -> Said {
    Said { text: show(&answer), json: answer }
}

/// After a move of all: a failure if some did not move that should have.
fn all_moved(answer: Value) -> Result<Said, Trouble> {
    let lines = show::all_moved(&answer);
    let refused: Vec<String> = answer["refused"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| format!("{}: {}", text(&one["errno"]).unwrap_or_default(), text(&one["error"]).unwrap_or_default()))
        .collect();
    if refused.is_empty() { Ok(Said { text: lines, json: answer }) } else { Err(Trouble::Partly(answer, lines, refused)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_moves_those_that_were_refused_are_said_apart() {
        let answer = json!({"ok": true, "moved": [{"vcpu": 0, "from": 0, "node": 1}], "there": [{"vcpu": 1, "node": 1}],
            "refused": []});
        let said = all_moved(answer.clone()).unwrap_or_else(|trouble| panic!("{trouble:?}"));
        assert_eq!(said.text, "vCPU 0 moved from node 0 to node 1\nvCPU 1 is on node 1 already\n");
        let mut partly = answer;
        partly["refused"] = json!([{"vcpu": 2, "errno": "EPERM", "error": "vCPU 2 is pinned"}]);
        match all_moved(partly) {
            Err(Trouble::Partly(_, lines, refused)) => {
                assert_eq!((lines.lines().count(), refused), (2, vec!["EPERM: vCPU 2 is pinned".to_owned()]));
            }
            _ => panic!("not all were moved"),
        }
    }
}
