//! The way to a machine: its control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use krg_vmm::cluster::{errno, sockets};
use serde_json::Value;

use crate::Trouble;

/// Most bytes of an answer that are read.
const MAX_ANSWER: u64 = 64 << 20;

/// A connection to a machine.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket `api`, or the machine of this name, or the only one running here.
    ///
    /// # Errors
    /// When there is none, or more than one to choose from.
    pub fn connect(api: Option<&Path>, machine: Option<&str>) -> Result<Self, Trouble> {
        let path = match api {
            Some(path) => path.to_owned(),
            None => find(sockets::directory().as_deref(), machine)?,
        };
        let stream = UnixStream::connect(&path).map_err(|error| {
            Trouble::NoMachine(format!("no machine at {}: {}", path.display(), errno::describe(&error)))
        })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer, however long that takes.
    ///
    /// # Errors
    /// When the answer is a refusal, or there is none.
    pub fn ask(&mut self, request: &Value) -> Result<Value, Trouble> {
        let over = |error| Trouble::NoMachine(format!("the machine has ended: {}", errno::describe(&error)));
        let mut line = request.to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(over)?;
        let mut answer = Vec::new();
        self.stream.by_ref().take(MAX_ANSWER).read_until(b'\n', &mut answer).map_err(over)?;
        if answer.is_empty() {
            let line = "ECONNRESET: the machine has closed the connection: it has ended, or has too many clients";
            return Err(Trouble::NoMachine(line.into()));
        }
        match serde_json::from_slice::<Value>(&answer) {
            Ok(answer) if answer["ok"] == true => Ok(answer),
            Ok(answer) => Err(Trouble::Refused(answer)),
            Err(_) => Err(Trouble::NoMachine("EPROTO: what listens on that socket is no machine of krg-vmm's".into())),
        }
    }
}

/// The socket of the machine of this name in `directory`, or of the only one.
fn find(directory: Option<&Path>, machine: Option<&str>) -> Result<PathBuf, Trouble> {
    let Some(directory) = directory else {
        let line = "neither KRG_RUNTIME_DIR nor XDG_RUNTIME_DIR says where machines of yours are; use --api";
        return Err(Trouble::NoMachine(format!("ENOENT: {line}")));
    };
    if let Some(name) = machine {
        return Ok(sockets::path(directory, name, 1));
    }
    let running = sockets::running(directory)
        .map_err(|error| Trouble::NoMachine(format!("{}: {}", directory.display(), errno::describe(&error))))?;
    match &running[..] {
        [] => {
            let line = format!("ENOENT: no machine of yours runs on this host (none in {}); use --api", directory.display());
            Err(Trouble::NoMachine(line))
        }
        [(_, path)] => Ok(path.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(Trouble::Usage(format!("several machines run on this host: say which, --machine {}", names.join(" or "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::json;
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn answered(answer: &'static [u8]) -> Result<Value, Trouble> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let machine = thread::spawn(move || {
            let mut request = String::new();
            BufReader::new(&theirs).read_line(&mut request).unwrap();
            (&theirs).write_all(answer).unwrap();
            request
        });
        let result = Client { stream: BufReader::new(ours) }.ask(&json!({"cmd": "status"}));
        assert_eq!(machine.join().unwrap(), "{\"cmd\":\"status\"}\n");
        result
    }

    #[test]
    fn answers() {
        assert_eq!(answered(b"{\"ok\":true,\"a\":1}\n").unwrap()["a"], 1);
        assert!(matches!(answered(b"{\"ok\":false,\"error\":\"x\"}\n"), Err(Trouble::Refused(answer)) if answer["error"] == "x"));
        assert!(matches!(answered(b""), Err(Trouble::NoMachine(line)) if line.contains("ECONNRESET")));
        assert!(matches!(answered(b"220 ready\n"), Err(Trouble::NoMachine(line)) if line.contains("EPROTO")));
    }

    #[test]
    fn the_only_machine_is_found_and_of_several_one_is_to_be_named() {
        let dir = TempDir::new_with_prefix("/tmp/krg-client").unwrap();
        let dir = dir.as_path();
        let found = || find(Some(dir), None);
        assert!(matches!(found(), Err(Trouble::NoMachine(line)) if line.contains("ENOENT")));
        let _a = UnixListener::bind(dir.join("a.sock")).unwrap();
        drop(UnixListener::bind(dir.join("dead.sock")).unwrap());
        assert_eq!(found().unwrap(), dir.join("a.sock"));
        let _b = UnixListener::bind(dir.join("b.sock")).unwrap();
        assert!(matches!(found(), Err(Trouble::Usage(line)) if line.contains("a or b")));
        assert_eq!(find(Some(dir), Some("b")).unwrap(), dir.join("b.sock"));
        assert!(matches!(find(None, None), Err(Trouble::NoMachine(_))));
    }
}
