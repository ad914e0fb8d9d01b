//! The program itself, with two node processes on this machine, booting the kernel of [`super::kernel`].

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

use super::kernel;

pub const PATIENCE: Duration = Duration::from_secs(60);

/// The front end with a kernel to boot, in a folder of its own.
pub struct Program {
    pub child: Child,
    pub place: TempDir,
    console: Receiver<String>,
    said: String,
}

/// How it ended.
pub struct Ended {
    pub status: Option<i32>,
    pub console: String,
    pub message: String,
    pub took: Duration,
}

impl Program {
    /// Two vCPUs, which nobody moves but the test.
    fn start(kernel: &[u8], hosts: Option<&str>, memory: &str) -> Self {
        Self::start_with(kernel, hosts, &["--cpus", "2", "--memory", memory, "--sched", "off"])
    }

    /// With these options.
    pub fn start_with(kernel: &[u8], hosts: Option<&str>, words: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_krg-vmm"));
        command.args(["--api", "api"]).args(words);
        Self::start_by(command, kernel, hosts)
    }

    /// `command` is the program with options, or runs it with what is added.
    pub fn start_by(mut command: Command, kernel: &[u8], hosts: Option<&str>) -> Self {
        let place = TempDir::new_with_prefix("/tmp/krg-local").unwrap();
        let path = |name: &str| place.as_path().join(name);
        fs::write(path("kernel"), kernel).unwrap();
        // For hosts that are not all loopback.
        fs::write(path("secret"), [b'x'; 32]).unwrap();
        fs::set_permissions(path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        if let Some(hosts) = hosts {
            fs::write(place.as_path().join("hosts.txt"), hosts).unwrap();
            command.args(["--nodes", "hosts.txt"]);
        }
        let mut child = command
            .args(["--kernel", "kernel"])
            .current_dir(place.as_path())
            .env("HOME", place.as_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (said, console) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(len @ 1..) = stdout.read(&mut bytes) {
                if said.send(String::from_utf8_lossy(&bytes[..len]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            place,
            console,
            said: String::new(),
        }
    }

    /// Waits until the console has shown `text`.
    pub fn wait_for(&mut self, text: &str) {
        while !self.said.contains(text) {
            match self.console.recv_timeout(PATIENCE) {
                Ok(more) => self.said += &more,
                Err(error) => panic!("{error}: the console showed {:?}", self.said),
            }
        }
    }

    /// Asks on the control socket, once it is there.
    pub fn ask(&self, request: &str) -> Value {
        ask(self.place.as_path(), request).unwrap()
    }

    /// The node that was told to listen at `address`.
    fn node(&self, address: &str) -> Pid {
        let found = processes(self.place.as_path()).into_iter().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            words.get(1) == Some(&&b"node"[..]) && words.contains(&address.as_bytes())
        });
        Pid::from_raw(found.expect("the node runs")).unwrap()
    }

    /// Waits for the end and checks that nothing is left.
    pub fn end(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                panic!(
                    "no end; the console showed {:?}{:?}",
                    self.said,
                    self.console.try_iter().collect::<String>()
                );
            }
            thread::sleep(Duration::from_millis(5));
        };
        let took = start.elapsed();
        thread::sleep(Duration::from_millis(100));
        let left = processes(self.place.as_path());
        assert!(left.is_empty(), "processes left: {left:?}");
        let mut message = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
        let console = self.console.iter().fold(std::mem::take(&mut self.said), |said, more| said + &more);
        Ended {
            status: status.code(),
            console,
            message,
            took,
        }
    }
}

impl Drop for Program {
    /// A test that failed leaves nothing running: nodes end with their front end.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks the front end in `place` on its control socket; `None`: it is gone.
fn ask(place: &Path, request: &str) -> Option<Value> {
    let mut socket = UnixStream::connect(place.join("api")).ok()?;
    socket.write_all(format!("{request}\n").as_bytes()).ok()?;
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

/// Processes that work in `place`: a front end's own and its nodes'.
fn processes(place: &Path) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == place))
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

/// Two hosts on this machine, each at a port of its own.
fn two_hosts() -> [String; 2] {
    // Both are held until both are known.
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().to_string())
}

fn counts_and_powers_off(hosts: Option<&str>, memory: &str) {
    const COUNT: u32 = 2000;
    let ended = Program::start(&kernel::elf(COUNT), hosts, memory).end();
    assert_eq!(ended.status, Some(0), "{}", ended.message);
    assert!(
        ended.console.contains(&kernel::line(COUNT)),
        "{:?} {}",
        ended.console,
        ended.message
    );
    println!("powered off after {:?}: {}", ended.took, ended.message);
}

#[test]
fn one_host_counts_and_powers_off() {
    counts_and_powers_off(None, "128M");
}

#[test]
fn two_hosts_count_and_power_off() {
    counts_and_powers_off(Some("127.0.0.1\n127.0.0.1\n"), "256M");
}

