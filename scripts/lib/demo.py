"""The main job on real input, then four hostile plugins. Whatever this prints was looked at, not assumed."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from witness import Witness

from pisupervisor import (
    CallTimeout,
    FeatureUnavailable,
    IsolationError,
    IsolationOptions,
    Limits,
    MemoryLimitExceeded,
    PidsLimitExceeded,
    ProcessIsolator,
    RestartPolicy,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SURVEY = IsolationOptions(limits=Limits(memory="256M", cpus=1.0, pids=32))
HOSTILE = IsolationOptions(limits=Limits(memory="128M", cpus=0.5, pids=32), restart=RestartPolicy(mode="never"))
DEADLINE = 2.0

# Without rights on cgroups these are what an ordinary user lacks. Walls are never given up.
MAY_BE_MISSING = ("memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io", "devices")


@dataclass(frozen=True)
class Verdict:
    """One line of the table; ``held`` is None for an attack that was not run."""

    plugin: str
    tried: str
    outcome: str
    held: bool | None


def missing_here() -> list[FeatureUnavailable]:
    """The limits that this user on this machine cannot have. Raises FeatureUnavailable if it is a wall."""
    found: list[FeatureUnavailable] = []
    while True:
        try:
            ProcessIsolator.create(replace(HOSTILE, degrade=[error.feature for error in found])).close()
            return found
        except FeatureUnavailable as error:
            if error.feature not in MAY_BE_MISSING or error.feature in [known.feature for known in found]:
                raise
            found.append(error)


def allowance(options: IsolationOptions) -> str:
    """The limits in words: held by groups, or only looked at again and again."""
    limits = options.limits
    words = {
        "cpus": f"{limits.cpus:g} core",
        "memory": f"{int(limits.memory or 0) >> 20} MB",
        "pids": f"{limits.pids} processes",
    }
    return ", ".join(text + " (watched)" * (name in options.degrade) for name, text in words.items())


def show_survey(options: IsolationOptions, files: int | None, witness: Witness) -> None:
    """The main job: the plugin finds the standard library by itself, in a child that sees nothing else of the host."""
    print(f"Main job: parse the standard library in a child: {allowance(options)}, no network")
    start = time.perf_counter()
    with ProcessIsolator.create(options) as isolator:
        created = time.perf_counter()
        witness.look(isolator)
        result = isolator.invoke_method(EXAMPLES / "stdlib_survey.py", "survey", files, timeout=300.0)
        done = time.perf_counter()
        holding = [name for name, protection in isolator.applied.items() if protection.holds]
    counts = ", ".join(f"{result[name]} {name}" for name in ("files", "lines", "classes", "functions", "unparsable"))
    print(f"  Python {result['python']}, {result['root']}: {counts}")
    print("  largest functions, in lines:")
    for lines, where in result["largest"]:
        print(f"    {lines:5}  {where}")
    print(f"  child ready after {created - start:.3f} s, survey {done - created:.2f} s")
    print(f"  held: {' '.join(holding)}\n")


def attack(options: IsolationOptions, witness: Witness, plugin: str, *arguments: object) -> object:
    """Runs one hostile plugin to its end: its result, or the error that it met."""
    with ProcessIsolator.create(options) as isolator, witness.watching(isolator):
        try:
            return isolator.invoke_method(EXAMPLES / "hostile" / f"{plugin}.py", "attack", *arguments, timeout=DEADLINE)
        except IsolationError as error:
            return error


def memory_bomb(options: IsolationOptions, witness: Witness) -> Verdict:
    """Without a group each process has its bound (RLIMIT_DATA), and gets a MemoryError there."""
    met = attack(options, witness, "memory_bomb")
    held = isinstance(met, (MemoryLimitExceeded, MemoryError))
    return Verdict("memory_bomb", "takes memory until it is stopped", f"limit reached: {said(met)}", held)


def fork_bomb(options: IsolationOptions, witness: Witness) -> Verdict:
    tried = "forks in every process it gets"
    if "pids" in options.degrade and not counted_by_kernel(options):
        return Verdict("fork_bomb", tried, "nothing here counts its processes as it makes them", None)
    witness.most = 0
    met = attack(options, witness, "fork_bomb")
    limit = options.limits.pids or 0
    outcome = f"limit reached: {witness.most} of {limit} processes; {said(met)}"
    return Verdict("fork_bomb", tried, outcome, ended(met) and limit // 2 < witness.most <= limit)


def counted_by_kernel(options: IsolationOptions) -> bool:
    """Whether RLIMIT_NPROC stands in for the group (Linux 5.14): who only looks now and then is behind a fork bomb."""
    with ProcessIsolator.create(options) as isolator:
        return isolator.applied["pids"].how.startswith("RLIMIT_NPROC")


def stubborn_loop(options: IsolationOptions, witness: Witness) -> Verdict:
    start = time.perf_counter()
    met = attack(options, witness, "stubborn_loop")
    took = time.perf_counter() - start
    outcome = f"killed at the deadline: {said(met)}; gone after {took:.2f} s"
    return Verdict("stubborn_loop", "ignores all signals, never ends", outcome, ended(met) and took < DEADLINE + 1.0)


def snooper(options: IsolationOptions, witness: Witness) -> Verdict:
    """A control comes first: the host itself reads the file and reaches the listener, so refusals mean something."""
    token = os.urandom(16).hex()
    with tempfile.TemporaryDirectory(prefix="pisupervisor-demo-") as folder, socket.socket() as listener:
        os.chmod(folder, 0o755)  # open to every user: what keeps the child out must be the walls
        secret = Path(folder, "secret")
        secret.write_text(token)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        control = secret.read_text() == token and reachable(listener, port)
        met = attack(options, witness, "snooper", str(secret), port)
        heard = connections(listener)
    tried = "reads a file of the host, calls its loopback"
    if not isinstance(met, dict):
        return Verdict("snooper", tried, f"did not run: {met}", False)
    unread = token not in repr(met) and not any(answer.startswith("GOT") for answer in met.values())
    outcome = f"refused {len(met)} tries; listener heard {heard} calls, secret {'un' * unread}read"
    return Verdict("snooper", tried, outcome, control and unread and heard == 0)


def reachable(listener: socket.socket, port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=5.0):
        return connections(listener) == 1


def connections(listener: socket.socket) -> int:
    """How many have called since the last look."""
    listener.setblocking(False)
    heard = 0
    while True:
        try:
            listener.accept()[0].close()
            heard += 1
        except BlockingIOError:
            return heard


def ended(met: object) -> bool:
    return isinstance(met, (CallTimeout, PidsLimitExceeded))


def said(met: object) -> str:
    return f"{type(met).__name__}" if isinstance(met, IsolationError) else f"it returned {met!r}"


ATTACKS: tuple[Callable[[IsolationOptions, Witness], Verdict], ...] = (memory_bomb, fork_bomb, stubborn_loop, snooper)


def show_attacks(options: IsolationOptions, witness: Witness) -> list[bool | None]:
    """The table, and what it says of each."""
    print(f"Hostile plugins: {allowance(options)}, {DEADLINE:g} s each")
    held = []
    for run in ATTACKS:
        verdict = run(options, witness)
        mark = {True: "held", False: "NOT HELD", None: "not run"}[verdict.held]
        print(f"  {verdict.plugin:14} {verdict.tried:45} {mark:9} {verdict.outcome}", flush=True)
        held.append(verdict.held)
    return held


def show_host(options: IsolationOptions, witness: Witness) -> bool:
    """Whether the host is as it was."""
    print("\nThe host afterwards")
    unharmed = True
    for fact, fine in witness.facts(with_groups="pids" not in options.degrade):
        print(f"  {'ok ' if fine else 'BAD'} {fact}")
        unharmed &= fine
    return unharmed


def demo(files: int | None) -> int:
    witness = Witness()
    missing = missing_here()
    degrade = [error.feature for error in missing]
    if missing:
        print(
            f"{missing[0]}\nThis user on this machine has no groups for all limits. Degraded by name: {', '.join(degrade)}\n"
        )
    show_survey(replace(SURVEY, degrade=degrade), files, witness)
    hostile = replace(HOSTILE, degrade=degrade)
    held = show_attacks(hostile, witness)
    unharmed = show_host(hostile, witness)
    good = "All that ran was held." if None in held else "All held."
    fine = unharmed and False not in held
    print(f"\n{good if fine else 'SOMETHING WAS NOT HELD, see above.'}")
    return 0 if fine else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--files", type=int, metavar="N", help="survey only N files of the standard library")
    arguments = parser.parse_args()
    try:
        return demo(arguments.files)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except IsolationError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
