//! The control socket (`--api`): a Unix socket on which programs ask one JSON object a line; `krg` is one of them.
//!
//! | request | what it does; members of a good answer besides `"ok":true` |
//! |---|---|
//! | `{"cmd":"status"}` | `"status"`: the nodes with their figures, the vCPUs, where each is and why |
//! | `{"cmd":"stop"}` | ends the machine |
//! | `{"cmd":"migrate","vcpu":N,"node":M}` | moves a vCPU to a node, or to where the placement put it (`"home"`); answered when it is there. `"moved"` is false, with a `"message"`, if it was before. With `"vcpu":"all"` moves all that may: `"moved"`, `"there"` and `"refused"` list them |
//! | `{"cmd":"pin","vcpu":N,"node":M}` | moves it there and lets nothing move it away; `null` lifts the pin |
//! | `{"cmd":"capset","vcpu":N,"migrate":BOOL}` | gives or takes the capability to move; also for `"all"` |
//! | `{"cmd":"sched"}`, with `"policy":"NAME"` | `"sched"`: who decides where vCPUs run; has another decide, or none (`"off"`) |
//! | `{"cmd":"explain","vcpu":N}` or `"page":GPA` | `"explain"`: why it is there; who fights for the page |
//!
//! What fails is answered by `{"ok":false,"error":"..."}`, with `"errno"` where there is one, and has changed nothing.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};

use super::errno;

/// Most bytes of one request.
const MAX_REQUEST: u64 = 64 << 10;
/// Most clients at one time.
const MAX_CLIENTS: usize = 16;
/// A client that takes nothing for this long is dropped.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// What runs where, with the figures every node told last (some seconds ago at most): faults, messages,
    /// the pages hosts fight for and the vCPUs that do.
    Status,
    /// End the machine now.
    Stop,
    /// Move a vCPU to another node. What isn't a number is none of this machine's.
    Migrate {
        /// The vCPU, or `"all"` that may move.
        vcpu: Value,
        /// The node, or `"home"`, where the placement put it.
        node: Value,
    },
    /// Move a vCPU to a node and keep it there.
    Pin {
        /// The vCPU.
        vcpu: Value,
        /// The node; null: it may go anywhere again.
        node: Value,
    },
    /// Give or take the capability MIGRATE.
    Capset {
        /// The vCPU, or `"all"`.
        vcpu: Value,
        /// Whether it may move.
        migrate: bool,
    },
    /// Who decides where vCPUs run.
    Sched {
        /// Who is to from now on, if somebody else.
        policy: Option<String>,
    },
    /// Why is it so? One of the two.
    Explain {
        /// Why is this vCPU where it is?
        vcpu: Option<Value>,
        /// Who fights for the page at this guest-physical address, a number or a text (`"0x1f000"`)?
        page: Option<Value>,
    },
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The error's symbol.
    pub errno: &'static str,
    /// One line for people.
    pub line: String,
}

impl Failure {
    /// With the error's symbol, and one line for people.
    pub fn new(errno: &'static str, line: String) -> Self {
        Self { errno, line }
    }
}

/// The listening socket; dropping it removes the file.
pub struct Api {
    path: PathBuf,
}

impl Api {
    /// Listens on `path`, for this user alone. `answer` gives the members that a good answer has
    /// besides `ok`.
    ///
    /// # Errors
    /// One line for people.
    pub fn listen(path: &Path, answer: impl Fn(Request) -> Result<Value, Failure> + Send + Sync + 'static) -> Result<Self, String> {
        let failed = |error: &io::Error| format!("--api {}: {}", path.display(), errno::describe(error));
        remove_stale(path)?;
        let listener = listen_alone(path).map_err(|error| failed(&error))?;
        let api = Self { path: path.into() };
        let answer = Arc::new(answer);
        let clients = Arc::new(AtomicUsize::new(0));
        thread::Builder::new()
            .name("api".into())
            .spawn(move || {
                for client in listener.incoming() {
                    let Ok(client) = client else {
                        thread::sleep(Duration::from_millis(100));
                        continue;
                    };
                    if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
                        clients.fetch_sub(1, Ordering::SeqCst);
                        continue;
                    }
                    let (answer, served) = (answer.clone(), clients.clone());
                    let spawned = thread::Builder::new().name("api-client".into()).spawn(move || {
                        serve(&client, &*answer);
                        served.fetch_sub(1, Ordering::SeqCst);
                    });
                    if spawned.is_err() {
                        clients.fetch_sub(1, Ordering::SeqCst);
                    }
                }
            })
            .map_err(|error| failed(&error))?;
        Ok(api)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A listening socket whose file nobody but this user can open, at no moment: Linux gives the file the socket's own
/// mode. (The umask is the whole process's, so it is left alone.)
fn listen_alone(path: &Path) -> io::Result<UnixListener> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    net::listen(&socket, MAX_CLIENTS as i32)?;
    Ok(socket.into())
}

/// Removes a socket that a killed front end left behind; nobody answers on that.
fn remove_stale(path: &Path) -> Result<(), String> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(format!(
            "--api {}: EEXIST (there is a file already that is no socket)",
            path.display()
        ));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(format!(
            "--api {}: EADDRINUSE (another program listens on it)",
            path.display()
        ));
    }
    fs::remove_file(path).map_err(|error| format!("--api {}: {}", path.display(), errno::describe(&error)))
}

