"""A child of another version of Python, or of an environment without any package, answers like any other."""

from __future__ import annotations

import datetime
import decimal
import os
import sys
import uuid
import venv
from pathlib import Path

import pytest
from helpers import linux, nothing_left, write
from test_launch import interpreters

from pisupervisor import ProcessIsolator, RemoteError, SerializationError, TypeCodec

pytestmark = linux

PLUGIN = """
    import asyncio, dataclasses, datetime, decimal, enum, pathlib, sys, uuid

    class Color(enum.Enum):
        RED = "red"

    @dataclasses.dataclass
    class Point:
        x: int
        y: float = 0.5

    class Money:
        def __init__(self, amount):
            self.amount = amount

    class Counter:
        def __init__(self, start):
            self.value = start

        def add(self, count):
            self.value += count
            return self.value

    def everything():
        return {
            "none": None, "flag": True, "whole": 1 << 70, "real": [0.1, float("inf")], "text": "\\u00e9\\ud800",
            "bytes": b"x" * 600,
            "array": bytearray(b"y"), "tuple": (1, "x"), "set": {1, 2}, "frozen": frozenset("a"), "complex": 1j,
            "day": datetime.date(2024, 1, 1), "moment": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
            "time": datetime.time(1, 2), "span": datetime.timedelta(1), "price": decimal.Decimal("1.50"), "id": uuid.UUID(int=5),
            "path": pathlib.Path("/a"), "color": Color.RED, "point": Point(1), "keys": {1: "int", (1,): "tuple"},
        }

    def packages():
        found = []
        for name in ("msgspec", "numpy", "pisupervisor", "pip"):
            try:
                __import__(name)
                found.append(name)
            except ImportError:
                pass
        return found

    def doubled(count):
        import pihost

        for number in range(count):
            yield pihost.call_host("double", number)

    async def later():
        await asyncio.sleep(0.01)
        return "later"

    def fail():
        raise ValueError("as asked")

    def pay():
        return [Money(3)]

    def to_data(money):
        return money.amount
"""
EVERYTHING = {
    "none": None, "flag": True, "whole": 1 << 70, "real": [0.1, float("inf")], "text": "\u00e9\ud800", "bytes": b"x" * 600,
    "array": bytearray(b"y"), "tuple": (1, "x"), "set": {1, 2}, "frozen": frozenset("a"), "complex": 1j,
    "day": datetime.date(2024, 1, 1), "moment": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "time": datetime.time(1, 2), "span": datetime.timedelta(1), "price": decimal.Decimal("1.50"), "id": uuid.UUID(int=5),
    "path": Path("/a"), "color": "red", "point": {"x": 1, "y": 0.5}, "keys": {1: "int", (1,): "tuple"},
}  # fmt: skip


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    return write(tmp_path, "plugin.py", PLUGIN)


def answers(isolator: ProcessIsolator, plugin: Path) -> None:
    assert isolator.invoke_method(plugin, "everything") == EVERYTHING
    assert isolator.invoke_method(plugin, "packages") == []
    isolator.register_callback("double", lambda number: 2 * number)
    assert list(isolator.invoke_method(plugin, "doubled", 3)) == [0, 2, 4]
    assert isolator.invoke_method(plugin, "later") == "later"
    assert isolator.create_object(plugin, "Counter", 5).add(3) == 8
    assert isolator.execute(f"{plugin}:packages").value == []
    assert isolator.run_source("print('hello')\n6 * 7").stdout == "hello\n"
    assert isolator.invoke_method(plugin, "pay") == ["3 coins"]
    with pytest.raises(ValueError, match="as asked") as caught:
        isolator.invoke_method(plugin, "fail")
    assert isinstance(caught.value, RemoteError)
    assert "raise ValueError" in caught.value.remote_traceback


def codec(plugin: Path) -> TypeCodec:
    return TypeCodec(type=f"{plugin}:Money", encode=f"{plugin}:to_data", decode=lambda amount: f"{amount} coins")


@pytest.mark.parametrize("python", interpreters(), ids=os.path.basename)
def test_another_version_answers_without_any_package(plugin: Path, python: str) -> None:
    """Every version that this machine has; code cannot be sent by value to any but the host's own, and that is said."""
    with nothing_left(), ProcessIsolator.create(python=python, types=[codec(plugin)]) as isolator:
        version = isolator.run_source("import sys; sys.version_info[:2]").value
        answers(isolator, plugin)
        assert version == isolator._keeper.template.interpreter.version
        if version != sys.version_info[:2]:
            with pytest.raises(SerializationError, match="functions cannot be sent to Python"):
                isolator.invoke(lambda: 1)


def test_an_environment_without_any_package_answers(plugin: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    assert not list((tmp_path / "env").glob("lib/python3*/site-packages/*"))
    with ProcessIsolator.create(python=tmp_path / "env", types=[codec(plugin)]) as isolator:
        answers(isolator, plugin)
