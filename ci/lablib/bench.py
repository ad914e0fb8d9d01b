"""`ci/bench NAME`: builds a benchmark and runs it. Figures go to standard output, all else does not."""

import argparse
import json
import os
import subprocess
import sys

from . import benchlab, bootbench, membench, schedbench
from .paths import REPO

PROG = "ci/bench"
#: Name: package, bench target of cargo, and what it is about.
BENCHES = {
    "dsm": ("krg-vmm", "dsm", "faults on another node's pages, and reading its memory, beside their floors"),
    "migrate": ("krg-vmm", "migrate", "how long a vCPU stands still when it moves, beside its floor"),
    "sched": ("krg-vmm", "sched", "what the scheduler does to loads of vCPUs, beside leaving them where they are"),
}
#: Those that need the lab: name, function, and what it is about.
LAB_BENCHES = {
    "boot": (bootbench.main, "faults of a stock kernel's boot over two hosts, and of its ticks and context switches (in the lab, as root)"),
    "memory": (membench.main, "loops over memory in a guest, beside a guest of QEMU and KVM (in the lab, as root)"),
}


def build(package, target):
    """Builds a bench target; the path of its program."""
    words = ["cargo", "bench", "--locked", "--no-run", "--package", package, "--bench", target,
             "--message-format=json-render-diagnostics"]
    done = subprocess.run(words, cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{PROG}: cargo bench: status {done.returncode}")
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    programs = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == target]
    if not programs:
        sys.exit(f"{PROG}: cargo built no program for {target}")
    return programs[-1]


def main():
    about = {**{name: text for name, (_, _, text) in BENCHES.items()}, **{name: text for name, (_, text) in LAB_BENCHES.items()}}
    names = "\n".join(f"  {name:8} {text}" for name, text in about.items())
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"names:\n{names}\n\nFurther words go to the benchmark: --json, --help, ...")
    parser.add_argument("name", choices=about, metavar="NAME", help="which benchmark")
    parser.add_argument("--lab", action="store_true", help="dsm: two nodes on two emulated hosts, with kernels of their own; "
                                                           "sched: a stock Linux over two emulated hosts (as root)")
    args, words = parser.parse_known_args()
    if args.name in LAB_BENCHES:
        LAB_BENCHES[args.name][0](f"{PROG} {args.name}", words)
        return
    if args.lab and args.name == "sched":
        schedbench.main(f"{PROG} sched --lab", words)
        return
    if args.lab and args.name != "dsm":
        parser.error(f"{args.name} has no --lab")
    package, target, _ = BENCHES[args.name]
    program = build(package, target)
    if args.lab:
        sys.exit(benchlab.run(program, words))
    os.execv(program, [program, *words])


if __name__ == "__main__":
    main()
