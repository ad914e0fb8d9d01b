"""The ELF kernel inside a bzImage (Linux/x86 boot protocol, section 1.1 and field payload_offset).

QEMU enters the ELF by its PVH note, without firmware and without the kernel's own slow
decompressor: some 5 s less of emulated boot.
"""

import lzma
import struct
import subprocess

from .errors import LabError

XZ = b"\xfd7zXZ\0"
#: Magic number of the payload and the tool that unpacks it.
TOOLS = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b\x08\x00": "gzip"}


def extract(image):
    """The bytes of the vmlinux in the bytes of a bzImage."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise LabError("kernel: not a bzImage")
    setup = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup + offset:setup + offset + length]
    if payload.startswith(XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif tool := TOOLS.get(payload[:4]):
        # The last 4 bytes are the unpacked size, not part of the stream.
        kernel = subprocess.run([tool, "-dc"], input=payload[:-4], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, check=False).stdout
    else:
        raise LabError(f"kernel: unknown compression, magic {payload[:4].hex()}")
    size = struct.unpack("<I", payload[-4:])[0]
    if not kernel.startswith(b"\x7fELF") or len(kernel) < min(size, 1 << 20):
        raise LabError("kernel: the payload of the bzImage is not an ELF file")
    return kernel