fn serve(client: &UnixStream, answer: &dyn Fn(Request) -> Result<Value, Failure>) {
    let _ = client.set_write_timeout(Some(WRITE_LIMIT));
    let mut reader = BufReader::new(client);
    let mut writer = client;
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_REQUEST).read_until(b'\n', &mut line) {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        let complete = line.last() == Some(&b'\n');
        let mut reply = respond(&line, complete, answer).to_string();
        reply.push('\n');
        if writer.write_all(reply.as_bytes()).is_err() || !complete {
            return;
        }
    }
}

fn respond(line: &[u8], complete: bool, answer: &dyn Fn(Request) -> Result<Value, Failure>) -> Value {
    if !complete && line.len() as u64 == MAX_REQUEST {
        return json!({"ok": false, "error": format!("a request of more than {MAX_REQUEST} bytes")});
    }
    match serde_json::from_slice(line) {
        Ok(request) => match answer(request) {
            Ok(mut reply) => {
                if let Value::Object(members) = &mut reply {
                    members.insert("ok".into(), true.into());
                }
                reply
            }
            Err(Failure { errno, line }) => json!({"ok": false, "errno": errno, "error": format!("{errno}: {line}")}),
        },
        Err(error) => json!({"ok": false, "error": format!("not a request: {error}")}),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn ask(path: &Path, text: &[u8]) -> Vec<Value> {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(text).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        BufReader::new(client)
            .lines()
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect()
    }

    #[test]
    fn requests_and_nonsense() {
        let dir = TempDir::new_with_prefix("/tmp/krg-api").unwrap();
        let path = dir.as_path().join("api");
        let api = Api::listen(&path, |request| match request {
            Request::Status => Ok(json!({"status": 7})),
            Request::Stop => Ok(json!({})),
            Request::Migrate { vcpu, node } => Err(Failure::new("EINVAL", format!("{vcpu} to {node}"))),
            other => Ok(json!({"asked": format!("{other:?}")})),
        })
        .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let replies = ask(
            &path,
            b"{\"cmd\":\"status\"}\n{\"cmd\":\"stop\"}\n{\"cmd\":\"fly\"}\nnonsense\n{\"cmd\":\"migrate\",\"vcpu\":-1,\"node\":\"abc\"}\n{\"cmd\":\"migrate\"}\n",
        );
        assert_eq!(replies[4], json!({"ok": false, "errno": "EINVAL", "error": "EINVAL: -1 to \"abc\""}));
        assert_eq!(replies[5]["ok"], false);
        assert_eq!(replies[0], json!({"ok": true, "status": 7}));
        assert_eq!(replies[1], json!({"ok": true}));
        assert_eq!((&replies[2]["ok"], &replies[3]["ok"]), (&json!(false), &json!(false)));
        let replies = ask(&path, &vec![b'['; MAX_REQUEST as usize]);
        assert!(replies[0]["error"].as_str().unwrap().contains("more than"));
        assert!(Api::listen(&path, |_| Ok(json!({}))).is_err_and(|line| line.contains("EADDRINUSE")));
        drop(api);
        assert!(!path.exists());
    }

    #[test]
    fn only_this_user_may_open_it_whoever_else_listens() {
        let dir = TempDir::new_with_prefix("/tmp/krg-api").unwrap();
        thread::scope(|scope| {
            for number in 0..4 {
                let path = dir.as_path().join(number.to_string());
                scope.spawn(move || {
                    for _ in 0..16 {
                        let _api = Api::listen(&path, |_| Ok(json!({}))).unwrap();
                        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
                    }
                });
            }
        });
    }

    #[test]
    fn every_request_is_read_and_what_is_missing_or_too_much_is_refused() {
        let read = |text: &str| serde_json::from_str::<Request>(text).ok();
        assert_eq!(read(r#"{"cmd":"pin","vcpu":1,"node":null}"#), Some(Request::Pin { vcpu: json!(1), node: json!(null) }));
        assert_eq!(
            read(r#"{"cmd":"capset","vcpu":"all","migrate":false}"#),
            Some(Request::Capset { vcpu: json!("all"), migrate: false })
        );
        assert_eq!(read(r#"{"cmd":"sched"}"#), Some(Request::Sched { policy: None }));
        assert_eq!(read(r#"{"cmd":"sched","policy":"off"}"#), Some(Request::Sched { policy: Some("off".into()) }));
        assert_eq!(
            read(r#"{"cmd":"explain","page":"0x1000"}"#),
            Some(Request::Explain { vcpu: None, page: Some(json!("0x1000")) })
        );
        for bad in [
            r#"{"cmd":"pin","vcpu":1}"#,
            r#"{"cmd":"pin","vcpu":1,"node":0,"now":true}"#,
            r#"{"cmd":"capset","vcpu":1,"migrate":"no"}"#,
            r#"{"cmd":"capset","vcpu":1}"#,
            r#"{"cmd":"sched","policy":3}"#,
            r#"{"cmd":"migrate","vcpu":1}"#,
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let dir = TempDir::new_with_prefix("/tmp/krg-api").unwrap();
        let path = dir.as_path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Api::listen(&path, |_| Ok(json!({}))).unwrap());
        fs::write(&path, "data").unwrap();
        assert!(Api::listen(&path, |_| Ok(json!({}))).is_err_and(|line| line.contains("EEXIST")));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}
