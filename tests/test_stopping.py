"""Ends that are asked for, waiting for ends, and pauses, on real children."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import in_fork, in_thread, init_of, linux, nothing_left, own_groups, state_of, wait_until, write

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolationError,
    IsolatorClosed,
    Limits,
    OptionsError,
    ProcessIsolator,
    RestartPolicy,
)

pytestmark = [linux, pytest.mark.matrix]

FAMILY = """
    import os, signal, time

    def spin_deaf():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _ in range(3):
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.setsid()
                while True:
                    time.sleep(1)
        while True:
            pass

    def say_goodbye(number):
        signal.signal(number, lambda *_: (print("goodbye", file=__import__("sys").stderr, flush=True), os._exit(5)))
        time.sleep(1000)

    def deaf_to(number):
        signal.signal(number, signal.SIG_IGN)

    def at_exit(text):
        import atexit, sys
        atexit.register(lambda: print(text, file=sys.stderr, flush=True))

    def hang_at_exit():
        import atexit
        atexit.register(time.sleep, 1000)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    return write(tmp_path, "family.py", FAMILY)


# --- exit ----------------------------------------------------------------------------------------------------------


def test_exit_runs_handlers_and_keeps_the_reason(plugin: Path) -> None:
    """parity: 5"""
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.invoke_method(plugin, "at_exit", "the handler ran")
        info = isolator.exit("end of the day")
        assert (info.reason, info.exit_code, info.message) == (ExitReason.EXITED, 0, "end of the day")
        assert info.stderr_tail == "the handler ran\n"
        assert (isolator.state, isolator.pid) == ("stopped", None)
        assert isolator.wait_for_exit() == info


def test_exit_after_a_captured_call_still_tells_what_handlers_say(plugin: Path) -> None:
    """A captured call put its own pipes in the place of stderr."""
    with ProcessIsolator.create() as isolator:
        isolator.run_source(
            "import atexit, sys; _ = atexit.register(lambda: print('late', file=sys.stderr, flush=True))"
        )
        assert isolator.exit().stderr_tail == "late\n"


def test_after_an_exit_calls_are_refused_until_restart(plugin: Path) -> None:
    """parity: 13 (an exit with code 0 starts no other under on-failure)"""
    with nothing_left(), ProcessIsolator.create() as isolator:
        old = isolator.pid
        isolator.exit()
        with pytest.raises(IsolatorClosed, match=r"exited with code 0.*restart\(\) does"):
            isolator.invoke(len, "abc")
        isolator.restart()
        assert isolator.pid not in (None, old)
        assert isolator.invoke(len, "abc") == 3


@pytest.mark.parametrize("before", ["retired", "crashed", "stubborn"])
def test_that_is_so_wherever_the_child_was_in_its_life(plugin: Path, before: str) -> None:
    """Also where there was none at that moment, and where it had to be killed."""
    with nothing_left(), ProcessIsolator.create(max_calls=1 if before == "retired" else None) as isolator:
        if before == "crashed":
            with pytest.raises(ChildTerminated):
                isolator.invoke(os._exit, 3)
        else:
            isolator.invoke_method(plugin, *(("hang_at_exit",) if before == "stubborn" else ("at_exit", "x")))
        isolator.exit(timeout=0.2)
        for _ in range(2):
            with pytest.raises(IsolatorClosed, match=r"exit\(\) was called.*restart\(\)"):
                isolator.invoke(len, "abc")
            isolator.terminate()
        isolator.restart()
        assert isolator.invoke(len, "abc") == 3


def test_an_exit_that_takes_too_long_is_a_kill(plugin: Path) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.invoke_method(plugin, "hang_at_exit")
        info = isolator.exit("enough", timeout=0.2)
        assert info.reason is ExitReason.KILLED
        assert "0.2 s after exit(enough)" in info.message


def ask(name: str) -> object:
    import pihost

    return pihost.call_host(name)


def test_exit_does_not_wait_for_what_nobody_waits_for() -> None:
    """Calls of a map that ask the host something, and whose results are taken no more."""
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.register_callback("one", lambda: 1)
        results = isolator.map(ask, ["one"] * 50)
        assert next(results) == 1
        info = isolator.exit("enough")
        assert (info.exit_code, info.reason, info.message) == (0, ExitReason.EXITED, "enough")