/// Both vCPUs change nodes again and again while they count, the one that prints and powers off ends away from
/// the devices, and what can't be done is refused, by distinct errors.
#[test]
fn vcpus_move_as_asked_over_the_control_socket() {
    const COUNT: u32 = 500_000;
    let mut program = Program::start(&kernel::elf(COUNT), Some("127.0.0.1\n127.0.0.1\n"), "256M");
    program.wait_for(kernel::HELLO);
    let migrate = |vcpu: &str, node: &str| program.ask(&format!(r#"{{"cmd":"migrate","vcpu":{vcpu},"node":{node}}}"#));
    let vcpus = || {
        let status = program.ask(r#"{"cmd":"status"}"#);
        [0, 1].map(|node| status["status"]["nodes"][node]["vcpus"].clone())
    };
    assert_eq!(vcpus(), [json!([0]), json!([1])]);
    for (vcpu, node, errno) in [
        ("0", "99", "EINVAL"),
        ("0", "-1", "EINVAL"),
        ("0", "\"abc\"", "EINVAL"),
        ("2", "1", "ESRCH"),
        ("-1", "1", "ESRCH"),
        ("\"abc\"", "1", "ESRCH"),
    ] {
        let answer = migrate(vcpu, node);
        assert_eq!((&answer["ok"], &answer["errno"]), (&json!(false), &json!(errno)), "{answer}");
    }
    let stays = migrate("1", "1");
    assert_eq!((&stays["ok"], &stays["moved"]), (&json!(true), &json!(false)), "{stays}");
    // A pin takes it there, and nothing takes it away; a capability is obeyed, too.
    let refused = |request: &str| program.ask(request)["errno"].clone();
    let pinned = program.ask(r#"{"cmd":"pin","vcpu":1,"node":0}"#);
    assert_eq!((&pinned["ok"], &pinned["moved"]), (&json!(true), &json!(true)), "{pinned}");
    assert_eq!(refused(r#"{"cmd":"migrate","vcpu":1,"node":1}"#), "EPERM");
    assert_eq!(program.ask(r#"{"cmd":"capset","vcpu":0,"migrate":false}"#)["ok"], true);
    assert_eq!(refused(r#"{"cmd":"pin","vcpu":0,"node":1}"#), "EPERM");
    let all = program.ask(r#"{"cmd":"migrate","vcpu":"all","node":1}"#);
    assert_eq!((&all["moved"], all["refused"].as_array().map(Vec::len)), (&json!([]), Some(2)), "{all}");
    assert_eq!(vcpus(), [json!([0, 1]), json!([])]);
    assert_eq!(program.ask(r#"{"cmd":"pin","vcpu":1,"node":null}"#)["ok"], true);
    assert_eq!(program.ask(r#"{"cmd":"capset","vcpu":"all","migrate":true}"#)["ok"], true);
    let all = program.ask(r#"{"cmd":"migrate","vcpu":"all","node":"home"}"#);
    assert_eq!((&all["moved"], &all["there"]), (&json!([{"vcpu": 1, "from": 0, "node": 1}]), &json!([{"vcpu": 0, "node": 0}])), "{all}");
    assert_eq!(vcpus(), [json!([0]), json!([1])]);
    for round in 0..25 {
        for (vcpu, node) in [("0", round + 1), ("1", round)] {
            let answer = migrate(vcpu, &(node % 2).to_string());
            assert_eq!((&answer["ok"], &answer["moved"]), (&json!(true), &json!(true)), "{answer}");
        }
    }
    assert_eq!(vcpus(), [json!([1]), json!([0])]);
    assert_eq!(migrate("1", "1")["moved"], json!(true));
    assert_eq!(vcpus(), [json!([]), json!([0, 1])]);
    let ended = program.end();
    assert_eq!(ended.status, Some(0), "{}", ended.message);
    assert!(ended.console.contains(&kernel::line(COUNT)), "{:?} {}", ended.console, ended.message);
}

/// Each node is killed once while both vCPUs go from one to the other all the time: nobody waits for ever.
#[test]
fn a_node_killed_while_vcpus_move_ends_the_machine_and_is_named() {
    for victim in [1, 0] {
        let hosts = two_hosts();
        let mut program = Program::start(&kernel::elf(u32::MAX), Some(&format!("{}\n{}\n", hosts[0], hosts[1])), "256M");
        program.wait_for(kernel::HELLO);
        let place = program.place.as_path().to_owned();
        let movers: Vec<_> = (0..2)
            .map(|vcpu| {
                let place = place.clone();
                thread::spawn(move || {
                    // The last request is answered, too, or the socket closed.
                    let mut moved = 0;
                    loop {
                        let request = format!(r#"{{"cmd":"migrate","vcpu":{vcpu},"node":{}}}"#, moved % 2);
                        match ask(&place, &request) {
                            Some(answer) if answer["ok"] == true => moved += 1,
                            Some(answer) if answer["errno"] == "EAGAIN" => {}
                            _ => return moved,
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        kill_and_be_told(program, &hosts, victim);
        let moved: Vec<u32> = movers.into_iter().map(|mover| mover.join().unwrap()).collect();
        assert!(moved.iter().all(|moved| *moved > 0), "{moved:?}");
    }
}

/// Kills a node: the machine ends soon, and says which it was.
fn kill_and_be_told(program: Program, hosts: &[String], victim: usize) {
    kill_process(program.node(&hosts[victim]), Signal::KILL).unwrap();
    let ended = program.end();
    assert_eq!(ended.status, Some(3), "{}", ended.message);
    let name = format!("node {victim} ({}) is lost", hosts[victim]);
    assert!(ended.message.contains(&name), "{name:?} is not in {}", ended.message);
    assert!(ended.took < Duration::from_secs(5), "{:?}", ended.took);
}

/// Both nodes are killed once while their vCPUs work on one page.
#[test]
fn a_killed_node_ends_the_machine_and_is_named() {
    for victim in [1, 0] {
        let hosts = two_hosts();
        let mut program = Program::start(
            &kernel::elf(u32::MAX),
            Some(&format!("{}\n{}\n", hosts[0], hosts[1])),
            "256M",
        );
        program.wait_for(kernel::HELLO);
        thread::sleep(Duration::from_millis(300));
        kill_and_be_told(program, &hosts, victim);
    }
}
