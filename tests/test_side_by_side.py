"""``max_concurrency``: calls of several threads in one child at once."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, wait_until, write

from pisupervisor import (
    AsyncProcessIsolator,
    CallCancelled,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    Filesystem,
    IsolatorClosed,
    Limits,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    RestartPolicy,
)

pytestmark = linux
AT_ONCE = RestartPolicy(backoff=0.0)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each comes to, its error in place of a value; each in a thread of its own."""
    results: list[Any] = ["nothing"] * len(calls)

    def make(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=make, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


def sleep(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return seconds


def sleep_and_exit() -> None:
    import os
    import time

    time.sleep(1.0)
    os._exit(3)


async def sleep_awaiting(seconds: float) -> float:
    import asyncio

    await asyncio.sleep(seconds)
    return seconds


def ask(name: str, *args: Any) -> Any:
    import pihost

    return pihost.call_host(name, *args)


def once_under_way(isolator: ProcessIsolator, calls: int, act: Callable[[], object]) -> None:
    """``act`` when so many calls run in the child, a moment after they were sent."""

    def wait() -> None:
        assert wait_until(lambda: len(isolator._session._under_way) == calls, 10)
        time.sleep(0.2)
        act()

    threading.Thread(target=wait).start()


def seconds_for(*calls: Callable[[], Any]) -> float:
    started = time.monotonic()
    at_once(*calls)
    return time.monotonic() - started


@pytest.mark.alone
@pytest.mark.parametrize("work", [sleep, sleep_awaiting])
def test_they_overlap(work: Callable[[float], Any]) -> None:
    """parity: 19"""
    with nothing_left(), ProcessIsolator.create(max_concurrency=2) as isolator:
        isolator.invoke(work, 0.0)
        assert seconds_for(*[lambda: isolator.invoke(work, 0.5)] * 2) < 0.9
        assert seconds_for(*[lambda: isolator.invoke(work, 0.3)] * 3) > 0.5, "three at once, where two were allowed"
        assert isolator.state == "ready"


def test_by_default_they_do_not_and_no_thread_is_made() -> None:
    """parity: 19"""
    with ProcessIsolator.create() as isolator:
        assert seconds_for(*[lambda: isolator.invoke(sleep, 0.3)] * 2) > 0.5
        assert isolator.run_source("import os; len(os.listdir('/proc/self/task'))").value == 1


def submitted(isolator: ProcessIsolator, seconds: float, calls: int) -> float:
    started = time.monotonic()
    for future in [isolator.submit(time.sleep, seconds) for _ in range(calls)]:
        future.result()
    return time.monotonic() - started


@pytest.mark.alone
def test_submitted_calls_overlap_as_far_as_was_asked_for() -> None:
    """parity: 19"""
    with nothing_left(), ProcessIsolator.create(max_concurrency=2) as isolator:
        isolator.submit(time.sleep, 0.0).result()
        assert submitted(isolator, 0.5, 2) < 0.9
        assert submitted(isolator, 0.3, 3) > 0.5, "three at once, where two were allowed"
    with ProcessIsolator.create() as isolator:
        assert submitted(isolator, 0.3, 2) > 0.5


def test_submitted_calls_are_taken_back_one_by_one() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=3, restart=AT_ONCE) as isolator:
        long = [isolator.submit(time.sleep, 60) for _ in range(3)]
        waiting = [isolator.submit(pow, 2, number) for number in range(3)]
        assert wait_until(lambda: all(future.running() for future in long))
        assert waiting[1].cancel()
        assert long[1].cancel()
        for future in (long[0], long[2]):  # their child was killed for the other's sake
            with pytest.raises(ChildTerminated):
                future.result(10)
        assert (waiting[0].result(10), waiting[2].result(10)) == (1, 4)
        last = [isolator.submit(time.sleep, 60) for _ in range(7)]
        assert wait_until(lambda: sum(future.running() for future in last) == 3)
        isolator.close()
        assert all(future.done() for future in last)
        kinds = {type(at_once(future.result)[0]) for future in last}
        assert kinds <= {ChildTerminated, IsolatorClosed, CallCancelled}, kinds


def test_a_short_call_does_not_wait_behind_a_long_one() -> None:
    with ProcessIsolator.create(max_concurrency=2, restart=AT_ONCE) as isolator:
        long = isolator.submit(time.sleep, 60)
        assert [isolator.submit(pow, 2, number).result(10) for number in range(20)][-1] == 1 << 19
        assert long.running()


def test_a_short_call_does_not_wait_behind_captured_ones() -> None:
    """Of which one runs, and others wait for it: threads', submitted ones, and tasks."""
    with ProcessIsolator.create(max_concurrency=3, restart=AT_ONCE) as isolator:
        captured = [threading.Thread(target=isolator.execute, args=(time.sleep, 1.5)) for _ in range(2)]
        for thread in captured:
            thread.start()
        wait_until(lambda: bool(isolator._keeper.turn.rules.waiting))
        assert isolator.invoke(len, "abc") == 3
        assert isolator._keeper.turn.rules.waiting  # the first is not over
        for thread in captured:
            thread.join()
        futures = [isolator.submit_call(isolator.execute, time.sleep, 60) for _ in range(4)]
        wait_until(futures[0].running)
        assert [isolator.submit(len, "a" * size).result(20) for size in range(6)] == [*range(6)]
        assert [future.running() for future in futures] == [True, False, False, False]


def test_tasks_do_not_wait_behind_long_and_captured_ones() -> None:
    async def main() -> list[int]:
        async with AsyncProcessIsolator.create(max_concurrency=3, restart=AT_ONCE) as isolator:
            long = [isolator.submit_call(isolator.execute, time.sleep, 60) for _ in range(4)]
            long.append(isolator.submit(time.sleep, 60))
            await asyncio.sleep(0.3)
            done = await asyncio.wait_for(asyncio.gather(*(isolator.invoke(len, "a" * size) for size in range(6))), 20)
            assert not any(task.done() for task in long)
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            return done

    assert asyncio.run(main()) == [*range(6)]


def test_who_waits_in_a_callback_answers_what_it_waits_for_further_out() -> None:
    """A thread here waits for two calls of a map, for one in the other's callback; and that one for the other, in the child."""

    def item(name: str, delay: float) -> Any:
        import time

        import pihost

        time.sleep(delay)
        return pihost.call_host("enter", name)

    def locked(name: str) -> str:
        import builtins
        import threading
        import time

        import pihost

        with vars(builtins).setdefault("lock", threading.Lock()):
            if name == "first":
                time.sleep(0.6)
                return str(pihost.call_host("ask"))
            return name

    with ProcessIsolator.create(max_concurrency=3, call_timeout=20) as isolator:
        isolator.register_callback("enter", lambda name: isolator.invoke(locked, name))
        isolator.register_callback("ask", lambda: "asked")
        assert list(isolator.map(item, ["first", "second"], [0.0, 0.3])) == ["asked", "second"]


def test_a_cancelled_call_does_not_end_a_launch_that_others_wait_for(tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir(mode=0o777)
    started.chmod(0o777)

    def slow(folder: str) -> None:
        import os
        import time

        os.mkdir(f"{folder}/{len(os.listdir(folder))}")
        time.sleep(1.0 if len(os.listdir(folder)) > 1 else 0.0)

    with ProcessIsolator.create(
        max_concurrency=3,
        restart=AT_ONCE,
        on_start=partial(slow, str(started)),
        filesystem=Filesystem(writable=[started]),
    ) as isolator:
        isolator.terminate()
        first = isolator.submit(len, "abc")
        wait_until(lambda: len(list(started.iterdir())) == 2)
        second = isolator.submit(len, "ab")
        wait_until(second.running)
        assert second.cancel()
        assert first.result(20) == 3
        assert len(list(started.iterdir())) == 2


def test_arguments_and_imports_of_one_package_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpickles asks for a module of the package, while user code's thread has imported half of that."""
    name = f"package_{os.getpid()}"
    given = tmp_path / "given"
    write(given, f"{name}/__init__.py", f"import time; time.sleep(0.5); early = 3; from {name} import part")
    write(given, f"{name}/part.py", f"from {name} import early\nclass Thing:\n    size = early\n")
    monkeypatch.syspath_prepend(str(given))
    thing = importlib.import_module(f"{name}.part").Thing()
    big = [thing, b"x" * 300_000]
    with ProcessIsolator.create(import_paths=[given], max_concurrency=4) as isolator:
        isolator.invoke(len, "abc")
        importing = isolator.submit(lambda: __import__(name).part.Thing.size)
        time.sleep(0.2)
        assert at_once(
            lambda: isolator.invoke_method("operator", "truth", [thing]),
            lambda: isolator.invoke(lambda one: one.size, thing), lambda: isolator.invoke(lambda one, _: one.size, *big),
        ) == [True, 3, 3]  # fmt: skip
        assert importing.result(20) == 3


def test_a_captured_call_that_would_wait_for_another_in_its_own_callback_is_refused() -> None:
    with ProcessIsolator.create(max_concurrency=3) as isolator:
        isolator.register_callback(
            "wait", lambda: isolator.submit_call(isolator.execute, len, "abc").result().value, expose_errors=True
        )
        assert isolator.invoke(lambda: __import__("pihost").call_host("wait")) == 3
        with pytest.raises(RemoteError, match="waits for the one whose callback this is"):
            isolator.execute(lambda: __import__("pihost").call_host("wait"))


def test_captured_calls_run_one_at_a_time() -> None:
    source = "import os, time; os.write(1, b'{0}'); time.sleep(0.2); os.write(1, b'{0}'); {0}"
    with nothing_left(), ProcessIsolator.create(max_concurrency=4) as isolator:
        started = time.monotonic()
        done = at_once(
            *[lambda n=n: isolator.run_source(source.format(n)) for n in range(3)], lambda: isolator.invoke(sleep, 0.3)
        )
        assert time.monotonic() - started > 0.55
        assert [(result.value, result.stdout) for result in done[:3]] == [(n, f"{n}{n}") for n in range(3)]
        assert done[3] == 0.3


def chat(word: str, times: int) -> None:
    import time

    for _ in range(times):
        print(word, flush=True)
        time.sleep(0.02)


def ask_for_output(word: str) -> Any:
    import pihost

    return pihost.call_host("output", word)


def test_captured_calls_from_callbacks_run_one_at_a_time_too() -> None:
    """parity: 37. Within plain calls, and beside a captured one."""
    with ProcessIsolator.create(max_concurrency=4) as isolator:
        isolator.register_callback("output", lambda word: isolator.execute(chat, word, 5).stdout)
        results = at_once(
            lambda: isolator.execute(chat, "outer", 15).stdout,
            *(lambda word=word: isolator.invoke(ask_for_output, word) for word in ("a", "b", "c")),  # type: ignore[misc]
        )
        assert results == ["outer\n" * 15, "a\n" * 5, "b\n" * 5, "c\n" * 5]
        assert isolator.execute(chat, "after", 1).stdout == "after\n"


def test_a_captured_call_from_a_callback_that_waits_too_long() -> None:
    with ProcessIsolator.create(max_concurrency=2, restart=AT_ONCE) as isolator:
        told: list[BaseException] = []

        def output(word: str) -> str:
            try:
                return isolator.execute(chat, word, 1, timeout=0.1).stdout
            except CallTimeout as error:
                told.append(error)
                return "late"

        isolator.register_callback("output", output)
        pid = isolator.pid
        results = at_once(
            lambda: isolator.execute(chat, "outer", 40).stdout,
            lambda: (time.sleep(0.2), isolator.invoke(ask_for_output, "inner"))[1],
        )
        assert results == ["outer\n" * 40, "late"]
        assert "still running at the deadline" in str(told[0])
        assert isolator.pid == pid


def ask_for_outputs(word: str) -> Any:
    import pihost

    return pihost.call_host("outputs", word)


def test_captured_calls_from_callbacks_of_maps_hold_nobody_up() -> None:
    """Who captures may wait for a callback of a map that another thread is in, and which captures, too."""
    with ProcessIsolator.create(max_concurrency=3, call_timeout=20) as isolator:
        isolator.register_callback("output", lambda word: isolator.execute(len, word).value)
        isolator.register_callback("outputs", lambda word: list(isolator.map(ask_for_output, [word] * 4)))

        def plain() -> list[Any]:
            return [list(isolator.map(ask_for_outputs, ["plain"] * 3)) for _ in range(5)]

        def captured() -> list[Any]:
            return [isolator.execute(ask_for_outputs, "captured").value for _ in range(15)]

        results = at_once(plain, captured, plain, captured)
        assert results == [[[[5] * 4] * 3] * 5, [[8] * 4] * 15] * 2


def test_a_flood_of_output_beside_plain_calls() -> None:
    def write() -> None:
        import os

        for _ in range(200):
            os.write(1, b"x" * 10_000)

    with ProcessIsolator.create(max_concurrency=3) as isolator:
        done = at_once(
            lambda: isolator.execute(write),
            lambda: [isolator.invoke(len, "ab") for _ in range(200)],
            lambda: [isolator.invoke(len, "abc") for _ in range(200)],
        )
        assert (len(done[0].stdout), done[0].truncated) == (1 << 20, True)
        assert done[1:] == [[2] * 200, [3] * 200]


def test_answers_of_any_size_reach_their_callers() -> None:
    with ProcessIsolator.create(max_concurrency=4) as isolator:

        def many(letter: str) -> None:
            for size in (1, 100_000, 10, 3_000_000, 5, 70_000):
                assert isolator.invoke(str.__mul__, letter, size) == letter * size

        assert at_once(*[lambda letter=letter: many(letter) for letter in "abcd"]) == [None] * 4


def test_arguments_of_any_size_reach_their_calls() -> None:
    with ProcessIsolator.create(max_concurrency=4) as isolator:
        texts = [letter * (4 << 20) for letter in "abcd"]
        assert at_once(*[lambda text=text: isolator.invoke(lambda t: (t[0], len(t)), text) for text in texts]) == [
            (letter, 4 << 20) for letter in "abcd"
        ]


@pytest.mark.alone
def test_callbacks_run_in_the_thread_whose_call_it_is_and_may_call() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=3) as isolator:

        def answer(number: int) -> tuple[int, int]:
            time.sleep(0.3)
            return threading.get_ident(), isolator.invoke(lambda n: n * 10, number)

        isolator.register_callback("answer", answer)

        def call(number: int) -> None:
            assert isolator.invoke(ask, "answer", number) == (threading.get_ident(), number * 10)

        started = time.monotonic()
        assert at_once(*[lambda n=n: call(n) for n in range(3)]) == [None] * 3
        assert time.monotonic() - started < 0.8, "one callback kept the others waiting"


def test_callbacks_that_call_and_are_called_in_turn() -> None:
    """More of them than there are threads in the child: each thread serves what it waits for."""
    with ProcessIsolator.create(max_concurrency=2) as isolator:
        isolator.register_callback("down", lambda n: isolator.invoke(ask, "down", n - 1) if n else 0)
        assert at_once(*[lambda: isolator.invoke(ask, "down", 5)] * 2) == [0, 0]


def test_streams_side_by_side() -> None:
    async def count(n: int) -> Any:
        import asyncio

        for number in range(n):
            await asyncio.sleep(0.01)
            yield number

    with ProcessIsolator.create(max_concurrency=3) as isolator:
        assert at_once(*[lambda: list(isolator.invoke(count, 10))] * 3) == [[*range(10)]] * 3
        streams = [isolator.invoke(count, 5) for _ in range(3)]
        assert at_once(*[lambda s=s: [next(s), *s] for s in streams]) == [[*range(5)]] * 3
        one = isolator.invoke(count, 20)  # begun in one thread of the child, and gone on with in others
        taken = at_once(*[lambda: [next(one) for _ in range(5)]] * 4)
        assert sorted(number for part in taken for number in part) == [*range(20)]


def test_an_error_is_that_calls_own() -> None:
    with ProcessIsolator.create(max_concurrency=2) as isolator:
        pid = isolator.pid
        failed, done = at_once(lambda: isolator.invoke(int, "x"), lambda: isolator.invoke(sleep, 0.2))
        assert isinstance(failed, RemoteError)
        assert (done, isolator.pid) == (0.2, pid)


def test_a_timeout_is_the_end_of_all_and_what_may_be_is_repeated() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=4, restart=AT_ONCE) as isolator:
        late, other, again = at_once(
            lambda: isolator.invoke(sleep, 30.0, timeout=1.0),
            lambda: isolator.invoke(sleep, 20.0),
            lambda: isolator.invoke(sleep, 1.5, idempotent=True),
        )
        assert isinstance(late, CallTimeout)
        assert isinstance(other, ChildTerminated)
        assert other.exit_info.reason is ExitReason.TIMEOUT
        assert again == 1.5
        assert isolator.state == "ready"


