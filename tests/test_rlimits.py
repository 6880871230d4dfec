"""The per-process limits: pure plans, and one real child that carries them."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from pisupervisor.limits.rlimits import STACK, rlimit_plan
from pisupervisor.options import Limits


def unlimited(number: int) -> int:
    return resource.RLIM_INFINITY


def planned(limits: Limits, hard_limit=unlimited) -> dict[int, tuple[int, int]]:
    plan = rlimit_plan(limits, hard_limit)
    assert len({number for number, _, _ in plan}) == len(plan), "a resource is set twice"
    return {number: (soft, hard) for number, soft, hard in plan}


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_MEMLOCK, (0, 0)),
        (resource.RLIMIT_MSGQUEUE, (0, 0)),
        (resource.RLIMIT_SIGPENDING, (256, 256)),
        (resource.RLIMIT_NICE, (0, 0)),
        (resource.RLIMIT_RTPRIO, (0, 0)),
        (resource.RLIMIT_STACK, (STACK, STACK)),
        (resource.RLIMIT_NOFILE, (256, 256)),
    ],
)
def test_defaults(number: int, expected: tuple[int, int]) -> None:
    assert planned(Limits())[number] == expected


def test_what_was_not_asked_for_is_not_set() -> None:
    plan = planned(Limits(open_files=None))
    assert not plan.keys() & {resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_AS}


def test_file_size_is_in_bytes() -> None:
    assert planned(Limits(file_size="1M"))[resource.RLIMIT_FSIZE] == (1 << 20, 1 << 20)


@pytest.mark.parametrize(("seconds", "expected"), [(0.2, (1, 2)), (1.0, (1, 2)), (1.01, (2, 3)), (60, (60, 61))])
def test_cpu_time_is_rounded_up_to_seconds(seconds: float, expected: tuple[int, int]) -> None:
    assert planned(Limits(cpu_time=seconds))[resource.RLIMIT_CPU] == expected


def test_nothing_exceeds_the_hosts_hard_limits() -> None:
    plan = planned(Limits(open_files=4096, cpu_time=100, file_size="1G"), lambda number: 64)
    assert all(soft <= 64 and hard <= 64 for soft, hard in plan.values())
    assert plan[resource.RLIMIT_NOFILE] == (64, 64)
    assert plan[resource.RLIMIT_CORE] == (0, 0)


def test_the_default_reader_is_this_process() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    plan = {number: hard for number, _, hard in rlimit_plan(Limits(open_files=1 << 20))}
    assert plan[resource.RLIMIT_NOFILE] == (1 << 20 if most == resource.RLIM_INFINITY else min(1 << 20, most))


@pytest.mark.linux
def test_a_real_child_carries_them() -> None:
    plan = rlimit_plan(Limits(cpu_time=1, open_files=32))
    pid = os.fork()
    if not pid:
        try:
            for number, soft, hard in plan:
                resource.setrlimit(number, (soft, hard))
            if [resource.getrlimit(number) for number, _, _ in plan] != [(soft, hard) for _, soft, hard in plan]:
                os._exit(1)
            try:
                while True:
                    os.dup(0)
            except OSError:
                pass  # EMFILE
            while True:
                pass  # SIGXCPU after one second
        finally:
            os._exit(2)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGXCPU
