"""a fresh isolated child beside bubblewrap, a plain fork and a bare interpreter"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisupervisor import IsolationError, IsolationOptions, ProcessIsolator

IMPORTS = (
    "import socket, pickle, json, struct, select, signal, ctypes, fcntl, resource, traceback, ast"  # what a child has
)
PLUGIN = "def answer():\n    return 42\n"
SPACING = 0.005
LONGER = 0.02  # a zygote waits for 3 ms of quiet before it launches a child that nobody has asked for yet
BURST = 4

# The bound: the same interpreter with the same imports and no walls. A message in: fork; the child answers with a byte,
# or with the result of the call in the message; then the helper says that it has reaped. The collector rests, as in
# any fork server. The socket keeps the borders between messages.
FORK_SERVER = f"""
{IMPORTS}
import gc, os
gc.collect(); gc.freeze(); gc.disable()
while message := os.read(0, 4096):
    child = os.fork()
    if not child:
        answer = b"c"
        if len(message) > 1:
            source, target = pickle.loads(message)
            module = {{}}
            exec(compile(source, "plugin.py", "exec"), module)
            answer = json.dumps(module[target]()).encode()
        os.write(1, answer)
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"r")
"""

SPACED, ROW, OPEN, FRESH = "spaced", "in a row", "none closed", "no spare"
FIRST = "create + first result"
BARE, IMPORT, WHOLE = "python -I -c pass", "python -I -c 'import pisupervisor'", "empty process to result and exit"
BWRAP = "bwrap + python to first output"

#: what is divided by what, and the target: at most. Like with like: a first result with a first result. None: only to compare.
RATIOS = (
    (f"isolator {SPACED}: {FIRST}", BWRAP, 0.15),
    (f"isolator {ROW}: {FIRST}", BWRAP, 0.15),
    (f"isolator {OPEN}: {FIRST}", BWRAP, 0.15),
    (f"isolator {FRESH}: {FIRST}", BWRAP, 0.15),
    (f"isolator {SPACED}: {FIRST}", f"plain fork {SPACED}: first result", 3.5),
    (f"isolator {ROW}: {FIRST}", f"plain fork {ROW}: first result", 3.5),
    (f"isolator {FRESH}: {FIRST}", f"plain fork {SPACED}: first result", 3.5),
    (f"isolator {SPACED}: {FIRST}", f"plain fork {SPACED}: first byte", None),
    (f"isolator {ROW}: {FIRST}", f"plain fork {ROW}: first byte", None),
    (f"isolator {FRESH}: {FIRST}", f"plain fork {SPACED}: first byte", None),
    (IMPORT, BARE, 1.4),
    (WHOLE, BARE, 8.0),
)

Samples = dict[str, list[float]]


def create_without_spare() -> ProcessIsolator:
    """Launched on demand from beginning to end: who leaves out a step (here one that there is not) gets no spare."""
    isolator = ProcessIsolator(IsolationOptions(), without=("spare",))
    isolator._start()
    return isolator


def open_isolator(
    plugin: str, name: str, samples: Samples, create: Callable[[], ProcessIsolator] = ProcessIsolator.create
) -> ProcessIsolator:
    """One child on a warm zygote, up to its first result."""
    start = time.perf_counter()
    isolator = create()
    created = time.perf_counter()
    value = isolator.invoke_method(plugin, "answer")
    done = time.perf_counter()
    if value != 42:
        raise RuntimeError(f"the child answered {value!r}")
    for step, seconds in (("create", created - start), ("first result", done - created), (FIRST, done - start)):
        samples.setdefault(f"isolator {name}: {step}", []).append(seconds)
    return isolator


def measure_isolator(plugin: str, name: str, samples: Samples) -> None:
    """Opened and closed. Closing asks for a spare child, which the next one is handed if it had time to get ready."""
    isolator = open_isolator(plugin, name, samples)
    start = time.perf_counter()
    isolator.close()
    samples.setdefault(f"isolator {name}: close", []).append(time.perf_counter() - start)


def measure_open(plugin: str, samples: Samples) -> None:
    """One after the other without closing any; and the same launched on demand."""
    opened = [open_isolator(plugin, OPEN, {})]
    for _ in range(BURST):
        time.sleep(LONGER)
        opened.append(open_isolator(plugin, OPEN, samples))
    for _ in range(BURST):
        time.sleep(LONGER)
        opened.append(open_isolator(plugin, FRESH, samples, create_without_spare))
    for isolator in opened:
        isolator.close()


def measure_process(name: str, command: list[str], samples: Samples, *, until_exit: bool) -> None:
    """From exec to the first output, or to the exit."""
    reader, writer = os.pipe()
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
    os.close(writer)
    output = b"" if until_exit else os.read(reader, 64)
    read = time.perf_counter()
    status = os.waitpid(pid, 0)[1]
    end = time.perf_counter()
    os.close(reader)
    if status or not (until_exit or output):
        raise RuntimeError(f"{name} failed: {command} ended with {os.waitstatus_to_exitcode(status)}")
    samples.setdefault(name, []).append((end if until_exit else read) - start)


def measure_fork(server: socket.socket, name: str, samples: Samples) -> None:
    """From asking the fork server to the new child's first byte, and to the result of the same call."""
    for what, message, expected in (("byte", b"f", b"c"), ("result", pickle.dumps((PLUGIN, "answer")), b"42")):
        start = time.perf_counter()
        server.send(message)
        answer = server.recv(64)
        done = time.perf_counter()
        if (answer, server.recv(64)) != (expected, b"r"):
            raise RuntimeError(f"the fork server is out of step: {answer!r}")
        samples.setdefault(f"plain fork {name}: first {what}", []).append(done - start)