def test_exit_waits_for_the_call_under_way() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        future = isolator.submit(_sleep_and_answer, 0.3)
        assert wait_until(lambda: isolator.state == "busy")
        info = isolator.exit()
        assert (future.result(1), info.exit_code) == ("slept", 0)


def _sleep_and_answer(seconds: float) -> str:
    import time

    time.sleep(seconds)
    return "slept"


def test_exit_where_there_is_nothing_to_end() -> None:
    with ProcessIsolator.create() as isolator:
        first = isolator.exit("once")
        assert isolator.exit("twice") == first


# --- terminate and abort -------------------------------------------------------------------------------------------


def test_terminate_ends_the_whole_family(plugin: Path) -> None:
    """parity: 6. A child that ignores SIGTERM, with three grandchildren in sessions of their own."""
    with nothing_left(), ProcessIsolator.create() as isolator:
        future = isolator.submit_call(isolator.invoke_method, plugin, "spin_deaf")
        assert wait_until(lambda: len(isolator.pids()) == 5), "PID 1, the payload and three"
        pids = isolator.pids()
        assert isolator.terminate(grace=0.2) is True
        assert not any(state_of(pid) not in ("", "Z") for pid in pids)
        error = future.exception(1)
        assert isinstance(error, ChildTerminated)
        assert error.exit_info.reason is ExitReason.KILLED


@pytest.mark.unhurried
def test_terminate_lets_the_child_say_goodbye(plugin: Path) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        future = isolator.submit_call(isolator.invoke_method, plugin, "say_goodbye", int(signal.SIGTERM))
        assert wait_until(lambda: isolator.state == "busy")
        time.sleep(0.1)
        assert isolator.terminate(grace=5)
        error = future.exception(1)
        assert isinstance(error, ChildTerminated)
        info = error.exit_info
        assert (info.exit_code, info.stderr_tail, info.ordered) == (5, "goodbye\n", True)


def test_a_handler_that_exits_between_calls_ends_the_child_as_it_says() -> None:
    """It was exit code 1, and no exit handler ran."""
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.invoke(_exit_on_sigterm)
        assert isolator.terminate(grace=5)
        info = isolator.wait_for_exit()
        assert (info.exit_code, info.stderr_tail, info.reason) == (5, "atexit ran\n", ExitReason.KILLED)


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_interrupt_between_calls_ends_the_child_as_a_process(at_once: int) -> None:
    """It was exit code 1, with nothing on stderr; and a report for the host went to whatever socket had its number."""
    pairs = [socket.socketpair() for _ in range(16)]
    with (
        nothing_left(),
        ProcessIsolator.create(max_concurrency=at_once, restart=RestartPolicy(mode="never")) as isolator,
    ):
        isolator.invoke(_keep, [theirs for _ours, theirs in pairs])
        # Before it waits for the next call, an interrupt may still be the last one's.
        assert wait_until(lambda: "unix_stream" in Path(f"/proc/{isolator.pid}/wchan").read_text())
        os.kill(isolator.pid or 0, signal.SIGINT)
        info = isolator.wait_for_exit(5)
        assert (info.signal, info.exit_code, info.reason) == (signal.SIGINT, None, ExitReason.SIGNALED)
        assert info.stderr_tail.endswith("KeyboardInterrupt\natexit ran\n")
    for ours, theirs in pairs:
        theirs.close()
        assert ours.recv(100) == b""
        ours.close()


def test_exit_where_calls_run_side_by_side() -> None:
    """What first imported threading was a thread of ours, whose end was then waited for: the child was killed instead."""
    with nothing_left(), ProcessIsolator.create(max_concurrency=2) as isolator:
        isolator.invoke(_keep, [])
        info = isolator.exit(timeout=5)
        assert (info.exit_code, info.stderr_tail) == (0, "atexit ran\n")


def _keep(sockets: list[socket.socket]) -> None:
    import atexit
    import sys
    import threading  # noqa: F401 - as nearly everything does

    sys.kept = sockets  # type: ignore[attr-defined]
    atexit.register(print, "atexit ran", file=sys.stderr, flush=True)


