"""What came with which kernel, and what is done on an older one. For people: what can be had is tried, never looked up here.

``docs/platforms.md`` shows the same table (a test holds them together), and ``doctor`` what of it a kernel is too old for.
"""

from __future__ import annotations

from pisupervisor.limits.rlimits import at_least
from pisupervisor.records import NamedTuple


class Since(NamedTuple):
    """``version``: the first Linux that has it; ``fallback``: what an older one gets instead."""

    what: str
    version: str
    fallback: str


TABLE = (
    Since("`memory.oom.group`", "4.19", "(every kernel that serves has it)"),
    Since("time namespaces", "5.6", '`degrade=("time",)`'),
    Since("clone3 into a cgroup, pidfds that can be waited for", "5.7", "nothing works; run a newer kernel"),
    Since("`close_range`, `/proc` with `subset=pid`", "5.9", "nothing works; run a newer kernel"),
    Since("overlay mounts in a user namespace", "5.11", "what needs them says so; see `frozen=` and `overlay=`"),
    Since(
        "`mount_setattr`", "5.12", "the flags of each bind are set mount by mount, before anybody runs (same result)"
    ),
    Since("Landlock for files", "5.13", '`degrade=("landlock",)`; namespaces and the private root hold without it'),
    Since("`cgroup.kill`", "5.14", "the group is frozen, and each process is killed, until it is empty"),
    Since("`RLIMIT_NPROC` counted per user namespace", "5.14", "without groups `pids` is watched alone, but for root"),
    Since("`memory.peak`", "5.19", "on v2 the group's peak is not told"),
    Since("who is born in a group is bound to its CPUs", "6.4", "the host binds each process before it runs user code"),
    Since("Landlock for TCP", "6.7", "the network namespace holds"),
    Since("Landlock for abstract sockets and signals", "6.12", "the network and pid namespaces hold"),
    Since(
        "sockets that take no descriptors", "6.16", "the host lets go of what comes; the profiles refuse `SO_LINGER`"
    ),
)


def too_old_for(release: str) -> list[Since]:
    """The entries that came after this kernel, by its ``uname -r``. Distributions may have brought some of them back."""
    return [entry for entry in TABLE if not at_least(release, *map(int, entry.version.split(".")))]
