"""Why a child ended: the table of what was reported, what was counted, and what follows from it."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from pisupervisor import errors
from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.results import ExitInfo, ExitReason
from pisupervisor.supervise.exits import explain_exit, termination

QUIET, OOM = GroupEvents(), GroupEvents(oom_kills=2)


def exited(code: int | None, number: int | None) -> dict[str, Any]:
    return {"exited": [code, number], "cpu": 0.25, "gone": [1, 0]}


KILLED = exited(None, signal.SIGKILL)
PID_1_KILLED = {"gone": [2, 9]}


def explain(status: dict[str, Any], events: GroupEvents, ordered: ExitReason | None = None, **more: Any) -> ExitInfo:
    return explain_exit(status, events, ordered, duration=1.5, **more)


@pytest.mark.parametrize(
    ("status", "events", "ordered", "reason"),
    [
        (exited(0, None), QUIET, None, ExitReason.EXITED),
        (exited(3, None), QUIET, None, ExitReason.EXITED),
        (exited(None, signal.SIGSEGV), QUIET, None, ExitReason.SIGNALED),
        (KILLED, QUIET, None, ExitReason.SIGNALED),
        (KILLED, OOM, None, ExitReason.MEMORY),
        (PID_1_KILLED, OOM, None, ExitReason.MEMORY),
        (PID_1_KILLED, QUIET, None, ExitReason.SIGNALED),
        (exited(0, None), OOM, None, ExitReason.EXITED),
        (exited(None, signal.SIGSEGV), OOM, None, ExitReason.SIGNALED),
        (exited(None, signal.SIGSYS), QUIET, None, ExitReason.SECCOMP),
        (exited(None, signal.SIGXCPU), QUIET, None, ExitReason.SIGNALED),
        ({}, QUIET, None, ExitReason.ZYGOTE_GONE),
        (PID_1_KILLED, QUIET, ExitReason.TIMEOUT, ExitReason.TIMEOUT),
        (PID_1_KILLED, QUIET, ExitReason.KILLED, ExitReason.KILLED),
        (PID_1_KILLED, QUIET, ExitReason.PROTOCOL, ExitReason.PROTOCOL),
        ({}, QUIET, ExitReason.KILLED, ExitReason.KILLED),
    ],
)
def test_reasons(status: dict[str, Any], events: GroupEvents, ordered: ExitReason | None, reason: ExitReason) -> None:
    assert explain(status, events, ordered).reason is reason


def test_a_kill_is_cpu_time_where_that_is_limited() -> None:
    for status in (KILLED, exited(None, signal.SIGXCPU)):
        assert explain(status, QUIET, cpu_limit=1.0, cpu_time=1.0).reason is ExitReason.CPU_TIME
        assert explain(status, QUIET, cpu_limit=1.0, cpu_time=0.1).reason is ExitReason.SIGNALED, "anybody can send one"
        assert explain(status, QUIET, cpu_time=100.0).reason is ExitReason.SIGNALED
    assert explain(KILLED, OOM, cpu_limit=1.0, cpu_time=1.0).reason is ExitReason.MEMORY, "the counters come first"


def test_how_it_ended_is_told_beside_why() -> None:
    info = explain(exited(3, None), QUIET)
    assert (info.exit_code, info.signal, info.cpu_time, info.duration) == (3, None, 0.25, 1.5)
    info = explain(PID_1_KILLED, QUIET)
    assert (info.exit_code, info.signal) == (None, signal.SIGKILL)


def test_our_own_kill_needs_no_word_of_the_zygote() -> None:
    info = explain({}, QUIET, ExitReason.KILLED, killed=True)
    assert (info.signal, info.reason) == (signal.SIGKILL, ExitReason.KILLED)
    assert explain(exited(3, None), QUIET, ExitReason.KILLED, killed=True).exit_code == 3, "it came before"
    assert explain({}, QUIET, ExitReason.KILLED).signal is None


def test_the_groups_account_is_worth_more_than_the_payloads() -> None:
    info = explain(exited(0, None), QUIET, cpu_time=2.0, peak_memory=4096)
    assert (info.cpu_time, info.peak_memory) == (2.0, 4096)


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (explain(exited(3, None), QUIET), "exited with code 3"),
        (explain(exited(None, signal.SIGSEGV), QUIET), "killed by SIGSEGV"),
        (explain(KILLED, OOM), "oom-killed at its memory limit: the kernel killed 2 process(es)"),
        (explain(exited(None, signal.SIGSYS), QUIET), "killed by seccomp (SIGSYS)"),
        (explain(exited(None, signal.SIGXCPU), QUIET, cpu_limit=0.25), "cpu time"),
        (explain({}, QUIET), "zygote is gone"),
        (explain(KILLED, QUIET, ExitReason.TIMEOUT, message="after 2 s"), "killed at its deadline: after 2 s"),
    ],
)
def test_it_is_described_for_people(info: ExitInfo, text: str) -> None:
    """parity: 10"""
    assert text in info.describe()
    assert info.describe().count("limit") <= 1  # the reason says it; the kernel's word need not say it again


@pytest.mark.parametrize("reason", ExitReason)
def test_the_error_of_a_call_tells_the_reason(reason: ExitReason) -> None:
    info = ExitInfo(exit_code=None, signal=9, reason=reason)
    error = termination(info)
    assert isinstance(error, errors.ChildTerminated)
    assert error.exit_info is info
    expected = {
        ExitReason.MEMORY: errors.MemoryLimitExceeded, ExitReason.CPU_TIME: errors.CpuLimitExceeded,
        ExitReason.PIDS: errors.PidsLimitExceeded, ExitReason.OUTPUT: errors.OutputLimitExceeded,
        ExitReason.SECCOMP: errors.SyscallViolation,
    }  # fmt: skip
    assert type(error) is expected.get(reason, errors.ChildTerminated)
