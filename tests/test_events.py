"""What an application is told, when, and what its ``handled`` changes. parity: 36"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from helpers import linux, nothing_left, wait_until, zygote_of

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    CpuLimitExceeded,
    ExitReason,
    IsolationEvents,
    LaunchError,
    Limits,
    OptionsError,
    OutputLimitExceeded,
    ProcessIsolator,
    RestartLimitReached,
    RestartPolicy,
)
from pisupervisor.events import Event
from pisupervisor.limits.cgroups import GroupEvents
from pisupervisor.supervise.watch import reached

pytestmark = linux

KINDS = IsolationEvents.__dataclass_fields__
QUICK = RestartPolicy(backoff=0.01, max_restarts=3)


class Told:
    """Takes down every event; ``handle`` names kinds that it says it has handled."""

    def __init__(self, *handle: str) -> None:
        self.seen: list[Any] = []
        self.handle = handle

    def __call__(self, event: Event) -> None:
        event.handled = event.kind in self.handle
        self.seen.append(event)

    def events(self) -> IsolationEvents:
        return IsolationEvents(**dict.fromkeys(KINDS, self))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.seen]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.seen if event.kind == kind]

    def wait_for(self, kind: str, count: int = 1, seconds: float = 5.0) -> Any:
        assert wait_until(lambda: len(self.of(kind)) >= count, seconds), self.kinds()
        return self.of(kind)[count - 1]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with nothing_left():
        yield


def test_a_life_in_events(told: Told) -> None:
    """Started, a crash, another child, the end: each once, in order, with what belongs to it."""
    with ProcessIsolator.create(events=told.events(), restart=QUICK) as isolator:
        first = isolator.pid
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(3)")
        restarted = told.wait_for("restart")
        second = isolator.pid
        assert isolator.invoke(len, "abc") == 3
        isolator.exit("enough")
    assert told.kinds() == ["started", "exited", "exit_with_error", "restart_attempt", "started", "restart", "exited"]
    assert {event.isolator_id for event in told.seen} == {isolator.id}
    assert [event.pid for event in told.of("started")] == [first, second]
    assert (restarted.old_pid, restarted.pid) == (first, second)
    attempt = told.of("restart_attempt")[0]
    assert (attempt.attempt, attempt.max_restarts, attempt.exit_info.exit_code) == (1, 3, 3)
    assert 0 <= attempt.delay <= 0.01
    crash, last = told.of("exited")
    assert (crash.pid, crash.exit_info.exit_code, last.pid, last.exit_info.message) == (first, 3, second, "enough")
    assert told.of("exit_with_error")[0].exit_info == crash.exit_info


def test_a_child_that_dies_while_nobody_calls_is_replaced(told: Told) -> None:
    with ProcessIsolator.create(events=told.events(), restart=QUICK) as isolator:
        first = isolator.pid or 0
        os.kill(first, signal.SIGKILL)
        assert told.wait_for("restart").old_pid == first
        assert isolator.pid not in (None, first)


def test_a_zygote_that_dies_while_nobody_calls_is_replaced(told: Told) -> None:
    with ProcessIsolator.create(events=told.events(), restart=QUICK) as isolator:
        os.kill(zygote_of(isolator), signal.SIGKILL)
        assert told.wait_for("exited").exit_info.reason is ExitReason.ZYGOTE_GONE
        told.wait_for("restart")
        assert isolator.invoke(len, "abc") == 3


def test_too_many_crashes(told: Told) -> None:
    """parity: 13. The caller is told, and the application: once."""
    policy = RestartPolicy(max_restarts=2, backoff=0.0)
    with ProcessIsolator.create(events=told.events(), restart=policy) as isolator:
        for number in range(1, 4):
            pid = isolator.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            told.wait_for("exit_with_error", number)
            assert wait_until(lambda old=pid: isolator.pid not in (None, old) or isolator.state == "failed")
        exceeded = told.wait_for("restart_attempts_exceeded")
        assert (exceeded.attempts, exceeded.exit_info.signal) == (3, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(RestartLimitReached, match="3 crashes within 60 s"):
                isolator.invoke(len, "abc")
        assert isolator.state == "failed"
        isolator.restart()
        assert isolator.invoke(len, "abc") == 3
    assert len(told.of("restart_attempts_exceeded")) == 1


def test_attempts_exceeded_and_handled_begin_anew() -> None:
    told = Told("restart_attempts_exceeded")
    policy = RestartPolicy(max_restarts=0, backoff=0.0)
    with ProcessIsolator.create(events=told.events(), restart=policy) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(3)")
        told.wait_for("restart_attempts_exceeded")
        assert wait_until(lambda: isolator.state == "ready")
        assert isolator.invoke(len, "abc") == 3


def test_handled_crashes_do_not_count() -> None:
    """parity: 9"""
    told = Told("exit_with_error")
    with ProcessIsolator.create(events=told.events(), restart=RestartPolicy(max_restarts=1, backoff=0.05)) as isolator:
        for number in range(1, 5):
            with pytest.raises(ChildTerminated):
                isolator.run_source("import os; os._exit(3)")
            told.wait_for("exit_with_error", number)
            assert isolator.invoke(len, "abc") == 3
    assert not told.of("restart_attempts_exceeded")


def test_a_launch_that_fails(told: Told) -> None:
    with pytest.raises(LaunchError):
        ProcessIsolator.create(events=told.events(), on_start=_raise)
    failed = told.wait_for("start_failed")
    assert failed.error.step == "on_start"
    assert told.kinds() == ["start_failed"]


def _raise() -> None:
    raise ValueError("not today")


# --- lines ---------------------------------------------------------------------------------------------------------


def test_lines_of_both_streams(told: Told) -> None:
    """parity: 35"""
    with ProcessIsolator.create(events=told.events()) as isolator:
        isolator.invoke(_write, 1, b"one\ntwo\n\nthr")
        isolator.invoke(_write, 1, b"ee\n")
        isolator.invoke(_write, 2, b"caf\xc3\xa9 \xff\nunfinished")
        told.wait_for("stdout", 4)
        told.wait_for("stderr", 1)
        pid = isolator.pid
        isolator.terminate()
    assert [event.line for event in told.of("stdout")] == ["one", "two", "", "three"]
    assert [event.line for event in told.of("stderr")] == ["café \ufffd", "unfinished"]
    assert {event.pid for event in told.of("stdout")} == {pid}
    assert told.of("exited")[0].exit_info.stderr_tail.endswith("unfinished")
    kinds = told.kinds()
    assert kinds.index("exited") > max(number for number, kind in enumerate(kinds) if kind == "stderr")


def _write(fd: int, text: bytes) -> None:
    import os

    while text:
        text = text[os.write(fd, text) :]


@pytest.mark.parametrize("most", [1, 2])
def test_a_line_is_told_when_it_is_printed(most: int) -> None:
    """Not when the buffer is full, the next captured call comes, or never: what a child printed last was lost."""
    lines: list[str] = []
    events = IsolationEvents(stdout=lambda event: lines.append(event.line))
    with ProcessIsolator.create(events=events, max_concurrency=most) as isolator:
        isolator.invoke(print, "after the call")
        assert wait_until(lambda: lines == ["after the call"])
        future = isolator.submit(lambda: (print("in the middle"), time.sleep(1000)))
        assert wait_until(lambda: lines[1:] == ["in the middle"])
        assert not future.done()


def test_a_megabyte_without_a_line_end(told: Told) -> None:
    """parity: 35"""
    with ProcessIsolator.create(events=told.events()) as isolator:
        isolator.invoke(_write, 1, b"x" * (1 << 20) + b"\nend\n", timeout=20)
        assert wait_until(lambda: "end" in [event.line for event in told.of("stdout")])
    lines = [event.line for event in told.of("stdout")]
    assert "".join(lines[:-1]) == "x" * (1 << 20)
    assert max(len(line) for line in lines) <= 1 << 16


def test_lines_between_captured_calls(told: Told) -> None:
    """A captured call's output is its own; before and after it lines are events again."""
    with ProcessIsolator.create(events=told.events()) as isolator:
        isolator.invoke(_write, 1, b"before\n")
        assert isolator.execute(_write, 1, b"within\n").stdout == "within\n"
        isolator.invoke(_write, 1, b"after\n")
        told.wait_for("stdout", 2)
    assert [event.line for event in told.of("stdout")] == ["before", "after"]


