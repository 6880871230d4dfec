"""What a callback answers, and what it is called with, where that is more than a short text: through memory that both sides see,
in pieces, or as a descriptor.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import linux, nothing_left, write

from pihost import wire
from pisupervisor import (
    AsyncProcessIsolator,
    CallTimeout,
    ChildTerminated,
    Descriptor,
    Limits,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
)
from pisupervisor.link.arenas import Arenas
from pisupervisor.link.connection import Connection
from pisupervisor.link.frames import Pending

SITE = [sysconfig.get_path("purelib")]
MB = 1 << 20


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with nothing_left(), ProcessIsolator.create(import_paths=SITE) as isolator:
        yield isolator


def arenas(isolator: ProcessIsolator) -> Arenas:
    assert isolator._keeper.connection is not None
    return isolator._keeper.connection.arenas()


def ask(name: str, *args: Any) -> Any:
    import pihost

    return pihost.call_host(name, *args)


def ask_raw(name: str, *parts: bytes) -> bytes:
    import pihost

    return pihost.call_host_raw(name, *parts)


# --- big answers ---------------------------------------------------------------------------------------------------------


@linux
def test_a_big_answer_comes_through_memory_that_is_used_again(isolator: ProcessIsolator) -> None:
    """parity: 48"""
    array = np.arange(100_000.0)
    isolator.register_callback("array", lambda: array)

    def many(count: int) -> tuple[float, bool]:
        import pihost

        total = 0.0
        for _ in range(count):
            got = pihost.call_host("array")
            total += float(got.sum())
            got[:] = 0  # its own
        return total, got.flags.owndata

    assert isolator.invoke(many, 20) == (20 * float(array.sum()), False)
    assert array[5] == 5
    assert len(arenas(isolator)._in) == 2  # the next comes while the last one is there still
    assert isolator.invoke(len, b"x" * 200_000) == 200_000  # for arguments of calls too
    assert len(arenas(isolator)._in) == 2


@linux
@pytest.mark.parametrize(
    "value",
    [
        b"x" * 300_000, bytearray(300_000), memoryview(b"y" * 300_000), "z" * 300_000, [b"a" * 200_000, "b" * 200_000, {"c": 1}],
        ["\u00e4" * 200_000] * 3,
    ],
)  # fmt: skip
def test_big_answers_of_any_kind_arrive_as_they_are(isolator: ProcessIsolator, value: Any) -> None:
    isolator.register_callback("value", lambda: value)

    def check(expected: bytes) -> bool:
        import hashlib
        import pickle

        import pihost

        value = pihost.call_host("value")
        value = value.tobytes() if type(value) is memoryview else value
        return hashlib.sha256(pickle.dumps(value, 5)).digest() == expected

    import hashlib
    import pickle

    plain = value.tobytes() if isinstance(value, memoryview) else value
    assert isolator.invoke(check, hashlib.sha256(pickle.dumps(plain, 5)).digest())


@linux
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_raw_answers_are_bytes_whatever_their_size(isolator: ProcessIsolator, kind: Callable[[bytes], Any]) -> None:
    """parity: 50"""
    isolator.register_callback("raw", lambda part: kind(bytes(part) * 1000))
    for size in (1, 100, 5000):
        assert isolator.invoke(lambda size: [ask_raw("raw", b"x" * size), type(ask_raw("raw", b"y")) is bytes], size) == [
            b"x" * size * 1000, True,
        ]  # fmt: skip
    assert len(arenas(isolator)._in) == 1


@linux
def test_what_the_child_keeps_of_an_answer_is_not_written_over(isolator: ProcessIsolator) -> None:
    numbers = iter(range(1, 100))
    isolator.register_callback("next", lambda: np.full(50_000, float(next(numbers))))

    def keep(count: int) -> list[float]:
        import pihost

        kept = [pihost.call_host("next") for _ in range(count)]
        return [float(each.sum()) for each in kept]

    assert isolator.invoke(keep, 5) == [50_000.0 * number for number in range(1, 6)]
    assert isolator.invoke(keep, 5) == [50_000.0 * number for number in range(6, 11)]
    assert len(arenas(isolator)._in) == 5


@linux
def test_answers_larger_than_what_is_kept() -> None:
    """An arena for that one answer; and where the child pays for more than it may have, its own limit ends it."""
    with ProcessIsolator.create(import_paths=SITE, limits=Limits(memory="192M", result="16M")) as isolator:
        isolator.register_callback("give", lambda size: np.zeros(size, "u1"))
        assert isolator.invoke(lambda: [len(ask("give", 60 * MB)) for _ in range(4)]) == [60 * MB] * 4
        assert not arenas(isolator)._in
        with pytest.raises((ChildTerminated, RemoteError)):
            isolator.invoke(lambda: len(ask("give", 400 * MB)))
        assert isolator.invoke(len, "abc") == 3


@linux
def test_both_directions_in_every_kind_of_call() -> None:
    array = np.arange(50_000.0)
    same = lambda value: value  # noqa: E731

    def swap(count: int) -> bool:
        import numpy

        import pihost

        return all(
            (pihost.call_host("same", numpy.arange(50_000.0) + n) == numpy.arange(50_000.0) + n).all()
            for n in range(count)
        )

    def gives() -> Iterator[Any]:
        import pihost

        for _ in range(3):
            yield pihost.call_host("same", b"x" * 200_000)

    with ProcessIsolator.create(import_paths=SITE, max_concurrency=3) as isolator:
        isolator.register_callback("same", same)
        assert isolator.execute(swap, 3).value
        assert list(isolator.map(swap, [1, 2, 3])) == [True] * 3
        assert list(isolator.invoke(gives)) == [b"x" * 200_000] * 3
        futures = [isolator.submit(swap, 10) for _ in range(6)]
        assert all(future.result() for future in futures)
        isolator.register_callback("through", lambda: isolator.invoke(lambda value: value * 2, array))
        assert (isolator.invoke(ask, "through") == array * 2).all()


@linux
def test_a_coroutine_that_answers_with_much() -> None:
    async def give(size: int) -> Any:
        return np.ones(size)

    async def main() -> list[float]:
        async with AsyncProcessIsolator.create(import_paths=SITE) as isolator:
            isolator.register_callback("give", give)
            return [await isolator.invoke(lambda: float(ask("give", 100_000).sum())) for _ in range(3)]

    assert asyncio.run(main()) == [100_000.0] * 3


@linux
def test_the_childs_want_of_descriptors_and_the_hosts_end_no_call(isolator: ProcessIsolator) -> None:
    """It goes over the socket then."""
    value = b"x" * 300_000
    isolator.register_callback("value", lambda: value)

    def without_descriptors() -> Any:
        import resource

        import pihost

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            return pihost.call_host("value")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert isolator.invoke(without_descriptors) == value
    assert not arenas(isolator)._in
    isolator.invoke(len, "")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def give() -> bytes:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
        return value

    isolator.register_callback("value", give)
    try:
        assert isolator.invoke(lambda: len(ask("value"))) == 300_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not arenas(isolator)._in


@linux
def test_a_child_that_does_not_pay_for_an_answer_is_ended(isolator: ProcessIsolator) -> None:
    isolator.register_callback("value", lambda: b"x" * 300_000)

    def cheat() -> None:
        import os

        os.posix_fallocate = lambda *_: None  # type: ignore[assignment]
        ask("value")

    with pytest.raises(ProtocolError, match="has made 0 bytes"):
        isolator.invoke(cheat)
    assert isolator.invoke(lambda: len(ask("value"))) == 300_000


@linux
def test_a_child_that_raises_where_it_is_asked_to_take_memory_gets_its_answer_without(tmp_path: Path) -> None:
    """And the call is not over for that: what it says next is not the next call's."""
    source = """
        import pihost
        from pihost.inside import arenas

        def cheat():
            arenas.arguments.add = None
            return len(pihost.call_host("value"))
        """
    with ProcessIsolator.create() as isolator:
        isolator.register_callback("value", lambda: b"x" * 300_000)
        pid = isolator.pid
        assert isolator.invoke_method(write(tmp_path, "plugin.py", source), "cheat") == 300_000
        assert isolator.invoke(len, b"x" * 300_000) == 300_000
        assert isolator.pid == pid


