"""What tests do without on this machine, as an application would there, by ``degrade``: Landlock on an old kernel (before
5.13); and the tests of the bed, where this process may make no groups, the limits that need one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import features
import pytest

from pisupervisor import IsolationOptions

LIMITS = ("memory", "swap", "cpus", "pids")
_now: tuple[str, ...] = ()


def adapt() -> None:
    """From now on all options leave out what the present test does without, but where it switches that off by name."""
    global _now
    _now = ("landlock",) if features.missing("landlock") else ()
    check = IsolationOptions.__post_init__

    def check_adapted(options: IsolationOptions) -> None:
        own = options.__dict__
        if isinstance(own["degrade"], (tuple, list)):
            own["degrade"] = (*own["degrade"], *(name for name in _now if name not in own["degrade"]))
        check(options)

    IsolationOptions.__post_init__ = check_adapted  # type: ignore[method-assign]


def of_the_bed(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in ("bed", "matrix"))


def needed(item: pytest.Item, marker: str) -> tuple[str, ...]:
    """The features that one of its markers asks for."""
    return tuple("children" if name == "limits" and of_the_bed(item) else name for name in features.MARKERS[marker])


@contextmanager
def what(item: pytest.Item) -> Iterator[None]:
    """What this test does without, while it runs."""
    without_limits = of_the_bed(item) and features.missing("limits") and not features.missing("children")
    with only(*_now, *(LIMITS if without_limits else ())):
        yield


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Nothing but that."""
    global _now
    before, _now = _now, names
    try:
        yield
    finally:
        _now = before
