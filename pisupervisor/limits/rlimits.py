"""The per-process limits that a child carries beside its group: setrlimit triples, computed by the host."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable

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


def rlimit_plan(limits: Limits, hard_limit: Callable[[int], int] = host_hard_limit) -> list[Rlimit]:
    """What the child sets on itself before its capabilities go, never above the host's own hard limits.

    Processes are not counted here: RLIMIT_NPROC counts a whole user id, the pids group counts the child.
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
