"""Pausing a child: ``cgroup.freeze`` of its own v2 group, or of one made for it (on hybrid hosts), SIGSTOP elsewhere.

A process frozen by the v1 freezer ignores SIGKILL until it is thawed; one frozen by v2 dies of it, and one that is
stopped does too. So the v1 freezer is no choice: a paused child must end with its host.
"""

from __future__ import annotations

import _signal as signal  # signal imports enum for names that nobody needs here
import os
import time
from collections.abc import Callable

from pisupervisor.errors import IsolationError
from pisupervisor.limits import directories, signals
from pisupervisor.limits.detect import CgroupHost
from pisupervisor.records import Protocol

_PATIENCE = 2.0  # seconds for everything to stop, also what forks meanwhile; measured: under 1 ms
_POLL = 0.0005


class Freezer(Protocol):
    def pause(self) -> bool:
        """Stop every process; whether any had to be stopped. Raises IsolationError."""

    def resume(self) -> None:
        """Let them run on."""

    def kill(self) -> None:
        """SIGKILL to every process at once, where the kernel has that (cgroup.kill: Linux 5.14)."""

    def remove(self) -> None:
        """They are dead: give back what was made."""


def make_freezer(host: CgroupHost, name: str, pids: Callable[[], list[int]]) -> Freezer:
    """``pids`` tells all that is to stop. PID 1 of the sandbox is not among them: it holds the lifeline, and reaps."""
    if host.unified is not None:
        try:
            return V2Freezer(directories.make(host.unified, name), pids)
        except OSError:
            pass  # not ours to use: SIGSTOP needs no rights but those over our own children
    return SignalFreezer(pids)


class GroupFreezer:
    """The v2 group in which everything that is to stop lives already."""

    def __init__(self, path: str) -> None:
        self._path = path

    def pause(self) -> bool:
        try:
            # first, so that what is moved cannot run on and fork
            directories.write(f"{self._path}/cgroup.freeze", b"1")
            self._gather()
            self._await_frozen()
        except OSError as error:
            self.resume()
            raise IsolationError(f"cannot pause: {error.filename or self._path}: {error.strerror}") from error
        return False  # who is frozen stays so, whatever signals come

    def _gather(self) -> None:
        pass  # they are there

    def _await_frozen(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not {b"frozen 1", b"populated 0"} & set(directories.read(f"{self._path}/cgroup.events").splitlines()):
            if time.monotonic() > deadline:
                raise OSError(0, f"not everything was frozen within {_PATIENCE:g} s", self._path)
            time.sleep(_POLL)

    def resume(self) -> None:
        try:
            directories.write(f"{self._path}/cgroup.freeze", b"0")
        except OSError:
            pass  # removed with the child

    def kill(self) -> None:
        pass  # the group does that itself

    def remove(self) -> None:
        pass  # it goes with the child


class V2Freezer(GroupFreezer):
    """A v2 group made for the pause. Moving processes there takes up to 20 ms each, which a launch need not pay for.

    Where that fails they are stopped: the right to make a group is not yet that to move processes into it.
    """

    def __init__(self, path: str, pids: Callable[[], list[int]]) -> None:
        super().__init__(path)
        self._pids = pids
        self._stopped: SignalFreezer | None = None

    def pause(self) -> bool:
        try:
            return super().pause()
        except IsolationError:
            self._stopped = SignalFreezer(self._pids)
            return self._stopped.pause()

    def resume(self) -> None:
        super().resume()
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            stopped.resume()

    def _gather(self) -> None:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            inside = {int(pid) for pid in directories.read(f"{self._path}/cgroup.procs").split()}
            outside = [pid for pid in self._pids() if pid not in inside]
            if not outside:
                return
            for pid in outside:
                try:
                    directories.write(f"{self._path}/cgroup.procs", b"%d" % pid)
                except ProcessLookupError:
                    continue  # dead already
        raise OSError(0, "processes appear faster than they can be frozen", self._path)

    def kill(self) -> None:
        try:
            directories.write(f"{self._path}/cgroup.kill", b"1")
        except OSError:
            pass  # an older kernel, or removed: the end of PID 1 is the end of them all

    def remove(self) -> None:
        directories.remove(self._path, _PATIENCE)


class SignalFreezer:
    """SIGSTOP. Processes may continue each other: done is what a whole look finds done. Code in the child can undo it later,
    by a timer whose signal is SIGCONT: the next ``pause`` tells. What was stopped by others stays so: a child that is debugged.
    """

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self._ours: set[int] = set()  # stopped by us

    def pause(self) -> bool:
        until, ran = time.monotonic() + _PATIENCE, False
        while time.monotonic() < until:
            pids = self._pids()
            running = [pid for pid in pids if not _is_still(pid)]
            if not running:
                if pids == self._pids():
                    return ran
                continue
            ran = True
            self._ours.update(running)
            signals.send(running, self._pids, signal.SIGSTOP)
            time.sleep(_POLL)
        self.resume()
        raise IsolationError("cannot pause: its processes fork or continue each other faster than they can be stopped")

    def resume(self) -> None:
        signals.send([pid for pid in self._pids() if pid in self._ours], self._pids, signal.SIGCONT)
        self._ours.clear()

    def kill(self) -> None:
        pass  # the end of PID 1 is the end of them all

    def remove(self) -> None:
        pass  # nothing was made


def _is_still(pid: int) -> bool:
    """Stopped or ended: all of it, for where the first thread has ended others may run."""
    state = _state(f"/proc/{pid}")
    if state not in ("Z", "X"):
        return state in ("T", "t", "")
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True  # ended meanwhile
    return all(_state(f"/proc/{pid}/task/{task}") in ("T", "t", "Z", "X", "") for task in tasks)


def _state(place: str) -> str:
    try:
        return directories.stat_fields(place)[0].decode()
    except OSError:
        return ""
