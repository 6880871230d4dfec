"""from a crash to the next good answer, and from a deadline to the error"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from collections.abc import Callable

from pisupervisor import CallTimeout, ChildTerminated, Limits, ProcessIsolator, RestartPolicy, Template

POLICY = RestartPolicy(backoff=0.0, max_restarts=1 << 30)
DEADLINE = 0.05
SPIN = "while True: pass"
TARGETS = {
    "crash in a call to next answer": 0.010,
    "deadline to error: a loop": 0.050,
    "deadline to error: a family": 0.050,
}


def crash_in_call(isolator: ProcessIsolator) -> float:
    """The error has been raised; how long until another call is answered."""
    try:
        isolator.run_source("import os; os._exit(1)")
    except ChildTerminated:
        start = time.perf_counter()
    isolator.run_source("1")
    return time.perf_counter() - start


def kill_to_answer(isolator: ProcessIsolator) -> float:
    """The whole way: SIGKILL from outside, seen, replaced, answered."""
    start = time.perf_counter()
    os.kill(isolator.pid or 0, signal.SIGKILL)
    try:
        isolator.run_source("1")  # may still reach the dying child
    except ChildTerminated:
        isolator.run_source("1")
    return time.perf_counter() - start


def overshoot(isolator: ProcessIsolator, source: str) -> float:
    start = time.perf_counter()
    try:
        isolator.run_source(source, timeout=DEADLINE)
    except CallTimeout:
        return time.perf_counter() - start - DEADLINE
    raise RuntimeError("no deadline was seen")


FAMILY = "import os\nfor _ in range(5):\n  if os.fork() == 0:\n    os.setsid()\n    break\n" + SPIN
MEASUREMENTS: dict[str, Callable[[ProcessIsolator], float]] = {
    "crash in a call to next answer": crash_in_call,
    "kill from outside to next answer": kill_to_answer,
    "deadline to error: a loop": lambda isolator: overshoot(isolator, SPIN),
    "deadline to error: a family": lambda isolator: overshoot(isolator, FAMILY),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench recovery", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    samples: dict[str, list[float]] = {name: [] for name in MEASUREMENTS}
    with Template(), ProcessIsolator.create(restart=POLICY, limits=Limits(pids=128)) as isolator:
        isolator.run_source("1")
        for _ in range(arguments.rounds):
            for name, measure in MEASUREMENTS.items():
                samples[name].append(measure(isolator))
    figures = {name: {"median": statistics.median(taken), "worst": max(taken)} for name, taken in samples.items()}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{'ms, pinned to one core':36}  median   worst  at most")
    for name, figure in figures.items():
        target = f"{TARGETS[name] * 1000:6.0f}" if name in TARGETS else ""
        print(f"{name:36} {figure['median'] * 1000:7.2f} {figure['worst'] * 1000:7.2f}   {target}")


if __name__ == "__main__":
    main()
