"""A child's group on cgroup v2: one directory. The child is born in it (CLONE_INTO_CGROUP: no attach to wait for)."""

from __future__ import annotations

import os
import time

from pihost import syscalls
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.limits import delegation, directories
from pisupervisor.limits.cgroups import CgroupHost, GroupEvents, GroupIo, GroupLimits, GroupUsage
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.freezer import GroupFreezer
from pisupervisor.limits.signals import kill_members
from pisupervisor.limits.v2_files import FileWrite, file_writes, io_writes, weight_writes
from pisupervisor.limits.v2_readback import read_back

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.limits.cgroups import ChildGroup
    from pisupervisor.results import Applied

_POLL = 0.0005
_BUSY = 0.5  # seconds that remove() waits for exiting tasks


def create(host: CgroupHost, limits: GroupLimits, name: str) -> V2Group:
    """See ``cgroups.create_group``."""
    (base,) = host.directories()
    group = V2Group(host, limits)
    try:
        _check_cpuset(host, limits.cpuset)
        group.make(base, name)
        group.write([*file_writes(limits, host.memsw), *io_writes(limits), *weight_writes(limits, group.path)])
        group.open_attach_fds()
    except OSError as error:
        group.remove()
        message = f"cannot make the cgroup: {error.filename or base}: {error.strerror}"
        remedy = delegation.refusal_remedy(error) or "pisupervisor doctor tells what this group can give"
        raise LaunchError(message, step="cgroup", errno=error.errno, remedy=remedy) from error
    except BaseException:
        group.remove()
        raise
    return group


def _check_cpuset(host: CgroupHost, wanted: CpuSet | None) -> None:
    place = host.places["cpuset"]
    if wanted is None or not place.usable or place.directory is None:
        return
    present = CpuSet.parse(directories.read(f"{place.directory}/cpuset.cpus.effective").strip().decode())
    outside = [cpu for cpu in wanted if cpu not in present]
    if outside:  # v2 would take them without a word
        raise OptionsError(f"cpuset: CPUs {CpuSet(outside)} are not among those of this application ({present})")


def some_pressure(text: bytes) -> float:
    """``some avg10=12.50 avg60=...`` -> 0.125: the share of ten seconds in which some process waited. Pure."""
    line = next(line for line in text.decode().splitlines() if line.startswith("some "))
    return float(dict(word.split("=") for word in line.split()[1:])["avg10"]) / 100


