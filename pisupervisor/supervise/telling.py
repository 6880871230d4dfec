"""What an isolator tells its application, and what the application's ``handled`` changes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.options import IsolationOptions
from pisupervisor.results import ExitReason
from pisupervisor.supervise.watch import reached

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.events import Event
    from pisupervisor.supervise.child import Child
    from pisupervisor.supervise.dispatch import Dispatcher

Settle = Callable[[str, int, bool], None]


class Teller:
    """``settle(kind, crash, handled)`` is called after the handler of an event about a crash, and at once where there is none."""

    def __init__(self, options: IsolationOptions, isolator_id: int, settle: Settle) -> None:
        self._options, self._id, self._settle = options, isolator_id, settle
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._spent: int | None = None  # the pid of whose CPU time was told
        if options.events is not None and options.events.wanted():
            from pisupervisor.supervise.dispatch import Dispatcher

            self._dispatcher = Dispatcher(options.events, isolator_id, self._settle_event)

    def tell(self, kind: str, pid: int | None, **more: Any) -> None:
        """``kind`` is the name of a class in ``pisupervisor.events``. Never waits."""
        if self._dispatcher is None:
            if kind == "ExitedWithError":
                self._settle("exit_with_error", int(more["crash"]), False)
            return
        from pisupervisor import events

        self._dispatcher.emit(getattr(events, kind)(isolator_id=self._id, pid=pid, **more))

    def _settle_event(self, event: Event) -> None:
        self._settle(event.kind, event.crash, event.handled)

    def is_telling(self) -> bool:
        """Whether it is a handler that asks."""
        return self._dispatcher is not None and self._dispatcher.is_own_thread()

    def wants(self, kind: str) -> bool:
        return self._dispatcher is not None and kind in self._dispatcher.wanted

    def started(self, child: Child) -> None:
        if self._dispatcher is not None and child.pipes is not None:
            self._dispatcher.attach(child.pipes, child.pid)
        self.tell("Started", child.pid)

    def limits(self, child: Child, events: GroupEvents) -> None:
        """An event for every limit that was reached since the last look."""
        if self.wants("limit"):
            with self._lock:
                rows, child.meter.told = reached(child.meter.told, events), events
            for limit, count, detail in rows:
                self.tell("LimitReached", child.pid, limit=limit, count=count, detail=detail)

    def output_limit(self, child: Child) -> None:
        if self.wants("limit"):
            kept = f"{self._options.limits.output} bytes of a stream were kept"
            self.tell("LimitReached", child.pid, limit="output", count=1, detail=kept)

    def cpu_limit(self, child: Child, used: float | None) -> None:
        """Once, whoever saw it: the kernel ends one process that has used it up, the watch counts all of them."""
        with self._lock:
            first, self._spent = self._spent != child.pid, child.pid
        if first:
            detail = "all of it was used" if used is None else f"{used:.2f} s used"
            self.tell("LimitReached", child.pid, limit="cpu_time", count=1, detail=detail)

    def ended(self, child: Child, crash: int = 0, *, truncated: bool = False) -> None:
        """What it wrote last, the limits it reached last, its end."""
        if self._dispatcher is not None and child.pipes is not None:
            self._dispatcher.detach(child.pipes, child.last_lines)
        self.limits(child, child.last_events)
        if truncated:
            self.output_limit(child)
        if child.exit_info is not None and child.exit_info.reason is ExitReason.CPU_TIME:
            self.cpu_limit(child, child.exit_info.cpu_time)
        self.tell("Exited", child.pid, exit_info=child.exit_info)
        if crash:
            self.tell("ExitedWithError", child.pid, exit_info=child.exit_info, crash=crash)

    def close(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.close()
