"""The frames between `ci/lab exec` and a host's agent. This file is on both sides.

A frame is one type byte, a 32-bit big-endian length, and that many bytes. Types:

    from the agent                          to the agent
    G  greeting: a new session may start    N  new connection: greet it
                                            X  start: options and the command
    O  standard output                      I  standard input; empty means its end
    E  standard error                       K  signal number, one byte, to the whole job
    R  result: exit status, one byte        W  window size: rows and columns, 16 bits each
"""

import os
import struct

HEADER = struct.Struct("!cI")
#: Largest body of a frame in bytes; a longer one means the stream is out of step.
LIMIT = 1 << 20


class FrameError(Exception):
    """The stream is not one of frames (or is out of step)."""


def pack(kind, body=b""):
    """The bytes of one frame."""
    return HEADER.pack(kind, len(body)) + body


def pack_start(argv, **options):
    """A start frame: `argv` is run with options stdin, tty, rows, columns (numbers) and term."""
    settings = [f"{name}={value}" for name, value in options.items()]
    words = [os.fsencode(word) for word in [*settings, "", *argv]]
    if any(b"\0" in word for word in words):
        raise FrameError("a command can't contain a NUL byte")
    return pack(b"X", b"\0".join(words))


def unpack_start(body):
    """The options of a start frame, and the command as option argv."""
    words = [os.fsdecode(word) for word in body.split(b"\0")]
    if "" not in words:
        raise FrameError("start frame without a command")
    split = words.index("")
    start = {}
    for setting in words[:split]:
        name, _, value = setting.partition("=")
        start[name] = value if name == "term" else int(value)
    start["argv"] = words[split + 1:]
    if not start["argv"]:
        raise FrameError("start frame without a command")
    return start


class Parser:
    """Cuts a byte stream into frames."""

    def __init__(self):
        self.buffer = bytearray()

    def feed(self, data):
        """Adds received bytes; returns the list of (type, body) that are complete now."""
        self.buffer += data
        frames = []
        while len(self.buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self.buffer)
            if length > LIMIT:
                raise FrameError(f"frame of {length} bytes: stream out of step")
            end = HEADER.size + length
            if len(self.buffer) < end:
                break
            frames.append((kind, bytes(self.buffer[HEADER.size:end])))
            del self.buffer[:end]
        return frames
