"""What many tests share: is anything left behind, processes as seen from outside, and sources on disk."""

from __future__ import annotations

import gc
import os
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from pihost import syscalls
from pisupervisor import IsolationOptions, ProcessIsolator
from pisupervisor.limits.detect import detect
from pisupervisor.limits.directories import PARENT

linux = pytest.mark.linux
#: what this kernel lacks of the defaults, for tests of something else (Landlock: 5.13)
DEGRADE = () if syscalls.landlock_abi() else ("landlock",)


class Leftovers(NamedTuple):
    """Everything that a launch could leave behind in this process or on this machine."""

    descendants: frozenset[int]
    fds: frozenset[tuple[int, str]]
    threads: frozenset[str]
    groups: frozenset[str]
    mounts: frozenset[str]


def leftovers() -> Leftovers:
    gc.collect()
    return Leftovers(
        frozenset(descendants(os.getpid())), frozenset(open_fds().items()),
        frozenset(os.listdir("/proc/self/task")), frozenset(own_groups()),
        frozenset(Path("/proc/self/mountinfo").read_text().splitlines()),
    )  # fmt: skip


def spare_is_there() -> bool:
    """The zygote, and the two of a spare child, which it makes when it has time."""
    return len(descendants(os.getpid())) == 3


@contextmanager
def nothing_left() -> Iterator[None]:
    """Nothing is there after the block that was not there before it. The kernel may take a moment to forget a thread."""
    before = leftovers()
    yield
    wait_until(lambda: not new_since(before), 1.0)
    left = new_since(before)
    assert not left, f"left behind: {left}"


def new_since(before: Leftovers) -> dict[str, set[object]]:
    pairs = zip(Leftovers._fields, before, leftovers(), strict=True)
    return {name: set(is_now - was) for name, was, is_now in pairs if is_now - was}


def open_fds() -> dict[int, str]:
    """Number -> what it is, of this process, without the one that reading this takes."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def own_groups(pid: int | None = None) -> list[str]:
    """Every cgroup that this process (or another) made and that is still there."""
    found: list[str] = []
    for base in detect().directories():
        try:
            names = os.listdir(f"{base}/{PARENT}")
        except FileNotFoundError:
            continue  # it comes and goes with the groups of all processes
        found += [f"{base}/{PARENT}/{name}" for name in names if name.startswith(f"{pid or os.getpid()}-")]
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on; zombies too."""
    parents = {int(name): parent for name in os.listdir("/proc") if name.isdigit() and (parent := parent_of(name))}
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def living(pid: int) -> list[int]:
    """Those of its descendants that are no zombies: who is dead may wait for a zygote that the machine has no time for."""
    return [one for one in descendants(pid) if state_of(one) not in ("", "Z")]


def parent_of(pid: int | str) -> int:
    """0 when there is no such process."""
    return int((stat_of(pid) or ["", "0"])[1])


def state_of(pid: int) -> str:
    """R, S, T, Z ... of /proc/PID/stat; empty when there is no such process."""
    return (stat_of(pid) or [""])[0]


def stat_of(pid: int | str) -> list[str]:
    """What follows the name, which may be of any bytes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status by field."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def init_of(isolator: ProcessIsolator) -> int:
    """PID 1 of the sandbox, as the host numbers it."""
    assert isolator.pid is not None
    return parent_of(isolator.pid)


def zygote_of(isolator: ProcessIsolator) -> int:
    return isolator._keeper.template.zygote.pid


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether the condition came true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def sleeps(isolator: ProcessIsolator) -> bool:
    """Whether the child is in a call of time.sleep. "busy" comes earlier: a child killed before it has the call is replaced."""
    return "nanosleep" in Path(f"/proc/{isolator.pid}/wchan").read_text()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start_without(*steps: str, **changes: object) -> ProcessIsolator:
    """An isolator whose launch left out these steps (names of pihost.confine, "pid namespace" and so on, "limits")."""
    isolator = ProcessIsolator(IsolationOptions(**changes), without=steps)  # type: ignore[arg-type]
    try:
        isolator._start()
    except BaseException:
        isolator.close()
        raise
    return isolator


def write(folder: Path, name: str, source: str) -> Path:
    """A file of Python source, indented as suits the test."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


def in_thread(work: Callable[[], object]) -> None:
    """Do something in a thread that has ended when this returns."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_fork(work: Callable[[], object]) -> str:
    """What a fork of this process gets from ``work``: its result, or the error's class, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(work())
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def take_descriptors(isolator: ProcessIsolator) -> None:
    """Have the host take what descriptors a child sends, as on a kernel on which it cannot refuse them."""
    connection = isolator._keeper.connection
    assert connection is not None
    with suppress(OSError):
        connection.link.setsockopt(socket.SOL_SOCKET, 83, 1)  # SO_PASSRIGHTS
