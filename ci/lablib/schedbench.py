"""`ci/bench sched --lab`: work of a stock Linux over two emulated hosts, with the scheduler and with vCPUs that stay.

One guest does each piece of work in turns, with vCPUs where they were placed (`static`) and with the default policy.
Times are real seconds between emulated hosts: only their ratio says something.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time

from . import cargotest, guestimage, machinetest, movetest
from .errors import LabError
from .guestimage import PROJECT
from .membench import Figures
from .steps import end_on_signals

#: Hosts, with a CPU each.
CPUS = 2
#: Each is a line of shell that works on both CPUs and ends.
WORK = {
    "make -j2 of bzip2":
        f"rm -f /tmp/{PROJECT}/*.[oa]; make -C /tmp/{PROJECT} -j2 CFLAGS='-O0 -D_FILE_OFFSET_BITS=64' bzip2 >/dev/null",
    "locks: a shell on each CPU makes files in one folder":
        "mkdir -p /tmp/locks; for n in 0 1; do taskset -c $n bash -c "
        "'for i in {1..1000}; do : >/tmp/locks/$0.$i; done' $n & done; wait; rm -r /tmp/locks",
}
POLICIES = ("static", "affinity")
#: Longest that a piece of work may take.
LIMIT = 1200


class Guest:
    """A machine over two hosts, and the way to its scheduler."""

    def __init__(self, machine, client):
        self.machine = machine
        self.client = client

    def timed(self, policy, line):
        """Seconds that `line` takes under `policy`, and where the vCPUs are then; they start at home."""
        movetest.request(self.client, self.machine, {"cmd": "sched", "policy": "static"})
        movetest.request(self.client, self.machine, {"cmd": "migrate", "vcpu": "all", "node": "home"})
        movetest.request(self.client, self.machine, {"cmd": "sched", "policy": policy})
        begun = time.monotonic()
        self.machine.check(line, LIMIT)
        took = time.monotonic() - begun
        status = movetest.request(self.client, self.machine, {"cmd": "status"})["status"]
        where = [node["node"] for vcpu in range(CPUS) for node in status["nodes"] if vcpu in node["vcpus"]]
        moved = movetest.request(self.client, self.machine, {"cmd": "sched"})["sched"]["moves"]
        print(f"ci/bench: {line[:40]}...: {policy}: {took:.1f} s, {moved} moves so far, vCPUs on nodes {where}", file=sys.stderr)
        return took


def measure(tests, turns):
    """All work under all policies, in turns: name, then seconds with the scheduler and without."""
    found = []
    with movetest.entered(tests, "sched", CPUS, "--sched", "static") as machine:
        with movetest.in_host(tests.hosts, "python3", f"/lab/share/{movetest.CLIENT}", machinetest.API) as client:
            guest = Guest(machine, client)
            for name, line in WORK.items():
                # What is read from the disk is there afterwards.
                guest.timed("static", line)
                times = {policy: [] for policy in POLICIES}
                for turn in range(turns):
                    for policy in POLICIES if turn % 2 == 0 else reversed(POLICIES):
                        times[policy].append(guest.timed(policy, line))
                found.append((name, *(statistics.median(times[policy]) for policy in ("affinity", "static"))))
        machine.shut_down(240)
    return found


def main(prog, words):
    """Runs the benchmark with the words of the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")
    parser.add_argument("--turns", type=int, default=3, help="times of each work under each policy, of which the median counts (3)")
    args = parser.parse_args(words)
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: at least one")
    if os.geteuid():
        sys.exit(f"{prog}: needs root, for the lab")
    end_on_signals()
    tests = machinetest.MachineTests()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            cargotest.build()
            guestimage.obtain("minimal")
            guestimage.obtain("build")
            found = measure(tests, args.turns)
        for name, scheduled, static in found:
            Figures(args.json).put(f"{name}; with vCPUs that stay", [scheduled], [static], unit="s")
    except LabError as error:
        sys.exit(f"{prog}: {error}")
    finally:
        tests.close()
