"""`ci/demo`: one Linux machine of two emulated hosts, four CPUs, builds a C project.

First one host alone boots the image and builds, for comparison; then two hosts do as one machine.
The demo passes if both results are the same and the CPUs of both hosts had their part in it.
"""

import argparse
import re
import sys
import time

from . import cargotest, guestimage
from .errors import LabError
from .labmachine import LabHosts, Machine
from .network import address
from .paths import OUT
from .steps import Steps, end_on_signals, say

IMAGE = "/lab/images/debian-build.img"
LOGS = OUT / "demo"
HOSTS = 2
CPUS_EACH = 2
MIB_EACH = 512
#: Memory of a host: one alone holds the whole guest for the comparison, and offers part of what it has.
HOST_MEMORY = "2560M"
#: Seconds each phase may take, unless `--limit` says otherwise.
LIMITS = {
    "prepare": 1800,
    "lab": 300,
    "one host: boot": 600,
    "one host: build": 900,
    "two hosts: boot": 1800,
    "two hosts: look around": 600,
    "two hosts: build": 3600,
    "two hosts: power off": 300,
}
#: Without optimization the compiler itself is most of the work: the shortest build of the project.
#: What make says goes to the console: it shows how far it got.
BUILD = "make -C /tmp/bzip2 -j{jobs} CC=/tmp/compiler CFLAGS='-O0 -D_FILE_OFFSET_BITS=64' bzip2 2>&1"
#: Each compiler gets the next CPU. Linux starts no process on a NUMA node as far away as another host, and its tick, which
#: would even that out, comes 40 times late here: a build may be over before.
COMPILER = r'''exec 9>>/tmp/turns; flock 9; echo >&9; turn=$(wc -l </tmp/turns); exec 9>&-
exec taskset -c $((turn % $(nproc))) gcc "$@"
'''
#: A CPU that was busy for less than this part of the build had no part in it.
BUSY = 0.05


