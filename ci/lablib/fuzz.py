"""`ci/fuzz`: every fuzz target of the repository for some minutes; its last line is the result.

A target starts from its corpus (in its crate's `fuzz/corpus`, which git ignores) and, where random bytes would
not get far, from small seeds made here: disk images and kernel files.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import LabError
from .paths import OUT, REPO
from .steps import Counts, end_on_signals, one_line, say

PROG = "ci/fuzz"
LOGS = OUT / "fuzz"
SECONDS = 600
#: A target that needs more has found something; `kernel` unpacks what claims to be large.
MEMORY_MIB = 1024
#: The compiler of the project builds with sanitizers if it takes itself for a nightly one.
ENVIRONMENT = dict(os.environ, RUSTC_BOOTSTRAP="1", CARGO_TERM_COLOR="never")
DONE = re.compile(r"^Done (\d+) runs in (\d+) second", re.M)
GRUB_CFG = """set root='hd0,gpt1'
menuentry 'Linux' { linux /vmlinuz root=/dev/vda1 ro quiet
initrd /initrd.img }
"""


def targets():
    """All targets: name, and the crate whose `fuzz` folder has it."""
    found = {}
    for manifest in sorted(REPO.glob("*/fuzz/Cargo.toml")):
        for source in sorted(manifest.parent.glob("fuzz_targets/*.rs")):
            found[source.stem] = manifest.parents[1]
    return found


def run(words, **options):
    """A command that has to succeed."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise LabError(f"{' '.join(map(str, words[:3]))}: status {done.returncode}: {done.stdout.decode(errors='replace').strip()[-600:]}")


def seeds(name, folder):
    """Makes the seeds of a target in `folder`."""
    if name == "find":
        with tempfile.TemporaryDirectory() as root:
            grub = Path(root, "boot/grub")
            grub.mkdir(parents=True)
            (grub / "grub.cfg").write_text(GRUB_CFG)
            Path(root, "vmlinuz").write_bytes(b"kernel")
            Path(root, "initrd.img").write_bytes(b"initrd")
            run(["mkfs.ext4", "-q", "-O", "^has_journal", "-N", "16", "-d", root, folder / "ext4", "256K"])
        disk = folder / "gpt"
        with open(disk, "wb") as file:
            file.truncate(512 << 10)
        subprocess.run(["sfdisk", "-q", disk], input=b"label: gpt\nstart=64, size=512\n", check=True, capture_output=True)
        with open(disk, "r+b") as file:
            file.seek(64 * 512)
            file.write((folder / "ext4").read_bytes())
    if name == "disk":
        # A header, its tables and one cluster, as QEMU's specification of qcow2 (version 3) has them.
        cluster = 1 << 12
        header = b"QFI\xfb" + b"".join(number.to_bytes(size, "big") for number, size in [
            (3, 4), (0, 8), (0, 4), (12, 4), (4 * cluster, 8), (0, 4), (1, 4), (3 * cluster, 8), (cluster, 8), (1, 4),
            (0, 4), (0, 8), (0, 8), (0, 8), (4, 4), (104, 4)])
        table = lambda entry: entry.to_bytes(8, "big").ljust(cluster, b"\0")
        (folder / "qcow2").write_bytes(header.ljust(cluster, b"\0") + table(2 * cluster) + (b"\0\1" * 6).ljust(cluster, b"\0")
                                       + table(1 << 63 | 4 * cluster) + table(1 << 63 | 5 * cluster) + b"data".ljust(cluster, b"\0"))
        (folder / "raw").write_bytes(bytes(1024))
    if name == "kernel":
        (folder / "elf").write_bytes(Path("/bin/true").read_bytes()[:4096])


def fuzz(name, crate, seconds):
    """Runs one target; says what it did and raises if it found something."""
    made = LOGS / "seeds" / name
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    seeds(name, made)
    corpus = crate / "fuzz/corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    words = ["cargo", "fuzz", "run", "--fuzz-dir", "fuzz", "--sanitizer", "address", name, corpus, made, "--",
             f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MIB}", "-timeout=20", "-max_len=1048576"]
    with open(log, "wb") as file:
        status = subprocess.run(words, cwd=crate, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    done = DONE.search(text)
    if status or not done:
        found = [line for line in text.splitlines() if re.search(r"panicked|ERROR|SUMMARY|Test unit written|^error", line)]
        raise LabError(f"status {status}: {' | '.join(found[:4]) or text.strip()[-300:]}; see {log}")
    say(f"ok   {name}: {int(done[1]):,} runs in {done[2]} s, nothing found")


def main():
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="targets to run, by default all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"how long each runs (default {SECONDS})")
    parser.add_argument("--jobs", type=int, default=1, help="targets that run at the same time (default 1)")
    parser.add_argument("--list", action="store_true", help="name the targets and end")
    args = parser.parse_args()
    known = targets()
    if args.list:
        for name, crate in known.items():
            say(f"{name} ({crate.name})")
        return 0
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"{unknown[0]}: no such target; see: {PROG} --list")
    end_on_signals()
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = {name: known[name] for name in args.names or known}
    counts = Counts()
    for crate in sorted(set(chosen.values())):
        # One after the other: builds of one crate wait for each other anyway.
        say(f"==> building the targets of {crate.name}")
        run(["cargo", "fuzz", "build", "--fuzz-dir", "fuzz", "--sanitizer", "address"], cwd=crate, env=ENVIRONMENT)

    def one(name):
        try:
            fuzz(name, chosen[name], args.seconds)
            counts.passed += 1
        except Exception as error:
            counts.failed += 1
            say(f"FAIL {name}: {one_line(error)}")

    say(f"==> {len(chosen)} targets, {args.seconds} s each")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, chosen))
    say(str(counts))
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
