"""A benchmark of two nodes over two emulated hosts."""

import subprocess
import sys
from pathlib import Path

from . import process
from .errors import LabError
from .labmachine import LAB, LabHosts
from .network import address
from .paths import cargo_target

PORT = 7800
#: In a host's memory.
PROGRAM = "/tmp/krg-bench"


class BenchHosts(LabHosts):
    """Two hosts that have the benchmark's program."""

    def __init__(self, program):
        super().__init__(2)
        self.program = Path(program).resolve().relative_to(cargo_target())

    def prepare(self, host):
        self.shell(host, f"cp /lab/target/{self.program} {PROGRAM}")

    def start(self, host, role, words, output):
        command = [PROGRAM, role, f"{address(0)}:{PORT}", *words]
        return subprocess.Popen([LAB, "exec", host, "--", *command], env=self.environment,
                                stdin=subprocess.DEVNULL, stdout=output)


def run(program, words):
    """Runs the benchmark, with these words for both nodes; its figures go to standard output. Its exit status."""
    print("ci/bench: two emulated hosts", file=sys.stderr)
    with BenchHosts(program) as hosts:
        first = hosts.start("h0", "--listen", words, None)
        try:
            listens = lambda: first.poll() is not None or f":{PORT}" in hosts.shell("h0", "ss -ltn")
            if not process.wait_for(listens, 60, interval=0.5):
                raise LabError("h0: the benchmark doesn't listen")
            second = hosts.start("h1", "--peer", words, sys.stderr)
            try:
                return first.wait()
            finally:
                second.kill()
                second.wait()
        finally:
            first.kill()
            first.wait()
