"""vCPUs of a stock Linux move between hosts, at random and all the time, while it computes, compiles and talks."""

import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import time

from . import guestimage, machinetest
from .errors import LabError
from .guestimage import PROJECT
from .labmachine import LAB
from .network import address
from .steps import say

#: The image that has a compiler, in the hosts.
IMAGE = "/lab/images/debian-build.img"
#: Moves while the guest works.
MOVES = int(os.environ.get("MOVES", "100"))
#: Seconds from one move to the next.
PAUSE = float(os.environ.get("MOVE_PAUSE", "0.2"))
#: Hosts, with a vCPU each.
CPUS = int(os.environ.get("MOVE_HOSTS", "2"))
SEED = int(os.environ.get("MOVE_SEED", "1"))
#: The guest's network card is this end of a wire; the host's is the other.
TAP, HOST, GUEST, PORT = "tap0", "10.99.0.1", "10.99.0.2", 7000
#: What is compiled meanwhile, as in the demo without optimization; `bzip2` is all of it.
TARGETS = os.environ.get("MOVE_TARGETS", "crctable.o randtable.o")
MAKE = f"CFLAGS='-O0 -D_FILE_OFFSET_BITS=64' {TARGETS}"
#: Parts of a move (`vmm/src/machine/move_times.rs`) after which a host is lost: those of the source, and of the target.
SOURCE, TARGET = ("asked", "stopped", "saved", "sent"), ("came", "woken", "alone", "restored", "entered")
LOST_AFTER = os.environ.get("MOVE_LOST_AFTER", "saved sent alone").split()
#: Programs that run in a host: in its shared folder.
CLIENT, ECHO = "client.py", "echo.py"

#: Hands lines to the control socket, and answers back. (The hosts' Python has little more than sockets.)
CLIENT_TEXT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
answers = client.makefile()
for line in sys.stdin:
    client.sendall(line.encode())
    print(answers.readline(), end="", flush=True)
"""

#: Sends back what it gets; one connection at a time.
ECHO_TEXT = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
while True:
    client, _ = server.accept()
    while data := client.recv(1 << 16):
        client.sendall(data)
"""


def moving(tests):
    """The step: a machine over all hosts whose vCPUs move until they have moved MOVES times."""
    with entered(tests, "moving", CPUS) as machine:
        with serving(tests.hosts):
            work(tests.hosts, machine)
        machine.shut_down(240)


@contextlib.contextmanager
def entered(tests, name, hosts, *options):
    """A machine over so many hosts with a CPU each, in the root of the image that has a compiler, with network."""
    tests.up(hosts=hosts, cpus_each=1, mib_each=384)
    programs(tests.hosts)
    network(tests.hosts)
    options = ("--api", machinetest.API, "--net", TAP, *options)
    with tests.all_cpus_up(name, *options, nodes=hosts, cpus=hosts, image=IMAGE) as machine:
        try:
            machine.expect(r"Run /bin/sh as init process", 780)
            say(f"     the kernel has booted after {time.monotonic() - machine.begun:.0f} s")
            machinetest.look_around(machine, cpus=hosts, nodes=hosts, mib=hosts * 384)
            enter(machine)
            yield machine
        finally:
            machinetest.report(machine)


def lost_on_the_way(tests):
    """The step: a host is lost in the middle of a move, after one part of it or another."""
    tests.up(hosts=2, cpus_each=1, mib_each=384)
    programs(tests.hosts)
    for part in LOST_AFTER:
        tests.hosts.end_node("h1")
        tests.hosts.start_node("h1", f"KRG_KILL_AT={part}")
        with tests.all_cpus_up(f"lost-{part}", "--api", machinetest.API) as machine:
            with in_host(tests.hosts, "python3", f"/lab/share/{CLIENT}", machinetest.API) as client:
                vcpu, node = (1, 0) if part in SOURCE else (0, 1)
                since = time.monotonic()
                answer = ask(client, {"cmd": "migrate", "vcpu": vcpu, "node": node})
                status = machine.await_end(machinetest.LOSS_LIMIT)
                took = time.monotonic() - since
            said = machine.said()
        assert status == 3, f"lost after {part!r}: exit status {status} instead of 3: {said[-1]}"
        assert address(1) in said[-1], f"lost after {part!r}: the last line doesn't name {address(1)}: {said[-1]}"
        left = [host for host in ("h0", "h1") if tests.hosts.processes(host)]
        assert not left, f"lost after {part!r}: left on {left}"
        # The source gave the vCPU away with its state; until then it was its own.
        [own] = [match.group(1).split() for line in machine.counters() if (match := re.search(r"; its vCPUs: ([0-9 ]+|none)", line))]
        kept = {"sent": (["0"], ["0", "1"])}.get(part, (["0"],) if part in SOURCE else (["none"],))
        assert own in kept, f"lost after {part!r}: node 0 has vCPUs {own}"
        told = answer.get("errno") or ("moved" if answer.get("moved") else "no answer")
        say(f"     {'source' if part in SOURCE else 'target'} of a move lost after {part!r}: told {told}; krg-vmm ended after {took:.1f} s "
            f"with status {status}; node 0 has vCPUs {' '.join(own)}")


