"""What an application may have been given, and no child is to inherit: to go before others, and to be spared when memory
runs out. Being behind others is kept.
"""

from __future__ import annotations

import os

from pihost import syscalls
from pisupervisor.errors import LaunchError

_NORMAL = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


def shed(pid: int) -> None:
    """Of that process, a zygote which has no children yet. Raises LaunchError."""
    step = "scheduling policy"
    try:
        if os.sched_getscheduler(pid) not in _NORMAL:  # on v1 its children could enter no cpu group either (EINVAL)
            os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        step = "nice"
        if os.getpriority(os.PRIO_PROCESS, pid) < 0:
            os.setpriority(os.PRIO_PROCESS, pid, 0)
        step = "I/O class"
        syscalls.leave_realtime_io(pid)
        step = "oom_score_adj"
        _be_killable(f"/proc/{pid}/oom_score_adj")
    except (ProcessLookupError, FileNotFoundError):
        pass  # it has ended, and the first launch will say why
    except OSError as error:
        why = f"the zygote keeps the application's: {error.strerror}"
        remedy = "start the application without it (chrt, nice, ionice; OOMScoreAdjust= of its unit), or as root"
        raise LaunchError(why, step=step, errno=error.errno, remedy=remedy) from error


def _be_killable(path: str) -> None:
    """At -1000 (systemd: OOMScoreAdjust=) nobody is killed for memory (proc(5)), at a group's limit neither."""
    with open(path, "rb", buffering=0) as file:
        spared = int(file.read()) < 0
    if spared:  # else nothing is written: in a child of another isolator Landlock refuses even to open it so
        with open(path, "wb", buffering=0) as file:
            file.write(b"0")
