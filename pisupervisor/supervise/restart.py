"""Whether and when a dead child is replaced: a pure function over times (restart intensity, as in OTP's supervisors)."""

from __future__ import annotations

from collections.abc import Sequence

from pisupervisor.options import RestartPolicy
from pisupervisor.results import ExitInfo, ExitReason

#: ends that the supervisor ordered itself: they are no crash of the child
ORDERED = frozenset((ExitReason.TIMEOUT, ExitReason.KILLED))


def is_crash(info: ExitInfo, *, in_call: bool = False) -> bool:
    """Whether nobody wanted this end. In the middle of a call that is so whatever the exit code says."""
    return not was_ordered(info) and (in_call or info.reason is not ExitReason.EXITED or info.exit_code != 0)


def was_ordered(info: ExitInfo) -> bool:
    return info.ordered or info.reason in ORDERED


def decide(policy: RestartPolicy, crashes: Sequence[float], now: float) -> float | None:
    """Seconds to wait before the next start, None to give up. ``crashes``: monotonic times of past crashes, ascending.

    The wait counts from the last crash: a caller who comes later than that waits for nothing.
    """
    recent = [when for when in crashes if now - when < policy.within]
    if len(recent) > policy.max_restarts:
        return None
    if not recent:
        return 0.0
    delay = min(policy.max_backoff, policy.backoff * 2.0 ** (len(recent) - 1))
    return max(0.0, recent[-1] + delay - now)


def permits(policy: RestartPolicy, info: ExitInfo, *, crashed: bool) -> bool:
    """Whether the policy's mode starts a new child after this end. What the supervisor ordered is always made good."""
    if policy.mode == "never":
        return False
    return policy.mode == "always" or crashed or was_ordered(info)


class Crashes:
    """An isolator's last crashes, as many as its policy needs to know, each with a number of its own."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._known: list[tuple[int, float]] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, now: float) -> int:
        """The new crash's number."""
        self._last += 1
        self._known = [*self._known, (self._last, now)][-self._policy.max_restarts - 1 :]
        return self._last

    def forgive(self, number: int) -> None:
        """That one does not count."""
        self._known = [entry for entry in self._known if entry[0] != number]

    def clear(self) -> None:
        self._known = []

    def delay(self, now: float) -> float | None:
        """See ``decide``."""
        return decide(self._policy, [when for _number, when in self._known], now)
