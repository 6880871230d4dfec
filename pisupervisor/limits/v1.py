"""A child's group on cgroup v1: one directory per hierarchy, made, limited, read, emptied and removed together."""

from __future__ import annotations

import os
import time

from pihost import syscalls
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.limits import cgroups, directories
from pisupervisor.limits.cgroups import CgroupHost, GroupEvents, GroupIo, GroupLimits, GroupUsage, Place
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.detect import CONTROLLERS
from pisupervisor.limits.signals import kill_members
from pisupervisor.limits.v1_files import FileWrite, file_writes, io_writes, weight_writes
from pisupervisor.limits.v1_readback import io_in, read_back
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.limits.cgroups import ChildGroup
    from pisupervisor.results import Applied

_POLL = 0.0005
_BUSY = 0.5  # seconds that remove() waits for exiting tasks
_CLEAN = 2 << 20  # bytes that may be left of a child in a group that another one gets; most leave 0.3 MB
_QUOTA = "cpu.cfs_quota_us"
_LIFTED = ("pids.max", _QUOTA)  # by ``kill`` and ``let_die``
_UNIFIED = "unified"  # beside the controllers: a group on the v2 hierarchy of a hybrid host, which can kill


def create(host: CgroupHost, limits: GroupLimits, name: str) -> V1Group:
    """See ``cgroups.create_group``."""
    group = V1Group(host, limits)
    try:
        _check_cpuset(host, limits.cpuset)
        writes = [*file_writes(limits, host.memsw), *io_writes(limits)]
        group.make(name)
        group.write(writes)
        group.write(list(weight_writes(limits, group.paths)))
        group.open_attach_fds()
    except OSError as error:
        group.remove()
        raise _launch_error(host, error) from error
    except BaseException:
        group.remove()
        raise
    return group


def _launch_error(host: CgroupHost, error: OSError) -> LaunchError:
    where = str(error.filename or "")
    message = f"cannot make the cgroup: {where}: {error.strerror}"
    for controller, place in host.places.items():
        if place.directory and where.startswith(place.directory + "/"):
            remedy = cgroups.enable(host, controller, Place(place.directory, error.errno))
            return LaunchError(message, step="cgroup", errno=error.errno, remedy=remedy)
    return LaunchError(
        message, step="cgroup", errno=error.errno, remedy="pisupervisor doctor tells what groups can be had"
    )


def _check_cpuset(host: CgroupHost, wanted: CpuSet | None) -> None:
    place = host.places["cpuset"]
    if wanted is None or not place.usable or place.directory is None:
        return
    present = _cpus_of(place.directory)
    outside = [cpu for cpu in wanted if cpu not in present]
    if outside:
        raise OptionsError(f"cpuset: CPUs {CpuSet(outside)} are not among those of this application ({present})")


def _cpus_of(directory: str) -> CpuSet:
    # cgroupspy costs 1.4 ms to import and 5 us a file more than os.read, so it serves off the launch path (and here,
    # which only an explicit cpuset comes through). Writes are ours: it writes through buffered files.
    from cgroupspy.controllers import CpuSetController

    return CpuSet(CpuSetController(_Directory(directory)).cpus)


class _Directory:
    """Stands in for cgroupspy's Node, which would scan the tree (and import logging) to know its own path."""

    def __init__(self, path: str) -> None:
        self.full_path = path.encode()


# --- the group -----------------------------------------------------------------------------------------------------


class _Counts(NamedTuple):
    """What cannot be set to zero, of the children that had an heir's directories before."""

    is_heir: bool = False
    events: GroupEvents = GroupEvents()
    cpu_time: float = 0.0
    io: GroupIo = GroupIo()


