"""The share of a disk (``io_weight``): which files take it, and whether anything on this host schedules by it.

A weight is a number that the kernel always takes. It means something only on a disk whose scheduler is bfq, or, on v2,
on one for which root has switched io.cost on: else all groups are served alike, whatever their files say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pisupervisor.limits import directories

#: file -> whether it has BFQ's scale, 1..1000, in place of 1..10000. Each is there where the kernel has what reads it.
V2_FILES = {"io.weight": False, "io.bfq.weight": True}
V1_FILES = {"blkio.bfq.weight": True}
_BLOCK = "/sys/block"
_COST = "/sys/fs/cgroup/io.cost.qos"  # of the root group alone
REMEDY = (
    "as root, for the disk in question: modprobe bfq && echo bfq > /sys/block/DISK/queue/scheduler"
    " (cgroup v2 also: echo 'MAJOR:MINOR enable=1' > /sys/fs/cgroup/io.cost.qos)"
)


def bfq_weight(weight: int) -> int:
    """BFQ takes 1..1000, with the same default of 100; the upper part is mapped as systemd does it."""
    return weight if weight <= 100 else 100 + (weight - 100) * 900 // 9900


def weighing_disks(mode: str, block: str = _BLOCK, cost: str = _COST) -> list[tuple[str, str]]:
    """(disk, "bfq" or "io.cost") for each on which weights count. 20 us a disk: only for those who ask for a weight."""
    found = {name: "bfq" for name in _listed(block) if b"[bfq]" in _read(f"{block}/{name}/queue/scheduler")}
    if mode == "v2":
        enabled = [line.split()[0] for line in _read(cost).splitlines() if b"enable=1" in line.split()]
        for name in _listed(block):
            if _read(f"{block}/{name}/dev").strip() in enabled:
                found.setdefault(name, "io.cost")
    return sorted(found.items())


def why_none(disks: Sequence[tuple[str, str]]) -> str:
    """Why a weight would mean nothing; empty where it means something."""
    return "" if disks else "no disk here has a scheduler that knows weights (bfq), nor io.cost switched on"


def writes(path: str, weight: int, files: dict[str, bool]) -> Iterator[tuple[str, bytes]]:
    """(file, value) for those of ``files`` that the group has."""
    for file, is_bfq in files.items():
        if os.path.exists(f"{path}/{file}"):
            yield file, b"%d" % (bfq_weight(weight) if is_bfq else weight)


def read_back(path: str, weight: int, mode: str) -> tuple[bool, str]:
    """Whether each file that is read by what schedules some disk says so, and on which disks it counts."""
    files, disks = (V2_FILES if mode == "v2" else V1_FILES), weighing_disks(mode)
    needed = {kind for _name, kind in disks}
    said = {file: _number(directories.read(f"{path}/{file}")) for file, _value in writes(path, weight, files)}
    right = {
        "bfq" if files[file] else "io.cost" for file, value in said.items() if value == _wanted(file, weight, files)
    }
    words = ", ".join(f"{file} {value}" for file, value in said.items())
    where = ", ".join(f"{name} ({kind})" for name, kind in disks)
    return bool(needed) and needed <= right, f"{words or 'no such file'}; counts on: {where or why_none(disks)}"


def _wanted(file: str, weight: int, files: dict[str, bool]) -> int:
    return bfq_weight(weight) if files[file] else weight


def _number(text: bytes) -> int:
    """``default 100`` or ``100``, then lines for single devices."""
    return int(text.split(b"\n")[0].split()[-1])


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []  # a container without /sys


def _read(path: str) -> bytes:
    try:
        return directories.read(path)
    except OSError:
        return b""