def test_a_child_that_leaves_by_itself_gets_no_more_calls() -> None:
    """It waits for its threads, as a process does; a call was sent to it, and waited as long."""
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        isolator.invoke(_linger)
        old = isolator.pid
        os.kill(old or 0, signal.SIGINT)
        time.sleep(0.2)
        assert isolator.invoke(len, "abc", timeout=10) == 3
        assert isolator.pid != old


def _linger() -> None:
    import threading
    import time

    threading.Thread(target=time.sleep, args=(30,)).start()


def test_a_handler_that_raises_between_calls_is_told_on_stderr() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.invoke(_raise_on_sigterm)
        assert isolator.terminate(grace=5)
        info = isolator.wait_for_exit()
        assert (info.exit_code, info.stderr_tail.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def _raise_on_sigterm() -> None:
    import signal

    signal.signal(signal.SIGTERM, lambda *_: 1 / 0)


def _exit_on_sigterm() -> None:
    import atexit
    import signal
    import sys

    atexit.register(print, "atexit ran", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))


def test_terminate_without_grace_is_a_kill(plugin: Path) -> None:
    with ProcessIsolator.create() as isolator:
        assert isolator.terminate(grace=0)
        assert isolator.wait_for_exit().signal == signal.SIGKILL


def test_abort_is_a_sigabrt() -> None:
    """parity: 7"""
    with nothing_left(), ProcessIsolator.create() as isolator:
        assert isolator.abort("it knows why")
        info = isolator.wait_for_exit()
        assert (info.signal, info.reason, info.message) == (signal.SIGABRT, ExitReason.KILLED, "it knows why")
        assert isolator.invoke(len, "ab") == 2


def test_abort_of_a_child_that_is_deaf_to_it(plugin: Path) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.invoke_method(plugin, "deaf_to", int(signal.SIGABRT))
        assert isolator.abort()
        assert isolator.wait_for_exit().signal == signal.SIGKILL


def test_ordered_ends_never_count_as_crashes() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(max_restarts=0)) as isolator:
        for _ in range(3):
            isolator.terminate()
            assert isolator.invoke(len, "abc") == 3
            isolator.abort()
            isolator.restart()
            with pytest.raises(CallTimeout):
                isolator.run_source("while True: pass", timeout=0.05)


@pytest.mark.alone
@pytest.mark.parametrize("more", [{}, {"idle_timeout": 600.0}, {"max_concurrency": 2}], ids=["alone", "watched", "two"])
def test_a_stop_overtakes_a_waiting_restart(more: dict[str, Any]) -> None:
    """And who waits behind who waits for it: another call, or the helper thread of an isolator that has one."""
    policy = RestartPolicy(backoff=60, max_backoff=60)
    with nothing_left(), ProcessIsolator.create(restart=policy, **more) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(1)")
        assert isolator.state == "backoff"
        with ThreadPoolExecutor(2) as threads:
            futures = [threads.submit(isolator.invoke, len, "abc") for _ in range(2)]
            time.sleep(0.2)
            started = time.monotonic()
            assert isolator.terminate()
            assert [type(future.exception(10)) for future in futures] == [IsolatorClosed] * 2
        assert time.monotonic() - started < 10  # not 60
        assert isolator.state == "stopped"


@pytest.mark.alone
def test_a_stop_overtakes_what_was_submitted_before() -> None:
    """Also what has not begun to wait for the restart."""
    policy = RestartPolicy(backoff=60, max_backoff=60)
    with nothing_left(), ProcessIsolator.create(restart=policy) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(1)")
        futures = [isolator.submit(len, "abc") for _ in range(3)]
        time.sleep(0.2)
        assert isolator.terminate()
        assert [type(future.exception(10)) for future in futures] == [IsolatorClosed] * 3


def test_close_overtakes_a_waiting_restart() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create(restart=RestartPolicy(backoff=60, max_backoff=60))
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(1)")
        future = isolator.submit(len, "abc")
        time.sleep(0.1)
        isolator.close()
        assert future.cancelled() or isinstance(future.exception(1), IsolatorClosed)


def test_restart_is_another_child_whatever_the_policy_says() -> None:
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        old = isolator.pid
        isolator.restart()
        assert isolator.pid not in (None, old)
        isolator.exit()
        isolator.restart()
        assert isolator.invoke(len, "abc") == 3