class V1Group:
    """A ChildGroup; see there. ``paths`` has one directory per controller that it joined, and for ``unified``."""

    def __init__(self, host: CgroupHost, limits: GroupLimits) -> None:
        self.attach_fds: tuple[int, ...] = ()
        self._paths: dict[str, str] = {}
        self._owner: list[V1Group] = [
            self
        ]  # whose the directories are: one that is passed on has it in common with its heir
        self.tolerated: set[str] = set()
        self._host = host
        self._limits = limits
        self._pids_max_before_kill: int | None = None
        self._is_lifted = False  # whether its quota or its place for processes was changed, for its end
        self._past = _Counts()  # of the children before, where it was passed on

    @property
    def paths(self) -> dict[str, str]:
        return self._paths if self._owner[0] is self else {}

    # making

    def make(self, name: str) -> None:
        """Make the directories. What was made is in ``paths``, whatever ends it: each is written down before."""
        made = set()
        for controller, base in _joined(self._host, self._limits).items():
            self.paths[controller] = directories.place(base, name)
            if base not in made:
                directories.make(base, name, self._inherited(base))
                made.add(base)

    def _inherited(self, base: str) -> tuple[str, ...]:
        return cgroups.inherited_files("cpuset") if base == self._host.places["cpuset"].directory else ()

    def write(self, writes: list[FileWrite]) -> None:
        """Write the limits into the directories that there are. Raises OSError."""
        for controller, file, values, tolerated in writes:
            if controller in self.paths:
                try:
                    directories.write(f"{self.paths[controller]}/{file}", *values)
                except OSError as error:
                    if error.errno not in tolerated:
                        raise
                    self.tolerated.add(file)

    def open_attach_fds(self) -> None:
        """Open the v2 group for clone3, and then the ``tasks`` file of each other directory. Raises OSError."""
        unified = self.paths.get(_UNIFIED)
        if unified is not None:
            self.attach_fds += (os.open(unified, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),)
        for path in dict.fromkeys(self.paths.values()):
            if self._past.is_heir:
                os.utime(path)  # it is as new: others sweep what has been empty for a minute
            if path != unified:
                self.attach_fds += (os.open(f"{path}/tasks", os.O_WRONLY | os.O_CLOEXEC),)

    @property
    def clone_flags(self) -> int:
        # A process that writes itself into cgroup.procs waits 5 to 19 ms for an RCU grace period; a task into tasks does not.
        return syscalls.CLONE_INTO_CGROUP if _UNIFIED in self.paths else 0

    def places(self) -> dict[str, str]:
        return {"" if controller == _UNIFIED else controller: path for controller, path in self.paths.items()}

    def close_attach_fds(self) -> None:
        fds, self.attach_fds = self.attach_fds, ()
        for fd in fds:
            os.close(fd)

    # reading

    def pids(self) -> list[int]:
        # The child enters the first directory first, so it has every member of the others too.
        first = next(iter(self.paths), "")
        pids = [int(pid) for pid in self._lines(first, "cgroup.procs")]
        return [pid for pid in pids if pid]  # 0: a process outside our own pid namespace

    def events(self) -> GroupEvents:
        from cgroupspy.controllers import CpuController, MemoryController

        cpu, memory = self._spy("cpu", CpuController), self._spy("memory", MemoryController)
        try:
            stat = cpu.stat if cpu else {}
            return GroupEvents(
                oom_kills=memory.oom_control.get("oom_kill", 0) if memory else 0,
                pids_max=self._pids_max(),
                throttled=stat.get("nr_throttled", 0),
                throttled_time=stat.get("throttled_time", 0) / 1e9,
            ).since(self._past.events)
        except OSError:
            return GroupEvents()  # removed meanwhile

    def refusals(self) -> GroupEvents:
        kills = self._counts("memory", "memory.oom_control").get(b"oom_kill", 0)
        return GroupEvents(oom_kills=kills, pids_max=self._pids_max()).since(self._past.events)

    def _spy(self, controller: str, kind: Any) -> Any:
        return kind(_Directory(self.paths[controller])) if controller in self.paths else None

    def _pids_max(self) -> int:
        if self._pids_max_before_kill is not None:
            return self._pids_max_before_kill
        return self._counts("pids", "pids.events").get(b"max", 0)

    def used(self) -> GroupUsage:
        # By os.read: this is read around calls, and cgroupspy would take twice as long (11 us a file against 6).
        return GroupUsage(self._cpu_time(), peak_memory=self._integer("memory", "memory.max_usage_in_bytes"))

    def usage(self) -> GroupUsage:
        memory, pids = self._integer("memory", "memory.usage_in_bytes"), self._integer("pids", "pids.current")
        return self.used()._replace(memory=memory, pids=pids)

    def _cpu_time(self) -> float | None:
        if _UNIFIED in self.paths:
            microseconds = self._counts(_UNIFIED, "cpu.stat").get(b"usage_usec")
            seconds = None if microseconds is None else microseconds / 1e6
        else:
            nanoseconds = self._integer("cpuacct", "cpuacct.usage")
            seconds = None if nanoseconds is None else nanoseconds / 1e9
        return None if seconds is None else seconds - self._past.cpu_time

    def io(self) -> GroupIo | None:
        if "blkio" not in self.paths:
            return None
        io = io_in(self._lines("blkio", "blkio.throttle.io_service_bytes"))
        return GroupIo(io.read_bytes - self._past.io.read_bytes, io.write_bytes - self._past.io.write_bytes)

    def _integer(self, controller: str, file: str) -> int | None:
        lines = self._lines(controller, file)
        return int(lines[0]) if lines else None

    def _counts(self, controller: str, file: str) -> dict[bytes, int]:
        """The file's lines ``name number``."""
        return {name: int(count) for name, count in map(bytes.split, self._lines(controller, file))}

    def _lines(self, controller: str, file: str) -> list[bytes]:
        path = self.paths.get(controller)
        try:
            return directories.read(f"{path}/{file}").splitlines() if path else []
        except OSError:
            return []  # removed meanwhile (ENOENT or ENODEV)

    def pressure(self) -> dict[str, float]:
        return {}  # of v2 groups alone

    def read_back(self) -> dict[str, Applied]:
        return read_back(self._host, self._limits, self.paths, self.tolerated)

    def freezer(self) -> None:
        return None  # what the v1 freezer holds ignores SIGKILL

    # ending

    def kill_at_once(self) -> None:
        self._write_if_there(_UNIFIED, "cgroup.kill", b"1")

    def kill(self, timeout: float = 5.0) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            self.kill_at_once()
            self._stop_forks()
            if not self.pids():
                return True
            kill_members(self.pids)
            self.let_die()
            if time.monotonic() >= deadline:
                return not self.pids()
            time.sleep(_POLL)

    def _stop_forks(self) -> None:
        """A chain of forks outruns any list of pids: it is frozen, where it cannot be killed at once. Frozen processes of
        v1 do not die before they are thawed; pids.max=0 holds until then.
        """
        self._is_lifted = True
        if "pids" in self.paths:
            if self._pids_max_before_kill is None:
                self._pids_max_before_kill = self._pids_max()  # refused forks from here on are our own doing
            self._write_if_there("pids", "pids.max", b"0")
        self._write_if_there("freezer", "freezer.state", b"FROZEN")

    def let_die(self) -> None:
        """Dying takes CPU time too: at 0.02 cores, 20 spinning processes took 400 ms to die, without a quota 6 ms."""
        self._is_lifted = True
        self._write_if_there("cpu", _QUOTA, b"-1")
        self._write_if_there("freezer", "freezer.state", b"THAWED")

    def _write_if_there(self, controller: str, file: str, value: bytes) -> None:
        path = self.paths.get(controller)
        if path:
            try:
                directories.write(f"{path}/{file}", value)
            except OSError:
                pass  # removed meanwhile; what this was to bring about is checked by pids()

    def pass_on(self, name: str, receive: Callable[[ChildGroup], object]) -> bool:
        if self._limits.io:
            return False  # what the dead has yet to read (readahead) goes before what its heir reads: 8 s for 1 MB
        # A removed memory group lives on in the kernel as long as a page is charged to it: one more reason.
        if not self.paths or self.attach_fds or self._left() > _CLEAN or self.pids():
            return False
        heir = V1Group(self._host, self._limits)
        heir._owner, heir.tolerated = self._owner, self.tolerated
        try:
            self._renew()
            heir._past = self._counted()
            heir._paths = self._renamed(name)
        except OSError:
            return False
        receive(heir)
        self._owner[0] = heir  # at one stroke: what a signal's handler raises finds one owner, not two or none
        return True

    def _left(self) -> int:
        """Bytes that the next child could not have: what was swapped out too, and what TCP has yet to deliver for the dead, which
        v1 counts apart (seen: all that the limit allows).
        """
        memory = "memory.memsw.usage_in_bytes" if self._host.memsw else "memory.usage_in_bytes"
        return sum(self._integer("memory", file) or 0 for file in (memory, "memory.kmem.tcp.usage_in_bytes"))

    def _renew(self) -> None:
        """Set back what the end of a child has left, which ``remove`` does not mind. Raises OSError."""
        # Written again, the quota forgives what was used on credit: else the next child pays that.
        renewed: tuple[str, ...] = (_QUOTA,)
        if self._is_lifted:
            self._write_if_there("freezer", "freezer.state", b"THAWED")
            self._write_if_there("pids", "pids.max", b"max")
            renewed = _LIFTED
            self._is_lifted, self._pids_max_before_kill = False, None
        self.write([write for write in file_writes(self._limits, self._host.memsw) if write.file in renewed])
        if "memory" in self.paths:
            directories.write(f"{self.paths['memory']}/memory.max_usage_in_bytes", b"0")

    def _renamed(self, name: str) -> dict[str, str]:
        """Give the directories another name, which v1 can. Raises OSError; ``remove`` then finds them by either name."""
        new = {controller: f"{os.path.dirname(path)}/{name}" for controller, path in self._paths.items()}
        # A dict: some controllers have a directory in common.
        pairs = dict(zip(self._paths.values(), new.values(), strict=True))
        unified = self._paths.get(_UNIFIED)
        self._paths = {**self._paths, **{f"new {controller}": path for controller, path in new.items()}}
        for old, path in pairs.items():
            if old == unified:
                # v2 does not rename. Nor would it serve: whoever is born (clone3) in a group that was ever killed
                # (cgroup.kill) dies at once, measured with Linux 6.18.
                os.rmdir(old)
                os.mkdir(path)
            else:
                os.rename(old, path)
        return new

    def _counted(self) -> _Counts:
        """All that was counted in the directories that the heir gets. That of v2, which counts CPU time, is a new one."""
        now = V1Group(self._host, self._limits)
        now._paths = self.paths
        cpu = now._counts("cpu", "cpu.stat")
        throttled, throttled_time = cpu.get(b"nr_throttled", 0), cpu.get(b"throttled_time", 0) / 1e9
        events = now.refusals()._replace(throttled=throttled, throttled_time=throttled_time)
        cpu_time = 0.0 if _UNIFIED in self.paths else now._cpu_time() or 0.0
        return _Counts(True, events, cpu_time, now.io() or GroupIo())

    def remove(self) -> bool:
        self.close_attach_fds()
        if not self.pids():
            self.let_die()  # tasks past their exit may still be throttled, and keep the directory busy
        deadline = time.monotonic() + _BUSY  # for all directories together
        paths = set(self.paths.values())
        left = {path for path in paths if not directories.remove(path, deadline - time.monotonic())}
        if self._owner[0] is self:
            self._paths = {controller: path for controller, path in self._paths.items() if path in left}
        return not left


def _joined(host: CgroupHost, limits: GroupLimits) -> dict[str, str]:
    """Controller -> base, for those that limit, count (pids, memory, cpuacct, blkio) or help to kill; pids goes first."""
    unified = host.unified if host.kills else None
    wanted = {
        "pids": True,
        "memory": True,
        "cpuacct": unified is None,  # each v2 group counts CPU time
        "cpu": limits.cpus is not None or limits.cpu_weight is not None,
        "cpuset": limits.cpuset is not None,
        "devices": limits.devices,
        "blkio": True,
        "freezer": unified is None,
    }
    bases = ((name, host.places[name]) for name in CONTROLLERS if wanted[name])
    joined = {name: place.directory for name, place in bases if place.usable and place.directory}
    return {**joined, _UNIFIED: unified} if unified else joined
