"""What stands in for limits that no group holds: some ten looks a second at all processes of a child, from the watch.

Memory and swap of all of them together beyond ``Limits.memory``, or more of them than ``Limits.pids``: the child is
killed. More CPU time than ``Limits.cpus`` allows: all are stopped (SIGSTOP), and continued when it is made good; PID 1,
which holds the lifeline, is not. A limit that is looked at is none that the kernel holds: between two looks all can
be had. So ``applied`` says that it does not hold, and what stands in.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from pisupervisor.errors import FeatureUnavailable, IsolationError
from pisupervisor.launch import requirements, root, userns
from pisupervisor.limits import census
from pisupervisor.options import IsolationOptions, Limits
from pisupervisor.records import NamedTuple
from pisupervisor.results import ExitReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.limits.cgroups import CgroupHost
    from pisupervisor.supervise.child import Child
    from pisupervisor.supervise.keeper import Keeper

EVERY = 0.1  # seconds between two looks
_AT_MOST = 0.05  # share of a CPU that looking may cost: a child of many processes is looked at less often
_SELDOM = 0.5
_DEAR = 3  # and never more than a quarter of one
_LONGEST_STOP = 10.0
_RESTLESS = 3  # looks, after which a child that never stands still is stopped to be counted
_UNDONE = 2  # looks, after which a child that continues itself is ended
_WATCHED = ("memory", "cpus", "pids")


class Verdict(NamedTuple):
    """The limit that was passed, the reason of the end that follows, and in words."""

    limit: str
    reason: ExitReason
    detail: str


def watched(options: IsolationOptions, host: CgroupHost) -> tuple[str, ...]:
    """The limits that were asked for, that no group can hold here, and that can be watched instead. Pure."""
    if not set(options.degrade) & set(_WATCHED):
        return ()
    lacking = requirements.lacking_limits(options, host)
    return tuple(name for name in _WATCHED if name in lacking and getattr(options.limits, name) is not None)


def check_sight(options: IsolationOptions, root: bool, subordinate: bool) -> None:
    """Raises FeatureUnavailable where a watch could not see all memory of a child: nobody shall rely on it then."""
    blind = "a memory limit that is only watched, and "
    a_group = "give the application a group of its own (pisupervisor doctor)"
    if subordinate:
        why = "subordinate ids: what memory files a process with another id has open, this user may not see"
        raise FeatureUnavailable(blind + why, feature="user", remedy=f"leave subordinate_ids out, or {a_group}")
    if root and not userns.has_capability(userns.SYS_PTRACE) and not userns.situation().lacks:  # those are told first
        raise FeatureUnavailable(
            f"{blind}a root without CAP_SYS_PTRACE: what memory files a process with another id has open, it may not see",
            feature="memory",
            remedy="in a container: docker or podman run --cap-add SYS_PTRACE, or run the application as an ordinary user in"
            f" it; or set Limits(memory=None), or {a_group}",
        )
    if options.security.nesting:
        why = "nesting: what lies in file systems that the child mounts, nobody counts"
        raise FeatureUnavailable(blind + why, feature="memory", remedy=f"set Limits(memory=None), or {a_group}")


def words(limits: Limits, missing: Collection[str], kernel_counts: Collection[str]) -> dict[str, str]:
    """``Applied.how`` of each limit for which something stands in. ``kernel_counts``: those that an rlimit holds, too."""
    found = {}
    looks = f"looked at every {EVERY:g} s ({_SELDOM:g} s or more where there are many processes)"
    if "memory" in missing and limits.memory is not None:
        found["memory"] = (
            f"watched: memory and swap of all processes together, {looks}; the child is killed when over. RLIMIT_DATA"
            " holds each process by itself. Not counted: page cache, pipes, sockets, System V segments that nobody has attached"
        )
    if "swap" in missing and limits.swap is not None and "memory" in found:
        found["swap"] = "watched: swapped pages count as memory"
    if "cpus" in missing and limits.cpus is not None:
        found["cpus"] = (
            f"watched: CPU time of all processes, {looks}; they are stopped and continued (SIGSTOP, SIGCONT) to keep the"
            " average. Processes that live shorter than that may escape it"
        )
    if "pids" in missing and limits.pids is not None:
        kernel = "RLIMIT_NPROC, held by the kernel; and " if "pids" in kernel_counts else ""
        found["pids"] = f"{kernel}watched: processes and threads, {looks}; the child is killed when over"
    return found


def judge(limits: Limits, names: Collection[str], memory: int, threads: int) -> Verdict | None:
    """Whether a child with so many bytes and threads has to end. Pure."""
    if "memory" in names and memory > int(limits.memory or 0):
        text = f"its processes held {memory} bytes of memory and swap together, {limits.memory} are allowed"
        return Verdict("memory", ExitReason.MEMORY, f"{text} (watched every {EVERY:g} s: there is no group)")
    if "pids" in names and threads > (limits.pids or 0):
        text = f"it had {threads} processes and threads, {limits.pids} are allowed"
        return Verdict("pids", ExitReason.PIDS, f"{text} (watched every {EVERY:g} s: there is no group)")
    return None


def seconds_to_next_look(took: float) -> float:
    """After one that took so long. Pure."""
    return max(_DEAR * took, min(_SELDOM, max(EVERY, took / _AT_MOST)))


class Budget:
    """CPU time that may be used: what is saved up is at most that of one look, what is owed is waited for. Pure."""

    def __init__(self, cpus: float) -> None:
        self._cpus, self._owed = cpus, 0.0

    def spend(self, used: float, passed: float) -> float:
        """Seconds for which everything has to stand still now, 0.0 for none."""
        self._owed = max(-self._cpus * EVERY, self._owed + used - self._cpus * passed)
        return min(_LONGEST_STOP, max(0.0, self._owed) / self._cpus)


class StandIn:
    """For one child, as long as it lives. Used by the watch's thread alone."""

    def __init__(self, child: Child, names: Collection[str]) -> None:
        limits = child.options.limits
        self._child, self._limits, self._names = child, limits, names
        self._scratch = (*root.SCRATCH, *child.options.filesystem.overlay)
        self._budget = Budget(limits.cpus) if "cpus" in names and limits.cpus is not None else None
        self._before: dict[int, census.Held] = {}
        self._then = child.started
        self._restless = 0  # looks, one after the other, in which processes ended before they were counted
        self._until = 0.0  # when what is stopped may run on; 0.0: nothing is
        self._undone = 0  # looks that found what is stopped running

    def look(self, keeper: Keeper) -> float:
        """Do what is due. Seconds until the next look."""
        begun = time.monotonic()
        if self._until > begun:
            return self._hold(keeper, begun)
        if self._until:
            self._until, self._undone = 0.0, 0
            self._child.let_go()
        try:
            found = census.take(self._child.meter.pids(), self._scratch if "memory" in self._names else None)
            memory = self._memory(found)
        # The last two: of what it has /proc say.
        except (PermissionError, IsolationError, ValueError, LookupError) as error:
            why = f"it cannot be seen that it holds no more than {self._limits.memory} bytes: {error}"
            self._end(keeper, Verdict("memory", ExitReason.MEMORY, why))
            return EVERY
        verdict = judge(self._limits, self._names, memory, found.threads)
        if verdict is not None:
            self._end(keeper, verdict)
        elif self._budget is not None:
            self._hold_back(keeper, found, begun)
        self._before = dict(found.processes)
        wait = seconds_to_next_look(time.monotonic() - begun)
        return max(0.0, min(wait, self._until - time.monotonic())) if self._until else wait

    def _memory(self, found: census.Census) -> int:
        """Exact only where it matters. Who hands memory on by forking and ends is counted standing still."""
        most = int(self._limits.memory or 0)
        if "memory" not in self._names:
            return 0
        self._restless = self._restless + 1 if self._is_restless(found) else 0
        memory, unsure = 0, 0
        if found.at_most > most:
            memory, unsure = census.exactly(found, self._scratch, census.host_memory())
        if memory > most or (memory + unsure <= most and self._restless < _RESTLESS):
            return memory
        return self._memory_of_the_stopped()

    def _is_restless(self, found: census.Census) -> bool:
        """Whether some may have slipped through: who ended while we looked, or whose orphans PID 1 has reaped since."""
        init = self._child.init_pid
        now, before = found.processes.get(init), self._before.get(init)
        return found.missed > 0 or (now is not None and before is not None and now.reaped != before.reaped)

    def _memory_of_the_stopped(self) -> int:
        """Raises IsolationError where they fork faster than they can be stopped: no honest program does."""
        self._restless = 0
        self._child.hold_back()
        try:
            found = census.take(self._child.meter.pids(), self._scratch)
            return sum(census.exactly(found, self._scratch, census.host_memory()))
        finally:
            self._child.let_go()

    def _hold_back(self, keeper: Keeper, found: census.Census, now: float) -> None:
        assert self._budget is not None
        passed, self._then = now - self._then, now
        stop = self._budget.spend(found.used_since(self._before), passed)
        if stop <= 0.001 or keeper.state == "paused":
            return
        try:
            self._child.hold_back()
            self._until = now + stop
        except IsolationError as error:
            text = f"it used more than {self._limits.cpus:g} cores, and could not be held back: {error}"
            self._end(keeper, Verdict("cpus", ExitReason.CPU_TIME, text))

    def _hold(self, keeper: Keeper, now: float) -> float:
        """Nobody in there can continue it but by what was set before, such as a timer whose signal is SIGCONT: stopped once
        more, for who is just being killed runs too; then ended.
        """
        try:
            self._undone += self._child.hold_back()
        except IsolationError:
            self._undone = _UNDONE
        if self._undone >= _UNDONE:
            text = f"it used more than {self._limits.cpus:g} cores, and continued itself whenever it was stopped"
            self._end(keeper, Verdict("cpus", ExitReason.CPU_TIME, text))
        return min(EVERY, self._until - now)

    def _end(self, keeper: Keeper, verdict: Verdict) -> None:
        keeper.teller.tell("LimitReached", self._child.pid, limit=verdict.limit, count=1, detail=verdict.detail)
        self._child.kill(verdict.reason, verdict.detail)
