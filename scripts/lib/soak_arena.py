"""A host of the soak: threads that open, call and close isolators, while one more kills what is below them at random."""

from __future__ import annotations

import faulthandler
import gc
import operator
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from witness import descendants, resident

from pisupervisor import (
    CallCancelled,
    ChildTerminated,
    IsolationError,
    IsolationEvents,
    IsolationFuture,
    IsolatorClosed,
    LaunchError,
    Limits,
    ProcessIsolator,
    RestartPolicy,
)
from pisupervisor.limits.detect import detect
from pisupervisor.limits.directories import PARENT

ROUND = 250  # kills between two looks for leaks
CALL_TIMEOUT = 10.0  # no call here takes a tenth of that: one that runs into it has hung
LATE = 3.0  # seconds after its deadline by which a call must have ended
ROUND_TIMEOUT = 60.0
PATIENCE = 5.0  # seconds for the kernel to forget threads and groups
ALLOWED_GROWTH = 8 << 20
ALLOWED_OBJECTS = 5000  # a module that is imported late has a thousand or two
SPREAD = 5  # rounds: large answers come and go, and the allocator gives their memory back when it likes
BETWEEN_KILLS = 0.008  # seconds, on the average
UNLUCKY = 200  # failed calls in a row of one thread, beyond which it is no bad luck

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT)
#: what a kill may make of a call or a launch; anything else is a defect
EXPECTED = (ChildTerminated, LaunchError, IsolatorClosed)
FOREVER: dict[str, Any] = {"max_restarts": 1 << 30, "backoff": 0.0}


def ignore(_event: object) -> None:
    """A handler for events."""


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "events": {"events": IsolationEvents(stdout=ignore, exited=ignore, exit_with_error=ignore, limit=ignore)},
    "max_calls": {"max_calls": 3},
    "tiny memory": {"limits": Limits(memory="40M")},
    "always": {"restart": RestartPolicy(mode="always", **FOREVER)},
    "watched": {"idle_timeout": 0.05, "limits": Limits(cpu_time=5.0)},
    "on_start": {"on_start": os.getpid},
    "other zygote": {"environment": {"SOAK": "1"}},
}


def create(random: Random) -> ProcessIsolator:
    options = {"restart": RestartPolicy(**FOREVER), "call_timeout": CALL_TIMEOUT}
    return ProcessIsolator.create(**{**options, **SCENARIOS[random.choice(list(SCENARIOS))]})


# --- calls: each says whether the answer was the right one -------------------------------------------------------

#: relatives in sessions of their own that ignore every signal
FAMILY = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    for number in {*range(1, 65)} - {9, 19, 32, 33}:
        signal.signal(number, signal.SIG_IGN)
    os.fork()
    time.sleep(1000)
7
"""
EAT = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"


def negate(isolator: ProcessIsolator, number: int) -> bool:
    return bool(isolator.invoke_method("operator", "neg", number) == -number)


def nap(isolator: ProcessIsolator, number: int) -> bool:
    return isolator.invoke(time.sleep, number % 30 / 1000) is None


def captured(isolator: ProcessIsolator, number: int) -> bool:
    done = isolator.run_source(f"print({number}); {number} + 1")
    return (done.value, done.stdout) == (number + 1, f"{number}\n")


def submitted(isolator: ProcessIsolator, number: int) -> bool:
    return bool(result_of(isolator, isolator.submit(operator.neg, number)) == -number)


def result_of(isolator: ProcessIsolator, future: IsolationFuture) -> Any:
    try:
        return future.result(CALL_TIMEOUT + LATE)
    except CallCancelled as error:
        if not isolator._keeper.closed.is_set():  # nobody here cancels: only a close takes back what waits
            raise
        raise IsolatorClosed("closed while the submitted call waited") from error


def large_result(isolator: ProcessIsolator, number: int) -> bool:
    return bool(isolator.invoke(bytes, (3 << 20) + number % 1000) == bytes((3 << 20) + number % 1000))


def large_argument(isolator: ProcessIsolator, number: int) -> bool:
    return bool(isolator.invoke(len, bytes((3 << 20) + number % 1000)) == (3 << 20) + number % 1000)


def family(isolator: ProcessIsolator, _number: int) -> bool:
    return bool(isolator.run_source(FAMILY).value == 7)


def paused(isolator: ProcessIsolator, number: int) -> bool:
    """The call is longer than the pause, and so a part of it."""
    future = isolator.submit(time.sleep, 0.02)
    try:
        isolator.pause()
        time.sleep(number % 10 / 1000)
        isolator.resume()
    except IsolationError:
        pass  # killed meanwhile; what became of the call is asked below
    return result_of(isolator, future) is None


def eat(isolator: ProcessIsolator, _number: int) -> bool:
    """Never answers: the limit ends it, or a kill before."""
    isolator.run_source(EAT)
    return False


Call = Callable[[ProcessIsolator, int], bool]
CALLS: tuple[Call, ...] = (
    negate, negate, negate, captured, captured, submitted, nap, large_result, large_argument, family, paused
)  # fmt: skip
ENDS: tuple[Callable[[ProcessIsolator], object], ...] = (
    ProcessIsolator.exit, ProcessIsolator.terminate, ProcessIsolator.abort, ProcessIsolator.restart,
    ProcessIsolator.close, ProcessIsolator.close, ProcessIsolator.close,
)  # fmt: skip


# --- the tally ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has happened; ``violations`` are what must not."""

    kills: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    right: int = 0
    violations: list[tuple[str, str]] = field(default_factory=list)

    def violate(self, kind: str, text: str) -> None:
        """``kind``: orphans, leaks, hangs, wrong answers or other errors."""
        self.violations.append((kind, text))

    def error(self, error: BaseException) -> None:
        self.errors[type(error).__name__] += 1
        if isinstance(error, TimeoutError) or getattr(error, "step", "") == "start_timeout":
            self.violate("hangs", repr(error))
        elif not isinstance(error, EXPECTED):
            self.violate("other errors", "".join(traceback.format_exception(error)))


