"""Big buffers through memory that both sides see: made by the host, used again, given back, and never believed."""

from __future__ import annotations

import os
import resource
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import linux, nothing_left, open_fds, write

from pihost import wire
from pisupervisor import (
    Filesystem,
    IsolationContext,
    IsolationError,
    IsolationOptions,
    Limits,
    MemoryLimitExceeded,
    Plugin,
    ProcessHost,
    ProcessIsolator,
    ProtocolError,
    RestartPolicy,
    SerializationError,
)
from pisupervisor.link.arenas import MOST, Arenas, choose

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


def test_so_many_are_kept_at_most() -> None:
    lent = [(number, MB, False) for number in range(MOST)]
    assert choose(lent[1:], MB, 1 << 40).keep
    assert not choose(lent, MB, 1 << 40).keep


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
        assert isolator.invoke(lambda view: view.nbytes, memoryview(b"")) == 0
        with pytest.raises(SerializationError, match="not one piece"):
            isolator.invoke(len, memoryview(data)[::2])
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


@linux
def test_results_go_both_ways_in_every_kind_of_call(isolator: ProcessIsolator) -> None:
    array = np.arange(200_000.0)
    shown = isolator.execute(lambda a: (print("seen"), a * 2)[1], array)
    assert shown.stdout == "seen\n"
    assert (shown.value == array * 2).all()
    assert [item.sum() for item in isolator.invoke(pieces, array)] == [array.sum() + n * 200_000 for n in range(3)]
    held = isolator.copy_object(array)
    assert (held.invoke("__add__", array) == array + array).all()
    assert isolator.submit(identity, array).result()[-1] == 199_999
    assert (isolator.run_source("import numpy; numpy.full(100000, 7)").value == 7).all()


def pieces(array: Any) -> Any:
    for number in range(3):
        yield array + number


@linux
def test_callbacks_that_call_with_big_arguments_in_turn(isolator: ProcessIsolator) -> None:
    def outer(array: Any) -> float:
        import pihost

        pihost.call_host("inner")
        return float(array.sum())

    seen = []
    isolator.register_callback("inner", lambda: seen.append(isolator.invoke(identity, np.full(100_000, 2.0)).sum()))
    assert isolator.invoke(outer, np.full(100_000, 1.0)) == 100_000
    assert seen == [200_000]


@linux
def test_a_call_that_is_repeated_brings_its_buffers_again(tmp_path: Path) -> None:
    def die_once(array: Any, path: str) -> float:
        import os

        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(1)
        return float(array.sum())

    tmp_path.chmod(0o777)
    with ProcessIsolator.create(
        import_paths=SITE, filesystem=Filesystem(writable=[tmp_path]), restart=RestartPolicy(backoff=0)
    ) as isolator:
        path = str(tmp_path / "died")
        assert isolator.invoke(die_once, np.ones(100_000), path, idempotent=True) == 100_000


@linux
def test_on_start_may_carry_what_is_big() -> None:
    big = bytes(1 << 20)

    def start() -> None:
        import builtins

        builtins.started = len(big)  # type: ignore[attr-defined]

    with ProcessIsolator.create(on_start=start) as isolator:
        assert isolator.run_source("import builtins; builtins.started").value == 1 << 20


