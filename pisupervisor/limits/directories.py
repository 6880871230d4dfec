"""Our directories in a cgroup hierarchy: their names, making them, removing them, sweeping up after dead owners.

A group is ``<base>/pisupervisor/<owner pid>-<owner start time>-<its pid namespace>-<n>``, where base is the host
application's own group.
The parent exists only while there are groups in it, and other processes make and remove it as well.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY, ENODEV, ENOENT
from functools import lru_cache

PARENT = "pisupervisor"

_MAX_LOST_RACES = 64  # each needs another process to remove the parent in the same microseconds
_AT_ONCE = 1 << 16
_SURELY_ALL = 2048  # less than this is the whole file: no line of such a file is as long as the other half of a page
_OLD = 60.0  # seconds; a group is empty while a child is launched or ends, or for as long as it is kept for another
_RETRY_DELAY = 0.0005  # an exiting task keeps its group busy for a fraction of a millisecond


def group_name(counter: int) -> str:
    """``"<own pid>-<own start time>-<own pid namespace>-<counter>"``: unique, and tells whether its owner still lives."""
    return f"{_owner(os.getpid())}-{counter}"


@lru_cache(maxsize=1)  # by pid: a fork of the application is another owner
def _owner(pid: int) -> str:
    return f"{pid}-{start_time(pid)}-{pid_namespace()}"


def is_childs() -> bool:
    """Whether this process lives in the child of an isolator: there our code lies in a folder of its own (launch/root.OURS)."""
    return os.path.isdir("/pis/pihost")


def pid_namespace() -> int:
    """The number of ours, in which our pid means something."""
    return os.stat("/proc/self/ns/pid").st_ino


def start_time(pid: int) -> int | None:
    """Start of the process in clock ticks since boot; None when there is no such process."""
    try:
        return int(stat_fields(f"/proc/{pid}")[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def stat_fields(place: str) -> list[bytes]:
    """Those of ``stat`` of a process or thread, from its state on: the name before may contain anything. Raises OSError."""
    return read(f"{place}/stat").rpartition(b")")[2].split()


def read(path: str) -> bytes:
    """A whole kernel file; long ones (cgroup.procs) come a page at a time. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = chunk = os.read(fd, _AT_ONCE)
        while len(chunk) >= _SURELY_ALL:
            chunk = os.read(fd, _AT_ONCE)
            text += chunk
        return text
    finally:
        os.close(fd)


def text(path: str) -> str:
    """A whole file in which names stand that others have chosen, as ``os`` has them: of any bytes, so no more is sure of its
    lines than that they part at ``\\n``. Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.read())


def write(path: str, *values: bytes) -> None:
    """One write(2) per value, as kernel files want it: a buffered file object may lose the error. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for value in values:
            os.write(fd, value)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def place(base: str, name: str) -> str:
    """Where the group ``name`` below ``base`` is."""
    return f"{base}/{PARENT}/{name}"


def make(base: str, name: str, inherited: tuple[str, ...] = ()) -> str:
    """Make the group ``name`` below ``base`` and return its path. Raises OSError.

    ``inherited`` names files (of cpuset) that start empty, and without which a group takes no process.
    """
    path = place(base, name)
    _mkdir_below_parent(base, path)
    try:
        for target in (f"{base}/{PARENT}", path):  # only now is the parent sure to stay
            for file in inherited:
                _inherit(base, target, file)
    except OSError:
        remove(path)
        raise
    return path


def _mkdir_below_parent(base: str, path: str) -> None:
    lost_races = 0
    while True:
        try:
            os.mkdir(path)
            return
        except OSError as error:
            # The parent is not there yet, or its last user has just removed it.
            if error.errno not in (ENOENT, ENODEV) or lost_races >= _MAX_LOST_RACES:
                raise
        lost_races += 1
        _make_parent(base)


def _make_parent(base: str) -> None:
    try:
        os.mkdir(f"{base}/{PARENT}")
    except FileExistsError:
        pass


def _inherit(source: str, target: str, file: str) -> None:
    if not read(f"{target}/{file}").strip():
        write(f"{target}/{file}", read(f"{source}/{file}"))


def remove(path: str, patience: float = 0.0) -> bool:
    """Remove one group, and the parent with the last one. True when it is gone (also when it was gone already).

    Waits up to ``patience`` seconds for tasks that are just exiting.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            os.rmdir(path)
            break
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != EBUSY or time.monotonic() >= deadline:
                return False
        time.sleep(_RETRY_DELAY)
    _remove_parent(os.path.dirname(path))
    return True


def _remove_parent(parent: str) -> None:
    try:
        # A parent that root has delegated to a user (chown) is that user's permission: root leaves it in place.
        if os.stat(parent).st_uid == os.geteuid():
            os.rmdir(parent)
    except OSError:
        pass  # not empty: others use it; or delegated: not ours to remove


def sweep(base: str) -> set[str]:
    """Remove the empty groups below ``base`` whose owner is dead; return their names.

    A group that still has tasks stays (rmdir refuses it), and so does anything whose name is not of our form. Of the
    owner in another pid namespace nothing is known: such a group goes when it has been there for a minute.
    """
    try:
        names = os.listdir(f"{base}/{PARENT}")
        if os.readlink("/proc/self") != str(os.getpid()):
            return set()  # a /proc of others, which does not show who lives here
    except OSError:
        return set()  # no groups; or a masked /proc
    return {name for name in names if _is_orphan(base, name) and remove(place(base, name))}


def _is_orphan(base: str, name: str) -> bool:
    parts = name.split("-")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() for part in parts):
        return False
    pid, started, namespace, _number = map(int, parts)
    if namespace == pid_namespace():
        return start_time(pid) != started  # a reused pid has another start time
    try:
        return time.time() - os.stat(place(base, name)).st_ctime > _OLD
    except OSError:
        return False  # gone meanwhile
