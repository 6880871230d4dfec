"""Groups on the real cgroup v2 (any user whom something was delegated to): every limit with a control, and the end of them."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import features
import pytest
from helpers import DEGRADE, wait_until, zygote_of

from pihost import syscalls
from pisupervisor import (
    ExitReason,
    IsolationEvents,
    IsolationOptions,
    Limits,
    MemoryLimitExceeded,
    ProcessIsolator,
)
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.events import LimitReached
from pisupervisor.limits import blockdev, cgroups, directories
from pisupervisor.limits.cgroups import CgroupHost, GroupLimits, create_group, group_name
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.delegation import LEAF
from pisupervisor.limits.detect import Place, detect
from pisupervisor.limits.v2 import V2Group
from pisupervisor.options import IoLimit

pytestmark = [pytest.mark.v2, pytest.mark.bed]
MIB = 1 << 20


@pytest.fixture(scope="module")
def host() -> CgroupHost:
    return detect()


@pytest.fixture
def new_group(host: CgroupHost) -> Iterator[Callable[..., V2Group]]:
    """Makes groups, and proves after the test that nothing of them is left."""
    groups: list[V2Group] = []

    def make(**limits: object) -> V2Group:
        group = create_group(host, GroupLimits(**limits), group_name(time.monotonic_ns()))  # type: ignore[arg-type]
        assert isinstance(group, V2Group)
        groups.append(group)
        return group

    yield make
    for group in groups:
        assert group.kill()
        assert group.remove()
    assert own_groups(host) == []


def own_groups(host: CgroupHost) -> list[str]:
    (base,) = host.directories()
    return [str(path) for path in Path(base, "pisupervisor").glob(f"{os.getpid()}-*")]


def start(group: V2Group | None, work: Callable[[], object]) -> int:
    """A child that is born in the group, as the launch does it; it works and ends with what the work says, 0..255."""
    pid, pidfd = syscalls.clone(group.clone_flags, group.attach_fds[0]) if group else (os.fork(), -1)
    if pid:
        if pidfd >= 0:
            os.close(pidfd)
        return pid
    code = 250
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has a handler
        signal.alarm(60)  # a test that goes wrong leaves nothing running
        code = int(work() or 0)  # type: ignore[call-overload]
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(group: V2Group | None, work: Callable[[], object]) -> int:
    return finish(start(group, work))


def touch(size: int) -> None:
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, 4096):
            block[offset] = 1


def most_touched(step: int) -> Callable[[], None]:
    """Takes memory in steps, telling how much it had, until it is killed."""

    def work() -> None:
        blocks = []
        while True:
            block = mmap.mmap(-1, step)
            for offset in range(0, step, 4096):
                block[offset] = 1
            blocks.append(block)

    return work


def forks(most: int) -> int:
    """How many children that stay could be forked, up to ``most``."""
    pids: list[int] = []
    try:
        for _ in range(most):
            pid = os.fork()
            if not pid:
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
    except BlockingIOError:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(pids)


def burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def sleep_long() -> None:
    time.sleep(60)


class TestPlace:
    def test_this_process_lives_in_the_leaf_and_groups_beside_it(self, host: CgroupHost) -> None:
        (base,) = host.directories()
        own = Path("/proc/self/cgroup").read_text().strip()[3:]
        if os.path.exists(f"{base}/cgroup.type"):  # the root of the tree needs no leaf
            assert own.endswith(f"/{LEAF}")
            assert directories.read(f"{base}/cgroup.procs") == b""
        usable = {name for name, place in host.places.items() if place.usable}
        assert {"memory", "cpu", "pids"} <= usable
        assert usable <= set(directories.read(f"{base}/cgroup.subtree_control").decode().split())

    def test_looking_again_changes_nothing(self, host: CgroupHost) -> None:
        assert detect() == host
        assert own_groups(host) == []

    def test_a_child_is_born_in_its_group(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(pids=8)
        pid = start(group, sleep_long)
        assert Path(f"/proc/{pid}/cgroup").read_text().strip().endswith(group.path.rpartition("/")[2])
        assert group.pids() == [pid]

    def test_processes_that_come_later_do_not_matter(self, host: CgroupHost) -> None:
        """Another application started from here is in the leaf already, and finds the same place."""
        source = "from pisupervisor.limits.detect import detect; print(detect().directories())"
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(host.directories())


class TestMemory:
    def test_the_limit_is_exact_within_5_percent(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(memory=64 * MIB, swap=0)
        assert run(group, most_touched(MIB // 4)) == -signal.SIGKILL
        assert group.events().oom_kills >= 1
        peak = group.usage().peak_memory  # no memory.peak before Linux 5.19
        assert peak is None or 0.95 * 64 * MIB <= peak <= 64 * MIB
        assert run(new_group(memory=64 * MIB, swap=0), lambda: touch(60 * MIB)) == 0, "95 % less what a fork takes"

    def test_the_same_work_passes_without_a_limit(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group()
        assert run(group, lambda: touch(96 * MIB)) == 0
        assert group.events().oom_kills == 0

    def test_who_did_not_take_it_dies_too(self, new_group: Callable[..., V2Group]) -> None:
        """memory.oom.group: half a child is of no use."""
        group = new_group(memory=32 * MIB, swap=0)
        bystander = start(group, sleep_long)
        assert run(group, lambda: touch(64 * MIB)) == -signal.SIGKILL
        assert finish(bystander) == -signal.SIGKILL

    def test_high_throttles_and_kills_nobody(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(memory=96 * MIB, memory_high=16 * MIB, swap=0)
        pid = start(group, lambda: touch(64 * MIB))
        assert wait_until(lambda: group.events().memory_high > 0, 20)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert (group.usage().memory or 0) < 32 * MIB
        assert group.events().oom_kills == 0
        assert group.kill()
        finish(pid)

    def test_high_is_an_event(self) -> None:
        """parity: 33"""
        told: list[LimitReached] = []
        limits = Limits(memory="96M", memory_high="24M")
        with ProcessIsolator.create(
            events=IsolationEvents(limit=told.append), limits=limits, degrade=DEGRADE
        ) as isolator:
            future = isolator.submit_call(isolator.run_source, f"x = bytearray({64 * MIB})")
            assert wait_until(lambda: any(event.limit == "memory_high" for event in told), 20)
            future.cancel()


class TestPids:
    def test_forks_end_at_the_limit(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(pids=20)
        assert run(group, lambda: forks(40)) == 19  # and the child itself
        assert group.refusals().pids_max >= 1

    def test_without_a_limit_they_go_on(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group()
        assert run(group, lambda: forks(40)) == 40
        assert group.events().pids_max == 0


class TestCpu:
    def test_the_quota_is_exact_within_5_percent(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(cpus=0.2)
        pid = start(group, lambda: burn(60))
        time.sleep(0.5)
        shares: list[float] = []
        while len(shares) < 3 and max(shares, default=0) < 0.95 * 0.2:  # a busy machine may not have that much to give
            begun, used = time.monotonic(), group.usage().cpu_time or 0
            time.sleep(5)
            shares.append(((group.usage().cpu_time or 0) - used) / (time.monotonic() - begun))
        assert group.kill()
        finish(pid)
        assert 0.95 * 0.2 <= max(shares) <= 1.05 * 0.2
        assert group.events().throttled > 3

    def test_without_a_quota_nothing_holds_it_back(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group()
        assert run(group, lambda: burn(0.5)) == 0
        assert group.events().throttled == 0

    def test_weights_share_one_cpu(self, new_group: Callable[..., V2Group]) -> None:
        """parity: 29"""
        features.need("v2_cpuset")
        cpu = CpuSet(sorted(os.sched_getaffinity(0))[:1])
        groups = [new_group(cpu_weight=weight, cpuset=cpu) for weight in (100, 400)]
        pids = [start(group, lambda: burn(60)) for group in groups]
        assert all(group.read_back()["cpuset"].holds for group in groups)
        time.sleep(0.5)
        before = [group.usage().cpu_time or 0 for group in groups]
        time.sleep(6)
        light, heavy = [(group.usage().cpu_time or 0) - then for group, then in zip(groups, before, strict=True)]
        for group, pid in zip(groups, pids, strict=True):
            assert group.kill()
            finish(pid)
        assert 0.95 <= light / (light + heavy) / 0.2 <= 1.05


class TestPressure:
    def test_who_waits_for_cpu_is_seen(self, new_group: Callable[..., V2Group]) -> None:
        group, idle = new_group(cpus=0.1), new_group()
        if not group.pressure():
            pytest.skip("psi: this kernel has it switched off")
        pid = start(group, lambda: burn(60))
        assert wait_until(lambda: group.pressure()["cpu_pressure"] > 0.1, 30)
        assert group.kill()
        finish(pid)
        assert idle.pressure() == {"cpu_pressure": 0.0, "memory_pressure": 0.0, "io_pressure": 0.0}


class TestCpuset:
    @pytest.fixture(autouse=True)
    def controller(self) -> None:
        features.need("v2_cpuset")

    def test_the_child_runs_on_those_cpus(self, new_group: Callable[..., V2Group]) -> None:
        """Also on kernels that bind nobody who is born in a group: then reading back does."""
        first, *others = sorted(os.sched_getaffinity(0))
        group = new_group(cpuset=CpuSet([first]))
        reader, writer = os.pipe()

        def widen() -> int:
            os.read(reader, 1)
            narrow = os.sched_getaffinity(0) == {first}
            os.sched_setaffinity(0, {first, *others})
            return 10 + narrow + 2 * (os.sched_getaffinity(0) == {first})

        pid = start(group, widen)
        assert group.read_back()["cpuset"].detail == f"CPUs {first}"
        os.write(writer, b"x")
        assert finish(pid) == 13
        os.close(reader)
        os.close(writer)

    def test_cpus_that_are_not_there(self, host: CgroupHost) -> None:
        with pytest.raises(OptionsError, match="CPUs 8000 are not among"):
            create_group(host, GroupLimits(cpuset=CpuSet([0, 8000])), group_name(1))
        assert own_groups(host) == []


class TestIo:
    @pytest.fixture(autouse=True)
    def controller(self) -> None:
        features.need("v2_io")

    def test_the_throttle_is_written_for_the_whole_disk(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(io=(IoLimit(device=".", read_bps="1M", write_iops=50),))
        applied = group.read_back()["io"]
        assert applied.holds
        assert applied.detail == f"{blockdev.block_device('.')} rbps=1048576 wbps=max riops=max wiops=50"

    def test_it_holds_reading_back(self, new_group: Callable[..., V2Group], tmp_path: Path) -> None:
        """parity: 28"""
        file = Path.cwd() / f"pisupervisor-io-{os.getpid()}"
        file.write_bytes(os.urandom(3 * MIB))
        try:
            limited = timed_read(new_group(io=(IoLimit(device=".", read_bps="1M"),)), file)
            free = timed_read(new_group(), file)
        finally:
            file.unlink()
        assert limited > 1.5 > free


def timed_read(group: V2Group, file: Path) -> float:
    """Seconds in which a child of the group reads it from the disk, past the page cache."""

    def read() -> None:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        block = mmap.mmap(-1, MIB // 4)
        while os.readv(fd, [block]):
            pass

    begun = time.monotonic()
    assert run(group, read) == 0
    return time.monotonic() - begun


class TestReadBack:
    LIMITS = GroupLimits(memory=64 * MIB, memory_high=48 * MIB, swap=0, cpus=0.5, cpu_weight=50, pids=16)

    def test_everything_asked_for_is_read_from_the_kernel(self, new_group: Callable[..., V2Group]) -> None:
        applied = new_group(**self.LIMITS._asdict()).read_back()
        assert list(applied) == ["memory", "swap", "cpus", "cpu_weight", "pids"]
        assert {name for name, entry in applied.items() if not entry.holds} == set()
        assert applied["memory"].detail == f"{64 * MIB} bytes, ends as a whole, throttled above {48 * MIB}"
        assert applied["memory"].how.startswith("cgroup v2 memory.max, ")
        assert applied["cpus"].detail == "0.5 cores (50000 us in 100000)"

    @pytest.mark.parametrize(
        ("file", "value", "name"),
        [
            ("pids.max", "max", "pids"), ("memory.max", "max", "memory"), ("memory.oom.group", "0", "memory"),
            ("memory.high", "max", "memory"), ("cpu.max", "max", "cpus"), ("cpu.weight", "100", "cpu_weight"),
            ("cpuset.cpus", "0-1", "cpuset"),
        ],
    )  # fmt: skip
    def test_it_tells_when_somebody_lifts_a_limit(
        self, new_group: Callable[..., V2Group], file: str, value: str, name: str
    ) -> None:
        if name == "cpuset":
            features.need("v2_cpuset")
        cpuset = CpuSet([0]) if name == "cpuset" else None
        group = new_group(**self.LIMITS._replace(cpuset=cpuset)._asdict())
        directories.write(f"{group.path}/{file}", value.encode())
        assert [lifted for lifted, entry in group.read_back().items() if not entry.holds] == [name]

    def test_a_group_that_vanished_holds_nothing(self, host: CgroupHost) -> None:
        group = create_group(host, GroupLimits(memory=64 * MIB, pids=16), group_name(1))
        assert isinstance(group, V2Group)
        os.rmdir(group.path)  # somebody else's doing
        assert not any(entry.holds for entry in group.read_back().values())
        assert (group.pids(), group.events(), group.usage()) == ([], cgroups.GroupEvents(), cgroups.GroupUsage())
        assert group.kill()
        assert group.remove()
        assert own_groups(host) == []


def group_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def fork_chain() -> None:
    """Each process forks the next and ends at once: no list of pids is ever up to date."""
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            os._exit(0)


class TestEnding:
    @pytest.mark.parametrize("old_kernel", [False, True])
    def test_kill_ends_a_fork_chain(
        self, new_group: Callable[..., V2Group], monkeypatch: pytest.MonkeyPatch, old_kernel: bool
    ) -> None:
        group = new_group(pids=64)
        if old_kernel:  # before 5.14 there is no cgroup.kill: then it is done one by one
            write = directories.write
            monkeypatch.setattr(
                directories, "write", lambda path, *text: write(path.replace("cgroup.kill", "no"), *text)
            )
        os.waitpid(start(group, fork_chain), 0)
        time.sleep(0.2)
        assert b"populated 1" in directories.read(f"{group.path}/cgroup.events"), "the chain does not run"
        assert group.kill(30)
        assert group.pids() == []

    def test_a_frozen_group_dies(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group(pids=8)
        pid = start(group, sleep_long)
        group.freezer().pause()
        assert b"frozen 1" in directories.read(f"{group.path}/cgroup.events")
        assert group.kill()
        assert finish(pid) == -signal.SIGKILL

    def test_a_group_with_a_process_in_it_is_not_gone(self, new_group: Callable[..., V2Group]) -> None:
        group = new_group()
        pid = start(group, sleep_long)
        assert not group.remove()
        assert group.pids() == [pid]
        os.kill(pid, signal.SIGKILL)
        finish(pid)
        assert group.remove()

    def test_remove_leaves_nothing_and_may_be_repeated(self, host: CgroupHost) -> None:
        before = set(os.listdir("/proc/self/fd"))
        group = create_group(host, GroupLimits(pids=16), group_name(1))
        assert len(group.attach_fds) == len(own_groups(host)) == 1
        assert not os.get_inheritable(group.attach_fds[0])
        assert group.remove()
        assert group.remove()
        assert own_groups(host) == []
        assert set(os.listdir("/proc/self/fd")) == before

    def test_a_refused_limit_names_the_file_and_leaves_nothing(self, host: CgroupHost) -> None:
        with pytest.raises(LaunchError, match=r"pids\.max") as caught:
            create_group(host, GroupLimits(pids=-5), group_name(1))
        assert (caught.value.step, caught.value.errno) == ("cgroup", errno.EINVAL)
        assert own_groups(host) == []

    def test_a_base_that_went_away(self, host: CgroupHost) -> None:
        gone = host._replace(places=dict.fromkeys(host.places, Place("/sys/fs/cgroup/not-there")))
        with pytest.raises(LaunchError, match="not-there") as caught:
            create_group(gone, GroupLimits(pids=8), group_name(1))
        assert caught.value.errno == errno.ENOENT


class TestIsolator:
    """The same through the front door."""

    LIMITS = Limits(memory="64M", cpus=0.5, pids=16, cpu_weight=50)

    @pytest.mark.parametrize("cpuset", [None, "0"])
    def test_applied_says_what_holds_and_by_whose_leave(self, host: CgroupHost, cpuset: str | None) -> None:
        if cpuset:
            features.need("v2_cpuset")
        limits = replace(self.LIMITS, cpuset=cpuset)
        with ProcessIsolator.create(IsolationOptions(limits=limits, degrade=DEGRADE)) as isolator:
            applied = isolator.applied
            assert isolator.run_source("open('/proc/self/cgroup').read()").value == "0::/\n"
            assert len(isolator.pids()) == 2
        for name in ("memory", "swap", "cpus", "cpu_weight", "pids", *(["cpuset"] if cpuset else [])):
            assert applied[name].holds
            assert host.how in applied[name].how or name == "swap"
        assert own_groups(host) == []

    @pytest.mark.root
    def test_a_group_that_was_named_is_used(self) -> None:
        """The application stays outside of it; what children are born from goes there, another zygote too."""
        group = Path(f"/sys/fs/cgroup/pisupervisor-test-{os.getpid()}")
        group.mkdir()
        own = Path("/proc/self/cgroup").read_text()
        try:
            with ProcessIsolator.create(
                IsolationOptions(limits=Limits(memory="64M", pids=16), cgroup=group, degrade=DEGRADE)
            ) as isolator:
                assert group_of(isolator.pid or 0).startswith(f"/{group.name}/pisupervisor/")
                assert group_of(zygote_of(isolator)) == f"/{group.name}/{LEAF}"
                assert f"{group}, as asked" in isolator.applied["memory"].how
                os.kill(zygote_of(isolator), signal.SIGKILL)
                assert wait_until(lambda: isolator.state == "backoff", 20)
                assert isolator.run_source("6 * 7").value == 42
                assert group_of(isolator.pid or 0).startswith(f"/{group.name}/pisupervisor/")
            assert Path("/proc/self/cgroup").read_text() == own
            assert not (group / "pisupervisor").exists()
        finally:
            assert wait_until(lambda: not directories.read(f"{group}/{LEAF}/cgroup.procs"), 10)
            (group / LEAF).rmdir()
            group.rmdir()

    def test_memory(self) -> None:
        with ProcessIsolator.create(IsolationOptions(limits=self.LIMITS, degrade=DEGRADE)) as isolator:
            with pytest.raises(MemoryLimitExceeded):
                isolator.run_source("bytearray(128 << 20)")
            assert isolator.run_source("6 * 7").value == 42

    def test_a_pause_stops_all_and_a_paused_child_can_be_ended(self) -> None:
        with ProcessIsolator.create(IsolationOptions(limits=self.LIMITS, degrade=DEGRADE)) as isolator:
            isolator.run_source("import time, threading\ncount = 0")
            isolator.run_source(
                "def tick():\n    global count\n    while True:\n        count += 1\n        time.sleep(0.001)\n"
                "threading.Thread(target=tick, daemon=True).start()"
            )
            isolator.pause()
            time.sleep(0.1)  # "frozen" is said before the last of the time is counted: 0.7 ms, emulated
            used = isolator.resource_usage().cpu_time
            time.sleep(0.3)
            assert isolator.resource_usage().cpu_time == used
            isolator.resume()
            assert isolator.run_source("count").value > 0
            isolator.pause()
            assert isolator.terminate(0.1)
            assert isolator.wait_for_exit(60).reason is ExitReason.KILLED
