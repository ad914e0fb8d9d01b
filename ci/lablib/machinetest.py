"""Tests of whole machines: krg-vmm with a stock Debian on emulated hosts, one and two of them."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from . import bootfiles, cargotest, guestimage
from .errors import LabError
from .labmachine import LAB, LabHosts, Machine
from .network import address
from .paths import OUT
from .steps import Counts, say

IMAGE = "/lab/images/debian-minimal.img"
LOGS = OUT / "test"
MIB_EACH = 384
#: In the hosts: a disk whose file system holds the programs for guests, and a module of their kernel.
PROGRAMS = "/lab/share/programs.img"
#: The shell of the stock initrd as process 1: the kernel's own boot and nothing after it.
INITRD_SHELL = "rdinit=/bin/sh"
#: A guest bigger than any host: three hosts of so much memory, what each gives, and its room for copies of other
#: hosts' pages. Three shares are twice one host's memory.
HOST_MIB, SHARE_MIB, COPIES_MIB = 576, 384, 12
#: What stays free on each of its NUMA nodes, and what each CPU fills on the next one's: more than it can hold.
KEEP_MIB, FAR_MIB = 24, 14
API = "/tmp/krg-api"
#: How often each litmus test runs in the guest, and how often a CPU goes and comes back. Each iteration
#: is several page transfers of milliseconds here; on hardware, or by hand, there can be more.
LITMUS_ITERATIONS = int(os.environ.get("LITMUS_ITERATIONS", "320"))
LITMUS_TABLES = int(os.environ.get("LITMUS_TABLES", "32"))
HOTPLUG_CYCLES = int(os.environ.get("HOTPLUG_CYCLES", "5"))
#: Seconds until the clock source has to be the final one.
CLOCK_LIMIT = 180
#: Seconds after which the loss of a host is to be known (and the machine gone) on a machine that has CPUs for its hosts.
LOSS_PROMISE = 5
#: Seconds after which it has to be on any: else it hangs.
LOSS_LIMIT = 30


class MachineTests:
    """The machine steps; one lab of two hosts serves them all, started by the first."""

    def __init__(self):
        self.hosts = None

    def close(self):
        """Ends the lab."""
        if self.hosts:
            self.hosts.down()
            self.hosts = None

    def lab(self):
        """Both hosts up, and the node daemon on h1."""
        self.up(hosts=2, cpus_each=1, mib_each=MIB_EACH)

    def up(self, hosts, cpus_each, mib_each, more="", **options):
        """A lab in place of the last one, the node daemons on all hosts but h0, and a hosts file there."""
        self.close()
        self.hosts = LabHosts(hosts, **options).__enter__()
        for index in range(1, hosts):
            self.hosts.start_node(f"h{index}")
        lines = "".join(f"{address(n)} cpus={cpus_each} mem={mib_each}M{more}\n" for n in range(hosts))
        self.hosts.shell("h0", f"printf '%s' '{lines}' >/tmp/hosts.txt")

    def one_host(self):
        """A stock Debian on one host: to the shell, a look around, `poweroff`, status 0."""
        arguments = ["--cpus", "1", "--memory", "512M", IMAGE]
        with Machine(self.hosts, "one-host", arguments, LOGS) as machine:
            machine.login(timeout=420)
            say(f"     root shell after {time.monotonic() - machine.begun:.0f} s")
            assert machine.check("nproc").strip() == "1"
            assert machine.check("cat /proc/1/comm").strip() == "systemd"
            say(f"     kernel {machine.check('uname -r').strip()}")
            machine.shut_down(180, "poweroff")
            report(machine)

    def programs_disk(self):
        """Makes PROGRAMS, once a lab."""
        image = self.hosts.state / "share" / Path(PROGRAMS).name
        if image.exists():
            return
        with tempfile.TemporaryDirectory() as folder:
            for name in cargotest.GUEST_PROGRAMS:
                shutil.copy(cargotest.guest_program(name), folder)
            # Which the initrd lacks: a disk is all it is for.
            bootfiles.module(guestimage.obtain("minimal"), "drivers/virtio/virtio_balloon", folder)
            subprocess.run(["mkfs.ext4", "-q", "-d", folder, image, "8M"], stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, check=True)

    def machine_over_all(self, name, append, *options, image=IMAGE):
        """A machine over all hosts that starts to boot."""
        for host in [f"h{index}" for index in range(1, self.hosts.count)]:
            if not self.hosts.processes(host):
                say(f"     the node daemon on {host} has ended: {self.hosts.node_log(host) or 'without a word'}; started again")
                self.hosts.start_node(host)
        self.programs_disk()
        # Steps say what runs where; the scheduler would bring CPUs that share pages together.
        sched = [] if "--sched" in options else ["--sched", "off"]
        arguments = ["--nodes", "/tmp/hosts.txt", "--disk", PROGRAMS, "--append", f"{self.hosts.emulation_options()} {append}",
                     *sched, *options, image]
        return Machine(self.hosts, name, arguments, LOGS)

    def all_cpus_up(self, name, *options, nodes=2, cpus=2, **more):
        """A machine over all hosts whose kernel has all CPUs up; the caller's to end.

        A guest has been seen to crash in its first second, once in about ten boots, for a reason that
        is not known (README, Status): a crash is said and tried again, once.
        """
        for last in (False, True):
            machine = self.machine_over_all(name, f"{INITRD_SHELL} loglevel=7", *options, **more).__enter__()
            try:
                machine.expect(rf"Brought up {nodes} nodes, {cpus} CPUs", 400)
                say(f"     all {cpus} CPUs are up after {time.monotonic() - machine.begun:.0f} s")
                return machine
            except BaseException as error:
                machine.__exit__(None, None, None)
                if last or not isinstance(error, LabError) or "crashed" not in str(error):
                    raise
                say(f"     {error}: tried again")

    def two_hosts(self):
        """One machine over two hosts: to a shell, what it sees of itself, power-off, status 0."""
        with self.all_cpus_up("two-hosts") as machine:
            try:
                machine.expect(r"Run /bin/sh as init process", 780)
                say(f"     the kernel has booted after {time.monotonic() - machine.begun:.0f} s")
                look_around(machine, cpus=2, nodes=2, mib=2 * MIB_EACH)
                litmus(machine, LITMUS_ITERATIONS, LITMUS_TABLES, [0, 1])
                hotplug(machine, HOTPLUG_CYCLES, [1])
                machine.shut_down(240)
            finally:
                report(machine)
        assert len(machine.counters()) == 2, f"counters of both nodes were expected: {machine.said()[-3:]}"

    def three_hosts(self):
        """One machine over three hosts with two vCPUs each: to a shell, what it sees, status 0."""
        self.up(hosts=3, cpus_each=2, mib_each=MIB_EACH)
        with self.all_cpus_up("three-hosts", nodes=3, cpus=6) as machine:
            try:
                machine.expect(r"Run /bin/sh as init process", 780)
                say(f"     the kernel has booted after {time.monotonic() - machine.begun:.0f} s")
                look_around(machine, cpus=6, nodes=3, mib=3 * MIB_EACH)
                # Every thread of a test of four has a CPU for itself: writers on two hosts, one reader beside the
                # first and one on the third host.
                litmus(machine, 64, 4, [0, 2, 1, 4])
                machine.shut_down(240)
            finally:
                report(machine)

    def capacity(self):
        """A guest with twice one host's memory fills all of it, and finds every word again."""
        self.up(3, 1, SHARE_MIB, more=f" cache={COPIES_MIB}M", memory=f"{HOST_MIB}M")
        assert 3 * SHARE_MIB >= 2 * HOST_MIB
        with self.all_cpus_up("memory", "--api", API, nodes=3, cpus=3) as machine:
            try:
                machine.expect(r"Run /bin/sh as init process", 780)
                say(f"     the kernel has booted after {time.monotonic() - machine.begun:.0f} s")
                look_around(machine, cpus=3, nodes=3, mib=3 * SHARE_MIB)
                mount_programs(machine)
                # The initrd has no insmod; modprobe is one by that name.
                said = ask(machine, "ln -s /sbin/modprobe /insmod; /insmod /programs/virtio_balloon.ko; cat /proc/modules")
                assert "virtio_balloon" in said, f"the balloon's driver: {said}"
                fill(machine, 3, HOST_MIB)
                self.room()
                self.given_back()
                machine.shut_down(240)
            finally:
                report(machine)

    def room(self):
        """Checks that copies were evicted and that every host's kernel had memory all the time."""
        # Every node tells its figures each 5 s.
        time.sleep(6)
        for node in self.hosts.status(API)["nodes"]:
            host, figures = f"h{node['node']}", node["statistics"]
            copies, evictions = figures["copies"], figures["dsm"]["evictions"]
            left = self.available(host)
            say(f"     {host}: {evictions} copies evicted, {copies['peak'] >> 8} MiB of them at most where there is room for "
                f"{copies['limit'] >> 8}; {left} MiB of {HOST_MIB} still available")
            assert evictions > 0, f"{host}: nothing was evicted: {figures}"
            trouble = self.hosts.shell(host, "dmesg | grep -iE 'out of memory|oom-kill|page allocation failure' || true")
            assert not trouble, f"{host}: {trouble}"

    def available(self, host):
        """MiB of memory that a host could give."""
        return int(re.search(r"MemAvailable: +(\d+) kB", self.hosts.shell(host, "cat /proc/meminfo")).group(1)) >> 10

    def given_back(self, limit=360):
        """Waits until the guest has reported what it freed, and every host has more left than beside a share in use."""
        begun = time.monotonic()
        while True:
            nodes = self.hosts.status(API)["nodes"]
            freed = {f"h{node['node']}": node["statistics"]["dsm"]["pages_freed"] >> 8 for node in nodes}
            left = {host: self.available(host) for host in freed}
            done = all(mib > 0 for mib in freed.values()) and all(mib > HOST_MIB - SHARE_MIB for mib in left.values())
            if done or time.monotonic() - begun > limit:
                break
            time.sleep(5)
        told = ", ".join(f"{mib} MiB of {host}, of whose {HOST_MIB} {left[host]} are available" for host, mib in freed.items())
        say(f"     free pages the guest reported ({time.monotonic() - begun:.0f} s): {told}")
        assert done, f"more than {HOST_MIB - SHARE_MIB} MiB were expected to be available on each"

    def cable_and_power(self):
        """A cable unplugged for 2 s does no harm; a host's power failure ends the machine cleanly."""
        with self.all_cpus_up("loss") as machine:
            self.unplugged(machine)
            self.power_failure(machine)

    def rdma(self):
        """What every transport promises, between two hosts; then boot, litmus tests and loss over RDMA."""
        self.up(hosts=2, cpus_each=1, mib_each=MIB_EACH)
        counts = contract(self.hosts)
        self.one_host_lacks_rdma()
        with self.all_cpus_up("rdma", "--transport", "rdma") as machine:
            lines = [line for line in machine.said() if line.startswith("transport: ")]
            assert lines == ["transport: rdma (as asked: node 0 rxe0, node 1 rxe0)"], f"transport: {lines}"
            self.unplugged(machine)
            if "Run /bin/sh as init process" not in machine.text:
                machine.expect(r"Run /bin/sh as init process", 780)
            say(f"     {lines[0]}; the kernel has booted after {time.monotonic() - machine.begun:.0f} s")
            look_around(machine, cpus=2, nodes=2, mib=2 * MIB_EACH)
            litmus(machine, 64, 4, [0, 1])
            self.power_failure(machine)
        counts += Counts(passed=1)
        return counts

    def one_host_lacks_rdma(self):
        """RDMA asked for, but not everywhere: one line says where."""
        self.hosts.shell("h1", "rdma link del rxe0")
        with self.machine_over_all("rdma-lacking", INITRD_SHELL, "--transport", "rdma") as machine:
            status = machine.await_end(60)
            last = machine.said()[-1]
        self.hosts.shell("h1", "rdma link add rxe0 type rxe netdev eth0")
        assert status == 1, f"without RDMA on h1: exit status {status} instead of 1"
        assert f"host {address(1)}: no RDMA device at {address(1)}" in last, f"without RDMA on h1: {last}"
        say(f"     without RDMA on h1: {last}")

    def unplugged(self, machine):
        """Pulls h1's cable for 2 s while the guest boots, which has to go on."""
        self.hosts.lab("link", "h1", "down")
        time.sleep(2)
        self.hosts.lab("link", "h1", "up")
        # What was on its way may still arrive; what comes after it is new.
        drain(machine, 3)
        machine.seen = len(machine.text)
        machine.expect(r"\n\[ +\d+\.\d+\] .+\n", 90)
        say("     unplugged for 2 s: the guest goes on")

    def power_failure(self, machine):
        """Ends h1 at once: krg-vmm has to end in time, name the host and leave nothing."""
        self.hosts.lab("kill", "h1")
        since = time.monotonic()
        status = machine.await_end(LOSS_LIMIT)
        took = time.monotonic() - since
        said = machine.said()
        say(f"     power failure of h1: krg-vmm ended after {took:.1f} s with status {status}: {said[-1]}")
        assert status == 3, f"exit status {status} instead of 3"
        if took > LOSS_PROMISE:
            say(f"     that is more than {LOSS_PROMISE} s: this machine is busy with other things")
        assert address(1) in said[-1], f"the last line doesn't name {address(1)}: {said[-1]}"
        left = self.hosts.processes("h0")
        assert not left, f"left on h0: {left}"


