"""Big buffers through memory that both sides see: made by the host, used again, given back, and never believed."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import linux

from pihost import wire
from pisupervisor import ProcessIsolator
from pisupervisor.link.arenas import Arenas, choose

MB = 1 << 20
SITE = [sysconfig.get_path("purelib")]


# --- decisions, without a child -------------------------------------------------------------------------------------


def test_the_smallest_free_arena_that_is_large_enough_is_used_again() -> None:
    assert choose([(1, 8 * MB, True), (2, 2 * MB, True), (3, 2 * MB, False)], MB, 64 * MB).reuse == 2


def test_a_larger_arena_takes_the_place_of_free_ones() -> None:
    choice = choose([(1, MB, True), (2, MB, False)], 5 * MB, 64 * MB)
    assert (choice.reuse, choice.keep, choice.drop) == (None, True, (1,))
    assert 5 * MB <= choice.size <= 6 * MB


def test_what_has_no_room_is_made_for_one_call() -> None:
    assert not choose([], 65 * MB, 64 * MB).keep
    choice = choose([(1, 60 * MB, False)], 5 * MB, 64 * MB)
    assert (choice.keep, choice.drop, choice.size) == (False, (), 5 * MB)


@pytest.mark.parametrize("need", [1, 4097, MB, MB + 1, 100 * MB, 1 << 31, (1 << 31) + 1])
def test_an_arena_wastes_an_eighth_at_most(need: int) -> None:
    size = choose([], need, 1 << 40).size
    assert need <= size <= need + max(MB, need // 8)


# --- a child ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(import_paths=SITE) as isolator:
        yield isolator


def arenas(isolator: ProcessIsolator) -> Arenas:
    assert isolator._keeper.connection is not None
    return isolator._keeper.connection.arenas()


def identity(value: Any) -> Any:
    return value


@linux
def test_arrays_there_and_back(isolator: ProcessIsolator) -> None:
    for array in (
        np.arange(100_000.0),
        np.arange(60_000, dtype="i2").reshape(3, 4, -1),
        np.asfortranarray(np.eye(300)),
    ):
        found = isolator.invoke(identity, array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert (found == array).all()
        found[...] = 0  # it is ours
    assert len(arenas(isolator)._in) == len(arenas(isolator)._out) == 1


@linux
def test_an_arena_is_used_again(isolator: ProcessIsolator) -> None:
    array = np.ones(MB // 8)
    isolator.invoke(identity, array)
    before = (set(arenas(isolator)._in), set(arenas(isolator)._out))
    for _ in range(20):
        isolator.invoke(identity, array)
    assert (set(arenas(isolator)._in), set(arenas(isolator)._out)) == before
    assert all(arena.is_free() for arena in arenas(isolator)._in.values())


@linux
def test_what_the_child_keeps_is_not_written_over(isolator: ProcessIsolator) -> None:
    def keep(value: Any) -> None:
        import builtins

        builtins.kept = [*getattr(builtins, "kept", []), value]  # type: ignore[attr-defined]

    def kept() -> list[float]:
        import builtins

        return [float(value.sum()) for value in builtins.kept]  # type: ignore[attr-defined]

    for number in range(1, 5):
        isolator.invoke(keep, np.full(50_000, float(number)))
    isolator.invoke(identity, np.zeros(50_000))
    assert isolator.invoke(kept) == [50_000.0 * number for number in range(1, 5)]
    lent = [arena for arena in arenas(isolator)._in.values() if not arena.is_free()]
    assert len(lent) == 4
    isolator.run_source("import builtins; del builtins.kept")
    assert all(arena.is_free() for arena in arenas(isolator)._in.values())


@linux
def test_bytes_and_memoryviews_of_any_depth() -> None:
    data = bytes(range(256)) * 2000
    with ProcessIsolator.create() as isolator:  # no numpy in it
        found = isolator.invoke(identity, {"a": [data, bytearray(data)]})
        assert (found["a"], type(found["a"][1])) == ([data, bytearray(data)], bytearray)
        assert isolator.invoke(lambda view: (type(view).__name__, bytes(view)), memoryview(data)) == (
            "memoryview",
            data,
        )
        small = memoryview(b"abcdefgh").cast("H", [2, 2])
        assert isolator.invoke(lambda view: (view.format, view.shape, view.tolist()), small) == (
            "H",
            (2, 2),
            small.tolist(),
        )


@linux
def test_a_call_that_never_looks_at_its_arguments_gives_them_back(isolator: ProcessIsolator) -> None:
    with pytest.raises(LookupError):
        isolator.invoke_method("json", "no_such", np.zeros(100_000))
    assert all(arena.is_free() for arena in arenas(isolator)._in.values())


def test_lengths_are_laid_out_alike_on_both_sides() -> None:
    starts, end = wire.place([1, 64, 65, 0])
    assert starts == [4096, 4160, 4224, 4352]
    assert end == 4352
