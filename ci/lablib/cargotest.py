"""`cargo build` and `cargo test`, and what the output of the latter says, test by test."""

import json
import os
import re
import subprocess
from pathlib import Path

from .errors import LabError
from .paths import OUT, REPO, cargo_target
from .steps import Counts, say

#: The one target and profile that everything uses, so that a fresh clone is compiled once.
TARGET = "x86_64-unknown-linux-gnu"
#: What the program may need to be loaded: the C library and what the compiler leaves out of it. RDMA
#: libraries are looked for when it runs.
LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
#: "Running unittests src/lib.rs (target/.../deps/krg_dsm-0123)" and "Doc-tests krg_dsm": the last
#: word of a path says which crate or which file of tests/ it is.
BINARY_HEADER = re.compile(r"^\s+(Running|Doc-tests) (?:.*/)?([^/ ()]+?)(?:-[0-9a-f]+\))?$")
RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")
#: A line of a test program with no harness (vmm/tests/cluster_loss.rs).
BARE_RESULT = re.compile(r"^test \S+ \.\.\. ok \([0-9.]+ s\)$")


def program():
    """The release binary."""
    return cargo_target() / TARGET / "release/krg-vmm"


#: Packages whose programs run inside guests, and need no library there.
GUEST_PROGRAMS = ("guest-litmus", "guest-memory", "guest-witness")


def guest_program(name):
    """A program for the inside of a guest."""
    return cargo_target() / "static" / TARGET / "release" / name


def cargo(words, log, limit, directory=REPO, **variables):
    """Runs cargo with its output in the file `log`; its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Without a terminal cargo shows no progress; colours would only hide the words.
    environment = dict(os.environ, CARGO_TERM_COLOR="never", RUST_BACKTRACE="1", **variables)
    # Would have the simulator run one seed alone.
    environment.pop("KRG_SIM_SEED", None)
    with open(log, "wb") as file:
        child = subprocess.Popen(["cargo", *words], cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                 stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            raise LabError(f"cargo {words[0]}: not done within {limit} s; see {log}") from None
        finally:
            if child.poll() is None:
                # Its session: cargo, rustc and the tests that run.
                os.killpg(child.pid, 9)
                child.wait()


def build(limit=1500):
    """Builds the release binary, which needs the C library alone, and the static ones for the guest."""
    log = OUT / "test/build.log"
    if status := cargo(["build", "--release", "--locked", "--workspace"], log, limit):
        raise LabError(f"cargo build: status {status}: {tail(log)}")
    done = subprocess.run([program(), "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise LabError(f"{program().name} --version: status {done.returncode}: {done.stderr.strip()}")
    if more := needed(program()) - LIBRARIES:
        raise LabError(f"{program().name} needs {', '.join(sorted(more))}: hosts may not have that")
    build_guest_programs(limit)
    say(f"     {done.stdout.strip()}, {program().stat().st_size >> 10} KiB, needs {', '.join(sorted(needed(program())))}")


def build_guest_programs(limit=1500):
    """Builds the static programs for guests."""
    log = OUT / "test/build-static.log"
    words = ["build", "--release", "--locked", "--target-dir", os.fspath(cargo_target() / "static")]
    words += [word for name in GUEST_PROGRAMS for word in ("--package", name)]
    if status := cargo(words, log, limit, RUSTFLAGS="-C target-feature=+crt-static"):
        raise LabError(f"cargo build of the guest's programs: status {status}: {tail(log)}")
    for name in GUEST_PROGRAMS:
        if more := needed(guest_program(name)):
            raise LabError(f"{name} is not static: it needs {', '.join(sorted(more))}")


def needed(binary):
    """The shared libraries that a program asks for."""
    shown = subprocess.run(["readelf", "--dynamic", binary], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", shown))


def test_program(name, limit=1500):
    """The path of a built test program, by the name of its target."""
    log = OUT / "test" / f"{name}.json"
    words = ["test", "--release", "--locked", "--workspace", "--test", name, "--no-run", "--message-format", "json"]
    if status := cargo(words, log, limit):
        raise LabError(f"cargo test --no-run: status {status}; see {log}")
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{") and (path := json.loads(line).get("executable")):
            return Path(path)
    raise LabError(f"no test program {name}; see {log}")


def test(limit=1500):
    """Runs all tests of the workspace; the counts over all test programs."""
    log = OUT / "test/cargo-test.log"
    words = ["test", "--release", "--locked", "--workspace", "--no-fail-fast", "--", "--show-output"]
    status = cargo(words, log, limit)
    programs = parse(log.read_text(errors="replace"))
    counts = Counts()
    for name, found in programs.items():
        if found.passed or found.failed or found.skipped:
            say(f"     {name}: {found}")
        counts += found
    if status and not counts.failed:
        # A compiler error, or a test program that ended without a word about its tests.
        raise LabError(f"cargo test: status {status}: {tail(log)}")
    if not status and not counts.passed:
        raise LabError(f"cargo test: no test ran; see {log}")
    if counts.failed:
        say(f"     failed: {', '.join(failures(log)) or 'a whole test program'}; see {log}")
    return counts


def parse(text):
    """Counts by test program, in order.

    A test that passes and says `skipped: WHY` did not try what it is for: it counts as skipped,
    as does an ignored one. A program that fails without a result line is one failure.
    """
    programs, name, target_failed = {}, "", []
    skipping = set()
    shown = ""
    for line in text.splitlines():
        if header := BINARY_HEADER.match(line):
            kind, program_name = header.groups()
            name = unused(f"{program_name} (documentation)" if kind == "Doc-tests" else program_name, programs)
            programs[name] = Counts()
            shown = ""
        elif line.startswith("---- ") and line.endswith(" stdout ----"):
            shown = line
        elif line.startswith("skipped: ") and name and (name, shown) not in skipping:
            skipping.add((name, shown))
            programs[name].skipped += 1
            say(f"     {line} ({name})")
        elif result := RESULT.match(line):
            passed, failed, ignored = map(int, result.groups())
            programs[name].passed += passed - programs[name].skipped
            programs[name].failed += failed
            programs[name].skipped += ignored
        elif BARE_RESULT.match(line) and name:
            programs[name].passed += 1
        elif line.startswith("error: test failed") and name:
            target_failed.append(name)
    for failed in target_failed:
        if not programs[failed].failed:
            programs[failed].failed = 1
    return programs


def unused(name, taken):
    """The name of a test program, with a number if another crate has one of that name."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def failures(log):
    """Names of the tests that failed."""
    return re.findall(r"^test (\S+) \.\.\. FAILED$", log.read_text(errors="replace"), re.M)


def tail(log):
    """The end of a log: errors of the compiler, else its last lines."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error")]
    return " | ".join(errors[:5] or lines[-5:]) + f"; see {log}"
