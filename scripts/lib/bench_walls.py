"""calls in a confined child beside the same calls in one of the same zygote without walls"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pisupervisor import IsolationOptions, ProcessIsolator

SOURCE = """
import os

def add(a, b):
    return a + b

def read(number):
    for _ in range(number):
        with open(os.__file__, "rb") as file:
            file.read(65536)
    return number

def look(number):
    for _ in range(number):
        os.stat("/usr/lib"), os.getppid(), os.close(os.dup(1))
    return number

def compute(number):
    return sum(i * i for i in range(number))
"""
#: what is called, with what, and what it asks of the kernel
WORK: dict[str, tuple[str, tuple[int, ...], str]] = {
    "add": ("add", (1, 2), "a warm call"),
    "compute": ("compute", (2000,), "a warm call that computes"),
    "read": ("read", (10,), "10 files opened, read and closed"),
    "look": ("look", (10,), "40 short system calls"),
}
#: all steps of a launch that are a wall; the user namespace stays, without which the zygote starts no child
WALLS = (
    "mount namespace", "pid namespace", "ipc namespace", "uts namespace", "hostname", "cgroup namespace", "time namespace",
    "mounts", "mount table", "ids", "limits", "rlimits", "bounding set", "capabilities", "no_new_privs", "landlock", "seccomp",
)  # fmt: skip
TARGET = 1.05
CALLS = 50  # in a row; then the other's turn


@contextlib.contextmanager
def child(without: tuple[str, ...]) -> Iterator[ProcessIsolator]:
    made = ProcessIsolator(IsolationOptions(), without=without)
    try:
        made._start()
        yield made
    finally:
        made.close()


def medians(call: Callable[[], object]) -> float:
    """Microseconds of a call, of a row of them."""
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken) / 1000


def measure(rounds: int, without: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Both children live side by side and take turns, so that both see the same weather; which begins, changes."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory() as folder, child(()) as confined, child(without) as bare:
        path = Path(folder, "work.py")
        path.write_text(SOURCE)
        handles = [[isolator.get_method(path, WORK[name][0]) for isolator in (confined, bare)] for name in WORK]
        for number in range(rounds + 3):  # three that nobody counts
            for name, pair in zip(WORK, handles, strict=True):
                found = [0.0, 0.0]
                for turn in (0, 1) if number % 2 else (1, 0):
                    found[turn] = medians(lambda handle=pair[turn], given=WORK[name][1]: handle(*given))  # type: ignore[misc]
                if number >= 3:
                    taken[name].append((found[0], found[1]))
    return {
        name: {
            "confined_us": statistics.median(pair[0] for pair in pairs),
            "bare_us": statistics.median(pair[1] for pair in pairs),
            "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        }
        for name, pairs in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench walls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--only", action="append", metavar="STEP", help="only these walls are missing from the bare child"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cores, found = sorted(os.sched_getaffinity(0)), {}
    for where, mine in (("one core", cores[-1:]), ("all cores", cores)):
        os.sched_setaffinity(0, mine)
        found[where] = measure(arguments.rounds, tuple(arguments.only or WALLS))
    if arguments.json:
        print(json.dumps(found))
        return
    for where, figures in found.items():
        print(f"{f'us a call, {where}; at most {TARGET} asked':42} confined      bare     ratio")
        for name, row in figures.items():
            print(f"{WORK[name][2]:42} {row['confined_us']:8.1f}  {row['bare_us']:8.1f}  {row['ratio']:8.3f}")


if __name__ == "__main__":
    main()
