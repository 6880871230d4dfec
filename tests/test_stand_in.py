"""Where no group holds a limit: what is counted (pure), and that children are ended or held back all the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import OrdinaryUser
from helpers import DEGRADE, wait_until

from pisupervisor.limits.census import Census, Held, mapped, rolled_up
from pisupervisor.limits.cgroups import CgroupHost, Place
from pisupervisor.limits.delegation import CONTROLLERS
from pisupervisor.limits.freezer import SignalFreezer
from pisupervisor.options import IsolationOptions, Limits
from pisupervisor.results import ExitReason
from pisupervisor.supervise.stand_in import EVERY, Budget, judge, seconds_to_next_look, watched, words

MIB = 1 << 20
LACKING = ("memory", "swap", "cpus", "pids")

# --- decisions ------------------------------------------------------------------------------------------------------


def bare(*usable: str) -> CgroupHost:
    places = {name: Place("/g", None, "" if name in usable else "none") for name in CONTROLLERS}
    return CgroupHost("v2", places, memsw=False, swap_on=False, uid=1000)


def test_watched_is_what_was_asked_for_and_no_group_can_hold() -> None:
    options = IsolationOptions(degrade=LACKING)
    assert watched(options, bare()) == ("memory", "cpus", "pids")
    assert watched(options, bare("memory", "cpu", "pids")) == ()
    assert watched(options, bare("memory", "pids")) == ("cpus",)
    assert watched(IsolationOptions(limits=Limits(memory=None, swap=None), degrade=LACKING), bare()) == ("cpus", "pids")
    assert watched(IsolationOptions(), bare("memory", "cpu", "pids")) == ()


def test_who_is_over_has_to_end() -> None:
    limits = Limits(memory="64M", pids=16)
    names = ("memory", "pids")
    assert judge(limits, names, 64 * MIB, 16) is None
    memory, pids = judge(limits, names, 64 * MIB + 1, 16), judge(limits, names, 0, 17)
    assert memory is not None
    assert (memory.limit, memory.reason) == ("memory", ExitReason.MEMORY)
    assert pids is not None
    assert (pids.limit, pids.reason) == ("pids", ExitReason.PIDS)
    assert judge(limits, ("cpus",), 1 << 40, 1 << 20) is None


@pytest.mark.parametrize(("cpus", "load"), [(0.25, 1.0), (0.5, 2.0), (1.0, 4.0), (2.0, 2.0), (1.0, 0.3)])
def test_the_budget_keeps_the_average(cpus: float, load: float) -> None:
    budget, ran, used, stopped = Budget(cpus), 0.0, 0.0, 0.0
    stop = 0.0
    while ran + stopped < 100:
        stop = budget.spend(load * EVERY, EVERY + stop)
        ran, used, stopped = ran + EVERY, used + load * EVERY, stopped + stop
    assert used / (ran + stopped) == pytest.approx(min(cpus, load), rel=0.02)


def test_saved_up_is_at_most_one_look() -> None:
    budget = Budget(0.5)
    assert budget.spend(0.0, 1000.0) == 0.0
    assert budget.spend(1.05, 0.0) == pytest.approx(2.0), "it slept for long, and has next to nothing of that"


def test_cpu_time_of_whom_is_new_and_whom_is_gone() -> None:
    before = {1: Held(0, 1, 100, 5.0), 2: Held(0, 1, 100, 3.0), 3: Held(0, 1, 100, 9.0)}
    now = Census({1: Held(0, 1, 100, 5.5), 2: Held(0, 1, 777, 0.25), 4: Held(0, 3, 100, 1.0)}, {}, 0)
    assert now.used_since(before) == pytest.approx(0.5 + 0.25 + 1.0), "2 is somebody else by now"
    assert now.threads == 5


SMAPS = b"""\
5581e000-5581f000 r--p 00000000 fe:00 1234                               /usr/bin/python3.11
Rss:                 100 kB
Pss:                  50 kB
Anonymous:             8 kB
SwapPss:               0 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Pss:                1000 kB
SwapPss:              24 kB
Anonymous:          1000 kB
7f1000000000-7f1000100000 rw-s 00000000 00:01 42                         /memfd:mine (deleted)
Pss:                 500 kB
Anonymous:             0 kB
7f2000000000-7f2000100000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
Pss:                 300 kB
7f3000000000-7f3000100000 rw-s 00000000 00:30 9                          /tmp/file
Pss:                 900 kB
Anonymous:             0 kB
"""


def test_what_counts_of_a_process() -> None:
    """What is seen elsewhere (an open memfd, a file in its tmpfs) is not counted twice."""
    assert mapped(SMAPS, (), ("/tmp",)) == (8 + 1000 + 24 + 500 + 300) << 10
    assert mapped(SMAPS, (42,), ("/tmp",)) == (8 + 1000 + 24 + 300) << 10


@pytest.mark.parametrize("name", [b"abc", b"Anonymous: -99999999 kB", b"Anonymous: many kB", b"7f00-7f01 rw-p"])
def test_a_files_name_is_no_line_of_its_own(name: bytes) -> None:
    """The kernel writes line ends in it as \\012, and leaves \\r as it is."""
    named = SMAPS.replace(b"/tmp/file", b"/tmp/file\r" + name)
    assert mapped(named, (), ("/tmp",)) == mapped(SMAPS, (), ("/tmp",))


def test_the_sum_of_a_process() -> None:
    text = (
        b"55d5a000-7ffd7000 ---p 00000000 00:00 0                          [rollup]\nRss:     9000 kB\nPss:     700 kB\n"
        b"Pss_Dirty:   600 kB\nPss_Anon:   300 kB\nPss_File:   100 kB\nPss_Shmem:   200 kB\nSwapPss:    50 kB\nLocked: 0 kB\n"
    )
    assert rolled_up(text) == (350 << 10, 200 << 10)


def test_looking_never_takes_more_than_a_quarter_of_a_cpu() -> None:
    """A child of many processes with thousands of mappings each makes a look dear, and asks for one at every moment."""
    assert seconds_to_next_look(0.001) == EVERY
    assert seconds_to_next_look(0.015) == pytest.approx(0.3)
    for took in (0.001, 0.01, 0.1, 0.2, 1.0, 5.0):
        assert took / (took + seconds_to_next_look(took)) <= 0.25


def test_the_words_say_what_stands_in() -> None:
    told = words(Limits(), LACKING, ("pids",))
    assert set(told) == set(LACKING)
    assert "all processes together" in told["memory"]
    assert "SIGSTOP" in told["cpus"]
    assert told["pids"].startswith("RLIMIT_NPROC, held by the kernel; and watched")
    assert words(Limits(), LACKING, ())["pids"].startswith("watched")
    assert words(Limits(), (), ()) == {}


LEADERLESS_SPIN = """
import ctypes, os, threading
def spin():
    print("spins", flush=True)
    while True:
        pass
