"""What the kernel's files of a v2 group say now, protection by protection: the evidence behind ``applied``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pisupervisor.limits import directories, v2_files
from pisupervisor.limits.cgroups import CgroupHost, GroupLimits, place_of
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.results import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Check = Callable[[str, GroupLimits], tuple[bool, str]]
"""Reads the group's directory: does the limit hold, and what was read."""


def read_back(host: CgroupHost, limits: GroupLimits, path: str) -> dict[str, Applied]:
    """One Applied per protection that ``limits`` asks for. Devices are not among them: v2 has no controller for them."""
    applied = {}
    for name in _CHECKS:
        asked = getattr(limits, name)
        if asked is not None and asked != ():  # swap=0 is asked for
            applied[name] = _check(name, asked, host, limits, path)
    if "swap" in applied and not applied["swap"].holds and not host.swap_on:
        applied["swap"] = Applied(asked=limits.swap, holds=True, how="the host has no swap")
    return applied


def _check(name: str, asked: Any, host: CgroupHost, limits: GroupLimits, path: str) -> Applied:
    place = place_of(host, name)
    if not place.usable:
        return Applied(asked=asked, holds=False, detail=place.why)
    try:
        holds, detail = _CHECKS[name](path, limits)
    except OSError as error:
        holds, detail = False, f"{error.filename}: {error.strerror}"
    return Applied(asked=asked, holds=holds, how=f"cgroup v2 {_FILES[name]}, {host.how}", detail=detail)


def _number(path: str) -> int | None:
    """None for ``max``."""
    text = directories.read(path).strip()
    return None if text == b"max" else int(text)


def _at_most(found: int | None, asked: int | None) -> bool:
    return found is not None and asked is not None and found <= asked


def _memory(path: str, limits: GroupLimits) -> tuple[bool, str]:
    most, whole = _number(f"{path}/memory.max"), _number(f"{path}/memory.oom.group")  # rounded down to pages
    holds, detail = _at_most(most, limits.memory) and whole == 1, f"{most} bytes, ends as a whole"
    if limits.memory_high is not None:
        high = _number(f"{path}/memory.high")
        holds, detail = holds and _at_most(high, limits.memory_high), f"{detail}, throttled above {high}"
    return holds, detail


def _swap(path: str, limits: GroupLimits) -> tuple[bool, str]:
    swap = _number(f"{path}/memory.swap.max")
    return _at_most(swap, limits.swap), f"{swap} bytes"


def _cpus(path: str, limits: GroupLimits) -> tuple[bool, str]:
    quota, period = directories.read(f"{path}/cpu.max").split()
    if quota == b"max":
        return False, "no quota"
    holds = int(quota) <= max(1000, (limits.cpus or 0) * int(period) + 1)
    return holds, f"{int(quota) / int(period):g} cores ({int(quota)} us in {int(period)})"


def _cpu_weight(path: str, limits: GroupLimits) -> tuple[bool, str]:
    found = _number(f"{path}/cpu.weight")
    return found == limits.cpu_weight, f"weight {found}"


def _cpuset(path: str, limits: GroupLimits) -> tuple[bool, str]:
    # Not cpuset.cpus: that takes any CPU, and what the groups above do not have is not to be had.
    cpus = directories.read(f"{path}/cpuset.cpus.effective").strip().decode()
    return bool(cpus) and CpuSet.parse(cpus) == limits.cpuset, f"CPUs {cpus}"


def _pids(path: str, limits: GroupLimits) -> tuple[bool, str]:
    most = _number(f"{path}/pids.max")
    return _at_most(most, limits.pids), f"{most} processes and threads"


def _io(path: str, limits: GroupLimits) -> tuple[bool, str]:
    lines = directories.read(f"{path}/io.max").decode().splitlines()
    found = {device: set(rates) for device, *rates in (line.split(" ") for line in lines)}
    wanted = [v2_files.io_line(limit).split(" ") for limit in limits.io]
    return all(set(rates) <= found.get(device, set()) for device, *rates in wanted), ", ".join(lines)


def _io_weight(path: str, limits: GroupLimits) -> tuple[bool, str]:
    from pisupervisor.limits import io_weight

    return io_weight.read_back(path, limits.io_weight or 0, "v2")


_CHECKS: Mapping[str, Check] = {
    "memory": _memory, "swap": _swap, "cpus": _cpus, "cpu_weight": _cpu_weight, "cpuset": _cpuset, "pids": _pids,
    "io": _io, "io_weight": _io_weight,
}  # fmt: skip
_FILES = {
    "memory": "memory.max", "swap": "memory.swap.max", "cpus": "cpu.max", "cpu_weight": "cpu.weight",
    "cpuset": "cpuset.cpus", "pids": "pids.max", "io": "io.max", "io_weight": "io.weight",
}  # fmt: skip
