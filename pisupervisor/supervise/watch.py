"""The one helper thread of an isolator whose options ask for what nobody waits on: ends while idle, idle and CPU time
limits, limit events, what stands in for limits that ``degrade`` lets go, and the last net of an isolator whose filter is
listened to. An isolator that asks for none of it has no thread.
"""

from __future__ import annotations

import os
import select
import threading
import time

from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.link.bells import PollBell
from pisupervisor.options import IsolationOptions
from pisupervisor.results import ExitReason
from pisupervisor.supervise import replacing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.supervise.child import Child
    from pisupervisor.supervise.keeper import Keeper
    from pisupervisor.supervise.stand_in import StandIn

_LIMITS_EVERY = 0.25  # seconds between two looks at the counters: their events arrive within a second
_CPU_AT_LEAST = 0.01
_AGAIN = 1.0  # seconds after a look that failed


def is_needed(options: IsolationOptions) -> bool:
    """Whether anything in the options can only be done by somebody who waits for it. Pure."""
    return bool(
        options.idle_timeout is not None
        or options.limits.cpu_time is not None
        or options.die_on_crash
        or options.restart.mode == "always"
        or (options.events is not None and options.events.wanted())
    )


def next_cpu_look(budget: float, used: float, cpus: float | None) -> float:
    """Seconds until the budget can be used up at the earliest, given so many cores. Pure."""
    return max(_CPU_AT_LEAST, (budget - used) / (cpus or os.cpu_count() or 1))


def reached(before: GroupEvents, now: GroupEvents) -> list[tuple[str, int, str]]:
    """(limit, how often, in words) for every counter that grew. Pure."""
    throttled = now.throttled_time - before.throttled_time
    rows = [
        ("memory", now.oom_kills - before.oom_kills, "the kernel killed a process at the memory limit"),
        ("memory_high", now.memory_high - before.memory_high, "slowed down, and made to give memory back"),
        ("pids", now.pids_max - before.pids_max, "a process or thread was refused"),
        ("cpus", now.throttled - before.throttled, f"held back for {max(0.0, throttled):.2f} s"),
    ]
    return [row for row in rows if row[1] > 0]


class Watch:
    """Looks after one keeper's child until ``close``."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._wake = PollBell()
        self._stand_in: tuple[Child, StandIn] | None = None
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"pisupervisor-watch-{keeper.id}", daemon=True)
        self._wake.start(self._thread)

    def wake(self) -> None:
        """There is another child, or none any more."""
        self._wake.ring()

    def abandon(self) -> None:
        """Have the keeper closed from here: the isolator was forgotten, and collected in a thread that may hold any lock."""
        self._abandoned = True
        self._wake.ring()

    def close(self) -> None:
        self._closing = True
        self._wake.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- in the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._abandoned:
                    self._keeper.close()
                    break
                self._round()
        finally:
            self._wake.close()

    def _round(self) -> None:
        child = self._keeper.child
        try:
            wait = replacing.revive(self._keeper) if child is None else self._look(child)
        except OSError:  # most often for want of descriptors, which may pass
            wait = _AGAIN
        except Exception as error:  # a defect: better no child than one whose limits nobody holds any more
            if child is not None:
                self._keeper.enter("stop")  # no other follows by itself, to end likewise
                child.kill(ExitReason.KILLED, f"it could not be watched: {type(error).__name__}: {error}")
            wait = _AGAIN
        if not self._closing:
            self._sleep(child, wait)

    def _look(self, child: Child) -> float | None:
        """Do what is due; seconds until something may be due again, None for not before something happens."""
        if child.ended:
            self._keeper.bury(child)
            return 0.0
        waits = (self._limits(child), self._cpu_time(child), self._idle(child), self._stand_in_for_groups(child))
        return min((wait for wait in waits if wait is not None), default=None)

    def _sleep(self, child: Child | None, wait: float | None) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if child is not None and child.init_pidfd >= 0:
            poll.register(child.init_pidfd, select.POLLIN)
        for fd, event in poll.poll(None if wait is None else wait * 1000):
            if fd == self._wake.fileno():
                self._wake.clear()
            elif event & select.POLLNVAL:
                time.sleep(0.001)  # another thread has just taken the account of this child

    def _limits(self, child: Child) -> float | None:
        if not self._keeper.teller.wants("limit"):
            return None
        self._keeper.teller.limits(child, child.meter.events())
        return _LIMITS_EVERY

    def _stand_in_for_groups(self, child: Child) -> float | None:
        if not self._keeper.watched:
            return None
        if self._stand_in is None or self._stand_in[0] is not child:
            from pisupervisor.supervise.stand_in import StandIn

            self._stand_in = child, StandIn(child, self._keeper.watched)
        return self._stand_in[1].look(self._keeper)

    def _cpu_time(self, child: Child) -> float | None:
        limits = self._keeper.options.limits
        if limits.cpu_time is None:
            return None
        used = child.meter.cpu_time()
        if used < limits.cpu_time:
            return next_cpu_look(limits.cpu_time, used, None if "cpus" in self._keeper.watched else limits.cpus)
        self._keeper.teller.cpu_limit(child, used)
        child.kill(ExitReason.CPU_TIME, f"{used:.2f} s of CPU time used, {limits.cpu_time:g} s allowed")
        return None

    def _idle(self, child: Child) -> float | None:
        limit = self._keeper.options.idle_timeout
        if limit is None:
            return None
        left = self._keeper.idle_since + limit - time.monotonic()
        if left > 0:
            return left
        if self._keeper.state == "paused":
            return limit  # who paused it wants it back
        return None if _retire(self._keeper, child, f"idle for {limit:g} s") else limit


def _retire(keeper: Keeper, child: Child, why: str) -> bool:
    """End a child that nobody uses; False when a call is under way. The next call starts another."""
    if not keeper.turn.take(0):
        return False
    try:
        connection = keeper.connection
        if connection is not None and connection.is_wanted():
            return False  # of a map or stream whose next item nobody has asked for yet
        if keeper.child is child and not child.ended:
            keeper.enter("stop")
            keeper.end(child, ExitReason.KILLED, why)
    finally:
        keeper.turn.give()
    return True
