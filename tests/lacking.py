"""What tests do without on this machine, as an application would there, by ``degrade``: Landlock on an old kernel (before
5.13), and the limits that need a group where this process may make none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import features

from pisupervisor import IsolationOptions

LIMITS = ("memory", "swap", "cpus", "pids")
_is_off = False


def adapt() -> None:
    """From now on all options leave out what this machine lacks, but where a test switches that off by name."""
    lacking = (
        *(("landlock",) if features.missing("landlock") else ()),
        *(LIMITS if features.missing("limits") and not features.missing("children") else ()),
    )
    if not lacking:
        return
    check = IsolationOptions.__post_init__

    def check_adapted(options: IsolationOptions) -> None:
        own = options.__dict__
        if isinstance(own["degrade"], (tuple, list)) and not _is_off:
            own["degrade"] = (*own["degrade"], *(name for name in lacking if name not in own["degrade"]))
        check(options)

    IsolationOptions.__post_init__ = check_adapted  # type: ignore[method-assign]


@contextmanager
def nothing() -> Iterator[None]:
    """Options are as they were written."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False
