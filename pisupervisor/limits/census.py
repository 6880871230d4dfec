"""A look at all processes of a child, by /proc: who they are, what memory they hold, what CPU time they have used.

For children without a group, whom nobody else counts. What is read is a hostile process's: every read is bounded, and what
vanishes meanwhile is not there. Not seen are buffers of pipes and sockets, descriptors on their way through a socket, and
System V segments that nobody has attached.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence

from pisupervisor.limits.directories import stat_fields
from pisupervisor.records import NamedTuple

_MOST = 4 << 20  # bytes of one smaps: some 5000 mappings, 60 ms; who has more is counted by what its sum says
_DETAILED = 0.2  # seconds of CPU time for such, in one look; those that come then are counted by their sums (2 ms)
_MOST_TIME = 1.0  # seconds for both; those that come then are counted by what is resident
_MEMORY_FILES = ("/memfd:", "/dev/zero", "/SYSV")  # shared memory, by the name of its mapping
_TICK = os.sysconf("SC_CLK_TCK")
_ENDED = (b"Z", b"X")
_HEADING = b"0123456789abcdef"  # what a mapping's first line begins with; those of its figures begin with a capital


class Held(NamedTuple):
    """What one process holds: bytes resident and swapped, threads, CPU time of its own and of those it has reaped, and the
    page faults of those (which grow whenever it reaps).
    """

    resident: int
    threads: int
    started: int
    cpu_time: float
    reaped: int = 0


class Census(NamedTuple):
    """``processes`` by pid. ``unmapped``: bytes in memory files, by inode; ``scratch``: bytes in the child's tmpfs;
    ``missed``: how many ended between being found and being looked at.
    """

    processes: Mapping[int, Held]
    unmapped: Mapping[int, int]
    scratch: int
    missed: int = 0

    @property
    def at_most(self) -> int:
        """Bytes, what is shared counted by everybody who has it."""
        return sum(held.resident for held in self.processes.values()) + sum(self.unmapped.values()) + self.scratch

    @property
    def threads(self) -> int:
        return sum(held.threads for held in self.processes.values())

    def used_since(self, before: Mapping[int, Held]) -> float:
        """Seconds of CPU time. Who is new has used all of theirs since; who is gone, what its parent got of it."""
        used = 0.0
        for pid, now in self.processes.items():
            then = before.get(pid)
            known = then is not None and then.started == now.started
            used += max(0.0, now.cpu_time - (then.cpu_time if then is not None and known else 0.0))
        return used


def take(pids: Iterable[int], scratch: Sequence[str] | None) -> Census:
    """Of these processes. ``scratch``: paths in the child where a tmpfs of its own lies; None: nobody asks for memory in
    files. Raises PermissionError.
    """
    processes, unmapped, seen, missed = {}, dict[int, int](), 0, 0
    for pid in pids:
        try:
            fields = stat_fields(f"/proc/{pid}")
            place = _place(pid, fields)
            processes[pid] = _held(place, fields)
            if scratch is None:
                continue
            unmapped.update(_memory_files(place))
            seen = seen or _scratch(place, scratch)
        except (FileNotFoundError, ProcessLookupError):
            missed += 1
        except PermissionError:  # what is dying belongs to root (its fds are looked at by nobody else)
            if _lives(pid):
                raise
    return Census(processes, unmapped, seen, missed)


def exactly(census: Census, scratch: Sequence[str], of_the_host: Iterable[int] = ()) -> tuple[int, int]:
    """The same bytes, shared ones counted once; and how many more it would be, had those held so much who have ended since.
    Costs milliseconds. ``of_the_host``: inodes of memory that is not theirs.
    """
    excused = set(of_the_host)
    unsure = 0
    total = census.scratch + sum(size for inode, size in census.unmapped.items() if inode not in excused)
    counted = excused | census.unmapped.keys()
    begun = time.thread_time()
    for pid, held in census.processes.items():
        try:
            place = _place(pid, stat_fields(f"/proc/{pid}"))
            total += _exact(place, held, counted, tuple(scratch), time.thread_time() - begun)
        except OSError:
            unsure += held.resident
    return total, unsure


def _exact(place: str, held: Held, counted: set[int], scratch: tuple[str, ...], spent: float) -> int:
    """Of one process, after so many seconds for others. Each mapping by itself only where some of them may be memory that is
    counted already, and as long as that is not too dear: a child can have thousands.
    """
    if spent > _MOST_TIME:
        return held.resident
    with open(f"{place}/smaps_rollup", "rb") as file:
        anonymous, shared = rolled_up(file.read())
    if not shared or spent > _DETAILED:
        return anonymous + shared
    with open(f"{place}/smaps", "rb") as file:
        text = file.read(_MOST)
    return anonymous + shared if len(text) == _MOST else mapped(text, counted, scratch)


def rolled_up(text: bytes) -> tuple[int, int]:
    """Bytes of anonymous memory and swap, and of shared memory and files in tmpfs, in proportion, in one process. Pure."""
    found = {line.split(b":")[0]: int(line.split()[1]) << 10 for line in text.split(b"\n")[1:] if line}
    return found[b"Pss_Anon"] + found[b"SwapPss"], found[b"Pss_Shmem"]


def mapped(smaps: bytes, counted: Iterable[int], scratch: tuple[str, ...]) -> int:
    """Bytes of anonymous and shared memory, in proportion, and of swap, in one process. Pure."""
    total, known = 0, set(counted)
    takes: tuple[bytes, ...] = ()
    for line in smaps.split(b"\n"):  # not splitlines: a child gives its files names with \r in them
        if line and line[0] in _HEADING:
            takes = _what_counts(line.split(None, 5), known, scratch)
        elif line.startswith(takes):
            total += int(line.split()[1]) << 10
    return total


_ALL, _OWN = (b"Pss:", b"SwapPss:"), (b"Anonymous:", b"SwapPss:")


def _what_counts(words: list[bytes], known: set[int], scratch: tuple[str, ...]) -> tuple[bytes, ...]:
    """Which lines below this heading count: all, what was written to a private copy, or none."""
    inode, path = int(words[4]), words[5].decode("utf-8", "replace") if len(words) > 5 else ""
    if (inode in known and path.startswith("/memfd:")) or path.startswith(tuple(f"{place}/" for place in scratch)):
        return _OWN  # counted already, but for private copies
    return _ALL if inode == 0 or path.startswith(_MEMORY_FILES) else _OWN


def descendants(pid: int) -> list[int]:
    """A process and all that stem from it. Of a sandbox's PID 1: everybody, for orphans become its children."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        found.append(parent)
        for task in tasks:
            waiting += _children(parent, task)
    return found


