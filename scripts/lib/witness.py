"""Looks from outside at what a demonstration does to its host: processes, cgroups, memory. Uses /proc alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pisupervisor import ProcessIsolator

MEGABYTE = 1 << 20
ALLOWED_GROWTH = 64 * MEGABYTE


class Witness:
    """Remembers every process and cgroup it sees of an isolator, and says afterwards whether they are gone.

    ``most`` is the largest number of processes seen at once; set it to 0 before an attack to measure that one.
    """

    def __init__(self) -> None:
        self.most = 0
        self._resident = resident()
        self._available = available()
        self._processes: set[tuple[int, str]] = set()
        self._groups: set[Path] = set()

    def look(self, isolator: ProcessIsolator) -> None:
        """Notes which processes the isolator has right now, and in which cgroups they are."""
        own = cgroups("self")
        pids = isolator.pids()
        self.most = max(self.most, len(pids))
        for pid in pids:
            if started := start_time(pid):
                self._processes.add((pid, started))
                # A process that is just dying shows the root of a hierarchy for a moment.
                self._groups |= {g for g in cgroups(str(pid)) if not any(mine.is_relative_to(g) for mine in own)}

    @contextmanager
    def watching(self, isolator: ProcessIsolator) -> Iterator[None]:
        """Looks again and again while the block runs."""
        self.look(isolator)
        over = threading.Event()
        looker = threading.Thread(target=self._keep_looking, args=(isolator, over), name="witness")
        looker.start()
        try:
            yield
        finally:
            over.set()
            looker.join()

    def _keep_looking(self, isolator: ProcessIsolator, over: threading.Event) -> None:
        from pisupervisor import IsolationError

        while not over.wait(0.02):
            try:
                self.look(isolator)
            except IsolationError:  # it died meanwhile
                return

    def facts(self, *, with_groups: bool) -> list[tuple[str, bool]]:
        """(what was found, whether that is as it should be), each looked up now. Seeing nothing proves nothing."""
        alive = [pid for pid, started in self._processes if start_time(pid) == started]
        ours = descendants(os.getpid())
        standing = [str(group) for group in self._groups if group.exists()]
        grown = resident() - self._resident
        left = available()
        seen = bool(self._groups) or not with_groups
        host = f"host process {os.getpid()} alive, its resident memory grew by {grown / MEGABYTE:.1f} MB"
        processes = f"processes: {len(self._processes)} seen, {len(alive)} left; the host has {len(ours)} children"
        return [
            (host, grown < ALLOWED_GROWTH),
            (f"the machine has {left // MEGABYTE} MB available", left > self._available / 2),
            (processes, bool(self._processes) and not alive and not ours),
            (
                f"cgroups: {len(self._groups)} seen, {len(standing)} left {' '.join(standing)}".rstrip(),
                not standing and seen,
            ),
        ]


def start_time(pid: int) -> str | None:
    """Start of a living process in clock ticks; None for one that is gone, or dead and only waiting to be reaped."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def descendants(ancestor: int) -> list[int]:
    """Every process below that one, zombies too: those would be left behind as well."""
    parents = {pid: int(fields[1]) for pid in _all_pids() if (fields := _stat(pid))}
    found: set[int] = set()
    level = {ancestor}
    while level := {pid for pid, parent in parents.items() if parent in level} - found:
        found |= level
    return sorted(found)


def cgroups(pid: str) -> set[Path]:
    """The folders of the process's cgroups, as far as they can be seen from here."""
    try:
        lines = Path("/proc", pid, "cgroup").read_text().splitlines()
    except OSError:  # gone meanwhile
        return set()
    folders = set()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in (f"/sys/fs/cgroup/{controllers}", "/sys/fs/cgroup/unified" if not controllers else ""):
            folders.add(Path(mount + path))
    return {folder for folder in folders if folder.is_relative_to("/sys/fs/cgroup") and folder.is_dir()}


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available() -> int:
    """MemAvailable of the machine in bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
