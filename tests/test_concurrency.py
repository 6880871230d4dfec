"""Several threads, the garbage collector and a hostile child at once: nobody harms another's call."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from helpers import wait_until

from pisupervisor import (
    CallCancelled,
    CallTimeout,
    IsolationEvents,
    IsolatorClosed,
    OptionsError,
    ProcessIsolator,
    Security,
)
from pisupervisor.launch import templates
from pisupervisor.options import IsolationOptions

pytestmark = pytest.mark.linux
SLEEP = "import time; time.sleep({})"


@pytest.mark.root
def test_cancelling_a_call_that_waits_kills_nobody_elses() -> None:
    with ProcessIsolator.create() as isolator:
        pid, outcome = isolator.pid, []
        other = threading.Thread(
            target=lambda: outcome.append(isolator.run_source(SLEEP.format(1.5) + "\n'done'").value)
        )
        other.start()
        assert wait_until(lambda: isolator.state == "busy")
        waiting = isolator.submit_call(isolator.run_source, "open('/tmp/ran', 'w')")
        time.sleep(0.15)
        assert waiting.cancel()
        other.join(10)
        assert outcome == ["done"]
        assert isolator.pid == pid
        with pytest.raises(CallCancelled):
            waiting.result()
        time.sleep(0.1)
        assert isolator.run_source("import os; os.path.exists('/tmp/ran')").value is False, "it ran although cancelled"


@pytest.mark.root
def test_submitting_from_many_threads_makes_one_worker() -> None:
    before = threading.active_count()
    with ProcessIsolator.create() as isolator:
        start = threading.Barrier(6)

        def submit() -> None:
            start.wait()
            isolator.submit(abs, -1).result(10)

        threads = [threading.Thread(target=submit) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(IsolatorClosed):
        isolator.submit(abs, -1)


@pytest.mark.root
def test_a_flood_does_not_outlast_the_deadline() -> None:
    flood = (
        "import os, fcntl\nfor fd in (1, 2): fcntl.fcntl(fd, 1031, 1 << 20)\nwhile True: os.write(1, b'x' * (1 << 19))"
    )
    with ProcessIsolator.create(security=Security(seccomp=None)) as isolator:  # which would deny the larger pipes
        for _ in range(3):
            start = time.monotonic()
            with pytest.raises(CallTimeout):
                isolator.run_source(flood, timeout=0.3)
            assert time.monotonic() - start < 1.5


@pytest.mark.root
def test_a_forgotten_isolator_may_be_collected_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last reference goes while this thread starts another template."""
    forgotten = [ProcessIsolator.create(log_level="ERROR")]
    forgotten[0].set_data("me", forgotten[0])
    find = templates.find_interpreter

    def collecting(python: str | None, patience: float | None) -> object:
        forgotten.clear()
        gc.collect()
        return find(python, patience)

    monkeypatch.setattr(templates, "find_interpreter", collecting)
    made: list[int] = []

    def create() -> None:
        with ProcessIsolator.create() as isolator:
            made.append(isolator.run_source("1").value)

    thread = threading.Thread(target=create, daemon=True)
    thread.start()
    thread.join(20)
    assert made == [1], "deadlock"


@pytest.mark.root
def test_who_has_a_template_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread starts a zygote, which may take long. Others open isolators of zygotes that are there, and close them."""
    find, begun, go_on = templates.find_interpreter, threading.Event(), threading.Event()
    was_let_go: list[bool] = []

    def slow(python: str | None, patience: float | None) -> object:
        begun.set()
        was_let_go.append(go_on.wait(10))
        return find(python, patience)

    with ProcessIsolator.create():
        monkeypatch.setattr(templates, "find_interpreter", slow)
        starting = threading.Thread(target=lambda: ProcessIsolator.create(log_level="ERROR").close())
        starting.start()
        try:
            assert begun.wait(20)
            with ProcessIsolator.create() as other:
                assert other.run_source("1").value == 1
        finally:
            go_on.set()
            starting.join(20)
    assert was_let_go == [True]


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), -1.0, 3e6, "soon"])
def test_what_is_no_time_is_refused_before_anything_happens(timeout: object) -> None:
    with pytest.raises(OptionsError, match="timeout"):
        IsolationOptions(call_timeout=timeout)  # type: ignore[arg-type]


@pytest.mark.root
def test_a_call_whose_timeout_is_no_time_harms_no_child() -> None:
    with ProcessIsolator.create() as isolator:
        pid = isolator.pid
        for timeout in (float("inf"), float("nan"), -1.0):
            with pytest.raises(OptionsError, match="timeout"):
                isolator.run_source("1", timeout=timeout)
        assert (isolator.run_source("1").value, isolator.pid) == (1, pid)


@pytest.mark.root
def test_an_environment_too_large_for_a_plan() -> None:
    with pytest.raises(OptionsError, match="too large"):
        ProcessIsolator.create(environment={f"V{number}": "x" * 1000 for number in range(3000)})


@pytest.mark.root
def test_a_child_without_room_for_its_own_stdout_does_not_mix_it_with_stderr() -> None:
    """Two descriptors are sent to it after a captured call, and one arrives: nobody can tell which."""
    lines: list[str] = []

    def use_up() -> None:
        import os
        import sys

        sys.kept = []  # type: ignore[attr-defined]
        try:
            while True:
                sys.kept.append(os.open("/dev/null", 0))  # type: ignore[attr-defined]
        except OSError:
            os.close(sys.kept.pop())  # type: ignore[attr-defined]

    def write(text: bytes) -> None:
        import os

        os.write(2, text)

    def give_back() -> None:
        import os
        import sys

        for fd in sys.kept:  # type: ignore[attr-defined]
            os.close(fd)

    with ProcessIsolator.create(events=IsolationEvents(stdout=lambda event: lines.append(event.line))) as isolator:
        isolator.execute(use_up)
        isolator.invoke(write, b"to stderr\n")
        isolator.invoke(give_back)
        isolator.execute(len, "abc")
        isolator.invoke(lambda: print("to stdout", flush=True))
        assert wait_until(lambda: lines, 5)
    assert lines == ["to stdout"]
