"""Memory, CPU quota, CPU weight and pids are exact within 5 %, wherever groups can be had, by whoever's leave.

What was measured goes into the junit report as a share of the limit; scripts/vm-test puts it into its table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import features
import pytest
from helpers import DEGRADE, wait_until

from pisupervisor import IsolationOptions, Limits, MemoryLimitExceeded, ProcessIsolator

pytestmark = [pytest.mark.bed, pytest.mark.alone]
MIB = 1 << 20
Tell = Callable[[str, float], None]


@pytest.fixture(autouse=True)
def groups() -> None:
    features.need("limits")


@pytest.fixture
def tell(record_testsuite_property: Callable[[str, object], None]) -> Tell:
    return lambda name, share: record_testsuite_property(f"of the limit: {name}", f"{share:.4f}")


def options(limits: Limits) -> IsolationOptions:
    return IsolationOptions(limits=limits, degrade=DEGRADE)


def cpu_time(isolator: ProcessIsolator) -> float:
    used = isolator.resource_usage().cpu_time
    assert used is not None
    return used


def spin(isolator: ProcessIsolator, source: str) -> None:
    """Start what never ends, and wait until it runs."""
    before = cpu_time(isolator)
    isolator.submit_call(isolator.run_source, source)
    assert wait_until(lambda: cpu_time(isolator) > before + 0.3, 60)


def look(isolator: ProcessIsolator) -> tuple[float, float]:
    """(when, CPU time): a look takes an emulated machine up to 50 ms."""
    begun, used = time.monotonic(), cpu_time(isolator)
    return (begun + time.monotonic()) / 2, used


def averaged(isolators: list[ProcessIsolator], share: Callable[[list[float]], float]) -> float:
    """``share`` of the CPUs that each has used from now on, over 5 s, and over more, up to 30, where that is not exact: who got
    too much of a period on an emulated CPU pays it back in later ones.
    """
    before, seconds, found = [look(isolator) for isolator in isolators], 0, 0.0
    while not 0.95 <= found <= 1.05 and seconds < 30:
        time.sleep(5)
        seconds += 5
        after = [look(isolator) for isolator in isolators]
        found = share([(used - had) / (now - then) for (then, had), (now, used) in zip(before, after, strict=True)])
    return found


def test_memory(tell: Tell) -> None:
    """The child takes one MiB after the other: how much it has had when there is no more."""
    limit, most = 128 * MIB, 0
    with ProcessIsolator.create(options(Limits(memory=limit, swap=0))) as isolator:
        begun = isolator.resource_usage().memory or 0
        isolator.run_source(f"kept = [bytearray({limit * 9 // 10 - begun})]")
        with suppress(MemoryLimitExceeded):
            while most <= 2 * limit:
                most = max(most, isolator.resource_usage().memory or 0)
                isolator.run_source(f"kept.append(bytearray({MIB}))")
    tell("memory", most / limit)
    assert 0.95 <= most / limit <= 1.05


def test_quota(tell: Tell) -> None:
    """Two processes on as many CPUs as there are want all they can get."""
    with ProcessIsolator.create(options(Limits(cpus=0.2))) as isolator:
        spin(isolator, "import os\nos.fork()\nwhile True: pass")
        share = averaged([isolator], lambda used: used[0] / 0.2)
    tell("quota", share)
    assert 0.95 <= share <= 1.05


def test_weights(tell: Tell) -> None:
    """Of one CPU, which both want: what the lighter one gets of what both get, against a fifth.

    Both come of one zygote: what a systemd gives another one is another group, beside which this one's weights do not count.
    """
    weights = (100, 400)
    with ExitStack() as stack:
        pair = [
            stack.enter_context(ProcessIsolator.create(options(Limits(cpu_weight=weight, cpus=8))))
            for weight in weights
        ]
        for isolator in pair:
            spin(isolator, f"import os\nos.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\nwhile True: pass")
        share = averaged(pair, lambda used: used[0] / sum(used) / (weights[0] / sum(weights)))
    tell("weight", share)
    assert 0.95 <= share <= 1.05


def test_pids(tell: Tell) -> None:
    """Not one more and not one less: processes that stay, until a fork is refused."""
    source = """
import os, time
born = 0
try:
    while born < 100:
        if not os.fork():
            time.sleep(600)
            os._exit(0)
        born += 1
except BlockingIOError:
    pass
born
"""
    with ProcessIsolator.create(options(Limits(pids=20))) as isolator:
        before = isolator.resource_usage().pids or 0
        born = isolator.run_source(source).value
        tell("pids", (isolator.resource_usage().pids or 0) / 20)
        assert isolator.resource_usage().pids == 20
        assert before + born == 20
