"""The short way of a call in the child: a target that was called before comes to the same as the first time, whatever that is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, write

from pihost import wire
from pihost.inside.serve import Link, Worker
from pisupervisor import ChildTerminated, ProcessIsolator, RemoteError, RestartPolicy, SerializationError
from pisupervisor.link.arguments import dump_call
from pisupervisor.link.calls import pack_call

PLUGIN = """
    import os, pihost

    calls = 0

    class Table:
        def size(self, n): return n
        __slots__ = ()

    class Evil(Exception):
        __class__ = property(lambda self: 1 / 0)

    def same(value): return value
    def again(n): return n if n == 0 else 1 + pihost.call_host("again", n - 1)
    def fail(): raise KeyError("no such thing")
    def fail_evil(): raise Evil
    def leave(): raise SystemExit(3)
    def opaque(): return object()
    def forked():
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return pid > 0

    def forked_in_c():  # which runs none of Python's hooks
        import ctypes
        pid = ctypes.PyDLL(None).fork()
        if pid:
            os.waitpid(pid, 0)
        return pid > 0

    async def later(x): return x
    def items(n): yield from range(n)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quick"), "plugin.py", PLUGIN)


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as made:
        yield made


@linux
@pytest.mark.parametrize(
    "value",
    [
        0, -1, 1 << 70, 1.5, float("inf"), True, None, "text", "\ud800", b"bytes", [1, [2]], {"a": 1}, {1: 2}, (1, 2),
        "x" * (3 << 20),
    ],
    ids=lambda value: str(type(value).__name__),
)  # fmt: skip
def test_values(isolator: ProcessIsolator, plugin: Path, value: Any) -> None:
    same = isolator.get_method(plugin, "same")
    assert [same(0), same(value), same(value), same(0)] == [0, value, value, 0]
    assert same(value=value) == value


@linux
@pytest.mark.parametrize("name", ["fail", "fail_evil", "leave"])
def test_what_is_raised(isolator: ProcessIsolator, plugin: Path, name: str) -> None:
    told = []
    for _ in range(3):
        with pytest.raises(RemoteError) as caught:
            isolator.invoke_method(plugin, name)
        told.append((caught.value.type_name, caught.value.remote_traceback))
    assert told[0] == told[1] == told[2]
    assert "pihost" not in told[0][1]


@linux
def test_other_ends(isolator: ProcessIsolator, plugin: Path) -> None:
    later, items, opaque = (isolator.get_method(plugin, name) for name in ("later", "items", "opaque"))
    size, forked = isolator.get_method(plugin, "Table.size"), isolator.get_method(plugin, "forked")
    forked_in_c = isolator.get_method(plugin, "forked_in_c")
    isolator.register_callback("again", lambda n: isolator.invoke_method(plugin, "again", n))
    for _ in range(3):
        assert later(5) == 5
        assert list(items(3)) == [0, 1, 2]
        assert size(4) == 4
        assert forked() is True
        assert forked_in_c() is True
        assert isolator.invoke_method(plugin, "again", 5) == 5
        with pytest.raises(SerializationError):
            opaque()
        with pytest.raises(RemoteError):
            size(1, 2, 3)


@linux
def test_arguments_that_cannot_be_loaded(isolator: ProcessIsolator, plugin: Path) -> None:
    same = isolator.get_method(plugin, "same")
    assert same(1) == 1
    for _ in range(2):
        with pytest.raises(SerializationError, match="could not rebuild"):
            same(Unloadable())
    assert same(1) == 1


class Unloadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@linux
def test_a_function_that_was_released_is_called_no_more(isolator: ProcessIsolator) -> None:
    """Its place in what the child knows ends with it: the object itself does."""
    with isolator.map(_Counter(), range(3)) as results:
        assert list(results) == [1, 2, 3]
    before = isolator.object_count()
    assert list(isolator.map(_Counter(), range(3))) == [1, 2, 3]
    assert isolator.object_count() == before
    assert isolator.invoke(_counters) == 0


class _Counter:
    def __init__(self) -> None:
        self.n = 0

    def __call__(self, _x: int) -> int:
        self.n += 1
        return self.n


def _counters() -> int:
    import gc

    gc.collect()
    return sum(type(value).__name__ == "_Counter" for value in gc.get_objects())


PATCHED = """
    class Base:
        @staticmethod
        def static(): return "old"
        @classmethod
        def of_class(cls): return "old"
        def own(self): return "old"
        class Inner:
            def own(self): return "old"

    class Heir(Base):
        pass

    def plain(): return "old"
    def __getattr__(name): return lambda: state

    state = "old"

    def patch():
        global state, plain
        state = "new"
        plain = lambda: "new"
        Base.static = staticmethod(plain)
        Base.of_class = classmethod(lambda cls: "new")
        Base.own = Base.Inner.own = lambda self: "new"
"""
METHODS = ("static", "of_class", "own")
TARGETS = (*(f"{owner}.{name}" for owner in ("Base", "Heir") for name in METHODS), "Base.Inner.own", "plain", "absent")


@linux
def test_what_was_patched_in_the_child_is_what_is_called(tmp_path: Path) -> None:
    """Also where the target is known, and what was patched is in a class, or in a base of it."""
    file = write(tmp_path, "patched.py", PATCHED)
    with ProcessIsolator.create() as isolator:
        handles = [isolator.get_method(file, target) for target in TARGETS]
        for _ in range(2):
            assert [handle() for handle in handles] == ["old"] * len(TARGETS)
        isolator.invoke_method(file, "patch")
        for _ in range(2):
            assert [handle() for handle in handles] == ["new"] * len(TARGETS)


@linux
def test_a_child_that_dies_in_a_known_call(isolator: ProcessIsolator) -> None:
    kill = isolator.get_method("os", "_exit")
    upper = isolator.get_method("os.path", "basename")
    for _ in range(2):
        assert upper("/a/b") == "b"
        assert upper("/a/b") == "b"
        with pytest.raises(ChildTerminated):
            kill(3)


# --- the loop alone ----------------------------------------------------------------------------------------------------


def answers(said: bytes, cut: int) -> bytes:
    """What a worker says to these bytes, of which it gets so many first."""
    ours, theirs = socket.socketpair()
    limits = {"pickle": 0, "result": 1 << 20, "modules": 0, "concurrency": 1, "lines": 0}
    worker = Worker()
    worker.begin(Link(theirs.detach()), limits)
    with ours:
        ours.sendall(said[:cut])
        ours.settimeout(5)
        worker.link.read()
        ours.sendall(said[cut:])
        ours.shutdown(socket.SHUT_WR)
        assert worker.quick.serve(worker.link) == 0
        worker.link.sock.close()
        worker.library.close()
        told = b""
        while more := ours.recv(1 << 16):
            told += more
    return told


def test_frames_that_are_cut_anywhere() -> None:
    code = ("key", "file", "tool", "/tool.py", (("tool.py", b"def double(x): return 2 * x\n"),))
    import pickle

    body = pickle.dumps(code)
    said = wire.pack_header(wire.CODE, 1, len(body)) + body
    expected = b""
    for number in range(4):
        body = pack_call("method", False, "key", "double", dump_call((number,), {})[0])
        said += wire.pack_header(wire.CALL, number, len(body)) + body
        text = wire.pack_text(b"%d" % (2 * number))
        expected += wire.pack_header(wire.RESULT, number, len(text)) + text
    for cut in range(1, len(said)):
        assert answers(said, cut) == expected