def test_a_slow_handler_slows_the_child_and_loses_nothing() -> None:
    seen: list[str] = []

    def slow(event: Any) -> None:
        time.sleep(0.001)
        seen.append(event.line)

    with ProcessIsolator.create(events=IsolationEvents(stdout=slow)) as isolator:
        isolator.invoke(_write, 1, b"".join(b"%d %s\n" % (number, b"x" * 1000) for number in range(300)), timeout=20)
        assert wait_until(lambda: len(seen) == 300)
    assert [int(line.split()[0]) for line in seen] == list(range(300))


def test_without_handlers_the_end_of_stderr_is_kept() -> None:
    with ProcessIsolator.create() as isolator:
        threads = threading.active_count()
        with pytest.raises(ChildTerminated) as caught:
            isolator.invoke(_last_words, 3)
        tail = caught.value.exit_info.stderr_tail
        assert tail.endswith("line 999\nlast words\n")
        assert len(tail) == 4096
        assert threading.active_count() == threads


def _last_words(code: int) -> None:
    import os
    import sys

    for number in range(1000):
        print("line", number, file=sys.stderr)
    os.write(2, b"last words\n")
    os._exit(code)


def test_a_killed_childs_last_words_are_there_too() -> None:
    with ProcessIsolator.create() as isolator:
        isolator.invoke(_write, 2, b"what I wanted to say\n")
        assert wait_until(lambda: isolator._keeper.child._output.tail() != "")  # type: ignore[union-attr]
        os.kill(isolator.pid or 0, signal.SIGKILL)
        assert isolator.wait_for_exit(5).stderr_tail == "what I wanted to say\n"


