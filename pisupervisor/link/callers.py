"""Who calls: a thread, or another in whose place it acts."""

from __future__ import annotations

import threading
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_acting = threading.local()


def this_caller() -> int:
    """The thread's number, or the key of the call that it goes on with for somebody else."""
    return getattr(_acting, "key", 0) or threading.get_ident()


@contextmanager
def acting_for(key: int) -> Iterator[None]:
    before = getattr(_acting, "key", 0)
    _acting.key = key
    try:
        yield
    finally:
        _acting.key = before
