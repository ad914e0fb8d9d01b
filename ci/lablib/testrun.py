"""`ci/test`: every test of the repository; its last line is the result, its exit status 0 or 1."""

import argparse
import os
import platform
import sys
from pathlib import Path

from . import cargotest
from .paths import OUT
from .steps import Counts, Steps, end_on_signals, say

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


def steps():
    """All steps in order: name, function, steps that have to pass before."""
    return [
        ("build", cargotest.build, ()),
        ("cargo test", cargotest.test, ("build",)),
    ]


def main():
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what needs no lab of emulated hosts")
    parser.add_argument("--only", metavar="NAME", help="only steps whose name contains NAME, and the build")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    everything = steps()
    if args.list:
        for name, *_ in everything:
            say(name)
        return 0
    end_on_signals()
    found()
    (OUT / "test").mkdir(parents=True, exist_ok=True)
    run = Steps()
    try:
        for name, function, after in everything:
            if name == "build" or not args.only or args.only in name:
                run.run(name, function, after)
    except KeyboardInterrupt:
        say("interrupted")
    run.summary([("setup", float(os.environ.get("SETUP_SECONDS", 0)))])
    if run.counts == Counts():
        run.counts.failed = 1
    say(str(run.counts))
    return 1 if run.counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
