"""Zygotes that are killed, stopped, continued: between two launches, in one, in a call."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from helpers import descendants, nothing_left, sleeps, start_without, state_of, wait_until, zygote_of
from zoo import SOON, lives_on, within

from pisupervisor import ChildTerminated, ExitReason, LaunchError, ProcessIsolator, Template
from pisupervisor.launch.zygote import Zygote, end_process

pytestmark = pytest.mark.linux


def test_a_zygote_killed_between_two_children() -> None:
    with nothing_left(), Template() as template:
        with template.create() as isolator:
            old = zygote_of(isolator)
        os.kill(old, signal.SIGKILL)
        assert wait_until(lambda: state_of(old) in ("", "Z"))
        with template.create() as isolator:
            assert zygote_of(isolator) != old
            assert isolator.run_source("1").value == 1


def test_a_zygote_killed_in_a_launch() -> None:
    with nothing_left(), ProcessIsolator.create() as other:
        zygote = zygote_of(other)
        os.kill(zygote, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (zygote, signal.SIGKILL))
        timer.start()
        with pytest.raises(LaunchError) as caught:
            ProcessIsolator.create()
        timer.join()
        assert caught.value.step == "zygote"
        with ProcessIsolator.create() as isolator:
            assert isolator.run_source("1").value == 1


def test_a_zygote_killed_with_a_spare_child_to_be_handed_out() -> None:
    """Nobody is told: the spare one was a favour, and another is launched."""
    with nothing_left(), Template() as template:
        assert template._template is not None
        zygote = template._template.zygote.pid
        os.kill(zygote, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (zygote, signal.SIGKILL))
        timer.start()
        with template.create() as isolator:
            assert isolator.run_source("1").value == 1
            assert zygote_of(isolator) != zygote
        timer.join()


def test_a_zygote_killed_in_a_call() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid, future = isolator.pid, isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: sleeps(isolator))
        os.kill(zygote_of(isolator), signal.SIGKILL)
        error = future.exception(5)
        assert isinstance(error, ChildTerminated)
        assert error.exit_info.reason is ExitReason.ZYGOTE_GONE
        assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        assert isolator.run_source("1").value == 1


def test_all_children_end_with_their_zygote() -> None:
    with nothing_left(), ProcessIsolator.create() as one, ProcessIsolator.create() as two:
        pids = [one.pid, two.pid]
        os.kill(zygote_of(one), signal.SIGKILL)
        assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 2)
        assert [one.run_source("1").value, two.run_source("2").value] == [1, 2]


def test_without_the_death_signal_they_would_not() -> None:
    with nothing_left(), closing(start_without("death signal")) as isolator:
        os.kill(zygote_of(isolator), signal.SIGKILL)
        assert not wait_until(lambda: state_of(isolator.pid or 0) in ("", "Z"), 0.3)


def test_the_next_one_gets_its_plan_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread starts it, another asks for a module to be kept warm."""
    prepare = Zygote.prepare

    def warmed_first(zygote: Zygote, *told: Any) -> None:
        template.zygote.warm(["cloudpickle.cloudpickle"])
        prepare(zygote, *told)

    with nothing_left(), ProcessIsolator.create() as one:
        template = one._keeper.template
        monkeypatch.setattr(Zygote, "prepare", warmed_first)
        os.kill(zygote_of(one), signal.SIGKILL)
        assert wait_until(lambda: one.state == "backoff", SOON)
        assert lives_on(one)


def test_one_that_cannot_be_prepared_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try would leave one behind."""
    with nothing_left(), ProcessIsolator.create() as one:
        template, before = one._keeper.template, set(descendants(os.getpid()))
        end_process(template.zygote.pidfd, 0.0)

        def refuse(*_told: Any) -> None:
            raise LaunchError("newuidmap: no", step="namespaces", remedy="none")

        with monkeypatch.context() as patch:
            patch.setattr(Zygote, "prepare", refuse)
            for _ in range(3):
                with pytest.raises(LaunchError, match="newuidmap"):
                    template.usable_zygote()
        assert set(descendants(os.getpid())) <= before


# --- stopped, and continued later --------------------------------------------------------------------------------


def test_a_zygote_that_is_stopped_for_a_while() -> None:
    """A launch waits for it; nothing else does."""
    with nothing_left(), ProcessIsolator.create() as one:
        zygote = zygote_of(one)
        os.kill(zygote, signal.SIGSTOP)
        assert lives_on(one)
        timer = threading.Timer(0.3, os.kill, (zygote, signal.SIGCONT))
        timer.start()
        start = time.monotonic()
        with ProcessIsolator.create() as two:
            assert time.monotonic() - start > 0.2
            assert lives_on(two)
            assert zygote_of(two) == zygote
        timer.join()


def test_a_zygote_that_is_stopped_for_too_long() -> None:
    """The request that nobody waits for any more is in its socket: what comes of it must not live."""
    with nothing_left(), ProcessIsolator.create() as one:
        zygote = zygote_of(one)
        before = set(descendants(zygote))
        os.kill(zygote, signal.SIGSTOP)
        for _ in range(3):
            with within(0.1 + 2 * SOON), pytest.raises(LaunchError) as caught:
                ProcessIsolator.create(start_timeout=0.1)
            assert caught.value.step == "start_timeout"
        os.kill(zygote, signal.SIGCONT)
        assert lives_on(one)
        with ProcessIsolator.create() as two:
            assert lives_on(two)
            template = one._keeper.template  # which may have a spare child ready by then
            expected = lambda: len(before) + 2 + 2 * (template.spare is not None)  # noqa: E731
            assert wait_until(lambda: len(descendants(zygote)) == expected())


def test_a_zygote_stopped_for_ever_and_closed() -> None:
    with nothing_left(), within(4 * SOON), ProcessIsolator.create() as one:
        os.kill(zygote_of(one), signal.SIGSTOP)
        with pytest.raises(LaunchError):
            ProcessIsolator.create(start_timeout=0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_whatever_ends_it(number: int) -> None:
    """Its children end with it, and the next call starts all anew."""
    with nothing_left(), ProcessIsolator.create() as one:
        zygote = zygote_of(one)
        os.kill(zygote, number)
        assert wait_until(lambda: one.state == "backoff", SOON)
        assert lives_on(one)
        assert zygote_of(one) != zygote


def test_killed_with_many_children_and_a_spare_one() -> None:
    with nothing_left(), Template() as template:
        many = [template.create() for _ in range(5)]
        template.create().close()
        zygote = zygote_of(many[0])
        assert wait_until(lambda: len(descendants(zygote)) == 12)
        below = descendants(zygote)
        os.kill(zygote, signal.SIGKILL)
        assert wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in below), SOON)
        assert all(lives_on(one) for one in many)
        for one in many:
            one.close()