WITHIN = "in the middle of a call into that child.*a callback, a signal's handler.*terminate, abort and close"


@pytest.mark.parametrize("act", ["exit", "restart", "wait_for_exit"])
@pytest.mark.parametrize("place", ["callback", "handler"])
def test_what_waits_for_the_call_is_refused_within_it(act: str, place: str) -> None:
    """By a message that is true for both."""
    refused: list[str] = []

    def within(*_args: object) -> None:
        with pytest.raises(IsolationError) as caught:
            getattr(isolator, act)()
        refused.append(str(caught.value))

    with ProcessIsolator.create() as isolator:
        pid = isolator.pid
        call_within(isolator, place, within)
        assert isolator.pid == pid
    assert re.search(WITHIN, refused[0])


def call_within(isolator: ProcessIsolator, place: str, act: Callable[..., object]) -> None:
    """A call of 0.4 seconds, in the middle of which that is done."""
    isolator.register_callback("act", act)
    if place == "callback":
        isolator.invoke(ask, "act")
        return
    before = signal.signal(signal.SIGUSR1, act)
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    alarm.start()
    try:
        isolator.invoke(time.sleep, 0.4)
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("act", ["terminate", "abort", "close"])
@pytest.mark.parametrize("place", ["callback", "handler"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_ends_the_call_is_as_quick_within_it(act: str, place: str, concurrency: int) -> None:
    """It waited a quarter of a second for the call of its own thread to see the end first."""
    took: list[float] = []

    def within(*_args: object) -> None:
        began = time.monotonic()
        getattr(isolator, act)()
        took.append(time.monotonic() - began)

    with (
        nothing_left(),
        ProcessIsolator.create(max_concurrency=concurrency) as isolator,
        pytest.raises(ChildTerminated),
    ):
        call_within(isolator, place, within)
    assert took[0] < 0.2


# --- waiting -------------------------------------------------------------------------------------------------------


def test_waiting_for_the_exit() -> None:
    """parity: 8"""
    with ProcessIsolator.create() as isolator:
        with pytest.raises(TimeoutError):
            isolator.wait_for_exit(0.2)
        timer = threading.Timer(0.3, isolator.exit, ["later"])
        timer.start()
        assert isolator.wait_for_exit().message == "later"
        timer.join()


def test_waiting_spans_restarts_and_returns_the_final_exit() -> None:
    """parity: 14"""
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(backoff=0.05)) as isolator:
        ends = []
        waiter = threading.Thread(target=lambda: ends.append(isolator.wait_for_exit()))
        waiter.start()
        for _ in range(2):
            time.sleep(0.1)
            pid = isolator.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda old=pid: isolator.pid not in (None, old)), "the waiting thread has started another"
        assert waiter.is_alive()
        isolator.exit("the end")
        waiter.join(5)
        assert [info.message for info in ends] == ["the end"]


def test_an_exit_that_has_happened_is_not_waited_beyond() -> None:
    """parity: 9 (any exit is returned; the call that was running raises)"""
    with ProcessIsolator.create() as isolator:
        os.kill(isolator.pid or 0, signal.SIGKILL)
        assert isolator.wait_for_exit(5).reason is ExitReason.SIGNALED
        with pytest.raises(ChildTerminated) as caught:
            isolator.run_source("import os; os._exit(7)")
        assert isolator.wait_for_exit() == caught.value.exit_info
        assert caught.value.exit_info.exit_code == 7


# --- pause ---------------------------------------------------------------------------------------------------------


def ticks(pids: list[int]) -> int:
    return sum(
        int(field) for pid in pids for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    )


def test_a_paused_child_stands_still() -> None:
    with nothing_left(), ProcessIsolator.create(limits=Limits(cpus=None)) as isolator:
        future = isolator.submit(_count_for_ever)
        assert wait_until(lambda: isolator.state == "busy")
        time.sleep(0.1)
        isolator.pause()
        assert isolator.state == "paused"
        pids = isolator.pids()
        time.sleep(0.1)  # who says that it is stopped may be on its last instructions: a tick of emulated machines
        before = ticks(pids)
        time.sleep(0.3)
        assert ticks(pids) == before
        isolator.resume()
        assert isolator.state == "busy"
        assert wait_until(lambda: ticks(pids) > before + 5)
        future.cancel()


