"""Disk images with a stock Debian, made by Debian's own tools: mmdebstrap, mkfs.ext4, sfdisk.

The disk has a GPT with one ext4 partition. No boot loader is installed: the VMM reads kernel,
initrd and command line as a boot loader would, from /boot and the configuration in it. Nothing
of ours is inside; automation goes over the serial console, where root is logged in.
"""

import os
import re
import shlex
import shutil
import uuid
from pathlib import Path

from . import buildcache
from .errors import LabError
from .paths import CI, GUEST_IMAGES

SOURCE = CI / "guest-image"
SUITE = "bookworm"
SECTOR = 512
#: First sector of the partition: 1 MiB, as every partitioning tool has it.
FIRST = 2048
#: GPT type "Linux root (x86-64)", from the Discoverable Partitions Specification.
ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"

PACKAGES = ["initramfs-tools", "lz4", "systemd", "systemd-sysv", "udev", "kmod", "procps", "iproute2", "util-linux",
            "login", "passwd", "e2fsprogs"]
#: The C project that the variant build brings: 9 files of C with a makefile of its own.
PROJECT = "bzip2"
VARIANTS = {
    "minimal": {"packages": [], "size": 1 << 30, "hooks": []},
    "build": {"packages": ["gcc", "libc6-dev", "make"], "size": 2 << 30, "hooks": ["source"]},
}
KERNELS = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
LEFT_OUT = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"]
#: Units of a stock Debian that serve no purpose on a machine which is booted for one test; each
#: costs seconds where everything is emulated. systemd-logind would fail anyway without D-Bus, and
#: getty-static stands in for it with five logins on screens that are not there.
MASKED = ["systemd-logind.service", "getty-static.service", "getty@tty1.service", "systemd-pstore.service",
          "e2scrub_reap.service", "e2scrub_all.timer", "apt-daily.timer", "apt-daily-upgrade.timer",
          "dpkg-db-backup.timer", "fstrim.timer", "systemd-tmpfiles-clean.timer", "systemd-update-utmp.service",
          "systemd-update-utmp-runlevel.service", "systemd-random-seed.service", "systemd-journal-flush.service",
          "systemd-journald-audit.socket", "systemd-initctl.socket", "systemd-ask-password-console.path",
          "systemd-ask-password-wall.path", "proc-sys-fs-binfmt_misc.automount", "sys-kernel-debug.mount",
          "sys-kernel-tracing.mount", "dev-hugepages.mount", "dev-mqueue.mount", "modprobe@configfs.service",
          "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service",
          "modprobe@loop.service", "systemd-modules-load.service", "kmod-static-nodes.service"]
#: Programs that systemd runs at every boot to find what this disk does not have.
MASKED_GENERATORS = ["systemd-bless-boot-generator", "systemd-cryptsetup-generator", "systemd-gpt-auto-generator",
                     "systemd-hibernate-resume-generator", "systemd-integritysetup-generator",
                     "systemd-rc-local-generator", "systemd-run-generator", "systemd-system-update-generator",
                     "systemd-sysv-generator", "systemd-veritysetup-generator"]
#: The kernel's options in the boot menu. Every device is an event for udev: one UART is enough.
#: The others let an emulated boot, many times slower than any machine, take its time.
OPTIONS = "console=ttyS0 8250.nr_uarts=1 udev.event_timeout=3600 systemd.service_watchdogs=no quiet"


