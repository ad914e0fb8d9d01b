"""Process 1 of an emulated host: runs commands for `ci/lab exec`.

Every virtio-serial port named lab.N is one slot, served by one process; a session is one
connection of the outside to the port and runs one command. When the outside goes away (it was
interrupted, timed out or killed) the port hangs up and the command with all of its session's
processes is killed.
"""

import errno
import fcntl
import os
import select
import signal
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import frames

PORTS = "/sys/class/virtio-ports"
#: asm-generic/ioctls.h; the minimal Python of a host has no termios module.
TIOCSWINSZ = 0x5414
CHUNK = 64 * 1024
#: Output waits in its pipes while more than this many bytes wait for the port.
HIGH_WATER = 4 * CHUNK
#: Seconds between SIGTERM and SIGKILL for the processes of a session that was cut off.
GRACE = 2.0


class Disconnected(Exception):
    """The outside closed the port."""


def set_blocking(fd, blocking):
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    flags = flags & ~os.O_NONBLOCK if blocking else flags | os.O_NONBLOCK
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def set_window(fd, rows, columns):
    fcntl.ioctl(fd, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_some(fd):
    """Bytes from a non-blocking descriptor; b"" at its end, None when there is nothing now."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:  # a terminal whose last process is gone
            return b""
        raise


def session_members(leader):
    """The processes of the session that `leader` founded."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(entry))
    return found


def signal_session(leader, number):
    for pid in session_members(leader):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


class Job:
    """One command: its process, and our ends of its standard streams."""

    def __init__(self, start):
        self.input = None
        self.pending = bytearray()
        self.input_ended = False
        self.streams = {}
        self.status = None
        self.tty = bool(start.get("tty"))
        ours, theirs = [], []
        actions = []
        if self.tty:
            master, slave = os.openpty()
            set_window(master, start.get("rows", 24), start.get("columns", 80))
            name = os.ttyname(slave)
            # Opened by the new session's leader, the terminal becomes its controlling one.
            actions += [(os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
            theirs.append(slave)
            self.input = master
            self.streams[master] = b"O"
        else:
            if start.get("stdin"):
                read_end, self.input = os.pipe()
            else:
                read_end = os.open("/dev/null", os.O_RDONLY)
            out_read, out_write = os.pipe()
            err_read, err_write = os.pipe()
            theirs += [read_end, out_write, err_write]
            actions += [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate(theirs)]
            self.streams = {out_read: b"O", err_read: b"E"}
        ours = set(self.streams) | ({self.input} - {None})
        for fd in ours:
            set_blocking(fd, False)
        environment = dict(os.environ, TERM=start.get("term", "dumb"))
        try:
            self.pid = os.posix_spawnp(start["argv"][0], start["argv"], environment, file_actions=actions,
                                       setsid=True, setsigmask=[],
                                       setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ])
        except OSError:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self.pidfd = os.pidfd_open(self.pid)

    def feed(self, data):
        """Takes standard input; an empty `data` is its end."""
        if self.input is None:
            return
        if data:
            self.pending += data
        else:
            self.input_ended = True
            if self.tty:
                self.pending += b"\x04"  # a terminal's end of file
        self.write_input()

    def write_input(self):
        try:
            while self.pending:
                del self.pending[:os.write(self.input, self.pending[:CHUNK])]
        except BlockingIOError:
            return
        except OSError:  # the command closed its input
            self.pending.clear()
            self.input_ended = True
        if self.input_ended and not self.tty:
            os.close(self.input)
            self.input = None

    def drain(self):
        """All output that is there now, as frames; streams that ended are dropped."""
        out = bytearray()
        for fd, kind in list(self.streams.items()):
            while True:
                data = read_some(fd)
                if data:
                    out += frames.pack(kind, data)
                    continue
                if data == b"":
                    self.drop(fd)
                break
        return out

    def drop(self, fd):
        del self.streams[fd]
        if not self.tty:
            os.close(fd)

    def reap(self):
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.status = code if code >= 0 else 128 - code

    def kill(self):
        """Ends every process of the job's session."""
        signal_session(self.pid, signal.SIGTERM)
        signal_session(self.pid, signal.SIGCONT)
        until = time.monotonic() + GRACE
        while session_members(self.pid) and time.monotonic() < until:
            select.select([], [], [], 0.05)
        signal_session(self.pid, signal.SIGKILL)
        if self.status is None:
            self.reap()

    def close(self):
        for fd in {*self.streams, self.pidfd} | ({self.input} - {None}):
            os.close(fd)


class Session:
    """One connection to a port, and its job."""

    def __init__(self, port):
        self.port = port
        self.parser = frames.Parser()
        self.out = bytearray()

    def run(self):
        set_blocking(self.port, True)
        # A blocking write to a port waits for the outside to connect: no polling, no time used.
        os.write(self.port, frames.pack(b"G"))
        job, rest = self.start()
        set_blocking(self.port, False)
        try:
            if job:
                for kind, body in rest:
                    self.handle(job, kind, body)
                self.relay(job)
            self.flush()
            self.await_hangup()
        except (Disconnected, frames.FrameError):
            if job:
                job.kill()
        finally:
            if job:
                job.close()

    def start(self, ready=()):
        """Waits for the start frame; the job (None with its failure sent) and later frames."""
        ready = list(ready)
        while not ready:
            data = os.read(self.port, CHUNK)
            if not data:
                raise Disconnected
            ready = self.parser.feed(data)
        kind, body = ready.pop(0)
        if kind == b"N":
            # The last connection went unseen, or this one said it before it was greeted.
            os.write(self.port, frames.pack(b"G"))
            return self.start(ready)
        if kind != b"X":
            raise frames.FrameError(f"session starts with {kind!r}")
        start = frames.unpack_start(body)
        try:
            return Job(start), ready
        except OSError as error:
            text = f"{start['argv'][0]}: {error.strerror}\n".encode()
            code = 127 if error.errno == errno.ENOENT else 126
            self.out += frames.pack(b"E", text) + frames.pack(b"R", bytes([code]))
            return None, ready

    def handle(self, job, kind, body):
        if kind == b"N":
            raise Disconnected  # and connected anew before it was seen
        if kind == b"I":
            job.feed(body)
        elif kind == b"K" and body:
            if job.status is None:
                signal_session(job.pid, body[0])
        elif kind == b"W" and job.tty and len(body) == 4:
            set_window(job.input, *struct.unpack("!HH", body))

    def receive(self, job):
        try:
            data = os.read(self.port, CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise Disconnected
        for kind, body in self.parser.feed(data):
            self.handle(job, kind, body)

    def relay(self, job):
        while job.status is None:
            poll = select.poll()
            # A job slow to read its input holds back the port, and so the outside.
            busy = len(job.pending) > HIGH_WATER
            poll.register(self.port, (0 if busy else select.POLLIN) | (select.POLLOUT if self.out else 0))
            poll.register(job.pidfd, select.POLLIN)
            for fd in job.streams if len(self.out) < HIGH_WATER else ():
                poll.register(fd, select.POLLIN)
            if job.pending:
                wanted = select.POLLOUT | (select.POLLIN if job.input in job.streams else 0)
                poll.register(job.input, wanted)
            for fd, events in poll.poll():
                if fd == self.port:
                    if events & select.POLLHUP:
                        raise Disconnected
                    if events & select.POLLIN:
                        self.receive(job)
                elif fd == job.pidfd:
                    job.reap()
                else:
                    if fd in job.streams and events & ~select.POLLOUT:
                        data = read_some(fd)
                        if data:
                            self.out += frames.pack(job.streams[fd], data)
                        elif data == b"":
                            job.drop(fd)
                    if fd == job.input and events & select.POLLOUT:
                        job.write_input()
            self.write()
        # What it started in the background may hold the pipes: only what is there now counts.
        self.out += job.drain() + frames.pack(b"R", bytes([job.status & 0xFF]))

    def write(self):
        try:
            while self.out:
                del self.out[:os.write(self.port, self.out[:CHUNK])]
        except BlockingIOError:
            pass

    def flush(self):
        while self.out:
            poll = select.poll()
            poll.register(self.port, select.POLLOUT)
            if any(events & select.POLLHUP for _, events in poll.poll()):
                raise Disconnected
            self.write()

    def await_hangup(self):
        """Takes what still comes in until the outside is gone."""
        set_blocking(self.port, True)
        while data := os.read(self.port, CHUNK):
            if any(kind == b"N" for kind, _ in self.parser.feed(data)):
                return


def serve(port):
    while True:
        try:
            Session(port).run()
        except (Disconnected, frames.FrameError, ValueError, KeyError, OSError) as error:
            if not isinstance(error, Disconnected):
                print(f"agent: session failed: {error}", file=sys.stderr)
            # Every way out of a session ends with the port hung up, or the next one starts anew.
            select.select([], [], [], 0.02)


def main():
    # A shell in the foreground of the console must not stop the agent by job control.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    served = set()
    deadline = time.monotonic() + 120
    expected = int(next((word.split("=")[1] for word in open("/proc/cmdline").read().split()
                         if word.startswith("lab.slots=")), "1"))
    while len(served) < expected and time.monotonic() < deadline:
        for entry in os.listdir(PORTS) if os.path.isdir(PORTS) else ():
            try:
                with open(f"{PORTS}/{entry}/name") as name:
                    mine = name.read().startswith("lab.")
            except OSError:
                mine = False
            if mine and entry not in served and os.path.exists(f"/dev/{entry}"):
                served.add(entry)
                if os.fork() == 0:
                    serve(os.open(f"/dev/{entry}", os.O_RDWR | os.O_CLOEXEC))
        if len(served) < expected:
            select.select([], [], [], 0.02)
    print(f"agent: {len(served)} slots at {open('/proc/uptime').read().split()[0]} s", file=sys.stderr)
    while True:  # process 1 takes in every orphan
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