def test_a_captured_calls_stderr_is_its_tail() -> None:
    with ProcessIsolator.create() as isolator:
        with pytest.raises(ChildTerminated) as caught:
            isolator.run_source("import os; os.write(2, b'in the call'); os._exit(3)")
        assert caught.value.exit_info.stderr_tail == caught.value.stderr == "in the call"


# --- limits --------------------------------------------------------------------------------------------------------


def test_every_counter_that_grew_is_told_once() -> None:
    before = GroupEvents(oom_kills=1, pids_max=2, throttled=3, throttled_time=0.5, memory_high=4)
    assert reached(before, before) == []
    now = GroupEvents(oom_kills=2, pids_max=4, throttled=6, throttled_time=0.75, memory_high=8)
    told = {name: (count, words) for name, count, words in reached(before, now)}
    assert {name: count for name, (count, _words) in told.items()} == {
        "memory": 1,
        "memory_high": 4,
        "pids": 2,
        "cpus": 3,
    }
    assert told["cpus"][1] == "held back for 0.25 s"


@pytest.mark.root
def test_a_refused_fork_is_an_event_and_a_flag(told: Told) -> None:
    """parity: 33. It kills nobody: the call may go on and succeed."""
    with ProcessIsolator.create(events=told.events(), limits=Limits(pids=8)) as isolator:
        assert isolator.applied["pids"].reached == 0
        assert isolator.invoke(_fork_until_refused) == 6
        event = told.wait_for("limit", seconds=1.0)
        assert (event.limit, event.count >= 1) == ("pids", True)
        assert isolator.applied["pids"].reached >= 1
        assert isolator.invoke(len, "abc") == 3


