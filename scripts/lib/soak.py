"""Kills payloads, PIDs 1, zygotes and hosts at random, and looks whether anything is left behind, hangs, or answers wrongly.

This process is the referee. It forks hosts, which run isolators: two arenas (see soak_arena.py), which kill what is
below themselves, and mayflies, which are killed here. As a subreaper it becomes the parent of whatever outlives its
host, so nothing can hide from it. It has one thread, and forks before it has used the library.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from soak_arena import CALLS, ROUND, ROUND_TIMEOUT, Arena, Tally, children, create, groups, stat, strike
from witness import descendants

from pihost.syscalls import set_subreaper
from pisupervisor import IsolationError, ProcessIsolator

HOST_SHARE = 0.08  # of all kills; one of them costs a zygote
ARENAS, MAYFLIES = 2, 3  # at once
LIFETIME = 0.2  # seconds of a mayfly, at the most: a zygote takes 50 ms to start
ALL_GONE = 1.0  # seconds after which nothing of a dead host may live
DAEMON = "soak-daemon"  # a fork that a mayfly leaves behind on purpose, with all fds open
DAEMON_LIFE = 2.0
SETTLE = 0.002
DONE = b"done"


# --- hosts to be killed ------------------------------------------------------------------------------------------


def mayfly(random: Random) -> None:
    """Open, call and close isolators until the end."""
    if random.random() < 0.3:
        threading.Thread(target=use_isolators, args=(Random(random.random()),), daemon=True).start()
    use_isolators(random)


def use_isolators(random: Random) -> None:
    while True:
        try:
            isolator = create(random)
        except IsolationError:
            continue
        if random.random() < 0.2:
            leave_daemon()
        attempt(lambda isolator=isolator: random.choice(CALLS)(isolator, random.randrange(1 << 30)))
        if random.random() < 0.2:
            attempt(isolator.pause)
            time.sleep(LIFETIME)
        if random.random() < 0.7:
            isolator.close()


def attempt(work: Callable[[], object]) -> None:
    try:
        work()
    except IsolationError:
        pass


def leave_daemon() -> None:
    host = os.getpid()
    if os.fork() == 0:
        Path("/proc/self/comm").write_text(DAEMON)
        while os.getppid() == host:
            time.sleep(0.05)
        time.sleep(DAEMON_LIFE)
        os._exit(0)


# --- the referee -------------------------------------------------------------------------------------------------


class Referee:
    def __init__(self, seed: int, kills: int | None, until: float) -> None:
        self.seed, self.until = seed, until
        self.random = Random(seed)
        self.host_kills = sys.maxsize if kills is None else round(kills * HOST_SHARE)
        self.arena_kills = sys.maxsize if kills is None else kills - self.host_kills  # of all of them together
        self.tally = Tally()
        self.arenas: dict[socket.socket, int] = {}  # what it reports on -> pid
        self.heard: dict[socket.socket, float] = {}  # when each did so last
        self.mayflies: dict[int, float] = {}  # pid -> when it shall die
        self.orphans: dict[int, float] = {}  # pid -> since when
        self.daemons: set[int] = set()  # those among them that are meant to be
        self.told: set[int] = set()  # those that are reported already
        self.dead: set[int] = set()  # hosts whose groups the next supervisor is to sweep
        self.longest = 0.0  # that anything has outlived its host
        self.hatched = self.grown = 0

    def run(self) -> None:
        set_subreaper()
        try:
            for number in range(ARENAS):
                self.open_arena(number)
            while self.arenas or (self.tally.kills["host"] < self.host_kills and time.monotonic() < self.until):
                self.step()
            self.end_mayflies()
        finally:
            for pid in (*self.arenas.values(), *self.mayflies):
                os.kill(pid, signal.SIGKILL)
            self.await_orphans()
            self.check_groups()

    def step(self) -> None:
        while len(self.mayflies) < MAYFLIES and self.tally.kills["host"] + len(self.mayflies) < self.host_kills:
            self.hatch()
        now = time.monotonic()
        for pid, when in self.mayflies.items():
            if when < now and strike(pid, signal.SIGKILL):
                self.tally.kills["host"] += 1
                self.mayflies[pid] = float("inf")
        self.listen()
        self.look_for_orphans()

    def fork(self, work: Callable[[], object]) -> int:
        """A host: does that and ends."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.dead.discard(pid)  # a number used again
        return pid

    def hatch(self) -> None:
        self.hatched += 1
        random = Random(f"{self.seed} mayfly {self.hatched}")
        pid = self.fork(lambda: mayfly(random))
        self.mayflies[pid] = time.monotonic() + self.random.uniform(0.0, LIFETIME)

    def open_arena(self, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            kills = (self.arena_kills + number) // ARENAS
            pid = self.fork(lambda: fight(f"{self.seed} arena {number}", kills, self.until, theirs))
        self.arenas[ours], self.heard[ours] = pid, time.monotonic()

    def listen(self) -> None:
        """To what the arenas report. The last word of each is DONE."""
        for sock in select.select(self.arenas, (), (), SETTLE)[0]:
            self.heard[sock] = time.monotonic()
            report = sock.recv(1 << 20)
            if report not in (b"", DONE):
                self.note(json.loads(report))
                continue
            if not report:
                self.tally.violate("other errors", "an arena has failed; see stderr")
            self.forget(sock)
        for sock in [sock for sock, when in self.heard.items() if time.monotonic() - when > 2 * ROUND_TIMEOUT]:
            self.tally.violate("hangs", "an arena has said nothing for two minutes")
            os.kill(self.arenas[sock], signal.SIGKILL)
            self.forget(sock)

    def forget(self, sock: socket.socket) -> None:
        """That arena is at its end."""
        del self.heard[sock]
        self.dead.add(self.arenas.pop(sock))
        sock.close()

    def note(self, report: dict[str, Any]) -> None:
        self.tally.kills.update(report["kills"])
        self.tally.errors.update(report["errors"])
        self.tally.right += report["right"]
        self.tally.violations += [(kind, text) for kind, text in report["violations"]]
        self.grown = max(self.grown, report["grown"])

    # --- what is left of the dead ---------------------------------------------------------------------------------

    def look_for_orphans(self) -> None:
        """All children of this process but the hosts have outlived a host, or a zygote; they have a second to die."""
        now, hosts = time.monotonic(), {*self.mayflies, *self.arenas.values()}
        for pid in children(os.getpid()):
            if self.reap(pid) or pid in hosts:
                continue
            since = self.orphans.setdefault(pid, now)
            if is_daemon(pid):
                self.daemons.add(pid)
            if now - since > (4 * DAEMON_LIFE if pid in self.daemons else ALL_GONE) and pid not in self.told:
                self.told.add(pid)
                self.tally.violate("orphans", "; ".join(describe(each) for each in (pid, *descendants(pid))))
                os.kill(pid, signal.SIGKILL)

    def reap(self, pid: int) -> bool:
        """Whether it is over."""
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return False
        if self.mayflies.pop(pid, None) is not None:
            self.dead.add(pid)
            if os.WIFEXITED(status):  # it goes on until it is killed
                self.tally.violate("other errors", "a host has ended of an exception; see stderr")
        elif (since := self.orphans.pop(pid, None)) is not None and pid not in self.daemons:
            self.longest = max(self.longest, time.monotonic() - since)
        self.daemons.discard(pid)
        return True

    def end_mayflies(self) -> None:
        for pid in self.mayflies:
            strike(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        while self.mayflies and time.monotonic() < deadline:
            self.look_for_orphans()
            time.sleep(SETTLE)

    def await_orphans(self) -> None:
        deadline = time.monotonic() + 4 * DAEMON_LIFE + ALL_GONE
        while children(os.getpid()) and time.monotonic() < deadline:
            self.look_for_orphans()
            time.sleep(SETTLE)

    def check_groups(self) -> None:
        """The next supervisor sweeps what the dead have left."""
        os.waitpid(self.fork(lambda: ProcessIsolator.create().close()), 0)
        for pid in self.dead:
            for group in groups(pid):
                self.tally.violate("orphans", f"cgroup {group}")


def fight(seed: str, kills: int, until: float, report: socket.socket) -> None:
    """An arena's life, told round by round."""
    arena = Arena(seed)
    done = 0
    while done < kills and time.monotonic() < until:
        arena.tally = Tally()
        arena.round(min(ROUND, kills - done), until)
        done += arena.tally.kills.total()
        if done >= kills or time.monotonic() >= until:
            arena.check_memory()
        arena.tally.violations = [(kind, text[-2000:]) for kind, text in arena.tally.violations[:50]]
        report.send(json.dumps({**vars(arena.tally), "grown": arena.growth()}).encode())
    report.send(DONE)


def is_daemon(pid: int) -> bool:
    return text_of(pid, "comm") == DAEMON


def describe(pid: int) -> str:
    """All that helps to find out why it lives."""
    state = (stat(pid) or ["?"])[0]
    command = text_of(pid, "cmdline").replace("\0", " ")
    return f"{pid} {text_of(pid, 'comm')} ({command}), state {state}, in {text_of(pid, 'wchan')}"


def text_of(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text().strip()
    except OSError:
        return ""


# --- the report --------------------------------------------------------------------------------------------------


def summary(referee: Referee, seconds: float) -> dict[str, Any]:
    tally = referee.tally
    found = Counter(kind for kind, _text in tally.violations)
    return {
        "kills": dict(sorted(tally.kills.items())), "total": tally.kills.total(), "right": tally.right,
        "errors": dict(sorted(tally.errors.items())), "wrong answers": found["wrong answers"],
        "other errors": found["other errors"], "orphans": found["orphans"], "leaks": found["leaks"],
        "hangs": found["hangs"], "longest": round(referee.longest, 3), "grown": referee.grown,
        "seconds": round(seconds, 1), "seed": referee.seed,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    rows = [(f"killed: {victim}", count) for victim, count in result["kills"].items()]
    rows += [("killed in all", result["total"]), ("right answers", result["right"])]
    rows += [(f"calls ended with {name}", count) for name, count in result["errors"].items()]
    rows += [(name, result[name]) for name in ("wrong answers", "other errors", "orphans", "leaks", "hangs")]
    rows += [("a dead host's last process ended after", f"{result['longest']:.3f} s")]
    rows += [("memory of a host grew by", f"{result['grown'] / (1 << 20):.1f} MB")]
    rows += [("duration", f"{result['seconds']:.1f} s"), ("seed", result["seed"])]
    return "\n".join(f"{name:40}{value!s:>12}" for name, value in rows)


def calm_allocator() -> None:
    """What malloc keeps for each thread, and of large blocks, would look like a leak. It is told so at the start only."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--kills", type=int, help="end after so many kills")
    length.add_argument("--minutes", type=float, default=2.0, help="end after so much time (default: 2)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="what random choices begin with")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("as root: cgroups are among the things that must not be left behind")
    calm_allocator()
    start = time.monotonic()
    limit = float("inf") if arguments.kills is not None else 60 * arguments.minutes
    referee = Referee(arguments.seed, arguments.kills, start + limit)
    referee.run()
    result = summary(referee, time.monotonic() - start)
    print(json.dumps(result, indent=2) if arguments.json else table(result))
    for kind, text in referee.tally.violations[:20]:
        print(f"{kind}: {text}", file=sys.stderr)
    return 1 if referee.tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
