"""`ci/bench boot`: a stock Debian kernel boots over two emulated hosts, beside the same guest on one of them.

Tells the time, the faults and what they sent, what replicated page tables cost, and, once the guest is up, the faults
of a timer tick and of a context switch. Times are real seconds between emulated hosts: only ratios say something. The
guest's clock runs 40 times slower there, so it has 40 times fewer ticks a real second than on hardware: rates of faults
are of such a guest, faults per tick are not.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from . import cargotest, guestimage, machinetest, movetest, rival
from .errors import LabError
from .labmachine import SLOWER, Machine
from .machinetest import API, IMAGE, INITRD_SHELL, LOGS, MIB_EACH, PROGRAMS, ask, drain
from .membench import Figures
from .steps import end_on_signals, one_line, say

#: Hosts, with a CPU each; the guest on one host has as many vCPUs and as much memory.
HOSTS = 2
#: Longest that all CPUs may take, and from then the shell.
CPUS_LIMIT, SHELL_LIMIT = 400, 780
#: Every node tells its figures each 5 s; after so many seconds without, something is wrong.
FIGURES_LIMIT = 60
#: Until what a command began (a load's start, a cache) is over.
SETTLE = 10
KINDS = ("read", "write", "upgrade")
#: What replicated page tables cost: the protocol's counters, what they are called here, and their unit.
TABLES = {"flushes": ("flushes", "flushes"), "pages_compared": ("pages compared", "pages"), "words_merged": ("words merged", "words"),
          "promotions": ("promotions", "pages"), "demotions": ("demotions", "pages"), "conflicts": ("conflicts", "words")}
#: Ticks a second of Debian's kernel. Its timer interrupts are several times more here, with a slow clock: early ones, after
#: which the timer is set again. (Linux's factor for the local APIC's timer has 32 bits, too few above 16 times slower.)
HZ = 250

#: The root of the guest's disk has `taskset`, the initrd has not.
ROOT = "/new"
#: One line of the shell each, for CPU 0 and CPU 1. All of it are commands inside the shell: no process begins or ends.
BUSY = ("while :; do :; done",) * 2
#: `echo` writes one byte, `read` takes it. Opened for both, a pipe has a writer at once.
PIPE = ("while echo && read x; do :; done <>/tmp/back >/tmp/forth", "while read x && echo; do :; done <>/tmp/forth >/tmp/back")
#: Name of the window, what runs in it.
WINDOWS = {"idle": (), "a busy loop on each CPU": BUSY, "a byte to and fro by pipes": PIPE}
#: What the guest's kernel counted, read by the shell itself: a new process would be faults and switches of its own.
COUNTS = ("for f in interrupts stat; do while read -r a b; do case $a in LOC:|ctxt) echo \"$a $b\";; esac; done </proc/$f; done; "
          "read -r a b </proc/uptime; echo \"up $a\"")
#: What a window counts in the guest, and one of it.
GUEST_COUNTS = {"clock ticks": "clock tick", "timer interrupts": "timer interrupt", "context switches": "context switch"}


@dataclass
class Told:
    """What all nodes together counted, and the seconds since the start after which they told it."""

    seconds: float
    counts: dict

    def since(self, before):
        """What was counted between."""
        return Told(self.seconds - before.seconds, {name: self.counts[name] - before.counts[name] for name in self.counts})

    def faults(self):
        """Faults of all kinds."""
        return sum(self.counts[f"{kind}_faults"] for kind in KINDS)


@dataclass
class Boot:
    """One boot: seconds until all CPUs were up, until the shell, and what the nodes told then."""

    cpus: float
    shell: float
    told: Told = None


def told_by(statistics_of_nodes):
    """The figures of nodes as one."""
    counts = {}
    for figures in statistics_of_nodes:
        dsm = figures["dsm"]
        # The mean is told, not the sum; it is of the same faults but for those under way.
        faults = sum(dsm[f"{kind}_faults"] for kind in KINDS)
        own = {**{name: dsm[name] for name in (*TABLES, *(f"{kind}_faults" for kind in KINDS), "zero_grants", "pages_in")},
               "messages": figures["messages_out"], "bytes": figures["bytes_out"],
               "interrupts": figures["remote_interrupts_out"], "waited_us": figures["fault_mean_us"] * faults}
        for name, count in own.items():
            counts[name] = counts.get(name, 0) + count
    return Told(statistics.mean(figures["at_ms"] for figures in statistics_of_nodes) / 1e3, counts)


def figures_now(client, machine):
    """What the nodes counted, told by each after this was asked."""
    asked, until = None, time.monotonic() + FIGURES_LIMIT
    while True:
        status = movetest.request(client, machine, {"cmd": "status"})["status"]
        asked = status["at_ms"] if asked is None else asked
        figures = [node["statistics"] or {} for node in status["nodes"]]
        if all("dsm" in node and (node.get("at_ms") or 0) >= asked for node in figures):
            return told_by(figures)
        if time.monotonic() > until:
            raise LabError(f"the nodes told no figures within {FIGURES_LIMIT} s")
        drain(machine, 0.5)


def to_the_shell(machine, cpus):
    """Waits for the shell of a guest whose CPUs came up after so many seconds."""
    machine.expect(r"Run /bin/sh as init process", SHELL_LIMIT)
    machine.expect(r"^# ", SHELL_LIMIT)
    boot = Boot(cpus, time.monotonic() - machine.begun)
    # What the kernel says now would come between the answers.
    ask(machine, "PS1=; mkdir -p /proc; mount -t proc proc /proc; echo 1 >/proc/sys/kernel/printk")
    return boot


def boot_one(tests):
    """The guest on one host."""
    arguments = ["--cpus", str(HOSTS), "--memory", f"{HOSTS * MIB_EACH}M", "--disk", PROGRAMS,
                 "--append", f"{tests.hosts.emulation_options()} {INITRD_SHELL} loglevel=7", IMAGE]
    with Machine(tests.hosts, "bench-boot-one", arguments, LOGS) as machine:
        machine.expect(rf"Brought up 1 node, {HOSTS} CPUs", CPUS_LIMIT)
        boot = to_the_shell(machine, time.monotonic() - machine.begun)
        machine.shut_down(240)
    say(f"     one host: all CPUs after {boot.cpus:.1f} s, the shell after {boot.shell:.1f} s")
    return boot


def boot_two(tests, seconds=None):
    """The guest over two hosts; with `seconds` also its windows, of so many seconds each."""
    with tests.all_cpus_up("bench-boot-two", "--api", API, nodes=HOSTS, cpus=HOSTS) as machine:
        try:
            boot = to_the_shell(machine, time.monotonic() - machine.begun)
            with movetest.in_host(tests.hosts, "python3", f"/lab/share/{movetest.CLIENT}", API) as client:
                boot.told = figures_now(client, machine)
                say(f"     two hosts: all CPUs after {boot.cpus:.1f} s, the shell after {boot.shell:.1f} s, {boot.told.faults()} faults")
                windows = measure_windows(client, machine, seconds) if seconds else {}
            machine.shut_down(240)
        finally:
            machinetest.report(machine)
    return boot, windows


def measure_windows(client, machine, seconds):
    """All windows: name, then rates a second by name."""
    machinetest.look_around(machine, cpus=HOSTS, nodes=HOSTS, mib=HOSTS * MIB_EACH)
    machinetest.mount_programs(machine)
    ask(machine, f"mkdir -p {ROOT}; mount -t ext4 -o ro /dev/vda1 {ROOT} && mount -t tmpfs tmpfs {ROOT}/tmp && "
                 f"mkfifo {ROOT}/tmp/forth {ROOT}/tmp/back")
    found = {}
    for name, lines in WINDOWS.items():
        with running(machine, name, lines):
            found[name] = window(client, machine, seconds)
        shown = ", ".join(f"{what} {rate:.1f}" for what, rate in found[name].items())
        say(f"     {name}: a second: {shown}")
    return found


@contextlib.contextmanager
def running(machine, name, lines):
    """Lines of shell that run in the guest meanwhile, one on each CPU."""
    for cpu, line in enumerate(lines):
        # The file says that it runs, and another one each time: the initrd has no `rm`.
        mark = f"/tmp/runs-{machine.commands}"
        ask(machine, f"chroot {ROOT} /usr/bin/taskset -c {cpu} /bin/sh -c ': >{mark}; {line}' & load{cpu}=$!; "
                     f"while ! [ -e {ROOT}{mark} ]; do sleep 0.02; done")
    drain(machine, SETTLE)
    yield
    if lines:
        loads = " ".join(f"$load{cpu}" for cpu in range(len(lines)))
        said = ask(machine, f"for p in {loads}; do read -r a </proc/$p/stat && echo $a; done; "
                            f"kill {loads} && echo $((6 * 7)) stopped")
        # Hundredths of a second of the guest's time, in the kernel too.
        times = [(int(user) + int(system)) / 100 for user, system in
                 re.findall(r"^\d+ \(sh\) \w(?: -?\d+){10} (\d+) (\d+) ", said, re.M)]
        if "42 stopped" not in said or len(times) != len(lines):
            raise LabError(f"{name}: what was to run ended by itself: {said.strip()[-300:]}")
        say(f"     {name}: {', '.join(map(str, times))} s of CPU by the guest's clock")
        drain(machine, SETTLE)


def guest_counts(machine):
    """What the guest counted so far on all CPUs, by the names of GUEST_COUNTS, and when that was."""
    said = ask(machine, COUNTS)
    found = [re.search(pattern, said, re.M) for pattern in (r"^up ([\d.]+)$", rf"^LOC:((?: +\d+){{{HOSTS}}}) ", r"^ctxt (\d+)$")]
    if not all(found):
        raise LabError(f"the guest's counts of interrupts and switches are not as expected: {said.strip()[-300:]!r}")
    up, interrupts, switches = (match.group(1) for match in found)
    counts = (float(up) * HZ, sum(map(int, interrupts.split())), int(switches))
    return time.monotonic(), dict(zip(GUEST_COUNTS, counts))


def window(client, machine, seconds):
    """Rates a second: faults and messages as the nodes counted, the others as the guest did.

    The guest is asked before and after the nodes: what the questions cost it is in no fault counted. So its time is
    some seconds longer, which is why rates are compared.
    """
    begun, guest = guest_counts(machine)
    nodes = figures_now(client, machine)
    drain(machine, seconds)
    nodes = figures_now(client, machine).since(nodes)
    ended, after = guest_counts(machine)
    rates = {"faults": nodes.faults(), "messages": nodes.counts["messages"], "flushes": nodes.counts["flushes"]}
    rates = {name: count / nodes.seconds for name, count in rates.items()}
    return rates | {name: (after[name] - guest[name]) / (ended - begun) for name in GUEST_COUNTS}


def show(figures, two, alone, windows):
    """Puts all figures; of the boots over two hosts the one with the median time tells what was counted."""
    for what, of in (("all CPUs up", "cpus"), ("the initrd's shell", "shell")):
        values = [statistics.median(getattr(boot, of) for boot in boots) for boots in (two, alone)]
        figures.put(f"boot: {what}; one host", values[:1], values[1:], "floor", "s")
    told = sorted(two, key=lambda boot: boot.shell)[(len(two) - 1) // 2].told
    counts, faults = told.counts, told.faults()

    def put(name, value, unit):
        figures.put(name, [value], unit=unit)

    for kind in KINDS:
        put(f"boot: {kind} faults", counts[f"{kind}_faults"], "faults")
    put("boot: of all faults, on pages nobody had written", counts["zero_grants"], "faults")
    put("boot: mean time of a fault", counts["waited_us"] / faults / 1e3, "ms")
    put("boot: pages that crossed", counts["pages_in"], "pages")
    put("boot: bytes that crossed", counts["bytes"] / 1e6, "MB")
    put("boot: messages", counts["messages"], "messages")
    put("boot: messages per fault", counts["messages"] / faults, "messages")
    put("boot: bytes per fault", counts["bytes"] / faults, "bytes")
    put("boot: remote interrupts", counts["interrupts"], "interrupts")
    for name, (words, unit) in TABLES.items():
        put(f"page tables: {words}", counts[name], unit)
        put(f"page tables: {words} per second", counts[name] / told.seconds, f"{unit}/s")
        put(f"page tables: {words} per message", counts[name] / counts["messages"], unit)
    for name, rates in windows.items():
        for what, rate in rates.items():
            put(f"{name}: {what}", rate, "/s")
        for of, one in GUEST_COUNTS.items():
            # Of none of them there is no share.
            if rates[of]:
                put(f"{name}: faults per {one}", rates["faults"] / rates[of], "faults")


def measure(tests, boots, seconds):
    """Boots over two hosts and on one, in turns, and the windows of the last one over two hosts."""
    tests.up(hosts=HOSTS, cpus_each=1, mib_each=MIB_EACH)
    movetest.programs(tests.hosts)
    tests.programs_disk()
    two, alone, windows = [], [], {}
    for turn in range(boots):
        alone.append(boot_one(tests))
        boot, windows = boot_two(tests, seconds if turn == boots - 1 else None)
        two.append(boot)
    return two, alone, windows


def main(prog, words):
    """Runs the benchmark with the words of the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")
    parser.add_argument("--boots", type=int, default=3, help="boots over two hosts and on one, of which the median counts (3)")
    parser.add_argument("--seconds", type=int, default=60, help="length of each window after the last boot (60)")
    parser.add_argument("--rival", metavar="COMMIT", action="append", default=[],
                        help="instead: boots over two hosts beside the version of this commit, in turns; can be given several times")
    args = parser.parse_args(words)
    if args.boots < 1 or args.seconds < 10:
        parser.error(f"--boots {args.boots} --seconds {args.seconds}: at least one boot, and windows of 10 s")
    if os.geteuid():
        sys.exit(f"{prog}: needs root, for the lab")
    end_on_signals()
    tests = machinetest.MachineTests()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            rivals = rival.built(args.rival)
            cargotest.build()
            guestimage.obtain("minimal")
            if rivals:
                tests.up(hosts=HOSTS, cpus_each=1, mib_each=MIB_EACH)
                found = [rival.compare(tests, rivals, args.boots)]
            else:
                found = measure(tests, args.boots, args.seconds)
        if not args.json:
            print(f"two emulated hosts; the guest's clock runs {SLOWER} times slower: a real second has {SLOWER} times fewer "
                  "ticks than on hardware")
        (rival.show if rivals else show)(Figures(args.json), *found)
    except (LabError, AssertionError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{prog}: {one_line(error)}")
    except KeyboardInterrupt as signal:
        sys.exit(f"{prog}: interrupted{f' by {signal}' if str(signal) else ''}")
    finally:
        tests.close()
