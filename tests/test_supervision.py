"""Restarts, what survives them, limits on time, usage: a supervised child over its lives."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import leftovers, linux, nothing_left, resident, spare_is_there, start_without, state_of, wait_until

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    CpuLimitExceeded,
    ExitReason,
    Filesystem,
    IoLimit,
    LaunchError,
    Limits,
    MemoryLimitExceeded,
    OptionsError,
    OutputLimitExceeded,
    PidsLimitExceeded,
    ProcessIsolator,
    RestartLimitReached,
    RestartPolicy,
    Template,
)

pytestmark = linux

CRASH = "import os; os._exit(3)"
QUICK = RestartPolicy(backoff=0.0)


def crash(isolator: ProcessIsolator) -> ChildTerminated:
    with pytest.raises(ChildTerminated) as caught:
        isolator.run_source(CRASH)
    return caught.value


# --- restarts ------------------------------------------------------------------------------------------------------


def test_a_crash_is_made_good_by_the_next_call() -> None:
    """parity: 13"""
    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        first = isolator.pid
        os.kill(first or 0, signal.SIGKILL)
        assert wait_until(lambda: isolator.pid != first)
        assert isolator.invoke(len, "abc") == 3
        assert isolator.pid not in (None, first)


def test_the_eleventh_crash_is_one_too_many() -> None:
    """parity: 13. The caller gets it, whoever that is."""
    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        for _ in range(11):
            crash(isolator)
        with pytest.raises(RestartLimitReached):
            isolator.invoke(len, "abc")
        with pytest.raises(RestartLimitReached):
            isolator.submit(len, "abc").result(5)
        assert isolator.state == "failed"


def test_never_means_never() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        crash(isolator)
        assert isolator.state == "stopped"


def test_always_starts_another_while_nobody_calls() -> None:
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="always", backoff=0.0)) as isolator:
        first = isolator.pid
        isolator.exit()
        assert isolator.state == "stopped", "an exit that was asked for stands"
        isolator.restart()
        second = isolator.pid
        os.kill(second or 0, signal.SIGKILL)
        assert wait_until(lambda: isolator.pid not in (None, first, second))


def test_the_backoff_is_waited_for() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.3)) as isolator:
        crash(isolator)
        started = time.monotonic()
        assert isolator.invoke(len, "abc") == 3
        assert time.monotonic() - started > 0.2
        crash(isolator)
        with pytest.raises(CallTimeout, match="after the deadline"):
            isolator.invoke(len, "abc", timeout=0.1)


def test_idempotent_calls_are_repeated_and_others_fail_once(tmp_path: Path) -> None:
    """parity: 15"""
    counter = tmp_path / "counter"
    counter.write_bytes(b"")
    counter.chmod(0o666)
    tmp_path.chmod(0o755)
    files = Filesystem(writable=[counter])
    with nothing_left(), ProcessIsolator.create(restart=QUICK, filesystem=files) as isolator:
        assert isolator.invoke(_third_time_lucky, str(counter), idempotent=True) == 3
        counter.write_bytes(b"")
        with pytest.raises(ChildTerminated):
            isolator.invoke(_third_time_lucky, str(counter))
        assert counter.stat().st_size == 1


def _third_time_lucky(path: str) -> int:
    import os

    with open(path, "ab") as file:
        file.write(b"x")
    count = os.stat(path).st_size
    if count < 3:
        os._exit(3)
    return count


def test_a_call_that_kills_every_child_gives_up() -> None:
    policy = RestartPolicy(max_restarts=2, backoff=0.0)
    with ProcessIsolator.create(restart=policy) as isolator, pytest.raises(RestartLimitReached):
        isolator.invoke(os._exit, 3, idempotent=True)


def test_data_and_on_start_are_there_again() -> None:
    """parity: 15, 20"""
    with nothing_left(), ProcessIsolator.create(restart=QUICK, on_start=_prepare) as isolator:
        isolator.set_data("name", {"a": 1})
        assert isolator.get_data("missing") is None
        for _ in range(2):
            assert isolator.invoke(_prepared) == "prepared"
            crash(isolator)
        isolator.terminate()
        assert isolator.invoke(_prepared) == "prepared"
        assert isolator.get_data("name") == {"a": 1}


def _prepare() -> None:
    import sys

    sys.prepared = "prepared"  # type: ignore[attr-defined]


def _prepared() -> object:
    import sys

    return getattr(sys, "prepared", None)


@pytest.mark.parametrize(
    ("on_start", "said"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: os._exit(1), "died in on_start"),
        (lambda: time.sleep(9), "not over"),
    ],
)
def test_an_on_start_that_fails_is_a_failed_launch(on_start: Any, said: str) -> None:
    with nothing_left():
        with pytest.raises(LaunchError, match=said) as caught:
            ProcessIsolator.create(on_start=on_start, start_timeout=1.0)
        assert caught.value.step == "on_start"


def test_a_spare_child_has_begun_too() -> None:
    with nothing_left(), Template(on_start=_prepare) as template:
        for _ in range(3):
            with template.create() as isolator:
                assert isolator.invoke(_prepared) == "prepared"


@pytest.mark.parametrize("wrong", [{"on_start": 3}, {"idle_timeout": -1}, {"max_calls": 0}, {"die_on_crash": "yes"}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=next(iter(wrong))):
        ProcessIsolator.create(**wrong)


def test_a_child_serves_so_many_calls_and_no_more() -> None:
    with nothing_left(), ProcessIsolator.create(max_calls=3, restart=RestartPolicy(max_restarts=0)) as isolator:
        pids = [(isolator.pid, isolator.invoke(len, "abc"))[0] for _ in range(2)]
        pids += [isolator.invoke(os.getpid) and isolator.pid]
        assert (len(set(pids)), isolator.pid, isolator.state) == (2, None, "stopped")
        assert [isolator.invoke(len, "abc") for _ in range(7)] == [3] * 7


def _count_calls(_item: int, calls: list[int] = []) -> int:  # noqa: B006 - one list in each child
    calls.append(1)
    return len(calls)


def test_a_map_goes_on_where_its_child_has_served_enough_calls() -> None:
    """No call is sent to a child that will not live to answer it."""
    with ProcessIsolator.create(max_calls=4) as isolator:
        assert list(isolator.map(_count_calls, range(10))) == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
        isolator.restart()
        with isolator.map(_count_calls, range(10), in_flight=3) as results:
            assert next(results) == 1
            assert isolator.invoke(len, "abc") == 3, "behind those that are under way"
            assert sorted(results)[-1] == 4
    with ProcessIsolator.create(max_calls=1) as isolator:
        assert list(isolator.map(_count_calls, range(3))) == [1, 1, 1]


def _count(n: int) -> Iterator[int]:
    yield from range(n)


def test_a_stream_is_one_call_and_is_not_ended_in_the_middle() -> None:
    """Neither as one call too many, nor as idle while its reader does something else."""
    with ProcessIsolator.create(max_calls=2) as isolator:
        first = isolator.pid
        with isolator.invoke(_count, 10) as stream:
            assert list(stream) == list(range(10))
        assert isolator.pid == first, "that was one call"
        stream = isolator.invoke(_count, 10)
        assert [isolator.invoke(len, "abc") for _ in range(5)] == [3] * 5
        assert list(stream) == list(range(10))
        assert isolator.invoke(len, "abc") == 3
        assert isolator.pid is None, "these were more than two"
    with ProcessIsolator.create(idle_timeout=0.1) as isolator:
        stream = isolator.invoke(_count, 2)
        time.sleep(0.3)
        assert next(stream) == 0
        time.sleep(0.3)
        assert next(stream) == 1
        stream.close()
        assert wait_until(lambda: isolator.pid is None)
        isolator.invoke(_count, 2)  # nobody holds it
        assert wait_until(lambda: isolator.pid is None)


# --- reasons -------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_process_limit_is_the_reason_only_of_a_call_that_fails() -> None:
    with ProcessIsolator.create(limits=Limits(pids=8), restart=QUICK) as isolator:
        with pytest.raises(PidsLimitExceeded, match="was refused"):
            isolator.invoke(_fork_until_refused, True)
        assert isolator.invoke(_fork_until_refused, False) == 6, "a call that succeeds"
        time.sleep(0.02)
        with pytest.raises(CallTimeout) as caught:
            isolator.invoke(time.sleep, 1000, timeout=0.1)
        assert caught.value.exit_info.reason is ExitReason.TIMEOUT, "that was another call"
        with pytest.raises(CallTimeout, match="process limit") as caught:
            isolator.invoke(_fork_until_refused_and_wait, timeout=0.3)
        assert (caught.value.exit_info.reason, caught.value.exit_info.ordered) == (ExitReason.PIDS, True)
        isolator.restart()
        assert isolator.invoke(_fork_until_refused, False) == 6
        assert isolator.terminate()
        assert isolator.wait_for_exit().reason is ExitReason.KILLED


def _fork_until_refused(die: bool) -> int:
    import os
    import time

    for number in range(100):
        try:
            if os.fork() == 0:
                time.sleep(1000)
        except OSError:
            if die:
                os._exit(1)
            return number
    return -1


def _fork_until_refused_and_wait() -> None:
    import os
    import time

    try:
        while os.fork():
            pass
    except OSError:
        pass
    time.sleep(1000)


def test_an_output_limit_is_the_reason_only_of_a_call_that_fails() -> None:
    with ProcessIsolator.create(limits=Limits(output="1K"), restart=QUICK) as isolator:
        assert isolator.run_source("print('x' * 5000)").truncated
        with pytest.raises(OutputLimitExceeded) as caught:
            isolator.run_source("import os; os.write(1, b'x' * 5000); os._exit(1)")
        assert (len(caught.value.stdout), caught.value.truncated) == (1024, True)
        with pytest.raises(CallTimeout, match="output limit"):
            isolator.run_source("while True: print('x' * 5000)", timeout=0.3)


@pytest.mark.root
def test_memory_comes_before_the_deadline() -> None:
    """A process of the child was killed at the limit, and the child waited for it until the deadline."""
    with ProcessIsolator.create(limits=Limits(memory="64M"), restart=QUICK) as isolator:
        with pytest.raises(CallTimeout, match="memory limit") as caught:
            isolator.invoke(_lose_a_process_and_wait, timeout=0.7)
        assert caught.value.exit_info is not None
        assert caught.value.exit_info.reason is ExitReason.MEMORY


@pytest.mark.root
@pytest.mark.parametrize("capture", [False, True])
def test_who_loses_a_process_to_its_memory_limit_is_ended_whole(capture: bool) -> None:
    """As v2 does with memory.oom.group: nobody waits for ever for the part that is gone."""
    with nothing_left(), ProcessIsolator.create(limits=Limits(memory="64M"), restart=QUICK) as isolator:
        started = time.monotonic()
        with pytest.raises(MemoryLimitExceeded, match="the rest was ended"):
            (isolator.execute if capture else isolator.invoke)(_lose_a_process_and_wait)
        assert time.monotonic() - started < 4
        assert isolator.invoke(len, "abc") == 3


def _lose_a_process_and_wait() -> None:
    import os
    import time

    if os.fork() == 0:
        bytearray(1 << 30)
    time.sleep(1000)


def test_the_same_end_for_everyone_who_asks() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        infos: list[Any] = []
        threads = [threading.Thread(target=lambda: infos.append(isolator.wait_for_exit())) for _ in range(4)]
        for thread in threads:
            thread.start()
        infos.append(crash(isolator).exit_info)
        for thread in threads:
            thread.join(5)
        assert len(infos) == 5
        assert {(info.exit_code, info.reason, info.duration) for info in infos} == {
            (3, ExitReason.EXITED, infos[0].duration)
        }


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("processes", [1, 4])
def test_cpu_time_is_the_whole_childs(processes: int) -> None:
    """parity: 30. RLIMIT_CPU alone would give each process its own budget."""
    limits = Limits(cpu_time=0.5, cpus=None)
    with nothing_left(), ProcessIsolator.create(limits=limits, restart=QUICK) as isolator:
        with pytest.raises(CpuLimitExceeded) as caught:
            isolator.invoke(_burn, processes, timeout=20)
        info = caught.value.exit_info
        assert info.reason is ExitReason.CPU_TIME
        assert info.cpu_time is not None
        assert 0.45 <= info.cpu_time < 1.2
        assert isolator.invoke(len, "abc") == 3


def _burn(processes: int) -> None:
    import os

    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    while True:
        pass


def test_cpu_time_of_one_process_needs_no_group() -> None:
    with (
        nothing_left(),
        start_without("limits", limits=Limits(cpu_time=1.0)) as isolator,
        pytest.raises(CpuLimitExceeded),
    ):
        isolator.invoke(_burn, 1, timeout=20)


@pytest.mark.parametrize("orphans", [False, True])
def test_without_a_group_it_is_the_whole_childs_too(orphans: bool) -> None:
    """The payload itself only sleeps; RLIMIT_CPU would let each of the others have a second, and their children another."""
    limits = Limits(cpu_time=0.5, cpus=None)
    with (
        nothing_left(),
        start_without("limits", limits=limits, restart=QUICK) as isolator,
        pytest.raises(CpuLimitExceeded),
    ):
        isolator.invoke(_have_burnt, orphans, timeout=4)


def test_resource_usage_counts_living_processes_without_a_group() -> None:
    with nothing_left(), start_without("limits") as isolator:
        future = isolator.submit(_have_burnt, True)
        assert wait_until(lambda: (isolator.resource_usage().cpu_time or 0) > 0.2)
        future.cancel()


def test_a_kill_at_a_deadline_tells_the_cpu_time_without_a_group() -> None:
    """The zygote cannot: what dies with PID 1 is reaped by the kernel, and in no rusage."""
    with nothing_left(), start_without("limits", limits=Limits(cpus=None), restart=QUICK) as isolator:
        with pytest.raises(CallTimeout) as caught:
            isolator.invoke(_have_burnt, True, timeout=1)
        assert caught.value.exit_info is not None
        assert (caught.value.exit_info.cpu_time or 0) > 0.3
        assert isolator.invoke(len, "abc") == 3


def _have_burnt(orphans: bool) -> None:
    import os
    import time

    for _ in range(2):
        if os.fork() == 0:
            if orphans and os.fork():
                os._exit(0)
            while True:
                pass
    time.sleep(1000)


STUBBORN = {
    "a loop": "while True: pass",
    "in C": "sum(range(10**12))",
    "blocked in the kernel": "import os; r, w = os.pipe(); os.read(r, 1)",
    "deaf": "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "with a family": "import os\nfor _ in range(3):\n  if os.fork() == 0: os.setsid()\nwhile True: pass",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.alone
@pytest.mark.parametrize("what", STUBBORN)
def test_a_deadline_kills(what: str) -> None:
    """Also what is stopped, deaf or many; soon after the deadline (50 ms on a quiet machine)."""
    with nothing_left(), ProcessIsolator.create() as isolator:
        started = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            isolator.run_source(STUBBORN[what], timeout=0.3)
        assert 0.3 <= time.monotonic() - started < 0.8
        info = caught.value.exit_info
        assert info is not None
        assert (info.reason, info.ordered) == (ExitReason.TIMEOUT, True)
        assert isolator.invoke(len, "abc") == 3


@pytest.mark.root
@pytest.mark.alone
def test_a_deadline_is_kept_by_a_child_whose_quota_is_used_up() -> None:
    """Dying takes CPU time too: ten loops at 0.1 cores were dead 200 ms after the deadline, now 50."""
    late = []
    with nothing_left(), ProcessIsolator.create(limits=Limits(cpus=0.1), restart=QUICK) as isolator:
        for _ in range(5):
            assert isolator.invoke(len, "abc") == 3
            started = time.monotonic()
            with pytest.raises(CallTimeout):
                isolator.invoke(_burn_memory, timeout=0.8)
            late.append(time.monotonic() - started - 0.8)
    assert sorted(late)[2] < 0.12, late


def _burn_memory() -> None:
    import os

    memory = bytearray(b"x") * (100 << 20)
    for _ in range(len(memory) // (10 << 20)):
        if os.fork() == 0:
            break
    while True:
        pass


def test_an_idle_child_is_ended_and_comes_back() -> None:
    with nothing_left(), ProcessIsolator.create(idle_timeout=0.3) as isolator:
        first = isolator.pid
        for _ in range(4):
            time.sleep(0.1)
            assert isolator.invoke(len, "abc") == 3
        assert isolator.pid == first, "used every now and then"
        assert isolator.invoke(_sleep_and_answer, 0.5) == "slept", "busy is not idle"
        assert wait_until(lambda: isolator.state == "stopped", 2)
        assert isolator.wait_for_exit().message == "idle for 0.3 s"
        assert isolator.invoke(len, "abc") == 3
        assert isolator.pid != first


def _sleep_and_answer(seconds: float) -> str:
    import time

    time.sleep(seconds)
    return "slept"


# --- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_resource_usage(tmp_path: Path) -> None:
    """parity: 21, 22"""
    target = tmp_path / "file"
    target.write_bytes(b"")
    target.chmod(0o666)
    files = Filesystem(writable=[target])
    with ProcessIsolator.create(filesystem=files, limits=Limits(cpus=None)) as isolator:
        before = isolator.resource_usage()
        assert isolator.invoke(_work, str(target), 1.0) == 1 << 20
        after = isolator.resource_usage()
        assert (after.cpu_time or 0) - (before.cpu_time or 0) >= 0.9
        assert (after.write_bytes or 0) - (before.write_bytes or 0) >= 1 << 20
        assert (after.write_chars or 0) - (before.write_chars or 0) >= 1 << 20
        assert min(after.rss or 0, after.vms or 0, after.memory or 0, after.peak_memory or 0) > 1 << 20
        assert after.pids == 2


def _work(path: str, seconds: float) -> int:
    import os
    import time

    if os.fork() == 0:  # what a process did that has ended is counted too
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"x" * (1 << 20))
        os.fsync(fd)
        os._exit(0)
    os.wait()
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return os.stat(path).st_size


@pytest.mark.root
def test_io_is_counted_by_the_group(tmp_path: Path) -> None:
    """parity: 21. Also of a process that nobody in the child has waited for, which /proc has forgotten."""
    target = tmp_path / "file"
    target.write_bytes(bytes(1 << 20))
    target.chmod(0o666)
    files = Filesystem(writable=[target])
    with ProcessIsolator.create(filesystem=files) as isolator:
        assert isolator.resource_usage().read_bytes == 0
        isolator.invoke(_read_and_write_past_the_cache, str(target))
        used = isolator.resource_usage()
        assert min(used.read_bytes or 0, used.write_bytes or 0) >= 1 << 20


def _read_and_write_past_the_cache(path: str) -> None:
    import mmap
    import os
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if os.fork() == 0:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        page = mmap.mmap(-1, 1 << 20)
        os.readv(fd, [page])
        os.pwrite(fd, page, 0)
        os._exit(0)
    try:
        os.wait()
    except ChildProcessError:
        pass


@pytest.mark.root
@pytest.mark.parametrize("limited", [True, False])
def test_an_io_limit_slows_the_child_alone(tmp_path: Path, limited: bool) -> None:
    """parity: 34. Three megabytes past the cache, at one a second; the control has no limit."""
    target = tmp_path / "file"
    target.write_bytes(bytes(3 << 20))
    target.chmod(0o666)
    io = [IoLimit(device=tmp_path, write_bps="1M")] if limited else []
    with ProcessIsolator.create(filesystem=Filesystem(writable=[target]), limits=Limits(io=io)) as isolator:
        assert not limited or isolator.applied["io"].holds
        assert (isolator.invoke(_seconds_to_write, str(target)) > 1.0) == limited


def _seconds_to_write(path: str) -> float:
    import mmap
    import os
    import time

    fd, page = os.open(path, os.O_WRONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
    started = time.monotonic()
    for at in range(3):
        os.pwrite(fd, page, at << 20)
    return time.monotonic() - started


def test_grandchildren_are_listed() -> None:
    """parity: 22"""
    with ProcessIsolator.create() as isolator:
        assert len(isolator.pids()) == 2
        isolator.invoke(_leave_a_grandchild)
        assert wait_until(lambda: len(isolator.pids()) == 3)
        with_group = isolator.pids()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in with_group)


def _leave_a_grandchild() -> None:
    import os
    import time

    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.wait()


def test_without_a_group_the_process_tree_is_counted() -> None:
    with start_without("limits") as isolator:
        isolator.invoke(_leave_a_grandchild)
        assert wait_until(lambda: len(isolator.pids()) == 3)
        usage = isolator.resource_usage()
        assert usage.pids == 3
        assert usage.memory is None


@pytest.mark.parametrize("name", ["a\rSigPnd:\tzz", "a\rVmHWM:", "a\rVmHWM: x"])
def test_the_name_of_a_process_is_no_line_of_its_status(name: str) -> None:
    """The kernel writes line ends in it as \\n, and leaves \\r as it is."""
    with start_without("limits") as isolator:
        isolator.run_source(f"import ctypes; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)")
        with pytest.raises(TimeoutError):
            isolator.wait_for_exit(0.05)
        used = isolator.execute(abs, -1).usage
        assert used.peak_memory is not None
        assert used.peak_memory > 1 << 20


def test_the_priority_is_lowered() -> None:
    """parity: 31"""
    with ProcessIsolator.create(limits=Limits(nice=7)) as isolator:
        assert [psutil.Process(pid).nice() for pid in isolator.pids()] == [7, 7]


def test_a_child_cannot_leave_its_group() -> None:
    """parity: 32"""
    with ProcessIsolator.create() as isolator:
        assert isolator.invoke(_find_group_files) == []


def _find_group_files() -> list[str]:
    import os

    return [os.path.join(folder, name) for folder, _, names in os.walk("/") for name in names if name == "cgroup.procs"]


# --- a good guest --------------------------------------------------------------------------------------------------


def test_a_plain_isolator_takes_nothing_from_its_application() -> None:
    """No thread, no handler, no subreaper flag, no cwd, no umask, no environment."""
    before = _taken()
    with nothing_left(), ProcessIsolator.create() as isolator:
        assert isolator.invoke(len, "abc") == 3
        isolator.pause()
        isolator.resume()
        assert _taken() == before


def _taken() -> dict[str, Any]:
    import ctypes

    flag = ctypes.c_int()
    ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    umask = os.umask(0)
    os.umask(umask)
    return {
        "threads": threading.active_count(), "handlers": [signal.getsignal(number) for number in range(1, 32)],
        "subreaper": flag.value, "cwd": os.getcwd(), "umask": umask, "environ": dict(os.environ),
        "wakeup": signal.set_wakeup_fd(-1), "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }  # fmt: skip


def test_under_a_running_event_loop() -> None:
    async def main() -> list[int]:
        with ProcessIsolator.create() as isolator:
            direct = isolator.invoke(len, "abc")
            threaded = await asyncio.to_thread(isolator.invoke, len, "abcd")
            wrapped = await asyncio.wrap_future(isolator.submit(len, "abcde"))
            return [direct, threaded, wrapped]

    with nothing_left():
        assert asyncio.run(main()) == [3, 4, 5]


def test_cancelling_a_future_kills_its_work() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        future = isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: isolator.state == "busy")
        pid = isolator.pid or 0
        assert future.cancel()
        assert wait_until(lambda: state_of(pid) in ("", "Z"), 1)


def test_many_threads_many_isolators() -> None:
    answers: list[int] = []

    def work() -> None:
        for _ in range(5):
            with ProcessIsolator.create(restart=QUICK) as isolator:
                crash(isolator)
                answers.append(isolator.invoke(len, "abc", timeout=30))

    with nothing_left():
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert answers == [3] * 30


def test_a_forgotten_isolator_is_collected() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create(idle_timeout=100)
        pid = isolator.pid or 0
        del isolator
        gc.collect()
        assert wait_until(lambda: state_of(pid) == "")


FORKS = """
    import os
    from pisupervisor import *
    isolator = ProcessIsolator.create(events=IsolationEvents(started=print), idle_timeout=100)
    pid = os.fork()
    if pid == 0:
        for act in (isolator.pause, isolator.terminate, isolator.exit, isolator.abort, isolator.restart, isolator.resume):
            try:
                act()
            except IsolatorClosed as error:
                assert "fork" in str(error)
        isolator.close()
        isolator.state, isolator.pid
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert isolator.invoke(len, "abc") == 3
    isolator.close()
