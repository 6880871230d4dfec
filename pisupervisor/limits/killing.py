"""SIGKILL to every member of a group, one by one: for kernels and hierarchies without ``cgroup.kill``."""

from __future__ import annotations

import _signal as signal  # signal imports enum for names that nobody needs here
import os
from collections.abc import Callable

_BATCH = 256  # pidfds held open at once


def kill_members(members: Callable[[], list[int]]) -> None:
    """One round over what ``members`` tells. Who forks faster than that must have been stopped before."""
    pids = members()
    for start in range(0, len(pids), _BATCH):
        _kill(pids[start : start + _BATCH], members)


def _kill(pids: list[int], members: Callable[[], list[int]]) -> None:
    fds: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                fds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                pass
        for pid in set(members()) & fds.keys():  # asked again: a pid may have been reused before its pidfd was open
            _send(fds[pid])
    finally:
        for fd in fds.values():
            os.close(fd)


def _send(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # dead already; or not ours to kill, which shows when the group does not empty
