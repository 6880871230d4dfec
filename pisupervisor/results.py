"""What calls and exits are reported with: plain, frozen data."""

from __future__ import annotations

from enum import Enum

from pisupervisor.records import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ExitReason(Enum):
    """Why a child ended. The first cause wins."""

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CPU_TIME = "cpu_time"
    PIDS = "pids"
    SECCOMP = "seccomp"
    OUTPUT = "output"
    KILLED = "killed"
    ZYGOTE_GONE = "zygote_gone"
    PROTOCOL = "protocol"


@dataclass(frozen=True, kw_only=True)
class ExitInfo:
    """How a child (or a script) ended.

    ``exit_code`` is None when a signal ended it; ``signal`` is None otherwise. Times are seconds, memory is bytes,
    None where nobody counted. ``stderr_tail`` is the end of what it wrote to stderr, up to 4096 bytes: in the call that
    failed, if that was captured, else outside of calls. ``ordered``: the supervisor itself ended it, for a deadline, a
    stop or a cancelled call; whatever ``reason`` says then, that is no crash.
    ``stdout``, ``stderr`` and ``truncated`` are filled by ``run_script``. ``syscall``: the call that the seccomp profile
    kills for, where a listener watched.
    """

    exit_code: int | None
    signal: int | None
    reason: ExitReason
    message: str = ""
    cpu_time: float | None = None
    peak_memory: int | None = None
    duration: float = 0.0
    stderr_tail: str = ""
    stdout: str = field(default="", repr=False)
    stderr: str = field(default="", repr=False)
    truncated: bool = False
    ordered: bool = False
    syscall: str | None = None

    def describe(self) -> str:
        """One line for people: the reason first, then the kernel's word."""
        if self.reason is ExitReason.EXITED:
            how = f"exited with code {self.exit_code}"
        elif self.reason is ExitReason.SIGNALED:
            how = f"killed by {signal_name(self.signal)}"
        else:
            how = _WORDS[self.reason]
        return f"{how}: {self.message}" if self.message else how


def predicate(info: ExitInfo) -> str:
    """What follows "the child" in a sentence: "exited with code 3", "was killed by SIGKILL"."""
    how = info.describe()
    return how if how.startswith(("exited", "ended")) else f"was {how}"


_WORDS = {
    ExitReason.TIMEOUT: "killed at its deadline",
    ExitReason.MEMORY: "oom-killed at its memory limit",
    ExitReason.CPU_TIME: "killed: cpu time used up",
    ExitReason.PIDS: "ended after reaching its process limit",
    ExitReason.SECCOMP: "killed by seccomp (SIGSYS)",
    ExitReason.OUTPUT: "ended after reaching its output limit",
    ExitReason.KILLED: "killed by the supervisor",
    ExitReason.ZYGOTE_GONE: "killed: its zygote is gone",
    ExitReason.PROTOCOL: "killed: it broke the protocol",
}


def signal_name(number: int | None) -> str:
    """``SIGKILL`` for 9; the bare number where the platform has no name."""
    import signal as _signal  # imported by who asks: it makes an enum of every signal

    try:
        return _signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a child, or one call, has used: ``cpu_time`` in seconds, memory in bytes; None where nobody counts it.

    ``peak_memory`` and ``memory`` are the group's (with caches, tmpfs and buffers), ``rss`` and ``vms`` sums over the
    processes that live now. ``read_bytes`` and ``write_bytes`` reached a storage device, by the group's count or by what
    /proc says of the processes, whichever saw more (cgroup v1 counts no buffered writes), ``read_chars`` and
    ``write_chars`` went through read and write calls of any kind. The pressures are shares (0 to 1) of the last ten seconds
    in which some process of the child waited for CPU, memory or disk (cgroup v2, where the kernel has PSI switched on).
    Only ``resource_usage()`` fills more than the first two.
    """

    cpu_time: float | None = None
    peak_memory: int | None = None
    memory: int | None = None
    rss: int | None = None
    vms: int | None = None
    pids: int | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    read_chars: int | None = None
    write_chars: int | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """The result of ``execute`` and ``run_source``: the value and what was written to stdout and stderr meanwhile."""

    value: Any
    stdout: str
    stderr: str
    truncated: bool
    duration: float
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class SystemCall:
    """A system call that a seccomp listener saw, and how often with the same arguments. ``arguments`` are the six registers,
    whatever of them the call reads; ``action`` is "refused" (with ``errno``), "killed" or, while learning, "allowed";
    ``pid`` is that of the process that made it first, as the host numbers it.
    """

    name: str
    number: int
    arguments: tuple[int, ...]
    action: str
    errno: int = 0
    pid: int = 0
    count: int = 1

    def __str__(self) -> str:
        shown = ", ".join(f"{value:#x}" for value in self.arguments)
        return f"{self.name}({shown}): {self.action}"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One protection as it was asked for and as it holds: ``how`` names the mechanism, ``detail`` what was read back.
    ``reached``: how often the present child has run into this limit so far.
    """

    asked: Any
    holds: bool
    how: str = ""
    detail: str = ""
    reached: int = 0