threading.Thread(target=spin).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""


def test_threads_whose_first_has_ended_are_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADERLESS_SPIN], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            while states(process.pid) != ["Z", "R"]:
                time.sleep(0.01)
            SignalFreezer(lambda: [process.pid]).pause()
            assert states(process.pid) == ["Z", "T"]
        finally:
            process.kill()


def test_what_others_have_stopped_stays_so() -> None:
    """A child that waits for its debugger, where a CPU limit is held by stopping and continuing."""
    spin = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(spin) as stopped, subprocess.Popen(spin) as runs:
        try:
            stopped.send_signal(signal.SIGSTOP)
            assert wait_until(lambda: states(stopped.pid) == ["T"])
            freezer = SignalFreezer(lambda: [stopped.pid, runs.pid])
            for _ in range(2):
                freezer.pause()
                assert states(stopped.pid) == states(runs.pid) == ["T"]
                freezer.resume()
                assert wait_until(lambda: states(runs.pid) == ["R"])
                assert states(stopped.pid) == ["T"]
        finally:
            stopped.kill()
            runs.kill()


def states(pid: int) -> list[str]:
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name))
    return [(task / "stat").read_text().rpartition(") ")[2][0] for task in tasks]


# --- for real --------------------------------------------------------------------------------------------------------

PRELUDE = f"""
    import json, os, sys, threading, time
    from pisupervisor import *
    DEGRADED = {[*LACKING, *DEGRADE]!r}
    def make(**limits):
        return ProcessIsolator.create(degrade=DEGRADED, limits=Limits(**limits), restart=RestartPolicy(mode="never"))
    def outcome(work, timeout=90, **limits):
        with make(**limits) as isolator:
            try:
                return isolator.invoke(work, timeout=timeout)
            except ChildTerminated as error:
                return [type(error).__name__, error.exit_info.reason.value, str(error)]
            except CallTimeout:
                return "timeout"
    def ends_of_forks(seconds):
        pids = []
        for _ in range(8):
            pids.append(os.fork())
            if pids[-1] == 0:
                time.sleep(seconds)
                os._exit(0)
        return [os.waitpid(pid, 0)[1] for pid in pids]
    def tell(**facts): print(json.dumps(facts, default=str))
"""