# --- one round ---------------------------------------------------------------------------------------------------


class Slot:
    """A place for one isolator after another, and the threads that use it."""

    def __init__(self, tally: Tally, stop: threading.Event) -> None:
        self.tally, self.stop = tally, stop
        self.isolator: ProcessIsolator | None = None

    def own(self, random: Random) -> None:
        """Open, use, end, close; again and again."""
        while not self.stop.is_set():
            try:
                self.isolator = isolator = create(random)
            except Exception as error:
                self.tally.error(error)
                continue
            try:
                for _ in range(random.randrange(25)):
                    self.call(isolator, random)
                self.attempt(lambda isolator=isolator: random.choice(ENDS)(isolator))
            finally:
                isolator.close()

    def share(self, random: Random) -> None:
        """Call whatever isolator is there, whatever its owner does to it."""
        while not self.stop.wait(random.random() / 50):
            if self.isolator is not None and self.isolator.state != "stopped":
                self.call(self.isolator, random)

    def call(self, isolator: ProcessIsolator, random: Random) -> None:
        if self.stop.is_set():
            return
        tiny = isolator.options.limits.memory == 40 << 20
        call = random.choice((*CALLS, eat) if tiny else CALLS)
        number = random.randrange(1 << 30)
        self.attempt(lambda: self.check(call, isolator, number))

    def check(self, call: Call, isolator: ProcessIsolator, number: int) -> None:
        if call(isolator, number):
            self.tally.right += 1
        else:
            self.tally.violate("wrong answers", call.__name__)

    def attempt(self, work: Callable[[], object]) -> None:
        """With its errors counted, and its time."""
        start = time.monotonic()
        try:
            work()
        except Exception as error:
            self.tally.error(error)
        if (took := time.monotonic() - start) > CALL_TIMEOUT + LATE:
            self.tally.violate("hangs", f"{took:.1f} s")


class Killer:
    """Strikes at random below this process, at nothing else."""

    def __init__(self, slots: list[Slot], tally: Tally) -> None:
        self.slots, self.tally = slots, tally

    def run(self, random: Random, kills: int, until: float) -> None:
        wanted = self.tally.kills.total() + kills
        while self.tally.kills.total() < wanted and time.monotonic() < until:
            victim, pid = self.choose(random)
            if pid and strike(pid, SIGNALS[0] if victim != "payload" else random.choice(SIGNALS)):
                self.tally.kills[victim] += 1
            time.sleep(random.expovariate(1 / BETWEEN_KILLS))

    def choose(self, random: Random) -> tuple[str, int]:
        """(kind of victim, pid); by what the library knows of it, or by what /proc shows of a launch under way."""
        isolator = random.choice(self.slots).isolator
        keeper = isolator._keeper if isolator is not None else None
        template, child = (keeper._template, keeper.child) if keeper is not None else (None, None)
        if template is None:
            return "", 0
        dice = random.random()
        if dice < 0.04:
            return "zygote", template.zygote.pid
        if dice < 0.7 and child is not None:
            return ("payload", child.pid) if dice < 0.4 else ("PID 1", child.init_pid)
        init = random.choice(children(template.zygote.pid) or [0])
        if dice < 0.85:
            return "PID 1", init
        return "payload", random.choice((children(init) if init else []) or [0])