def _children(pid: int, task: str) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
            return [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []  # ended meanwhile


def host_memory() -> set[int]:
    """Inodes of the memory files that this process has open or mapped: a child may have them too, but they are ours."""
    with open("/proc/self/maps", "rb") as file:
        mapped_here = {int(line.split(None, 5)[4]) for line in file if b" /memfd:" in line}
    return mapped_here | set(_memory_files("/proc/self"))


def _place(pid: int, fields: list[bytes]) -> str:
    """Where /proc shows what it holds: at a living thread, where the first has ended and the process has not."""
    if fields[0] in _ENDED:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                if stat_fields(f"/proc/{pid}/task/{task}")[0] not in _ENDED:
                    return f"/proc/{pid}/task/{task}"
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
    return f"/proc/{pid}"


def _held(place: str, fields: list[bytes]) -> Held:
    """``fields`` are those of the whole process."""
    with open(f"{place}/status", "rb") as file:
        lines = dict(line.split(b":", 1) for line in file if line.startswith((b"VmRSS", b"VmSwap", b"Threads")))
    kib = sum(int(lines[name].split()[0]) for name in (b"VmRSS", b"VmSwap") if name in lines)
    return Held(
        kib << 10, int(lines[b"Threads"]), int(fields[19]), sum(map(int, fields[11:15])) / _TICK, int(fields[8])
    )


def _lives(pid: int) -> bool:
    """Whether it has memory of its own; what is dying has not."""
    try:
        with open(f"{_place(pid, stat_fields(f'/proc/{pid}'))}/status", "rb") as file:
            return any(line.startswith(b"VmRSS") for line in file)
    except OSError:
        return False


def _memory_files(place: str) -> dict[int, int]:
    """Inode -> bytes of each memfd that it has open."""
    found = {}
    for fd in os.listdir(f"{place}/fd"):
        try:
            if os.readlink(f"{place}/fd/{fd}").startswith("/memfd:"):
                status = os.stat(f"{place}/fd/{fd}")
                found[status.st_ino] = status.st_blocks * 512
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed meanwhile
    return found


def _scratch(process: str, places: Sequence[str]) -> int:
    """Bytes in its tmpfs: mounts that nobody in the child can move."""
    total = 0
    for place in places:
        status = os.statvfs(f"{process}/root{place}")
        total += (status.f_blocks - status.f_bfree) * status.f_frsize
    return total
