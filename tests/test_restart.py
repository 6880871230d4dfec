"""Whether and when a dead child is replaced: decided over times, without a clock."""

from __future__ import annotations

import pytest

from pisupervisor.options import RestartPolicy
from pisupervisor.results import ExitInfo, ExitReason
from pisupervisor.supervise.restart import decide, is_crash, permits

POLICY = RestartPolicy(max_restarts=3, within=60.0, backoff=0.5, max_backoff=1.5)


def ended(reason: ExitReason, code: int | None = None) -> ExitInfo:
    return ExitInfo(exit_code=code, signal=None, reason=reason)


@pytest.mark.parametrize(
    ("crashes", "now", "wait"),
    [
        ([], 100.0, 0.0),
        ([100.0], 100.0, 0.5),
        ([99.8], 100.0, pytest.approx(0.3)),
        ([90.0], 100.0, 0.0),
        ([99.0, 100.0], 100.0, 1.0),
        ([98.0, 99.0, 100.0], 100.0, 1.5),
        ([97.0, 98.0, 99.0, 100.0], 100.0, None),
        ([30.0, 98.0, 99.0, 100.0], 100.0, 1.5),
        ([10.0, 20.0, 30.0, 39.9], 100.0, 0.0),
        ([40.0], 100.0, 0.0),
        ([40.1, 50.0, 60.0, 70.0], 100.0, None),
    ],
)
def test_the_wait_doubles_and_the_window_slides(crashes: list[float], now: float, wait: float | None) -> None:
    assert decide(POLICY, crashes, now) == wait


def test_no_restart_at_all() -> None:
    assert decide(RestartPolicy(max_restarts=0), [1.0], 1.0) is None
    assert decide(RestartPolicy(max_restarts=0), [], 1.0) == 0.0


def test_many_crashes_do_not_overflow_the_wait() -> None:
    policy = RestartPolicy(max_restarts=1000, within=1e9)
    assert decide(policy, [float(n) for n in range(1000)], 999.0) == policy.max_backoff


def test_the_eleventh_crash_within_the_window_is_one_too_many() -> None:
    """parity: 13 (the decision)"""
    crashes = [float(n) for n in range(11)]
    assert decide(RestartPolicy(), crashes[:10], 10.0) is not None
    assert decide(RestartPolicy(), crashes, 10.0) is None


@pytest.mark.parametrize(
    ("info", "crash"),
    [
        (ended(ExitReason.EXITED, 0), False),
        (ended(ExitReason.EXITED, 3), True),
        (ended(ExitReason.TIMEOUT), False),
        (ended(ExitReason.KILLED), False),
        *[(ended(reason), True) for reason in ExitReason if reason.name not in ("EXITED", "TIMEOUT", "KILLED")],
    ],
)
def test_what_counts_as_a_crash(info: ExitInfo, crash: bool) -> None:
    assert is_crash(info) is crash


def test_a_clean_exit_in_a_call_is_a_crash() -> None:
    assert is_crash(ended(ExitReason.EXITED, 0), in_call=True)
    assert not is_crash(ended(ExitReason.TIMEOUT), in_call=True)


@pytest.mark.parametrize(
    ("mode", "reason", "code", "allowed"),
    [
        ("never", ExitReason.SIGNALED, None, False),
        ("never", ExitReason.TIMEOUT, None, False),
        ("always", ExitReason.EXITED, 0, True),
        ("on-failure", ExitReason.EXITED, 0, False),
        ("on-failure", ExitReason.EXITED, 1, True),
        ("on-failure", ExitReason.MEMORY, None, True),
        ("on-failure", ExitReason.TIMEOUT, None, True),
        ("on-failure", ExitReason.KILLED, None, True),
    ],
)
def test_modes(mode: str, reason: ExitReason, code: int | None, allowed: bool) -> None:
    info = ended(reason, code)
    assert permits(RestartPolicy(mode=mode), info, crashed=is_crash(info)) is allowed  # type: ignore[arg-type]
