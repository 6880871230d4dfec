"""Where this process has no group of its own, and systemd gives one: limits hold, and the application stays where it is."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import DEGRADE, nothing_left, wait_until, zygote_of

from pisupervisor import ExitReason, IsolationOptions, Limits, MemoryLimitExceeded, ProcessIsolator
from pisupervisor.limits import systemd
from pisupervisor.limits.detect import detect

asked = [pytest.mark.scope, pytest.mark.bed]
OPTIONS = IsolationOptions(limits=Limits(memory="64M", cpus=0.5, pids=16), degrade=DEGRADE)


@pytest.fixture
def member() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def group_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


class TestAsked:
    pytestmark = asked

    def test_limits_hold_in_it_and_it_goes_with_the_isolator(self) -> None:
        before = group_of("self")
        with nothing_left(), ProcessIsolator.create(OPTIONS) as isolator:
            scope = group_of(zygote_of(isolator)).removesuffix("/pisupervisor-host")
            assert scope.endswith(".scope")
            assert group_of(isolator.pid or 0).startswith(f"{scope}/pisupervisor/{os.getpid()}-")
            assert group_of("self") == before
            for name in ("memory", "cpus", "pids"):
                assert isolator.applied[name].holds
                assert f"{os.path.basename(scope)}, asked of" in isolator.applied[name].how
            with pytest.raises(MemoryLimitExceeded):
                isolator.run_source("bytearray(128 << 20)")
            assert isolator.run_source("6 * 7").value == 42
        assert wait_until(lambda: not os.path.exists(f"/sys/fs/cgroup{scope}"), 20)

    def test_another_zygote_gets_another_scope(self) -> None:
        with ProcessIsolator.create(OPTIONS) as isolator:
            first = zygote_of(isolator)
            os.kill(first, signal.SIGKILL)
            assert wait_until(lambda: isolator.state == "backoff", 20)
            assert isolator.run_source("6 * 7").value == 42
            assert zygote_of(isolator) != first
            assert isolator.applied["memory"].holds
            assert f"pisupervisor-{zygote_of(isolator)}-" in isolator.applied["memory"].how

    def test_it_can_be_asked_for_from_inside_an_event_loop(self, member: int) -> None:
        async def ask() -> str:
            return systemd.start_scope(member)

        threads = threading.active_count()
        scope = asyncio.run(ask())
        assert group_of(member).endswith(f"/{scope}")
        assert threading.active_count() == threads

    def test_looking_alone_asks_for_nothing(self) -> None:
        assert detect().directories() == []
        assert detect().scope == ""

    def test_a_process_that_is_gone(self) -> None:
        process = subprocess.Popen(["true"])
        process.wait()
        with pytest.raises(systemd.NoScope, match="did not give one"):
            systemd.start_scope(process.pid)

    def test_a_pause_and_an_order_to_end(self) -> None:
        with ProcessIsolator.create(OPTIONS) as isolator:
            isolator.pause()
            isolator.resume()
            assert isolator.run_source("6 * 7").value == 42
            assert isolator.terminate(0.1)
            assert isolator.wait_for_exit(60).reason is ExitReason.KILLED


def test_without_the_library_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dbus_fast", None)
    with pytest.raises(systemd.NoScope, match="dbus-fast") as caught:
        systemd.start_scope(os.getpid())
    assert caught.value.remedy == "pip install 'pisupervisor[systemd]'"


def test_no_systemd_to_be_reached_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, member: int) -> None:
    for name in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):
        monkeypatch.setenv(name, f"unix:path={tmp_path}/no-bus")
    with pytest.raises(systemd.NoScope, match="did not give one"):
        systemd.start_scope(member)
