"""Why a child ended: the kernel's counters first, then the filter, the supervisor's own order, the signal. Pure."""

from __future__ import annotations

import _signal as signal  # signal imports enum for names that nobody needs here

from pisupervisor import errors
from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.records import replace
from pisupervisor.results import ExitInfo, ExitReason, predicate, signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def explain_exit(
    status: dict[str, Any], events: GroupEvents, ordered: ExitReason | None, *, duration: float,
    cpu_time: float | None = None, peak_memory: int | None = None, message: str = "", cpu_limit: float | None = None,
    in_call: bool = False, truncated: bool = False, stderr_tail: str = "", killed: bool = False,
) -> ExitInfo:  # fmt: skip
    """``status`` is what the zygote and PID 1 reported: ``exited`` [code, signal] and ``gone`` [si_code, si_status];
    ``ordered`` is why the supervisor killed it, None when it did not. The first cause wins.

    ``in_call``: a call failed by this end, and a limit that kills nobody (``pids``, output: ``truncated``) explains it.
    ``killed``: the supervisor sent SIGKILL to one that lived; on a busy machine a zygote says so too late, or nothing.
    """
    code, number = status.get("exited") or (None, None)
    if code is None and number is None:
        number = int(signal.SIGKILL) if killed or status.get("gone") else None
    used_cpu = cpu_time if cpu_time is not None else status.get("cpu")
    own = ordered or _own_reason(number, zygote_spoke=bool(status), cpu_spent=_spent(used_cpu, cpu_limit))
    limit = _reached_limit(ordered, number, events, in_call=in_call and bool(status), truncated=truncated)
    words = _limit_words(limit, events)
    return ExitInfo(
        exit_code=code, signal=number, reason=limit or own, message="; ".join(part for part in (words, message) if part),
        cpu_time=used_cpu, peak_memory=peak_memory, duration=duration,
        stderr_tail=stderr_tail, ordered=ordered in (ExitReason.TIMEOUT, ExitReason.KILLED),
    )  # fmt: skip


def _spent(used: float | None, limit: float | None) -> bool:
    """Whether a SIGXCPU or SIGKILL can be the kernel's for CPU time: anybody can send one. For the limit it counts in ticks,
    and on a busy machine reaches it before the group's exact counter does (seen: 0.9 of it).
    """
    return limit is not None and (used is None or used >= 0.5 * limit)


def _own_reason(number: int | None, *, zygote_spoke: bool, cpu_spent: bool) -> ExitReason:
    if not zygote_spoke:
        return ExitReason.ZYGOTE_GONE
    if number == signal.SIGSYS:
        return ExitReason.SECCOMP
    if cpu_spent and number in (signal.SIGXCPU, signal.SIGKILL):
        return ExitReason.CPU_TIME
    return ExitReason.EXITED if number is None else ExitReason.SIGNALED


def limits_matter(ordered: ExitReason | None) -> bool:
    """Whether a limit that was reached may explain an end: it had nothing to do with any other order."""
    return ordered in (None, ExitReason.TIMEOUT)


def _reached_limit(
    ordered: ExitReason | None, number: int | None, events: GroupEvents, *, in_call: bool, truncated: bool
) -> ExitReason | None:
    """The limit that was reached before the end came, and explains it."""
    if not limits_matter(ordered):
        return None
    if events.oom_kills and (number == signal.SIGKILL or ordered is ExitReason.TIMEOUT):
        return ExitReason.MEMORY
    if not in_call or number in (signal.SIGSYS, signal.SIGXCPU):
        return None
    if events.pids_max:
        return ExitReason.PIDS
    return ExitReason.OUTPUT if truncated else None


def _limit_words(reason: ExitReason | None, events: GroupEvents) -> str:
    if reason is ExitReason.MEMORY:
        return f"the kernel killed {events.oom_kills} process(es)"
    if reason is ExitReason.PIDS:
        return f"it was refused {events.pids_max} process(es) or thread(s) at its limit"
    if reason is ExitReason.OUTPUT:
        return "it wrote more than the limit for output"
    return ""


def termination(info: ExitInfo, written: tuple[bytes, bytes, bool] = (b"", b"", False)) -> errors.ChildTerminated:
    """The error that a call gets whose child ended as ``info`` says; ``written``: what the call wrote, where captured."""
    kind = _ERRORS.get(info.reason, errors.ChildTerminated)
    if written[1]:
        info = replace(info, stderr_tail=written[1][-4096:].decode("utf-8", "replace"))
    error = kind(f"the child {predicate(info)} while the call ran", info)
    if isinstance(error, errors.SyscallViolation):
        error.syscall = info.syscall
    return error.with_output(*written)


_ERRORS: dict[ExitReason, type[errors.ChildTerminated]] = {
    ExitReason.MEMORY: errors.MemoryLimitExceeded,
    ExitReason.CPU_TIME: errors.CpuLimitExceeded,
    ExitReason.PIDS: errors.PidsLimitExceeded,
    ExitReason.OUTPUT: errors.OutputLimitExceeded,
    ExitReason.SECCOMP: errors.SyscallViolation,
}

__all__ = ["explain_exit", "limits_matter", "signal_name", "termination"]
