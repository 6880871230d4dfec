"""Finds out, by doing, where on this machine we can make groups and why not elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from pihost.mounts import unescaped
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.limits import directories
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Mode = Literal["v1", "hybrid", "v2", "none"]

CONTROLLERS = ("pids", "memory", "cpu", "cpuacct", "cpuset", "devices", "blkio", "freezer")

IsDir = Callable[[str], bool]


class Place(NamedTuple):
    """Where groups of one controller would go. ``errno`` and ``why`` say what is in the way; both empty: nothing.

    ``directory`` is the supervisor's own group, None where the controller is not there at all. ``remedy``: what helps,
    where more is known than ``errno`` tells.
    """

    directory: str | None
    errno: int | None = None
    why: str = ""
    remedy: str = ""

    @property
    def usable(self) -> bool:
        """Whether groups can be made here."""
        return not self.why


class CgroupHost(NamedTuple):
    """What this machine offers to this process: one Place per controller, and facts about swap.

    ``memsw``: memory groups can limit swap; ``swap_on``: the host has swap; ``uid``: who asked. ``unified``: our own
    group on the v2 hierarchy, which has ``cgroup.freeze`` on hybrid hosts too; None: there is none, no group can be made
    in it, or (mode "v2") children have their own there. ``kills``: its groups have ``cgroup.kill`` (Linux 5.14), and a
    child may enter them. ``how``: by what right there are groups, in words; v2 only. ``scope``: where the process was put
    that children are born from, if it was; they are for its children alone, and another one has to be put there anew.
    """

    mode: Mode
    places: Mapping[str, Place]
    memsw: bool
    swap_on: bool
    uid: int
    unified: str | None = None
    kills: bool = False
    how: str = ""
    scope: str = ""

    def directories(self) -> list[str]:
        """The distinct directories in which groups can be made (co-mounted controllers share one)."""
        usable = [place.directory for place in self.places.values() if place.directory and place.usable]
        return list(dict.fromkeys([*usable, *([self.unified] if self.unified else [])]))


class Probe(NamedTuple):
    """What came of trying to make a group: the error, if any, and the files that it had."""

    error: OSError | None
    files: frozenset[str] = frozenset()


def detect(member: int | None = None, group: str | None = None) -> CgroupHost:
    """Look at this machine, making and removing one empty group per hierarchy (about 1 ms).

    ``member``: the process from which children will be born. On v2, where this process has no group of its own, systemd
    is asked to give that one a scope. ``group``: use this v2 group and no other. Raises OptionsError for that on v1.
    """
    _check_proc()
    cgroup, mountinfo = directories.text("/proc/self/cgroup"), directories.text("/proc/self/mountinfo")
    mode, found = find_groups(cgroup, mountinfo)
    name = directories.group_name(time.monotonic_ns())  # once: it reads our own /proc/PID/stat, 50 us
    if mode == "v2":
        from pisupervisor.limits import delegation

        return delegation.detect(cgroup, mountinfo, name, _has_swap(), member=member, given=group)
    if group is not None:
        raise OptionsError(f"cgroup: {group} would be used on cgroup v2 alone; the controllers of this host are on v1")
    host = describe_host(mode, found, _has_swap(), lambda base: probe_group(base, name), os.geteuid())
    unified = find_unified(cgroup, mountinfo)
    if unified is None or (probe := probe_group(unified, name)).error is not None:
        return host
    # To move from our own group into one below it takes the right to write here (cgroups(7), delegation).
    enterable = os.access(f"{unified}/cgroup.procs", os.W_OK)
    return host._replace(unified=unified, kills=enterable and "cgroup.kill" in probe.files)


def _check_proc() -> None:
    """Its numbers must be ours: id maps are written there by pid. Raises LaunchError."""
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            return
        why = "/proc shows another pid namespace than that of this process"
    except OSError as error:
        why = f"/proc/self: {error.strerror}"
    raise LaunchError(why, step="launch", remedy="as root here: mount -t proc proc /proc (unshare: --mount-proc)")


def describe_host(
    mode: Mode, found: Mapping[str, str], swap_on: bool, probe: Callable[[str], Probe], uid: int
) -> CgroupHost:
    """Turn the directories of ``find_groups`` into a CgroupHost by probing each distinct one once."""
    probes = {directory: probe(directory) for directory in dict.fromkeys(found.values())}
    places = {controller: _describe_place(controller, mode, found, probes) for controller in CONTROLLERS}
    memsw = "memory" in found and "memory.memsw.limit_in_bytes" in probes[found["memory"]].files
    return CgroupHost(mode=mode, places=places, memsw=memsw, swap_on=swap_on, uid=uid)


def _describe_place(controller: str, mode: Mode, found: Mapping[str, str], probes: Mapping[str, Probe]) -> Place:
    if controller not in found:
        return Place(None, None, f"there is no cgroup {'v1 ' if mode != 'none' else ''}{controller} hierarchy")
    directory = found[controller]
    error = probes[directory].error
    if error is not None:
        return Place(directory, error.errno, f"cannot make a group in {directory}: {error.strerror}")
    if controller == "devices" and "devices.deny" not in probes[directory].files:
        return Place(directory, None, "denying devices takes CAP_SYS_ADMIN")
    return Place(directory)


def find_groups(cgroup: str, mountinfo: str, is_dir: IsDir = os.path.isdir) -> tuple[Mode, dict[str, str]]:
    """The hierarchy mode, and the directory of the own v1 group per controller, from the text of the two /proc files.

    Where the own group lies outside what a container's mount shows, the mount's top is used instead.
    """
    own = _own_paths(cgroup)
    found: dict[str, str] = {}
    unified = False
    for root, mount, kind, options in _cgroup_mounts(mountinfo):
        unified |= kind == "cgroup2"
        for controller in set(options) & set(CONTROLLERS) & set(own) if kind == "cgroup" else ():
            found.setdefault(controller, _own_directory(mount, root, own[controller], is_dir))
    if found:
        return ("hybrid" if unified else "v1"), found
    only_v2 = "" in own and not set(own) & set(CONTROLLERS)  # mounted or not
    return ("v2" if unified or only_v2 else "none"), found


def find_unified(cgroup: str, mountinfo: str) -> str | None:
    """The directory of the own group on the v2 hierarchy, from the text of the two /proc files."""
    own = next((line[3:] for line in cgroup.split("\n") if line.startswith("0::")), None)
    mounts = [(root, mount) for root, mount, kind, _options in _cgroup_mounts(mountinfo) if kind == "cgroup2"]
    return _own_directory(mounts[0][1], mounts[0][0], own, os.path.isdir) if mounts and own is not None else None


def _own_paths(cgroup: str) -> dict[str, str]:
    """``"4:cpu,cpuacct:/user.slice"`` -> {"cpu": "/user.slice", "cpuacct": "/user.slice"}."""
    lines = (line.split(":", 2) for line in cgroup.split("\n"))
    return {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}


def _cgroup_mounts(mountinfo: str) -> list[tuple[str, str, str, list[str]]]:
    """(root, mount point, "cgroup" or "cgroup2", super options) of each cgroup mount; proc(5) describes the lines."""
    mounts = []
    for line in mountinfo.split("\n"):
        fields, _, tail = line.partition(" - ")
        kind, _, rest = tail.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            root, mount = fields.split(" ")[3:5]
            mounts.append((unescaped(root), unescaped(mount), kind, rest.split(" ")[-1].split(",")))
    return mounts


def _own_directory(mount: str, root: str, own: str, is_dir: IsDir) -> str:
    top = root.rstrip("/")
    if own == root or own.startswith(top + "/"):
        directory = (mount + own[len(top) :]).rstrip("/")
        if ".." not in own.split("/") and is_dir(directory):
            return directory
    return mount


def probe_group(base: str, name: str) -> Probe:
    """Make the group ``name`` below ``base``, look at its files, try a write that takes more than file rights, remove it."""
    try:
        path = directories.make(base, name)
    except OSError as error:
        return Probe(error)
    try:
        files = set(os.listdir(path))
        if "devices.deny" in files and not _can_deny(path):
            files.remove("devices.deny")
        return Probe(None, frozenset(files))
    finally:
        directories.remove(path)


def _can_deny(path: str) -> bool:
    try:
        directories.write(f"{path}/devices.deny", b"a")
    except OSError:
        return False
    return True


def _has_swap() -> bool:
    try:
        return directories.read("/proc/swaps").count(b"\n") > 1  # the first line is the heading
    except OSError:
        return True  # unknown: do not promise that there is none
