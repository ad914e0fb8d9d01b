"""krg-vmm on the hosts of a lab of its own: what the tests and the demo run."""

import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from . import process
from .console import Console
from .errors import LabError
from .network import address
from .paths import CI
from .steps import say

LAB = CI / "lab"
#: On the hosts, in memory: a program that is started over 9p is read page by page.
PROGRAM = "/tmp/krg-vmm"
SECRET = "/tmp/secret"
NODE_PORT = 7447
#: The clock of a guest over several emulated hosts runs this many times slower than real time: at their
#: speed every tick costs tens of page transfers, and at full rate ticks alone would fill the time.
SLOWER = 40
#: What else such a guest is told. The timer in deadline mode counts in TSC ticks, whose number a
#: second Linux keeps in 32 bits (tsc_khz * 125): above 14 times it would go wrong. Mitigations and slow
#: grace periods cost minutes here.
OPTIONS = "lapic=notscdeadline mitigations=off rcupdate.rcu_expedited=1"
#: The part by which the hosts' measurements of one clock may differ.
CLOCKS_AGREE = 0.001
#: A long wait says this often, in seconds, what the console shows.
PROGRESS = 60


class LabHosts:
    """A lab beside any other, in a `with`: its hosts end with it."""

    def __init__(self, hosts, memory="1536M"):
        self.count = hosts
        self.memory = memory
        # A short path: the hosts' sockets are in it.
        self.state = Path(tempfile.mkdtemp(prefix="krg-lab-"))
        self.environment = dict(os.environ, LAB_DIR=str(self.state))
        self.secret = secrets.token_hex(32)
        self.daemons = []

    def __enter__(self):
        try:
            # Hosts with one CPU: an idle second one costs the emulation more than it brings.
            self.up()
            for index in range(self.count):
                self.prepare(f"h{index}")
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_):
        self.down()

    def up(self):
        """Starts the hosts until their clocks agree: a kernel that starts on a busy machine may take its TSC for
        another than it is, and a machine is not possible over hosts of different clocks."""
        for last in (False, False, True):
            self.lab("up", "--hosts", str(self.count), "--cpus", "1", "--mem", self.memory, limit=900)
            clocks = [self.tsc_khz(f"h{index}") for index in range(self.count)]
            if last or max(clocks) - min(clocks) < max(clocks) * CLOCKS_AGREE:
                return
            say(f"     the hosts' kernels measured TSCs of {clocks} kHz: started again")
            self.lab("down")

    def down(self):
        """Ends the hosts and removes the lab's folder."""
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        subprocess.run([LAB, "down"], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        shutil.rmtree(self.state, ignore_errors=True)

    def lab(self, *words, limit=60):
        """The output of a `ci/lab` command that has to succeed."""
        try:
            done = subprocess.run([LAB, *words], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
                                  timeout=limit)
        except subprocess.TimeoutExpired:
            raise LabError(f"ci/lab {' '.join(words[:3])}: not done within {limit} s") from None
        if done.returncode:
            raise LabError(f"ci/lab {' '.join(words[:3])}: status {done.returncode}: "
                           f"{done.stderr.decode(errors='replace').strip()[-400:]}")
        return done.stdout.decode(errors="replace")

    def shell(self, host, line, limit=60):
        """The output of a line of shell on a host, which has to succeed."""
        return self.lab("exec", host, line, limit=limit)

    def prepare(self, host):
        """Puts the program and the cluster's secret into a host's memory."""
        self.shell(host, f"cp /lab/bin/krg-vmm {PROGRAM} && umask 077 && echo {self.secret} >{SECRET}")

    def start_node(self, host, *variables):
        """Starts the node daemon on a host, if it has none, and waits until it listens; `variables` are its own."""
        if self.processes(host):
            return
        listen = address(int(host[1:]))
        with open(self.state / f"node-{host}.log", "wb") as log:
            self.daemons.append(subprocess.Popen(
                [LAB, "exec", host, "--", "env", *variables, PROGRAM, "node", "--listen", listen, "--secret-file", SECRET],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        if not process.wait_for(lambda: f":{NODE_PORT}" in self.shell(host, "ss -ltn"), 60, interval=0.5):
            raise LabError(f"{host}: the node daemon doesn't listen: {self.node_log(host)}")

    def end_node(self, host):
        """Ends the node daemon of a host, if it has one."""
        self.shell(host, "pkill krg-vmm || true")
        if not process.wait_for(lambda: not self.processes(host), 30, interval=0.2):
            raise LabError(f"{host}: the node daemon doesn't end")

    def node_log(self, host):
        """What the node daemon of a host has said."""
        return (self.state / f"node-{host}.log").read_text(errors="replace").strip()[-400:]

    def tsc_khz(self, host):
        """The frequency of a host's TSC, as its kernel found it."""
        match = re.search(r"tsc: Detected ([0-9.]+) MHz processor", self.shell(host, "dmesg"))
        if not match:
            raise LabError(f"{host}: its kernel doesn't say how fast its TSC is")
        return round(float(match.group(1)) * 1000)

    def emulation_options(self):
        """The guest's kernel parameters for a machine over several emulated hosts; says what they do."""
        khz = self.tsc_khz("h0")
        say(f"     for the sake of emulation: {OPTIONS}; the guest's clock runs {SLOWER} times slower than real "
            f"time (its TSC has {khz} kHz, tsc_early_khz={khz * SLOWER} tells it otherwise)")
        return f"{OPTIONS} tsc_early_khz={khz * SLOWER}"

    def status(self, socket):
        """What the control socket `socket` of the krg-vmm on h0 says."""
        client = (f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{socket}'); "
                  "s.sendall(b'{\"cmd\":\"status\"}\\n'); print(s.makefile().readline(), end='')")
        answer = json.loads(self.lab("exec", "h0", "--", "python3", "-c", client))
        if not answer["ok"]:
            raise LabError(f"{socket}: {answer}")
        return answer["status"]

    def processes(self, host):
        """Command lines of all krg-vmm processes on a host."""
        return [line for line in self.shell(host, "pgrep -ax krg-vmm || true").splitlines() if line]



class Machine(Console):
    """A guest of krg-vmm on host h0, with its console; use it in a `with`."""

    def __init__(self, hosts, name, arguments, folder):
        """Starts krg-vmm with `arguments`; its output goes to `folder`/`name`.*."""
        folder.mkdir(parents=True, exist_ok=True)
        self.messages = folder / f"{name}.messages"
        self.begun = self.shown = time.monotonic()
        with open(self.messages, "wb") as errors:
            super().__init__([str(LAB), "exec", "-i", "h0", "--", PROGRAM, "--secret-file", SECRET, *arguments],
                             log=folder / f"{name}.console", stderr=errors, env=hosts.environment)

    def read(self, timeout):
        """As for any console; long waits show that something goes on."""
        more = super().read(timeout)
        if time.monotonic() - self.shown >= PROGRESS:
            self.shown = time.monotonic()
            last = self.text.rstrip().rsplit("\n", 1)[-1]
            say(f"     {self.shown - self.begun:5.0f} s: {last[-100:] or 'no output'}")
        return more

    def expect(self, pattern, timeout=60):
        """As for any console; when krg-vmm has ended instead, its own last line says why."""
        try:
            return super().expect(pattern, timeout)
        except LabError as error:
            if self.process.poll() is None:
                raise
            reason = (self.said() or ["it said nothing"])[-1]
            raise LabError(f"krg-vmm ended with status {self.process.returncode}: {reason}; the console's last output "
                           f"was: {self.text[-200:]!r}") from error

    def said(self):
        """Lines that krg-vmm itself wrote, without its prefix."""
        lines = self.messages.read_text(errors="replace").splitlines()
        return [line.removeprefix("krg-vmm: ").strip() for line in lines if line.startswith("krg-vmm: ")]

    def counters(self):
        """The nodes' lines of figures, told when the machine ends."""
        return [line for line in self.said() if re.match(r"node \d+ \(.*\): \d+ vCPU exits", line)]

    def await_end(self, limit):
        """Takes in output until krg-vmm ends; its exit status."""
        until = time.monotonic() + limit
        while self.read(min(1.0, until - time.monotonic())):
            if time.monotonic() > until:
                raise LabError(f"krg-vmm did not end within {limit} s; the console's last output was: {self.text[-300:]!r}")
        return self.process.wait(10)

    def shut_down(self, limit=120, command="echo o >/proc/sysrq-trigger"):
        """Powers the guest off from its shell; krg-vmm has to end with 0."""
        self.send(f"{command}\n")
        status = self.await_end(limit)
        if status:
            raise LabError(f"krg-vmm ended with status {status} after the guest's power-off: {' | '.join(self.said()[-2:])}")
