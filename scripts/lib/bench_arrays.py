"""a big array to the child and back, beside memcpy and the ways that Python has"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pisupervisor import Limits, ProcessIsolator

TARGETS = {"in an arena that is used again": 1.2}
SLOW = ("mp.Pipe, pickle 5 out of band", "mp.Pipe", "ProcessPoolExecutor")


def ends(array: Any) -> float:
    """What every way does with the array: so that nothing but the passage is measured."""
    return float(array[0]) + float(array[-1])


def measured(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def copying(array: Any) -> Iterator[Callable[[], object]]:
    """memcpy between memory that is there already: what every other figure is divided by."""
    target = np.zeros_like(array)
    yield lambda: np.copyto(target, array)


@contextmanager
def renewing(array: Any) -> Iterator[Callable[[], object]]:
    """What any way back costs at the least that ends in memory of the caller's own."""
    yield array.copy


@contextmanager
def isolated(array: Any, **options: Any) -> Iterator[Callable[[], object]]:
    limits = Limits(memory=8 * array.nbytes + (1 << 30), result=array.nbytes + (1 << 20), cpus=None)
    with ProcessIsolator.create(limits=limits, import_paths=[sysconfig.get_path("purelib")], **options) as isolator:
        isolator.invoke(ends, array)
        yield lambda: isolator.invoke(ends, array)


@contextmanager
def fresh(array: Any) -> Iterator[Callable[[], object]]:
    """The child's memory is so small that no arena is kept for the next call."""
    limits = Limits(memory=3 * array.nbytes + (256 << 20), cpus=None)
    with ProcessIsolator.create(limits=limits, import_paths=[sysconfig.get_path("purelib")]) as isolator:
        isolator.invoke(ends, array)
        yield lambda: isolator.invoke(ends, array)


@contextmanager
def shared(array: Any) -> Iterator[Callable[[], object]]:
    with ProcessIsolator.create(import_paths=[sysconfig.get_path("purelib")]) as isolator:
        both = isolator.shared_array(array.shape, array.dtype)
        isolator.invoke(ends, both)
        yield lambda: isolator.invoke(ends, both)


@contextmanager
def holding(array: Any, **options: Any) -> Iterator[ProcessIsolator]:
    """A child that has such an array as ``builtins.made``."""
    limits = Limits(memory=8 * array.nbytes + (1 << 30), result=array.nbytes + (1 << 20), cpus=None)
    site = [sysconfig.get_path("purelib")]
    size = len(array)

    def make() -> None:
        import builtins

        import numpy

        builtins.made = numpy.ones(size)  # type: ignore[attr-defined]

    with ProcessIsolator.create(limits=limits, import_paths=site, callback_bytes=None, **options) as isolator:
        isolator.invoke(make)
        yield isolator


@contextmanager
def result(array: Any, *, zero_copy: bool) -> Iterator[Callable[[], object]]:
    def made() -> Any:
        import builtins

        return builtins.made  # type: ignore[attr-defined]

    with holding(array, zero_copy=zero_copy) as isolator:
        isolator.invoke(made)
        yield lambda: isolator.invoke(made)


@contextmanager
def asked(array: Any) -> Iterator[Callable[[], object]]:
    def ask() -> float:
        import pihost

        got = pihost.call_host("array")
        return float(got[0]) + float(got[-1])

    with holding(array) as isolator:
        isolator.register_callback("array", lambda: array)
        isolator.invoke(ask)
        yield lambda: isolator.invoke(ask)


@contextmanager
def told(array: Any) -> Iterator[Callable[[], object]]:
    def tell() -> Any:
        import builtins

        import pihost

        return pihost.call_host("ends", builtins.made)  # type: ignore[attr-defined]

    with holding(array) as isolator:
        isolator.register_callback("ends", ends)
        isolator.invoke(tell)
        yield lambda: isolator.invoke(tell)


def _echo_ends(pipe: Connection, out_of_band: bool) -> None:
    while True:
        try:
            if out_of_band:
                data = pipe.recv_bytes()
                array = pickle.loads(data, buffers=[bytearray(pipe.recv_bytes())])
            else:
                array = pipe.recv()
        except EOFError:
            return
        pipe.send(ends(array))


@contextmanager
def piped(array: Any, *, out_of_band: bool) -> Iterator[Callable[[], object]]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_echo_ends, args=(theirs, out_of_band), daemon=True)
    child.start()
    theirs.close()

    def send() -> object:
        if out_of_band:
            buffers: list[pickle.PickleBuffer] = []
            ours.send_bytes(pickle.dumps(array, 5, buffer_callback=buffers.append))
            ours.send_bytes(buffers[0].raw())
        else:
            ours.send(array)
        return ours.recv()

    yield send
    ours.close()
    child.terminate()
    child.join()


@contextmanager
def pooled(array: Any) -> Iterator[Callable[[], object]]:
    with ProcessPoolExecutor(1) as executor:
        executor.submit(ends, array[:1]).result()
        yield lambda: executor.submit(ends, array).result()


def ways(array: Any) -> dict[str, Any]:
    return {
        "memcpy into new memory": renewing(array),
        "in an arena that is used again": isolated(array),
        "in an arena of its own": fresh(array),
        "back, copied once": result(array, zero_copy=False),
        "back, zero_copy": result(array, zero_copy=True),
        "as a callback's answer": asked(array),
        "as a callback's argument": told(array),
        "mp.Pipe, pickle 5 out of band": piped(array, out_of_band=True),
        "mp.Pipe": piped(array, out_of_band=False),
        "ProcessPoolExecutor": pooled(array),
    }


def figures(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, and as a multiple of memcpy, which takes turns with each way: what else the machine does then hits both."""
    array = np.ones(size // 8)
    found: dict[str, dict[str, float]] = {}
    with copying(array) as copy:
        for name, way in ways(array).items():
            with way as work:
                work(), copy()
                pairs = [(measured(work), measured(copy)) for _ in range(min(rounds, 3) if name in SLOW else rounds)]
            seconds, copied = (statistics.median(column) for column in zip(*pairs, strict=True))
            found[name] = {"seconds": seconds, "x memcpy": seconds / copied}
    return found


def shared_figures(size: int) -> dict[str, float]:
    """Nothing is copied, so memcpy takes no turns: it would only empty the caches."""
    with shared(np.ones(size // 8)) as work:
        return {"seconds": statistics.median(measured(work) for _ in range(200))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench arrays", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the array")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = figures(arguments.size, arguments.rounds)
    for size in (1 << 20, arguments.size):
        found[f"in a shared array of {size >> 20} MB"] = shared_figures(size)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{f'{arguments.size / (1 << 20):.0f} MB, float64':36}        ms  x memcpy  at most")
    for name, figure in found.items():
        target = f"{TARGETS[name]:8.2f}" if name in TARGETS else ""
        multiple = f"{figure['x memcpy']:9.2f}" if "x memcpy" in figure else ""
        print(f"{name:36} {figure['seconds'] * 1000:9.3f} {multiple} {target}".rstrip())


if __name__ == "__main__":
    main()
