"""The zoo: ways to die and whom to kill, each with the exact account that is expected of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from helpers import init_of, nothing_left, zygote_of

from pisupervisor import (
    ChildTerminated,
    CpuLimitExceeded,
    ExitInfo,
    ExitReason,
    Limits,
    MemoryLimitExceeded,
    PidsLimitExceeded,
    ProcessIsolator,
    RestartPolicy,
    SyscallViolation,
)

DYING = Path(__file__).with_name("dying.py")
INSIDE = Path(__file__).parent.with_name("inside.py")
AT_ONCE = RestartPolicy(backoff=0.0)
SOON = 1.0  # seconds: what must be over by then is over in some milliseconds, unless the machine is busy


class Death(NamedTuple):
    """``how``: a function of dying.py and its arguments; the rest is what the host must say of it."""

    how: tuple[Any, ...]
    reason: ExitReason
    code: int | None = None
    signal: int | None = None
    error: type[ChildTerminated] = ChildTerminated
    options: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple's default, never written to

    def is_told_by(self, info: ExitInfo | None) -> bool:
        assert info is not None
        return (info.reason, info.exit_code, info.signal) == (self.reason, self.code, self.signal)


DEATHS = {
    "SIGKILL": Death(("by_signal", 9), ExitReason.SIGNALED, signal=9),
    "SIGTERM": Death(("by_signal", 15), ExitReason.SIGNALED, signal=15),
    "SIGABRT": Death(("by_signal", 6), ExitReason.SIGNALED, signal=6),
    "SIGSEGV": Death(("by_fault",), ExitReason.SIGNALED, signal=11),
    "exit 0": Death(("by_exit", 0), ExitReason.EXITED, code=0),
    "exit 3": Death(("by_exit", 3), ExitReason.EXITED, code=3),
    "exec": Death(("by_exec",), ExitReason.EXITED, code=0),
    "link closed": Death(("by_closing_the_link",), ExitReason.PROTOCOL, signal=9),
    "all closed": Death(("by_closing_everything",), ExitReason.PROTOCOL, signal=9),
    "chain of forks": Death(("by_chain",), ExitReason.EXITED, code=0),
    "family": Death(("family", 3), ExitReason.EXITED, code=3),
    "no death signal": Death(("without_death_signal", 9), ExitReason.SIGNALED, signal=9),
}
#: those that need limits, and so cgroups
LIMITS = {
    "memory": Death(
        ("by_memory",), ExitReason.MEMORY, signal=9, error=MemoryLimitExceeded, options={"limits": Limits(memory="48M")}
    ),
    "cpu time": Death(
        ("by_cpu_time",), ExitReason.CPU_TIME, signal=9, error=CpuLimitExceeded, options={"limits": Limits(cpu_time=0.2)}
    ),
    "refused forks": Death(
        ("by_refused_forks",), ExitReason.PIDS, code=3, error=PidsLimitExceeded, options={"limits": Limits(pids=8)}
    ),
}  # fmt: skip
#: with the profile of ``kill_for_sync``
SECCOMP = Death(("by_system_call",), ExitReason.SECCOMP, signal=31, error=SyscallViolation)


class Victim(NamedTuple):
    """One process beside or below the host, and why the child has ended when that was killed."""

    pid: Callable[[ProcessIsolator], int]
    reason: ExitReason
    signal: int | None

    def kill(self, isolator: ProcessIsolator) -> None:
        os.kill(self.pid(isolator), signal.SIGKILL)

    def is_told_by(self, info: ExitInfo) -> bool:
        return (info.reason, info.signal, info.exit_code) == (self.reason, self.signal, None)


VICTIMS = {
    "payload": Victim(lambda isolator: isolator.pid or 0, ExitReason.SIGNALED, 9),
    "PID 1": Victim(init_of, ExitReason.SIGNALED, 9),
    "zygote": Victim(zygote_of, ExitReason.ZYGOTE_GONE, None),
}


@contextmanager
def isolator(**options: Any) -> Iterator[ProcessIsolator]:
    """One that starts another child at once; after the block nothing of it is left."""
    with nothing_left(), ProcessIsolator.create(**{"restart": AT_ONCE, **options}) as made:
        yield made


def lives_on(made: ProcessIsolator) -> bool:
    """Whether the next call gives the right answer."""
    return bool(made.run_source("6 * 7", timeout=10).value == 42)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds, f"{took:.2f} s"
