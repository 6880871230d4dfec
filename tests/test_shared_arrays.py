"""Arrays that the host and the children of one isolator both see."""

from __future__ import annotations

import asyncio
import gc
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import linux, nothing_left, open_fds

from pisupervisor import (
    AsyncProcessIsolator,
    IsolationOptions,
    IsolatorClosed,
    Limits,
    OptionsError,
    ProcessIsolator,
    SerializationError,
)

MB = 1 << 20
SITE = [sysconfig.get_path("purelib")]

pytestmark = linux


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(import_paths=SITE) as isolator:
        yield isolator


def add(array: Any, number: float) -> float:
    array += number
    return float(array.sum())


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:pisupervisor")


def test_both_see_what_either_writes(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array((np.int64(20), 30))
    assert (array.shape, array.dtype, array.sum()) == ((20, 30), np.float64, 0)
    array[:] = 1
    assert isolator.invoke(add, array, 2) == 1800
    assert (array == 3).all()


def test_while_a_call_runs(isolator: ProcessIsolator) -> None:
    def wait_for(array: Any) -> int:
        import time

        array[0] = 1
        while array[1] == 0:
            time.sleep(0.001)
        return int(array[1])

    array = isolator.shared_array(2, "i8")
    call = isolator.submit(wait_for, array)
    while array[0] == 0:
        pass
    array[1] = 42
    assert call.result(10) == 42


@pytest.mark.parametrize(
    "part",
    [
        lambda array: array[3:7, ::2], lambda array: array.T, lambda array: array[::-1, ::-3], lambda array: array[5],
        lambda array: array.reshape(5, -1), lambda array: array[2:2], lambda array: array.view("u1"),
        lambda array: array[4, 5:6][0:1].reshape(()), lambda array: array.view("i8").view("M8[s]"),
    ],
)  # fmt: skip
def test_parts_and_views_are_shared_too(isolator: ProcessIsolator, part: Any) -> None:
    array = isolator.shared_array((10, 10))
    array[:] = np.arange(100).reshape(10, 10)
    piece = part(array)

    def look(piece: Any) -> Any:
        found = piece.copy()
        piece[...] = 0
        return found

    expected = piece.copy()
    found = isolator.invoke(look, piece)
    assert (found == expected).all()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (piece == np.zeros_like(piece)).all()


def test_what_is_read_only_here_is_so_there(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(10)
    view = array[2:]
    view.flags.writeable = False
    assert isolator.invoke(lambda view: view.flags.writeable, view) is False
    with pytest.raises(ValueError, match="read-only"):
        isolator.invoke(add, view, 1)
    array[:] = 3
    assert isolator.invoke(lambda view: float(view.sum()), view) == 24


def test_a_copy_is_not_shared(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(1000)
    isolator.invoke(add, array.copy(), 1)
    isolator.invoke(add, array + 0, 1)
    assert (array == 0).all()


def test_a_result_is_a_copy(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(100_000)
    found = isolator.invoke(lambda array: array, array)
    array[:] = 5
    assert (found == 0).all()


def test_it_costs_no_bytes_on_the_way(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(1 << 37, "u1")  # 128 GB of nothing: pages come when they are touched
    assert isolator.invoke(lambda array: len(array), array) == 1 << 37
    assert not arenas_of(isolator)


def arenas_of(isolator: ProcessIsolator) -> list[Any]:
    assert isolator._keeper.connection is not None
    return [arena for arena in isolator._keeper.connection.arenas()._in.values() if arena.size > 1 << 30]


def test_it_outlives_the_child(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(10)
    assert isolator.invoke(add, array, 1) == 10
    for _ in range(3):
        isolator.restart()
        assert isolator.invoke(add, array, 0) == 10
    assert isolator.invoke(add, array, 1) == 20


def test_a_child_that_dies_in_the_middle_has_written_what_it_has(isolator: ProcessIsolator) -> None:
    def half(array: Any) -> None:
        import os

        array[:5] = 1
        os._exit(1)

    array = isolator.shared_array(10)
    with pytest.raises(Exception, match="exited"):
        isolator.invoke(half, array)
    assert array.tolist() == [1] * 5 + [0] * 5
    assert isolator.invoke(add, array, 1) == 15


def test_the_child_keeps_it_as_long_as_it_likes(isolator: ProcessIsolator) -> None:
    def keep(array: Any) -> None:
        import builtins

        builtins.kept = array  # type: ignore[attr-defined]

    def kept() -> float:
        import builtins

        return float(builtins.kept.sum())  # type: ignore[attr-defined]

    array = isolator.shared_array(10)
    isolator.invoke(keep, array)
    array[:] = 1
    assert isolator.invoke(kept) == 10
    del array
    gc.collect()
    assert isolator.invoke(kept) == 10


def test_it_is_another_isolators_copy() -> None:
    with ProcessIsolator.create(import_paths=SITE) as one, ProcessIsolator.create(import_paths=SITE) as other:
        array = one.shared_array(10)
        assert other.invoke(add, array, 1) == 10  # two tenants never share memory because one array was handed to both
        assert (array == 0).all()


def test_after_close_it_is_memory_like_any_other(tmp_path: Path) -> None:
    alone = IsolationOptions(import_paths=[*SITE, tmp_path])  # no other isolator shares its zygote
    with nothing_left():
        isolator = ProcessIsolator.create(alone)
        array = isolator.shared_array(10)
        isolator.invoke(add, array, 1)
        isolator.close()
        array += 1
        assert array.sum() == 20
        with pytest.raises(IsolatorClosed):
            isolator.invoke(add, array, 1)
        with pytest.raises(IsolatorClosed):
            isolator.shared_array(10)
        with ProcessIsolator.create(alone) as other:
            assert other.invoke(add, array, 1) == 30
        del array


def test_ten_thousand_leave_nothing(isolator: ProcessIsolator) -> None:
    def child() -> tuple[int, int]:
        import os

        with open("/proc/self/maps") as file:
            return file.read().count("memfd:"), len(os.listdir("/proc/self/fd"))

    isolator.invoke(add, isolator.shared_array(10), 1)
    gc.collect()
    before = isolator.invoke(child), maps(), len(open_fds())
    for number in range(10_000):
        array = isolator.shared_array(10)
        if number % 10 == 0:
            isolator.invoke(add, array, 1)
    del array
    gc.collect()
    assert (isolator.invoke(child), maps(), len(open_fds())) == before


@pytest.mark.root
def test_memory_is_paid_for_by_who_touches_it_first() -> None:
    def touch(array: Any) -> None:
        array[:] = 1

    with ProcessIsolator.create(import_paths=SITE, limits=Limits(memory="128M")) as isolator:
        array = isolator.shared_array(256 * MB, "u1")
        with pytest.raises(Exception, match="memory"):
            isolator.invoke(touch, array)
        array[:] = 1  # ours now
        isolator.invoke(touch, array)


def test_who_asks_for_the_impossible_is_told(isolator: ProcessIsolator) -> None:
    for shape, dtype in (((-1,), "f8"), ("x", "f8"), (1.5, "f8"), ((1 << 40, 1 << 40), "f8"), ((1,) * 40, "f8")):
        with pytest.raises(OptionsError, match="shared_array"):
            isolator.shared_array(shape, dtype)  # type: ignore[arg-type]
    for dtype in ("O", "U5", "S5", [("a", "i4")], "no dtype", object):
        with pytest.raises(OptionsError, match=r"shared_array: .*dtype"):
            isolator.shared_array(3, dtype)


def test_a_child_without_numpy_is_told_of(isolator: ProcessIsolator) -> None:
    array = isolator.shared_array(3)
    with ProcessIsolator.create() as bare:
        own = bare.shared_array(3)
        for value in (own, array):
            with pytest.raises(SerializationError, match=r"numpy.*import_paths"):
                bare.invoke_method("builtins", "len", value)


def test_nobody_can_change_its_size(isolator: ProcessIsolator) -> None:
    """A host that has mapped memory which somebody shrinks dies of SIGBUS."""

    def shrink(array: Any) -> list[str]:
        import fcntl
        import os

        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                if "memfd:pisupervisor" not in os.readlink(f"/proc/self/fd/{name}"):
                    continue
            except OSError:
                continue
            for attempt in (
                lambda fd: os.ftruncate(fd, 0),
                lambda fd: os.ftruncate(fd, 1 << 20),
                lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
                lambda fd: os.truncate(f"/proc/self/fd/{fd}", 0),
            ):
                try:
                    attempt(int(name))
                    found.append("done")
                except OSError as error:
                    found.append(type(error).__name__)
        return found

    array = isolator.shared_array(5000)
    said = isolator.invoke(shrink, array)
    assert len(said) >= 4
    assert set(said) == {"PermissionError"}
    assert array.sum() == 0


def test_from_several_threads(isolator: ProcessIsolator) -> None:
    arrays = [isolator.shared_array(1000) for _ in range(4)]

    def work(array: Any) -> None:
        for _ in range(25):
            isolator.invoke(add, array, 1)

    threads = [threading.Thread(target=work, args=(array,)) for array in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((array == 25).all() for array in arrays)


def test_awaited() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(import_paths=SITE) as isolator:
            array = isolator.shared_array(10)
            assert await isolator.invoke(add, array, 1) == 10
            assert array.sum() == 10

    asyncio.run(main())