@linux
def test_a_child_that_dies_or_is_late_over_a_big_answer(isolator: ProcessIsolator) -> None:
    isolator.register_callback("value", lambda: b"x" * 300_000)

    def die(how: str) -> None:
        import os
        import time

        os.posix_fallocate = lambda *_: os._exit(3) if how == "die" else time.sleep(60)  # type: ignore[assignment]
        ask("value")

    with pytest.raises(ChildTerminated, match="exited with code 3"):
        isolator.invoke(die, "die")
    with pytest.raises(CallTimeout):
        isolator.invoke(die, "sleep", timeout=0.5)
    assert isolator.invoke(lambda: len(ask("value"))) == 300_000


@linux
def test_what_a_callback_cannot_answer_is_the_callbacks_failure(isolator: ProcessIsolator) -> None:
    class Mine: ...

    isolator.register_callback("mine", lambda: [b"x" * 300_000, Mine()])
    isolator.register_callback("device", lambda: open(os.devnull))  # noqa: SIM115
    isolator.register_callback("directory", lambda: Descriptor(directory))
    directory = os.open("/", os.O_RDONLY)
    try:
        for name in ("mine", "device", "directory"):
            with pytest.raises(RemoteError, match=f"function '{name}' failed"):
                isolator.invoke(ask, name)
    finally:
        os.close(directory)
    assert isolator.invoke(len, "abc") == 3