class V2Group:
    """A ChildGroup; see there. ``path`` is its directory, empty until it is made and when it is gone."""

    clone_flags = syscalls.CLONE_INTO_CGROUP

    def __init__(self, host: CgroupHost, limits: GroupLimits) -> None:
        self.attach_fds: tuple[int, ...] = ()
        self.path = ""
        self._host = host
        self._limits = limits

    # making

    def make(self, base: str, name: str) -> None:
        """Make the directory. Raises OSError."""
        self.path = directories.place(base, name)  # before: an exception of a signal's handler leaves nothing
        delegation.make_group(base, name)

    def write(self, writes: list[FileWrite]) -> None:
        """Write the limits whose controller is there. Raises OSError."""
        for controller, file, value in writes:
            if self._host.places[controller].usable:
                directories.write(f"{self.path}/{file}", value)

    def open_attach_fds(self) -> None:
        """Open what clone3 takes. Raises OSError."""
        self.attach_fds = (os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),)

    def places(self) -> dict[str, str]:
        return {"": self.path}

    def close_attach_fds(self) -> None:
        fds, self.attach_fds = self.attach_fds, ()
        for fd in fds:
            os.close(fd)

    # reading

    def _read(self, file: str) -> bytes:
        """Empty where the file is not there: another kernel, no such controller, or the group was removed meanwhile."""
        try:
            return directories.read(f"{self.path}/{file}") if self.path else b""
        except OSError:
            return b""

    def _counts(self, file: str) -> dict[bytes, int]:
        """The file's lines ``name number``."""
        lines = (line.split() for line in self._read(file).splitlines())
        return {line[0]: int(line[1]) for line in lines if len(line) == 2}

    def _integer(self, file: str) -> int | None:
        text = self._read(file).strip()
        return int(text) if text.isdigit() else None

    def pids(self) -> list[int]:
        pids = [int(pid) for pid in self._read("cgroup.procs").split()]
        return [pid for pid in pids if pid]  # 0: a process outside our own pid namespace

    def events(self) -> GroupEvents:
        memory, cpu = self._counts("memory.events"), self._counts("cpu.stat")
        return GroupEvents(
            oom_kills=memory.get(b"oom_kill", 0),
            pids_max=self._counts("pids.events").get(b"max", 0),
            throttled=cpu.get(b"nr_throttled", 0),
            throttled_time=cpu.get(b"throttled_usec", 0) / 1e6,
            memory_high=memory.get(b"high", 0),
        )

    def refusals(self) -> GroupEvents:
        memory, pids = self._counts("memory.events"), self._counts("pids.events")
        return GroupEvents(oom_kills=memory.get(b"oom_kill", 0), pids_max=pids.get(b"max", 0))

    def used(self) -> GroupUsage:
        cpu_time = self._counts("cpu.stat").get(b"usage_usec")  # counted without the cpu controller too
        peak = self._integer("memory.peak")  # Linux 5.19
        return GroupUsage(None if cpu_time is None else cpu_time / 1e6, peak_memory=peak)

    def usage(self) -> GroupUsage:
        return self.used()._replace(memory=self._integer("memory.current"), pids=self._integer("pids.current"))

    def io(self) -> GroupIo | None:
        if not self._host.places["io"].usable:
            return None
        words = [word.split(b"=") for word in self._read("io.stat").split() if b"=" in word]
        sums = {kind: sum(int(count) for name, count in words if name == kind) for kind in (b"rbytes", b"wbytes")}
        return GroupIo(read_bytes=sums[b"rbytes"], write_bytes=sums[b"wbytes"])

    def pressure(self) -> dict[str, float]:
        texts = {name: self._read(f"{name}.pressure") for name in ("cpu", "memory", "io")}
        return {f"{name}_pressure": some_pressure(text) for name, text in texts.items() if text}

    def read_back(self) -> dict[str, Applied]:
        if self._limits.cpuset is not None:
            self._bind_members(self._limits.cpuset)
        return read_back(self._host, self._limits, self.path)

    def _bind_members(self, cpuset: CpuSet) -> None:
        """Before Linux 6.4 (and the fixes to older ones: 5.10 has none) a process that is born in a group runs on all the
        CPUs of its parent until it asks for others: only then is it held to the group's.
        """
        for pid in self.pids():
            try:
                if not os.sched_getaffinity(pid) <= set(cpuset):
                    os.sched_setaffinity(pid, cpuset)
            except ProcessLookupError:
                continue

    def freezer(self) -> GroupFreezer:
        # PID 1 stops with the rest and cannot hear its lifeline. But the zygote dies with the host, PID 1 has asked to
        # be killed with the zygote, and a process that v2 has frozen dies of SIGKILL.
        return GroupFreezer(self.path)

    # ending

    def kill_at_once(self) -> None:
        self._write_if_there("cgroup.kill", b"1")

    def kill(self, timeout: float = 5.0) -> bool:
        deadline = time.monotonic() + timeout
        while self._is_populated():
            if not self._write_if_there("cgroup.kill", b"1"):
                self._kill_one_by_one()
            self.let_die()
            if time.monotonic() >= deadline:
                return not self._is_populated()
            time.sleep(_POLL)
        return True

    def _is_populated(self) -> bool:
        return b"populated 1" in self._read("cgroup.events")

    def _kill_one_by_one(self) -> None:
        """Linux before 5.14. Frozen processes cannot outrun a list of pids, and on v2 they die of SIGKILL."""
        self._write_if_there("cgroup.freeze", b"1")
        kill_members(self.pids)
        self._write_if_there("cgroup.freeze", b"0")

    def let_die(self) -> None:
        self._write_if_there("cpu.max", b"max")

    def _write_if_there(self, file: str, value: bytes) -> bool:
        try:
            directories.write(f"{self.path}/{file}", value)
        except OSError:
            return False  # removed meanwhile, or another kernel
        return True

    def pass_on(self, name: str, receive: Callable[[ChildGroup], object]) -> bool:  # noqa: ARG002
        return False  # nothing sets memory.peak back, before Linux 6.12; and a single directory costs little

    def remove(self) -> bool:
        self.close_attach_fds()
        if self.path and not self.pids():
            self.let_die()  # tasks past their exit may still be throttled, and keep the directory busy
        if self.path and not directories.remove(self.path, _BUSY):
            return False
        self.path = ""
        return True
