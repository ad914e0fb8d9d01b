"""A connection to the agent of a host, for one command."""

import contextlib
import fcntl
import os
import select
import socket
import time

from . import frames
from .errors import LabError


class Channel:
    """One free slot of a host, locked and greeted by its agent; use it in a `with`.

    Leaving it hangs up, which ends a command that still runs.
    """

    def __init__(self, host, lock, connection):
        self.host = host
        self.lock = lock
        self.connection = connection
        self.parser = frames.Parser()

    @classmethod
    def open(cls, host, timeout=30.0, attempt=10.0):
        """A channel to `host` within `timeout` seconds.

        A slot whose last user died inside a frame takes the greeting's request for the rest of
        it: after `attempt` seconds without greeting another connection is made.
        """
        until = time.monotonic() + timeout
        reason = "no free slot for one more command"
        while True:
            for number in range(host.slots):
                lock = open(f"{host.slot(number)}.lock", "w")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                connection = socket.socket(socket.AF_UNIX)
                channel = cls(host, lock, connection)
                try:
                    connection.connect(os.fspath(host.slot(number)))
                    channel.send(b"N")
                    if channel.greeted(min(until, time.monotonic() + attempt)):
                        return channel
                    reason = "no answer; is it paused?"
                except (OSError, LabError, frames.FrameError) as error:
                    reason = f"{error}; is it running?"
                except BaseException:
                    channel.close()
                    raise
                channel.close()
                if time.monotonic() > until:
                    break
            if time.monotonic() > until:
                raise LabError(f"{host.name}: {reason}")
            if not host.alive():
                raise LabError(f"{host.name}: not running")
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Hangs up and frees the slot."""
        with contextlib.suppress(OSError):
            self.connection.close()
        self.lock.close()

    def greeted(self, until):
        while (left := until - time.monotonic()) > 0:
            try:
                received = self.receive(left)
            except LabError:
                return False
            if any(kind == b"G" for kind, _ in received):
                return True
        return False

    def fileno(self):
        return self.connection.fileno()

    def send(self, kind, body=b""):
        """Sends one short frame."""
        try:
            self.connection.sendall(frames.pack(kind, body))
        except OSError as error:
            raise LabError(f"{self.host.name}: connection lost ({error.strerror})") from None

    def send_some(self, data):
        """Sends as much of `data` as is taken at once; how many bytes."""
        try:
            return self.connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LabError(f"{self.host.name}: connection lost ({error.strerror})") from None

    def send_start(self, argv, **options):
        """Starts the command; see frames.pack_start for the options."""
        try:
            self.connection.sendall(frames.pack_start(argv, **options))
        except frames.FrameError as error:
            raise LabError(f"{self.host.name}: {error}") from None
        except OSError as error:
            raise LabError(f"{self.host.name}: connection lost ({error.strerror})") from None

    def receive(self, timeout):
        """The frames that arrive next, at least one read's worth, within `timeout` seconds."""
        readable, _, _ = select.select([self.connection], [], [], max(timeout, 0))
        if not readable:
            raise LabError(f"{self.host.name}: no answer in time")
        try:
            data = self.connection.recv(1 << 16)
        except OSError as error:
            raise LabError(f"{self.host.name}: connection lost ({error.strerror})") from None
        if not data:
            raise LabError(f"{self.host.name}: the host is gone")
        return self.parser.feed(data)
