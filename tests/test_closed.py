"""Every public name of an isolator that is closed: what needs its child says IsolatorClosed, what it knows it still tells."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, write

from pisupervisor import AsyncProcessIsolator, ExitReason, IsolatorClosed, ProcessIsolator

pytestmark = linux

SOURCE = """
    def f(): return 1
    def items(): yield from (1, 2)
    class Kind:
        def method(self): return 1
"""
Act = Callable[[Any, Path], Any]
REFUSED: dict[str, Act] = {
    "invoke_method": lambda isolator, path: isolator.invoke_method(path, "f"),
    "invoke": lambda isolator, path: isolator.invoke(len, ""),
    "execute": lambda isolator, path: isolator.execute(f"{path}:f"),
    "run_source": lambda isolator, path: isolator.run_source("1"),
    "run_script": lambda isolator, path: isolator.run_script(path),
    "map": lambda isolator, path: isolator.map(len, [""]),
    "submit": lambda isolator, path: isolator.submit(len, ""),
    "submit_call": lambda isolator, path: isolator.submit_call(isolator.invoke, len, ""),
    "create_object": lambda isolator, path: isolator.create_object(path, "Kind"),
    "copy_object": lambda isolator, path: isolator.copy_object(1),
    "get_method": lambda isolator, path: isolator.get_method(path, "f"),
    "shared_array": lambda isolator, path: isolator.shared_array(1),
    "object_count": lambda isolator, path: isolator.object_count(),
    "register_callback": lambda isolator, path: isolator.register_callback("f", len),
    "exit": lambda isolator, path: isolator.exit(),
    "terminate": lambda isolator, path: isolator.terminate(),
    "abort": lambda isolator, path: isolator.abort(),
    "restart": lambda isolator, path: isolator.restart(),
    "pause": lambda isolator, path: isolator.pause(),
    "resume": lambda isolator, path: isolator.resume(),
    "resource_usage": lambda isolator, path: isolator.resource_usage(),
    "pids": lambda isolator, path: isolator.pids(),
}
TOLD: dict[str, Act] = {
    "pid": lambda isolator, path: isolator.pid is None,
    "state": lambda isolator, path: isolator.state == "stopped",
    "applied": lambda isolator, path: "memory" in isolator.applied,
    "id": lambda isolator, path: isolator.id > 0,
    "options": lambda isolator, path: isolator.options.max_concurrency == 1,
    "system_calls": lambda isolator, path: isolator.system_calls() == (),
    "unregister_callback": lambda isolator, path: isolator.unregister_callback("known"),
    "set_data": lambda isolator, path: isolator.set_data("name", 1),
    "get_data": lambda isolator, path: isolator.get_data("name") == 1,
}
ALL = {*REFUSED, *TOLD, "create", "close", "wait_for_exit"}
PUBLIC = {*dir(ProcessIsolator), *dir(AsyncProcessIsolator), "id", "options"}


def test_nothing_public_is_left_out() -> None:
    assert {name for name in PUBLIC if not name.startswith("_")} == ALL


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("closed"), "plugin.py", SOURCE)


@pytest.fixture(scope="module")
def closed(path: Path) -> tuple[ProcessIsolator, dict[str, Callable[[], Any]]]:
    """One, and what its handles do."""
    isolator = ProcessIsolator.create()
    isolator.register_callback("known", len)
    isolator.set_data("name", 1)
    kept, method = isolator.create_object(path, "Kind"), isolator.get_method(path, "f")
    stream, results = isolator.invoke_method(path, "items"), isolator.map(len, [""])
    isolator.close()
    return isolator, {
        "object": kept.method, "method": method, "method of an object": lambda: method.invoke(kept),
        "stream": lambda: next(stream), "map": lambda: next(results),
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_child_is_refused(closed: Any, path: Path, name: str) -> None:
    with pytest.raises(IsolatorClosed, match="this isolator is closed"):
        REFUSED[name](closed[0], path)


@pytest.mark.parametrize("name", ["object", "method", "method of an object", "stream", "map"])
def test_so_are_calls_of_handles(closed: Any, name: str) -> None:
    with pytest.raises(IsolatorClosed, match="this isolator is closed"):
        closed[1][name]()


@pytest.mark.parametrize("name", TOLD)
def test_what_is_known_is_told(closed: Any, path: Path, name: str) -> None:
    assert TOLD[name](closed[0], path) in (True, None)


def test_how_its_child_ended_is_known(closed: Any) -> None:
    assert closed[0].wait_for_exit(1).reason is ExitReason.KILLED


def test_the_awaited_ones_do_the_same(path: Path) -> None:
    async def main() -> None:
        isolator = await AsyncProcessIsolator.create()
        isolator.register_callback("known", len)
        isolator.set_data("name", 1)
        kept, method = await isolator.create_object(path, "Kind"), await isolator.get_method(path, "f")
        stream, results = await isolator.invoke_method(path, "items"), isolator.map(len, [""])
        await isolator.close()
        handles: list[Callable[[], Any]] = [
            lambda: kept.invoke("method"), method, lambda: method.invoke(kept), stream.__anext__, results.__anext__,
        ]  # fmt: skip
        for act in (*(lambda each=each: each(isolator, path) for each in REFUSED.values()), *handles):
            with pytest.raises(IsolatorClosed, match="this isolator is closed"):
                await _done(act())
        for name, look in TOLD.items():
            assert await _done(look(isolator, path)) in (True, None), name
        assert (await isolator.wait_for_exit(1)).reason is ExitReason.KILLED

    asyncio.run(main())


async def _done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
