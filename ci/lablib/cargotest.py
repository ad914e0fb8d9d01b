"""`cargo build` and `cargo test`, and what the output of the latter says, test by test."""

import os
import re
import subprocess

from .errors import LabError
from .paths import OUT, REPO, cargo_target
from .steps import Counts, say

#: The one target and profile that everything uses, so that a fresh clone is compiled once.
TARGET = "x86_64-unknown-linux-gnu"
#: "Running unittests src/lib.rs (target/.../deps/krg_dsm-0123)" and "Doc-tests krg_dsm": the last
#: word of a path says which crate or which file of tests/ it is.
BINARY_HEADER = re.compile(r"^\s+(Running|Doc-tests) (?:.*/)?([^/ ()]+?)(?:-[0-9a-f]+\))?$")
RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")
#: A line of a test program with no harness (vmm/tests/cluster_loss.rs).
BARE_RESULT = re.compile(r"^test \S+ \.\.\. ok \([0-9.]+ s\)$")


def program():
    """The release binary."""
    return cargo_target() / TARGET / "release/krg-vmm"


def cargo(words, log, limit):
    """Runs cargo with its output in the file `log`; its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Without a terminal cargo shows no progress; colours would only hide the words.
    environment = dict(os.environ, CARGO_TERM_COLOR="never", RUST_BACKTRACE="1")
    with open(log, "wb") as file:
        child = subprocess.Popen(["cargo", *words], cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=file,
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
    """Builds the release binary and checks that it is one static file."""
    log = OUT / "test/build.log"
    if status := cargo(["build", "--release", "--locked", "--workspace"], log, limit):
        raise LabError(f"cargo build: status {status}: {tail(log)}")
    done = subprocess.run([program(), "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise LabError(f"{program().name} --version: status {done.returncode}: {done.stderr.strip()}")
    interpreter = subprocess.run(["readelf", "--program-headers", program()], capture_output=True, text=True, check=True)
    if "INTERP" in interpreter.stdout:
        raise LabError(f"{program().name} is not static: it asks for a dynamic loader")
    say(f"     {done.stdout.strip()}, static, {program().stat().st_size >> 10} KiB")


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
