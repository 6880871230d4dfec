"""What every kind of cgroup offers the supervisor, whichever hierarchy it stands on.

``detect`` looks at the host once; ``missing`` says what cannot hold there and what to do about it; ``create_group``
makes the group of one child with all limits written. The child enters by itself: it writes ``0`` to each of
``attach_fds`` (46 to 77 us), because a pid written from outside stalls 5 to 19 ms on a quiet machine. On v2 it is born
in its group, whose directory is then the one attach fd.
"""

from __future__ import annotations

from pisupervisor.limits import directories
from pisupervisor.limits.detect import CgroupHost, Place, detect
from pisupervisor.limits.directories import group_name
from pisupervisor.records import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.limits.cpuset import CpuSet
    from pisupervisor.limits.freezer import Freezer
    from pisupervisor.options import IoLimit, Limits
    from pisupervisor.results import Applied

__all__ = [
    "CgroupHost", "ChildGroup", "GroupEvents", "GroupIo", "GroupLimits", "GroupUsage", "Missing", "Place",
    "create_group", "detect", "group_name", "missing", "remedy", "sweep", "wanted_limits",
]  # fmt: skip


class GroupLimits(NamedTuple):
    """What a group is asked to hold; None or empty: nothing. Sizes in bytes, ``cpus`` in cores, weight 1..10000."""

    memory: int | None = None
    memory_high: int | None = None
    swap: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpuset: CpuSet | None = None
    pids: int | None = None
    io: tuple[IoLimit, ...] = ()
    io_weight: int | None = None
    devices: bool = True


class GroupEvents(NamedTuple):
    """How often a limit was reached since the group was made. ``throttled_time`` is in seconds, ``memory_high`` 0 on v1."""

    oom_kills: int = 0
    pids_max: int = 0
    throttled: int = 0
    throttled_time: float = 0.0
    memory_high: int = 0

    def since(self, before: GroupEvents) -> GroupEvents:
        """The same, less what was counted before; nothing is less than 0, for a group that is gone counts nothing."""
        return GroupEvents(
            oom_kills=max(0, self.oom_kills - before.oom_kills),
            pids_max=max(0, self.pids_max - before.pids_max),
            throttled=max(0, self.throttled - before.throttled),
            throttled_time=max(0.0, self.throttled_time - before.throttled_time),
            memory_high=max(0, self.memory_high - before.memory_high),
        )


class GroupUsage(NamedTuple):
    """What the group's processes, dead ones included, have used: seconds, bytes, count. None: nobody counts it."""

    cpu_time: float | None = None
    memory: int | None = None
    peak_memory: int | None = None
    pids: int | None = None


class GroupIo(NamedTuple):
    """Bytes that the group's processes, dead ones included, had read from and written to block devices."""

    read_bytes: int = 0
    write_bytes: int = 0


class Missing(NamedTuple):
    """A protection (a name of ``options.PROTECTIONS``) that cannot hold here, why, and exactly what helps (``fix``)."""

    feature: str
    why: str
    fix: str

    @property
    def remedy(self) -> str:
        """The fix, or how to do without."""
        return f'{self.fix}; or do without it: IsolationOptions(degrade=("{self.feature}",))'


