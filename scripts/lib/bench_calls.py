"""a warm call and many calls at once, beside a raw socket echo and the peers, on one core and on all"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisupervisor import AsyncProcessIsolator, Limits, ProcessIsolator

SOURCE = "def add(a, b):\n    return a + b\n"
SENT, ANSWERED = 132, 25  # bytes of such a call and of its answer, headers and all
ALL = sorted(os.sched_getaffinity(0))
#: (row, over which row, at most, pinned to one core?)
TARGETS = [
    ("a method handle", "raw socket echo", 1.6, True),
    ("a method handle", "ProcessPoolExecutor", 0.1, True),
    ("a method handle", "ProcessPoolExecutor", 0.3, False),
    ("awaited", "a method handle", 1.5, True),
]
RATE_TARGET = 10.0  # times the calls per second of ProcessPoolExecutor


def add(a: int, b: int) -> int:
    return a + b


def medians(call: Callable[[], object], rounds: int) -> float:
    """Seconds, of so many calls after some that nobody counts."""
    taken = []
    for number in range(rounds + rounds // 10):
        start = time.perf_counter()
        call()
        if number >= rounds // 10:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@contextmanager
def echo() -> Iterator[Callable[[], object]]:
    """What any Python program pays for as many bytes there and back on the same kind of socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        ours.close()
        answer = bytes(ANSWERED)
        while theirs.recv(1 << 16):
            theirs.sendall(answer)
        os._exit(0)
    theirs.close()
    question = bytes(SENT)

    def call() -> None:
        ours.sendall(question)
        ours.recv(1 << 16)

    try:
        yield call
    finally:
        ours.close()
        os.waitpid(pid, 0)


@contextmanager
def pool() -> Iterator[Callable[[], object]]:
    with ProcessPoolExecutor(1) as executor:
        yield lambda: executor.submit(add, 1, 2).result()


@contextmanager
def loky() -> Iterator[Callable[[], object]]:
    executor = importlib.import_module("loky").ProcessPoolExecutor(1)
    try:
        yield lambda: executor.submit(pow, 1, 2).result()
    finally:
        executor.shutdown()


@contextmanager
def execnet() -> Iterator[Callable[[], object]]:
    group = importlib.import_module("execnet").Group()
    channel = group.makegateway("popen").remote_exec("for pair in channel: channel.send(pair[0] + pair[1])")

    def call() -> None:
        channel.send((1, 2))
        channel.receive()

    try:
        yield call
    finally:
        group.terminate(1.0)


@contextmanager
def isolated(how: str) -> Iterator[Callable[[], object]]:
    with tempfile.TemporaryDirectory() as folder, ProcessIsolator.create(limits=Limits(cpus=None)) as isolator:
        path = Path(folder, "tool.py")
        path.write_text(SOURCE)
        handle = isolator.get_method(path, "add")
        calls: dict[str, Callable[[], object]] = {
            "handle": lambda: handle(1, 2),
            "timed": lambda: handle(1, 2, timeout=30.0),
            "method": lambda: isolator.invoke_method(path, "add", 1, 2),
            "closure": lambda: isolator.invoke(add, 1, 2),
        }
        yield calls[how]


ROWS: dict[str, Callable[[], Any]] = {
    "raw socket echo": echo,
    "a method handle": lambda: isolated("handle"),
    "with a timeout": lambda: isolated("timed"),
    "invoke_method": lambda: isolated("method"),
    "invoke, a function": lambda: isolated("closure"),
    "ProcessPoolExecutor": pool,
    "loky": loky,
    "execnet": execnet,
}


async def awaited(rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tool.py")
        path.write_text(SOURCE)
        async with await AsyncProcessIsolator.create(limits=Limits(cpus=None)) as isolator:
            handle = await isolator.get_method(path, "add")
            taken = []
            for number in range(rounds + rounds // 10):
                start = time.perf_counter()
                await handle(1, 2)
                if number >= rounds // 10:
                    taken.append(time.perf_counter() - start)
            return statistics.median(taken)


def rates(count: int) -> dict[str, float]:
    """Calls in a second, with many under way."""
    found = {}
    with ProcessIsolator.create(limits=Limits(cpus=None)) as isolator:
        sum(isolator.map(add, range(1000), range(1000)))
        start = time.perf_counter()
        assert sum(isolator.map(add, range(count), range(count))) == count * (count - 1)
        found["map"] = count / (time.perf_counter() - start)
    with ProcessPoolExecutor(1) as executor:
        few = max(1000, count // 20)
        sum(executor.map(add, range(1000), range(1000)))
        start = time.perf_counter()
        assert sum(executor.map(add, range(few), range(few))) == few * (few - 1)
        found["ProcessPoolExecutor.map"] = few / (time.perf_counter() - start)
    return found


def once(rounds: int) -> dict[str, float | None]:
    """Microseconds of a call by row; None where a peer cannot be had."""
    found: dict[str, float | None] = {}
    for name, make in ROWS.items():
        try:
            with make() as call:
                found[name] = medians(call, rounds) * 1e6
        except ImportError:
            found[name] = None
    found["awaited"] = asyncio.run(awaited(rounds)) * 1e6
    return found


def measure(rounds: int, *, pinned: bool) -> dict[str, Any]:
    os.sched_setaffinity(0, {ALL[-1]} if pinned else set(ALL))
    turns = [once(rounds) for _ in range(3)]  # whatever else the machine does falls upon all rows alike
    calls = {
        name: statistics.median(value for turn in turns if (value := turn[name]) is not None)
        for name in turns[0]
        if turns[0][name] is not None
    }
    return {"us": calls, "per second": rates(rounds * 10)}


def show(figures: dict[str, Any], *, pinned: bool) -> None:
    calls, echo_time = figures["us"], figures["us"]["raw socket echo"]
    print(f"{'us a call, ' + ('one core' if pinned else 'all cores'):32}    median   x echo")
    for name in [*ROWS, "awaited"]:
        if name in calls:
            print(f"{name:32} {calls[name]:9.1f} {calls[name] / echo_time:8.2f}")
        else:
            print(f"{name:32}  not to be had here")
    for row, base, most, where in TARGETS:
        if where is pinned:
            print(f"  {row} / {base}: {calls[row] / calls[base]:.2f}, at most {most:g} asked")
    rate = figures["per second"]
    times = rate["map"] / rate["ProcessPoolExecutor.map"]
    print(f"calls a second: map {rate['map']:,.0f}, ProcessPoolExecutor.map {rate['ProcessPoolExecutor.map']:,.0f}")
    print(f"  map / ProcessPoolExecutor.map: {times:.1f}, at least {RATE_TARGET:g} asked\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for pinned in (True, False):
        figures = measure(arguments.rounds, pinned=pinned)
        found["pinned" if pinned else "unpinned"] = figures
        if not arguments.json:
            show(figures, pinned=pinned)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
