"""A shell on a guest's serial console, driven like a person at a terminal would (expect-like).

The console is the standard input and output of a process: a VMM, or `ci/lab exec -i HOST VMM`.
"""

import codecs
import os
import re
import select
import signal
import subprocess
import time

from .errors import LabError

#: Terminal control sequences (ECMA-48 CSI, and OSC), which shells and systemd write.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>()][0-9A-Za-z]?")


class ConsoleTimeout(LabError):
    """What was awaited did not come in time; the text has the end of what came instead."""


class Console:
    """A process with a guest's console on its standard streams; use it in a `with`."""

    def __init__(self, argv, log=None, **options):
        """Starts `argv`; `log` is a path that gets all output."""
        self.argv = argv
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **options)
        self.log = open(log, "wb") if log else None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        #: All output so far, without control sequences and carriage returns.
        self.text = ""
        self.raw = ""
        #: How far `text` has been looked at by `expect`.
        self.seen = 0
        self.commands = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, timeout=10):
        """Ends the process, which it may do itself first when its input ends."""
        self.process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(timeout)
                except subprocess.TimeoutExpired:
                    continue
        self.process.stdout.close()
        if self.log:
            self.log.close()

    def read(self, timeout):
        """Takes in what comes within `timeout` seconds; False at the end of the output."""
        ready, _, _ = select.select([self.process.stdout], [], [], max(timeout, 0))
        if not ready:
            return True
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return False
        if self.log:
            self.log.write(data)
            self.log.flush()
        self.raw += self.decoder.decode(data)
        # A sequence may be cut in two: its beginning waits for the rest.
        cut = self.raw.rfind("\x1b")
        whole = self.raw if cut < 0 or CONTROL.match(self.raw, cut) or len(self.raw) - cut > 32 else self.raw[:cut]
        self.raw = self.raw[len(whole):]
        self.text += CONTROL.sub("", whole).replace("\r", "")
        return True

    def expect(self, pattern, timeout=60):
        """Waits for the regular expression in new output; its match, past which the next one looks."""
        compiled = re.compile(pattern, re.M)
        until = time.monotonic() + timeout
        while True:
            if match := compiled.search(self.text, self.seen):
                self.seen = match.end()
                return match
            left = until - time.monotonic()
            if left <= 0:
                raise ConsoleTimeout(f"console: no {pattern!r} within {timeout:.0f} s; the last output was: "
                                     f"{self.text[-400:]!r}")
            if not self.read(min(left, 1.0)):
                raise LabError(f"console: {self.argv[0]} ended with status {self.process.wait()}; the last output was: "
                               f"{self.text[-400:]!r}")

    def send(self, text):
        """Types `text`."""
        data = text.encode()
        try:
            while data:
                data = data[self.process.stdin.write(data):]
        except OSError as error:
            raise LabError(f"console: {self.argv[0]}: {error.strerror}") from None

    def login(self, timeout=600):
        """Waits for root's shell on a booting guest and makes it quiet and plain."""
        self.expect(r"^root@[^\n]*[#] ?$|^[^\n]* login: ?$", timeout)
        if self.text[:self.seen].rstrip().endswith("login:"):
            # An automatic login writes the same prompt, and may be slow to answer it itself.
            try:
                self.expect(r"automatic login", 20)
            except ConsoleTimeout:
                self.send("root\n")
            self.expect(r"^root@[^\n]*[#] ?$", timeout)
        # No echo, no editing, no prompt: then all output is the commands' own. The answer is
        # computed by the shell, so that the echo of this very line can't be taken for it.
        self.send("stty -echo; exec bash --norc --noprofile --noediting\n")
        self.send("PS1=; PS2=; stty -echo; echo quiet-$((6 * 7))\n")
        self.expect(r"quiet-42\n", timeout)

    def start(self, command):
        """Types a command whose end will be marked; the mark to wait for."""
        self.commands += 1
        mark = f"done-{os.getpid()}-{self.commands}"
        self.send(f"{{ {command}\n}} </dev/null; printf '\\n%s %s\\n' {mark} $?\n")
        return mark

    def finish(self, mark, timeout=120):
        """Waits for the end of a started command; its exit status and output."""
        begin = self.seen
        match = self.expect(rf"\n{mark} ([0-9]+)\n", timeout)
        return int(match.group(1)), self.text[begin:match.start()].removeprefix("\n")

    def run(self, command, timeout=120):
        """Runs a command in the guest's shell; its exit status and output."""
        return self.finish(self.start(command), timeout)

    def check(self, command, timeout=120):
        """The output of a command that has to succeed."""
        status, output = self.run(command, timeout)
        if status:
            raise LabError(f"console: {command!r} failed with status {status}: {output.strip()[-400:]}")
        return output