@pytest.mark.root
def test_a_limit_reached_right_before_the_end_is_told(told: Told) -> None:
    """The watch looks four times a second: what it has not seen is told with the end, whoever ordered that."""
    with ProcessIsolator.create(events=told.events(), limits=Limits(pids=8)) as isolator:
        isolator.invoke(_fork_until_refused)
        isolator.restart()
        assert told.wait_for("exited").exit_info.reason is ExitReason.KILLED
        assert [event.limit for event in told.of("limit")].count("pids") == 1
        isolator.invoke(_fork_until_refused)
    told.wait_for("exited", 2)
    assert [event.limit for event in told.of("limit")].count("pids") == 2


def _fork_until_refused() -> int:
    import os
    import time

    for number in range(100):
        try:
            if os.fork() == 0:
                time.sleep(1000)
        except OSError:
            return number
    return -1


@pytest.mark.root
def test_a_memory_kill_is_an_event(told: Told) -> None:
    """parity: 33"""
    with ProcessIsolator.create(events=told.events(), limits=Limits(memory="64M")) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.run_source("x = bytearray(1 << 30)")
        assert told.wait_for("limit", seconds=1.0).limit == "memory"
        assert told.wait_for("exited").exit_info.reason is ExitReason.MEMORY


@pytest.mark.root
def test_being_held_back_is_an_event(told: Told) -> None:
    """parity: 33"""
    with ProcessIsolator.create(events=told.events(), limits=Limits(cpus=0.1)) as isolator:
        future = isolator.submit_call(isolator.run_source, "while True: pass")
        event = told.wait_for("limit", seconds=2.0)
        assert (event.limit, "held back" in event.detail) == ("cpus", True)
        future.cancel()


def test_too_much_output_is_an_event_and_a_flag(told: Told) -> None:
    with ProcessIsolator.create(events=told.events(), limits=Limits(output="1K")) as isolator:
        assert isolator.execute(_write, 1, b"x" * 5000).truncated
        assert told.wait_for("limit").limit == "output"


@pytest.mark.parametrize("end", ["os._exit(3)", "time.sleep(60)"])
def test_so_it_is_when_the_call_then_fails(told: Told, end: str) -> None:
    with ProcessIsolator.create(events=told.events(), limits=Limits(output="1K")) as isolator:
        with pytest.raises((OutputLimitExceeded, CallTimeout)) as caught:
            isolator.run_source(f"import os, time\nos.write(1, bytes(5000))\n{end}", timeout=1)
        assert caught.value.truncated
        told.wait_for("exited")
    assert [event.limit for event in told.of("limit")] == ["output"]


def test_used_up_cpu_time_is_an_event_once(told: Told) -> None:
    """parity: 33"""
    with ProcessIsolator.create(events=told.events(), limits=Limits(cpu_time=1, cpus=None)) as isolator:
        with pytest.raises(CpuLimitExceeded):
            isolator.run_source("while True: pass")
        told.wait_for("exited")
    assert [event.limit for event in told.of("limit")].count("cpu_time") == 1


# --- handlers ------------------------------------------------------------------------------------------------------


def test_a_handler_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """parity: 36"""

    def broken(event: Event) -> None:
        raise RuntimeError("the application's own defect")

    with caplog.at_level(logging.ERROR, "pisupervisor"):
        events = IsolationEvents(**dict.fromkeys(KINDS, broken))
        with ProcessIsolator.create(events=events, restart=QUICK) as isolator:
            with pytest.raises(ChildTerminated):
                isolator.run_source("import os; os._exit(3)")
            assert isolator.invoke(len, "abc") == 3
    assert "the application's own defect" in caplog.text


