"""The contract of concurrent.futures.Executor, kept by confined children."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import in_fork, linux, nothing_left, state_of, wait_until

from pisupervisor import (
    CallCancelled,
    ChildTerminated,
    IsolationExecutor,
    IsolationFuture,
    IsolationOptions,
    OptionsError,
    RemoteError,
    RestartPolicy,
    SerializationError,
)

pytestmark = linux

OPTIONS = IsolationOptions(restart=RestartPolicy(backoff=0.0, max_restarts=1000))


@pytest.fixture
def executor() -> Iterator[IsolationExecutor]:
    with nothing_left(), IsolationExecutor(OPTIONS, max_workers=3) as executor:
        yield executor


def test_submit(executor: IsolationExecutor) -> None:
    future = executor.submit(pow, 2, 8)
    assert isinstance(future, (cf.Future, IsolationFuture))
    assert future.result(10) == 256
    assert executor.submit(dict, timeout=1, kwargs=2, fn=3, self=4).result(10) == {
        "timeout": 1,
        "kwargs": 2,
        "fn": 3,
        "self": 4,
    }


def test_map_keeps_the_order(executor: IsolationExecutor) -> None:
    assert list(executor.map(pow, range(20), range(20))) == [n**n for n in range(20)]
    assert list(executor.map(len, [])) == []
    found = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(found), next(found)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(found)
    with pytest.raises(TimeoutError):
        list(executor.map(time.sleep, [0, 5], timeout=0.3))


def test_exceptions_are_the_futures(executor: IsolationExecutor) -> None:
    error = executor.submit(divmod, 1, 0).exception(10)
    assert isinstance(error, ZeroDivisionError)
    assert isinstance(error, RemoteError)
    assert isinstance(executor.submit(len, threading.Lock()).exception(10), SerializationError)


def test_wait_and_as_completed(executor: IsolationExecutor) -> None:
    slow, quick = executor.submit(time.sleep, 2), executor.submit(len, "abc")
    done, waiting = cf.wait([slow, quick], timeout=10, return_when=cf.FIRST_COMPLETED)
    assert (done, waiting) == ({quick}, {slow})
    assert list(cf.as_completed([slow, quick], timeout=10)) == [quick, slow]
    failing = executor.submit(divmod, 1, 0)
    assert failing in cf.wait([failing, executor.submit(time.sleep, 2)], return_when=cf.FIRST_EXCEPTION).done


@pytest.mark.alone
def test_calls_run_side_by_side_in_children_of_their_own(executor: IsolationExecutor) -> None:
    started = time.monotonic()
    list(executor.map(time.sleep, [0.5] * 3))
    assert time.monotonic() - started < 1.2
    hosts = set(executor.map(_host_pid, [0.2] * 3))
    assert len(hosts) == 3


def _host_pid(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # of its own time namespace


def test_children_start_as_they_are_needed() -> None:
    with nothing_left(), IsolationExecutor(OPTIONS, max_workers=10) as executor:
        for _ in range(10):
            executor.submit(len, "abc").result(10)
            time.sleep(0.02)
        assert len(executor._pool._lanes) <= 2


def test_cancelled_before_and_while_it_runs(executor: IsolationExecutor) -> None:
    running = [executor.submit(time.sleep, 1000) for _ in range(3)]
    waiting = executor.submit(len, "abc")
    assert wait_until(lambda: all(future.running() for future in running))
    assert waiting.cancel()
    assert waiting.cancelled()
    assert running[0].cancel()
    with pytest.raises(CallCancelled):
        running[0].result(1)
    assert executor.submit(len, "abcd").result(10) == 4
    assert not running[1].done()
    for future in running:
        future.cancel()


def test_a_child_that_dies_is_one_failed_call(executor: IsolationExecutor) -> None:
    futures = [executor.submit(os._exit, 3) if n % 3 == 0 else executor.submit(pow, n, 2) for n in range(12)]
    for number, future in enumerate(futures):
        if number % 3 == 0:
            assert isinstance(future.exception(20), ChildTerminated)
        else:
            assert future.result(20) == number**2


def test_done_callbacks(executor: IsolationExecutor) -> None:
    seen: list[Any] = []
    future = executor.submit(len, "abc")
    future.add_done_callback(lambda done: seen.append(done.result()))
    future.result(10)
    assert wait_until(lambda: seen == [3])


def test_in_an_event_loop(executor: IsolationExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, pow, n, 2) for n in range(6)))

    assert asyncio.run(main()) == [n**2 for n in range(6)]


# --- shutdown ------------------------------------------------------------------------------------------------------


def test_after_shutdown_nothing_is_taken() -> None:
    with nothing_left():
        executor = IsolationExecutor(OPTIONS, max_workers=2)
        future = executor.submit(len, "abc")
        executor.shutdown()
        executor.shutdown()
        assert future.result(0) == 3
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(len, "abc")


def test_shutdown_does_what_waits() -> None:
    with nothing_left():
        executor = IsolationExecutor(OPTIONS, max_workers=2)
        futures = [executor.submit(pow, n, 2) for n in range(10)]
        executor.shutdown(wait=True)
        assert [future.result(0) for future in futures] == [n**2 for n in range(10)]


def test_shutdown_cancels_what_waits() -> None:
    with nothing_left():
        executor = IsolationExecutor(OPTIONS, max_workers=1)
        futures = [executor.submit(time.sleep, 0.3) for _ in range(5)]
        assert wait_until(futures[0].running)
        executor.shutdown(wait=True, cancel_futures=True)
        assert futures[0].result(0) is None
        assert all(future.cancelled() for future in futures[1:])


@pytest.mark.alone
def test_shutdown_without_waiting() -> None:
    with nothing_left():
        executor = IsolationExecutor(OPTIONS, max_workers=2)
        futures = [executor.submit(time.sleep, 0.2) for _ in range(4)]
        started = time.monotonic()
        executor.shutdown(wait=False)
        assert time.monotonic() - started < 0.2
        assert [future.result(10) for future in futures] == [None] * 4
        assert wait_until(lambda: executor._pool.open == 0)


def test_never_used() -> None:
    with nothing_left():
        IsolationExecutor(OPTIONS).shutdown()


def test_forgotten() -> None:
    with nothing_left():
        executor = IsolationExecutor(OPTIONS, max_workers=1)
        future = executor.submit(len, "abc")
        pool = executor._pool
        assert future.result(10) == 3
        del executor
        gc.collect()
        assert wait_until(lambda: pool.open == 0)


def test_finished_and_forgotten_it_is_freed_without_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        with IsolationExecutor(OPTIONS, max_workers=2) as executor:
            assert list(executor.map(len, ["abc"] * 4)) == [3] * 4
            failed = [executor.submit(divmod, 1, 0), executor.submit(len, threading.Lock())]
            for future in failed:
                with contextlib.suppress(ZeroDivisionError, SerializationError):
                    future.result(10)
            del failed, future
            freed = [weakref.ref(executor._pool), *(weakref.ref(lane._thread) for lane in executor._pool._lanes)]
        del executor
        assert [reference() for reference in freed] == [None] * len(freed)
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [0, -1, "two", 1.5, True])
def test_how_many(wrong: Any) -> None:
    with pytest.raises(OptionsError):
        IsolationExecutor(OPTIONS, max_workers=wrong)


def test_killed_from_outside(executor: IsolationExecutor) -> None:
    executor.submit(len, "abc").result(10)
    isolator = executor._pool._lanes[0]._isolator
    assert isolator is not None
    pid = isolator.pid or 0
    os.kill(pid, 9)
    assert wait_until(lambda: state_of(pid) in ("", "Z"))
    assert [future.result(10) for future in [executor.submit(len, "abc") for _ in range(3)]] == [3] * 3


def test_waiters_are_told_of_what_was_cancelled(executor: IsolationExecutor) -> None:
    running = [executor.submit(time.sleep, 0.5) for _ in range(3)]
    waiting = executor.submit(len, "abc")
    assert waiting.cancel()
    assert cf.wait([*running, waiting], timeout=10).not_done == set()


def test_many_crashes_break_nothing() -> None:
    policy = RestartPolicy(backoff=0.0, max_restarts=2)
    with nothing_left(), IsolationExecutor(IsolationOptions(restart=policy), max_workers=1) as executor:
        for _ in range(8):
            assert isinstance(executor.submit(os._exit, 3).exception(20), ChildTerminated)
        assert executor.submit(len, "abc").result(20) == 3


def test_a_cancelled_call_is_no_other_calls_misfortune(executor: IsolationExecutor) -> None:
    for number in range(200):
        first = executor.submit(time.sleep, 0.001)
        second = executor.submit(len, "abc")
        time.sleep(number / 100_000)
        first.cancel()
        assert second.result(20) == 3


def test_no_thread_for_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with nothing_left(), IsolationExecutor(OPTIONS, max_workers=2) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                executor.submit(os._exit, 3)
        assert executor.submit(len, "abc").result(10) == 3


def test_a_fork_of_the_application_ends_nothing_and_is_refused() -> None:
    with nothing_left(), IsolationExecutor(max_workers=1) as executor:
        assert executor.submit(pow, 2, 3).result(10) == 8
        assert in_fork(lambda: executor.submit(pow, 2, 3)) == "IsolatorClosed"
        assert in_fork(lambda: executor.shutdown()) == "None"
        assert executor.submit(pow, 2, 4).result(10) == 16
