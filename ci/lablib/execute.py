"""`ci/lab exec`: one command on a host, with its streams, signals and exit status."""

import contextlib
import os
import select
import shutil
import signal
import struct
import sys
import termios
import time
import tty

from . import frames
from .channel import Channel
from .errors import LabError

#: Exit status when the time is up, as timeout(1) has it.
TIMED_OUT = 124
CHUNK = 1 << 16
#: Standard input is not read while more than this many bytes wait for the host.
HIGH_WATER = 4 * CHUNK


def command(words):
    """What to run: one word is a line for the shell, several are a program and its arguments."""
    return ["bash", "-c", words[0]] if len(words) == 1 else list(words)


@contextlib.contextmanager
def raw_terminal(wanted):
    """Standard input without echo and line editing, put back at the end."""
    if not wanted:
        yield
        return
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already is kept
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


class Execution:
    """A command that runs, from our side."""

    def __init__(self, channel, interactive, terminal, timeout):
        self.channel = channel
        self.input_open = interactive
        self.terminal = terminal
        self.deadline = time.monotonic() + timeout if timeout else None
        self.interrupts = 0
        #: Frames to be sent. Sending never blocks: a host that waits for us to take its output
        #: would take no input meanwhile.
        self.out = bytearray()
        # Signals wake the loop through this pipe: their handlers run between Python instructions.
        self.wake, self.signalled = os.pipe()
        os.set_blocking(self.signalled, False)

    def on_signal(self, number, _):
        with contextlib.suppress(BlockingIOError):
            os.write(self.signalled, bytes([number]))

    def listen(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.on_signal)
        if self.terminal:
            signal.signal(signal.SIGWINCH, self.on_signal)

    def forward_signals(self):
        """The exit status when we must stop now, or None."""
        for number in os.read(self.wake, 64):
            if number == signal.SIGWINCH:
                size = shutil.get_terminal_size()
                self.out += frames.pack(b"W", struct.pack("!HH", size.lines, size.columns))
                continue
            self.interrupts += 1
            if self.interrupts > 1 or number == signal.SIGHUP:
                return 128 + number  # hanging up kills what does not want to end
            self.out += frames.pack(b"K", bytes([number]))
            # It may take its time to clean up, not for ever.
            self.deadline = min(self.deadline or float("inf"), time.monotonic() + 5)
        return None

    def forward_input(self):
        data = os.read(0, CHUNK)
        self.out += frames.pack(b"I", data)
        self.input_open = bool(data)

    def relay(self):
        """Runs until the command ends; its exit status."""
        while True:
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                return 128 + signal.SIGINT if self.interrupts else TIMED_OUT
            wants_input = self.input_open and len(self.out) < HIGH_WATER
            sources = [self.channel, self.wake] + ([0] if wants_input else [])
            readable, writable, _ = select.select(sources, [self.channel] if self.out else [], [], left)
            if self.wake in readable and (status := self.forward_signals()) is not None:
                return status
            if self.channel in readable:
                for kind, body in self.channel.receive(0):
                    if kind == b"R":
                        return body[0]
                    if kind in (b"O", b"E"):
                        write_all(1 if kind == b"O" else 2, body)
            if 0 in readable:
                self.forward_input()
            if writable:
                del self.out[:self.channel.send_some(self.out)]


def write_all(fd, data):
    """Writes all of `data`, to a descriptor that may be non-blocking."""
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:
            select.select([], [fd], [])


def execute(host, words, interactive=False, terminal=False, timeout=None):
    """Runs a command on `host` with our standard streams; its exit status.

    With `interactive` it gets our standard input, with `terminal` a terminal besides. Our end,
    by signal, time-out or otherwise, ends the command and its process group.
    """
    if terminal and not os.isatty(0):
        raise LabError("exec: -t needs a terminal as standard input")
    options = {"stdin": int(interactive), "tty": int(terminal)}
    if terminal:
        size = shutil.get_terminal_size()
        options |= {"rows": size.lines, "columns": size.columns, "term": os.environ.get("TERM", "dumb")}
    with Channel.open(host) as channel:
        execution = Execution(channel, interactive, terminal, timeout)
        execution.listen()
        channel.send_start(command(words), **options)
        try:
            with raw_terminal(terminal):
                return execution.relay()
        except BrokenPipeError:
            # Whoever read our output went away, as head does; so say nothing.
            fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(fd, sys.stdout.fileno())
            return 128 + signal.SIGPIPE
