"""Signals to the members of a group, one by one: for kernels and hierarchies without ``cgroup.kill`` and ``cgroup.freeze``."""

from __future__ import annotations

import _signal as signal  # signal imports enum for names that nobody needs here
import os
from collections.abc import Callable, Sequence

_BATCH = 256  # pidfds held open at once


def kill_members(members: Callable[[], list[int]]) -> None:
    """One round over what ``members`` tells. Who forks faster than that must have been stopped before."""
    send(members(), members, signal.SIGKILL)


def send(pids: Sequence[int], members: Callable[[], list[int]], number: int) -> None:
    """To those of ``pids`` that are still among the members when their pidfds are open: a pid may have been reused."""
    for start in range(0, len(pids), _BATCH):
        _send(pids[start : start + _BATCH], members, number)


def _send(pids: Sequence[int], members: Callable[[], list[int]], number: int) -> None:
    fds: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                fds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                pass
        for pid in set(members()) & fds.keys():
            try:
                signal.pidfd_send_signal(fds[pid], number)
            except (ProcessLookupError, PermissionError):
                pass  # dead already; or not ours, which shows when the group does not empty, or does not stop
    finally:
        for fd in fds.values():
            os.close(fd)
