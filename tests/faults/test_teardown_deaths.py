"""Deaths in the middle of an end that was asked for: exit(), terminate(), close(), and the end of the last isolator."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from helpers import descendants, in_thread, nothing_left, sleeps, state_of, wait_until, zygote_of
from zoo import DEATHS, DYING, SOON, VICTIMS, isolator, lives_on, within

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolationError,
    IsolatorClosed,
    ProcessIsolator,
    Template,
)

pytestmark = pytest.mark.linux
Made = ProcessIsolator


class Doing:
    """Something that another thread does, and what came of it."""

    def __init__(self, work: Any) -> None:
        self.result: Any = None
        self._work = work
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.result = error

    def over(self, seconds: float = SOON) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it hangs"
        return self.result


# --- exit() ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("death", ["SIGKILL", "SIGSEGV", "exit 3", "exec", "link closed", "family"])
def test_a_death_in_an_exit_handler(death: str) -> None:
    """It wins over the exit that was asked for: it came first. A child whose link is closed may still leave by itself."""
    with isolator() as made:
        made.invoke_method(DYING, "at_exit", *DEATHS[death].how)
        with within(2 * SOON):
            info = made.exit("enough", 0.3)
        if "closed" in death:
            assert info.reason is ExitReason.KILLED
        else:
            assert DEATHS[death].is_told_by(info)


@pytest.mark.parametrize("stubborn", ["wait", "stop", "spin_deaf", "wait_with_family"])
def test_an_exit_that_does_not_come(stubborn: str) -> None:
    with isolator() as made:
        made.invoke_method(DYING, "at_exit", stubborn)
        with within(0.2 + SOON):
            assert made.exit(None, 0.2).reason is ExitReason.KILLED
        assert descendants(zygote_of(made)) == []


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_while_it_leaves(victim: str) -> None:
    with isolator() as made:
        made.invoke_method(DYING, "at_exit", "wait")
        pid = made.pid
        leaving = Doing(lambda: made.exit("enough", 10.0))
        assert wait_until(lambda: made.state == "stopping")
        time.sleep(0.05)
        assert made.pid == pid
        VICTIMS[victim].kill(made)
        assert VICTIMS[victim].is_told_by(leaving.over())
        made.restart()
        assert lives_on(made)


# --- terminate() -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stubborn", ["wait", "stop", "spin_deaf", "wait_with_family"])
def test_a_child_that_does_not_heed_sigterm(stubborn: str) -> None:
    """parity: 6. Everything is gone when it returns, the three orphaned grandchildren too."""
    with isolator() as made:
        made.invoke_method(DYING, "at_sigterm", "wait")
        future = made.submit_call(made.invoke_method, DYING, stubborn)
        assert wait_until(lambda: made.state == "busy")
        if stubborn in ("spin_deaf", "wait_with_family"):
            assert wait_until(lambda: _is_deaf(made.pid or 0))
        with within(0.2 + SOON):
            assert made.terminate(0.2) is True
        assert descendants(zygote_of(made)) == []
        assert type(future.exception(SOON)) is ChildTerminated
        assert made.wait_for_exit(0).reason is ExitReason.KILLED
        assert lives_on(made)


def _is_deaf(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn"))
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_while_it_is_terminated(victim: str) -> None:
    """The order came first, and is the reason; what the kill spares is the rest of the grace."""
    with isolator() as made:
        made.submit_call(made.invoke_method, DYING, "wait_with_family")
        assert wait_until(lambda: made.state == "busy" and _is_deaf(made.pid or 0))
        ending = Doing(lambda: made.terminate(20.0))
        assert wait_until(lambda: made.state == "stopping")
        time.sleep(0.05)
        VICTIMS[victim].kill(made)
        assert ending.over() is True
        assert made.wait_for_exit(0).reason is ExitReason.KILLED
        assert lives_on(made)


# --- with a zygote that says nothing -----------------------------------------------------------------------------


def stop_zygote(made: Made) -> int:
    zygote = zygote_of(made)
    os.kill(zygote, signal.SIGSTOP)
    assert wait_until(lambda: state_of(zygote) == "T")
    return zygote


def test_closed_while_the_zygote_is_stopped() -> None:
    with nothing_left(), within(3 * SOON):
        made = ProcessIsolator.create()
        stop_zygote(made)
        made.close()


def test_a_template_closed_while_the_zygote_is_stopped() -> None:
    """With a child alive, and a spare one asked for."""
    with nothing_left(), within(5 * SOON), Template() as template:
        made = template.create()
        stop_zygote(made)
        made.close()


def test_a_deadline_while_the_zygote_is_stopped() -> None:
    """The child is killed without it; that it is dead is seen without it too."""
    with isolator() as made:
        zygote = stop_zygote(made)
        with within(0.2 + 2 * SOON), pytest.raises(CallTimeout):
            made.invoke_method(DYING, "wait_with_family", timeout=0.2)
        os.kill(zygote, signal.SIGCONT)
        assert lives_on(made)
        assert zygote_of(made) == zygote


@pytest.mark.parametrize("victim", ["payload", "PID 1"])
def test_killed_while_the_zygote_is_stopped(victim: str) -> None:
    with isolator() as made:
        zygote = stop_zygote(made)
        future = made.submit_call(made.invoke_method, DYING, "wait")
        assert wait_until(lambda: sleeps(made))
        VICTIMS[victim].kill(made)
        assert isinstance(future.exception(3 * SOON), ChildTerminated)
        os.kill(zygote, signal.SIGCONT)
        assert lives_on(made)


# --- close() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_while_it_is_closed(victim: str) -> None:
    """The zygote is stopped, so that close() has to wait; whatever dies meanwhile, it comes to its end."""
    with nothing_left():
        made = ProcessIsolator.create()
        pid = VICTIMS[victim].pid(made)
        stop_zygote(made)
        closing = Doing(made.close)
        time.sleep(0.05)
        if state_of(pid):
            os.kill(pid, signal.SIGKILL)
        assert closing.over(3 * SOON) is None


@pytest.mark.parametrize("state", ["wait_deaf", "spin_deaf", "stop", "wait_with_family"])
def test_closed_in_a_call(state: str) -> None:
    with nothing_left():
        made = ProcessIsolator.create()
        future = made.submit_call(made.invoke_method, DYING, state)
        assert wait_until(lambda: made.state == "busy")
        time.sleep(0.05)
        with within(SOON):
            made.close()
        assert isinstance(future.exception(SOON), (ChildTerminated, IsolatorClosed))


def test_closed_while_paused() -> None:
    with nothing_left(), within(2 * SOON), ProcessIsolator.create() as made:
        made.submit_call(made.invoke_method, DYING, "wait_with_family")
        assert wait_until(lambda: made.state == "busy")
        time.sleep(0.05)
        made.pause()


def test_closed_by_another_thread_in_a_call() -> None:
    with nothing_left():
        made = ProcessIsolator.create()
        timer = threading.Timer(0.2, made.close)
        timer.start()
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            made.invoke(time.sleep, 1000)
        timer.join()


def test_everything_at_once() -> None:
    """Whatever several threads do to one isolator: typed errors, no hang, nothing left."""
    with nothing_left():
        made = ProcessIsolator.create(call_timeout=5)
        acts = [
            made.terminate, made.restart, made.pause, made.resume, lambda: made.exit(None, 1), made.abort,
            lambda: made.run_source("1"), lambda: made.invoke_method(DYING, "by_signal", 9), lambda: made.pids(),
        ]  # fmt: skip
        doing = [Doing(lambda act=act: _again(act, 4)) for act in acts]
        raised = [error for each in doing for error in each.over(20)]
        made.resume()
        in_thread(made.close)
    odd = [error for error in raised if not isinstance(error, IsolationError)]
    assert not odd, odd


def _again(act: Any, times: int) -> list[Exception]:
    raised = []
    for _ in range(times):
        try:
            act()
        except Exception as error:
            raised.append(error)
    return raised


def test_a_pause_and_an_end_at_once() -> None:
    """A group for a pause that comes too late is not made: nobody would remove it."""
    with nothing_left():
        for number in range(15):
            with ProcessIsolator.create() as made:
                pausing = Doing(lambda made=made: _again(made.pause, 1))
                time.sleep(number / 2000)
                made.terminate(0)
                assert all(isinstance(error, IsolationError) for error in pausing.over())