class ChildGroup(Protocol):
    """The group of one child and of everything that it starts."""

    attach_fds: tuple[int, ...]
    """Open ``tasks`` files, to each of which the child writes ``b"0"`` in this order, while single-threaded. With
    ``clone_flags`` the first is the directory of the v2 group that it is born in.
    """

    def open_attach_fds(self) -> None:
        """Open them, which making a group does, again for one that was passed on. Raises OSError."""

    @property
    def clone_flags(self) -> int:
        """CLONE_INTO_CGROUP where the first attach fd is the directory of a v2 group; else 0."""

    def places(self) -> dict[str, str]:
        """Its directories by controller, as /proc/PID/cgroup names them: "" on v2."""

    def close_attach_fds(self) -> None:
        """Close them in this process; again is harmless."""

    def pids(self) -> list[int]:
        """The member processes as this process numbers them; empty when the group is gone."""

    def events(self) -> GroupEvents:
        """Counters of reached limits. Read them before ``remove``; zeros afterwards."""

    def refusals(self) -> GroupEvents:
        """Of the counters only ``oom_kills`` and ``pids_max``; cheap (15 us)."""

    def used(self) -> GroupUsage:
        """CPU time and peak memory so far; cheap (20 us). Read it before ``remove``."""

    def usage(self) -> GroupUsage:
        """The same, and what there is now."""

    def io(self) -> GroupIo | None:
        """What reached block devices. None: nobody counts it. v1 counts buffered writes for nobody, v2 for the writer."""

    def pressure(self) -> dict[str, float]:
        """Fields of ``Usage``: ``cpu_pressure``, ``memory_pressure``, ``io_pressure``; empty where nobody measures them."""

    def read_back(self) -> dict[str, Applied]:
        """What the kernel's files say now of each protection that was asked for."""

    def freezer(self) -> Freezer | None:
        """What pauses the whole group, PID 1 of the sandbox too; None where the group cannot."""

    def kill_at_once(self) -> None:
        """SIGKILL to all members in one write, where the kernel has that (``cgroup.kill``); else nothing happens."""

    def kill(self, timeout: float = 5.0) -> bool:
        """SIGKILL every member until the group is empty; False if ``timeout`` seconds did not suffice."""

    def let_die(self) -> None:
        """Lift the CPU quota: its members are killed, and dying takes CPU time too."""

    def remove(self) -> bool:
        """Close the fds and remove the directories; True when all is gone. Again is harmless."""

    def pass_on(self, name: str, receive: Callable[[ChildGroup], object]) -> bool:
        """Of a dead child: ``receive`` gets the same directories, by that name, as a group for another one, which counts from
        zero; this one is then as if removed. False where that would not be as good as a new one.
        """


def wanted_limits(limits: Limits) -> GroupLimits:
    """The part of ``Limits`` that cgroups hold. Denying devices is always wanted."""
    return GroupLimits(
        memory=_bytes(limits.memory),
        memory_high=_bytes(limits.memory_high),
        swap=_bytes(limits.swap),
        cpus=limits.cpus,
        cpu_weight=limits.cpu_weight,
        cpuset=limits.cpuset if not isinstance(limits.cpuset, str) else None,
        pids=limits.pids,
        io=tuple(limits.io),
        io_weight=limits.io_weight,
    )


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else int(size)  # Limits has parsed its strings already


def create_group(host: CgroupHost, limits: GroupLimits, name: str) -> ChildGroup:
    """Make the group ``name`` (see ``group_name``) with every limit that this host can hold, and open its attach fds.

    What cannot be held here at all is left out: ``missing`` tells it beforehand. Raises LaunchError(step="cgroup")
    when the kernel refuses something, OptionsError for CPUs or devices that are not there; nothing is left then.
    """
    if host.mode == "v2":  # the kind of hierarchy is known only at run time
        from pisupervisor.limits import v2

        return v2.create(host, limits, name)
    from pisupervisor.limits import v1

    return v1.create(host, limits, name)


def sweep(host: CgroupHost) -> int:
    """Remove the empty groups that dead supervisors left; those of living ones stay. Returns how many groups went."""
    return len(set().union(*(directories.sweep(base) for base in host.directories())))


# --- what cannot hold, and what to do ------------------------------------------------------------------------------


def missing(host: CgroupHost, wanted: GroupLimits) -> list[Missing]:
    """The protections in ``wanted`` that cannot hold on ``host``, each with its reason and remedy. Pure, but that
    ``io_weight`` looks at what schedules the disks.

    ``devices`` is never among them: a child in a user namespace with nodev mounts opens no device either way.
    """
    asked = {
        "memory": wanted.memory,
        "cpus": wanted.cpus,
        "cpu_weight": wanted.cpu_weight,
        "cpuset": wanted.cpuset,
        "pids": wanted.pids,
        "io": wanted.io or None,
        "io_weight": wanted.io_weight,
    }
    gone = [
        Missing(feature, place.why, remedy(host, feature))
        for feature, value in asked.items()
        if value is not None and not (place := place_of(host, feature)).usable
    ]
    return gone + _missing_memory_high(host, wanted) + _missing_swap(host, wanted) + _missing_io_weight(host, wanted)


def place_of(host: CgroupHost, feature: str) -> Place:
    """Where the groups that hold this protection go. Not for ``devices``, which v2 has no controller for."""
    return host.places[controller_of(host, feature)]


