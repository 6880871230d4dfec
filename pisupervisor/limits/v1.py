"""A child's group on cgroup v1: one directory per hierarchy, made, limited, read, emptied and removed together."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from errno import EINVAL
from typing import TYPE_CHECKING, Any

from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.limits import cgroups, directories
from pisupervisor.limits.cgroups import CgroupHost, GroupEvents, GroupLimits, GroupUsage
from pisupervisor.limits.cpuset import CpuSet

if TYPE_CHECKING:
    from pisupervisor.options import IoLimit
    from pisupervisor.results import Applied

PERIOD = 100_000  # us; what every new group has
_SHARES = 10.24  # cpu.shares per unit of weight: the defaults are 1024 and 100
_DEVICES = ("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)  # character devices of major 1
_PID_BATCH = 256  # pidfds held open at once
_POLL = 0.0005


def create(host: CgroupHost, limits: GroupLimits, name: str) -> V1Group:
    """See ``cgroups.create_group``. Measured here for memory, cpu, cpuacct, pids and devices: see tests/test_limits.py."""
    writes = file_writes(host, limits)
    group = V1Group(host, limits)
    try:
        group.make(name)
        group.write_limits(writes)
        group.open_attach_fds()
    except OSError as error:
        group.remove()
        raise _launch_error(host, error) from error
    except BaseException:
        group.remove()
        raise
    return group
