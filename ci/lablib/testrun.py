"""`ci/test`: every test of the repository; its last line is the result, its exit status 0 or 1."""

import argparse
import os
import platform
import sys
from pathlib import Path

from . import cargotest, guestimage, movetest
from .labtest import lab_commands
from .machinetest import MachineTests
from .paths import GUEST_IMAGES, OUT
from .steps import Skip, Steps, end_on_signals, say

PROG = "ci/test"


def found():
    """Says what the machine has that decides which tests can run and how fast."""
    modules = [name for name in ("kvm_amd", "kvm_intel", "kvm_pvm") if Path("/sys/module", name).is_dir()]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    rights = {True: "can be used", False: "no rights to it"}
    def device(path):
        return rights[os.access(path, os.R_OK | os.W_OK)] if Path(path).exists() else "not there"
    say(f"machine: {len(os.sched_getaffinity(0))} cores, {memory} GiB, kernel {platform.release()}, "
        f"{'root' if os.geteuid() == 0 else 'not root'}")
    say(f"/dev/kvm: {device('/dev/kvm')}{', ' + ' '.join(modules) if modules else ''}; "
        f"/dev/userfaultfd: {device('/dev/userfaultfd')}; /dev/net/tun: {device('/dev/net/tun')}")


def images():
    """Makes the guest image, and its kernel known to the tests of the kernel reader."""
    image = guestimage.obtain("minimal")
    say(f"     {image.name}: {image.stat().st_blocks * 512 >> 20} MiB on disk")
    kernels = sorted(GUEST_IMAGES.glob("base/*/root/boot/vmlinuz-*"))
    os.environ.setdefault("KRG_TEST_KERNELS", ":".join(map(str, kernels)))


def image_with_compiler():
    """Makes the guest image that the moving machine compiles in."""
    image = guestimage.obtain("build")
    say(f"     {image.name}: {image.stat().st_blocks * 512 >> 20} MiB on disk")


def need_root(function):
    """A step that only root can try: images and labs mount, and make network namespaces."""
    def step():
        if os.geteuid():
            raise Skip("needs root")
        return function()
    return step


def steps(machines):
    """All steps in order: name, function, steps that have to pass before."""
    return [
        ("build", cargotest.build, ()),
        ("guest image", need_root(images), ()),
        ("guest image with a compiler", need_root(image_with_compiler), ()),
        ("cargo test", cargotest.test, ("build",)),
        ("lab commands", need_root(lab_commands), ()),
        ("lab", need_root(machines.lab), ("build", "guest image")),
        ("machine on one host", machines.one_host, ("lab",)),
        ("machine on two hosts", machines.two_hosts, ("lab",)),
        ("machine on two hosts: loss", machines.cable_and_power, ("lab",)),
        ("RDMA on two hosts", machines.rdma, ("build", "lab")),
        ("machine on three hosts", machines.three_hosts, ("lab",)),
        ("vCPUs move", lambda: movetest.moving(machines), ("lab", "guest image with a compiler")),
        ("vCPUs move: loss", lambda: movetest.lost_on_the_way(machines), ("lab",)),
        ("memory of three hosts", machines.capacity, ("lab",)),
    ]


#: What `--quick` runs.
QUICK = ("build", "cargo test")


def choose(args, everything):
    """Names of the steps to run: with `--only`, those meant and what has to pass before them."""
    names = {name for name, *_ in everything}
    if args.quick:
        names &= set(QUICK)
    if args.only:
        names &= {args.only} if args.only in names else {name for name in names if args.only in name}
        while more := {other for name, _, after in everything if name in names for other in after} - names:
            names |= more
    return names


def main():
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what needs no lab of emulated hosts")
    parser.add_argument("--only", metavar="NAME", help="only the step NAME, or those whose names contain it, and what has to pass before them")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    machines = MachineTests()
    everything = steps(machines)
    if args.list:
        for name, *_ in everything:
            say(name)
        return 0
    end_on_signals()
    found()
    (OUT / "test").mkdir(parents=True, exist_ok=True)
    chosen = choose(args, everything)
    if not chosen:
        parser.error(f"--only {args.only}: no such step; see: ci/test --list")
    run = Steps()
    try:
        for name, function, after in everything:
            if name in chosen:
                run.run(name, function, after)
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        machines.close()
    run.summary([("setup", float(os.environ.get("SETUP_SECONDS", 0)))])
    say(str(run.counts))
    return 1 if run.counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
