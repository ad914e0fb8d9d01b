"""The lab: all hosts of one state folder. A command finds them as the last one left them."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

from . import buildcache, hostimage, network, snapshot
from .errors import LabError
from .host import Host

#: Addresses 10.7.0.1 to 10.7.0.32.
MOST_HOSTS = 32


class Lab:
    """The hosts in the folder `state`."""

    def __init__(self, state):
        self.state = state
        self.file = state / "lab.json"

    def configuration(self):
        """What `up` was asked for."""
        try:
            return json.loads(self.file.read_text())
        except FileNotFoundError:
            raise LabError("no lab is up; start one with: ci/lab up") from None

    def hosts(self):
        """All hosts, running or not."""
        return [Host(self.state, index) for index in range(self.configuration()["hosts"])]

    def host(self, name):
        """The host called `name`."""
        for host in self.hosts():
            if host.name == name:
                return host
        raise LabError(f"{name}: no such host; see: ci/lab status")

    def up(self, hosts, cpus, memory, profile, from_saved):
        """Starts the hosts and waits until all are ready; on failure none is left."""
        if not 1 <= hosts <= MOST_HOSTS:
            raise LabError(f"--hosts {hosts}: 1 to {MOST_HOSTS} are possible")
        if not re.fullmatch(r"[1-9][0-9]*[MG]", memory):
            raise LabError(f"--mem {memory}: a number with M or G is needed, as in 2G")
        if os.geteuid():
            raise LabError("lab: needs root, for its network namespace")
        with buildcache.exclusive(self.state / "lock"):
            if self.file.exists() and any(host.pid() for host in self.hosts()):
                raise LabError("a lab is up already; end it with: ci/lab down")
            self.clear()
            image = hostimage.obtain()
            saved = snapshot.obtain(image, cpus, memory) if from_saved else None
            (self.state / "share").mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps({"hosts": hosts, "cpus": cpus, "memory": memory, "profile": profile,
                                             "image": str(image)}))
            namespace = network.create(hosts)
            try:
                self.boot(self.hosts(), namespace, saved)
            except BaseException:
                self.down()
                raise
            finally:
                os.close(namespace)

    def boot(self, hosts, namespace, saved=None):
        """Starts the hosts together and waits for them."""
        configuration = self.configuration()
        for host in hosts:
            host.start(configuration["image"], configuration["cpus"], configuration["memory"], namespace, saved)

        def ready(host):
            if saved:
                snapshot.resume(host)
            host.await_agent(timeout=180)
            host.set_up(configuration["profile"])

        with ThreadPoolExecutor(len(hosts)) as pool:
            for result in [pool.submit(ready, host) for host in hosts]:
                result.result()

    def start(self, name):
        """Boots a host that was killed, with the same name, address and port on the link."""
        host = self.host(name)
        if host.pid():
            raise LabError(f"{name}: runs already")
        host.kill()  # its old sockets
        others = [pid for other in self.hosts() if (pid := other.pid())]
        namespace = network.of_process(others[0]) if others else network.create(len(self.hosts()))
        try:
            self.boot([host], namespace)
        except BaseException:
            host.kill()
            raise
        finally:
            os.close(namespace)

    def left(self):
        """Every host that has a folder, whether or not a lab is known: a crash may have left it."""
        folders = self.state.glob("h*") if self.state.is_dir() else []
        return [Host(self.state, int(folder.name[1:])) for folder in folders if folder.name[1:].isdecimal()]

    def down(self):
        """Ends all hosts; the number that ran. Logs and the shared folder stay until the next up."""
        count = sum(host.kill() for host in self.left())
        self.file.unlink(missing_ok=True)
        return count

    def clear(self):
        """Removes what the last lab left, except the shared folder."""
        for host in self.left():
            host.kill()
            shutil.rmtree(host.folder, ignore_errors=True)
