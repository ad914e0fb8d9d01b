//! `krg` as a process, asking the program that runs the kernel of [`super::kernel`] over two nodes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

use super::kernel;
use super::program::{PATIENCE, Program};

/// The command, for the machine in `place`.
fn command(place: &Path, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_krg"));
    command.args(words.split(' ')).env("KRG_API", place.join("api")).stdin(Stdio::null());
    command
}

fn krg(place: &Path, words: &str) -> Output {
    command(place, words).output().unwrap()
}

/// What a command that succeeds prints.
fn done(program: &Program, words: &str) -> String {
    let output = krg(program.place.as_path(), words);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "krg {words}");
    text(&output.stdout)
}

/// The one JSON document it prints.
fn document(program: &Program, words: &str) -> Value {
    serde_json::from_str(&done(program, &format!("{words} --json"))).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Two nodes on this machine, their vCPUs busy with one page for ever.
fn machine() -> Program {
    let words = ["--cpus", "2", "--memory", "256M", "--sched", "off"];
    let mut program = Program::start_with(&kernel::elf(u32::MAX), Some("127.0.0.1\n127.0.0.1\n"), &words);
    program.wait_for(kernel::HELLO);
    program
}

fn stop(program: Program) {
    assert_eq!(program.ask(r#"{"cmd":"stop"}"#)["ok"], true);
    assert_eq!(program.end().status, Some(5));
}

#[test]
fn krg_moves_pins_and_explains() {
    let program = machine();
    let nodes = || {
        let vcpus = document(&program, "ps")["vcpus"].take();
        [0, 1].map(|vcpu| vcpus[vcpu]["node"].clone())
    };
    assert_eq!(nodes(), [json!(0), json!(1)]);
    assert_eq!(done(&program, "migrate vcpu0 1"), "vCPU 0 moved from node 0 to node 1\n");
    assert_eq!(done(&program, "migrate 0 1"), "vCPU 0 is on node 1 already\n");
    assert_eq!(document(&program, "migrate vcpu0 1")["moved"], false);
    assert_eq!(nodes(), [json!(1), json!(1)]);
    assert_eq!(done(&program, "migrate vcpu0 home"), "vCPU 0 moved from node 1 to node 0\n");
    assert_eq!(done(&program, "migrate all 0"), "vCPU 1 moved from node 1 to node 0\nvCPU 0 is on node 0 already\n");
    assert_eq!(done(&program, "pin vcpu1 1"), "vCPU 1 is pinned to node 1, and was moved there\n");
    assert!(done(&program, "explain vcpu1").starts_with("vCPU 1 is on node 1: the user pinned it; it may only run on node 1\n"));
    assert!(done(&program, "explain vcpu0").starts_with("vCPU 0 is on node 0: the user moved it\n"));
    // All that may move: the pinned one does not, which is a failure that says so.
    let output = krg(program.place.as_path(), "migrate all 0");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "vCPU 0 is on node 0 already\n".into()));
    assert!(text(&output.stderr).starts_with("krg: EPERM: vCPU 1 is pinned to node 1; "), "{output:?}");
    let output = krg(program.place.as_path(), "migrate all 0 --json");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &answer["refused"][0]["vcpu"]), (Some(1), &json!(1)));
    assert_eq!(done(&program, "pin vcpu1 none"), "vCPU 1 is not pinned\n");
    assert_eq!(done(&program, "capset -MIGRATE vcpu0"), "vCPU 0 may not migrate\n");
    let table = done(&program, "ps");
    let line = |number: usize| table.lines().nth(number).unwrap().split_whitespace().collect::<Vec<_>>();
    let columns = |number| [0, 2, 3, 8, 9].map(|column| line(number)[column].to_owned());
    assert_eq!(columns(0), ["VCPU", "NODE", "HOST", "PIN", "MIGRATE"]);
    assert_eq!(columns(1), ["0", "0", "127.0.0.1", "-", "no"]);
    assert_eq!(columns(2), ["1", "1", "127.0.0.1", "-", "yes"]);
    assert_eq!(done(&program, "capset +MIGRATE all"), "vCPU 0-1 may migrate\n");
    let policy = document(&program, "sched show")["sched"]["policy"].clone();
    assert!(done(&program, "sched show").starts_with(&format!("policy {}\n", policy.as_str().unwrap())));
    assert_eq!(document(&program, "sched set static")["sched"]["policy"], "static");
    assert!(done(&program, "sched set off").starts_with("policy off\n"));
    assert!(done(&program, "explain 0x8000123").starts_with("page 0x8000000 is at home on node 1; "));
    assert_eq!(document(&program, "nodes status")["nodes"][1]["online"], true);
    stop(program);
}

