"""The launch as a list of verbs, one per step. A step that fails ends the launch and is named to the host.

The order is the point, and each place in it has a reason:
* fds first: nothing of the zygote (other children's links) outlives the fork.
* the group is joined before the first page of work is charged; its namespace is entered after that, so that the
  group is the root of what /proc/self/cgroup shows.
* ids before mounts: what we create is owned by the child. Capabilities stay, because id 0 is not mapped inside, and
  so changing ids is no "leaving root" for the kernel (user_namespaces(7)).
* the death signal after the ids: setresuid clears it (measured: 9 -> 0).
* the bounding set before the capabilities are gone: dropping it needs CAP_SETPCAP.
* Landlock after the last mount (with file rules every mount is EPERM), seccomp last of all. It is loaded once, before
  the fork of the payload (0.2 ms saved): PID 1 has the same filter. A profile must therefore let fork pass.
"""

from __future__ import annotations

import os
import resource
import select
import time

from pihost import mounts, syscalls
from pihost.plan import ChildPlan
from pihost.root import StepFailed, write_proc

if False:  # typing costs 5 ms, and only a type checker reads this
    from collections.abc import Callable, Sequence
    from typing import Any

    Step = tuple[str, Callable[[ChildPlan, "Fds", Any], None]]

LINK = 3  # the only fd besides stdio that a payload has
SIGKILL = 9


class Fds:
    """What a new child holds: its link to the host, the way to report, the lifelines, where output goes (see
    ``ChildPlan.output``), the groups to join.
    """

    def __init__(
        self, link: int, status: int, go: int, host: int, zygote: int, output: list[int], cgroups: list[int]
    ) -> None:
        self.link, self.status, self.go = link, status, go
        self.host, self.zygote, self.output, self.cgroups = host, zygote, output, cgroups
        self.root: list[int] = []  # what PID 1 keeps open: see ``leave_mount_table``

    def all(self) -> list[int]:
        return sorted([self.link, self.status, self.go, self.host, self.zygote, *self.output, *self.cgroups])

    def stderr(self) -> list[int]:
        """What PID 1 keeps: the file for the end of stderr, and where to read it. Empty where the host reads it."""
        return self.output[:2] if len(self.output) == 3 else []


def run(
    steps: Sequence[Step], plan: ChildPlan, fds: Fds, kernel: Any = syscalls, log: Callable[[str], None] | None = None
) -> None:
    """Do ``steps`` in order. Raises StepFailed with the name of the first that fails."""
    for name, act in steps:
        if name in plan.without:
            continue
        if log is not None:
            log(f"step {name}")
        try:
            act(plan, fds, kernel)
        except (OSError, ValueError) as error:
            raise StepFailed(name, error) from error


def close_inherited(_plan: ChildPlan, fds: Fds, kernel: Any) -> None:
    kept = [2, *fds.all(), syscalls.LAST_FD + 1]
    for low, high in zip(kept, kept[1:]):  # noqa: RUF007  itertools.pairwise is of 3.10
        if low + 1 < high:
            kernel.close_range(low + 1, high - 1)


def join_cgroup(plan: ChildPlan, fds: Fds, _kernel: Any) -> None:
    # Writing one's own "0" costs 50 us; a pid written from outside waits 5 to 19 ms for an RCU grace period.
    for fd in fds.cgroups[bool(plan.namespaces & syscalls.CLONE_INTO_CGROUP) :]:  # it was born in the first
        os.write(fd, b"0")
    for fd in fds.cgroups:
        os.close(fd)


def await_id_maps(_plan: ChildPlan, fds: Fds, _kernel: Any) -> None:
    if os.read(fds.go, 1) != b"1":
        raise OSError(3, "the zygote gave up", "id maps")
    os.close(fds.go)


