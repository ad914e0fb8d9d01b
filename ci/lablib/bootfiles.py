"""Kernel, initrd, command line and modules out of a disk image of ci/image, for a plain QEMU and for tests.

The VMM has its own reader, made for images of any origin.
"""

import re
import subprocess
from pathlib import Path

from .errors import LabError
from .guestimage import FIRST, SECTOR


def read(image, inside, to):
    """Copies the file `inside` of the image's file system to `to`."""
    Path(to).unlink(missing_ok=True)
    done = subprocess.run(["debugfs", "-R", f"dump {inside} {to}", f"{image}?offset={FIRST * SECTOR}"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if not Path(to).exists() or not Path(to).stat().st_size:
        raise LabError(f"{image}: {inside}: {done.stdout.strip()}")


def entry(image, folder):
    """Of the boot menu's default entry: paths of kernel and initrd inside, and the command line."""
    read(image, "/boot/grub/grub.cfg", Path(folder) / "grub.cfg")
    menu = (Path(folder) / "grub.cfg").read_text()
    linux = re.search(r"^\s*linux\s+(\S+)\s+(.*)$", menu, re.M)
    initrd = re.search(r"^\s*initrd\s+(\S+)$", menu, re.M)
    if not linux or not initrd:
        raise LabError(f"{image}: no entry in grub.cfg")
    return linux.group(1), initrd.group(1), linux.group(2)


def extract(image, folder):
    """Writes the default entry's kernel and initrd to `folder`; their paths and the command line."""
    folder = Path(folder)
    kernel, initrd, words = entry(image, folder)
    read(image, kernel, folder / "vmlinuz")
    read(image, initrd, folder / "initrd")
    return folder / "vmlinuz", folder / "initrd", words


def module(image, name, folder):
    """Writes a module of the default entry's kernel to `folder`; `name` is its path there, without `.ko`."""
    version = entry(image, folder)[0].removeprefix("/boot/vmlinuz-")
    read(image, f"/usr/lib/modules/{version}/kernel/{name}.ko", Path(folder) / f"{Path(name).name}.ko")
