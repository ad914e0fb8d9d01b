"""Kernel, initrd and command line out of a disk image of ci/image, for a plain QEMU.

Only for tests of the images: the VMM has its own reader, made for images of any origin.
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


def extract(image, folder):
    """Writes the default entry's kernel and initrd to `folder`; their paths and the command line."""
    folder = Path(folder)
    read(image, "/boot/grub/grub.cfg", folder / "grub.cfg")
    menu = (folder / "grub.cfg").read_text()
    linux = re.search(r"^\s*linux\s+(\S+)\s+(.*)$", menu, re.M)
    initrd = re.search(r"^\s*initrd\s+(\S+)$", menu, re.M)
    if not linux or not initrd:
        raise LabError(f"{image}: no entry in grub.cfg")
    read(image, linux.group(1), folder / "vmlinuz")
    read(image, initrd.group(1), folder / "initrd")
    return folder / "vmlinuz", folder / "initrd", linux.group(2)
