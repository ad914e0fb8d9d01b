"""`ci/bench memory`: what memory costs inside a guest, beside the same loops in a guest of QEMU and KVM.

All of it is on an emulated host, where times say nothing by themselves: what counts is the ratio of two guests
that ran in turns. Both have the same stock kernel, memory and processor; process 1 is the program
guest-kernel/memory, which times its loops and switches off.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import bootfiles, cargotest, guestimage
from .errors import LabError
from .labmachine import LAB, OPTIONS, PROGRAM, SECRET, SLOWER, LabHosts
from .network import address
from .paths import OUT
from .steps import end_on_signals

#: Words of every guest's kernel command line.
KERNEL = "console=ttyS0 quiet tsc=reliable no_timer_check mitigations=off panic=-1"
#: Where a host has the files of this benchmark, in memory.
FOLDER = "/tmp/bench"
QEMU = "qemu-system-x86_64"
FIRMWARE = ["seabios/bios-256k.bin", "qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin"]
LOOP = re.compile(r"loop: \d+ MiB: chase ([0-9.]+) ns, stream ([0-9.]+) ns, store ([0-9.]+) ns")
LOOPS = {"chase": "read that waits for the last", "stream": "word read in order", "store": "cache line written in order"}


def say(text):
    """Progress, apart from the figures."""
    print(text, file=sys.stderr, flush=True)


def initrd(program, to):
    """An initial RAM disk with the program as its only file."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(program, Path(folder, "init"))
        with open(to, "wb") as out:
            subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=folder, input=b"init\n", stdout=out, check=True)