class Demo:
    """The phases; what one finds out, later ones use."""

    def __init__(self, limits, init):
        self.limits = limits
        self.init = init
        self.hosts = None
        self.machine = None
        self.digests = {}
        self.seconds = {}
        self.facts = {}

    def close(self):
        """Ends what runs."""
        if self.machine:
            self.machine.close()
            self.machine = None
        if self.hosts:
            self.hosts.down()
            self.hosts = None

    def phases(self):
        """Name, function and the phases that have to pass before, in order."""
        return [
            ("prepare", self.prepare, ()),
            ("lab", self.lab, ("prepare",)),
            ("one host: boot", self.boot_one, ("lab",)),
            ("one host: build", self.build_one, ("one host: boot",)),
            ("two hosts: boot", self.boot_two, ("lab",)),
            ("two hosts: look around", self.look_around, ("two hosts: boot",)),
            ("two hosts: build", self.build_two, ("two hosts: boot",)),
            ("two hosts: power off", self.power_off, ("two hosts: boot",)),
        ]

    def prepare(self):
        """The program and the image."""
        cargotest.build(self.limits["prepare"])
        image = guestimage.obtain("build")
        say(f"     {image.name}: {image.stat().st_blocks * 512 >> 20} MiB on disk")

    def lab(self):
        """Two hosts with one emulated CPU each, and the node daemon on the second."""
        self.hosts = LabHosts(HOSTS, HOST_MEMORY).__enter__()
        self.hosts.start_node("h1")
        lines = "".join(f"{address(n)} cpus={CPUS_EACH} mem={MIB_EACH}M\n" for n in range(HOSTS))
        self.hosts.shell("h0", f"printf '%s' '{lines}' >/tmp/hosts.txt")

    def boot(self, key, name, limit, arguments, append):
        """Starts a machine and waits for its shell."""
        if self.init == "shell":
            append = f"{append} init=/bin/bash".strip()
        self.machine = Machine(self.hosts, name, [*arguments, "--append", append, IMAGE], LOGS)
        self.machine.login(limit)
        self.seconds[f"{key} boot"] = time.monotonic() - self.machine.begun
        say(f"     shell after {self.seconds[f'{key} boot']:.0f} s")
        if self.init == "shell":
            self.machine.check("mount -o remount,rw /; mount -t tmpfs tmpfs /tmp", limit)

    def build(self, key, limit, jobs):
        """Builds the project in the machine; the result's hash and how busy every CPU was."""
        self.machine.check("cp -r /usr/src/bzip2-* /tmp/bzip2", limit)
        for line in ("#!/bin/sh", *COMPILER.splitlines()):
            self.machine.check(f"echo '{line}' >>/tmp/compiler", limit)
        self.machine.check("chmod +x /tmp/compiler", limit)
        before = busy_times(self.machine.check("cat /proc/stat", limit))
        begun = time.monotonic()
        status, output = self.machine.run(BUILD.format(jobs=jobs), limit)
        self.seconds[f"{key} build"] = time.monotonic() - begun
        if status:
            raise LabError(f"make failed with status {status}: {output.strip()[-400:]}")
        after = busy_times(self.machine.check("cat /proc/stat", limit))
        self.digests[key] = self.machine.check("sha256sum /tmp/bzip2/bzip2", limit).split()[0]
        answer = self.machine.check("echo forty-two | /tmp/bzip2/bzip2 | /tmp/bzip2/bzip2 -d", limit).strip()
        assert answer == "forty-two", f"the program that was built gives {answer!r} back, not 'forty-two'"
        say(f"     make -j{jobs}: {self.seconds[f'{key} build']:.0f} s, sha256 {self.digests[key]}")
        return [share_of(before[cpu], after[cpu]) for cpu in sorted(before)]

    def end(self, limit):
        """Powers the machine off and shows the figures of its nodes."""
        machine, self.machine = self.machine, None
        with machine:
            machine.shut_down(limit, "poweroff" if self.init == "systemd" else "echo o >/proc/sysrq-trigger")
            for line in machine.counters():
                say(f"     {line}")
            return machine.counters()

    def boot_one(self):
        """The image on h0 alone, with as many CPUs as a host gives to the large machine."""
        limit = self.limits["one host: boot"]
        self.boot("one", "one-host", limit, ["--cpus", str(CPUS_EACH), "--memory", f"{HOSTS * MIB_EACH}M"], "")

    def build_one(self):
        """The comparison."""
        limit = self.limits["one host: build"]
        self.build("one", limit, HOSTS * CPUS_EACH)
        self.end(limit)

    def boot_two(self):
        """The image on both hosts."""
        if self.machine:
            self.machine.close()
        self.boot("two", "two-hosts", self.limits["two hosts: boot"], ["--nodes", "/tmp/hosts.txt", "--sched", "off"],
                  f"{self.hosts.emulation_options()} loglevel=7")

    def look_around(self):
        """What the machine sees of itself."""
        limit, check = self.limits["two hosts: look around"], self.machine.check
        facts = self.facts
        facts["CPUs (nproc)"] = check("nproc", limit).strip()
        nodes = check("cd /sys/devices/system/node; for n in node[0-9]*; do echo $n CPUs $(cat $n/cpulist), "
                      "$(sed -n 's/.*MemTotal: *//p' $n/meminfo), distances $(cat $n/distance); done", limit)
        facts["NUMA nodes"] = "; ".join(nodes.strip().splitlines())
        facts["memory"] = check("grep MemTotal /proc/meminfo", limit).split(":")[1].strip()
        facts["clock source"] = check("cat /sys/devices/system/clocksource/clocksource0/current_clocksource", limit).strip()
        facts["system"] = check("uname -a", limit).strip()
        for name, value in facts.items():
            say(f"     {name}: {value}")
        assert facts["CPUs (nproc)"] == str(HOSTS * CPUS_EACH), f"nproc says {facts['CPUs (nproc)']}"
        assert len(nodes.strip().splitlines()) == HOSTS, f"{HOSTS} NUMA nodes were expected"
        assert facts["clock source"] == "tsc", f"the clock source is {facts['clock source']}"
        mib = int(facts["memory"].split()[0]) >> 10
        assert mib > HOSTS * MIB_EACH * 0.8, f"{mib} MiB of {HOSTS * MIB_EACH} MiB"

    def build_two(self):
        """The job: the same build, on the CPUs of both hosts."""
        busy = self.build("two", self.limits["two hosts: build"], HOSTS * CPUS_EACH)
        self.facts["busy during the build"] = ", ".join(f"CPU {n}: {part:.0%}" for n, part in enumerate(busy))
        say(f"     busy: {self.facts['busy during the build']}")
        for host in range(HOSTS):
            # vCPUs are numbered host by host, in the order of the hosts file.
            own = busy[host * CPUS_EACH:(host + 1) * CPUS_EACH]
            assert own and max(own) >= BUSY, f"the CPUs of {address(host)} had no part in the build"
        if "one" in self.digests:
            assert self.digests["two"] == self.digests["one"], "the results differ: one host's has another sha256"
        else:
            raise LabError("one host alone did not finish its build: nothing to compare with")

    def power_off(self):
        """The end, and each host's figures."""
        counters = self.end(self.limits["two hosts: power off"])
        assert len(counters) == HOSTS, f"figures of {len(counters)} hosts instead of {HOSTS}"

    def table(self):
        """Times of one host and two, side by side."""
        say("")
        say(f"{'seconds (emulated hosts)':30}{'one host':>10}{'two hosts':>11}")
        for what in ("boot", "build"):
            row = [f"{self.seconds[key]:.0f}" if (key := f"{who} {what}") in self.seconds else "-" for who in ("one", "two")]
            say(f"{what + (' to the shell' if what == 'boot' else f' (make -j{HOSTS * CPUS_EACH})'):30}{row[0]:>10}{row[1]:>11}")


