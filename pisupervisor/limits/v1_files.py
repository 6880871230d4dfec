"""The limits of a cgroup v1 group as contents of its files, in the order in which the kernel takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from errno import EINVAL, ENOENT

from pisupervisor.limits.cgroups import GroupLimits
from pisupervisor.records import NamedTuple

PERIOD = 100_000  # us; what every new group has
_DEVICES = (3, 5, 7, 8, 9)  # minors of major 1: null, zero, full, random, urandom


class FileWrite(NamedTuple):
    """Values for one file, one write each. The errnos in ``tolerated`` mean that something else holds the limit."""

    controller: str
    file: str
    values: tuple[bytes, ...]
    tolerated: tuple[int, ...] = ()


def file_writes(limits: GroupLimits, memsw: bool) -> Iterator[FileWrite]:
    """The limits as file contents, in the order in which the kernel takes them. Pure."""
    if limits.pids is not None:
        yield _number("pids", "pids.max", limits.pids)
    if limits.memory is not None:
        yield _number("memory", "memory.limit_in_bytes", limits.memory)
        if memsw and limits.swap is not None:  # memory and swap together: never below memory alone
            yield _number("memory", "memory.memsw.limit_in_bytes", limits.memory + limits.swap)
        # v1 counts TCP buffers apart from memory; newer kernels may drop the file.
        yield _number("memory", "memory.kmem.tcp.limit_in_bytes", limits.memory, ENOENT)
    if limits.cpus is not None:
        # EINVAL: an ancestor's quota is tighter already (v1 refuses a child that may do more than its parent).
        yield _number("cpu", "cpu.cfs_quota_us", _quota(limits.cpus), EINVAL)
    if limits.cpu_weight is not None:
        yield _number("cpu", "cpu.shares", shares(limits.cpu_weight))
    if limits.cpuset is not None:
        yield FileWrite("cpuset", "cpuset.cpus", (str(limits.cpuset).encode(),))
    if limits.devices:
        yield FileWrite("devices", "devices.deny", (b"a",))
        yield FileWrite("devices", "devices.allow", tuple(b"c 1:%d rw" % minor for minor in _DEVICES))


def _number(controller: str, file: str, value: int, *tolerated: int) -> FileWrite:
    return FileWrite(controller, file, (b"%d" % value,), tolerated)


def _quota(cpus: float) -> int:
    return max(1000, round(cpus * PERIOD))  # the kernel takes no less than 1 ms


def shares(weight: int) -> int:
    """``cpu.shares`` for a weight of 1..10000."""
    return max(2, round(weight * 1024 / 100))  # the defaults, 100 and 1024, mean the same


def io_writes(limits: GroupLimits) -> Iterator[FileWrite]:
    """The throttles, their devices looked up. Raises OptionsError for a device that is not there."""
    for limit in limits.io:
        from pisupervisor.limits import blockdev  # few ask for it

        device = blockdev.block_device(limit.device)
        for name, rate in blockdev.rates(limit).items():
            yield FileWrite("blkio", f"blkio.throttle.{name}_device", (f"{device} {rate}".encode(),))


def weight_writes(limits: GroupLimits, paths: Mapping[str, str]) -> Iterator[FileWrite]:
    """The share of the disks, into those files for it that this kernel gives the group."""
    if limits.io_weight is not None and "blkio" in paths:
        from pisupervisor.limits import io_weight

        for file, value in io_weight.writes(paths["blkio"], limits.io_weight, io_weight.V1_FILES):
            yield FileWrite("blkio", file, (value,))