def qemu_files(to):
    """Copies QEMU, its libraries and what it loads into the folder `to`."""
    program = shutil.which(QEMU)
    needed = subprocess.run(["ldd", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    for path in [program, *re.findall(r"=> (/\S+)", needed), *(Path("/usr/share", name) for name in FIRMWARE)]:
        shutil.copy(path, to)


class Guests:
    """A lab with the files of the benchmark, and the guests that run in it."""

    def __init__(self, hosts, mib, rounds):
        self.hosts = hosts
        #: Of a guest: the loops need a part of it.
        self.memory = 2 * mib + 128
        self.numbers = f"memory={mib},{rounds}"
        self.loop = (mib, rounds)

    def prepare(self):
        """Puts all files into the memory of h0."""
        share = self.hosts.state / "share/bench"
        share.mkdir()
        qemu_files(share)
        bootfiles.extract(guestimage.obtain("minimal"), share)
        (share / "initrd").unlink()
        initrd(cargotest.guest_program("guest-memory"), share / "initrd")
        shutil.copy(cargotest.guest_program("guest-memory"), share)
        self.hosts.shell("h0", f"cp -r /lab/share/bench {FOLDER}")

    def run(self, name, words, limit=600):
        """Runs a command on h0 whose output has the loops' lines; the best time of each loop in ns."""
        begun = time.monotonic()
        done = subprocess.run([LAB, "exec", "--timeout", str(limit), "h0", "--", *words], env=self.hosts.environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        text = done.stdout.decode(errors="replace").replace("\r", "")
        found = LOOP.findall(text)
        if len(found) != self.loop[1]:
            errors = done.stderr.decode(errors="replace").strip()
            raise LabError(f"{name}: status {done.returncode}, {len(found)} times of {self.loop[1]}: {errors[-300:]} {text[-300:]!r}")
        # Whatever else ran can only have taken time.
        best = {kind: min(float(times[number]) for times in found) for number, kind in enumerate(LOOPS)}
        shown = ", ".join(f"{kind} {ns:.3f} ns" for kind, ns in best.items())
        say(f"     {name}: {shown} ({time.monotonic() - begun:.0f} s)")
        return best

    def krg_vmm(self, *options, append=""):
        """A guest of krg-vmm."""
        return self.run("krg-vmm" + (" over two hosts" if "--nodes" in options else ""), [
            PROGRAM, "--secret-file", SECRET, "--kernel", f"{FOLDER}/vmlinuz", "--initrd", f"{FOLDER}/initrd",
            "--append", f"{KERNEL} {append} {self.numbers}", *options])

    def alone(self, append=""):
        """A guest of krg-vmm on h0 alone."""
        return self.krg_vmm("--cpus", "1", "--memory", f"{self.memory}M", append=append)

    def qemu(self):
        """A guest of QEMU and KVM on h0."""
        return self.run("QEMU", [
            "env", f"LD_LIBRARY_PATH={FOLDER}", f"{FOLDER}/{QEMU}", "-L", FOLDER, "-accel", "kvm", "-cpu", "host",
            "-M", "q35", "-smp", "1", "-m", f"{self.memory}M", "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", "stdio", "-no-reboot", "-kernel", f"{FOLDER}/vmlinuz", "-initrd", f"{FOLDER}/initrd",
            "-append", f"{KERNEL} {self.numbers}"])

    def host(self):
        """The same program on the host itself."""
        mib, rounds = self.loop
        return self.run("no VM", [f"{FOLDER}/guest-memory", "loop", str(mib), str(rounds)])

    def two_hosts(self, slow):
        """A guest of krg-vmm over h0 and h1 with its loops on h0: memory only that host uses."""
        lines = "".join(f"{address(n)} cpus=1 mem={self.memory}M\n" for n in range(2))
        self.hosts.shell("h0", f"printf '%s' '{lines}' >/tmp/hosts.txt")
        return self.krg_vmm("--nodes", "/tmp/hosts.txt", "--sched", "off", append=slow)


class Figures:
    """Figures as they come, for people or machines."""

    def __init__(self, as_json):
        self.as_json = as_json

    def put(self, name, values, others=None, other="rival", unit="ns"):
        """The best of `values` beside that of `others`, which ran in turns with them: noise only makes slower."""
        value, beside = min(values), min(others) if others else None
        if self.as_json:
            line = {"name": name, "value": round(value, 3), "unit": unit}
            if beside is not None:
                line |= {other: round(beside, 3), "ratio": round(value / beside, 3)}
            print(json.dumps(line), flush=True)
        else:
            end = f"  {other} {beside:10.3f}  ratio {value / beside:.3f}" if beside is not None else ""
            print(f"  {name:56} {value:10.3f} {unit}{end}", flush=True)


def measure(guests, figures, turns):
    """Runs the guests in turns and shows the figures."""
    runs = {"krg": [], "qemu": [], "host": [], "two": [], "slow": []}
    for turn in range(turns):
        # Who begins changes, too.
        order = ["krg", "qemu"] if turn % 2 == 0 else ["qemu", "krg"]
        for kind in order:
            runs[kind].append(guests.alone() if kind == "krg" else guests.qemu())
        runs["host"].append(guests.host())
    for kind, what in LOOPS.items():
        times = {name: [run[kind] for run in all_runs] for name, all_runs in runs.items()}
        figures.put(f"{kind}: {what}; guest of QEMU", times["krg"], times["qemu"])
        figures.put(f"{kind}: the same; no VM", times["krg"], times["host"], "floor")
    # A guest over several emulated hosts has a slow clock, and so few ticks: its rival has the same.
    guests.hosts.start_node("h1")
    slow = f"{OPTIONS} tsc_early_khz={guests.hosts.tsc_khz('h0') * SLOWER}"
    for turn in range(max(1, turns // 2)):
        runs["two"].append(guests.two_hosts(slow))
        runs["slow"].append(guests.alone(slow))
    for kind in LOOPS:
        times = {name: [run[kind] * SLOWER for run in runs[name]] for name in ("two", "slow")}
        figures.put(f"{kind}: over two hosts; the guest on one host", times["two"], times["slow"], "floor")


def main(prog, words):
    """Runs the benchmark with the words of the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")
    parser.add_argument("--mib", type=int, default=128, help="memory the loops go over (128)")
    parser.add_argument("--rounds", type=int, default=5, help="times of each loop in a guest, of which the best counts (5)")
    parser.add_argument("--turns", type=int, default=5, help="guests of each kind (5)")
    args = parser.parse_args(words)
    if os.geteuid():
        sys.exit(f"{prog}: needs root, for the lab")
    end_on_signals()
    (OUT / "test").mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            cargotest.build()
        with LabHosts(2) as hosts:
            guests = Guests(hosts, args.mib, args.rounds)
            guests.prepare()
            measure(guests, Figures(args.json), args.turns)
    except LabError as error:
        sys.exit(f"{prog}: {error}")
