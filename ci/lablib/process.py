"""Processes that outlive the command that started them: found and ended without mistaking one.

A process is ours when its command line has the argument that only we give it (its marker, which
names a file in our state folder). A process id alone says nothing: the kernel reuses them.
"""

import os
import select
import signal
import time


def has_argument(pid, marker):
    """Whether process `pid` lives and has the argument `marker`."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsencode(marker) in file.read().split(b"\0")
    except OSError:
        return False


def find(marker):
    """The ids of all living processes with the argument `marker`."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and has_argument(name, marker)]


def end(marker, number=signal.SIGKILL, timeout=10.0):
    """Sends signal `number` to the processes with `marker` and waits; the number that were there.

    The pidfd is opened before the second look at the command line, so the signal can't reach a
    later process with the same id.
    """
    count = 0
    for pid in find(marker):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not has_argument(pid, marker):
                continue
            count += 1
            signal.pidfd_send_signal(fd, number)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout * 1000)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
    return count


def wait_for(condition, timeout, interval=0.02):
    """Waits until `condition()` is true; whether it became so within `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(interval)
    return True
