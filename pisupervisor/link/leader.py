"""Leader and followers: of several threads that wait on one link, one reads for all. Pure; whoever acts on it holds a lock."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable


class Leader:
    """Callers come (``may_read``, as often as they like) and go (``leave``, once, whatever happened to them)."""

    def __init__(self) -> None:
        self.reader: Hashable | None = None
        self._waiting: dict[Hashable, None] = {}  # in the order of their coming

    def may_read(self, caller: Hashable) -> bool:
        """Whether it is this caller who reads, from now on until it leaves. If not, it is to wait until it is woken."""
        if self.reader is None:
            self.reader = caller
            self._waiting.pop(caller, None)
        if self.reader != caller:
            self._waiting[caller] = None
        return self.reader == caller

    def leave(self, caller: Hashable) -> Hashable | None:
        """It waits for nothing any more. Who is to be woken, so that somebody reads: also where the one who was woken
        last goes without having read.
        """
        self._waiting.pop(caller, None)
        if self.reader == caller:
            self.reader = None
        return next(iter(self._waiting), None) if self.reader is None else None
