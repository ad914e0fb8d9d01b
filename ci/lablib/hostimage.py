"""The kernel, initrd and root file system that all emulated hosts boot, from Debian packages.

The root file system is one read-only erofs; a host writes to a tmpfs over it.
"""

import os
import shutil
import subprocess
from pathlib import Path

from . import buildcache, bzimage
from .errors import LabError
from .paths import CI, HOST_IMAGES

SOURCE = CI / "host-image"
SUITE = "bookworm"
#: Modules that the initrd loads to reach the root file system.
EARLY = ["virtio_pci", "virtio_blk", "crc32c_generic", "erofs", "overlay"]
LEFT_OUT = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"]


def words(name):
    """The words of a list in host-image/, without its comments."""
    lines = (SOURCE / name).read_text().splitlines()
    return [word for line in lines for word in line.split("#")[0].split()]


def kernel_package(flavour):
    """The current package behind linux-image-`flavour`, like linux-image-6.1.0-9-amd64."""
    text = subprocess.run(["apt-cache", "depends", f"linux-image-{flavour}"], stdout=subprocess.PIPE, text=True,
                          check=False).stdout
    for line in text.splitlines():
        name = line.split(":")[-1].strip()
        if "Depends:" in line and name.startswith("linux-image-"):
            return name
    raise LabError(f"linux-image-{flavour} is not in apt's lists; run apt-get update")


def unpack_kernel(folder):
    """Downloads and unpacks the kernel package in `folder`; its version."""
    package = kernel_package("amd64")
    folder.mkdir()
    buildcache.run("kernel", ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], cwd=folder)
    [archive] = folder.glob("*.deb")
    buildcache.run("kernel unpacked", ["dpkg-deb", "-x", archive, folder])
    version = package.removeprefix("linux-image-")
    buildcache.run("kernel modules", ["depmod", "-b", folder, version])
    return version


def closure(tree, version, modules):
    """The files of `modules` and what they depend on, in the order to load them."""
    files = []
    for module in modules:
        done = subprocess.run(["modprobe", "-d", tree, "-S", version, "--show-depends", module],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise LabError(f"kernel {version}: {done.stderr.strip()}")
        for line in done.stdout.splitlines():
            if line.startswith("insmod ") and (name := line.split()[1]) not in files:
                files.append(name)
    return [Path(name) for name in files]


def install_modules(kernel, version, root):
    """Copies the modules that hosts use; all 4,000 would be most of the image."""
    inside = Path("lib/modules") / version
    for file in closure(kernel, version, words("modules")):
        to = root / file.relative_to(kernel)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(kernel / inside / name, root / inside / name)
    buildcache.run("root modules", ["depmod", "-b", root, version])


def install_programs(root):
    """The host's init, agent and set-up script."""
    folder = root / "usr/lib/lab"
    folder.mkdir(parents=True)
    for file, mode in [(SOURCE / "init", 0o755), (SOURCE / "setup-host", 0o755), (SOURCE / "agent.py", 0o644),
                       (CI / "lablib/frames.py", 0o644)]:
        shutil.copy(file, folder)
        (folder / file.name).chmod(mode)
    # A byte-compiled agent starts at once; compiling it takes a second here.
    buildcache.run("agent", ["chroot", root, "python3", "-I", "-S", "-c",
                             "import sys; sys.path.insert(0, '/usr/lib/lab'); import frames"])
    (root / "lab").mkdir()


def make_initrd(kernel, version, root, work, image):
    """The first stage: busybox, a few modules and a script."""
    for name in ("bin", "modules", "proc", "sys", "dev", "ro", "rw", "new"):
        (work / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", work / "bin/busybox")
    shutil.copy(SOURCE / "initrd-init", work / "init")
    (work / "init").chmod(0o755)
    os.mknod(work / "dev/console", 0o600 | 0o020000, os.makedev(5, 1))
    files = closure(kernel, version, EARLY)
    for file in files:
        shutil.copy(file, work / "modules")
    (work / "modules/list").write_text("".join(f"{file.name}\n" for file in files))
    names = "\n".join(os.fspath(path.relative_to(work)) for path in sorted(work.rglob("*")))
    with open(image, "wb") as out:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=work, input=names.encode(), stdout=out, check=True)


def build_base(folder):
    """Unpacks kernel and root file system, the slow part that seldom changes."""
    if os.geteuid():
        raise LabError("host image: must be built by root")
    print("lab: fetching the hosts' packages", flush=True)
    (folder / "version").write_text(unpack_kernel(folder / "kernel"))
    buildcache.run("root file system", [
        "mmdebstrap", "--quiet", "--variant=minbase", "--include=" + ",".join(words("packages")),
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT), SUITE, folder / "root"])


def build(base, folder):
    """Makes vmlinux, initrd and root.erofs in `folder`."""
    print("lab: building the hosts' image", flush=True)
    version, kernel = (base / "version").read_text(), base / "kernel"
    root, initrd = folder / "root", folder / "initrd.d"
    (folder / "vmlinux").write_bytes(bzimage.extract((kernel / f"boot/vmlinuz-{version}").read_bytes()))
    buildcache.run("root copied", ["cp", "-a", base / "root", root])
    install_modules(kernel, version, root)
    install_programs(root)
    make_initrd(kernel, version, root, initrd, folder / "initrd")
    buildcache.run("erofs", ["mkfs.erofs", "-d0", folder / "root.erofs", root])
    for tree in (root, initrd):
        shutil.rmtree(tree)


def obtain(force=False):
    """The folder with vmlinux, initrd and root.erofs, built when an input changed."""
    settings = [SUITE, *LEFT_OUT, *words("packages")]
    base_key = buildcache.key_of([], *settings)
    inputs = sorted(path for path in SOURCE.iterdir() if path.is_file())
    inputs += [CI / "lablib" / name for name in ("hostimage.py", "bzimage.py", "frames.py")]

    def make(folder):
        build(buildcache.obtain(HOST_IMAGES / "base", base_key, build_base, force), folder)

    return buildcache.obtain(HOST_IMAGES, buildcache.key_of(inputs, base_key), make, force)
