"""The limits of a cgroup v2 group as contents of its files."""

from __future__ import annotations

from collections.abc import Iterator

from pisupervisor.limits.cgroups import GroupLimits
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.options import IoLimit

PERIOD = 100_000  # us; what every new group has
_IO_KEYS = {"read_bps": "rbps", "write_bps": "wbps", "read_iops": "riops", "write_iops": "wiops"}


class FileWrite(NamedTuple):
    """One value for one file of the controller."""

    controller: str
    file: str
    value: bytes


def file_writes(limits: GroupLimits, swap_files: bool) -> Iterator[FileWrite]:
    """The limits as file contents. Pure. ``swap_files``: this kernel has ``memory.swap.max``."""
    if limits.pids is not None:
        yield FileWrite("pids", "pids.max", b"%d" % limits.pids)
    if limits.memory is not None:
        yield FileWrite("memory", "memory.max", b"%d" % limits.memory)
        yield FileWrite("memory", "memory.oom.group", b"1")  # half a child is of no use, and may hang
    if limits.memory_high is not None:
        yield FileWrite("memory", "memory.high", b"%d" % limits.memory_high)
    if limits.swap is not None and swap_files:
        yield FileWrite("memory", "memory.swap.max", b"%d" % limits.swap)
    if limits.cpus is not None:
        yield FileWrite("cpu", "cpu.max", b"%d %d" % (quota(limits.cpus), PERIOD))
    if limits.cpu_weight is not None:
        yield FileWrite("cpu", "cpu.weight", b"%d" % limits.cpu_weight)
    if limits.cpuset is not None:
        yield FileWrite("cpuset", "cpuset.cpus", str(limits.cpuset).encode())


def quota(cpus: float) -> int:
    """Microseconds in each period. The kernel takes no less than 1 ms."""
    return max(1000, round(cpus * PERIOD))


def io_writes(limits: GroupLimits) -> Iterator[FileWrite]:
    """The throttles, their devices looked up. Raises OptionsError for a device that is not there."""
    for limit in limits.io:
        yield FileWrite("io", "io.max", io_line(limit).encode())


def io_line(limit: IoLimit) -> str:
    """``"254:0 rbps=1048576 wiops=10"``."""
    from pisupervisor.limits import blockdev  # few ask for it

    rates = blockdev.rates(limit).items()
    return " ".join([blockdev.block_device(limit.device), *(f"{_IO_KEYS[name]}={rate}" for name, rate in rates)])


def weight_writes(limits: GroupLimits, path: str) -> Iterator[FileWrite]:
    """The share of the disks, into those files for it that this kernel gives the group."""
    if limits.io_weight is not None:
        from pisupervisor.limits import io_weight

        for file, value in io_weight.writes(path, limits.io_weight, io_weight.V2_FILES):
            yield FileWrite("io", file, value)