/// A machine of two hosts, whose hosts file names a third that can't be reached.
#[test]
fn each_error_of_krg_has_its_name_and_status_and_changes_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root: makes a network of its own");
        return;
    }
    let network = "ip link set lo up && ip link add d0 type veth peer name d1 && ip addr add 10.99.0.1/24 dev d0 && ip link set d0 up \
                   && ip route add unreachable 10.98.0.1 && exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-n", "sh", "-c", network, env!("CARGO_BIN_EXE_krg-vmm"), "--api", "api", "--secret-file", "secret"]);
    command.args(["--cpus", "2", "--memory", "256M", "--sched", "off"]);
    let hosts = "10.99.0.1\n10.99.0.1:7448\n10.98.0.1\nnbmin=2\n";
    let mut program = Program::start_by(command, &kernel::elf(u32::MAX), Some(hosts));
    program.wait_for(kernel::HELLO);
    done(&program, "pin vcpu1 1");
    done(&program, "capset -MIGRATE vcpu0");
    let before = document(&program, "ps");
    for (words, status, line) in [
        ("migrate vcpu0 99", 1, "EINVAL: there is no node 99; nodes are 0 to 1"),
        ("migrate vcpu0 -1", 1, "EINVAL: there is no node -1; "),
        ("migrate vcpu0 abc", 1, "EINVAL: there is no node abc; "),
        ("migrate all 99", 1, "EINVAL: there is no node 99; "),
        ("migrate vcpu0 2", 1, "ENONET: node 2 is not online"),
        ("pin vcpu0 2", 1, "ENONET: node 2 is not online"),
        ("pin vcpu0 99", 1, "EINVAL: there is no node 99; "),
        ("migrate vcpu2 1", 1, "ESRCH: there is no vCPU 2"),
        ("migrate -1 1", 1, "ESRCH: there is no vCPU -1"),
        ("migrate nobody 1", 1, "ESRCH: there is no vCPU nobody"),
        ("pin vcpu2 none", 1, "ESRCH: there is no vCPU 2"),
        ("capset -MIGRATE vcpu2", 1, "ESRCH: there is no vCPU 2"),
        ("explain vcpu2", 1, "ESRCH: there is no vCPU 2"),
        ("migrate vcpu0 1", 1, "EPERM: vCPU 0 lacks the capability MIGRATE; "),
        ("pin vcpu0 1", 1, "EPERM: vCPU 0 lacks the capability MIGRATE; "),
        ("migrate vcpu1 0", 1, "EPERM: vCPU 1 is pinned to node 1; "),
        ("explain 0xz", 1, "EINVAL: \"0xz\" is no guest-physical address; "),
        ("explain 0x10000000000", 1, "EFAULT: 0x10000000000 is not in the guest's memory"),
        ("sched set fair", 1, "EINVAL: there is no policy \"fair\"; "),
        ("top", 2, "ENOTTY: krg top needs a terminal; "),
    ] {
        let output = krg(program.place.as_path(), words);
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(status), &b""[..]), "krg {words}");
        let said = text(&output.stderr);
        assert!(said.starts_with(&format!("krg: {line}")) && said.lines().count() == 1, "krg {words}: {said}");
        if status == 1 {
            let output = krg(program.place.as_path(), &format!("{words} --json"));
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!((output.status.code(), &answer["ok"]), (Some(1), &json!(false)), "krg {words}");
            assert!(line.starts_with(answer["errno"].as_str().unwrap()), "{answer}");
        }
    }
    for wrong in ["capset -FLY vcpu0", "top --json"] {
        assert_eq!(krg(program.place.as_path(), wrong).status.code(), Some(2), "krg {wrong}");
    }
    let without_figures = |mut status: Value| {
        status["vcpus"].as_array_mut().unwrap().iter_mut().for_each(|vcpu| vcpu["load"] = Value::Null);
        status
    };
    assert_eq!(without_figures(document(&program, "ps")), without_figures(before));
    let table = done(&program, "nodes status");
    let last: Vec<_> = table.lines().last().unwrap().split_whitespace().take(4).collect();
    assert_eq!(last, ["2", "10.98.0.1", "offline", "-"], "{table}");
    stop(program);
}