def programs(hosts):
    """Puts the programs that run in hosts where they can be reached."""
    for name, text in ((CLIENT, CLIENT_TEXT), (ECHO, ECHO_TEXT)):
        (hosts.state / "share" / name).write_text(text)


def network(hosts):
    """A tap interface on h0."""
    hosts.shell("h0", f"modprobe tun; ip tuntap add {TAP} mode tap 2>/dev/null; "
                      f"ip address replace {HOST}/24 dev {TAP}; ip link set {TAP} up")


def enter(machine):
    """From the initrd's shell into the image's root, with network and the programs for guests."""
    machinetest.mount_programs(machine)
    # The initrd may have no module of the card's: the image has.
    machinetest.ask(machine, "mkdir -p /new; mount -t ext4 /dev/vda1 /new; for f in dev proc sys; do mount -o bind /$f /new/$f; done; "
                             "mount -o bind /programs /new/mnt; echo 5 >/proc/sys/kernel/printk")
    machine.send("exec chroot /new /bin/bash --norc --noprofile --noediting\n")
    machine.send("PS1=; PS2=; stty -echo; export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin; echo quiet-$((6 * 7))\n")
    machine.expect(r"quiet-42\n", 300)
    machine.check("mount -t tmpfs tmpfs /tmp; modprobe virtio_net; ls /sys/class/net/eth0", 300)
    machine.check("ip link set lo up; "
                  f"ip address add {GUEST}/24 dev eth0; ip link set eth0 up; cp -r /usr/src/{PROJECT}-* /tmp/{PROJECT}", 300)