def change_ids(plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    kernel.set_ids(plan.uid, plan.gid)
    kernel.set_dumpable(True)  # changing ids cleared it, and /proc/self would belong to nobody we know


def arm_death_signal(_plan: ChildPlan, fds: Fds, kernel: Any) -> None:
    kernel.set_death_signal(SIGKILL)
    poll = select.poll()
    for fd in (fds.host, fds.zygote):
        poll.register(fd, select.POLLIN)
    if poll.poll(0):  # getppid() says 0 across pid namespaces, so ask the pidfds whether it came too late
        raise OSError(3, "the host or the zygote is gone", "lifeline")


def mount_own(plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    for entry in mounts.read(plan.mounts):
        entry.execute("", kernel)


def leave_mount_table(_plan: ChildPlan, fds: Fds, kernel: Any) -> None:
    """A detached copy of "/" becomes "/": mountinfo lists what can be reached of one's mount namespace, now nothing. No
    user namespace can be made from there. PID 1 keeps it open: Linux 7.3 takes its mounts apart with the last descriptor.
    """
    fds.root = [kernel.open_tree("/")]
    os.fchdir(fds.root[0])
    os.chroot(".")


def enter_time_namespace(_plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    """The payload's clocks since boot start at zero: without offsets a time namespace changes nothing."""
    kernel.unshare(syscalls.CLONE_NEWTIME)
    monotonic = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    boottime = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    write_proc("self", "timens_offsets", f"monotonic -{monotonic} 0\nboottime -{boottime} 0\n")


def redirect_stdio(_plan: ChildPlan, fds: Fds, _kernel: Any) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stdout = fds.output[0] if len(fds.output) == 2 else os.dup(null)
    for fd, target in ((null, 0), (stdout, 1), (fds.output[-1], 2)):
        os.dup2(fd, target)
        os.close(fd)


def set_rlimits(plan: ChildPlan, _fds: Fds, _kernel: Any) -> None:
    for number, soft, hard in plan.rlimits:
        resource.setrlimit(number, (soft, hard))
    if plan.nice:
        os.setpriority(os.PRIO_PROCESS, 0, plan.nice)
    os.umask(0o077)


def drop_bounding_set(_plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    kernel.drop_bounding_set()
    kernel.lock_securebits()


def restrict_with_landlock(plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    if not plan.landlock_abi:
        return
    ruleset = kernel.landlock_ruleset(plan.landlock_abi, plan.landlock_fs, plan.landlock_net, plan.landlock_scopes)
    for path, access in plan.landlock:
        kernel.landlock_allow(ruleset, path, access)
    kernel.landlock_restrict(ruleset, quiet=plan.landlock_abi >= 7)  # a child could fill the machine's audit log
    os.close(ruleset)


def lead_session(_plan: ChildPlan, _fds: Fds, kernel: Any) -> None:
    os.setsid()
    kernel.set_dumpable(True)  # PID 1 is not; the payload's own /proc/self must be its own


def keep_link_only(_plan: ChildPlan, fds: Fds, _kernel: Any) -> None:
    # One by one: a profile that refuses close_range would leave them open without a word (CPython 3.11 ignores it),
    # and os.close raises. Nothing else is open: "close fds" saw to that.
    link = os.dup(fds.link)
    for fd in (fds.link, fds.status, fds.host, fds.zygote, *fds.stderr(), *fds.root):
        os.close(fd)
    if link != LINK:
        os.dup2(link, LINK, False)  # what the payload starts shall not have it
        os.close(link)


#: what PID 1 does before it forks the payload, which inherits all of it
BEFORE_FORK = (
    ("close fds", close_inherited),
    ("join cgroup", join_cgroup),
    ("id maps", await_id_maps),
    ("cgroup namespace", lambda _plan, _fds, kernel: kernel.unshare(syscalls.CLONE_NEWCGROUP)),
    ("ids", change_ids),
    ("death signal", arm_death_signal),
    ("mounts", mount_own),
    ("mount table", leave_mount_table),
    ("time namespace", enter_time_namespace),
    ("hostname", lambda plan, _fds, kernel: kernel.sethostname(plan.hostname)),
    ("stdio", redirect_stdio),
    ("rlimits", set_rlimits),
    ("bounding set", drop_bounding_set),
    ("capabilities", lambda _plan, _fds, kernel: kernel.drop_capabilities()),
    ("no_new_privs", lambda _plan, _fds, kernel: kernel.set_no_new_privs()),
    ("landlock", restrict_with_landlock),
)
#: what the payload does by itself, behind the filter already
PAYLOAD = (("session", lead_session), ("payload fds", keep_link_only))
