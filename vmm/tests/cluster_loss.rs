//! Sessions of real processes: a front end and its nodes, with a simple machine in place of KVM.
//!
//! The program runs itself in three roles (so it has no test harness): `node ...` as the front
//! end starts it, `front HOSTS API` as the front end, and without arguments as the test.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::Streams;
use krg_scheduler::Request;
use krg_vmm::cluster::front::{self, Options};
use krg_vmm::cluster::report::Reporter;
use krg_vmm::cluster::schedule::Wanted;
use krg_vmm::cluster::service;
use krg_vmm::cluster::transport::Wish;
use krg_vmm::node::{BootSpec, MoveAnswer, NodeEnd, NodeInput, NodeOutput, NodeSpec, PageTables};
use rustix::process::{Pid, Signal, kill_process};
use vmm_sys_util::tempdir::TempDir;

/// Makes the machine deaf.
const HANG: &str = "hang";

/// A machine that does what it is told on its console, and tells its peers.
fn machine(
    spec: NodeSpec,
    peers: Vec<Option<Streams>>,
    input: Receiver<NodeInput>,
    output: Arc<dyn NodeOutput>,
) -> NodeEnd {
    let (sender, ends) = channel();
    let mut writers: Vec<TcpStream> = Vec::new();
    for (number, peer) in peers.into_iter().enumerate() {
        let Some(Streams { messages: mut peer, .. }) = peer else { continue };
        writers.push(peer.try_clone().unwrap());
        let sender = sender.clone();
        thread::spawn(move || {
            let mut word = [0; 1];
            let end = match peer.read_exact(&mut word) {
                Ok(()) => NodeEnd::PowerOff,
                Err(_) => NodeEnd::PeerLost(number),
            };
            let _ = sender.send(end);
        });
    }
    if spec.node == 0 {
        output.console(format!("pid {} of {}\n", std::process::id(), spec.name).as_bytes());
    }
    output.event("pid", serde_json::json!({"event": "pid", "pid": std::process::id()}));
    thread::spawn(move || {
        for input in input {
            let end = match input {
                NodeInput::Stop(reason) => NodeEnd::Stopped(reason),
                NodeInput::Migrate { id, .. } => {
                    output.moved(id, MoveAnswer::NoVcpu);
                    continue;
                }
                NodeInput::Console(bytes) => match bytes.as_slice() {
                    b"off\n" => NodeEnd::PowerOff,
                    b"reset\n" => NodeEnd::Reset(false),
                    b"fault\n" => NodeEnd::Reset(true),
                    b"fail\n" => NodeEnd::Failed("the disk is full".into()),
                    b"panic\n" => panic!("asked to panic"),
                    b"hang\n" => NodeEnd::Failed(HANG.into()),
                    other => {
                        output.console(other);
                        continue;
                    }
                },
            };
            let _ = sender.send(end);
        }
    });
    let end = ends
        .recv()
        .unwrap_or(NodeEnd::Failed("its console thread ended".into()));
    while end == NodeEnd::Failed(HANG.into()) {
        thread::park();
    }
    if end == NodeEnd::PowerOff {
        for mut peer in &writers {
            let _ = peer.write_all(b"o");
        }
    }
    for peer in writers {
        let _ = peer.shutdown(std::net::Shutdown::Both);
    }
    end
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("node") => {
            let listen: SocketAddr = args[3].parse().unwrap();
            let result = match args.get(4).map(String::as_str) {
                Some("--secret-file") => service::serve(listen, Some(PathBuf::from(&args[5])), Arc::new(machine)),
                _ => service::serve_parent(listen, args.iter().any(|arg| arg == "--fixed-port"), Arc::new(machine)),
            };
            if let Err(line) = &result {
                eprintln!("{line}");
            }
            if result.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Some("front") => front_end(Path::new(&args[2]), Path::new(&args[3]), args.get(4)),
        // `cargo test` passes filters and options: everything runs all the same.
        _ => tests(),
    }
}

fn front_end(hosts: &Path, api: &Path, secret: Option<&String>) -> ExitCode {
    let options = Options {
        nodes: Some(hosts.into()),
        disks: Vec::new(),
        persist: false,
        request: Request {
            cpus: None,
            memory: Some(512 << 20),
        },
        name: "test".into(),
        boot: BootSpec::default(),
        net: None,
        api: Some(api.into()),
        metrics: None,
        page_tables: PageTables::Auto,
        transport: Wish::Auto,
        sched: Wanted::default(),
        secret_file: secret.map(PathBuf::from),
        program: std::env::current_exe().unwrap(),
        attach: true,
    };
    let reporter = Reporter::new(true);
    match front::run(&options, Arc::new(machine), reporter) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            reporter.error(&error.to_string(), error.status());
            ExitCode::from(error.status())
        }
    }
}

/// A front end under test.
struct Front {
    child: Child,
    stdin: ChildStdin,
    events: Receiver<serde_json::Value>,
    console: Receiver<String>,
    place: TempDir,
}

/// What is left of it.
struct Left {
    status: Option<i32>,
    message: String,
    took: Duration,
}