def test_cancelling_one_is_the_end_of_all_and_what_may_be_is_repeated() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=4, restart=AT_ONCE) as isolator:
        future = isolator.submit(sleep, 30.0)
        once_under_way(isolator, 3, future.cancel)
        other, again = at_once(
            lambda: isolator.invoke(sleep, 20.0), lambda: isolator.invoke(sleep, 1.0, idempotent=True)
        )
        assert isinstance(other, ChildTerminated)
        assert other.exit_info.reason is ExitReason.KILLED
        assert again == 1.0


def test_a_stop_ends_what_could_be_repeated_too() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=2, restart=AT_ONCE) as isolator:
        once_under_way(isolator, 2, isolator.terminate)
        errors = at_once(*[lambda: isolator.invoke(sleep, 20.0, idempotent=True)] * 2)
        assert [type(error) for error in errors] == [ChildTerminated] * 2


@pytest.mark.parametrize("calls", [2, 8])
def test_a_death_reaches_everybody_and_one_child_follows(calls: int) -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=8, restart=AT_ONCE) as isolator:
        pid = isolator.pid or 0
        once_under_way(isolator, calls, lambda: os.kill(pid, signal.SIGKILL))
        errors = at_once(*[lambda: isolator.invoke(sleep, 20.0)] * calls)
        assert [type(error) for error in errors] == [ChildTerminated] * calls
        assert {error.exit_info.reason for error in errors} == {ExitReason.SIGNALED}
        assert at_once(*[lambda: isolator.invoke(os.getpid)] * calls) != []
        assert isolator.invoke(len, "abc") == 3


