"""What the kernel's files of a v1 group say now, protection by protection: the evidence behind ``applied``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from pisupervisor.limits import directories
from pisupervisor.limits.cgroups import CONTROLLER_OF, CgroupHost, GroupIo, GroupLimits
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.v1_files import shares
from pisupervisor.results import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Paths = Mapping[str, str]
"""Controller to the directory of the group."""

Check = Callable[[str, GroupLimits], tuple[bool, str]]
"""Reads the directory of one controller: does the limit hold, and what was read."""


def read_back(host: CgroupHost, limits: GroupLimits, paths: Paths, tolerated: Set[str]) -> dict[str, Applied]:
    """One Applied per protection that ``limits`` asks for; ``tolerated`` are files whose refusal was expected."""
    asked = {name: getattr(limits, name) for name in _CHECKS}
    applied = {
        name: _check(name, value, host, limits, paths)
        for name, value in asked.items()
        if value is not None and value is not False and value != ()  # swap=0 is asked for
    }
    if "swap" in applied and not applied["swap"].holds and not host.swap_on:
        applied["swap"] = Applied(asked=limits.swap, holds=True, how="the host has no swap")
    if "devices" in applied and "devices" not in paths:
        why = host.places["devices"].why
        applied["devices"] = Applied(asked=True, holds=True, how="user namespace and nodev mounts", detail=why)
    if "cpus" in applied and "cpu.cfs_quota_us" in tolerated:
        detail = "an ancestor's quota is tighter than what was asked for"
        applied["cpus"] = Applied(asked=limits.cpus, holds=True, how="cgroup v1 cpu of an ancestor", detail=detail)
    return applied


def _check(name: str, asked: Any, host: CgroupHost, limits: GroupLimits, paths: Paths) -> Applied:
    controller = CONTROLLER_OF[name]
    if controller not in paths:
        return Applied(asked=asked, holds=False, detail=host.places[controller].why or "the group is gone")
    try:
        holds, detail = _CHECKS[name](paths[controller], limits)
    except OSError as error:
        holds, detail = False, f"{error.filename}: {error.strerror}"
    return Applied(asked=asked, holds=holds, how=f"cgroup v1 {controller}", detail=detail)


def _integer(path: str) -> int:
    text = directories.read(path).strip()
    return -1 if text == b"max" else int(text)


def _memory(path: str, limits: GroupLimits) -> tuple[bool, str]:
    limit = _integer(f"{path}/memory.limit_in_bytes")  # rounded down to pages
    return limit <= (limits.memory or 0), f"{limit} bytes"


def _swap(path: str, limits: GroupLimits) -> tuple[bool, str]:
    swap = _integer(f"{path}/memory.memsw.limit_in_bytes") - _integer(f"{path}/memory.limit_in_bytes")
    return limits.memory is not None and swap <= (limits.swap or 0), f"{swap} bytes"


def _cpus(path: str, limits: GroupLimits) -> tuple[bool, str]:
    quota, period = _integer(f"{path}/cpu.cfs_quota_us"), _integer(f"{path}/cpu.cfs_period_us")
    return 0 < quota <= (limits.cpus or 0) * period + 1, f"{quota / period:g} cores ({quota} us in {period})"


def _cpu_weight(path: str, limits: GroupLimits) -> tuple[bool, str]:
    found = _integer(f"{path}/cpu.shares")
    return found == shares(limits.cpu_weight or 0), f"{found} shares"


def _cpuset(path: str, limits: GroupLimits) -> tuple[bool, str]:
    cpus = directories.read(f"{path}/cpuset.cpus").strip().decode()
    return bool(cpus) and CpuSet.parse(cpus) == limits.cpuset, f"CPUs {cpus}"


def _pids(path: str, limits: GroupLimits) -> tuple[bool, str]:
    most = _integer(f"{path}/pids.max")
    return 0 <= most <= (limits.pids or 0), f"{most} processes and threads"


def _io(path: str, limits: GroupLimits) -> tuple[bool, str]:
    from pisupervisor.limits import blockdev  # few ask for it

    wanted: list[str] = []
    found: list[str] = []
    for limit in limits.io:
        device = blockdev.block_device(limit.device)
        for name, rate in blockdev.rates(limit).items():
            lines = directories.read(f"{path}/blkio.throttle.{name}_device").decode().splitlines()
            wanted.append(f"{device} {rate}")
            found.extend(line for line in lines if line == wanted[-1])
    return wanted == found, f"{', '.join(found)}; v1 does not count buffered writes"


def _io_weight(path: str, limits: GroupLimits) -> tuple[bool, str]:
    from pisupervisor.limits import io_weight

    return io_weight.read_back(path, limits.io_weight or 0, "v1")


def _devices(path: str, limits: GroupLimits) -> tuple[bool, str]:
    rules = directories.read(f"{path}/devices.list").decode().splitlines()
    return limits.devices and not any(rule.startswith("a ") for rule in rules), ", ".join(rules)


_CHECKS: Mapping[str, Check] = {
    "memory": _memory, "swap": _swap, "cpus": _cpus, "cpu_weight": _cpu_weight, "cpuset": _cpuset, "pids": _pids,
    "io": _io, "io_weight": _io_weight, "devices": _devices,
}  # fmt: skip


def io_in(lines: list[bytes]) -> GroupIo:
    """Sums over the devices of ``blkio.throttle.io_service_bytes``, whose lines are ``8:0 Read 4096``."""
    sums = {b"Read": 0, b"Write": 0}
    for line in lines:
        _device, kind, count = (line.split() + [b"", b"0"])[:3]
        if kind in sums:
            sums[kind] += int(count)
    return GroupIo(read_bytes=sums[b"Read"], write_bytes=sums[b"Write"])