@linux
def test_two_isolators_at_once() -> None:
    def work(isolator: ProcessIsolator, number: int, failed: list[int]) -> None:
        for step in range(20):
            array = np.full(50_000 + step, number, "i4")
            if not (isolator.invoke(identity, array) == array).all():
                failed.append(step)

    failed: list[int] = []
    with ProcessIsolator.create(import_paths=SITE) as one, ProcessIsolator.create(import_paths=SITE) as other:
        threads = [threading.Thread(target=work, args=(each, n, failed)) for n, each in enumerate((one, other, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


@linux
def test_calls_side_by_side_in_one_child() -> None:
    """Each has an arena of its own there and back, for as long as it needs it."""

    def twice(array: Any, kept: bool) -> Any:
        import builtins
        import time

        if kept:
            builtins.kept = [*getattr(builtins, "kept", [])[-3:], (array, float(array[0]))]  # type: ignore[attr-defined]
        time.sleep(0.001)
        return array * 2

    def intact() -> bool:
        import builtins

        return all(bool((array == value).all()) for array, value in builtins.kept)  # type: ignore[attr-defined]

    failed: list[object] = []

    def work(number: int) -> None:
        for step in range(40):
            array = np.full(20_000 + 4_000 * (step % 5), float(100 * number + step))
            try:
                if not (isolator.invoke(twice, array, step % 7 == 0) == array * 2).all():
                    failed.append((number, step))
            except Exception as error:
                failed.append(error)

    with ProcessIsolator.create(import_paths=SITE, max_concurrency=4, limits=Limits(memory="256M")) as isolator:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert isolator.invoke(intact)
        isolator.run_source("import builtins; del builtins.kept")
        isolator.run_source("1")
        assert all(arena.is_free() for arena in arenas(isolator)._in.values())
        assert all(arena.is_free() for arena in arenas(isolator)._out.values())


@linux
def test_many_under_way_on_one_link() -> None:
    arrays = [np.full(20_000 + 1000 * number, float(number)) for number in range(100)]
    with ProcessIsolator.create(import_paths=SITE) as isolator:
        for found, array in zip(isolator.map(lambda array: array * 2, arrays), arrays, strict=True):
            assert (found == array * 2).all()
        assert len(arenas(isolator)._in) <= MOST
        assert len(arenas(isolator)._out) <= MOST
        shared = [isolator.shared_array(3) for _ in range(5)]
        assert [*isolator.map(lambda array: array.__iadd__(1).sum(), shared * 10)][-1] == 30


class Doubling(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["size"] = context.arguments[0].nbytes
        context.arguments[0] = None
        return bytes(MB)


@linux
def test_plugins_get_and_give_what_is_big() -> None:
    with ProcessHost() as host:
        done = host.execute_plugin(Doubling(), IsolationContext(arguments=[memoryview(bytes(MB))]))
        assert done.result == bytes(MB)
        assert done.context.properties == {"size": MB}


@linux
def test_a_host_without_descriptors_is_told(isolator: ProcessIsolator) -> None:
    isolator.restart()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)  # all below it are taken
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(IsolationError, match=r"no memory file of \d+ bytes.*ulimit -n"):
            isolator.invoke(len, memoryview(bytes(MB)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isolator.invoke(len, memoryview(bytes(MB))) == MB


# --- what is kept, and who pays ----------------------------------------------------------------------------------------


@linux
def test_ten_thousand_arrays_leave_descriptors_and_maps_flat(isolator: ProcessIsolator) -> None:
    def child() -> tuple[int, int]:
        import os

        with open("/proc/self/maps") as file:
            return file.read().count("memfd:"), len(os.listdir("/proc/self/fd"))

    array = np.arange(17_000.0)
    isolator.invoke(identity, array)
    before = isolator.invoke(child), maps(), len(open_fds())
    for _ in range(10_000):
        found = isolator.invoke_method("copy", "copy", array)
    assert (found == array).all()
    assert (isolator.invoke(child), maps(), len(open_fds())) == before


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:pisupervisor ")


@linux
def test_nothing_is_left_after_restarts_and_close(tmp_path: Path) -> None:
    alone = IsolationOptions(import_paths=[*SITE, tmp_path])  # no other isolator shares its zygote
    with nothing_left():
        before = maps()
        with ProcessIsolator.create(alone) as isolator:
            held = isolator.copy_object(1)  # a handle outlives the child, and must not keep its memory
            for _ in range(3):
                isolator.invoke(identity, np.ones(100_000))
                isolator.restart()
                assert maps() == before
            isolator.invoke(identity, np.ones(100_000))
        assert maps() == before
        assert held is not None


@linux
@pytest.mark.root
def test_the_child_pays_for_its_arguments() -> None:
    """Its own limit counts the pages: without that, an argument would be held at the host's expense."""
    with ProcessIsolator.create(limits=Limits(memory="64M")) as isolator:
        assert isolator.invoke(len, bytearray(10 * MB)) == 10 * MB
        used = isolator._keeper.child.meter.whole_usage()  # type: ignore[union-attr]
        assert used.rss is not None
        with pytest.raises(MemoryLimitExceeded):
            isolator.invoke(len, memoryview(bytearray(100 * MB)))
        assert isolator.invoke(len, b"x" * MB) == MB


@linux
def test_more_than_a_quarter_of_the_memory_is_not_kept() -> None:
    with ProcessIsolator.create(limits=Limits(memory="256M"), import_paths=SITE) as isolator:
        assert isolator.invoke(len, np.ones(100 * MB, "u1")) == 100 * MB
        assert arenas(isolator)._in == {}
        assert isolator.run_source("open('/proc/self/maps').read().count('memfd:')").value == 0
        isolator.invoke(len, np.ones(50 * MB, "u1"))
        assert len(arenas(isolator)._in) == 1
        isolator.invoke(len, np.ones(60 * MB, "u1"))  # takes its place
        assert len(arenas(isolator)._in) == 1


@linux
@pytest.mark.root
def test_what_a_child_hoards_is_bounded() -> None:
    """Arenas are lent up to a quarter of its memory; what it keeps beyond that is its own, until the limit ends it."""

    def hoard(view: memoryview) -> int:
        import builtins

        builtins.hoard = [*getattr(builtins, "hoard", []), view]  # type: ignore[attr-defined]
        return sum(view[-1] for view in builtins.hoard)  # type: ignore[attr-defined]

    with ProcessIsolator.create(limits=Limits(memory="128M", swap=0)) as isolator:
        for number in range(1, 9):
            assert isolator.invoke(hoard, memoryview(bytes([1]) * (9 * MB))) == number
            assert sum(arena.size for arena in arenas(isolator)._in.values()) <= 32 * MB
        more = [isolator.submit(hoard, memoryview(bytes([1]) * (9 * MB))) for _ in range(20)]
        assert any(isinstance(call.exception(), MemoryLimitExceeded) for call in more)


@linux
def test_a_result_for_which_there_is_no_room_comes_over_the_socket() -> None:
    with ProcessIsolator.create(limits=Limits(memory="64M", result="40M"), import_paths=SITE) as isolator:
        found = isolator.run_source("import numpy; numpy.ones(20 << 20, 'u1')").value
        assert (len(found), int(found.sum())) == (20 * MB, 20 * MB)
        assert arenas(isolator)._out == {}


@linux
def test_results_are_bounded_as_ever(isolator: ProcessIsolator) -> None:
    with pytest.raises(SerializationError, match=r"Limits\.result"):
        isolator.run_source("import numpy; numpy.ones(70 << 20, 'u1')")


@linux
def test_a_child_without_descriptors_gets_them_with_the_call() -> None:
    def use_up() -> int:
        import builtins
        import os

        builtins.used = []  # type: ignore[attr-defined]
        try:
            while True:
                builtins.used.append(os.open("/dev/null", os.O_RDONLY))  # type: ignore[attr-defined]
        except OSError:
            return len(builtins.used)  # type: ignore[attr-defined]

    with ProcessIsolator.create(limits=Limits(open_files=64)) as isolator:
        assert isolator.invoke(use_up) > 30
        data = bytes(range(256)) * 4096
        assert isolator.invoke(identity, [data, bytearray(data)])[0] == data
        assert isolator.invoke(lambda view: (view.readonly, bytes(view)), memoryview(bytearray(data))) == (False, data)


@linux
def test_a_call_that_is_refused_at_the_last_moment_takes_no_arena(isolator: ProcessIsolator) -> None:
    array = np.ones(100_000)
    isolator.invoke(len, array)
    with pytest.raises(SerializationError, match="65 descriptors"):
        isolator.invoke(len, [array, *[isolator.shared_array(1) for _ in range(65)]])
    assert all(arena.is_free() for arena in arenas(isolator)._in.values())


# --- results="pickle" and zero_copy: for those who trust --------------------------------------------------------------


@linux
def test_pickled_results_go_through_arenas_too() -> None:
    with ProcessIsolator.create(import_paths=SITE, results="pickle") as isolator:
        array = np.arange(100_000.0)
        for _ in range(2):
            found = isolator.invoke(lambda a: {"twice": a * 2, "again": [a, slice(1, 2)]}, array)
            assert (found["twice"] == array * 2).all()
            found["twice"][:] = 0
            assert (found["again"][0] == array).all()
            assert found["again"][1] == slice(1, 2)
        assert len(arenas(isolator)._out) == 1
        assert all(arena.is_free() for arena in arenas(isolator)._out.values())


SCRIBBLE = """
import pihost.inside.arenas as a
for area in a.results._maps.values():
    area[4096:4104] = bytes(8)
"""


@linux
def test_by_default_a_child_cannot_change_what_the_host_has() -> None:
    with ProcessIsolator.create(import_paths=SITE) as isolator:
        found = isolator.invoke(identity, np.ones(100_000))
        isolator.run_source(SCRIBBLE)
        assert (found == 1).all()


@linux
@pytest.mark.parametrize("results", ["data", "pickle"])
def test_with_zero_copy_the_result_is_where_the_child_has_put_it(results: Any) -> None:
    with ProcessIsolator.create(import_paths=SITE, zero_copy=True, results=results) as isolator:
        found = isolator.invoke(identity, np.ones(100_000))
        isolator.run_source(SCRIBBLE)
        assert found[0] == 0
        assert (found[1:] == 1).all()
        other = isolator.invoke(identity, np.full(100_000, 2.0))  # not in the same place: that is still looked at
        assert found[1] == 1
        assert other[1] == 2
        del found
        again = isolator.invoke(identity, np.full(100_000, 3.0))
        assert (other[1], again[1]) == (2, 3)
        assert len(arenas(isolator)._out) == 2
        isolator.terminate()
        assert (other[-1], again[-1]) == (2, 3)  # it outlives the child


@linux
def test_text_and_bools_are_checked_copies_even_then() -> None:
    with ProcessIsolator.create(import_paths=SITE, zero_copy=True) as isolator:
        found = isolator.invoke(lambda: __import__("numpy").ones(200_000, "?"))
        isolator.run_source(SCRIBBLE)
        assert found.all()


# --- a child that lies -------------------------------------------------------------------------------------------------

LIES = {
    "an arena that is not there": (
        "(wire.MAPPED, wire.pack_mapped(number + 1, text, lengths))",
        "not there or too small",
    ),
    "more than fits": ("(wire.MAPPED, wire.pack_mapped(number, text, [1 << 40]))", "not there or too small"),
    "all of 64 bits": ("(wire.MAPPED, wire.pack_mapped(number, text, [(1 << 64) - 1] * 3))", "not there or too small"),
    "another size than the array's": (
        "(wire.MAPPED, wire.pack_mapped(number, text, [lengths[0] - 8]))",
        "an array of 799992 bytes that says",
    ),
    "one buffer too many": ("(wire.MAPPED, wire.pack_mapped(number, text, lengths + [8]))", "nothing refers to"),
    "no buffer": ("(wire.MAPPED, wire.pack_mapped(number, text, []))", "does not exist"),
    "too many buffers": ("(wire.MAPPED, wire.pack_mapped(number, text, [0] * 1001))", "do not fill it"),
    "no counts": ("(wire.MAPPED, [b'x'])", "without its counts"),
    "parts that do not fill it": ("(wire.MAPPED, [*wire.pack_mapped(number, text, lengths), b'x'])", "do not fill it"),
    "a dtype of objects": (
        "(wire.MAPPED, wire.pack_mapped(number, text.replace(b'<f8', b'|O8'), lengths))",
        "dtype .* is not data",
    ),
}


@linux
@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_what_lies_in_an_arena_is_a_protocol_error(name: str) -> None:
    said, message = LIES[name]
    source = f"""
        from pihost import wire
        from pihost.inside import arenas

        honest = arenas.ship

        def ship(text, buffers):
            lengths = [memoryview(buffer).nbytes for buffer in buffers]
            if not buffers:
                return honest(text, buffers)
            number = next(iter(arenas.results._maps))
            return {said}

        def lie():
            arenas.ship = ship
        """
    _expect_protocol_error(source, message)


ROOM_LIES = {
    "asked for twice": (["(100).to_bytes(8, 'little')"] * 2, "asked for twice"),
    "asked for without a size": (["b'x'"], "without a size"),
}


@linux
@pytest.mark.parametrize("name", ROOM_LIES)
def test_room_is_asked_for_once_and_with_a_size(name: str) -> None:
    asked, message = ROOM_LIES[name]
    source = f"""
        from pihost import wire
        from pihost.inside import arenas, callbacks

        def ship(text, buffers):
            host = callbacks.host
            for size in ({", ".join(asked)},) if buffers else ():
                host._link.send_whole(wire.ROOM, host.call_id, [size])
            return wire.RESULT, wire.pack_value(text, buffers)

        def lie():
            arenas.ship = ship
        """
    _expect_protocol_error(source, message)


def _expect_protocol_error(source: str, message: str) -> None:
    with ProcessIsolator.create(import_paths=SITE) as isolator, tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "liar.py", source)
        isolator.invoke(identity, np.ones(100_000))  # so that there is an arena to lie about
        isolator.invoke_method(path, "lie")
        with pytest.raises(ProtocolError, match=message):
            isolator.invoke(lambda: [__import__("numpy").ones(100_000)])
        assert (isolator.invoke(identity, np.ones(100_000)) == 1).all()  # a new child


UNPAID = {
    "none of it": ("lambda fd, start, size: None", r"has made \d{1,6} bytes, not 1048576"),
    "half of it": ("lambda fd, start, size: honest(fd, start, size // 2)", "has made 524288 bytes, not 1048576"),
    "sealed by itself": (
        "lambda fd, start, size: (honest(fd, start, size), fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL))",
        "sealed itself",
    ),
}


@linux
@pytest.mark.parametrize("name", UNPAID)
@pytest.mark.parametrize("there", [True, False], ids=["arguments", "results"])
def test_a_child_that_leaves_its_pages_to_the_host_is_ended(name: str, there: bool) -> None:
    lie, message = UNPAID[name]

    def stop_paying(lie: str) -> None:
        import fcntl
        import os

        os.posix_fallocate = eval(lie, {"honest": os.posix_fallocate, "fcntl": fcntl})

    with ProcessIsolator.create(import_paths=SITE) as isolator:
        isolator.invoke(stop_paying, lie)
        with pytest.raises(ProtocolError, match=message):
            isolator.invoke(len, np.ones(50_000)) if there else isolator.run_source("import numpy; numpy.ones(50_000)")


@linux
def test_what_a_callback_is_called_with_goes_through_arenas() -> None:
    """Also what is larger than a frame; the same call's result too, and the next ones through the same memory."""

    def work(count: int) -> tuple[float, Any]:
        import numpy

        import pihost

        array = numpy.arange(count, dtype=float)
        totals = [pihost.call_host("total", array, by=2) for _ in range(3)]
        return sum(totals), array

    seen = []

    def total(array: Any, by: int) -> float:
        seen.append(array.copy())
        return float(array.sum() * by)

    with ProcessIsolator.create(import_paths=SITE, limits=Limits(memory="1G")) as isolator:
        isolator.register_callback("total", total)
        for _ in range(2):
            found, array = isolator.invoke(work, 800_000)
            assert found == 6 * np.arange(800_000, dtype=float).sum()
            assert (array == np.arange(800_000)).all()
        assert len(seen) == 6
        assert all((each == array).all() for each in seen)
        assert len(isolator._keeper.connection.arenas()._out) == 1  # type: ignore[union-attr]


@linux
def test_what_lies_in_an_arena_counts_for_a_callback() -> None:
    def call(count: int) -> str:
        import numpy

        import pihost

        try:
            return str(pihost.call_host("size", numpy.ones(count)))
        except pihost.HostError as error:
            return str(error)

    with ProcessIsolator.create(import_paths=SITE, callback_bytes="8M") as isolator:
        isolator.register_callback("size", len)
        assert isolator.invoke(call, 900_000) == "900000"
        assert isolator.invoke(call, 1_100_000) == "more than 8388608 bytes for the host in a second"


@linux
@pytest.mark.parametrize(("kind", "text"), [("CALLBACK_MAPPED", '["f",[],{}]'), ("RAW_MAPPED", '"f"')])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("wire.pack_mapped(77, text, [8])", "not there or too small"), ("[b'x']", "without its counts"),
        ("wire.pack_mapped(number, text, [1 << 40])", "not there or too small"),
        ("wire.pack_mapped(number, text, [8])", "has made 0 bytes"),
    ],
)  # fmt: skip
def test_lies_about_what_a_callback_is_called_with(body: str, message: str, kind: str, text: str) -> None:
    source = f"""
        from pihost import wire
        from pihost.inside import arenas, callbacks

        def lie():
            text = b'{text}'
            number = callbacks.host.ask_for_room(200_000)[0]
            number = int.from_bytes(number[:8], "little")
            callbacks.host._ask(wire.{kind}, {body})
        """
    with ProcessIsolator.create(callback_bytes=None) as isolator, tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "liar.py", source)
        isolator.register_callback("f", len)
        with pytest.raises(ProtocolError, match=message):
            isolator.invoke_method(path, "lie")


@linux
def test_room_without_measure_is_refused(isolator: ProcessIsolator) -> None:
    def ask(size: int) -> int:
        from pihost.inside import callbacks

        said, fds = callbacks.host.ask_for_room(size)  # type: ignore[union-attr]
        return len(said) + len(fds)

    for size in (1 << 30, 1 << 62, (1 << 64) - 1):
        assert isolator.invoke(ask, size) == 1
    assert isolator.invoke(ask, 100) > 1


@linux
def test_scribbling_while_the_host_reads_hurts_nobody() -> None:
    """Whatever stands there when the host copies is what the host checks: a value of its kind, or a protocol error."""

    def scribble() -> None:
        import threading

        from pihost.inside import arenas

        def work() -> None:
            while True:
                for area in [*arenas.results._maps.values()]:
                    area[4096:12288] = b"\xff" * 8192
                    area[4096:12288] = b"\x01" * 8192

        threading.Thread(target=work, daemon=True).start()

    right = wrong = 0
    with ProcessIsolator.create(import_paths=SITE, restart=RestartPolicy(backoff=0)) as isolator:
        for kind in ("?", "U1", "f8", "S3") * 5:
            try:
                isolator.invoke(scribble)
                found = isolator.invoke(lambda kind: __import__("numpy").ones(100_000, kind), kind)
                assert found.dtype == np.dtype(kind)
                assert kind != "?" or found.view("u1").max() <= 1
                right += 1
            except ProtocolError:
                wrong += 1
    assert right + wrong == 20


@linux
def test_an_arena_can_neither_be_shrunk_nor_get_holes(isolator: ProcessIsolator) -> None:
    """A hole would be filled by the host, at the host's expense, and a child that keeps its map would never give it back."""

    def tear() -> list[str]:
        import ctypes
        import os

        libc = ctypes.CDLL(None, use_errno=True)
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                if "memfd:pisupervisor" not in os.readlink(f"/proc/self/fd/{name}"):
                    continue
            except OSError:
                continue
            try:
                os.ftruncate(int(name), 0)
                found.append("shrunk")
            except OSError as error:
                found.append(type(error).__name__)
            punched = libc.fallocate(int(name), 3, ctypes.c_long(0), ctypes.c_long(1 << 30))
            found.append("punched" if punched == 0 else os.strerror(ctypes.get_errno()))
        return found

    isolator.restart()
    array = np.ones(100_000)
    isolator.invoke(identity, array)
    assert isolator.invoke(tear) == ["PermissionError", "Operation not permitted"] * 2
    for _ in range(3):
        assert (isolator.invoke(identity, array) == array).all()


@linux
def test_who_says_that_an_arena_is_free_while_it_is_not_spoils_its_own_data(isolator: ProcessIsolator) -> None:
    def keep_and_lie(array: Any) -> None:
        import builtins

        from pihost.inside import arenas

        builtins.kept = array  # type: ignore[attr-defined]
        for arena in arenas.arguments._arenas.values():
            arena.area[0] = 0
            arenas.arguments.lent.clear()

    isolator.invoke(keep_and_lie, np.ones(100_000))
    assert (isolator.invoke(identity, np.full(100_000, 2.0)) == 2).all()


@linux
def test_numpy_that_is_missing_is_named() -> None:
    with ProcessIsolator.create() as isolator, pytest.raises(SerializationError, match=r"numpy.*import_paths"):
        isolator.invoke_method("builtins", "len", np.ones(100_000))