def test_crashes_of_many_calls_at_once_count_once() -> None:
    with ProcessIsolator.create(max_concurrency=4, restart=RestartPolicy(backoff=0.0, max_restarts=3)) as isolator:
        for _ in range(3):
            errors = at_once(*[lambda: isolator.invoke(sleep, 20.0)] * 3, lambda: isolator.invoke(sleep_and_exit))
            assert all(isinstance(error, ChildTerminated) for error in errors)
        assert isolator.invoke(len, "abc") == 3


def test_an_interrupted_reader_leaves_nobody_waiting() -> None:
    """KeyboardInterrupt in the thread that reads for all: it ends the child, as everywhere, and the others learn of it."""
    with nothing_left(), ProcessIsolator.create(max_concurrency=3, restart=AT_ONCE) as isolator:
        isolator.invoke(len, "")
        others: list[Any] = []
        second = threading.Thread(target=lambda: others.extend(at_once(lambda: isolator.invoke(sleep, 20.0))))
        once_under_way(isolator, 1, second.start)
        once_under_way(isolator, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            isolator.invoke(sleep, 20.0)
        second.join(10)
        assert [type(error) for error in others] == [ChildTerminated]
        assert isolator.invoke(len, "abc") == 3


def test_an_interrupted_sleeper_leaves_nobody_waiting() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=3, restart=AT_ONCE) as isolator:
        others: list[Any] = []
        first = threading.Thread(target=lambda: others.extend(at_once(lambda: isolator.invoke(sleep, 20.0))))
        first.start()
        assert wait_until(lambda: isolator.state == "busy")
        time.sleep(0.1)
        once_under_way(isolator, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            isolator.invoke(sleep, 20.0)
        first.join(10)
        assert [type(error) for error in others] == [ChildTerminated]


def test_the_reader_hands_over_when_it_is_done() -> None:
    """The call that reads ends first, again and again."""
    with ProcessIsolator.create(max_concurrency=4) as isolator:
        times = [0.05, 0.1, 0.15, 0.2]
        for _ in range(3):
            assert at_once(*[lambda t=t: isolator.invoke(sleep, t) for t in times]) == times
        assert at_once(*[lambda: [isolator.invoke(len, "a" * n) for n in range(300)]] * 4) == [[*range(300)]] * 4


def test_a_call_that_gets_no_thread_says_so() -> None:
    with ProcessIsolator.create(max_concurrency=20, limits=Limits(pids=8)) as isolator:
        done = at_once(*[lambda: isolator.invoke(sleep, 0.2)] * 12)
        assert done == [0.2] * 12, "whoever is free takes what no thread was made for"


def test_a_child_that_answers_for_another_call_is_ended() -> None:
    def lie() -> None:
        import os

        from pihost import wire

        os.write(3, wire.pack_header(wire.RESULT, 77, 1) + b"x")
        while True:
            pass

    with ProcessIsolator.create(max_concurrency=2, restart=AT_ONCE) as isolator:
        errors = at_once(lambda: isolator.invoke(lie), lambda: isolator.invoke(sleep, 20.0))
        assert any(isinstance(error, ProtocolError) for error in errors)
        assert all(isinstance(error, (ProtocolError, ChildTerminated)) for error in errors)
        assert isolator.invoke(len, "abc") == 3


def test_two_requests_of_one_call_at_once_are_refused() -> None:
    """An honest call waits for its answer; what others ask meanwhile must not pile up in the host."""

    def flood() -> None:
        import os
        import sys

        from pihost import wire

        frame, ident = sys._getframe(), 0
        while frame is not None:
            ident = frame.f_locals.get("ident", ident)
            frame = frame.f_back  # type: ignore[assignment]
        body = b"".join(wire.pack_value(b'["slow",[],{}]', []))
        for _ in range(3):
            os.write(3, wire.pack_header(wire.CALLBACK, ident, len(body)) + body)
        while True:
            pass

    with ProcessIsolator.create(max_concurrency=2, restart=AT_ONCE) as isolator:
        isolator.register_callback("slow", lambda: time.sleep(0.5))
        errors = at_once(lambda: isolator.invoke(flood, timeout=5), lambda: isolator.invoke(sleep, 20.0, timeout=6))
        assert any(isinstance(error, ProtocolError) for error in errors)


def test_max_calls_waits_for_those_under_way() -> None:
    with ProcessIsolator.create(max_concurrency=3, max_calls=3) as isolator:
        pid = isolator.pid
        assert at_once(*[lambda: isolator.invoke(sleep, 0.2)] * 3) == [0.2] * 3
        isolator.invoke(len, "abc")
        assert isolator.pid != pid


def test_threads_that_calls_begin_are_waited_for(tmp_path: Path) -> None:
    """As elsewhere: by the script that begins them, and by exit(). What starts in a thread of ours was a daemon."""
    text = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('done', flush=True))).start()\n"
    script = write(tmp_path, "script.py", text)
    with nothing_left(), ProcessIsolator.create(max_concurrency=2) as isolator:
        together = [isolator.submit_call(isolator.invoke_method, "time", "sleep", 0.1) for _ in range(2)]
        assert [future.result() for future in together] == [None, None]
        for _ in range(2):
            assert isolator.run_script(script).stdout == "done\n"
        isolator.invoke(_write_later, "at exit\n")
        info = isolator.exit(timeout=5)
        assert (info.exit_code, info.stderr_tail) == (0, "at exit\n")