def strike(pid: int, number: int) -> bool:
    """Send the signal if that is a process below this one: a number may have been reused."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not is_below(pid):
            return False
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True


def is_below(pid: int) -> bool:
    """Whether that is a living descendant of this process."""
    fields = stat(pid)
    if not fields or fields[0] in "ZX":
        return False
    while fields and int(fields[1]) > 1:
        if int(fields[1]) == os.getpid():
            return True
        fields = stat(int(fields[1]))
    return False


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# --- what is left ------------------------------------------------------------------------------------------------


def groups(pid: int) -> list[str]:
    """The cgroups that a supervisor with that pid has made, and that are there."""
    host = detect()
    found = []
    for base in {*host.directories(), host.unified} - {None}:
        try:
            found += [
                f"{base}/{PARENT}/{name}" for name in os.listdir(f"{base}/{PARENT}") if name.startswith(f"{pid}-")
            ]
        except FileNotFoundError:
            continue
    return found


def holdings() -> dict[str, set[Any]]:
    """All that could leak from this process, but for memory."""
    gc.collect()
    fds = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            fds.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the one that listing them took
    threads = set(os.listdir("/proc/self/task"))
    return {
        "processes": set(descendants(os.getpid())), "fds": fds, "threads": threads, "cgroups": set(groups(os.getpid()))
    }  # fmt: skip


class Arena:
    """Rounds of kills, with a look for leaks after each."""

    def __init__(self, seed: str) -> None:
        self.seed, self.tally = seed, Tally()
        self.rounds = 0
        self.memory: list[int] = []
        self.objects: list[int] = []
        self.warm_up()
        self.before = holdings()

    def warm_up(self) -> None:
        """What is imported and cached at the first use is no leak."""
        random = Random(self.seed)
        for _ in SCENARIOS:
            isolator = create(random)
            for call in dict.fromkeys(CALLS):
                call(isolator, 1)
            isolator.close()

    def round(self, kills: int, until: float) -> None:
        """Up to ``kills`` kills, then everything is closed and looked over."""
        self.rounds += 1
        stop = threading.Event()
        slots = [Slot(self.tally, stop) for _ in range(3)]
        work = [slot.own for slot in slots] + [slots[0].share, slots[1].share]
        threads = [
            threading.Thread(target=each, args=(Random(f"{self.seed} {self.rounds} {number}"),), daemon=True)
            for number, each in enumerate(work)
        ]
        for thread in threads:
            thread.start()
        Killer(slots, self.tally).run(Random(f"{self.seed} {self.rounds}"), kills, until)
        stop.set()
        self.join(threads)
        del slots, work, threads
        self.look_for_leaks()

    def join(self, threads: list[threading.Thread]) -> None:
        deadline = time.monotonic() + ROUND_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            self.tally.violate("hangs", f"threads did not end within {ROUND_TIMEOUT:g} s; their stacks are on stderr")
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)  # what else could be said of this process would be wrong

    def look_for_leaks(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := self.left():
            if time.monotonic() > deadline:
                kinds = {"processes": "orphans", "cgroups": "orphans"}
                for name, what in left.items():
                    self.tally.violate(kinds.get(name, "leaks"), f"{name}: {sorted(what)}")
                self.before = holdings()  # told once
                break
            time.sleep(0.005)
        self.memory.append(resident())
        self.objects.append(len(gc.get_objects()))

    def left(self) -> dict[str, set[Any]]:
        now = holdings()
        return {name: now[name] - was for name, was in self.before.items() if now[name] - was}

    def growth(self) -> int:
        """Bytes by which the least that it needs has grown since its first rounds."""
        return min(self.memory[-SPREAD:]) - min(self.memory[:SPREAD]) if self.rounds > 2 * SPREAD else 0

    def check_memory(self) -> None:
        """At the end."""
        if (grown := self.growth()) > ALLOWED_GROWTH:
            self.tally.violate("leaks", f"memory: {grown} bytes more after {self.rounds} rounds than at first")
        if (more := self.objects[-1] - self.objects[0]) > ALLOWED_OBJECTS:
            self.tally.violate("leaks", f"memory: {more} objects more after {self.rounds} rounds than after one")
