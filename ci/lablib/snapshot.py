"""A saved state of a host that has booted: every host of a lab can start from it in seconds.

It is made of a host that was not set up yet, so it knows no name, address or shared folder.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from . import buildcache, network
from .errors import LabError
from .host import ACCELERATOR, COMMAND_LINE, CPU, MACHINE, QEMU, SLOTS, Host
from .paths import OUT


def qemu_version():
    """QEMU's version line: a saved state is for the QEMU that wrote it."""
    try:
        return subprocess.run([QEMU, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(f"{QEMU}: {error}; run ci/setup") from None


def complete(qmp, wanted, timeout):
    """Waits until a migration has reached the state `wanted`."""
    until = time.monotonic() + timeout
    while (state := qmp("query-migrate").get("status")) != wanted:
        if state == "failed" or time.monotonic() > until:
            raise LabError(f"saved state: migration {state or 'did not start'}")
        time.sleep(0.02)


def save(folder, image, cpus, memory):
    """Boots a host, saves it to `folder`/state and ends it."""
    # The sockets need a short path, whatever the folder of the image is.
    OUT.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="save-", dir=OUT))
    host = Host(place, 0)
    namespace = network.create(1)
    try:
        host.start(image, cpus, memory, namespace, bound=True)
        host.await_agent(timeout=180)
        time.sleep(0.5)  # the agent sees the last connection go
        with host.qmp() as qmp:
            qmp("stop")
            qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            qmp("migrate", uri=f"exec:cat > '{folder}/state'")
            complete(qmp, "completed", timeout=60)
    finally:
        host.kill()
        os.close(namespace)
        shutil.rmtree(place, ignore_errors=True)


def obtain(image, cpus, memory):
    """The saved state for hosts of this image and size, made when it is not there."""
    key = buildcache.key_of([], qemu_version(), ACCELERATOR, CPU, MACHINE, COMMAND_LINE, str(SLOTS), str(cpus), memory)

    def build(folder):
        print("lab: saving the state of a booted host", flush=True)
        save(folder, image, cpus, memory)

    return buildcache.obtain(Path(image) / "saved", key, build) / "state"


def resume(host, timeout=60.0):
    """Lets a restored host run once its state has been read."""
    with host.qmp() as qmp:
        complete(qmp, "completed", timeout)
        qmp("cont")