# --- descriptors and shared arrays ---------------------------------------------------------------------------------------


@linux
def test_a_callback_may_open_a_file_for_the_child(isolator: ProcessIsolator, tmp_path: Path) -> None:
    """A broker: the host decides by name, the child gets what it may read, open, and no way to the rest."""
    write(tmp_path, "a.txt", "of the tenant's")
    allowed = {"a.txt": tmp_path / "a.txt"}
    isolator.register_callback("open", lambda name: open(allowed[name]), expose_errors=True)  # noqa: SIM115
    assert isolator.invoke(lambda: ask("open", "a.txt").read()) == "of the tenant's"
    assert isolator.execute(lambda: ask("open", "a.txt").read()).value == "of the tenant's"
    with pytest.raises(RemoteError, match="KeyError"):
        isolator.invoke(ask, "open", "/etc/shadow")

    def after() -> list[int]:
        import os

        return [len(os.listdir("/proc/self/fd")), ask("open", "a.txt").fileno() > 2, len(os.listdir("/proc/self/fd"))]

    before, got, behind = isolator.invoke(after)
    assert (before, got) == (behind, True)


@linux
def test_a_callback_may_hand_over_one_end_of_a_socket(isolator: ProcessIsolator) -> None:
    ours, theirs = socket.socketpair()
    isolator.register_callback("connect", lambda: theirs)
    with ours, theirs:
        assert isolator.invoke(lambda: ask("connect").send(b"hello")) == 5
        assert ours.recv(10) == b"hello"


@linux
def test_so_many_descriptors_at_most(isolator: ProcessIsolator, tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "")
    isolator.register_callback("files", lambda count: [open(path) for _ in range(count)])  # noqa: SIM115
    assert isolator.invoke(lambda: len(ask("files", wire.MAX_DESCRIPTORS))) == wire.MAX_DESCRIPTORS
    with pytest.raises(RemoteError, match="function 'files' failed"):
        isolator.invoke(lambda: len(ask("files", wire.MAX_DESCRIPTORS + 1)))


@linux
def test_a_shared_array_is_the_same_one_as_an_answer() -> None:
    with ProcessIsolator.create(import_paths=SITE) as isolator:
        both = isolator.shared_array((500, 500))
        isolator.register_callback("both", lambda: both[:250])
        for number in range(1, 4):
            isolator.invoke(lambda number: ask("both").fill(number), number)
            assert both.sum() == 250 * 500 * number
        assert isolator.invoke(lambda mine: float(mine.sum() + ask("both").sum()), both) == 2 * 250 * 500 * 3


# --- large arguments -----------------------------------------------------------------------------------------------------


@linux
def test_large_text_among_the_arguments(isolator: ProcessIsolator) -> None:
    """It is in no arena, and larger than a frame."""
    seen: list[Any] = []
    isolator.register_callback("take", lambda *args, **keywords: seen.append((args, keywords)))
    isolator.invoke(lambda: ask("take", "x" * (6 * MB), "\u00e4" * (2 * MB)))
    isolator.invoke(lambda: __import__("pihost").call_host("take", key=["y" * (5 * MB), b"z" * (5 * MB)]))
    assert seen == [
        (("x" * (6 * MB), "\u00e4" * (2 * MB)), {}), ((), {"key": ["y" * (5 * MB), b"z" * (5 * MB)]}),
    ]  # fmt: skip


@linux
@pytest.mark.parametrize("call", [lambda: ask("take", "x" * 1_100_000), lambda: ask_raw("take", b"x" * 1_100_000)])
def test_the_bound_is_named(call: Callable[[], object]) -> None:
    with ProcessIsolator.create(limits=Limits(result="1M")) as isolator:
        isolator.register_callback("take", len)
        with pytest.raises(
            ValueError, match=r"more than 1048576 bytes \(Limits.result\); send them in parts, or raise"
        ):
            isolator.invoke(call)
        assert isolator.invoke(lambda: ask("take", "x" * 1_000_000)) == 1_000_000


