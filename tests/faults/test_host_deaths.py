"""The host is killed. A second later nothing of it is left, wherever it was and whatever its children do about it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lame
import pytest
from helpers import descendants, own_groups, state_of, status_of, wait_until

from pisupervisor import ProcessIsolator
from pisupervisor.launch.ids import BLOCK
from pisupervisor.limits.directories import pid_namespace, start_time

pytestmark = [pytest.mark.linux, pytest.mark.alone]
APPLICATION = Path(__file__).with_name("application.py")
SOON = 1.0


class Application:
    """One that is running, and how to know what it has started: by descent, by its mark, its user ids, its groups. What is
    younger than its death is known by the mark and the groups alone: numbers of processes and of users are given to others then.
    """

    def __init__(self, state: str, *more: str) -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, str(APPLICATION), state, self.mark, *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.below: list[int] = []
        self.forks: list[int] = []
        self.uids = 0
        self.ended = float("inf")  # clock ticks since boot

    def await_ready(self) -> None:
        assert self.process.stdout is not None
        self.uids = json.loads(self.process.stdout.readline())["uids"]

    def kill(self) -> None:
        """Its forks are processes that it keeps, not ours to account for: those that run its own command."""
        below = descendants(self.process.pid)
        self.forks = [pid for pid in below if APPLICATION.name in command_of(pid)]
        self.below = [pid for pid in below if pid not in self.forks]
        self.end()

    def end(self) -> None:
        self.ended = min(self.ended, time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
        self.process.kill()
        self.process.wait()

    def left(self) -> set[int]:
        """What lives of it; zombies wait for whoever has adopted them."""
        everybody = (int(name) for name in os.listdir("/proc") if name.isdigit())
        found = {pid for pid in everybody if self.mark in environment_of(pid) or self.is_known_by_number(pid)}
        return found | {pid for group in own_groups(self.process.pid) for pid in members(group)}

    def is_known_by_number(self, pid: int) -> bool:
        if pid not in self.below and not (self.uids and self.uids <= uid_of(pid) < self.uids + BLOCK):
            return False
        return state_of(pid) not in ("", "Z") and (start_time(pid) or 0) <= self.ended

    def clear_away(self) -> None:
        for pid in (*self.forks, *self.left()):
            with suppress(ProcessLookupError):  # one ends with another
                os.kill(pid, signal.SIGKILL)
        if self.process.stdout is not None:
            self.process.stdout.close()


def command_of(pid: int) -> str:
    return _text(f"/proc/{pid}/cmdline")


def environment_of(pid: int) -> str:
    return "" if APPLICATION.name in command_of(pid) else _text(f"/proc/{pid}/environ")


def uid_of(pid: int) -> int:
    try:
        return int(status_of(pid)["Uid"].split()[0]) if state_of(pid) not in ("", "Z") else 0
    except (OSError, KeyError):
        return 0


def members(group: str) -> list[int]:
    return [int(line) for line in _text(f"{group}/cgroup.procs").split()]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


@contextmanager
def application(state: str, *more: str) -> Iterator[Application]:
    running = Application(state, *more)
    try:
        yield running
    finally:
        running.end()
        running.clear_away()


STATES = [
    "idle", "in_a_call", "with_a_fork", "paused", "paused_with_a_fork", "with_a_spare_child", "several",
    "with_the_zygote_stopped", "paused_with_the_zygote_stopped", "in_a_launch_with_the_zygote_stopped",
    "closing_with_the_zygote_stopped", "with_a_zygote_that_has_no_plan_yet_and_a_fork",
    "with_the_zygote_stopped_and_a_fork", "with_a_zygote_stopped_at_its_start",
    "with_a_zygote_stopped_without_a_plan_and_a_fork",
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_nothing_outlives_a_host_that_is_killed(state: str) -> None:
    """parity: 11. The children ignore all signals, have double-forked, left the session, cleared their death signals."""
    with application(state) as host:
        host.await_ready()
        host.kill()
        assert host.below, "the test would see nothing"
        assert wait_until(lambda: not host.left(), SOON), [command_of(pid) for pid in host.left()]
        assert len(host.forks) == ("fork" in state)
        assert all(state_of(pid) == "S" for pid in host.forks)
        ProcessIsolator.create().close()
        assert not own_groups(host.process.pid), "the next supervisor sweeps up"


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment(seed: int) -> None:
    """parity: 11"""
    with application("launching") as host:
        host.await_ready()
        time.sleep(random.Random(seed).random() * 0.25)
        host.kill()
        assert wait_until(lambda: not host.left(), SOON)


@pytest.mark.parametrize("step", [*lame.STEPS[::3], "the zygote's id maps", "the zygote's report"])
def test_killed_while_a_child_is_at_a_step(step: str, tmp_path: Path) -> None:
    """Which takes 0.3 s there. Before it has a death signal, it has to find out by itself that it is alone."""
    with application("slow", step, lame.make(tmp_path)) as host:
        host.await_ready()
        host.kill()
        assert wait_until(lambda: not host.left(), SOON)


# --- what it is that ends them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["death signal", "lifeline"])
def test_either_alone_ends_pid_1(lacking: str) -> None:
    """parity: 11"""
    with application("without", lacking) as host:
        host.await_ready()
        host.kill()
        assert wait_until(lambda: not host.left(), SOON)


def test_without_both_it_goes_on() -> None:
    """The control: then these tests do see somebody who is left."""
    with application("without", "death signal", "lifeline") as host:
        host.await_ready()
        host.kill()
        assert not wait_until(lambda: not host.left(), 0.5)
        assert len(host.left()) == 2, "PID 1 and the payload"


def test_what_another_supervisor_has_started_is_not_taken_for_a_leftover() -> None:
    """It may be given the user ids of the dead one, and its pids."""
    with application("idle") as host:
        host.await_ready()
        host.kill()
        assert wait_until(lambda: not host.left(), SOON)
        time.sleep(0.02)  # two ticks
        with application("in_a_call") as heir:
            heir.await_ready()
            host.uids, host.below = heir.uids, descendants(heir.process.pid)
            assert len(host.below) > 3
            assert not host.left()


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_groups_of_the_living_are_never_swept() -> None:
    """Full or empty, in use or not: the owner's life is what counts, and a reused pid is another owner."""
    with application("several") as host:
        host.await_ready()
        theirs = set(own_groups(host.process.pid))
        assert theirs
        base = Path(next(iter(theirs))).parent
        started = start_time(host.process.pid)
        empty, foreign = (
            base / f"{host.process.pid}-{started}-{pid_namespace()}-999999",
            base / f"{host.process.pid}-{(started or 0) + 1}-{pid_namespace()}-1",
        )
        empty.mkdir()
        foreign.mkdir()
        ProcessIsolator.create().close()
        assert set(own_groups(host.process.pid)) == theirs | {str(empty)}
        host.kill()
        assert wait_until(lambda: not host.left(), SOON)
        ProcessIsolator.create().close()
        assert not own_groups(host.process.pid)