def filesystem_id(key):
    """The UUID of the root file system: the same for the same inputs."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"krg-vmm guest image {key}"))


def grub_config(version, root, options):
    """A grub.cfg with the entries that update-grub writes for one kernel."""
    def entry(title, ident, arguments, indent):
        lines = [f"menuentry '{title}' --class debian --class gnu-linux --class gnu --class os "
                 f"$menuentry_id_option '{ident}-{root}' {{",
                 "\tload_video", "\tinsmod gzio", "\tinsmod part_gpt", "\tinsmod ext2",
                 f"\tsearch --no-floppy --fs-uuid --set=root {root}",
                 f"\techo\t'Loading Linux {version} ...'",
                 f"\tlinux\t/boot/vmlinuz-{version} root=UUID={root} ro {arguments}",
                 "\techo\t'Loading initial ramdisk ...'",
                 f"\tinitrd\t/boot/initrd.img-{version}", "}"]
        return "".join(f"{indent}{line}\n" for line in lines)

    return (
        "### BEGIN /etc/grub.d/00_header ###\n"
        "if [ -s $prefix/grubenv ]; then\n  set have_grubenv=true\n  load_env\nfi\n"
        'set default="0"\n'
        "if [ x\"${feature_menuentry_id}\" = xy ]; then\n  menuentry_id_option=\"--id\"\n"
        "else\n  menuentry_id_option=\"\"\nfi\nexport menuentry_id_option\n"
        "terminal_input console\nterminal_output console\nset timeout=5\n"
        "### END /etc/grub.d/00_header ###\n\n"
        "### BEGIN /etc/grub.d/10_linux ###\n"
        + entry("Debian GNU/Linux", "gnulinux-simple", options, "")
        + f"submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-{root}' {{\n"
        + entry(f"Debian GNU/Linux, with Linux {version}", f"gnulinux-{version}-advanced", options, "\t")
        + entry(f"Debian GNU/Linux, with Linux {version} (recovery mode)", f"gnulinux-{version}-recovery",
                "single console=ttyS0", "\t")
        + "}\n### END /etc/grub.d/10_linux ###\n")


def configure(root, key):
    """What an installer would ask: file systems, boot menu, console, root's password."""
    ident = filesystem_id(key)
    kernels = sorted(path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1 or not (root / f"boot/initrd.img-{kernels[0]}").exists():
        raise LabError(f"guest image: one kernel with an initrd was expected in /boot, not {kernels}")
    (root / "etc/fstab").write_text(f"UUID={ident} / ext4 errors=remount-ro 0 0\n")
    (root / "etc/hostname").write_text("debian\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost debian\n")
    # An identity of its own: with none, the first boot is an installation of all units.
    (root / "etc/machine-id").write_text(uuid.uuid5(uuid.UUID(ident), "machine").hex + "\n")
    (root / "boot/grub").mkdir(exist_ok=True)
    (root / "boot/grub/grub.cfg").write_text(grub_config(kernels[0], ident, OPTIONS))
    getty = root / "etc/systemd/system/serial-getty@ttyS0.service.d"
    getty.mkdir(parents=True)
    shutil.copy(SOURCE / "autologin.conf", getty)
    (root / "etc/systemd/system.conf.d").mkdir()
    shutil.copy(SOURCE / "timeouts.conf", root / "etc/systemd/system.conf.d")
    (root / "etc/systemd/system-generators").mkdir()
    for name in [f"system/{unit}" for unit in MASKED] + [f"system-generators/{name}" for name in MASKED_GENERATORS]:
        link = root / "etc/systemd" / name
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    (root / "etc/systemd/system/default.target").symlink_to("/lib/systemd/system/multi-user.target")
    shadow = (root / "etc/shadow").read_text()
    (root / "etc/shadow").write_text(re.sub(r"^root:[^:]*:", "root::", shadow, flags=re.M))
    (root / "root/.hushlogin").touch()
    # Up to date with /usr: else systemd rebuilds its caches at the first boot.
    for name in ("etc/.updated", "var/.updated"):
        (root / name).touch()
        stamp = (root / "usr").stat().st_mtime_ns
        os.utime(root / name, ns=(stamp, stamp))


def bootstrap(variant, kernel, extra, root):
    """Installs the packages into the folder `root`."""
    packages = [KERNELS[kernel], *PACKAGES, *VARIANTS[variant]["packages"], *extra]
    # The initrd is made while the kernel is installed, so its settings have to be there before.
    hooks = [f"--essential-hook=mkdir -p \"$1/etc/initramfs-tools/conf.d\" && "
             f"cp {shlex.quote(str(SOURCE / 'initramfs.conf'))} \"$1/etc/initramfs-tools/conf.d/image.conf\" && "
             f"cp {shlex.quote(str(SOURCE / 'initramfs-modules'))} \"$1/etc/initramfs-tools/modules\""]
    hooks += [f"--customize-hook={shlex.quote(str(SOURCE / hook))} \"$1\" {PROJECT}"
              for hook in VARIANTS[variant]["hooks"]]
    buildcache.run("packages", ["mmdebstrap", "--quiet", "--variant=minbase", "--include=" + ",".join(packages),
                                "--dpkgopt=force-confold", *(f"--dpkgopt=path-exclude={p}" for p in LEFT_OUT),
                                *hooks, SUITE, root])


def make_disk(root, image, size, ident):
    """A disk image of `size` bytes with the tree `root` as its one file system."""
    with open(image, "wb") as file:
        file.truncate(size)
    table = f"label: gpt\nfirst-lba: {FIRST}\nstart={FIRST}, type={ROOT_TYPE}, name=root\n"
    (image.parent / "table").write_text(table)
    buildcache.run("partition", ["sh", "-c", 'sfdisk --quiet "$1" <"$2"', "sh", image, image.parent / "table"])
    (image.parent / "table").unlink()
    # The last 34 sectors are the GPT's copy; the file system ends at a whole MiB before it.
    blocks = (size - FIRST * SECTOR - (1 << 20)) // 4096
    # Tables are written now, not by the guest's kernel in the background of a measurement.
    buildcache.run("file system", [
        "mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "65536", "-J", "size=16", "-U", ident, "-L", "root",
        "-E", f"offset={FIRST * SECTOR},lazy_itable_init=0,lazy_journal_init=0,hash_seed={ident}",
        "-d", root, image, str(blocks)])
    buildcache.run("holes", ["fallocate", "--dig-holes", image])


def obtain(variant="minimal", kernel="cloud", extra=(), force=False):
    """The path of the disk image, built when an input changed."""
    if variant not in VARIANTS or kernel not in KERNELS:
        raise LabError(f"guest image: no variant {variant} with kernel {kernel}")
    sources = sorted(path for path in SOURCE.iterdir() if path.is_file())
    settings = [SUITE, KERNELS[kernel], PROJECT, *PACKAGES, *LEFT_OUT, *VARIANTS[variant]["packages"],
                *VARIANTS[variant]["hooks"], *sorted(extra)]
    base_key = buildcache.key_of([path for path in sources if path.suffix != ".conf" or path.stem == "initramfs"],
                                 *settings)
    key = buildcache.key_of([*sources, CI / "lablib/guestimage.py"], base_key)

    def build_base(folder):
        print(f"image: installing {variant} with kernel {kernel}", flush=True)
        bootstrap(variant, kernel, extra, folder / "root")

    def build(folder):
        if os.geteuid():
            raise LabError("guest image: must be built by root")
        base = buildcache.obtain(GUEST_IMAGES / "base", base_key, build_base, force)
        print(f"image: making the disk {variant}", flush=True)
        root = folder / "root"
        buildcache.run("tree copied", ["cp", "-a", base / "root", root])
        configure(root, key)
        make_disk(root, folder / f"debian-{variant}.img", VARIANTS[variant]["size"], filesystem_id(key))
        shutil.rmtree(root)

    image = buildcache.obtain(GUEST_IMAGES, key, build, force) / f"debian-{variant}.img"
    if not extra:
        name = image.name if kernel == "cloud" else f"debian-{variant}-{kernel}.img"
        publish(image, GUEST_IMAGES / name)
    return image


def publish(image, name):
    """Makes `name` a link to the image: a path that stays, also inside the hosts."""
    new = name.with_name(f".{name.name}.{os.getpid()}")
    new.symlink_to(image.relative_to(name.parent))
    new.replace(name)


def copy(image, to):
    """Copies an image with its holes."""
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    buildcache.run("copy", ["cp", "--sparse=always", "--reflink=auto", image, to])
