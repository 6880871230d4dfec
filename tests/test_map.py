"""``map``: many calls under way at once, from one thread, in order."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, state_of, wait_until, write

from pisupervisor import (
    CallError,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolatorClosed,
    OptionsError,
    ProcessIsolator,
    RemoteError,
    RestartPolicy,
    SerializationError,
)
from pisupervisor.supervise.pipeline import room

pytestmark = linux
AT_ONCE = RestartPolicy(backoff=0.0)


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(restart=AT_ONCE) as made:
        yield made


def double(x: int) -> int:
    return 2 * x


def sleep(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return seconds


def exit_at(x: int, when: int) -> int:
    import os

    if x == when:
        os._exit(3)
    return x


@pytest.mark.parametrize(
    ("under_way", "size", "expected"),
    [(0, 0, 8), (4, 0, 4), (5, 0, 0), (8, 0, 0), (0, 1 << 30, 8), (1, 1 << 17, 0), (1, (1 << 17) - 1, 7)],
)
def test_the_window(under_way: int, size: int, expected: int) -> None:
    assert room(under_way, size, 8) == expected


@pytest.mark.parametrize("in_flight", [1, 2, 3, 128, 1000])
def test_results_come_in_order(isolator: ProcessIsolator, in_flight: int) -> None:
    assert list(isolator.map(double, range(500), in_flight=in_flight)) == [2 * n for n in range(500)]


def test_targets_and_several_iterables(isolator: ProcessIsolator, tmp_path: Path) -> None:
    path = write(tmp_path, "tool.py", "def add(a, b, c=0): return a + b + c")
    assert list(isolator.map(f"{path}:add", range(5), itertools.count(10))) == [10, 12, 14, 16, 18]
    assert list(isolator.map(pow, [2, 3], [3, 2, 1])) == [8, 9]
    assert list(isolator.map(double, [])) == []


def test_the_function_is_sent_once_and_let_go(isolator: ProcessIsolator) -> None:
    table = bytes(1 << 20)
    before = isolator.object_count()
    for number in isolator.map(lambda n: n + len(table), range(300)):
        last = number
    assert last == 299 + (1 << 20)
    assert isolator.object_count() == before


def test_items_are_fetched_as_they_are_needed(isolator: ProcessIsolator) -> None:
    fetched: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            fetched.append(number)
            yield number

    results = isolator.map(double, items(), in_flight=10)
    assert fetched == []
    assert [next(results) for _ in range(20)] == [2 * n for n in range(20)]
    assert len(fetched) <= 30
    results.close()
    assert list(results) == []


@pytest.mark.parametrize("size", [1, 70_000, 200_000, 3 << 20])
def test_full_buffers_on_both_sides_hold_nobody(isolator: ProcessIsolator, size: int) -> None:
    """Arguments and answers that fill the socket in both directions at once."""
    items = [bytes([n]) * size for n in range(20)]
    assert list(isolator.map(lambda data: data, items, timeout=30)) == items


def test_a_call_that_is_larger_than_the_socket_among_others_under_way(isolator: ProcessIsolator) -> None:
    """The child is held up with answers that nobody has read, while the host sends it something large."""
    results = isolator.map(lambda n: "x" * (1 << 18), range(64), in_flight=64)
    assert len(next(results)) == 1 << 18
    assert isolator.invoke(len, "y" * (8 << 20), timeout=30) == 8 << 20
    assert [len(text) for text in results] == [1 << 18] * 63


def test_other_calls_between_two_results(isolator: ProcessIsolator) -> None:
    pairs = [(result, isolator.invoke(double, result)) for result in isolator.map(double, range(50))]
    assert pairs == [(2 * n, 4 * n) for n in range(50)]
    nested = [list(isolator.map(double, range(n))) for n in isolator.map(double, range(5))]
    assert nested == [[2 * n for n in range(2 * length)] for length in range(5)]
    captured = [isolator.execute(print, n).stdout for n in isolator.map(double, range(5))]
    assert captured == [f"{2 * n}\n" for n in range(5)]


def test_items_that_come_from_the_same_child(isolator: ProcessIsolator) -> None:
    assert list(isolator.map(double, (isolator.invoke(double, n) for n in range(20)))) == [4 * n for n in range(20)]
    assert list(isolator.map(double, isolator.map(double, range(100)))) == [4 * n for n in range(100)]


def test_callbacks_and_calls_from_them(isolator: ProcessIsolator) -> None:
    def ask(n: int) -> Any:
        import pihost

        return pihost.call_host("answer", n)

    isolator.register_callback("answer", lambda n: isolator.invoke(double, n))
    assert list(isolator.map(ask, range(20))) == [2 * n for n in range(20)]
    # whoever waits for something else answers what the map's calls ask meanwhile
    results = isolator.map(ask, range(20))
    assert next(results) == 0
    assert isolator.invoke(double, 21) == 42
    assert list(results) == [2 * n for n in range(1, 20)]


def ask_host(name: str, *args: Any) -> Any:
    import pihost

    return pihost.call_host(name, *args)


def ask_double(x: int) -> Any:
    import pihost

    return pihost.call_host("double", x)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_callback_runs_once_whatever_it_calls(at_once: int) -> None:
    """Who waits within a callback finds the very question that it answers among those that nobody waits for."""
    asked: list[int] = []
    with ProcessIsolator.create(max_concurrency=at_once) as isolator:

        def answer(n: int) -> int:
            asked.append(n)
            return int(isolator.invoke(double, n))

        isolator.register_callback("double", answer)
        assert list(isolator.map(ask_double, range(50))) == [2 * n for n in range(50)]
    assert sorted(asked) == list(range(50))


@pytest.fixture(params=[1, 3])
def asked(request: pytest.FixtureRequest) -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(max_concurrency=request.param, call_timeout=20) as made:
        made.register_callback("double", lambda x: 2 * x)
        yield made


def test_results_keep_their_isolator_alive() -> None:
    """As streams do. It was closed as soon as it had been asked for a map, where nobody else held it."""
    isolator = ProcessIsolator.create()
    pid, results = isolator.pid or 0, isolator.map(double, range(300))
    del isolator
    assert list(results) == [2 * x for x in range(300)]
    del results
    assert wait_until(lambda: state_of(pid) == "")


def test_a_map_in_a_callback(asked: ProcessIsolator) -> None:
    """The child does nothing but what belongs to the call that waits for the callback."""
    asked.register_callback("sum", lambda n: sum(asked.map(double, range(n))))
    assert asked.invoke(ask_host, "sum", 300) == 299 * 300
    assert list(asked.map(ask_host, ["sum"] * 3, [3, 4, 100])) == [6, 12, 9900]
    asked.register_callback("lengths", lambda: [len(data) for data in asked.map(bytes, [3 << 20] * 5)])
    assert asked.invoke(ask_host, "lengths") == [3 << 20] * 5


def test_a_map_in_a_callback_whose_calls_call_back(asked: ProcessIsolator) -> None:
    asked.register_callback("doubled", lambda n: list(asked.map(ask_double, range(n))))
    assert list(asked.map(ask_host, ["doubled"] * 2, [3, 30])) == [[2 * n for n in range(most)] for most in (3, 30)]

    def tree(n: int) -> int:
        return 1 if n == 0 else sum(asked.map(ask_host, ["tree"] * 2, [n - 1] * 2))

    asked.register_callback("tree", tree)
    assert asked.invoke(ask_host, "tree", 4) == 16


def test_a_map_that_a_callback_leaves_or_takes_over(asked: ProcessIsolator) -> None:
    results = asked.map(ask_double, range(300))
    assert next(results) == 0
    asked.register_callback("go on", lambda: [next(results) for _ in range(100)])
    assert asked.invoke(ask_host, "go on") == [2 * n for n in range(1, 101)]
    assert list(results) == [2 * n for n in range(101, 300)]
    left = []

    def begin() -> int:
        left.append(asked.map(ask_double, range(300)))
        return int(next(left[-1]))

    asked.register_callback("begin", begin)
    assert asked.invoke(ask_host, "begin") == 0
    assert asked.invoke(double, 4) == 8
    assert list(left[0]) == [2 * n for n in range(1, 300)]


def test_a_result_that_comes_after_the_callback_that_asks_for_it(isolator: ProcessIsolator) -> None:
    """Neither would ever come."""

    def own() -> str:
        with pytest.raises(CallError, match=r"asked for a result already|comes after the call"):
            next(results)
        return "told"

    isolator.register_callback("own", own)
    results = isolator.map(ask_host, ["own"] * 3, timeout=20)
    assert list(results) == ["told"] * 3
    results = isolator.map(ask_host, ["own"] * 3, in_flight=1, timeout=20)
    assert list(results) == ["told"] * 3
    results = isolator.map(ask_host, ["first", "own"], timeout=20)
    isolator.register_callback("first", lambda: 1)
    assert next(results) == 1
    assert isolator.invoke(double, 2, timeout=20) == 4  # who waits for this one answers that
    assert list(results) == []


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_callback_may_close_the_map_that_its_call_belongs_to(at_once: int) -> None:
    with ProcessIsolator.create(max_concurrency=at_once, call_timeout=20) as made:
        begun: list[Any] = []
        made.register_callback("close", lambda: begun[-1].close())
        begun.append(made.map(ask_host, ["close"] * 5))
        assert next(begun[0]) is None
        assert list(begun[0]) == []
        assert made.invoke(double, 4) == 8

        def begin() -> Any:
            begun.append(made.map(ask_host, ["own"] * 2))
            return next(begun[-1])

        made.register_callback("begin", begin)
        made.register_callback("own", lambda: next(begun[-1]))  # which closes it, as every error of it does
        with pytest.raises(RemoteError, match="'begin' failed"):
            made.invoke(ask_host, "begin")
        assert made.invoke(double, 4) == 8


def test_another_thread_calls_meanwhile(isolator: ProcessIsolator) -> None:
    done: list[int] = []
    other = threading.Thread(target=lambda: done.extend(isolator.invoke(double, n) for n in range(300)))
    other.start()
    assert list(isolator.map(double, range(3000))) == [2 * n for n in range(3000)]
    other.join(20)
    assert done == [2 * n for n in range(300)]


def test_side_by_side() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=4, log_level="ERROR") as several:
        several.invoke(sleep, 0)
        started = time.monotonic()
        assert list(several.map(sleep, [0.3] * 8)) == [0.3] * 8
        assert time.monotonic() - started < 1.8
        assert list(several.map(sleep, [0.3, 0.2, 0.1, 0.0])) == [0.3, 0.2, 0.1, 0.0]


def test_an_error_comes_at_its_place_and_is_the_end(isolator: ProcessIsolator) -> None:
    pid, results = isolator.pid, isolator.map(lambda n: 12 // (3 - n), range(100))
    assert [next(results) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(RemoteError) as caught:
        next(results)
    assert isinstance(caught.value, ZeroDivisionError)
    assert list(results) == []
    assert (isolator.invoke(double, 4), isolator.pid) == (8, pid)


def test_an_error_of_the_iterable_comes_after_the_results_before_it(isolator: ProcessIsolator) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise LookupError("the fourth")

    with pytest.raises(LookupError, match="the fourth"):
        list(isolator.map(double, items()))
    results = isolator.map(double, items())
    assert [next(results), next(results), next(results)] == [0, 2, 4]
    with pytest.raises(LookupError):
        next(results)


def test_what_cannot_travel(isolator: ProcessIsolator) -> None:
    with pytest.raises(SerializationError):
        list(isolator.map(double, [1, threading.Lock()]))
    with pytest.raises(SerializationError):
        list(isolator.map(lambda _: object(), [1]))
    assert list(isolator.map(double, ["ab"])) == ["abab"]


def test_results_are_built_and_checked(isolator: ProcessIsolator) -> None:
    assert list(isolator.map(double, range(3), returns=float)) == [0.0, 2.0, 4.0]
    with pytest.raises(SerializationError, match="not a str"):
        list(isolator.map(double, range(3), returns=str))


def test_a_death_is_the_end_after_what_was_answered(isolator: ProcessIsolator) -> None:
    results = isolator.map(exit_at, range(100), [50] * 100, in_flight=8)
    assert [next(results) for _ in range(40)] == [*range(40)]
    with pytest.raises(ChildTerminated):
        list(results)
    assert isolator.invoke(double, 4) == 8


def test_what_may_be_repeated_is(tmp_path: Path) -> None:
    with nothing_left(), ProcessIsolator.create(restart=AT_ONCE, log_level="ERROR") as made:
        timer = threading.Timer(0.6, lambda: os.kill(made.pid or 0, signal.SIGKILL))
        timer.start()
        assert list(made.map(sleep, [0.1] * 12, idempotent=True, in_flight=4)) == [0.1] * 12
        timer.join()


def test_a_death_between_two_results() -> None:
    with nothing_left(), ProcessIsolator.create(restart=AT_ONCE, log_level="ERROR") as made:
        results = made.map(sleep, [0.0, 0.3, 0.3, 0.3])
        assert next(results) == 0.0
        made.terminate()
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            next(results)
        assert made.invoke(double, 4) == 8


def test_a_timeout_is_for_each_call(isolator: ProcessIsolator) -> None:
    assert list(isolator.map(sleep, [0.2] * 5, timeout=0.9)) == [0.2] * 5
    results = isolator.map(sleep, [0.1, 30.0, 0.1], timeout=0.5)
    assert next(results) == 0.1
    with pytest.raises(CallTimeout) as caught:
        next(results)
    assert caught.value.exit_info.reason is ExitReason.TIMEOUT
    assert isolator.invoke(double, 4) == 8


def test_who_asks_late_is_in_time(isolator: ProcessIsolator) -> None:
    """The answers are there; that nobody has asked for them yet is no fault of the calls."""
    results = isolator.map(double, range(10), timeout=0.3)
    assert next(results) == 0
    time.sleep(0.5)
    assert list(results) == [2 * n for n in range(1, 10)]


def test_idle_time_does_not_end_what_is_under_way() -> None:
    with ProcessIsolator.create(idle_timeout=0.2, restart=AT_ONCE) as made:
        results = made.map(sleep, [0.0, 0.8, 0.0])
        pid = made.pid
        assert next(results) == 0.0
        time.sleep(0.5)
        assert list(results) == [0.8, 0.0]
        assert made.pid == pid
        assert wait_until(lambda: made.pid is None, 3)


def test_what_nobody_wants_any_more_keeps_no_child() -> None:
    """Its answers are read with the next call, and there is none."""
    with ProcessIsolator.create(idle_timeout=0.2, restart=AT_ONCE) as made:
        results = made.map(lambda x: time.sleep(0.02) or x, range(200), in_flight=8)
        assert next(results) == 0
        results.close()
        link = made._keeper.connection
        assert link is not None
        assert link.calls, "answers that nobody reads"
        assert wait_until(lambda: made.pid is None, 3)
        assert made.invoke(double, 4) == 8


def test_a_closed_isolator_gives_no_more() -> None:
    with ProcessIsolator.create() as made:
        results = made.map(double, range(1000), in_flight=4)
        assert next(results) == 0
    with pytest.raises((IsolatorClosed, ChildTerminated)):
        list(results)
    with pytest.raises(IsolatorClosed):
        made.map(double, range(3))


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, None, "8"])
def test_what_is_no_number_in_flight(isolator: ProcessIsolator, wrong: Any) -> None:
    with pytest.raises(OptionsError, match="in_flight"):
        isolator.map(double, [1], in_flight=wrong)


def test_bad_functions_and_times(isolator: ProcessIsolator) -> None:
    with pytest.raises(OptionsError):
        isolator.map(5, [1])  # type: ignore[arg-type]
    with pytest.raises(OptionsError):
        isolator.map(double, [1], timeout=-1)
    with pytest.raises(TypeError):
        isolator.map(double, 5)  # type: ignore[arg-type]


def test_a_function_that_is_a_generator_is_no_breach(isolator: ProcessIsolator) -> None:
    def count(stop: int) -> Iterator[int]:
        yield from range(stop)

    pid, kept = isolator.pid, isolator.object_count()
    with pytest.raises(SerializationError, match="map takes values"):
        list(isolator.map(count, [1, 2, 3]))
    assert isolator.pid == pid
    wait_until(lambda: isolator.object_count() == kept, 5)


def test_what_nothing_can_be_built_as_is_told_before(isolator: ProcessIsolator) -> None:
    with pytest.raises(OptionsError, match="cannot be built"):
        isolator.map(double, [1], returns=5)
