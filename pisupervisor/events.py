"""What an application can be told of: one handler for each kind of event, each called with one object.

Handlers may be functions or coroutine functions. They run one after another in a thread of their own (coroutines in the
event loop that ran where the isolator was created, if there was one), never in the way of a call. A handler that raises
is logged, and harms nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pisupervisor import records
from pisupervisor.errors import IsolationError, OptionsError
from pisupervisor.results import ExitInfo, SystemCall


@dataclass(kw_only=True)
class Event:
    """``isolator_id`` says whose, ``pid`` which child's. A handler may set ``handled``: where that means something,
    the event's own words say what.
    """

    kind: ClassVar[str]
    isolator_id: int
    pid: int | None
    handled: bool = False
    crash: int = field(default=0, repr=False)  # which of the isolator's crashes it is about; 0: none


@dataclass(kw_only=True)
class Started(Event):
    """A child is there, and every wall is up."""

    kind: ClassVar[str] = "started"


@dataclass(kw_only=True)
class StartFailed(Event):
    """A launch failed; whoever waited for it gets ``error`` too. Handled: it does not count against max_restarts."""

    kind: ClassVar[str] = "start_failed"
    error: IsolationError


@dataclass(kw_only=True)
class OutputLine(Event):
    """One line that the child wrote to stdout outside of a captured call, without its end; what is longer than 64 KiB
    comes in pieces.
    """

    kind: ClassVar[str] = "stdout"
    line: str


@dataclass(kw_only=True)
class ErrorLine(OutputLine):
    """The same of stderr."""

    kind: ClassVar[str] = "stderr"


@dataclass(kw_only=True)
class Restarted(Event):
    """Another child has taken the place of ``old_pid``."""

    kind: ClassVar[str] = "restart"
    old_pid: int | None


@dataclass(kw_only=True)
class RestartAttempt(Event):
    """After a crash another child will be launched in ``delay`` seconds."""

    kind: ClassVar[str] = "restart_attempt"
    attempt: int
    max_restarts: int
    delay: float
    exit_info: ExitInfo | None


@dataclass(kw_only=True)
class RestartAttemptsExceeded(Event):
    """Too many crashes; calls now raise RestartLimitReached. Handled: the count starts anew, and the next call launches."""

    kind: ClassVar[str] = "restart_attempts_exceeded"
    attempts: int
    exit_info: ExitInfo | None


@dataclass(kw_only=True)
class ExitedWithError(Event):
    """A child crashed. Handled: it does not count against max_restarts, and ``die_on_crash`` spares the application."""

    kind: ClassVar[str] = "exit_with_error"
    exit_info: ExitInfo


@dataclass(kw_only=True)
class Exited(Event):
    """A child has ended, however that came; ``exit_info.message`` has the reason that was given to ``exit``."""

    kind: ClassVar[str] = "exited"
    exit_info: ExitInfo


@dataclass(kw_only=True)
class LimitReached(Event):
    """A limit was reached ``count`` times since the last such event: "memory", "memory_high" (cgroup v2),
    "pids", "cpus", "output" or "cpu_time".
    """

    kind: ClassVar[str] = "limit"
    limit: str
    count: int
    detail: str = ""


@dataclass(kw_only=True)
class SystemCallSeen(Event):
    """A system call that a seccomp listener saw for the first time with these arguments (see ``Security.watch``)."""

    kind: ClassVar[str] = "syscall"
    call: SystemCall


Handler = Callable[[Any], Awaitable[object] | object]


@records.dataclass(frozen=True, kw_only=True)
class IsolationEvents:
    """Handlers by the kind of event; None: nobody wants to know, and nothing is done for it."""

    started: Handler | None = None
    start_failed: Handler | None = None
    stdout: Handler | None = None
    stderr: Handler | None = None
    restart: Handler | None = None
    restart_attempt: Handler | None = None
    restart_attempts_exceeded: Handler | None = None
    exit_with_error: Handler | None = None
    exited: Handler | None = None
    limit: Handler | None = None
    syscall: Handler | None = None

    def __post_init__(self) -> None:
        for entry in records.fields(self):
            handler = getattr(self, entry.name)
            if handler is not None and not callable(handler):
                raise OptionsError(f"events.{entry.name}: expected a function of one event, not {handler!r}")

    def wanted(self) -> frozenset[str]:
        """The kinds that have a handler."""
        return frozenset(entry.name for entry in records.fields(self) if getattr(self, entry.name) is not None)