def _count_for_ever() -> None:
    import os

    for _ in range(2):
        os.fork()
    while True:
        pass


def test_calls_wait_while_it_is_paused() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.pause()
        isolator.pause()
        future = isolator.submit(len, "abc")
        time.sleep(0.2)
        assert not future.done()
        assert isolator.state == "paused"
        isolator.resume()
        assert future.result(1) == 3
        assert isolator.state == "ready"
        isolator.resume()


def test_deadlines_run_on_while_it_is_paused() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.pause()
        with pytest.raises(CallTimeout, match=r"after 0.2 s, paused by pause\(\); its child was killed"):
            isolator.invoke(len, "abc", timeout=0.2)
        assert isolator.invoke(len, "abc") == 3, "another child, which is not paused"


ALONE = """
    import sys, time
    from pisupervisor import ProcessIsolator, RemoteError

    def ask():
        import pihost
        return pihost.call_host("f")

    def f():
        isolator.pause()
        if sys.argv[1] == "resumes":
            isolator.resume()
        if sys.argv[1] == "raises":
            raise ValueError("of the callback's own")
        return 5

    with ProcessIsolator.create() as isolator:
        isolator.register_callback("f", f)
        try:
            print(isolator.invoke(ask, timeout=5))
        except RemoteError as error:
            print(error.message)
        print(isolator.state, isolator.invoke(len, "abc"))
"""


