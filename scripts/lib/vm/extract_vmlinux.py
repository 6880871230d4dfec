"""extract_vmlinux.py BZIMAGE RESULT: unpack the ELF kernel in an x86 bzImage, so that QEMU can start it directly (PVH)."""

from __future__ import annotations

import struct
import subprocess
import sys

UNPACKERS = {  # first bytes of the payload -> command
    b"\x1f\x8b": ["gzip", "-dc"],
    b"\xfd7zXZ\0": ["xz", "-dc", "--single-stream"],
    b"\x28\xb5\x2f\xfd": ["zstd", "-dc"],
    b"\x02\x21\x4c\x18": ["lz4", "-dc"],
}


def payload(image: bytes) -> bytes:
    """The compressed kernel: where it lies stands in the boot protocol's setup header."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return image[start : start + length]


def unpack(data: bytes) -> bytes:
    for magic, command in UNPACKERS.items():
        if data.startswith(magic):
            # unchecked: bytes after the stream make some of these tools complain
            done = subprocess.run(command, input=data, capture_output=True, check=False)
            if done.stdout.startswith(b"\x7fELF"):
                return done.stdout
            sys.exit(f"{command[0]}: no ELF file came out: {done.stderr!r}")
    sys.exit(f"unknown compression: {data[:8]!r}")


def main() -> None:
    bzimage, result = sys.argv[1:]
    with open(bzimage, "rb") as source:
        kernel = unpack(payload(source.read()))
    with open(result, "wb") as target:
        target.write(kernel)


if __name__ == "__main__":
    main()
