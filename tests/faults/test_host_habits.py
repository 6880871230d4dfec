"""What a host application may do, or omit, without harm: forks, ignored signals, interrupts, thousands of descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    in_fork,
    in_thread,
    leftovers,
    nothing_left,
    resident,
    spare_is_there,
    state_of,
    wait_until,
    zygote_of,
)  # fmt: skip

from pisupervisor import (
    ChildTerminated,
    IsolatorClosed,
    ProcessIsolator,
    RestartPolicy,
    Template,
)

pytestmark = pytest.mark.linux
INSIDE = Path(__file__).parent.with_name("inside.py")
Spoil = Callable[[str, str, Any], None]


def test_two_hundred_children_leave_nothing() -> None:
    with Template() as template:
        for _ in range(20):
            template.create().close()
        assert wait_until(spare_is_there)
        before, memory = leftovers(), resident()
        for number in range(200):
            with template.create() as isolator:
                if number % 10 == 0:
                    assert isolator.run_source("1").value == 1
        assert wait_until(spare_is_there)
        after = leftovers()
        assert resident() - memory < 5 << 20
        assert (after.threads, after.mounts) == (before.threads, before.mounts)
        assert (len(after.fds), len(after.groups)) == (len(before.fds), len(before.groups))


def test_twenty_zygotes_leave_nothing() -> None:
    with nothing_left():
        for _ in range(20):
            ProcessIsolator.create().close()


def test_children_ignored_by_the_application() -> None:
    """SIGCHLD ignored means that the kernel reaps, and statuses are lost: ours do not come from there."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="always")) as isolator:
            with pytest.raises(ChildTerminated) as caught:
                isolator.invoke_method(INSIDE, "leave", 3)
            assert caught.value.exit_info.exit_code == 3
            assert isolator.run_source("1").value == 1
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_application_that_reaps_everything() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        os.kill(zygote_of(isolator), signal.SIGKILL)
        os.waitpid(-1, 0)
        assert wait_until(lambda: state_of(isolator.pid or 0) in ("", "Z"))
        assert isolator.run_source("1").value == 1


def test_made_in_a_thread_that_has_ended() -> None:
    """A death signal towards the host would fire here: it is a thread's end that counts, not the process's."""
    made: list[ProcessIsolator] = []
    with nothing_left():
        in_thread(lambda: made.append(ProcessIsolator.create()))
        time.sleep(0.1)
        with made.pop() as isolator:
            pid = isolator.pid
            assert isolator.run_source("1").value == 1
            assert isolator.pid == pid


def test_a_fork_of_the_application() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        assert in_fork(lambda: isolator.run_source("1")) == "IsolatorClosed"
        assert in_fork(lambda: isolator.submit(len, [])) == "IsolatorClosed"
        assert in_fork(isolator.close) == "None"
        assert in_fork(_with_a_child_of_its_own) == "42"
        assert (isolator.run_source("1").value, isolator.pid) == (1, pid)
        isolator.terminate()
        assert isolator.run_source("2").value == 2, "the zygote is the original's still"


def _with_a_child_of_its_own() -> int:
    with ProcessIsolator.create() as isolator:
        value: int = isolator.run_source("6 * 7").value
        return value


def test_an_application_with_thousands_of_descriptors() -> None:
    with nothing_left():
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            with ProcessIsolator.create() as isolator:
                assert isolator.execute(f"{INSIDE}:talk").value == "value"
                isolator.terminate()
                assert isolator.submit(len, "abc").result(5) == 3
        finally:
            for fd in kept:
                os.close(fd)


def test_an_interrupted_call() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            isolator.invoke(time.sleep, 1000)
        timer.join()
        assert not os.path.exists(f"/proc/{pid}")
        assert isolator.run_source("1").value == 1


def test_closed_by_another_thread_in_a_call() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        timer = threading.Timer(0.2, isolator.close)
        timer.start()
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            isolator.invoke(time.sleep, 1000)
        timer.join()


def test_a_host_that_just_ends() -> None:
    """Without close(): the interpreter's exit is enough."""
    source = "from pisupervisor import ProcessIsolator as P; i = P.create(); print(i._keeper.template.zygote.pid)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert wait_until(lambda: state_of(int(done.stdout)) in ("", "Z"), 2)
    assert done.stderr == ""
