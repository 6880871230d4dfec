"""The per-process limits that a child carries beside its group: setrlimit triples, computed by the host."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Collection, Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.options import Limits

STACK = 8 << 20
SIGPENDING = 256

Rlimit = tuple[int, int, int]
"""(resource number, soft, hard), as setrlimit takes them; -1 is no limit."""


def host_hard_limit(number: int) -> int:
    """This process's own hard limit for the resource; -1 when there is none."""
    return resource.getrlimit(number)[1]


def stand_ins(limits: Limits, missing: Collection[str], kernel: str, root: bool) -> dict[str, tuple[Rlimit, str]]:
    """What takes the place of the groups' limits that are ``missing``, by name, and what it is in words. Pure.

    RLIMIT_NPROC counts a user id: a child of root's has one of its own, and since Linux 5.14 each user namespace is
    counted apart.
    """
    found = {}
    if "memory" in missing and limits.memory is not None:
        size = int(limits.memory)
        found["memory"] = (
            (resource.RLIMIT_DATA, size, size),
            "each process may have that much of its own (RLIMIT_DATA)",
        )
    if "pids" in missing and limits.pids is not None and (root or at_least(kernel, 5, 14)):
        found["pids"] = (
            (resource.RLIMIT_NPROC, limits.pids, limits.pids),
            "the child's user id may have as many (RLIMIT_NPROC)",
        )
    return found


def at_least(kernel: str, *version: int) -> bool:
    """Whether a release such as "6.1.0-56-cloud-amd64" is of this version or newer."""
    numbers = kernel.partition("-")[0].split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdigit()) >= version


def rlimit_plan(
    limits: Limits, hard_limit: Callable[[int], int] = host_hard_limit, extra: Iterable[Rlimit] = ()
) -> list[Rlimit]:
    """What the child sets on itself before its capabilities go, never above the host's own hard limits.

    ``extra``: of ``stand_ins``. Elsewhere processes are not counted here, but by the pids group.
    """
    plan = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),  # POSIX queues live in kernel memory
        (resource.RLIMIT_SIGPENDING, SIGPENDING, SIGPENDING),
        (resource.RLIMIT_NICE, 0, 0),
        (resource.RLIMIT_RTPRIO, 0, 0),
        (resource.RLIMIT_STACK, STACK, STACK),
        *_asked(limits),
        *extra,
    ]
    return [
        (number, _least(soft, most), _least(hard, most)) for number, soft, hard in plan for most in [hard_limit(number)]
    ]


def _asked(limits: Limits) -> list[Rlimit]:
    plan = []
    if limits.open_files is not None:
        plan.append((resource.RLIMIT_NOFILE, limits.open_files, limits.open_files))
    if limits.file_size is not None:
        plan.append((resource.RLIMIT_FSIZE, int(limits.file_size), int(limits.file_size)))
    if limits.cpu_time is not None:
        seconds = math.ceil(limits.cpu_time)  # whole seconds are all the kernel takes: SIGXCPU, then SIGKILL
        plan.append((resource.RLIMIT_CPU, seconds, seconds + 1))
    return plan


def _least(value: int, most: int) -> int:
    return value if most == resource.RLIM_INFINITY else min(value, most)