@contextlib.contextmanager
def in_host(hosts, *words):
    """A program in h0, with its output as a pipe; it ends with the `with`."""
    with subprocess.Popen([LAB, "exec", "-i", "h0", "--", *words], env=hosts.environment, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.terminate()


@contextlib.contextmanager
def serving(hosts):
    """The server of the guest's TCP connection."""
    with in_host(hosts, "python3", f"/lab/share/{ECHO}", HOST, str(PORT)) as server:
        if server.stdout.readline().strip() != "ready":
            raise LabError(f"{HOST}:{PORT} on h0 is not served")
        yield


def work(hosts, machine):
    """The guest's work while its vCPUs move; all of it has to come out as if they did not."""
    begun, start = time.monotonic(), machine.seen
    cpus = " ".join(map(str, range(CPUS)))
    machine.check(f"/mnt/guest-witness {cpus} {HOST}:{PORT} >/tmp/witness 2>&1 & echo $! >/tmp/witness.pid; "
                  f"(make -C /tmp/{PROJECT} -j{CPUS} {MAKE} 2>&1; echo $? >/tmp/make.status) & "
                  f"(while ! test -e /tmp/moved; do /mnt/guest-litmus 64 1 {cpus} || break; sleep 0.05; done >/tmp/litmus 2>&1; "
                  "echo over >>/tmp/litmus) & true", 300)
    with in_host(hosts, "python3", f"/lab/share/{CLIENT}", machinetest.API) as client:
        times = move(client, machine, random.Random(SEED))
        # What the litmus tests are in the middle of would go on for long, and take the CPUs from all else.
        machine.check("touch /tmp/moved; pkill guest-litmus || true", 300)
    say(f"     {MOVES} moves in {time.monotonic() - begun:.0f} s; one took {times[MOVES // 2]:.0f} ms in the middle, "
        f"{times[-1]:.0f} at most")
    take_home(hosts)
    # What make says comes in between.
    status = machine.check("while ! test -e /tmp/make.status; do sleep 0.02; done; cat /tmp/make.status", 1800).split()[-1]
    assert status == "0", f"make: status {status}"
    digest = machine.check(f"cd /tmp/{PROJECT}; cat {TARGETS} | sha256sum", 300).split()[0]
    assert digest == expected_digest(), f"what was compiled is not the same as elsewhere: {digest}"
    machine.check("kill $(cat /tmp/witness.pid)", 300)
    said = machine.check("while ! tail -1 /tmp/litmus | grep -q over || ! grep -q witness: /tmp/witness; do sleep 0.02; done; "
                         "cat /tmp/litmus /tmp/witness", 1800)
    rounds = len(re.findall(r": \d+ iterations, .*", said))
    assert rounds and not re.search(r": \d+ iterations, [1-9]", said), f"litmus tests: {said[-600:]}"
    for line in re.findall(r"(?:clock|tcp): .*", said):
        say(f"     {line.strip()}")
    assert "witness: all well" in said, f"witness: {said[-600:]}"
    trouble = re.search(r".*(?:lockup|stall|Call Trace|BUG|WARNING|not responding|unresponsive).*", machine.text[start:])
    assert not trouble, f"the kernel complains: {trouble.group()}"
    say(f"     {TARGETS}: as compiled on this machine (sha256 {digest[:16]}...); {rounds} litmus tests, nothing forbidden; no complaint of the "
        f"kernel's ({time.monotonic() - begun:.0f} s)")


def take_home(hosts):
    """Takes all vCPUs to where they were placed, as an administrator would; a wish that can't be met changes nothing."""
    krg = f"/lab/bin/krg --api {machinetest.API}"
    hosts.shell("h0", f"{krg} migrate all home", limit=120)
    refused = hosts.shell("h0", f"{krg} migrate vcpu0 99 2>&1; echo status $?")
    assert "EINVAL" in refused and "status 1" in refused, f"krg migrate vcpu0 99: {refused}"
    nodes = [vcpu["node"] for vcpu in json.loads(hosts.shell("h0", f"{krg} --json ps"))["vcpus"]]
    # One on each host, in their order.
    assert nodes == list(range(CPUS)), f"krg ps: vCPUs on nodes {nodes}"
    hosts_shown = hosts.shell("h0", f"{krg} nodes status")
    assert all(address(node) in hosts_shown for node in range(CPUS)), f"krg nodes status: {hosts_shown}"
    say(f"     krg took the vCPUs home, to nodes {nodes}, and told why not to node 99: {refused.splitlines()[0]}")


def ask(client, wish):
    """What the control socket answers; nothing if the machine has ended."""
    try:
        client.stdin.write(json.dumps(wish) + "\n")
        client.stdin.flush()
        return json.loads(client.stdout.readline() or "{}")
    except BrokenPipeError:
        return {}


def request(client, machine, wish):
    """What the control socket answers, asked until the vCPU can be moved."""
    while (answer := ask(client, wish)).get("errno") == "EAGAIN":
        time.sleep(PAUSE)
    if not answer.get("ok"):
        raise LabError(f"{wish}: {answer or 'krg-vmm has ended'}: {' | '.join(machine.said()[-2:])}")
    return answer


def move(client, machine, random):
    """Moves random vCPUs to random nodes, MOVES times; how long each took in ms, sorted."""
    times = []
    while len(times) < MOVES:
        # The guest's output must not wait for us.
        machine.read(PAUSE)
        begun = time.monotonic()
        if request(client, machine, {"cmd": "migrate", "vcpu": random.randrange(CPUS), "node": random.randrange(CPUS)})["moved"]:
            times.append((time.monotonic() - begun) * 1e3)
    return sorted(times)


def expected_digest():
    """The hash of what make made, with the image's own compiler on this machine."""
    [root] = {path.parents[2] for path in guestimage.GUEST_IMAGES.glob(f"base/*/root/usr/src/{PROJECT}-*")}
    # In the same folder as in the guest: it is in the result.
    script = f"mount -t tmpfs tmpfs /tmp; cp -r /usr/src/{PROJECT}-* /tmp/{PROJECT}; cd /tmp/{PROJECT}; make {MAKE} >/dev/null 2>&1; cat {TARGETS}"
    made = subprocess.run(["unshare", "--mount", "chroot", root, "/bin/sh", "-c", script], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, check=True).stdout
    return hashlib.sha256(made).hexdigest()
