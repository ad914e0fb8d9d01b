"""The lab's own test (`ci/test-lab`) as a step of `ci/test`."""

import re
import subprocess

from .errors import LabError
from .paths import CI, OUT
from .steps import Counts, say


def lab_commands(limit=600):
    """Every lab command, in a lab of the test's own."""
    log = OUT / "test/lab.log"
    with open(log, "wb") as file:
        child = subprocess.Popen([CI / "test-lab"], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            raise LabError(f"ci/test-lab: not done within {limit} s; see {log}") from None
        finally:
            if child.poll() is None:
                # Interrupted, it takes its hosts down itself.
                child.send_signal(2)
                try:
                    child.wait(60)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
    text = log.read_text(errors="replace")
    result = re.search(r"^(\d+) passed, (\d+) failed in", text, re.M)
    if not result:
        raise LabError(f"ci/test-lab: status {status}: {' | '.join(text.splitlines()[-3:])}")
    for name in re.findall(r"^FAIL (\S+)", text, re.M):
        say(f"     failed: {name}; see {log}")
    return Counts(passed=int(result.group(1)), failed=int(result.group(2)))