impl Front {
    fn start(hosts: &str, secret: Option<&Path>) -> Self {
        let place = TempDir::new_with_prefix("/tmp/krg-loss").unwrap();
        fs::write(place.as_path().join("hosts.txt"), hosts).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["front", "hosts.txt", "api.sock"])
            .args(secret)
            .current_dir(place.as_path())
            .env("HOME", place.as_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (event, events) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if let Ok(json) = serde_json::from_str(&line) {
                    let _ = event.send(json);
                }
            }
        });
        let (line, console) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            stdout
                .lines()
                .map_while(Result::ok)
                .try_for_each(|text| line.send(text))
        });
        let stdin = child.stdin.take().unwrap();
        Self {
            child,
            stdin,
            events,
            console,
            place,
        }
    }

    fn event(&self, name: &str) -> serde_json::Value {
        loop {
            let event = self
                .events
                .recv_timeout(Duration::from_secs(20))
                .unwrap_or_else(|_| panic!("no event {name}"));
            if event["event"] == name {
                return event;
            }
            assert_ne!(event["event"], "error", "{event}");
        }
    }

    /// Process ids of `count` nodes, by node number.
    fn pids(&self, count: usize) -> Vec<Pid> {
        let mut pids = vec![None; count];
        while pids.iter().any(Option::is_none) {
            let event = self.event("pid");
            pids[event["node"].as_u64().unwrap() as usize] = Pid::from_raw(event["pid"].as_i64().unwrap() as i32);
        }
        pids.into_iter().flatten().collect()
    }

    fn say(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).unwrap();
    }

    fn api(&self, request: &str) -> serde_json::Value {
        let mut api = UnixStream::connect(self.place.as_path().join("api.sock")).unwrap();
        writeln!(api, "{request}").unwrap();
        let mut reply = String::new();
        BufReader::new(api).read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    /// Waits for its end and checks that nothing is left of it.
    fn end(mut self) -> Left {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > Duration::from_secs(20) {
                self.child.kill().unwrap();
                panic!("the front end does not end");
            }
            thread::sleep(Duration::from_millis(10));
        };
        let took = start.elapsed();
        thread::sleep(Duration::from_millis(100));
        let place = self.place.as_path();
        let left = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .find(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == place));
        assert!(left.is_none(), "process left: {left:?}");
        if status.code().is_some() {
            assert!(!place.join("api.sock").exists(), "the control socket is left");
        }
        let message = self
            .events
            .try_iter()
            .filter(|event| event["event"] == "error")
            .map(|event| event["message"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>();
        assert!(message.len() <= 1, "more than one line: {message:?}");
        Left {
            status: status.code(),
            message: message.into_iter().next().unwrap_or_default(),
            took,
        }
    }
}

const THREE: &str = "127.0.0.1\n127.0.0.1 id=7\n127.0.0.1\n";

fn tests() -> ExitCode {
    let tests: [(&str, fn()); 10] = [
        ("power_off", power_off),
        ("reset_starts_again", reset_starts_again),
        ("a_killed_node", a_killed_node),
        ("a_stopped_node", a_stopped_node),
        ("a_short_stall", a_short_stall),
        ("failures", failures),
        ("stops", stops),
        ("a_machine_that_hangs", a_machine_that_hangs),
        ("a_killed_front_end", a_killed_front_end),
        ("standing_daemons", standing_daemons),
    ];
    for (name, test) in tests {
        let start = Instant::now();
        test();
        println!("test {name} ... ok ({:.1} s)", start.elapsed().as_secs_f32());
    }
    ExitCode::SUCCESS
}

fn power_off() {
    let mut front = Front::start(THREE, None);
    front.pids(3);
    front.say("hello\n");
    assert!(
        front
            .console
            .recv_timeout(Duration::from_secs(5))
            .unwrap()
            .ends_with("of test")
    );
    assert_eq!(front.console.recv_timeout(Duration::from_secs(5)).unwrap(), "hello");
    let status = front.api("{\"cmd\":\"status\"}");
    assert_eq!(
        (&status["ok"], status["status"]["nodes"].as_array().unwrap().len()),
        (&true.into(), 3)
    );
    front.say("off\n");
    let left = front.end();
    assert_eq!((left.status, left.message.as_str()), (Some(0), ""));
}

fn reset_starts_again() {
    let mut front = Front::start("127.0.0.1\n127.0.0.1\n", None);
    let before = front.pids(2);
    front.say("reset\n");
    front.event("reset");
    assert_eq!(front.pids(2), before);
    front.say("off\n");
    assert_eq!(front.end().status, Some(0));
}

fn a_killed_node() {
    for victim in [2, 0] {
        let front = Front::start(THREE, None);
        let pids = front.pids(3);
        kill_process(pids[victim], Signal::KILL).unwrap();
        let left = front.end();
        assert_eq!(left.status, Some(3));
        assert!(
            left.message.starts_with(&format!("node {victim} (127.0.0.1) is lost")),
            "{}",
            left.message
        );
        assert!(left.took < Duration::from_secs(2), "{:?}", left.took);
    }
}

