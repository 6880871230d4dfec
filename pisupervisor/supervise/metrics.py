"""What a child uses, read by the host: from its group's counters, and from /proc through psutil. Never asked of the child."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pisupervisor.limits.cgroups import GroupUsage
from pisupervisor.records import replace
from pisupervisor.results import Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def usage_from_proc(pid: int) -> Usage:
    """CPU time and peak memory of one process and the children it has reaped; where no cgroup counts."""
    try:
        with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/status") as status:
            ticks = sum(int(text) for text in stat.read().rsplit(")", 1)[1].split()[11:15])
            peak = next((int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")), None)
    except OSError:
        return Usage()
    return Usage(cpu_time=ticks / os.sysconf("SC_CLK_TCK"), peak_memory=peak)


def has_signal_pending(pid: int) -> bool:
    """Whether a signal was sent to the process that it neither blocks nor ignores, and has not seen yet."""
    try:
        with open(f"/proc/{pid}/status") as status:
            masks = {
                name: int(text, 16) for name, _, text in (line.partition(":\t") for line in status) if name in _MASKS
            }
    except OSError:
        return True  # it is gone
    return bool((masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"] & ~masks["SigIgn"])


_MASKS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn")


def tree(pid: int) -> list[int]:
    """A process and its descendants. All of a sandbox, from its PID 1: whoever is orphaned in it becomes a child of that."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def whole_usage(group: GroupUsage, own: Usage, pids: Iterable[int]) -> Usage:
    """Everything at once: ``group`` where there is one, ``own`` from /proc where there is none, sums over ``pids``.

    Bytes of processes that have ended are those of whoever reaped them: PID 1 of the sandbox is among ``pids``.
    """
    import psutil

    sums: dict[str, int] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                found = {**_memory(process), **_io(process)}
        except psutil.Error:
            continue  # ended meanwhile
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value
    cpu_time = group.cpu_time if group.cpu_time is not None else own.cpu_time
    peak = group.peak_memory if group.peak_memory is not None else own.peak_memory
    count = group.pids if group.pids is not None else len(list(pids))
    return replace(Usage(**sums), cpu_time=cpu_time, peak_memory=peak, memory=group.memory, pids=count)


def _memory(process: Any) -> dict[str, int]:
    memory = process.memory_info()
    return {"rss": memory.rss, "vms": memory.vms}


def _io(process: Any) -> dict[str, int]:
    import psutil

    try:
        io = process.io_counters()
    except psutil.AccessDenied:
        return {}  # PID 1 is not dumpable: an ordinary user may not look at it
    return {
        "read_bytes": io.read_bytes, "write_bytes": io.write_bytes,
        "read_chars": io.read_chars, "write_chars": io.write_chars,
    }  # fmt: skip
