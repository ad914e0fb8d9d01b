//! Bad input to the program: each ends it with one clear line, the right status and nothing left
//! behind.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use vmm_sys_util::tempdir::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(TempDir::new_with_prefix("/tmp/krg-bad-input").unwrap());
        fs::write(place.path("guest.img"), vec![0; 1 << 20]).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.as_path().join(name)
    }

    fn krg(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_krg-vmm"))
            .args(args)
            .current_dir(self.0.as_path())
            // Neither the user's secret nor log filter.
            .env("HOME", self.0.as_path())
            .env_remove("KRG_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs a machine over a hosts file with `hosts`; returns its status and last line.
    fn nodes(&self, hosts: &str, args: &[&str]) -> (i32, String) {
        fs::write(self.path("hosts.txt"), hosts).unwrap();
        let output = self.krg(&[&["--nodes", "hosts.txt", "guest.img"], args].concat());
        assert!(no_nodes_of(self.0.as_path()), "a node was left behind");
        (output.status.code().unwrap(), last_line(&output))
    }
}

/// Whether no process runs in `directory`: nodes inherit it from their front end.
fn no_nodes_of(directory: &Path) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    !processes
        .into_iter()
        .any(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == directory))
}

fn last_line(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr)
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn a_hosts_file_that_is_none() {
    let place = Place::new();
    let output = place.krg(&["--nodes", "missing.txt", "guest.img"]);
    assert_eq!(
        last_line(&output),
        "krg-vmm: missing.txt: ENOENT (no such file or directory)"
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    assert_eq!(output.status.code(), Some(1));
    for (hosts, line) in [
        ("", "krg-vmm: hosts.txt: no host in it: write one address a line"),
        (
            "# only\n",
            "krg-vmm: hosts.txt: no host in it: write one address a line",
        ),
        (
            "127.0.0.1\nno/host\n",
            "krg-vmm: hosts.txt: line 2: \"no/host\": neither an IP address nor a name in /etc/hosts (DNS is not asked)",
        ),
        (
            "127.0.0.1 cpu=2\n",
            "krg-vmm: hosts.txt: line 1: \"cpu=2\": not one of id=N, cpus=N, mem=SIZE, cache=SIZE, disk=PATH",
        ),
        (
            "127.0.0.1 id=1\n127.0.0.1 id=1\n",
            "krg-vmm: hosts.txt: line 2: id=1 is already the id of line 1: give every host its own",
        ),
        (
            "127.0.0.1:7001\n127.0.0.1:7001\n",
            "krg-vmm: hosts.txt: line 2: 127.0.0.1:7001 is already on line 1: a host takes part once",
        ),
        (
            "127.0.0.1\nnbmin=2\n",
            "krg-vmm: hosts.txt: line 2: nbmin=2, but the file has 1 host(s)",
        ),
    ] {
        assert_eq!(place.nodes(hosts, &[]), (1, line.into()));
    }
}

#[test]
fn a_hosts_file_that_can_not_work() {
    let place = Place::new();
    let secret = place.path("secret");
    fs::write(&secret, [b'x'; 32]).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let with_secret = ["--secret-file", secret.to_str().unwrap()];
    let (status, line) = place.nodes("198.51.100.1\n", &with_secret);
    assert!(
        status == 1 && line.starts_with("krg-vmm: no line of the hosts file is an address of this machine"),
        "{line}"
    );
    let (status, line) = place.nodes("127.0.0.1\n198.51.100.1\n", &with_secret);
    assert!(
        status == 1 && line.starts_with("krg-vmm: host 127.0.0.1 can't be reached from host 198.51.100.1"),
        "{line}"
    );
    let (status, line) = place.nodes("127.0.0.1\n127.0.0.1 disk=/x\n", &[]);
    assert!(
        status == 1 && line.starts_with("krg-vmm: host 127.0.0.1: disk= is possible only on node 0"),
        "{line}"
    );
    let (status, line) = place.nodes("127.0.0.1\n127.0.0.1 mem=900T\n", &[]);
    assert!(status == 1 && line.contains("of guest memory needed"), "{line}");
    let (status, line) = place.nodes("127.0.0.1\n127.0.0.1\n", &["--cpus", "1"]);
    assert_eq!(
        (status, line.as_str()),
        (1, "krg-vmm: 1 vCPUs over 2 hosts: every host needs at least one")
    );
    let (status, line) = place.nodes("127.0.0.1\n127.0.0.1\n", &["--memory", "1M"]);
    assert_eq!(
        (status, line.as_str()),
        (
            1,
            "krg-vmm: 1 MiB of guest memory over 2 hosts: each needs at least 128 MiB"
        )
    );
}

/// Loopback has no RDMA, on any host.
#[test]
fn transports_that_can_not_be_had() {
    let place = Place::new();
    let hosts = "127.0.0.1\n127.0.0.1\n";
    let (status, line) = place.nodes(hosts, &["--transport", "rdma"]);
    assert_eq!(
        (status, line.as_str()),
        (1, "krg-vmm: host 127.0.0.1: no RDMA device at 127.0.0.1; without --transport rdma the nodes use TCP")
    );
    for (how, said) in [("auto", "auto: node 0: no RDMA device at 127.0.0.1"), ("tcp", "as asked")] {
        // It ends all the same: there is nothing to boot in this image.
        let output = place.krg(&["--nodes", "hosts.txt", "guest.img", "--memory", "1M", "--transport", how]);
        let said = format!("krg-vmm: transport: tcp ({said})");
        let lines = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(lines.lines().any(|line| line == said), "{lines}");
        assert_eq!(output.status.code(), Some(1));
    }
    let output = place.krg(&["--nodes", "hosts.txt", "guest.img", "--transport", "pigeon"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn secrets_that_are_none() {
    let place = Place::new();
    let (status, line) = place.nodes("127.0.0.1\n", &["--secret-file", "none"]);
    assert_eq!(
        (status, line.as_str()),
        (1, "krg-vmm: secret file none: ENOENT (no such file or directory)")
    );
    fs::write(place.path("short"), "short").unwrap();
    let (_, line) = place.nodes("127.0.0.1\n", &["--secret-file", "short"]);
    assert!(
        line.contains("others may read it") && line.contains("chmod 600"),
        "{line}"
    );
    fs::set_permissions(place.path("short"), fs::Permissions::from_mode(0o600)).unwrap();
    let (_, line) = place.nodes("127.0.0.1\n", &["--secret-file", "short"]);
    assert!(line.contains("5 bytes, at least 32 are needed"), "{line}");
    let output = place.krg(&["node", "--listen", "127.0.0.1:0"]);
    assert!(last_line(&output).starts_with("krg-vmm: no secret"), "{output:?}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn images_that_are_none() {
    let place = Place::new();
    fs::write(place.path("empty.img"), "").unwrap();
    for (image, line) in [
        ("none.img", "krg-vmm: none.img: ENOENT (no such file or directory)"),
        ("/", "krg-vmm: /: EISDIR (a directory, not a disk image)"),
        ("/dev/null", "krg-vmm: /dev/null: neither a file nor a block device"),
        ("empty.img", "krg-vmm: empty.img: an empty file, not a disk image"),
    ] {
        let output = place.krg(&[image]);
        assert_eq!((output.status.code(), last_line(&output)), (Some(1), line.into()));
    }
    let output = place.krg(&["guest.img", "--disk", "none.img"]);
    assert_eq!(
        last_line(&output),
        "krg-vmm: none.img: ENOENT (no such file or directory)"
    );
    let output = place.krg(&["--kernel", "vmlinuz"]);
    assert_eq!(
        last_line(&output),
        "krg-vmm: vmlinuz: ENOENT (no such file or directory)"
    );
    let output = place.krg(&["--json", "none.img"]);
    let event: serde_json::Value = serde_json::from_str(&last_line(&output)).unwrap();
    assert_eq!((&event["event"], &event["status"]), (&"error".into(), &1.into()));
}

#[test]
fn usage() {
    let place = Place::new();
    let output = place.krg(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(last_line(&output).contains("nothing to boot"), "{output:?}");
    assert_eq!(place.krg(&["--memory", "lots", "guest.img"]).status.code(), Some(2));
    let help = place.krg(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for word in ["--nodes", "--persist", "Ctrl-A x", "Exit status", "nbmin=N"] {
        assert!(help.contains(word), "{word} is not in the help");
    }
}

#[test]
fn a_port_that_something_else_has() {
    let place = Place::new();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let answering = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut client, _) = other.accept().unwrap();
        client.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").unwrap();
        let _ = client.read_to_end(&mut Vec::new());
    });
    let (status, line) = place.nodes(&format!("{address}\n"), &[]);
    assert_eq!(status, 1);
    assert_eq!(
        line,
        format!("krg-vmm: host {address}: what listens there is not krg-vmm: a wrong port?")
    );
    answering.join().unwrap();
}

/// In a network of its own, with one host that answers nobody, and without rights to KVM.
#[test]
fn hosts_that_can_not_be_had() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root: network namespaces");
        return;
    }
    let place = Place::new();
    fs::write(place.path("secret"), [b'x'; 32]).unwrap();
    fs::set_permissions(place.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    let network = "ip link set lo up && ip link add d0 type veth peer name d1 && ip addr add 10.99.0.1/24 dev d0 \
                   && ip link set d0 up && ip link set d1 up && ip neigh add 10.99.0.2 lladdr 02:00:00:00:00:09 dev d0 \
                   && ip route add unreachable 10.98.0.1 && exec \"$0\" \"$@\"";
    let krg = |hosts: &str| {
        fs::write(place.path("hosts.txt"), hosts).unwrap();
        let output = Command::new("unshare")
            .args(["-n", "sh", "-c", network, env!("CARGO_BIN_EXE_krg-vmm")])
            .args(["--nodes", "hosts.txt", "guest.img", "--secret-file", "secret"])
            .current_dir(place.0.as_path())
            .env("HOME", place.0.as_path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(no_nodes_of(place.0.as_path()), "a node was left behind");
        (output.status.code(), last_line(&output))
    };
    let (status, line) = krg("10.99.0.1\n10.99.0.2\n");
    assert_eq!(
        (status, line.as_str()),
        (
            Some(1),
            "krg-vmm: host 10.99.0.2: unreachable: ETIMEDOUT (connection timed out)"
        )
    );
    let (status, line) = krg("10.99.0.1\n10.98.0.1:700\n");
    assert_eq!(
        (status, line.as_str()),
        (
            Some(1),
            "krg-vmm: host 10.98.0.1:700: unreachable: EHOSTUNREACH (no route to host)"
        )
    );
    let (status, line) = krg("10.99.0.1\n10.98.0.1\n10.98.0.1:700\nnbmin=2\n");
    assert_eq!(status, Some(1));
    assert_eq!(
        line,
        "krg-vmm: only 1 of the 2 hosts that nbmin asks for can be reached; \
         host 10.98.0.1: unreachable: EHOSTUNREACH (no route to host)"
    );
}

#[test]
fn a_host_without_rights_to_kvm() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root: becomes a user without rights");
        return;
    }
    let place = Place::new();
    fs::set_permissions(place.0.as_path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where the user may read it. Copied by another process: were the file open for writing here,
    // a child that another test starts just now could hold it open too, and it could not be run.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_krg-vmm"))
        .arg(place.path("krg-vmm"))
        .status()
        .unwrap();
    assert!(copied.success());
    fs::write(place.path("hosts.txt"), "127.0.0.1\n127.0.0.1\n").unwrap();
    let device = fs::metadata("/dev/kvm").map(|metadata| metadata.permissions().mode() & 0o7);
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(place.path("krg-vmm"))
        .args(["--nodes", "hosts.txt", "guest.img"])
        .current_dir(place.0.as_path())
        .env("HOME", place.0.as_path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let line = last_line(&output);
    assert_eq!(output.status.code(), Some(1));
    match device {
        Ok(0) => assert_eq!(
            line,
            "krg-vmm: host 127.0.0.1: /dev/kvm: EACCES (permission denied); run the node as root or as a member of group kvm"
        ),
        Ok(_) => assert!(line.starts_with("krg-vmm: host 127.0.0.1: userfaultfd"), "{line}"),
        Err(_) => assert!(line.starts_with("krg-vmm: host 127.0.0.1: /dev/kvm: ENOENT"), "{line}"),
    }
    assert!(no_nodes_of(place.0.as_path()), "a node was left behind");
}

#[test]
fn listening_on_what_is_not_ours() {
    let place = Place::new();
    fs::write(place.path("secret"), [b'x'; 32]).unwrap();
    fs::set_permissions(place.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    let output = place.krg(&["node", "--listen", "198.51.100.1:7000", "--secret-file", "secret"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        last_line(&output).starts_with("krg-vmm: can't listen on 198.51.100.1:7000: EADDRNOTAVAIL"),
        "{output:?}"
    );
}
