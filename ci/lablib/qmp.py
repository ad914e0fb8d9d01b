"""QEMU's machine protocol (QMP), one command at a time."""

import json
import socket
import time

from .errors import LabError


class Qmp:
    """A connection to one QEMU's QMP socket; use it in a `with`.

    QEMU serves one client at a time: another one waits for its turn.
    """

    def __init__(self, path, timeout=20.0):
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        until = time.monotonic() + timeout
        while True:
            try:
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > until:
                    raise LabError(f"{path}: {error.strerror}; the host is not running") from None
                time.sleep(0.01)
        self.stream = self.socket.makefile("rw")
        try:
            self.read()
            self("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.stream.close()
        self.socket.close()

    def read(self):
        try:
            line = self.stream.readline()
        except TimeoutError:
            raise LabError(f"{self.path}: no answer from QEMU") from None
        except OSError as error:
            raise LabError(f"{self.path}: {error.strerror}; the host is gone") from None
        if not line:
            raise LabError(f"{self.path}: closed by QEMU; the host is gone")
        return json.loads(line)

    def __call__(self, command, **arguments):
        """Runs a command and returns its result; events are skipped."""
        try:
            self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self.stream.flush()
        except OSError as error:
            raise LabError(f"{self.path}: {error.strerror}; the host is gone") from None
        while True:
            answer = self.read()
            if "error" in answer:
                raise LabError(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