@contextmanager
def fork_server(python: str) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), fd) for fd in (0, 1)]
    pid = os.posix_spawn(python, [python, "-I", "-S", "-c", FORK_SERVER], os.environ, file_actions=actions)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # it reads the end and leaves
        os.waitpid(pid, 0)


def repeat(measure: Callable[..., None], *arguments: object) -> None:
    """``measure(..., SPACED, ...)`` after a pause each, then in a row; of the row the first only clears the way."""
    *before, samples = arguments
    for _ in range(BURST):
        time.sleep(SPACING)
        measure(*before, SPACED, samples)
    measure(*before, ROW, {})
    for _ in range(BURST):
        measure(*before, ROW, samples)


def run_rounds(rounds: int, python: str, plugin: str) -> tuple[Samples, list[str]]:
    """Every candidate in each round, so that a slow moment of the machine hits all of them. Also: what held."""
    samples: Samples = {}
    commands = processes(python, plugin)
    with ProcessIsolator.create() as keeper, fork_server(python) as server:  # the keeper keeps the zygote warm
        keeper.invoke_method(plugin, "answer")
        for _ in range(rounds):
            repeat(measure_isolator, plugin, samples)
            measure_open(plugin, samples)
            repeat(measure_fork, server, samples)
            for name, command in commands.items():
                measure_process(name, command, samples, until_exit=name != BWRAP)
        return samples, [name for name, protection in keeper.applied.items() if protection.holds]


def processes(python: str, plugin: str) -> dict[str, list[str]]:
    """The commands that are measured from their start."""
    bwrap = ["/usr/bin/bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    whole = f"""if True:
        from pisupervisor import ProcessIsolator
        with ProcessIsolator.create() as isolator:
            isolator.invoke_method({plugin!r}, "answer")
    """
    return {
        BWRAP: [*bwrap, python, "-I", "-S", "-c", f"{IMPORTS}\nprint(42, flush=True)"],
        BARE: [sys.executable, "-I", "-c", "pass"],
        IMPORT: [sys.executable, "-I", "-c", "import pisupervisor"],
        WHOLE: [sys.executable, "-I", "-c", whole],
    }


def report(samples: Samples, walls: list[str], rounds: int) -> dict[str, Any]:
    """What was measured, on what, and the ratios of the medians beside their targets."""
    median = {name: statistics.median(seconds) for name, seconds in samples.items()}
    rows = {
        name: {"median": median[name] * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3, "n": len(seconds)}
        for name, seconds in samples.items()
    }
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "pinned_to_cpu": sorted(os.sched_getaffinity(0)),
        "rounds": rounds,
        "isolator_holds": walls,
        "milliseconds": rows,
        "ratios": [
            {"of": above, "to": below, "ratio": median[above] / median[below], "target": target}
            for above, below, target in RATIOS
        ],
    }


def show(result: dict[str, Any]) -> None:
    """The same for people."""
    print(f"Linux {result['kernel']}, Python {result['python']}, {result['cpu']}")
    print(f"All processes pinned to cpu {result['pinned_to_cpu'][0]}; {result['rounds']} interleaved rounds")
    print(f"Except under '{FRESH}', an isolator may be handed a spare child that was launched since the last one")
    print(f"Every isolator holds: {' '.join(result['isolator_holds'])}\n")
    print(f"{'milliseconds':46}{'median':>9}{'min':>9}{'max':>9}{'n':>6}")
    for name, row in result["milliseconds"].items():
        print(f"{name:46}{row['median']:9.3f}{row['min']:9.3f}{row['max']:9.3f}{row['n']:6}")
    print(f"\n{'ratio of medians':86}{'here':>6}  target")
    for row in result["ratios"]:
        target = f"at most {row['target']:g}" if row["target"] else "(a fork alone)"
        print(f"{row['of'] + ' / ' + row['to']:86}{row['ratio']:6.2f}  {target}")


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench launch", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="interleaved rounds (default: 25)")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # inherited; crossing cores outweighs all software
    python = os.path.realpath(sys.executable)  # the interpreter below the venv, as the zygote runs it
    with tempfile.TemporaryDirectory(prefix="pisupervisor-bench-") as folder:
        plugin = os.path.join(folder, "plugin.py")
        Path(plugin).write_text(PLUGIN)
        try:
            result = report(*run_rounds(arguments.rounds, python, plugin), arguments.rounds)
        except IsolationError as error:  # such as: this user cannot make cgroups
            parser.exit(1, f"scripts/bench launch: {error}\n")
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
