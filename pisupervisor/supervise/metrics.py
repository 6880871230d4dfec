"""What a child uses, read by the host: from its group's counters, and from /proc through psutil. Never asked of the child."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from pisupervisor.limits import directories
from pisupervisor.limits.cgroups import GroupEvents, GroupIo, GroupUsage
from pisupervisor.records import replace
from pisupervisor.results import Applied, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.limits.cgroups import ChildGroup

_LOOK_EVERY = 0.01


class Meter:
    """Everything that is counted of one child while it lives."""

    def __init__(self) -> None:
        self.before = GroupEvents()  # counters at the beginning of the call that runs, or ran last
        self.told = GroupEvents()  # of which the application has been told
        self.look_at = 0.0  # when the next call is to look at the counters
        self._group: ChildGroup | None = None
        self._pid = self._init_pid = 0
        self._seen = 0.0  # seconds of CPU time, where no group counts them

    def open(self, group: ChildGroup | None, pid: int, init_pid: int) -> None:
        """The child is there."""
        self._group, self._pid, self._init_pid = group, pid, init_pid

    def begin_call(self, now: float | None = None) -> None:
        """Limits that were reached before a call do not explain its end. Quick calls look every 10 ms only."""
        now = time.monotonic() if now is None else now
        if now > self.look_at:
            self.look_at = now + _LOOK_EVERY
            if self._group is not None:
                self.before = self._group.refusals()

    def has_lost_a_process(self) -> bool:
        """Whether the kernel killed one for memory since the present call began."""
        return self._group is not None and self._group.refusals().oom_kills > self.before.oom_kills

    def usage(self) -> Usage:
        """What the group has used so far; from /proc where no cgroup counts. Cheap: it is read around calls."""
        if self._group is not None:
            used = self._group.used()
            if used.cpu_time is not None or used.peak_memory is not None:
                return Usage(cpu_time=used.cpu_time, peak_memory=used.peak_memory)
        return usage_from_proc(self._pid)

    def cpu_time(self) -> float:
        """Seconds that all its processes have used together: by the group, else by a look at each process."""
        used = self._group.used().cpu_time if self._group is not None else None
        if used is not None:
            return used
        self._seen = max(self._seen, cpu_time_of(self.pids()))
        return self._seen

    def whole_usage(self) -> Usage:
        """Everything that can be counted. Costs a look at each process."""
        group = self._group.usage() if self._group is not None else GroupUsage()
        io = self._group.io() if self._group is not None else None
        own = replace(usage_from_proc(self._pid), cpu_time=self.cpu_time())
        usage = whole_usage(group, io, own, self.pids())
        pressure: dict[str, Any] = self._group.pressure() if self._group is not None else {}
        return replace(usage, **pressure)

    def pids(self) -> list[int]:
        """Everything that runs in the child, as this process numbers it, PID 1 of the sandbox included."""
        if self._group is not None:
            return self._group.pids()
        return tree(self._init_pid)

    def frozen_pids(self) -> list[int]:
        """What a pause stops: all but PID 1, which holds the lifeline and reaps."""
        return [pid for pid in self.pids() if pid != self._init_pid]

    def events(self) -> GroupEvents:
        return self._group.events() if self._group is not None else GroupEvents()


def with_counts(applied: dict[str, Applied], events: GroupEvents) -> dict[str, Applied]:
    """``applied``, with how often each limit was reached."""
    counts = {"memory": events.oom_kills, "pids": events.pids_max, "cpus": events.throttled}
    return {name: replace(entry, reached=counts.get(name, 0)) for name, entry in applied.items()}


def usage_from_proc(pid: int) -> Usage:
    """CPU time and peak memory of one process and the children it has reaped; where no cgroup counts. As bytes, here and
    below: a child gives its processes names that are no text.
    """
    try:
        ticks = sum(map(int, directories.stat_fields(f"/proc/{pid}")[11:15]))
        status = _status(pid)
    except OSError:
        return Usage()
    peak = next((int(line.split()[1]) << 10 for line in status if line.startswith(b"VmHWM:")), None)
    return Usage(cpu_time=ticks / os.sysconf("SC_CLK_TCK"), peak_memory=peak)


def cpu_time_of(pids: Iterable[int]) -> float:
    """Seconds that these processes and those they have reaped have used. Parents come before their children (see ``tree``): one
    that is reaped between two looks is missed in this sum, and never in it twice. Who is reaped by nobody (SIGCHLD
    ignored) is in no sum: that one has RLIMIT_CPU.
    """
    ticks = 0
    for pid in pids:
        try:
            ticks += sum(map(int, directories.stat_fields(f"/proc/{pid}")[11:15]))
        except OSError:
            continue  # ended meanwhile
    return ticks / os.sysconf("SC_CLK_TCK")


def has_signal_pending(pid: int) -> bool:
    """Whether a signal was sent to the process that it neither blocks nor ignores, and has not seen yet."""
    try:
        status = _status(pid)
    except OSError:
        return True  # it is gone
    parted = (line.partition(b":\t") for line in status)
    masks = {name: int(text, 16) for name, _, text in parted if name in _MASKS}
    return bool((masks[b"SigPnd"] | masks[b"ShdPnd"]) & ~masks[b"SigBlk"] & ~masks[b"SigIgn"])


def _status(pid: int) -> list[bytes]:
    """Its lines, of which no name that the process has given itself can make one more: it may have ``\\r`` in it."""
    return directories.read(f"/proc/{pid}/status").split(b"\n")


_MASKS = (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn")


def tree(pid: int) -> list[int]:
    """A process and its descendants. All of a sandbox, from its PID 1: whoever is orphaned in it becomes a child of that."""
    if os.path.exists("/proc/thread-self/children"):  # a fifth of the time, but not every kernel is built with it
        from pisupervisor.limits.census import descendants

        return descendants(pid)
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def whole_usage(group: GroupUsage, io: GroupIo | None, own: Usage, pids: Iterable[int]) -> Usage:
    """Everything at once: ``group`` and ``io`` where there is one, ``own`` from /proc where there is none, sums over
    ``pids``.

    Bytes of processes that have ended are those of whoever reaped them: PID 1 of the sandbox is among ``pids``. Of what
    the group and /proc say of them, the larger is true: v1 groups do not count buffered writes, and of PID 1, which
    is not dumpable, an ordinary user may not ask.
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
    for name, value in (io._asdict() if io is not None else {}).items():
        sums[name] = max(value, sums.get(name, 0))
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