def controller_of(host: CgroupHost, feature: str) -> str:
    """The kernel's word for what holds this protection."""
    return "io" if host.mode == "v2" and feature in ("io", "io_weight") else CONTROLLER_OF[feature]


#: The v1 controller that holds each protection. On v2 only that of ``io`` and ``io_weight`` has another name.
CONTROLLER_OF = {
    "memory": "memory", "swap": "memory", "cpus": "cpu", "cpu_weight": "cpu", "cpuset": "cpuset", "pids": "pids",
    "io": "blkio", "io_weight": "blkio", "devices": "devices",
}  # fmt: skip


def _missing_memory_high(host: CgroupHost, wanted: GroupLimits) -> list[Missing]:
    if wanted.memory_high is None or host.mode == "v2":  # there it is one with memory
        return []
    why = "memory_high needs cgroup v2; a v1 memory group has no such threshold"
    return [Missing("memory", why, "leave memory_high out and rely on memory")]


def _missing_swap(host: CgroupHost, wanted: GroupLimits) -> list[Missing]:
    if wanted.swap is None or not host.swap_on:
        return []  # no swap on the host: none can be used
    place = place_of(host, "swap")
    if not place.usable:
        return [Missing("swap", place.why, f"{remedy(host, 'swap')}; or turn it off on the host: swapoff -a")]
    if not host.memsw:
        fix = "boot with swapaccount=1, or turn swap off on the host: swapoff -a"
        return [Missing("swap", "this kernel does not account swap to groups", fix)]
    if wanted.memory is None and host.mode != "v2":
        why = "cgroup v1 limits memory and swap together only"
        return [Missing("swap", why, "give a memory limit too")]
    return []


def _missing_io_weight(host: CgroupHost, wanted: GroupLimits) -> list[Missing]:
    if wanted.io_weight is None or not place_of(host, "io_weight").usable:
        return []  # not asked for; or told already
    from pisupervisor.limits import io_weight  # few ask for it

    why = io_weight.why_none(io_weight.weighing_disks(host.mode))
    return [Missing("io_weight", why, io_weight.REMEDY)] if why else []


def remedy(host: CgroupHost, feature: str) -> str:
    """What to do so that ``feature`` can hold on ``host``: exact commands, as one line."""
    return enable(host, controller_of(host, feature), place_of(host, feature))


def enable(host: CgroupHost, controller: str, place: Place) -> str:
    """The command or step that removes ``place.errno``, or a missing hierarchy, for ``controller``."""
    from errno import EACCES, EPERM, EROFS

    if place.directory is None and directories.is_childs():
        return "in the child of another isolator no groups are to be had: that one's limits hold for all that is started here"
    if place.remedy:
        return place.remedy
    if place.directory is None:
        mount = f"/sys/fs/cgroup/{controller}"
        return f"as root, mount it: mkdir -p {mount} && mount -t cgroup -o {controller} cgroup {mount}"
    if place.errno == EROFS:
        from pisupervisor.limits.delegation import mount_of  # to explain a failure

        rights = f" && {delegation(controller, place.directory, host.uid)}" if host.uid else ""
        above = mount_of(place.directory)
        mount = place.directory if above == "/" else above  # nothing else can be mounted anew
        return (
            f"as root with CAP_SYS_ADMIN: mount -o remount,bind,rw {mount}{rights} (docker or podman run"
            " --cap-add SYS_ADMIN; or --privileged, which mounts it so; examples/deploy/entrypoint does it, and becomes an"
            " ordinary user)"
        )
    if place.errno in (EACCES, EPERM):
        way = "run as root" if host.uid else "leave this root CAP_DAC_OVERRIDE"
        return f"{way}; or delegate, as root: {delegation(controller, place.directory, host.uid)}"
    return f"make sure that {place.directory} exists and takes new groups (pisupervisor doctor tells more)"


def delegation(controller: str, base: str, uid: int) -> str:
    """The shell command with which root lets ``uid`` make its groups below ``base``."""
    parent = f"{base}/{directories.PARENT}"
    fill = "".join(f" && cat {base}/{file} > {parent}/{file}" for file in inherited_files(controller))
    return f"mkdir -p {parent}{fill} && chown -R {uid} {parent}"


def inherited_files(controller: str) -> tuple[str, ...]:
    """Files that a new group starts with empty and cannot be used without; the parent's values are copied."""
    return ("cpuset.cpus", "cpuset.mems") if controller == "cpuset" else ()
