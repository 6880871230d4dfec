"""Coroutines, generators and async generators as targets."""

from __future__ import annotations

import collections.abc
import gc
import time
import typing
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, write

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    LaunchError,
    ObjectReleased,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    RestartPolicy,
    SerializationError,
)

pytestmark = linux

PLUGIN = """
    import asyncio, os, sys, time

    async def slow(x):
        await asyncio.sleep(0.01)
        return x * 2

    async def fail():
        await asyncio.sleep(0)
        raise KeyError("in a coroutine")

    async def many():
        return await asyncio.gather(*(slow(n) for n in range(5)))

    async def leave_a_task():
        async def later():
            await asyncio.sleep(0.01)
            found.append("ran")
        global task
        task = asyncio.ensure_future(later())
    found = []

    async def collect():
        await task
        return found

    async def for_ever():
        await asyncio.sleep(1000)

    def count(stop, log=None):
        for number in range(stop):
            reached.append(number)
            yield number
        return "the end"
    reached = []

    def how_far():
        return reached

    async def acount(stop):
        for number in range(stop):
            await asyncio.sleep(0.001)
            yield number

    def break_down():
        yield 1
        raise ValueError("at the second item")

    def die():
        yield 1
        os._exit(3)

    def hang():
        yield 1
        time.sleep(1000)

    def odd():
        yield object()

    def pairs():
        yield {"x": 1, "y": 2}

    def talk():
        print("made", flush=True)
        return count(2)

    class Things:
        def __iter__(self):
            yield from "abc"
        async def method(self, x):
            return x + 1
        def items(self):
            yield 1
            yield 2

    closed = []
    def careful():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    def was_closed():
        return closed
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("awaiting"), "plugin.py", PLUGIN)


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        yield isolator


# --- coroutines ----------------------------------------------------------------------------------------------------


def test_async_def_is_awaited_in_the_child(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 56"""
    assert isolator.invoke_method(plugin, "slow", 21) == 42
    assert isolator.invoke_method(plugin, "many") == [0, 2, 4, 6, 8]
    assert isolator.execute(f"{plugin}:slow", 1).value == 2
    assert isolator.create_object(plugin, "Things").method(1) == 2

    async def closure() -> str:
        return "from a closure"

    assert isolator.invoke(closure) == "from a closure"


def test_what_a_coroutine_raises(isolator: ProcessIsolator, plugin: Path) -> None:
    with pytest.raises(KeyError, match="in a coroutine") as caught:
        isolator.invoke_method(plugin, "fail")
    assert isinstance(caught.value, RemoteError)
    assert "plugin.py" in caught.value.remote_traceback


