"""Made things under a name that is the hash of what they are made from."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .errors import LabError


def key_of(files, *settings):
    """A short hash over the contents of `files` and the texts in `settings`."""
    digest = hashlib.sha256()
    for part in [*(Path(f).read_bytes() for f in files), *(s.encode() for s in settings)]:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def exclusive(path):
    """Holds the lock file `path`: of two commands that make the same thing, one makes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def obtain(folder, key, build, force=False):
    """The folder `folder`/`key`, made by `build(new_folder)` unless it is there.

    It appears under its name only when it is complete.
    """
    made = Path(folder) / key
    with exclusive(Path(folder) / ".lock"):
        if made.is_dir() and not force:
            return made
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            new.chmod(0o755)
            build(new)
            shutil.rmtree(made, ignore_errors=True)
            new.rename(made)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    return made


def run(step, argv, **options):
    """Runs one build step; its output is shown only when it fails."""
    begun = time.monotonic()
    try:
        done = subprocess.run([os.fspath(a) for a in argv], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except FileNotFoundError:
        raise LabError(f"{step}: {argv[0]} is not installed; run ci/setup") from None
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        tail = "\n".join(text.splitlines()[-20:])
        raise LabError(f"{step}: {argv[0]} failed with status {done.returncode}:\n{tail}")
    print(f"  {step}: {time.monotonic() - begun:.1f} s", flush=True)
    return text
