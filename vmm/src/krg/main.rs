//! `krg`: the administrator's command. It asks a running machine over its control socket.

mod cli;
mod client;
mod commands;
mod frame;
mod model;
mod show;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use cli::Cli;

/// Why a command failed, with the exit status that says so.
#[derive(Debug)]
pub enum Trouble {
    /// The machine refused, or failed. Its answer, with `error`.
    Refused(Value),
    /// What was done, and what of it was refused: lines for standard output and for standard error.
    Partly(Value, String, Vec<String>),
    /// Not a command that can be carried out as it was written.
    Usage(String),
    /// There is no machine to talk to, or not any more.
    NoMachine(String),
    /// Something of this host.
    System(String),
}

/// What a command has to say: the answer for programs, the same for people.
pub struct Said {
    /// One JSON document.
    pub json: Value,
    /// Lines, each with its end.
    pub text: String,
}

impl Trouble {
    fn status(&self) -> u8 {
        match self {
            Self::Refused(_) | Self::Partly(..) | Self::System(_) => 1,
            Self::Usage(_) => 2,
            Self::NoMachine(_) => 3,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match commands::run(cli) {
        Ok(said) => match print(&if json { format!("{}\n", said.json) } else { said.text }) {
            Ok(()) => ExitCode::SUCCESS,
            Err(line) => failed(&line, 1),
        },
        Err(trouble) => {
            let status = trouble.status();
            let (answer, text, lines) = match trouble {
                Trouble::Partly(answer, text, lines) => (answer, text, lines),
                Trouble::Refused(answer) => {
                    let line = krg_vmm::cluster::status::text(&answer["error"]).unwrap_or_else(|| "refused".into());
                    (answer, String::new(), vec![line])
                }
                Trouble::Usage(line) | Trouble::NoMachine(line) | Trouble::System(line) => {
                    (json!({"ok": false, "error": line}), String::new(), vec![line])
                }
            };
            let printed = print(&if json { format!("{answer}\n") } else { text });
            for line in lines {
                failed(&line, status);
            }
            printed.map_or_else(|line| failed(&line, 1), |()| ExitCode::from(status))
        }
    }
}

fn failed(line: &str, status: u8) -> ExitCode {
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "krg: {line}");
    ExitCode::from(status)
}

/// Writes to standard output. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("standard output: {}", krg_vmm::cluster::errno::describe(&error)))
        }
        _ => Ok(()),
    }
}