/// A stopped process is what a lost host looks like: its connections are there and silent.
fn a_stopped_node() {
    let front = Front::start(THREE, None);
    let pids = front.pids(3);
    kill_process(pids[1], Signal::STOP).unwrap();
    let left = front.end();
    assert_eq!(left.status, Some(3));
    assert_eq!(left.message, "node 1 (127.0.0.1) is lost: no sign of life for 4.2 s");
    assert!(left.took < Duration::from_millis(5500), "{:?}", left.took);
}

fn a_short_stall() {
    let mut front = Front::start(THREE, None);
    let pids = front.pids(3);
    kill_process(pids[1], Signal::STOP).unwrap();
    thread::sleep(Duration::from_secs(2));
    kill_process(pids[1], Signal::CONT).unwrap();
    front.say("off\n");
    assert_eq!(front.end().status, Some(0));
}

fn failures() {
    for (word, status, message) in [
        ("fail\n", 1, "node 0 (127.0.0.1): the disk is full"),
        ("fault\n", 4, "the guest crashed: a vCPU took a triple fault"),
    ] {
        let mut front = Front::start(THREE, None);
        front.pids(3);
        front.say(word);
        let left = front.end();
        assert_eq!((left.status, left.message.as_str()), (Some(status), message));
    }
}

fn stops() {
    let front = Front::start(THREE, None);
    front.pids(3);
    assert_eq!(front.api("{\"cmd\":\"stop\"}")["ok"], true);
    let left = front.end();
    assert_eq!(
        (left.status, left.message.as_str()),
        (Some(5), "stopped: asked over the control socket")
    );
    let front = Front::start(THREE, None);
    front.pids(3);
    kill_process(Pid::from_child(&front.child), Signal::TERM).unwrap();
    let left = front.end();
    assert_eq!((left.status, left.message.as_str()), (Some(5), "stopped: SIGTERM"));
}

fn a_machine_that_hangs() {
    let mut front = Front::start("127.0.0.1\n127.0.0.1\n", None);
    front.pids(2);
    front.say("hang\n");
    thread::sleep(Duration::from_millis(100));
    kill_process(Pid::from_child(&front.child), Signal::TERM).unwrap();
    let left = front.end();
    assert_eq!((left.status, left.message.as_str()), (Some(5), "stopped: SIGTERM"));
    assert!(
        left.took > Duration::from_secs(2) && left.took < Duration::from_secs(6),
        "{:?}",
        left.took
    );
}

fn a_killed_front_end() {
    let front = Front::start(THREE, None);
    front.pids(3);
    kill_process(Pid::from_child(&front.child), Signal::KILL).unwrap();
    // `end` checks that no node is left.
    assert_eq!(front.end().status, None);
}

/// Daemons that a user started stay, take one session after another, and keep their port.
fn standing_daemons() {
    let place = TempDir::new_with_prefix("/tmp/krg-loss").unwrap();
    let secret = place.as_path().join("secret");
    fs::write(&secret, [b's'; 40]).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (a, b) = (free(), free());
    let start = |address: SocketAddr| {
        Command::new(std::env::current_exe().unwrap())
            .args(["node", "--listen", &address.to_string(), "--secret-file"])
            .arg(&secret)
            .spawn()
            .unwrap()
    };
    let (mut first, mut second) = (start(a), start(b));
    for address in [a, b] {
        let tries = (0..100).find(|_| {
            TcpStream::connect(address).is_ok() || {
                thread::sleep(Duration::from_millis(50));
                false
            }
        });
        assert!(tries.is_some(), "{address} does not listen");
    }
    let hosts = format!("{a}\n{b}\n");
    for kill in [false, true, false] {
        let mut front = Front::start(&hosts, Some(&secret));
        let pids = front.pids(2);
        assert_eq!(pids, [Pid::from_child(&first), Pid::from_child(&second)]);
        // While one front end has the nodes, another one is told so.
        let left = Front::start(&hosts, Some(&secret)).end();
        assert!(
            left.message.contains("busy: it runs machine \"test\""),
            "{}",
            left.message
        );
        if kill {
            kill_process(Pid::from_child(&front.child), Signal::KILL).unwrap();
        } else {
            front.say("off\n");
        }
        assert_eq!(front.end().status, if kill { None } else { Some(0) });
        thread::sleep(Duration::from_millis(200));
    }
    // Told to end while a machine runs, a daemon stops that first.
    let front = Front::start(&hosts, Some(&secret));
    front.pids(2);
    kill_process(Pid::from_child(&second), Signal::TERM).unwrap();
    let left = front.end();
    assert!(
        left.status.is_some_and(|status| status == 5 || status == 3),
        "{:?}",
        left.status
    );
    assert!(second.wait().unwrap().success());
    // Without its node a host is named, or left out if the file allows that.
    let left = Front::start(&format!("{a}\n{b}\n"), Some(&secret));
    left.pids(2);
    drop(left.api("{\"cmd\":\"stop\"}"));
    left.end();
    kill_process(Pid::from_child(&first), Signal::TERM).unwrap();
    assert!(first.wait().unwrap().success());
}