def contract(hosts):
    """Runs dsm's test program `contract` with its two nodes on h0 and h1, over TCP and RDMA."""
    shutil.copy(cargotest.test_program("contract"), hosts.state / "share")
    for host in ("h0", "h1"):
        hosts.shell(host, "cp /lab/share/contract-* /tmp/contract")
    far = f"{address(1)}:7600"
    # It serves until its standard input ends.
    with subprocess.Popen([LAB, "exec", "-i", "h1", "--", "/tmp/contract", "serve", far], env=hosts.environment,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            if not server.stdout.readline().startswith("serving"):
                raise LabError(f"contract serve: {server.stdout.read().strip()[-400:]}")
            # It fails with the tests.
            said = hosts.shell("h0", f"/tmp/contract with {far} 2>&1 || true", limit=400)
        finally:
            server.stdin.close()
    lines = said.splitlines()
    (LOGS / "contract.log").write_text(said)
    for line in lines:
        if line.startswith(("tcp:", "rdma:")) or "FAILED" in line:
            say(f"     {line}")
    counts = Counts(passed=sum("... ok" in line for line in lines), failed=sum("... FAILED" in line for line in lines))
    tried = {kind: sum(line.startswith(f"test {kind}::") for line in lines) for kind in ("tcp", "rdma")}
    if not all(count and f"{kind}: all {count} tried" in lines for kind, count in tried.items()):
        raise LabError(f"contract: not all was tried: {lines[-3:]}")
    say(f"     what every transport promises, between h0 and h1: {counts}")
    return counts


def ask(machine, command, limit=300):
    """The output of a command in a shell that knows no more than the initrd's does."""
    begin = machine.seen
    machine.commands += 1
    # The shell computes the mark, so that the echo of this line can't be taken for it.
    machine.send(f"{command}; echo mark-$((1000 + {machine.commands}))\n")
    match = machine.expect(rf"mark-{1000 + machine.commands}\r?\n", limit)
    return machine.text[begin:match.start()]


def look_around(machine, cpus, nodes, mib):
    """Checks, in a guest's shell, that it is one machine of all hosts' CPUs and memory."""
    ask(machine, "PS1=; mkdir -p /proc /sys; mount -t proc proc /proc; mount -t sysfs sys /sys; echo 1 >/proc/sys/kernel/printk")
    found = len(re.findall(r"processor\s*: [0-9]+", ask(machine, "cat /proc/cpuinfo")))
    assert found == cpus, f"{found} processors, not {cpus}"
    found = ask(machine, "cat /sys/devices/system/node/online")
    assert re.search(rf"(?:^|# )0-{nodes - 1}\s*$", found, re.MULTILINE), f"NUMA nodes: {found!r}, not 0-{nodes - 1}"
    total = int(re.search(r"MemTotal: +(\d+) kB", ask(machine, "cat /proc/meminfo")).group(1)) >> 10
    # The kernel keeps its image and its page descriptors for itself.
    assert mib * 0.8 <= total <= mib, f"MemTotal is {total} MiB of {mib}"
    # A second of the guest's time after the start, tsc-early becomes tsc.
    for _ in range(CLOCK_LIMIT // 5):
        found = ask(machine, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        if re.search(r"(?:^|# )tsc\s*$", found, re.MULTILINE):
            break
        time.sleep(5)
    else:
        raise AssertionError(f"the clock source: {found!r}")
    release = re.search(r"Linux version (\S+)", ask(machine, "cat /proc/version")).group(1)
    say(f"     inside: {cpus} CPUs, {nodes} NUMA nodes, {total} MiB, clock source tsc, stock kernel {release}")


def mount_programs(machine):
    """Mounts the disk with the programs for guests."""
    ask(machine, "mkdir -p /dev /programs; mount -t devtmpfs dev /dev; modprobe virtio_pci; modprobe virtio_blk; modprobe ext4; "
                 "while ! test -b /dev/vdb; do sleep 0.01; done; mount -t ext4 -o ro /dev/vdb /programs")


def fill(machine, cpus, host_mib):
    """Fills nearly all of the guest's memory from its CPUs, and checks every word."""
    begun = time.monotonic()
    # Small pages would be a test of the kernel's own shared data, one allocation after the other.
    ask(machine, "echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    said = ask(machine, f"/programs/guest-memory fill {KEEP_MIB} {FAR_MIB} {' '.join(map(str, range(cpus)))}", limit=1200)
    for line in re.findall(r"memory: .*", said):
        say(f"     {line.strip()}")
    checked = re.search(r"memory: checked (\d+) MiB, and (\d+) MiB on both CPUs: 0 wrong words", said)
    assert checked, f"guest-memory: {said[-500:]}"
    assert int(checked.group(1)) > 1.5 * host_mib, f"{checked.group(1)} MiB is not much more than a host's {host_mib}"
    say(f"     filled and checked {int(checked.group(1)) / host_mib:.2f} times one host's memory ({time.monotonic() - begun:.0f} s)")


def litmus(machine, iterations, tables, cpus):
    """The litmus tests in the guest, on CPUs of different hosts; the program comes on a disk."""
    begun = time.monotonic()
    mount_programs(machine)
    said = ask(machine, f"/programs/guest-litmus {iterations} {tables} {' '.join(map(str, cpus))}", limit=3000)
    for line in re.findall(r".*: \d+ iterations, .*", said):
        say(f"     {line.strip()}")
    assert "litmus: all as allowed" in said, f"litmus tests: {said[-500:]}"
    say(f"     litmus tests on CPUs {cpus}: nothing forbidden ({time.monotonic() - begun:.0f} s)")


def hotplug(machine, cycles, cpus):
    """CPUs go offline and come back while two programs compute; nothing may be lost meanwhile."""
    begun = time.monotonic()
    start = machine.seen
    # The kernel's warnings appear on the console, and only those.
    ask(machine, "echo 5 >/proc/sys/kernel/printk; load() { while :; do :; done; }; load & one=$!; load & two=$!")
    for cycle in range(cycles):
        online = f"/sys/devices/system/cpu/cpu{cpus[cycle % len(cpus)]}/online"
        said = ask(machine, f"echo 0 >{online} && echo 1 >{online} && cat {online}", limit=300)
        assert re.search(r"^(?:# )*1\s*$", said, re.MULTILINE), f"cycle {cycle}: {said!r}"
    ask(machine, "kill $one $two; echo 1 >/proc/sys/kernel/printk")
    trouble = re.search(r".*(?:lockup|stall|Call Trace|BUG|WARNING|not responding|unresponsive).*", machine.text[start:])
    assert not trouble, f"the kernel complains: {trouble.group()}"
    say(f"     {cycles} times offline and online under load: CPUs {cpus} ({time.monotonic() - begun:.0f} s)")


def drain(machine, seconds):
    """Takes in output for some time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        machine.read(left)


def report(machine):
    """Shows the nodes' figures."""
    for line in machine.counters():
        say(f"     {line}")
