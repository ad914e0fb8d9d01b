"""Earlier versions of krg-vmm, built from the repository's history: what `ci/bench boot --rival` boots in turns with this one."""

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass

from . import cargotest
from .errors import LabError
from .labmachine import PROGRAM, Machine
from .machinetest import IMAGE, INITRD_SHELL, LOGS
from .paths import OUT, REPO
from .steps import say

#: The rivals' programs.
FOLDER = OUT / "rival"
#: Name of this version's runs.
OWN = "this version"
#: Longest that both CPUs may take, and from then the shell.
CPUS_LIMIT, SHELL_LIMIT = 600, 1500
#: Of the line that a node tells when its machine ends, which is the same since the first version.
FIGURES = re.compile(r"faults: (\d+) read, (\d+) write, (\d+) upgrade\b.*; (\d+) messages, (\d+) KiB sent;")


@dataclass
class Run:
    """One boot to the shell and the power-off after it: seconds to the shell; faults, messages and KiB of all nodes to the end."""

    shell: float
    faults: int
    messages: int
    kib: int


class Rival:
    """The program of a commit."""

    def __init__(self, commit):
        done = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
        if done.returncode:
            raise LabError(f"--rival {commit}: this repository has no such commit; a shallow clone lacks the old ones")
        self.commit = done.stdout.strip()
        self.name = self.commit[:12]

    @property
    def program(self):
        return FOLDER / self.name

    def build(self, limit=1800):
        """Builds it, if that was not done before; its own Cargo.lock says of what."""
        if self.program.exists():
            return
        say(f"     {self.name} is built")
        with tempfile.TemporaryDirectory(dir=FOLDER) as source:
            archive = FOLDER / f"{self.name}.tar"
            done = git("archive", "--output", archive, self.commit)
            if done.returncode:
                raise LabError(f"git archive {self.name}: {done.stderr.strip()}")
            # As new files: cargo takes what is older than the last version it compiled for compiled.
            subprocess.run(["tar", "-xmf", archive, "-C", source], stdin=subprocess.DEVNULL, check=True)
            archive.unlink()
            log = FOLDER / f"{self.name}.log"
            # What it depends on is compiled once for all of them.
            words = ["build", "--release", "--locked", "--package", "krg-vmm", "--target-dir", os.fspath(FOLDER / "target")]
            if status := cargotest.cargo(words, log, limit, directory=source):
                raise LabError(f"cargo build of {self.name}: status {status}: {cargotest.tail(log)}")
        shutil.copy(FOLDER / "target" / cargotest.TARGET / "release/krg-vmm", self.program)

    def options(self):
        """Options that this version needs to leave vCPUs where they are."""
        told = subprocess.run([self.program, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        return ("--sched", "off") if "--sched" in told.stdout else ()


def built(commits):
    """The rivals of these commits, built."""
    rivals = [Rival(commit) for commit in commits]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for rival in rivals:
        rival.build()
    shutil.rmtree(FOLDER / "target", ignore_errors=True)
    return rivals


def git(*words):
    """What git says of the repository."""
    return subprocess.run(["git", "-C", REPO, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)


@contextlib.contextmanager
def installed(hosts, program):
    """Another program on both hosts, the daemon's included; this version's when that ends."""
    hosts.end_node("h1")
    shutil.copy(program, hosts.state / "share/rival")
    try:
        for host in ("h0", "h1"):
            hosts.shell(host, f"cp /lab/share/rival {PROGRAM}")
        hosts.start_node("h1")
        yield
    finally:
        hosts.end_node("h1")
        for host in ("h0", "h1"):
            hosts.prepare(host)
        hosts.start_node("h1")


def boot(tests, name, options=()):
    """A boot over two hosts to the initrd's shell, and the power-off."""
    hosts = tests.hosts
    arguments = ["--nodes", "/tmp/hosts.txt", *options, "--append", f"{hosts.emulation_options()} {INITRD_SHELL} loglevel=7", IMAGE]
    for last in (False, True):
        try:
            with Machine(hosts, f"bench-{name.replace(' ', '-')}", arguments, LOGS) as machine:
                machine.expect(r"Brought up 2 nodes, 2 CPUs", CPUS_LIMIT)
                machine.expect(r"Run /bin/sh as init process", SHELL_LIMIT)
                machine.expect(r"^# ", SHELL_LIMIT)
                shell = time.monotonic() - machine.begun
                machine.send("mkdir -p /proc; mount -t proc proc /proc\n")
                machine.shut_down(400)
                found = [FIGURES.search(line) for line in machine.counters()]
            break
        except LabError as error:
            # The first version's guests crashed once in ten boots.
            if last or "crashed" not in str(error):
                raise
            say(f"     {name}: {error}: tried again")
            hosts.start_node("h1")
    if len(found) != 2 or not all(found):
        raise LabError(f"{name}: the nodes' last lines have no figures: {machine.said()[-2:]}")
    told = [sum(int(match[field]) for match in found) for field in range(1, 6)]
    run = Run(shell, sum(told[:3]), *told[3:])
    say(f"     {name}: the shell after {run.shell:.1f} s, {run.faults} faults, {run.messages} messages, {run.kib >> 10} MiB")
    return run


def compare(tests, rivals, boots):
    """Boots of this version and of the rivals', in turns: a list by each one's name, this version's first."""
    runs = {OWN: []} | {rival.name: [] for rival in rivals}
    for _ in range(boots):
        runs[OWN].append(boot(tests, OWN, ("--sched", "off")))
        for rival in rivals:
            with installed(tests.hosts, rival.program):
                runs[rival.name].append(boot(tests, rival.name, rival.options()))
    return runs


def show(figures, runs):
    """Puts the medians, beside each rival's."""
    for what, field, unit in (("the initrd's shell", "shell", "s"), ("faults", "faults", "faults"),
                              ("messages", "messages", "messages"), ("sent", "kib", "KiB")):
        medians = {name: statistics.median(getattr(run, field) for run in boots) for name, boots in runs.items()}
        for name in list(medians)[1:]:
            figures.put(f"boot over two hosts: {what}; {name}", [medians[OWN]], [medians[name]], unit=unit)