def run(user: OrdinaryUser, source: str) -> dict[str, Any]:
    done = user.run_python(textwrap.dedent(PRELUDE) + textwrap.dedent(source), timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


MANY = """
    def eat(seconds=6):
        import os, time
        reader, writer = os.pipe()
        for _ in range(10):
            if os.fork() == 0:
                kept = bytearray(b"x") * (20 << 20)
                os.write(writer, b"x")
                time.sleep(60)
        for _ in range(10):
            os.read(reader, 1)  # an emulated machine that is busy takes more than seconds to fill them
        time.sleep(seconds)
        return "lived"
"""
FILES = """
    def eat(seconds=6):
        import os, time
        for _ in range(10):
            os.write(os.memfd_create("kept"), bytes(20 << 20))
        time.sleep(seconds)
        return "lived"
"""
SHARED = """
    def eat(seconds=6):
        import mmap, time
        kept = [mmap.mmap(-1, 20 << 20) for _ in range(10)]
        for one in kept:
            one.write(bytes(20 << 20))
        time.sleep(seconds)
        return "lived"
"""
HOPPING = """
    def eat(seconds=6):
        import os, time
        ends = time.monotonic() + seconds
        for number in range(3):
            if os.fork() == 0:
                kept, more = bytearray(b"x") * (40 << 20), []
                while time.monotonic() < ends:
                    if len(more) < 40:
                        more.append(bytearray(b"x") * (1 << 20))
                    if os.fork():
                        os._exit(0)
                os._exit(0)
        time.sleep(seconds)
        return "lived"
"""


LEADERLESS = """
    def eat(seconds=6):
        import ctypes, os, threading, time
        def keep():
            kept = bytearray(b"x") * (20 << 20)
            time.sleep(60)
        for _ in range(10):
            if os.fork() == 0:
                threading.Thread(target=keep).start()
                ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
        time.sleep(seconds)
        return "lived"
"""


NAMED = """
    def eat(seconds=6):
        import mmap, os, time
        kept = []
        for name in ("abc", "Anonymous: -999999999 kB"):
            with open(f"/tmp/file{chr(13)}{name}", "w+b") as file:
                file.write(bytes(4096))
                file.flush()
                kept.append(mmap.mmap(file.fileno(), 4096))
                kept[-1][0] = 1
        for _ in range(10):
            if os.fork() == 0:
                more = bytearray(b"x") * (20 << 20)
                time.sleep(60)
        time.sleep(seconds)
        return "lived"
"""


OTHERS = (("named", NAMED), ("leaderless", LEADERLESS), ("memfds", FILES), ("shared", SHARED), ("hopping", HOPPING))


@pytest.mark.rootless
@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(MANY, id="processes", marks=pytest.mark.bed),
        *(pytest.param(text, id=name) for name, text in OTHERS),
    ],
)
class TestMemory:
    def test_all_of_it_together_is_held(self, ordinary_user: OrdinaryUser, attack: str) -> None:
        """Each process is below RLIMIT_DATA. The control is not watched, and lives."""
        tight = 'outcome(eat, memory="96M", cpus=None)'
        free = "outcome(lambda: eat(2), memory=None, swap=None, cpus=None)"
        told = run(ordinary_user, f"{attack}    tell(tight={tight}, free={free})")
        assert told["free"] == "lived"
        assert told["tight"][:2] == ["MemoryLimitExceeded", "memory"]
        assert "100663296" in told["tight"][2]