@pytest.mark.parametrize(
    ("what", "answer", "logged"),
    [
        ("resumes", "5", ""),
        ("leaves", "the host's function 'f' failed", "call resume() before it returns"),
        ("raises", "the host's function 'f' failed", "ValueError: of the callback's own"),
    ],
)
def test_a_callback_that_leaves_its_child_paused(what: str, answer: str, logged: str) -> None:
    """Where no other thread is there, the call would wait for ever."""
    command = [sys.executable, "-c", textwrap.dedent(ALONE), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == f"{answer}\nready 3\n", done.stderr
    assert logged in done.stderr


def test_another_thread_may_resume_what_a_callback_has_paused() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.register_callback("f", isolator.pause)
        timer = threading.Timer(0.3, isolator.resume)
        timer.start()
        started = time.monotonic()
        assert isolator.invoke(ask, "f", timeout=5) is None
        assert time.monotonic() - started > 0.2
        timer.join()


@pytest.mark.alone
@pytest.mark.unhurried
@pytest.mark.parametrize("end", ["close", "terminate", "abort", "exit", "restart"])
def test_a_paused_child_can_be_ended(end: str) -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        pids = isolator.pids()
        isolator.pause()
        started = time.monotonic()
        getattr(isolator, end)()
        assert time.monotonic() - started < 1
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        isolator.close()


def test_what_is_not_there_cannot_be_paused() -> None:
    with ProcessIsolator.create() as isolator:
        isolator.exit()
        with pytest.raises(IsolationError, match="stopped"):
            isolator.pause()


@pytest.mark.parametrize("killed", ["payload", "init"])
def test_a_paused_child_dies_of_a_kill(killed: str) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid if killed == "payload" else init_of(isolator)
        isolator.pause()
        os.kill(pid or 0, signal.SIGKILL)
        if killed == "payload":
            isolator.resume()  # PID 1 is frozen as well, and cannot see it
        assert wait_until(lambda: isolator.state == "backoff")
        assert isolator.invoke(len, "abc") == 3


def test_an_ordinary_user_pauses_by_signals(monkeypatch: pytest.MonkeyPatch, need: Callable[..., None]) -> None:
    """The same where no v2 group can be made; PID 1 runs on, and with it the lifeline."""
    need("v1")
    with nothing_left(), ProcessIsolator.create() as isolator:
        monkeypatch.setattr(isolator._keeper.template, "features", _without_v2(isolator))
        isolator.pause()
        assert wait_until(lambda: state_of(isolator.pid or 0) == "T")
        assert state_of(init_of(isolator)) in ("S", "R")
        future = isolator.submit(len, "abc")
        time.sleep(0.1)
        assert not future.done()
        isolator.resume()
        assert future.result(1) == 3


def test_where_moving_is_refused_it_is_stopped_by_signals(
    monkeypatch: pytest.MonkeyPatch, need: Callable[..., None]
) -> None:
    """A group can be made there, and frozen, but no process moved into it."""
    need("v1", "limits")  # on v2 nothing is moved: the child's own group is frozen
    from pisupervisor.limits import directories

    original = directories.write

    def write(path: str, *values: bytes) -> None:
        if path.endswith("cgroup.procs"):
            raise PermissionError(13, "Permission denied", path)
        original(path, *values)

    with nothing_left(), ProcessIsolator.create() as isolator:
        monkeypatch.setattr(directories, "write", write)
        isolator.pause()
        assert wait_until(lambda: state_of(isolator.pid or 0) == "T")
        future = isolator.submit(len, "abc")
        time.sleep(0.1)
        assert not future.done()
        isolator.resume()
        assert future.result(1) == 3


def _without_v2(isolator: ProcessIsolator) -> object:
    from dataclasses import replace

    features = isolator._keeper.template.features
    return replace(features, cgroups=features.cgroups._replace(unified=None))


@pytest.mark.root
def test_a_paused_group_is_killed_as_one(need: Callable[..., None]) -> None:
    """cgroup.kill alone, without a word to PID 1."""
    need("v1", "limits")  # on v2 that is its own group, see below
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        pid = isolator.pid or 0
        isolator.pause()
        child = isolator._keeper.child
        assert child is not None
        assert child._freezer is not None
        child._freezer.kill()
        assert wait_until(lambda: state_of(pid) in ("", "Z"), 1)


@pytest.mark.root
def test_a_group_is_killed_as_one(need: Callable[..., None]) -> None:
    """The same for a child that is not paused."""
    need("cgroup_kill")
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        child = isolator._keeper.child
        assert child is not None
        assert child._group is not None
        child._group.kill_at_once()
        assert child.wait(1)


def test_the_group_of_a_pause_goes_with_the_child(need: Callable[..., None]) -> None:
    need("v1", "limits")  # on v2 the child's own group does it
    with ProcessIsolator.create() as isolator:
        before = set(v2_groups())
        isolator.pause()
        assert len(set(v2_groups()) - before) == 1
        isolator.terminate()
        assert v2_groups() == []
    assert own_groups() == []


def v2_groups() -> list[str]:
    from pisupervisor.limits.detect import detect

    base = Path(detect().unified or "/nowhere") / "pisupervisor"
    return [str(path) for path in base.glob(f"{os.getpid()}-*")] if base.is_dir() else []


# --- from several threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["exit", "terminate", "abort", "close", "restart", "pause"])
@pytest.mark.parametrize("second", ["terminate", "close", "restart", "invoke"])
def test_two_at_once(first: str, second: str) -> None:
    """Whatever two threads ask for: both end, with a result or a typed error, and nothing is left."""
    with nothing_left():
        isolator = ProcessIsolator.create()
        acts = {"invoke": lambda: isolator.invoke(len, "abc", timeout=2)}
        strange: list[BaseException] = []
        chosen = [acts.get(name) or getattr(isolator, name) for name in (first, second)]
        threads = [threading.Thread(target=_typed, args=(act, strange)) for act in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        in_thread(isolator.close)
        assert strange == []


def _typed(act: Callable[[], object], strange: list[BaseException]) -> None:
    try:
        act()
    except IsolationError:
        pass
    except BaseException as error:
        strange.append(error)


def test_a_fork_of_the_application_does_not_wait_for_what_it_would_never_be_told() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        assert in_fork(lambda: isolator.wait_for_exit(60)) == "IsolatorClosed"
        assert in_fork(lambda: isolator) == f"<ProcessIsolator {isolator.id}: ready>"
        assert isolator.invoke(len, "abc") == 3
    assert repr(isolator) == f"<ProcessIsolator {isolator.id}: stopped>"
    isolator.wait_for_exit()


@pytest.mark.parametrize("timeout", [-1, "1", math.inf, math.nan, True], ids=repr)
def test_what_is_no_time_to_wait(timeout: Any) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        for act in (isolator.wait_for_exit, isolator.terminate, lambda timeout: isolator.exit(timeout=timeout)):
            with pytest.raises(OptionsError, match="is not a number from 0 to"):
                act(timeout)
        assert isolator.invoke(len, "abc") == 3
