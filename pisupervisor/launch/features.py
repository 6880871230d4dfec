"""What this host can do, found out by doing, once."""

from __future__ import annotations

import os

from pihost import syscalls
from pisupervisor.limits.cgroups import CgroupHost, detect
from pisupervisor.records import dataclass

#: the protection's name -> the kernel's word in /proc/PID/ns
NAMESPACE_LINKS = {
    "user": "user", "mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts",
    "cgroup": "cgroup", "time": "time",
}  # fmt: skip
NAMESPACES = tuple(NAMESPACE_LINKS.values())


@dataclass(frozen=True, kw_only=True)
class Features:
    """``root`` means uid 0 here; ``namespaces`` are the kinds that the kernel has; Landlock's version, 0 for none."""

    root: bool
    uid: int
    gid: int
    kernel: str
    namespaces: frozenset[str]
    landlock_abi: int
    cgroups: CgroupHost


def probe(member: int | None = None, group: str | os.PathLike[str] | None = None) -> Features:
    """Ask the kernel. Costs under a millisecond; callers keep the answer for as long as their zygote lives, whose pid is
    ``member``; ``group`` is the one that the caller wants used (see ``limits.detect``).
    """
    return Features(
        root=os.geteuid() == 0,
        uid=os.geteuid(),
        gid=os.getegid(),
        kernel=os.uname().release,
        namespaces=frozenset(name for name in NAMESPACES if os.path.exists(f"/proc/self/ns/{name}")),
        landlock_abi=syscalls.landlock_abi(),
        cgroups=detect(member, None if group is None else os.fspath(group)),
    )