def test_a_coroutine_function_runs_in_the_loop_of_its_isolator() -> None:
    """parity: 36"""
    seen: list[tuple[str, bool]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def handler(event: Event) -> None:
            await asyncio.sleep(0)
            seen.append((event.kind, asyncio.get_running_loop() is loop))

        isolator = ProcessIsolator.create(events=IsolationEvents(started=handler, exited=handler))
        while not seen:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(isolator.close)

    asyncio.run(main())
    assert seen == [("started", True), ("exited", True)]


def test_a_mock_as_a_handler() -> None:
    """Which has every attribute that it is asked for."""
    handler, awaited = Mock(), AsyncMock()

    async def main() -> None:
        isolator = ProcessIsolator.create(events=IsolationEvents(started=handler, exited=awaited))
        await asyncio.to_thread(isolator.close)

    asyncio.run(main())
    assert [call.args[0].kind for call in (handler.call_args, awaited.await_args)] == ["started", "exited"]


def test_a_coroutine_function_without_a_loop() -> None:
    seen: list[str] = []

    async def handler(event: Event) -> None:
        await asyncio.sleep(0)
        seen.append(event.kind)

    ProcessIsolator.create(events=IsolationEvents(started=handler, exited=handler)).close()
    assert seen == ["started", "exited"]


def test_closing_in_the_loop_does_not_wait_for_it() -> None:
    async def main() -> float:
        async def handler(event: Event) -> None:
            await asyncio.sleep(0)

        isolator = ProcessIsolator.create(events=IsolationEvents(started=handler, exited=handler))
        started = time.monotonic()
        isolator.close()
        return time.monotonic() - started

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            assert asyncio.run(main()) < 2
        gc.collect()
    assert [str(warning.message) for warning in caught if "never awaited" in str(warning.message)] == []


def test_a_handler_may_use_its_isolator() -> None:
    answers: list[object] = []
    isolators: list[ProcessIsolator] = []

    def handler(event: Event) -> None:
        answers.append(isolators[0].invoke(len, "abcd"))

    events = IsolationEvents(exit_with_error=handler)
    with ProcessIsolator.create(events=events, restart=RestartPolicy(backoff=0)) as isolator:
        isolators.append(isolator)
        with pytest.raises(ChildTerminated):
            isolator.run_source("import os; os._exit(3)")
        assert wait_until(lambda: answers == [4])


def test_a_handler_may_close_its_isolator() -> None:
    isolators: list[ProcessIsolator] = []
    events = IsolationEvents(exit_with_error=lambda event: isolators[0].close())
    isolators.append(ProcessIsolator.create(events=events))
    with pytest.raises(ChildTerminated):
        isolators[0].run_source("import os; os._exit(3)")
    assert wait_until(lambda: isolators[0].state == "stopped")


@pytest.mark.parametrize("wrong", [{"started": 3}, {"stdout": "print"}])
def test_what_is_no_handler(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=next(iter(wrong))):
        IsolationEvents(**wrong)


def test_events_must_be_events() -> None:
    with pytest.raises(OptionsError, match="IsolationEvents"):
        ProcessIsolator.create(events={"started": print})  # type: ignore[arg-type]


# --- die together --------------------------------------------------------------------------------------------------

APPLICATION = """
    import os, signal, sys, time
    from pisupervisor import *
    def handled(event):
        event.handled = sys.argv[1] == "handled"
    isolator = ProcessIsolator.create(die_on_crash=True, events=IsolationEvents(exit_with_error=handled))
    os.kill(isolator.pid, int(sys.argv[2]))
    time.sleep(2)
    print("still here", isolator.invoke(len, "abc"))
"""


@pytest.mark.parametrize(
    ("how", "number", "code", "said"),
    [("not", signal.SIGKILL, -signal.SIGTERM, ""), ("handled", signal.SIGKILL, 0, "still here 3\n")],
)
def test_an_application_that_dies_with_its_child(how: str, number: int, code: int, said: str) -> None:
    """parity: 12"""
    command = [sys.executable, "-c", textwrap.dedent(APPLICATION), how, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