@linux
def test_names_count_as_they_are_written() -> None:
    with ProcessIsolator.create(limits=Limits(result="1M")) as isolator:
        pid = isolator.pid
        for call in (lambda: ask("\u00e4" * 1_000_000), lambda: ask_raw("\u00e4" * 1_000_000, b"x")):
            with pytest.raises(ValueError, match=r"\(Limits.result\)"):
                isolator.invoke(call)
        assert isolator.invoke(len, "abc") == 3
        assert isolator.pid == pid


@linux
def test_large_text_of_calls_side_by_side_and_in_maps() -> None:
    def send(letter: str) -> int:
        return sum(ask("take", letter * 900_000) for _ in range(8))

    with ProcessIsolator.create(max_concurrency=3, limits=Limits(result="1M")) as isolator:
        isolator.register_callback("take", lambda text: len(text) if set(text) == {text[0]} else 0)
        assert [future.result() for future in [isolator.submit(send, letter) for letter in "abcdef"]] == [7_200_000] * 6
        assert list(isolator.map(send, "abc")) == [7_200_000] * 3
    with ProcessIsolator.create(limits=Limits(result="1M")) as isolator:  # more than four times the largest answer
        isolator.register_callback("take", len)
        assert list(isolator.map(send, "abc")) == [7_200_000] * 3


@linux
def test_what_a_call_asks_that_nobody_wants_any_more_is_whole_all_the_same() -> None:
    """Of the calls of a map that was closed: pieces may be of a question."""
    with ProcessIsolator.create() as isolator:
        isolator.register_callback("take", len)
        squares = isolator.map(lambda n: ask("take", "x" * (3 * MB)) + n, range(4))
        assert next(squares) == 3 * MB
        pid = isolator.pid
        squares.close()
        assert isolator.invoke(len, "abc") == 3
        assert isolator.pid == pid


@linux
@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ("[(wire.PIECE, bytes(1 << 20))] * 3 + [(wire.CALLBACK, b'x')]", "an answer of more than"),
        ("[(wire.PIECE, b'x')] * 2000 + [(wire.CALLBACK, b'x')]", "pieces"),
        ("[(wire.PIECE, b'x' * 8), (wire.ROOM, bytes(8))]", "room asked for without a size"),
        ("[(wire.PIECE, b'x'), (wire.CALLBACK, b'y')]", "a callback that cannot be read"),
    ],
)  # fmt: skip
def test_pieces_of_questions_that_no_honest_child_sends(tmp_path: Path, frames: str, match: str) -> None:
    source = f"""
        from pihost import wire
        from pihost.inside import callbacks

        def lie():
            host = callbacks.host
            for kind, body in {frames}:
                host._link.sock.sendall(wire.pack_header(kind, host.call_id, len(body)) + body)
            host._inbox.receive()
        """
    with ProcessIsolator.create(limits=Limits(result="2M")) as isolator:
        isolator.register_callback("take", len)
        with pytest.raises(ProtocolError, match=match):
            isolator.invoke_method(write(tmp_path, "liar.py", source), "lie")
        assert isolator.invoke(len, "abc") == 3


def test_what_was_asked_is_no_part_of_the_answer() -> None:
    pending = Pending(1, 100)
    assert not pending.take(wire.PIECE, b"a" * 60)
    assert pending.take(wire.CALLBACK, b"b" * 40)
    assert pending.asked == (wire.CALLBACK, b"a" * 60 + b"b" * 40)
    pending.has_its_answer()
    assert not pending.take(wire.PIECE, b"c" * 60)
    assert pending.take(wire.RESULT, b"d")
    assert pending.answer is not None
    assert pending.answer.body == b"c" * 60 + b"d"


def test_who_has_asked_holds_nothing_up() -> None:
    """What was asked and answered counts no more as an answer that waits for somebody."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Connection(ours, 1000, answer=lambda *_: b"\0")
        pending = Pending(1, 1000, owned=False)
        link.calls[1] = pending

        def say() -> None:
            for _ in range(400):
                theirs.sendall(wire.pack_header(wire.CALLBACK, 1, 900) + bytes(900))
                theirs.recv(100)
            theirs.sendall(wire.pack_header(wire.RESULT, 1, 1) + b"x")

        thread = threading.Thread(target=say)
        thread.start()
        assert link.wait(pending).body == b"x"
        thread.join()
        assert link._held == 0
