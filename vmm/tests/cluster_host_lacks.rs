//! Hosts that lack what a node needs: the real program in a mount namespace whose `/dev` is empty, or
//! without the capability for userfaultfd. Needs root, for the namespace.

use std::fs;
use std::process::{Command, Output, Stdio};

use vmm_sys_util::tempdir::TempDir;

/// Runs `krg-vmm ARGS` by `launcher` in a mount namespace whose `/dev` has only the devices `keep`, and
/// returns what it said; `None`, with the reason printed, where that can't be done. Its nodes listen on
/// `ports`, which no other test has.
fn in_namespace(ports: [u16; 2], keep: &str, launcher: &str, args: &[&str]) -> Option<(TempDir, Output)> {
    // SAFETY: geteuid has no precondition.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: a mount namespace needs root");
        return None;
    }
    let place = TempDir::new_with_prefix("/tmp/krg-host-lacks").unwrap();
    fs::write(place.as_path().join("guest.img"), vec![0; 1 << 20]).unwrap();
    let hosts = ports.map(|port| format!("127.0.0.1:{port} mem=64M\n")).concat();
    fs::write(place.as_path().join("hosts.txt"), hosts).unwrap();
    let script = format!(
        "set -e; for d in {keep}; do touch $d; mount --bind /dev/$d $d; done; mount -t tmpfs none /dev; \
         for d in {keep}; do touch /dev/$d; mount --bind $d /dev/$d; done; exec {launcher} \"$@\""
    );
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_krg-vmm")])
        .args(args)
        .current_dir(place.as_path())
        .env("HOME", place.as_path())
        .env_remove("KRG_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Some((place, output))
}

fn last_line(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_host_without_kvm() {
    for args in [&["guest.img"][..], &["--nodes", "hosts.txt", "guest.img"]] {
        let Some((_place, output)) = in_namespace([7741, 7742], "null urandom", "", args) else { return };
        let line = last_line(&output);
        assert!(line.starts_with("krg-vmm: ") && line.contains("/dev/kvm: ENOENT"), "{args:?}: {line}");
        assert!(line.contains("load kvm_amd or kvm_intel"), "{args:?}: {line}");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {line}");
    }
}

#[test]
fn a_host_without_userfaultfd() {
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm here to keep");
        return;
    }
    // /dev/userfaultfd goes, and with the capability the system call.
    let launcher = "setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace --";
    let Some((_place, output)) = in_namespace([7743, 7744], "null urandom kvm", launcher, &["--nodes", "hosts.txt", "guest.img"]) else { return };
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|v| v.trim() == "1") {
        println!("skipped: vm.unprivileged_userfaultfd=1 gives it to everybody");
        return;
    }
    let line = last_line(&output);
    assert!(line.starts_with("krg-vmm: ") && line.contains("userfaultfd for kernel faults: EPERM"), "{line}");
    assert!(line.contains("give access to /dev/userfaultfd"), "{line}");
    assert_eq!(output.status.code(), Some(1), "{line}");
}