@pytest.mark.rootless
class TestOthers:
    def test_what_is_shared_counts_once(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            def share():
                kept = bytearray(b"x") * (40 << 20)
                return ends_of_forks(1)
            tell(got=outcome(share, memory="96M"))
        """
        assert run(ordinary_user, source)["got"] == [0] * 8

    def test_nor_where_there_are_thousands_of_mappings(self, ordinary_user: OrdinaryUser) -> None:
        """More than are looked at one by one; what they hold is known all the same."""
        source = """
            def share():
                import mmap
                kept, places = bytearray(b"x") * (40 << 20), [mmap.mmap(-1, 4096, 34) for _ in range(12000)]
                for number, place in enumerate(places):
                    if number % 2:
                        place.close()
                return ends_of_forks(2)
            tell(got=outcome(share, memory="112M"))
        """
        assert run(ordinary_user, source)["got"] == [0] * 8

    def test_what_is_shared_with_the_host_is_the_hosts(self, ordinary_user: OrdinaryUser) -> None:
        """As with groups, where whoever has made a page pays for it. The control has as much of its own."""
        source = """
            def look(array):
                import time
                total = float(array.sum())
                time.sleep(1)
                return total
            def own():
                import os, time
                kept, file = bytearray(b"x") * (60 << 20), os.memfd_create("kept")
                for _ in range(5):
                    os.write(file, bytes(10 << 20))
                time.sleep(5)
            import sysconfig
            options = dict(import_paths=[sysconfig.get_path("purelib")], degrade=DEGRADED, limits=Limits(memory="96M"))
            with ProcessIsolator.create(**options) as isolator:
                try:
                    array = isolator.shared_array(15 << 20, "float64")
                except OptionsError as error:
                    tell(error=str(error))
                    sys.exit()
                array[:] = 1
                tell(got=isolator.invoke(look, array), own=outcome(own, memory="96M")[0])
        """
        told = run(ordinary_user, source)
        if "error" in told:
            pytest.skip(f"numpy: {told['error']}")
        assert told == {"got": float(15 << 20), "own": "MemoryLimitExceeded"}

    @pytest.mark.alone
    @pytest.mark.matrix
    def test_cpu_time_is_held_back(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            def spin():
                import os, time
                begun, before = time.monotonic(), sum(os.times()[:4])  # its start is not what is measured
                child = os.fork()
                while time.monotonic() - begun < 4:
                    pass
                if child == 0:
                    os._exit(0)
                os.wait()
                return (sum(os.times()[:4]) - before) / (time.monotonic() - begun)
            tell(tight=outcome(spin, cpus=0.2), roomy=outcome(spin, cpus=8))
        """
        told = run(ordinary_user, source)
        assert told["tight"] < 0.5 * told["roomy"], told

    def test_who_continues_itself_is_ended(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            def spin():
                import ctypes, signal, struct, time
                libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
                event = struct.pack("=Qii", 0, signal.SIGCONT, 0) + bytes(48)  # SIGEV_SIGNAL
                for tick in range(1, 51):  # one each: a SIGCONT that waits for delivery is lost by a SIGSTOP
                    assert libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)) == 0
                    due = struct.pack("=4q", 0, 0, tick // 10, tick % 10 * 100000000)
                    assert libc.timer_settime(timer, 0, due, None) == 0
                begun = time.monotonic()
                while time.monotonic() - begun < 5:
                    pass
                return time.process_time()
            tell(got=outcome(spin, cpus=0.05))
        """
        told = run(ordinary_user, source)
        assert told["got"][:2] == ["CpuLimitExceeded", "cpu_time"], told
        assert "continued itself" in told["got"][2]

    def test_what_the_application_has_paused_stays_so(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            def spin():
                import time
                begun, used = time.monotonic(), time.process_time()
                while time.process_time() - used < 1:
                    pass
                return time.monotonic() - begun
            def used(pid):
                with open(f"/proc/{pid}/stat") as file:
                    return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
            with make(cpus=0.3) as isolator:
                future = isolator.submit(spin)
                time.sleep(0.5)
                isolator.pause()
                before = used(isolator.pid)
                time.sleep(1.5)
                after = used(isolator.pid)
                isolator.resume()
                tell(before=before, after=after, took=future.result(60))
        """
        told = run(ordinary_user, source)
        assert told["after"] == told["before"]
        assert told["took"] > 2

    def test_too_many_are_ended_where_no_rlimit_counts_them(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            from pisupervisor.supervise.stand_in import StandIn
            def crowd():
                import os, time
                for _ in range(10):
                    if os.fork() == 0:
                        time.sleep(60)
                time.sleep(60)
            with make(pids=64) as isolator:
                future, keeper = isolator.submit(crowd), isolator._keeper
                stand_in = StandIn(keeper.child, ("pids",))
                while len(isolator.pids()) < 12:
                    time.sleep(0.01)
                stand_in.look(keeper)
                roomy = keeper.child.is_killed
                stand_in._limits = Limits(pids=8)
                stand_in.look(keeper)
                error = future.exception(60)
                tell(roomy=roomy, kind=type(error).__name__, reason=error.exit_info.reason.value)
        """
        assert run(ordinary_user, source) == {"roomy": False, "kind": "PidsLimitExceeded", "reason": "pids"}

    @pytest.mark.bed
    def test_applied_says_so_and_the_thread_is_there_only_as_long(self, ordinary_user: OrdinaryUser) -> None:
        source = """
            def threads(): return [one.name.rpartition("-")[0] for one in threading.enumerate()]
            before, events = threads(), []
            with make() as isolator:
                during = threads()
                applied = {name: [entry.holds, entry.how] for name, entry in isolator.applied.items()}
            tell(before=before, during=during, after=threads(), applied=applied)
        """
        told = run(ordinary_user, source)
        assert told["during"] == [*told["before"], "pisupervisor-watch"]
        assert told["after"] == told["before"]
        for name in ("memory", "cpus", "pids"):
            holds, how = told["applied"][name]
            assert not holds
            assert "watched: " in how
            assert "every 0.1 s" in how
