"""One emulated host: its QEMU, started, found again, stopped and restored."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time

from . import network, process
from .channel import Channel
from .errors import LabError
from .paths import GUEST_IMAGES, cargo_target
from .qmp import Qmp

#: Commands that can run on a host at the same time.
SLOTS = 12
QEMU = "qemu-system-x86_64"
#: EPYC has nested paging and 1 GiB pages; QEMU's emulation takes svm=on for any CPU.
CPU = "EPYC,svm=on"
MACHINE = "q35,graphics=off,vmport=off,smbus=off,sata=off"
ACCELERATOR = "tcg,thread=multi,tb-size=512"
#: The emulated TSC is the machine's own: synchronous, but Linux would distrust it with 2 CPUs.
#: A sent packet need not be told of by an interrupt: each costs as much as a small packet.
COMMAND_LINE = ("console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check "
                "virtio_net.napi_tx=0")


class Host:
    """Host number `index` of the lab in folder `state`."""

    def __init__(self, state, index):
        self.index = index
        self.name = f"h{index}"
        self.folder = state / self.name
        self.share = state / "share"
        self.address = network.address(index)
        #: The QEMU, if this very object started it.
        self.child = None
        #: The argument that shows a process to be this host's QEMU.
        self.marker = f"unix:{self.folder}/qmp,server=on,wait=off"
        if len(self.marker) > 100:
            raise LabError(f"{self.folder}: path too long for a socket; use a shorter LAB_DIR")

    def pid(self):
        """The process id of the host's QEMU, or None."""
        return next(iter(process.find(self.marker)), None)

    def alive(self):
        """Whether the host's QEMU is there.

        Its own child is asked for directly: while it turns into QEMU it has no command line.
        """
        return self.child.poll() is None if self.child else self.pid() is not None

    def qemu(self, image, cpus, memory):
        """The command line without network and saved state; what a saved state must agree on."""
        argv = [QEMU, "-name", f"lab-{self.name}", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
                "-machine", MACHINE, "-accel", ACCELERATOR, "-cpu", CPU, "-smp", str(cpus), "-m", memory,
                "-kernel", f"{image}/vmlinux", "-initrd", f"{image}/initrd",
                "-append", f"{COMMAND_LINE} lab.slots={SLOTS}",
                "-qmp", self.marker,
                "-chardev", f"socket,id=console,path={self.folder}/console,server=on,wait=off,"
                            f"logfile={self.folder}/console.log,logappend=on",
                "-serial", "chardev:console", "-device", "vmgenid,guid=auto",
                "-drive", f"file={image}/root.erofs,format=raw,if=none,id=root,readonly=on,file.locking=off",
                "-device", "virtio-blk-pci,drive=root"]
        for tag, folder, mode in [("target", cargo_target(), "on"), ("images", GUEST_IMAGES, "on"),
                                  ("share", self.share, "off")]:
            folder.mkdir(parents=True, exist_ok=True)
            argv += ["-fsdev", f"local,id={tag},path={folder},security_model=none,multidevs=remap,readonly={mode}",
                     "-device", f"virtio-9p-pci,fsdev={tag},mount_tag=lab-{tag}"]
        argv += ["-device", f"virtio-serial-pci,max_ports={SLOTS + 1}"]
        for slot in range(SLOTS):
            argv += ["-chardev", f"socket,id=slot{slot},path={self.slot(slot)},server=on,wait=off",
                     "-device", f"virtserialport,chardev=slot{slot},name=lab.{slot},nr={slot + 1}"]
        return argv

    #: How many slots a channel may choose from.
    slots = SLOTS

    def slot(self, number):
        """The socket of one of the agent's slots."""
        return self.folder / f"slot{number}"

    def start(self, image, cpus, memory, namespace, saved=None, bound=False):
        """Starts the QEMU; with `saved`, from that saved state, stopped until `resume`.

        With `bound` it ends with the thread that started it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = self.qemu(image, cpus, memory)
        argv += ["-netdev", network.netdev(self.index),
                 "-device", f"virtio-net-pci,netdev=link,id=nic,romfile=,speed=10000,duplex=full,"
                            f"mac={network.mac(self.index)}"]
        if saved:
            argv += ["-S", "-incoming", f"exec:cat '{saved}'"]
        argv = network.command(namespace, argv)
        if bound:
            argv = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        (self.folder / "qemu.json").write_text(json.dumps(argv, indent=1))
        with open(self.folder / "qemu.log", "w") as log:
            # A session of its own: Ctrl-C at the terminal is for the command, not for the hosts.
            self.child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                          pass_fds=[namespace], start_new_session=True)

    def failure(self):
        """The last lines that explain why the host does not run."""
        lines = []
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(OSError):
                lines += (self.folder / name).read_text(errors="replace").splitlines()[-3:]
        return "; ".join(line.strip() for line in lines if line.strip()) or "no output"

    def await_agent(self, timeout):
        """Waits until the host takes commands."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if not self.alive():
                raise LabError(f"{self.name}: QEMU ended: {self.failure()}")
            # The connection is kept while the host boots: the agent greets it when it comes up.
            with contextlib.suppress(LabError), Channel.open(self, until - time.monotonic(), attempt=timeout):
                return
            time.sleep(0.05)
        raise LabError(f"{self.name}: not ready after {timeout:.0f} s; see {self.folder}/console.log")

    def set_up(self, profile):
        """Gives the host its name, address, clock and shared folders."""
        programs = f"/lab/target/x86_64-unknown-linux-gnu/{profile}"
        argv = ["/usr/lib/lab/setup-host", self.name, f"{self.address}/24", str(network.MTU),
                network.mac(self.index), f"{time.time():.3f}", programs]
        status, output = self.run(argv, timeout=30)
        if status:
            raise LabError(f"{self.name}: set-up failed with status {status}: {output.decode(errors='replace').strip()}")

    def run(self, argv, timeout=60.0):
        """Runs a command; its status and all its output, standard error included."""
        output = bytearray()
        with Channel.open(self) as channel:
            channel.send_start(argv)
            until = time.monotonic() + timeout
            while True:
                for kind, body in channel.receive(until - time.monotonic()):
                    if kind == b"R":
                        return body[0], bytes(output)
                    output += body

    def qmp(self):
        """A connection to the QEMU of a host that runs."""
        if not self.alive():
            raise LabError(f"{self.name}: not running; start it with: ci/lab start {self.name}")
        return Qmp(self.folder / "qmp")

    def kill(self):
        """Ends the QEMU at once, as a power failure would; whether there was one."""
        there = process.end(self.marker, signal.SIGKILL) > 0
        if self.child:
            self.child.kill()
            self.child.wait()
            self.child = None
        for path in [self.folder / "qmp", self.folder / "console", *(self.slot(n) for n in range(SLOTS))]:
            path.unlink(missing_ok=True)
        return there

    def status(self):
        """A word for the host's state."""
        if not self.alive():
            return "dead"
        with self.qmp() as qmp:
            state = qmp("query-status")["status"]
        return {"running": "up"}.get(state, state)

    def console(self):
        """A connection to the host's serial console."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(os.fspath(self.folder / "console"))
        except OSError as error:
            connection.close()
            raise LabError(f"{self.name}: console: {error.strerror}; is the host running?") from None
        return connection