"""


def test_a_fork_of_an_application_with_helper_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_a_hundred_thousand_calls(tmp_path: Path) -> None:
    """parity: 57"""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def f(x):\n    return x\n")
    with ProcessIsolator.create(limits=Limits(cpus=None)) as isolator:
        call = isolator.invoke_method
        for number in range(2000):
            call(plugin, "f", number)
        fds, memory = len(os.listdir("/proc/self/fd")), resident()
        child = isolator.resource_usage()
        pid = isolator.pid
        child_fds = len(os.listdir(f"/proc/{pid}/fd"))
        for number in range(100_000):
            assert call(plugin, "f", number) == number
        assert isolator.pid == pid
        assert (len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{pid}/fd"))) == (fds, child_fds)
        assert resident() - memory < 10 << 20
        assert (isolator.resource_usage().rss or 0) - (child.rss or 0) < 10 << 20


@pytest.mark.timeout(300)
def test_a_thousand_isolators_leave_nothing() -> None:
    with Template() as template:
        for _ in range(50):
            template.create().close()
        assert wait_until(spare_is_there)
        before, memory = leftovers(), resident()
        for _ in range(1000):
            template.create().close()
        assert wait_until(spare_is_there)
        after = leftovers()
        assert resident() - memory < 5 << 20
        assert (after.threads, after.mounts) == (before.threads, before.mounts)
        assert (len(after.fds), len(after.groups)) == (len(before.fds), len(before.groups))