def busy_times(stat):
    """Per CPU, from /proc/stat: ticks it worked, and all ticks."""
    times = {}
    for number, fields in re.findall(r"^cpu(\d+) (.*)$", stat, re.M):
        ticks = [int(word) for word in fields.split()]
        # proc(5): user nice system idle iowait irq softirq steal; guest times are in user already.
        times[int(number)] = (sum(ticks[:8]) - ticks[3] - ticks[4], sum(ticks[:8]))
    return times


def share_of(before, after):
    """The part of the time between two readings that a CPU worked."""
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


def limit_of(text):
    """`PHASE=SECONDS` as a pair."""
    name, _, seconds = text.partition("=")
    if name not in LIMITS or not seconds.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: PHASE=SECONDS is needed, with a phase of: {', '.join(LIMITS)}")
    return name, int(seconds)


def main():
    parser = argparse.ArgumentParser(prog="ci/demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Phases and their limits in seconds: "
                                            + ", ".join(f"{name} {limit}" for name, limit in LIMITS.items()))
    parser.add_argument("--init", choices=["shell", "systemd"], default="systemd",
                        help="process 1 of the guest: systemd as the image has it (default), or a shell "
                             "right after the stock kernel and initrd")
    parser.add_argument("--limit", type=limit_of, action="append", default=[], metavar="PHASE=SECONDS",
                        help="another limit for a phase (may be repeated)")
    parser.add_argument("--phase", choices=LIMITS, metavar="PHASE", help="end after this phase")
    args = parser.parse_args()
    end_on_signals()
    demo = Demo(LIMITS | dict(args.limit), args.init)
    steps = Steps()
    begun = time.monotonic()
    say(f"process 1 of the guest: {'a shell (init=/bin/bash)' if args.init == 'shell' else 'systemd'}")
    try:
        for name, function, after in demo.phases():
            steps.run(name, function, after)
            if name == args.phase:
                break
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        demo.close()
    demo.table()
    bad = [name for name, good in steps.outcomes.items() if not good]
    if bad or steps.counts.failed:
        say(f"demo FAILED after {time.monotonic() - begun:.0f} s: {', '.join(bad) or 'interrupted'}; logs: {LOGS}")
        return 1
    if args.phase:
        say(f"demo ended after the phase {args.phase!r}, as asked; all good up to there")
        return 0
    say(f"demo PASSED in {time.monotonic() - begun:.0f} s: one machine of {HOSTS} hosts and {HOSTS * CPUS_EACH} CPUs "
        "built the project with the same result as one host")
    return 0


if __name__ == "__main__":
    sys.exit(main())
