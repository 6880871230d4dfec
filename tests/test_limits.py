"""Groups on cgroup v1: detection and what is missing (pure), then every limit on the real kernel, with a control."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import features
import pytest
from helpers import wait_until

from pihost import syscalls
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.limits import blockdev, cgroups, directories, v1_files
from pisupervisor.limits.cgroups import (
    ChildGroup,
    GroupEvents,
    GroupLimits,
    GroupUsage,
    create_group,
    group_name,
    missing,
    wanted_limits,
)
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.detect import CONTROLLERS, CgroupHost, Place, Probe, describe_host, detect, find_groups
from pisupervisor.options import IoLimit, Limits

MIB = 1 << 20

# --- detection, from text ------------------------------------------------------------------------------------------

V1_CGROUP = """\
11:cpuset:/
10:cpu,cpuacct:/user.slice
9:memory:/user.slice/with:colon
8:pids:/user.slice
7:devices:/user.slice
6:blkio:/user.slice
5:freezer:/
1:name=systemd:/user.slice/session-1.scope
"""
V1_MOUNTS = """\
22 28 0:21 / /proc rw,nosuid - proc proc rw
31 23 0:28 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,name=systemd
33 31 0:30 / /sys/fs/cgroup/cpuset rw shared:10 - cgroup cgroup rw,cpuset
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
37 31 0:34 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
38 31 0:35 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
39 31 0:36 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
"""
UNIFIED_MOUNT = "40 31 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
V2_CGROUP = "0::/user.slice/user-1000.slice/session-1.scope\n"
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def everywhere(path: str) -> bool:
    return True


def test_pure_v1_with_controllers_mounted_together() -> None:
    mode, found = find_groups(V1_CGROUP, V1_MOUNTS, everywhere)
    assert mode == "v1"
    assert found == {
        "cpuset": "/sys/fs/cgroup/cpuset",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/user.slice",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/user.slice",
        "memory": "/sys/fs/cgroup/memory/user.slice/with:colon",
        "pids": "/sys/fs/cgroup/pids/user.slice",
        "devices": "/sys/fs/cgroup/devices/user.slice",
        "blkio": "/sys/fs/cgroup/blkio/user.slice",
        "freezer": "/sys/fs/cgroup/freezer",
    }


def test_hybrid_v2_and_none() -> None:
    hybrid, found = find_groups(V1_CGROUP + "0::/\n", V1_MOUNTS + UNIFIED_MOUNT, everywhere)
    assert (hybrid, set(found)) == ("hybrid", set(CONTROLLERS))
    assert find_groups(V2_CGROUP, V2_MOUNTS, everywhere) == ("v2", {})
    # systemd's own v1 hierarchy has no controller: such a host is v2 for us
    named = "32 31 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    assert find_groups("1:name=systemd:/\n0::/\n", named + UNIFIED_MOUNT, everywhere) == ("v2", {})
    assert find_groups("", "22 28 0:21 / /proc rw - proc proc rw\n", everywhere) == ("none", {})
    assert find_groups(V1_CGROUP, "", everywhere) == ("none", {})


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("/", "/", "/cg/pids"),
        ("/", "/a/b", "/cg/pids/a/b"),
        ("/docker/1", "/docker/1", "/cg/pids"),
        ("/docker/1", "/docker/1/x", "/cg/pids/x"),
        ("/docker/1", "/docker/12", "/cg/pids"),  # a neighbour whose name only begins alike
        ("/docker/1", "/", "/cg/pids"),
        ("/", "/../outside", "/cg/pids"),
        ("/", "/not/there", "/cg/pids"),
    ],
)
def test_the_own_group_as_a_container_sees_it(root: str, own: str, expected: str) -> None:
    mounts = f"36 31 0:33 {root} /cg/pids rw - cgroup cgroup rw,pids\n"
    assert find_groups(f"8:pids:{own}\n", mounts, lambda path: "not" not in path)[1] == {"pids": expected}


def test_mount_points_with_spaces() -> None:
    mounts = "36 31 0:33 / /my\\040cg/pids rw - cgroup cgroup rw,pids\n"
    assert find_groups("8:pids:/\n", mounts, everywhere)[1] == {"pids": "/my cg/pids"}


def fake_host(mode="v1", swap_on=True, error: OSError | None = None, lacking: str = "", memsw=True) -> CgroupHost:
    files = {"devices.deny"} | ({"memory.memsw.limit_in_bytes"} if memsw else set())
    found = {name: f"/cg/{name}" for name in CONTROLLERS if name != lacking} if mode in ("v1", "hybrid") else {}
    return describe_host(mode, found, swap_on, lambda directory: Probe(error, frozenset(files)), uid=1000)


def test_each_directory_is_tried_once() -> None:
    tried: list[str] = []

    def probe(directory: str) -> Probe:
        tried.append(directory)
        return Probe(None, frozenset({"devices.deny"}))

    host = describe_host("v1", find_groups(V1_CGROUP, V1_MOUNTS, everywhere)[1], False, probe, 0)
    assert len(tried) == len(set(tried)) == 7
    assert sorted(host.directories()) == sorted(tried)
    assert all(place.usable for place in host.places.values())


def test_why_a_place_cannot_be_used_is_data() -> None:
    host = fake_host(error=PermissionError(errno.EACCES, "Permission denied"), lacking="blkio")
    assert host.places["pids"] == Place("/cg/pids", errno.EACCES, "cannot make a group in /cg/pids: Permission denied")
    assert host.places["blkio"] == Place(None, None, "there is no cgroup v1 blkio hierarchy")
    assert host.directories() == []
    assert fake_host(mode="none").places["memory"].why == "there is no cgroup memory hierarchy"


# --- what is missing, and the remedy -------------------------------------------------------------------------------

EVERYTHING = GroupLimits(
    memory=64 * MIB, swap=0, cpus=0.5, cpu_weight=50, cpuset=CpuSet([0]), pids=32, io=(IoLimit(device="/", read_bps=1),)
)
DENIED = PermissionError(errno.EACCES, "Permission denied")


def remedies(host: CgroupHost, wanted: GroupLimits) -> dict[str, str]:
    return {entry.feature: entry.remedy for entry in missing(host, wanted)}


def test_wanted_limits_of_the_defaults() -> None:
    assert wanted_limits(Limits()) == GroupLimits(memory=512 * MIB, swap=0, cpus=1.0, pids=64, devices=True)
    io = IoLimit(device="/", write_bps="1M")
    everything = wanted_limits(Limits(memory="1G", memory_high="8M", swap="1M", cpu_weight=7, cpuset="0-1", io=[io]))
    assert everything == GroupLimits(1 << 30, 8 * MIB, MIB, 1.0, 7, CpuSet([0, 1]), 64, (io,))


def test_nothing_is_missing_where_all_can_be_made() -> None:
    assert missing(fake_host(), EVERYTHING) == []


def test_without_rights_all_but_devices_is_missing_and_each_remedy_is_exact() -> None:
    found = remedies(fake_host(error=DENIED), EVERYTHING)
    assert set(found) == {"memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io"}
    pids = "mkdir -p /cg/pids/pisupervisor && chown -R 1000 /cg/pids/pisupervisor"
    assert found["pids"] == (
        f'run as root; or delegate, as root: {pids}; or do without it: IsolationOptions(degrade=("pids",))'
    )
    assert "cat /cg/cpuset/cpuset.mems > /cg/cpuset/pisupervisor/cpuset.mems && chown" in found["cpuset"]


def test_a_root_is_not_told_to_be_root() -> None:
    told = remedies(fake_host(error=DENIED)._replace(uid=0), GroupLimits(pids=8))["pids"]
    assert told.startswith("leave this root CAP_DAC_OVERRIDE; or delegate, as root: ")


def test_where_only_v2_is_to_be_had_and_nothing_is_mounted() -> None:
    """A chroot without /sys: a v1 hierarchy could not be mounted."""
    assert find_groups("0::/a\n", "")[0] == "v2"
    assert find_groups("4:memory:/\n0::/a\n", "")[0] == "none"


def test_only_what_was_asked_for_is_missing() -> None:
    assert missing(fake_host(error=DENIED, swap_on=False), GroupLimits(swap=0)) == []
    assert set(remedies(fake_host(error=DENIED), GroupLimits(pids=8))) == {"pids"}


def test_the_remedy_names_the_cause() -> None:
    read_only = OSError(errno.EROFS, "Read-only file system")
    told = remedies(fake_host(error=read_only), GroupLimits(pids=8))["pids"]
    assert "--privileged" in told
    assert "mount -o remount,bind,rw /cg/pids && mkdir -p /cg/pids/pisupervisor && chown -R 1000 " in told
    below = fake_host(error=read_only).places["pids"]._replace(directory="/proc/self")
    assert "rw /proc && " in cgroups.enable(fake_host(), "pids", below), "a folder alone cannot be mounted anew"
    assert "mount -t cgroup -o blkio" in remedies(fake_host(lacking="blkio"), EVERYTHING)["io"]
    assert set(remedies(fake_host(mode="none"), EVERYTHING)) >= {"memory", "cpus", "pids"}


@pytest.mark.parametrize(
    ("host", "limits", "expected"),
    [
        (fake_host(swap_on=True), GroupLimits(memory=MIB, swap=0), None),
        (fake_host(swap_on=False, memsw=False), GroupLimits(memory=MIB, swap=0), None),
        (fake_host(swap_on=False, error=DENIED), GroupLimits(swap=0), None),
        (fake_host(swap_on=True, memsw=False), GroupLimits(memory=MIB, swap=0), "swapaccount=1"),
        (fake_host(swap_on=True), GroupLimits(memory=None, swap=0), "give a memory limit"),
        (fake_host(swap_on=True, error=DENIED), GroupLimits(swap=0), "swapoff -a"),
    ],
)
def test_swap(host: CgroupHost, limits: GroupLimits, expected: str | None) -> None:
    remedy = remedies(host, limits).get("swap")
    assert remedy is None if expected is None else expected in str(remedy)


def test_memory_high_needs_v2() -> None:
    (entry,) = missing(fake_host(), GroupLimits(memory=MIB, memory_high=MIB))
    assert (entry.feature, "cgroup v2" in entry.why) == ("memory", True)


# --- what is written -----------------------------------------------------------------------------------------------


def written(limits: GroupLimits, memsw: bool = True) -> dict[str, tuple[bytes, ...]]:
    return {write.file: write.values for write in v1_files.file_writes(limits, memsw)}


def test_memory_comes_before_memory_and_swap() -> None:
    files = written(GroupLimits(memory=64 * MIB, swap=MIB, devices=False))
    assert list(files)[:2] == ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    assert files["memory.memsw.limit_in_bytes"] == (b"%d" % (65 * MIB),)
    assert "memory.memsw.limit_in_bytes" not in written(GroupLimits(memory=MIB, swap=0), memsw=False)
    assert "memory.memsw.limit_in_bytes" not in written(GroupLimits(memory=MIB, swap=None))


def test_cores_become_a_quota_and_weights_shares() -> None:
    assert [written(GroupLimits(cpus=c))["cpu.cfs_quota_us"] for c in (0.01, 0.5, 3.0)] == [
        (b"1000",),
        (b"50000",),
        (b"300000",),
    ]
    assert [v1_files.shares(weight) for weight in (1, 100, 300, 10000)] == [10, 1024, 3072, 102400]


def test_devices_are_denied_before_five_are_allowed() -> None:
    files = written(GroupLimits())
    assert list(files) == ["devices.deny", "devices.allow"]
    assert files["devices.allow"] == (b"c 1:3 rw", b"c 1:5 rw", b"c 1:7 rw", b"c 1:8 rw", b"c 1:9 rw")


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(OptionsError, match="no limit"):
        IoLimit(device="/", read_iops=0)


@pytest.mark.linux
def test_devices_are_found_below_paths() -> None:
    with pytest.raises(OptionsError, match="cannot look at"):
        blockdev.block_device("/not/there")
    with pytest.raises(OptionsError, match="no single block device"):
        blockdev.block_device("/proc")


# --- the real kernel -----------------------------------------------------------------------------------------------

real = [pytest.mark.linux, pytest.mark.root]
rootless = [*real, pytest.mark.rootless]


@pytest.fixture(scope="module")
def host() -> CgroupHost:
    features.need("root", "v1")
    return detect()


@pytest.fixture
def new_group(host: CgroupHost) -> Iterator[Callable[..., ChildGroup]]:
    """Makes groups, and proves after the test that nothing of them is left."""
    groups: list[ChildGroup] = []

    def make(on: CgroupHost = host, **limits: object) -> ChildGroup:
        groups.append(create_group(on, GroupLimits(**limits), group_name(time.monotonic_ns())))  # type: ignore[arg-type]
        return groups[-1]

    yield make
    for group in groups:
        assert group.kill()
        assert group.remove()
    assert own_groups(host) == []


def own_groups(host: CgroupHost, pid: int | None = None) -> list[str]:
    found: list[str] = []
    for base in host.directories():
        with suppress(FileNotFoundError):  # another's tests may remove the parent as we look
            found += [str(path) for path in Path(base, "pisupervisor").glob(f"{pid or os.getpid()}-*")]
    return found


def start(group: ChildGroup | None, work: Callable[[], object]) -> int:
    """Fork a child that enters the group by itself, as the launch does, and then works. Its exit code is 0..255.

    Returns when it is inside: kill() sees members only, so whoever launches must not kill before that.
    """
    reader, writer = os.pipe()
    born_in_one = group is not None and bool(group.clone_flags)
    pid, pidfd = syscalls.clone(group.clone_flags, group.attach_fds[0]) if group and born_in_one else (os.fork(), -1)
    if pidfd >= 0:
        os.close(pidfd)
    if not pid:
        enter_and_work(group, work, writer)
    os.close(writer)
    assert os.read(reader, 1) == b"i", "the child did not enter the group"
    os.close(reader)
    return pid


def enter_and_work(group: ChildGroup | None, work: Callable[[], object], writer: int) -> NoReturn:
    code = 250
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has a handler
        signal.alarm(20)  # a test that goes wrong leaves nothing running
        born_in_one = bool(group and group.clone_flags)
        for fd in group.attach_fds[born_in_one:] if group else ():
            os.write(fd, b"0")
        os.write(writer, b"i")
        os.close(writer)
        code = int(work() or 0)  # type: ignore[call-overload]
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(group: ChildGroup | None, work: Callable[[], object]) -> int:
    return finish(start(group, work))


def touch(size: int) -> None:
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, 4096):
            block[offset] = 1


def forks(most: int) -> int:
    """How many children that stay could be forked, up to ``most``."""
    pids: list[int] = []
    try:
        for _ in range(most):
            pid = os.fork()
            if not pid:
                time.sleep(20)
                os._exit(0)
            pids.append(pid)
    except BlockingIOError:
        pass
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return len(pids)


def burn(seconds: float) -> float:
    """Spin for wall-clock seconds; the CPU time that it got."""
    end, before = time.monotonic() + seconds, time.process_time()
    while time.monotonic() < end:
        pass
    return time.process_time() - before


class TestDetection:
    pytestmark = real

    def test_detect_leaves_nothing(self, host: CgroupHost) -> None:
        assert own_groups(detect()) == []
        assert {host.places[name].usable for name in ("memory", "cpu", "pids", "devices")} == {True}

    def test_groups_go_below_the_own_group(self, host: CgroupHost) -> None:
        own = {line.split(":")[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
        assert str(host.places["memory"].directory).endswith(own["memory"].rstrip("/"))


class TestMemory:
    pytestmark = real

    def test_above_the_limit_the_child_is_killed_and_counted(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(memory=32 * MIB, swap=0)
        assert run(group, lambda: touch(64 * MIB)) == -signal.SIGKILL
        assert group.events().oom_kills >= 1
        assert 24 * MIB < (group.usage().peak_memory or 0) <= 32 * MIB

    def test_the_same_work_passes_below_and_without_a_limit(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(memory=128 * MIB, swap=0)
        assert run(group, lambda: touch(64 * MIB)) == 0
        assert group.events().oom_kills == 0
        assert run(None, lambda: touch(64 * MIB)) == 0

    def test_it_is_the_sum_of_the_whole_tree(self, new_group: Callable[..., ChildGroup]) -> None:
        """parity: 27"""

        def family() -> int:
            pids = [start(None, lambda: (touch_and_hold(24 * MIB), 0)[1]) for _ in range(3)]
            return sum(finish(pid) == -signal.SIGKILL for pid in pids)

        group = new_group(memory=48 * MIB, swap=0)  # each alone fits, the three do not
        assert run(group, family) in (1, 2, 3, -signal.SIGKILL)
        assert group.events().oom_kills >= 1
        roomy = new_group(memory=256 * MIB, swap=0)
        assert run(roomy, family) == 0
        assert roomy.events().oom_kills == 0


def touch_and_hold(size: int) -> None:
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, 4096):
            block[offset] = 1
        time.sleep(0.5)


class TestPids:
    pytestmark = real

    def test_forks_end_at_the_limit(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(pids=8)
        assert run(group, lambda: forks(40)) == 7  # and the child itself
        assert group.events().pids_max >= 1

    def test_without_a_limit_they_go_on(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group()
        assert run(group, lambda: forks(40)) == 40
        assert group.events().pids_max == 0

    def test_a_grandchild_is_listed(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(pids=8)
        reader, writer = os.pipe()

        def parent() -> None:
            pid = os.fork()
            if pid:
                os.write(writer, b"%d" % pid)
            time.sleep(20)

        child = start(group, parent)
        grandchild = int(os.read(reader, 20))
        os.close(reader)
        os.close(writer)
        assert sorted(group.pids()) == sorted([child, grandchild])
        assert group.usage().pids == 2
        assert group.kill()
        assert finish(child) == -signal.SIGKILL
        assert group.pids() == []


@pytest.mark.alone
class TestCpu:
    pytestmark = real

    def test_the_quota_caps_the_cpu_time(self, new_group: Callable[..., ChildGroup]) -> None:
        """parity: 24"""
        group = new_group(cpus=0.25)
        before = time.monotonic()
        assert run(group, lambda: (burn(1.2), 0)[1]) == 0
        elapsed = time.monotonic() - before
        assert 0.12 * elapsed <= (group.usage().cpu_time or 0) <= 0.36 * elapsed
        assert group.events().throttled > 3
        assert group.events().throttled_time > 0.1

    def test_without_a_quota_nothing_holds_it_back(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group()
        assert run(group, lambda: (burn(0.6), 0)[1]) == 0
        assert (group.events().throttled, group.events().throttled_time) == (0, 0.0)

    def test_a_tighter_ancestor_holds_the_limit(self, host: CgroupHost) -> None:
        base = f"{host.places['cpu'].directory}/pisupervisor-test-{os.getpid()}"
        os.mkdir(base)
        try:
            directories.write(f"{base}/cpu.cfs_quota_us", b"20000")
            inner = host._replace(places={**host.places, "cpu": Place(base)})
            group = create_group(inner, GroupLimits(cpus=1.0), group_name(1))
            applied = group.read_back()["cpus"]
            assert (applied.holds, applied.how) == (True, "cgroup v1 cpu of an ancestor")
            assert run(group, lambda: (burn(0.6), 0)[1]) == 0
            assert (group.usage().cpu_time or 0) < 0.3
            assert group.remove()
        finally:
            os.rmdir(base)

    def test_weight(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(cpu_weight=300)
        assert (group.read_back()["cpu_weight"].holds, group.read_back()["cpu_weight"].detail) == (True, "3072 shares")

    def test_weights_share_one_cpu(self, new_group: Callable[..., ChildGroup]) -> None:
        """parity: 29"""
        cpu = CpuSet(sorted(os.sched_getaffinity(0))[:1])
        groups = [new_group(cpu_weight=weight, cpuset=cpu) for weight in (100, 400)]
        pids = [start(group, lambda: (burn(1.2), 0)[1]) for group in groups]
        assert [finish(pid) for pid in pids] == [0, 0]
        light, heavy = [group.usage().cpu_time or 0 for group in groups]
        assert heavy > 2 * light > 0


class TestCpuset:
    pytestmark = real

    def test_the_child_runs_on_those_cpus(self, new_group: Callable[..., ChildGroup]) -> None:
        last = max(os.sched_getaffinity(0))
        group = new_group(cpuset=CpuSet([last]))
        assert run(group, lambda: 10 + (os.sched_getaffinity(0) == {last})) == 11
        assert run(None, lambda: len(os.sched_getaffinity(0))) == os.cpu_count()
        assert group.read_back()["cpuset"].detail == f"CPUs {last}"

    def test_it_cannot_be_widened_from_inside(self, new_group: Callable[..., ChildGroup]) -> None:
        first, *others = sorted(os.sched_getaffinity(0))
        group = new_group(cpuset=CpuSet([first]))
        assert run(group, lambda: os.sched_setaffinity(0, {first, *others}) or len(os.sched_getaffinity(0))) == 1

    def test_cpus_that_are_not_there(self, host: CgroupHost) -> None:
        with pytest.raises(OptionsError, match="CPUs 8000 are not among"):
            create_group(host, GroupLimits(cpuset=CpuSet([0, 8000])), group_name(1))
        assert own_groups(host) == []


class TestDevices:
    pytestmark = real

    def test_block_devices_are_denied(self, new_group: Callable[..., ChildGroup], tmp_path: Path) -> None:
        def open_loop_device() -> int:
            node = tmp_path / f"node-{os.getpid()}"
            try:
                os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(7, 0))
                os.close(os.open(node, os.O_RDONLY | os.O_NONBLOCK))
            except OSError as error:
                return error.errno or 251
            return 0

        assert run(new_group(), open_loop_device) == errno.EPERM
        assert run(None, open_loop_device) in (0, errno.ENXIO)

    def test_a_node_that_is_there_is_denied_too(self, new_group: Callable[..., ChildGroup], tmp_path: Path) -> None:
        kmsg = tmp_path / "node"
        os.mknod(kmsg, 0o600 | stat.S_IFCHR, os.makedev(1, 11))

        def open_it() -> int:
            try:
                os.close(os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK))
            except OSError as error:
                return error.errno or 251
            return 0

        assert run(new_group(), open_it) == errno.EPERM
        assert run(None, open_it) == 0

    @pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
    def test_the_five_harmless_ones_work(self, new_group: Callable[..., ChildGroup], name: str) -> None:
        assert run(new_group(), lambda: os.close(os.open(f"/dev/{name}", os.O_RDWR))) == 0


class TestIo:
    pytestmark = real

    def test_the_throttle_is_written_for_the_whole_disk(self, new_group: Callable[..., ChildGroup]) -> None:
        device = blockdev.block_device("/dev/loop0") if os.path.exists("/dev/loop0") else blockdev.block_device("/")
        path = "/dev/loop0" if device == "7:0" else "/"
        group = new_group(io=(IoLimit(device=path, read_bps="1M", write_iops=50),))
        applied = group.read_back()["io"]
        assert applied.holds
        assert applied.detail.startswith(f"{device} 1048576, {device} 50")

    def test_an_unknown_device_leaves_nothing(self, host: CgroupHost) -> None:
        with pytest.raises(OptionsError, match="cannot look at"):
            create_group(host, GroupLimits(io=(IoLimit(device="/dev/nothing", read_bps=1),)), group_name(1))
        assert own_groups(host) == []


class TestReadBack:
    pytestmark = real

    def test_everything_asked_for_is_read_from_the_kernel(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(memory=64 * MIB, swap=0, cpus=0.5, cpu_weight=50, cpuset=CpuSet([0]), pids=16)
        applied = group.read_back()
        assert list(applied) == ["memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "devices"]
        assert {name for name, entry in applied.items() if not entry.holds} == set()
        assert applied["memory"].detail == f"{64 * MIB} bytes"
        assert applied["memory"].how == "cgroup v1 memory"
        assert (applied["swap"].asked, applied["swap"].detail) == (0, "0 bytes")
        assert applied["cpus"].detail == "0.5 cores (50000 us in 100000)"
        assert applied["pids"].detail == "16 processes and threads"

    def test_it_tells_when_somebody_lifts_a_limit(self, host: CgroupHost) -> None:
        limits = GroupLimits(memory=64 * MIB, swap=0, cpus=0.5, cpuset=CpuSet([0]), pids=16)
        group = create_group(host._replace(swap_on=True), limits, group_name(1))
        lifted = {"pids": "pids.max max", "memory": "memory.memsw.limit_in_bytes -1", "cpu": "cpu.cfs_quota_us -1"}
        for controller, text in lifted.items():
            file, value = text.split()
            directories.write(f"{group.paths[controller]}/{file}", value.encode())  # type: ignore[attr-defined]
        applied = group.read_back()
        assert group.remove()
        assert [name for name, entry in applied.items() if not entry.holds] == ["swap", "cpus", "pids"]

    def test_a_removed_group_holds_nothing(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(memory=64 * MIB, pids=16)
        assert group.remove()
        assert not group.read_back()["memory"].holds
        assert group.pids() == []
        assert group.events() == cgroups.GroupEvents()
        assert group.usage() == cgroups.GroupUsage()
        assert group.kill()


def fork_chain() -> None:
    """Each process forks the next and ends at once: no list of pids is ever up to date."""
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            os._exit(0)


class TestEnding:
    pytestmark = real

    @pytest.mark.parametrize("means", ["cgroup.kill", "freezer and pids.max", "freezer", "pids.max"])
    def test_kill_ends_a_fork_chain(self, host: CgroupHost, means: str) -> None:
        """Each of the means alone."""
        left_out = {"pids", "freezer"} - {{"pids.max": "pids"}.get(word, word) for word in means.split()}
        places = {
            name: Place(None, None, "left out") if name in left_out else place for name, place in host.places.items()
        }
        host = host._replace(places=places, kills=means == "cgroup.kill")
        group = create_group(host, GroupLimits(memory=64 * MIB), group_name(1))
        try:
            os.waitpid(start(group, fork_chain), 0)
            before = group.pids()
            assert wait_until(lambda: group.pids() not in (before, [])), "the chain does not run"
            assert group.kill()
            assert group.pids() == []
        finally:
            group.kill()  # a chain that outlives its test would never end
            assert group.remove()

    def test_kill_reaches_what_ignores_signals_or_is_stopped(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(pids=16)

        def stubborn() -> None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGSTOP)

        pid = start(group, stubborn)
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        assert group.kill()
        assert finish(pid) == -signal.SIGKILL

    def test_refused_forks_during_the_kill_are_not_the_childs(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(pids=64)
        os.waitpid(start(group, fork_chain), 0)
        assert group.kill()
        assert group.events().pids_max == 0

    @pytest.mark.alone
    def test_a_throttled_group_dies_at_once(self, new_group: Callable[..., ChildGroup]) -> None:
        group = new_group(cpus=0.02, pids=32)

        def spin() -> None:
            for _ in range(16):
                if not os.fork():
                    break
            while True:
                pass

        pid = start(group, spin)
        time.sleep(0.3)
        assert group.read_back()["cpus"].holds
        before = time.monotonic()
        assert group.kill()
        assert time.monotonic() - before < 0.2  # 0.4 s while the quota stands
        assert finish(pid) == -signal.SIGKILL

    def test_kill_touches_nobody_else(self, new_group: Callable[..., ChildGroup]) -> None:
        group, bystander = new_group(), start(None, lambda: time.sleep(20))
        pid = start(group, lambda: time.sleep(20))
        assert group.kill()
        assert finish(pid) == -signal.SIGKILL
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
        os.kill(bystander, signal.SIGKILL)
        finish(bystander)

    def test_remove_leaves_nothing_and_may_be_repeated(self, host: CgroupHost) -> None:
        before = set(os.listdir("/proc/self/fd"))
        group = create_group(host, GroupLimits(memory=64 * MIB, pids=16, cpus=1.0), group_name(1))
        hierarchies = 6 if host.kills else 7  # v2 counts CPU time, and kills
        assert len(group.attach_fds) == len(own_groups(host)) == hierarchies
        assert all(not os.get_inheritable(fd) for fd in group.attach_fds)
        group.close_attach_fds()
        group.close_attach_fds()
        assert group.remove()
        assert group.remove()
        assert own_groups(host) == []
        assert set(os.listdir("/proc/self/fd")) == before

    def test_a_group_with_a_process_in_it_is_not_gone(
        self, new_group: Callable[..., ChildGroup], host: CgroupHost
    ) -> None:
        group = new_group()
        pid = start(group, lambda: time.sleep(20))
        assert not group.remove()
        assert len(own_groups(host)) > 0
        os.kill(pid, signal.SIGKILL)
        finish(pid)
        assert group.remove()

    def test_the_parent_goes_with_the_last_group(self, host: CgroupHost, tmp_path: Path) -> None:
        base = f"{host.places['pids'].directory}/pisupervisor-test-{os.getpid()}"
        os.mkdir(base)
        try:
            first, second = directories.make(base, group_name(1)), directories.make(base, group_name(2))
            assert directories.remove(first)
            assert os.path.isdir(f"{base}/pisupervisor")
            assert directories.remove(second)
            assert not os.path.exists(f"{base}/pisupervisor")
        finally:
            os.rmdir(base)

    def test_an_interrupt_while_they_are_made_leaves_none(
        self, host: CgroupHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A handler of a signal (Ctrl-C) may raise before what was made is known to anybody."""
        make = directories.make

        def interrupted(*arguments: object) -> NoReturn:
            make(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        monkeypatch.setattr(directories, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create_group(host, GroupLimits(pids=16), group_name(1))
        assert own_groups(host) == []

    def test_many_at_once_do_not_lose_their_parent(self, host: CgroupHost) -> None:
        failures: list[BaseException] = []

        def churn(number: int) -> None:
            try:
                for count in range(40):
                    limits = GroupLimits(pids=8, cpuset=CpuSet([0]))
                    assert create_group(host, limits, group_name(number * 1000 + count)).remove()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=churn, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert own_groups(host) == []


def passed_on(group: ChildGroup, heirs: list[ChildGroup]) -> bool:
    """Waits: the stacks of the dead stay charged until the kernel gets to freeing them (up to 1.7 MB seen, for 0.1 s)."""
    return wait_until(lambda: group.pass_on(group_name(time.monotonic_ns()), heirs.append))


class TestPassedOn:
    """What another child gets, after the first has died."""

    pytestmark = real

    @pytest.fixture
    def heirs(self) -> Iterator[list[ChildGroup]]:
        heirs: list[ChildGroup] = []
        yield heirs
        for heir in heirs:
            assert heir.kill()
            assert heir.remove()

    @pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "v1 alone"])
    def test_it_is_as_good_as_new(
        self, host: CgroupHost, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup], hybrid: bool
    ) -> None:
        on = host if hybrid else host._replace(kills=False)
        group = new_group(on, memory=48 * MIB, swap=0, pids=8, cpus=0.5)
        assert run(group, lambda: touch(64 * MIB)) == -signal.SIGKILL
        assert run(group, lambda: forks(40)) == 7
        assert group.kill()  # pids.max is 0 then, and the quota is lifted
        places = group.places()
        group.close_attach_fds()
        assert passed_on(group, heirs)
        (heir,) = heirs
        assert heir.places().keys() == places.keys()
        assert [path for path in places.values() if os.path.exists(path)] == []  # the dead child's are gone
        assert heir.events() == heir.refusals() == GroupEvents()
        usage = heir.usage()
        assert usage.cpu_time == pytest.approx(0.0, abs=0.001)
        assert (usage.peak_memory or 0) < 3 * MIB
        assert all(applied.holds for applied in heir.read_back().values())
        for path in heir.places().values():
            os.utime(path, (0, 0))
        heir.open_attach_fds()
        assert min(os.stat(path).st_mtime for path in heir.places().values()) > time.time() - 60  # else others sweep it
        assert run(heir, lambda: forks(40)) == 7
        assert run(heir, lambda: touch(64 * MIB)) == -signal.SIGKILL
        assert heir.events().oom_kills == 1
        assert heir.events().pids_max >= 1
        assert 24 * MIB < (heir.usage().peak_memory or 0) <= 48 * MIB

    def test_the_old_one_is_as_if_removed(self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]) -> None:
        group = new_group(pids=8)
        group.close_attach_fds()
        assert passed_on(group, heirs)
        heirs[0].open_attach_fds()
        pid = start(heirs[0], lambda: time.sleep(20))
        assert (group.pids(), group.usage(), group.events()) == ([], GroupUsage(), GroupEvents())
        group.kill_at_once()
        assert group.kill()
        assert group.remove()
        assert heirs[0].pids() == [pid]
        assert heirs[0].kill()
        assert finish(pid) == -signal.SIGKILL

    def test_gone_it_counts_nothing(self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]) -> None:
        """Not less than nothing, though there is something that it does not count."""
        group = new_group(pids=4, memory=32 * MIB, swap=0)
        assert run(group, lambda: forks(10)) == 3
        assert run(group, lambda: touch(64 * MIB)) == -signal.SIGKILL
        group.close_attach_fds()
        assert passed_on(group, heirs)
        assert heirs[0].remove()
        assert heirs[0].refusals() == heirs[0].events() == GroupEvents()
        assert heirs[0].used() == GroupUsage()

    def test_an_interrupt_leaves_one_owner(self, new_group: Callable[..., ChildGroup]) -> None:
        """What a signal's handler raises when the heir is known already: who is asked again has still got the directories."""
        group = new_group(pids=8)
        group.close_attach_fds()
        kept: list[ChildGroup] = []

        def receive(heir: ChildGroup) -> NoReturn:
            kept.append(heir)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            group.pass_on(group_name(2), receive)
        assert kept[0].places() == {}
        kept[0].open_attach_fds()
        assert kept[0].attach_fds == ()
        assert group.places() != {}
        assert group.remove()
        assert own_groups(detect()) == []

    def test_a_limit_that_nobody_asked_for_is_none_again(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        group = new_group(memory=64 * MIB)
        assert group.kill()
        group.close_attach_fds()
        assert passed_on(group, heirs)
        heirs[0].open_attach_fds()
        assert run(heirs[0], lambda: forks(10)) == 10

    def test_not_while_somebody_lives_in_it(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        group = new_group(pids=8)
        pid = start(group, lambda: time.sleep(20))
        group.close_attach_fds()
        assert not group.pass_on(group_name(time.monotonic_ns()), heirs.append)
        assert group.pids() == [pid]
        assert group.kill()
        assert finish(pid) == -signal.SIGKILL

    def test_not_with_what_another_child_has_left_in_memory(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        group = new_group(memory=64 * MIB)
        memory = os.memfd_create("left")  # shared memory is charged to whoever wrote it first, and outlives them
        try:
            assert run(group, lambda: os.write(memory, bytes(8 * MIB)) != 8 * MIB) == 0
            group.close_attach_fds()
            assert not group.pass_on(group_name(time.monotonic_ns()), heirs.append)
        finally:
            os.close(memory)
        assert passed_on(group, heirs)

    def test_not_with_what_tcp_has_yet_to_deliver(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        """Whoever has died with data under way: v1 counts it apart from memory, up to the same limit."""
        group = new_group(memory=64 * MIB)
        with socket.create_server(("127.0.0.1", 0)) as server:

            def send_in_vain() -> None:
                for _ in range(8):
                    one = socket.create_connection(server.getsockname())
                    kept.append(one)
                    one.setblocking(False)
                    with suppress(BlockingIOError):
                        while True:
                            one.send(bytes(1 << 16))

            kept: list[socket.socket] = []
            assert run(group, send_in_vain) == 0
            group.close_attach_fds()
            assert not wait_until(lambda: group.pass_on(group_name(time.monotonic_ns()), heirs.append), 1.0)
        assert passed_on(group, heirs)

    def test_not_with_a_debt_of_cpu_time(self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]) -> None:
        """Who dies does so on credit (Linux 6.18 throttles on the way back to user space alone): the next one must not pay."""
        group = new_group(cpus=0.02)
        reader, writer = os.pipe()
        memory = os.memfd_create("freed by whoever dies")
        for _ in range(256):
            os.write(memory, bytes(MIB))

        def wait_for_the_end() -> None:
            os.close(writer)
            os.read(reader, 1)

        pid = start(group, wait_for_the_end)
        for fd in (memory, writer, reader):
            os.close(fd)
        assert finish(pid) == 0
        group.close_attach_fds()
        assert passed_on(group, heirs)
        heirs[0].open_attach_fds()
        assert run(heirs[0], lambda: 7) == 7
        assert heirs[0].events().throttled < 5

    def test_not_where_reads_of_the_dead_may_go_first(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        """What was asked for by readahead, and is throttled, keeps its place. Seen: 8 s for the heir's first 4 KB."""
        path = "/dev/loop0" if os.path.exists("/dev/loop0") else "/"
        throttled, other = new_group(io=(IoLimit(device=path, read_bps="1M"),)), new_group()
        for group in (throttled, other):
            group.close_attach_fds()
        assert not throttled.pass_on(group_name(time.monotonic_ns()), heirs.append)
        assert passed_on(other, heirs)

    def test_a_child_is_born_in_it_although_it_was_killed(
        self, new_group: Callable[..., ChildGroup], heirs: list[ChildGroup]
    ) -> None:
        group = new_group(pids=8)
        pid = start(group, lambda: time.sleep(20))
        group.kill_at_once()
        assert finish(pid) == -signal.SIGKILL
        group.close_attach_fds()
        assert passed_on(group, heirs)
        heirs[0].open_attach_fds()
        assert run(heirs[0], lambda: 7) == 7


class TestFailure:
    pytestmark = real

    def test_a_refused_limit_names_the_file_and_leaves_nothing(self, host: CgroupHost) -> None:
        with pytest.raises(LaunchError, match=r"pids\.max") as caught:
            create_group(host, GroupLimits(pids=-5), group_name(1))
        assert (caught.value.step, caught.value.errno) == ("cgroup", errno.EINVAL)
        assert own_groups(host) == []

    def test_a_base_that_went_away(self, host: CgroupHost) -> None:
        gone = host._replace(places={**host.places, "devices": Place("/sys/fs/cgroup/devices/not-there")})
        with pytest.raises(LaunchError, match="not-there") as caught:
            create_group(gone, GroupLimits(pids=8), group_name(1))
        assert caught.value.errno == errno.ENOENT
        assert "not-there" in str(caught.value.remedy)
        assert own_groups(host) == []

    def test_a_name_that_is_taken(self, new_group: Callable[..., ChildGroup], host: CgroupHost) -> None:
        name = group_name(7)
        group = create_group(host, GroupLimits(), name)
        with pytest.raises(LaunchError) as caught:
            create_group(host, GroupLimits(), name)
        assert caught.value.errno == errno.EEXIST
        assert group.pids() == []
        assert len(own_groups(host)) > 0, "the first group was removed with the second"
        assert group.remove()

    def test_where_nothing_can_be_made_the_group_is_empty(self) -> None:
        group = create_group(fake_host(mode="none"), EVERYTHING._replace(io=()), group_name(1))
        assert group.attach_fds == ()
        assert group.kill()
        assert {name for name, entry in group.read_back().items() if entry.holds} == {"devices"}
        assert group.remove()


class TestSweep:
    pytestmark = real

    @pytest.mark.alone
    def test_groups_of_dead_owners_go_and_those_of_living_ones_stay(
        self, new_group: Callable[..., ChildGroup], host: CgroupHost
    ) -> None:
        living = new_group(pids=8)
        reader, writer = os.pipe()

        def owner() -> None:
            for number in (1, 2):
                create_group(host, GroupLimits(pids=8, memory=64 * MIB), group_name(number))
            os.write(writer, b"made")
            time.sleep(20)

        pid = start(None, owner)
        assert os.read(reader, 4) == b"made"
        os.close(reader)
        os.close(writer)
        try:
            cgroups.sweep(host)
            assert len(own_groups(host, pid)) > 2
        finally:
            os.kill(pid, signal.SIGKILL)
            finish(pid)
        assert cgroups.sweep(host) >= 2
        assert own_groups(host, pid) == []
        assert run(living, lambda: 0) == 0, "the living group still takes processes"

    def test_a_reused_pid_is_no_owner_and_strange_names_stay(self, host: CgroupHost) -> None:
        base = f"{host.places['pids'].directory}/pisupervisor-test-{os.getpid()}"
        os.mkdir(base)
        try:
            reused, strange = f"{os.getpid()}-1-{directories.pid_namespace()}-1", ("something", "1-2", "a-b-c-d")
            for name in (reused, group_name(1), *strange):
                directories.make(base, name)
            assert directories.sweep(base) == {reused}
            left = [f"{base}/pisupervisor/{name}" for name in (group_name(1), *strange)]
            assert [directories.remove(path) for path in left] == [True] * 4
        finally:
            os.rmdir(base)

    def test_an_owner_whom_we_cannot_see(self, host: CgroupHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """In another pid namespace, or behind a /proc that is not ours: a group just made may be about to take a child."""
        base = f"{host.places['pids'].directory}/pisupervisor-test-{os.getpid()}"
        os.mkdir(base)
        elsewhere, dead = "1-1-1-1", f"{os.getpid()}-1-{directories.pid_namespace()}-1"
        try:
            for name in (elsewhere, dead):
                directories.make(base, name)
            pid = os.getpid()
            monkeypatch.setattr(os, "getpid", lambda: pid + 1)  # what /proc/self says is then somebody else
            assert directories.sweep(base) == set()
            monkeypatch.undo()
            assert directories.sweep(base) == {dead}
            monkeypatch.setattr(directories, "_OLD", -1.0)
            assert directories.sweep(base) == {elsewhere}
        finally:
            os.rmdir(base)


@pytest.fixture
def own_bases(host: CgroupHost) -> Iterator[dict[str, str]]:
    """Groups for the application itself to live in, so that what is delegated there is nobody else's."""
    bases = {name: f"{place.directory}/pisupervisor-test-{os.getpid()}" for name, place in host.places.items()}
    try:
        for name, base in bases.items():
            os.mkdir(base)
            for file in cgroups.inherited_files(name):
                directories.write(f"{base}/{file}", directories.read(f"{host.places[name].directory}/{file}"))
        yield bases
    finally:
        for base in bases.values():
            for path in [*Path(base, "pisupervisor").glob("*-*"), Path(base, "pisupervisor"), Path(base)]:
                if path.is_dir():
                    path.rmdir()


def as_user(bases: dict[str, str], work: Callable[[], object]) -> int:
    def enter_drop_and_work() -> object:
        for base in bases.values():
            directories.write(f"{base}/tasks", b"0")
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        return work()

    return run(None, enter_drop_and_work)


def undelegated_user() -> int:
    host = detect()
    gone = {entry.feature: entry for entry in missing(host, EVERYTHING)}
    if set(gone) != {"memory", "cpus", "cpu_weight", "cpuset", "pids", "io"} | ({"swap"} if host.swap_on else set()):
        return 11
    if not all("Permission denied" in entry.why and "chown -R 1000" in entry.remedy for entry in gone.values()):
        return 12
    return 10 if host.places["pids"].errno == errno.EACCES else 13


def delegated_user() -> int:
    """Everything but io holds, and both bombs end."""
    host = detect()
    limits = GroupLimits(memory=32 * MIB, swap=0, cpus=0.5, cpuset=CpuSet([0]), pids=8)
    if missing(host, limits):
        return 11
    group = create_group(host, limits, group_name(1))
    try:
        if not all(entry.holds for entry in group.read_back().values()):
            return 12
        if run(group, lambda: touch(64 * MIB)) != -signal.SIGKILL or run(group, lambda: forks(20)) != 7:
            return 13
    finally:
        killed, removed = group.kill(), group.remove()
    return 10 if killed and removed else 14


class TestOrdinaryUser:
    pytestmark = rootless

    def test_what_is_missing_and_why(self, own_bases: dict[str, str]) -> None:
        assert as_user(own_bases, undelegated_user) == 10

    def test_the_remedy_helps(self, own_bases: dict[str, str]) -> None:
        """Root does what the remedies say, literally; then the user can hold the limits."""
        delegated = {name: own_bases[name] for name in ("memory", "cpu", "cpuset", "pids", "cpuacct")}
        for controller, base in delegated.items():
            subprocess.run(cgroups.delegation(controller, base, 1000), shell=True, check=True)
        assert as_user(own_bases, delegated_user) == 10
        assert all(os.path.isdir(f"{base}/pisupervisor") for base in delegated.values()), "the delegation is gone"
