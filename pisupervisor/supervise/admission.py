"""Who may use a child now: so many calls at once, of those that capture their output one; or one that wants it alone. Pure."""

from __future__ import annotations

from collections import deque

from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    Use = Literal["plain", "captured", "alone"]


class Ticket(NamedTuple):
    """Somebody who waits: ``key`` is the caller, ``wake`` is called when it has got what it waits for."""

    key: int
    use: Use
    wake: Callable[[], object]


class Admission:
    """First come, first served; but a plain call passes a captured one that waits for another captured one."""

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self.users: dict[int, Use] = {}
        self._captured = 0
        self.waiting: deque[Ticket] = deque()
        self.rising: deque[Ticket] = deque()  # plain users that wait to make a captured call within theirs

    def enter(self, key: int, use: Use) -> bool:
        """Whether it may begin at once."""
        if not self._fits(use) or (self.waiting and not self._may_pass(use)):
            return False
        self._admit(key, use)
        return True

    def wait(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)

    def give_up(self, ticket: Ticket) -> list[Ticket]:
        """It waits no longer, or has just got its turn and does not want it. Who may begin instead."""
        for queue in (self.waiting, self.rising):
            if ticket in queue:
                queue.remove(ticket)
                return self._next()
        return self.leave(ticket.key)

    def leave(self, key: int) -> list[Ticket]:
        """Who may begin now."""
        if self.users.pop(key) == "captured":
            self._captured -= 1
        return self._next() if self.waiting or self.rising else []

    def rise(self, key: int) -> bool:
        """Whether a plain user may begin a captured call at once, within its own."""
        if self._captured:
            return False
        self._admit(key, "captured")
        return True

    def sink(self, key: int) -> list[Ticket]:
        """That one is over. Who may begin now."""
        self.users[key] = "plain"
        self._captured -= 1
        return self._next()

    def _fits(self, use: Use) -> bool:
        if not self.users:
            return True
        if use == "alone" or "alone" in self.users.values():
            return False
        return len(self.users) < self._slots and not (use == "captured" and (self._captured or self.rising))

    def _may_pass(self, use: Use) -> bool:
        """Whether all who wait do so for what this one does not."""
        return use == "plain" and self._captured > 0 and all(ticket.use == "captured" for ticket in self.waiting)

    def _admit(self, key: int, use: Use) -> None:
        self.users[key] = use
        self._captured += use == "captured"

    def _next(self) -> list[Ticket]:
        admitted = []
        if self.rising and not self._captured:  # before all others: it has a place that these may wait for
            admitted.append(self.rising.popleft())
            self._admit(admitted[0].key, "captured")
        for ticket in tuple(self.waiting):
            if self._fits(ticket.use):
                self.waiting.remove(ticket)
                self._admit(ticket.key, ticket.use)
                admitted.append(ticket)
            elif ticket.use != "captured" or len(self.users) >= self._slots:
                break  # nobody overtakes it
        return admitted