#[test]
fn without_a_machine_krg_says_so() {
    let place = TempDir::new_with_prefix("/tmp/krg-none").unwrap();
    let run = |words: &str| {
        let krg = Command::new(env!("CARGO_BIN_EXE_krg"))
            .args(words.split(' '))
            .env("KRG_RUNTIME_DIR", place.as_path())
            .env_remove("KRG_API")
            .output()
            .unwrap();
        (krg.status.code(), text(&krg.stderr), text(&krg.stdout))
    };
    let (status, line, _) = run("ps");
    assert!(status == Some(3) && line.starts_with("krg: ENOENT: no machine of yours runs on this host"), "{line}");
    let (status, line, _) = run("ps --machine web");
    assert!(status == Some(3) && line.contains("web.sock: ENOENT"), "{line}");
    let (status, _, document) = run("--api /nowhere/api top --once --json");
    assert_eq!(status, Some(3));
    assert!(serde_json::from_str::<Value>(&document).unwrap()["error"].as_str().unwrap().contains("ENOENT"));
}

/// Machines that were not told where to listen: krg finds the only one, and asks which if there are two.
#[test]
fn machines_are_found_by_their_names() {
    let run = TempDir::new_with_prefix("/tmp/krg-run").unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_krg-vmm"));
        command.env("KRG_RUNTIME_DIR", run.as_path()).args(["--name", "web", "--cpus", "2", "--memory", "128M"]);
        let mut program = Program::start_by(command, &kernel::elf(u32::MAX), None);
        program.wait_for(kernel::HELLO);
        program
    };
    let krg = |words: &str| {
        let mut krg = Command::new(env!("CARGO_BIN_EXE_krg"));
        krg.args(words.split(' ')).env("KRG_RUNTIME_DIR", run.as_path()).env_remove("KRG_API");
        let output = krg.output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let end = |program: Program, name: &str| {
        let mut socket = std::os::unix::net::UnixStream::connect(run.as_path().join(name)).unwrap();
        socket.write_all(b"{\"cmd\":\"stop\"}\n").unwrap();
        program.end()
    };
    let first = start();
    let (status, table, _) = krg("ps");
    assert_eq!((status, table.lines().count()), (Some(0), 3), "{table}");
    // Its figures are nobody's guess.
    assert!(krg("top --once").1.contains(" - "));
    let second = start();
    let (status, _, line) = krg("ps");
    assert_eq!((status, line.as_str()), (Some(2), "krg: several machines run on this host: say which, --machine web or web-2\n"));
    assert_eq!(krg("ps --machine web-2").0, Some(0));
    let ended = end(second, "web-2.sock");
    assert!(ended.message.contains("the control socket is") && ended.message.contains("web-2.sock"), "{}", ended.message);
    assert_eq!(krg("nodes status").0, Some(0));
    assert!(!end(first, "web.sock").message.contains("control socket is"));
    assert_eq!(krg("ps").0, Some(3));
}

/// What Prometheus gets from a running machine agrees with what the control socket says.
#[test]
fn the_metrics_of_a_running_machine_are_scraped() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let words = ["--cpus", "2", "--memory", "256M", "--sched", "off", "--metrics", &port];
    let mut program = Program::start_with(&kernel::elf(u32::MAX), Some("127.0.0.1\n127.0.0.1\n"), &words);
    program.wait_for(kernel::HELLO);
    let scrape = || {
        let mut client = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("application/openmetrics-text"), "{head}");
        assert!(body.ends_with("# EOF\n"), "{body}");
        body.to_owned()
    };
    let value = |text: &str, sample: &str| -> Option<f64> {
        text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
    };
    done(&program, "migrate vcpu1 0");
    done(&program, "pin vcpu1 0");
    let text = scrape();
    let one = |sample: &str| value(&text, sample);
    assert_eq!([one("krg_vcpus"), one("krg_memory_bytes")], [Some(2.0), Some((256 << 20) as f64)], "{text}");
    assert_eq!([one("krg_vcpu_node{vcpu=\"1\"}"), one("krg_vcpu_pin{vcpu=\"1\"}")], [Some(0.0); 2], "{text}");
    assert_eq!((one("krg_sched_policy{policy=\"off\"}"), one("krg_vcpu_pin{vcpu=\"0\"}")), (Some(1.0), None), "{text}");
    done(&program, "pin vcpu1 1");
    // Counters come with the nodes' first figures.
    let until = Instant::now() + PATIENCE;
    let faults = "krg_faults_total{node=\"1\",host=\"127.0.0.1\",kind=\"write\"}";
    let text = loop {
        let text = scrape();
        if value(&text, faults).is_some_and(|faults| faults > 0.0) {
            break text;
        }
        assert!(Instant::now() < until, "{text}");
        thread::sleep(Duration::from_millis(100));
    };
    assert!(text.contains("krg_hot_page_faults{node=\"1\",page=\"0x11000\",thread=\"vcpu1\"}"), "{text}");
    assert!(value(&text, "krg_vcpu_arrivals_total{node=\"1\",host=\"127.0.0.1\"}").is_some_and(|came| came >= 1.0), "{text}");
    let taken = Program::start_with(&kernel::elf(1), None, &["--cpus", "2", "--memory", "128M", "--metrics", &port]).end();
    assert_eq!(taken.status, Some(1));
    assert!(taken.message.contains(&format!("--metrics 127.0.0.1:{port}: EADDRINUSE")), "{}", taken.message);
    stop(program);
}