def test_tasks_that_are_left_go_on_with_the_next_call(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.invoke_method(plugin, "leave_a_task")
    assert isolator.invoke_method(plugin, "collect") == ["ran"]


def test_a_coroutine_at_its_deadline(isolator: ProcessIsolator, plugin: Path) -> None:
    with pytest.raises(CallTimeout):
        isolator.invoke_method(plugin, "for_ever", timeout=0.2)
    assert isolator.invoke_method(plugin, "slow", 1) == 2
    assert isolator.exit().exit_code == 0


def test_asyncio_is_not_imported_before_it_is_needed(isolator: ProcessIsolator) -> None:
    assert isolator.run_source("import sys; 'asyncio' in sys.modules").value is False


# --- generators ----------------------------------------------------------------------------------------------------


def test_items_one_by_one(isolator: ProcessIsolator, plugin: Path) -> None:
    """The generator runs only as far as it is asked to."""
    stream = isolator.invoke_method(plugin, "count", 5)
    assert isolator.invoke_method(plugin, "how_far") == []
    assert [next(stream), next(stream)] == [0, 1]
    assert isolator.invoke_method(plugin, "how_far") == [0, 1]
    assert list(stream) == [2, 3, 4]
    assert stream.value == "the end"
    assert list(stream) == []


def test_async_generators(isolator: ProcessIsolator, plugin: Path) -> None:
    assert list(isolator.invoke_method(plugin, "acount", 4)) == [0, 1, 2, 3]


def test_generators_of_closures_and_methods(isolator: ProcessIsolator, plugin: Path) -> None:
    assert list(isolator.invoke(lambda: (n * n for n in range(4)))) == [0, 1, 4, 9]
    assert list(isolator.create_object(plugin, "Things").items()) == [1, 2]
    captured = isolator.execute(f"{plugin}:talk")
    assert (captured.stdout, list(captured.value)) == ("made\n", [0, 1])


def test_two_streams_at_once(isolator: ProcessIsolator, plugin: Path) -> None:
    first, second = isolator.invoke_method(plugin, "count", 3), isolator.invoke_method(plugin, "acount", 3)
    assert list(zip(first, second, strict=True)) == [(0, 0), (1, 1), (2, 2)]


def test_what_a_generator_raises(isolator: ProcessIsolator, plugin: Path) -> None:
    stream = isolator.invoke_method(plugin, "break_down")
    assert next(stream) == 1
    with pytest.raises(ValueError, match="at the second item"):
        next(stream)
    assert list(stream) == []


def test_items_that_are_no_data(isolator: ProcessIsolator, plugin: Path) -> None:
    with pytest.raises(SerializationError, match="object"):
        list(isolator.invoke_method(plugin, "odd"))


@dataclass
class Pair:
    x: int
    y: int


def test_items_are_built_as_asked(isolator: ProcessIsolator, plugin: Path) -> None:
    assert list(isolator.invoke_method(plugin, "pairs", returns=Iterator[Pair])) == [Pair(1, 2)]
    kept = isolator.object_count()
    with pytest.raises(SerializationError, match="returned a generator"):
        isolator.invoke_method(plugin, "pairs", returns=int)
    assert isolator.object_count() == kept, "nobody has that generator"


@pytest.mark.parametrize(
    "returns", [typing.Iterator, typing.Generator, collections.abc.Iterator, Iterator[Any]], ids=str
)
def test_a_generator_of_anything(isolator: ProcessIsolator, plugin: Path, returns: Any) -> None:
    assert list(isolator.invoke_method(plugin, "pairs", returns=returns)) == [{"x": 1, "y": 2}]


def totals(last: object) -> Generator[int, None, object]:
    yield 1
    return last


def test_what_a_generator_returns_is_built_as_asked(isolator: ProcessIsolator) -> None:
    stream = isolator.invoke(totals, {"x": 1, "y": 2}, returns=Generator[int, None, Pair])
    assert (list(stream), stream.value) == ([1], Pair(1, 2))
    as_it_comes = isolator.invoke(totals, {"x": 1}, returns=Iterator[int])
    assert (list(as_it_comes), as_it_comes.value) == ([1], {"x": 1})


@pytest.mark.parametrize("last", [{"x": 1}, None, "text", [1, 2, 3]])
def test_what_a_generator_returns_is_checked(isolator: ProcessIsolator, last: object) -> None:
    stream = isolator.invoke(totals, last, returns=Generator[int, None, Pair])
    assert next(stream) == 1
    with pytest.raises(SerializationError, match="is not a Pair"):
        next(stream)
    assert stream.value is None
    assert list(stream) == [], "it is over all the same"
    assert isolator.object_count() == 0


def test_a_child_that_dies_between_two_items(isolator: ProcessIsolator, plugin: Path) -> None:
    stream = isolator.invoke_method(plugin, "die")
    assert next(stream) == 1
    with pytest.raises(ChildTerminated):
        next(stream)
    other = isolator.invoke_method(plugin, "count", 2)
    isolator.terminate()
    assert isolator.invoke_method(plugin, "slow", 1) == 2
    with pytest.raises(ObjectReleased):
        next(other)


@pytest.mark.alone
def test_the_timeout_is_for_each_item(isolator: ProcessIsolator, plugin: Path) -> None:
    stream = isolator.invoke_method(plugin, "hang", timeout=0.3)
    assert next(stream) == 1
    time.sleep(0.4)
    with pytest.raises(CallTimeout):
        next(stream)


def test_a_stream_that_is_left_is_closed_in_the_child(isolator: ProcessIsolator, plugin: Path) -> None:
    with isolator.invoke_method(plugin, "careful") as stream:
        assert next(stream) == 0
    assert isolator.invoke_method(plugin, "was_closed") == [True]
    forgotten = isolator.invoke_method(plugin, "careful")
    assert next(forgotten) == 0
    del forgotten
    gc.collect()
    assert isolator.invoke_method(plugin, "was_closed") == [True, True]
    assert isolator.object_count() == 0


@pytest.mark.alone
def test_a_next_call_waits_for_the_end_of_a_closed_stream(isolator: ProcessIsolator) -> None:
    """As it is documented: in its own time, with object_count() as the call that does nothing else."""

    def slow_to_end() -> Iterator[int]:
        try:
            yield 1
        finally:
            time.sleep(0.3)

    for act, least in ((lambda: None, 0.0), (isolator.object_count, 0.3)):
        stream = isolator.invoke(slow_to_end)
        next(stream)
        began = time.monotonic()
        stream.close()
        act()
        assert least <= time.monotonic() - began < least + 0.25
        assert isolator.object_count() == 0


def test_a_child_that_lies_about_items(isolator: ProcessIsolator) -> None:
    def lie() -> Any:
        from pihost.inside import serve

        serve.VERBS["next"] = lambda worker, number: "no item"
        return (n for n in range(3))

    pid = isolator.pid
    with pytest.raises(ProtocolError):
        next(isolator.invoke(lie))
    assert isolator.pid != pid, "killed"


@pytest.mark.parametrize("answer", [-1, 1 << 64, "1", None, True, 1.5])
def test_a_child_that_lies_about_objects(isolator: ProcessIsolator, answer: object) -> None:
    def lie() -> None:
        from pihost.inside import serve

        for verb in ("copy", "count objects"):
            serve.VERBS[verb] = lambda worker, *arguments: answer

    for ask in (lambda: isolator.copy_object([1]), isolator.object_count):
        isolator.invoke(lie)
        with pytest.raises(ProtocolError):
            ask()
        assert isolator.invoke(len, "abc") == 3


@pytest.mark.parametrize("answer", [256, -1, "0", None, []])
def test_a_child_that_lies_about_an_exit_code(isolator: ProcessIsolator, plugin: Path, answer: object) -> None:
    def lie() -> None:
        from pihost.inside import serve

        serve.VERBS["script"] = lambda worker, *arguments: answer

    isolator.invoke(lie)
    with pytest.raises(ProtocolError):
        isolator.run_script(plugin)


def test_a_generator_where_there_can_be_none(isolator: ProcessIsolator, plugin: Path) -> None:
    def lie() -> None:
        from pihost.inside import serve

        for verb in ("script", "copy", "count objects"):
            serve.VERBS[verb] = lambda worker, *arguments: (n for n in range(3))

    for ask in (lambda: isolator.run_script(plugin), lambda: isolator.copy_object(1), isolator.object_count):
        isolator.invoke(lie)
        with pytest.raises(ProtocolError, match="generator"):
            ask()


def test_an_async_generator_that_is_left_runs_its_finally(isolator: ProcessIsolator) -> None:
    def make() -> object:
        import sys

        async def items() -> object:
            try:
                while True:
                    yield 1
            finally:
                sys.was_closed = True  # type: ignore[attr-defined]

        return items()

    with isolator.invoke(make) as stream:
        assert next(stream) == 1
    assert isolator.run_source("import sys; getattr(sys, 'was_closed', False)").value is True


def test_an_async_factory_makes_an_object(isolator: ProcessIsolator) -> None:
    async def make() -> list[int]:
        return [1, 2, 3]

    assert isolator.create_object(make).invoke("__len__") == 3


def test_what_on_start_returns_is_not_wanted() -> None:
    with ProcessIsolator.create(on_start=lambda: time) as isolator:  # a module: no data
        assert isolator.invoke(len, "abc") == 3


def test_a_generator_is_no_on_start() -> None:
    def begin() -> object:
        yield 1

    with pytest.raises(LaunchError, match="generator"):
        ProcessIsolator.create(on_start=begin)


def test_a_loop_that_user_code_closed(isolator: ProcessIsolator, plugin: Path) -> None:
    assert isolator.invoke_method(plugin, "slow", 1) == 2
    isolator.run_source("import asyncio; asyncio.get_event_loop().close()")
    assert isolator.invoke_method(plugin, "slow", 2) == 4
