"""Why a child ended: the kernel's counters first, then the supervisor's own order, the filter, the signal. Pure."""

from __future__ import annotations

import signal
from typing import Any

from pisupervisor import errors
from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.results import ExitInfo, ExitReason, signal_name


def explain_exit(
    status: dict[str, Any], events: GroupEvents, ordered: ExitReason | None, *, duration: float,
    cpu_time: float | None = None, peak_memory: int | None = None, message: str = "", cpu_limited: bool = False,
) -> ExitInfo:  # fmt: skip
    """``status`` is what the zygote and PID 1 reported: ``exited`` [code, signal] and ``gone`` [si_code, si_status];
    ``ordered`` is why the supervisor killed it, None when it did not. The first cause wins.
    """
    code, number = status.get("exited") or (None, None)
    if code is None and number is None:
        number = int(signal.SIGKILL) if status.get("gone") else None
    reason = ordered or _reason(number, events, zygote_spoke=bool(status), cpu_limited=cpu_limited)
    return ExitInfo(
        exit_code=code, signal=number, reason=reason, message=message or _message(reason, events),
        cpu_time=cpu_time if cpu_time is not None else status.get("cpu"), peak_memory=peak_memory, duration=duration,
    )  # fmt: skip


def _reason(number: int | None, events: GroupEvents, *, zygote_spoke: bool, cpu_limited: bool) -> ExitReason:
    if events.oom_kills and number == signal.SIGKILL:
        return ExitReason.MEMORY
    if not zygote_spoke:
        return ExitReason.ZYGOTE_GONE
    if number == signal.SIGSYS:
        return ExitReason.SECCOMP
    if number == signal.SIGXCPU or (cpu_limited and number == signal.SIGKILL):
        return ExitReason.CPU_TIME
    return ExitReason.EXITED if number is None else ExitReason.SIGNALED


def _message(reason: ExitReason, events: GroupEvents) -> str:
    if reason is ExitReason.MEMORY:
        return f"the kernel killed {events.oom_kills} process(es) of the child at its memory limit"
    return ""


def termination(info: ExitInfo) -> errors.ChildTerminated:
    """The error that a call gets whose child ended as ``info`` says."""
    kind = _ERRORS.get(info.reason, errors.ChildTerminated)
    return kind(f"the child {info.describe()} while the call ran", info)


_ERRORS: dict[ExitReason, type[errors.ChildTerminated]] = {
    ExitReason.MEMORY: errors.MemoryLimitExceeded,
    ExitReason.CPU_TIME: errors.CpuLimitExceeded,
    ExitReason.PIDS: errors.PidsLimitExceeded,
    ExitReason.OUTPUT: errors.OutputLimitExceeded,
    ExitReason.SECCOMP: errors.SyscallViolation,
}

__all__ = ["explain_exit", "signal_name", "termination"]