/// A terminal with `krg top` on it.
struct Watched {
    child: Child,
    master: File,
    terminal: OwnedFd,
    before: Termios,
    output: Receiver<String>,
    shown: String,
}

impl Watched {
    fn start(place: &Path) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let terminal: OwnedFd = File::options().read(true).write(true).open(name).unwrap().into();
        tcsetwinsize(&terminal, Winsize { ws_row: 30, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let child = command(place, "top")
            .stdin(terminal.try_clone().unwrap())
            .stdout(terminal.try_clone().unwrap())
            .stderr(terminal.try_clone().unwrap())
            .env("TERM", "xterm")
            .spawn()
            .unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (said, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut bytes) {
                if said.send(String::from_utf8_lossy(&bytes[..len]).into_owned()).is_err() {
                    return;
                }
            }
        });
        let mut watched = Self { child, master, terminal, before, output, shown: String::new() };
        watched.wait_for("q quits");
        assert!(!tcgetattr(&watched.terminal).unwrap().local_modes.contains(LocalModes::ICANON));
        watched
    }

    fn wait_for(&mut self, text: &str) {
        while !self.shown.contains(text) {
            self.shown += &self.output.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{:?}", self.shown));
        }
    }

    /// Waits for its end, and checks that the terminal is as it was.
    fn end(mut self) -> (Option<i32>, String) {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "no end");
            thread::sleep(Duration::from_millis(10));
        };
        // The alternate screen is left and the cursor shown.
        self.wait_for("\x1b[?1049l");
        self.wait_for("\x1b[?25h");
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (self.before.local_modes, self.before.input_modes, self.before.output_modes)
        );
        (status.code(), self.shown)
    }
}

#[test]
fn krg_top_shows_who_fights_for_a_page_and_gives_the_terminal_back() {
    let program = machine();
    let place = program.place.as_path();
    // One picture as text: two tellings of every node, so rates are known.
    let picture = done(&program, "top --once");
    assert!(picture.starts_with("krg: 2 vCPUs, 256 MiB on 2 nodes; policy "), "{picture}");
    let page = picture.lines().find(|line| line.starts_with("0x11000 ")).unwrap_or_else(|| panic!("{picture}"));
    assert!(page.contains("vcpu0 ") && page.contains("vcpu1 ") && !page.contains(" - "), "{picture}");
    let node: Vec<_> = picture.lines().nth(2).unwrap().split_whitespace().collect();
    assert!(node[..2] == ["0", "127.0.0.1"] && node[4].parse::<f64>().is_ok_and(|faults| faults > 0.0), "{picture}");
    println!("{picture}");
    let explained = done(&program, "explain 0x11008");
    assert!(explained.contains("page 0x11000 is at home on node 0; it was taken away "), "{explained}");

    let mut quit = Watched::start(place);
    quit.master.write_all(b"\x1b[B\x1b[Aq").unwrap();
    assert_eq!(quit.end().0, Some(0));
    let killed = Watched::start(place);
    kill_process(Pid::from_child(&killed.child), Signal::TERM).unwrap();
    assert_eq!(killed.end().0, None);
    let left = Watched::start(place);
    stop(program);
    let (status, shown) = left.end();
    assert!(status == Some(3) && shown.contains("krg: "), "{shown:?}");
}