def _write_later(text: str) -> None:
    import sys

    threading.Timer(0.2, lambda: print(text, end="", file=sys.stderr, flush=True)).start()


def test_exit_waits_for_all() -> None:
    with ProcessIsolator.create(max_concurrency=3) as isolator:
        once_under_way(isolator, 2, isolator.exit)
        assert at_once(*[lambda: isolator.invoke(sleep, 1.0)] * 2) == [1.0] * 2
        assert wait_until(lambda: isolator.state == "stopped")


@pytest.mark.parametrize("wrong", [0, -1, 1001, None, True, 1.5, "2"])
def test_what_is_no_number_of_calls(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="max_concurrency"):
        ProcessIsolator.create(max_concurrency=wrong)


def test_a_call_for_which_there_is_no_thread(tmp_path: Path) -> None:
    """It is told so, and what came with it does not stay in the child."""
    (tmp_path / "lacking.py").write_text(
        "import _thread\n"
        "start, left = _thread.start_new_thread, [3]\n"
        "def refuse(*arguments):\n"
        "    if left[0]:\n"
        "        left[0] -= 1\n"
        "        raise RuntimeError('no more')\n"
        "    return start(*arguments)\n"
        "_thread.start_new_thread = refuse\n"
    )
    with ProcessIsolator.create(max_concurrency=2, import_paths=[tmp_path], preload=["lacking"]) as isolator:
        for _ in range(3):
            with pytest.raises(RemoteError, match="no thread for the call"):
                isolator.run_source("1")
        assert isolator.run_source("import os; len(os.listdir('/proc/self/fd'))").value == 5  # and that of the list
