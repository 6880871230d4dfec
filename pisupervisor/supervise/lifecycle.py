"""The life of an isolator: one table, (state, event) -> state. An unlisted pair is a bug that says so. Pure.

``child_died`` and ``launch_failed``: another will be started by the policy; ``ended``: none will, until somebody asks.
``stop`` is an end that was ordered. After ``close`` nothing is an event any more.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    State = Literal["starting", "ready", "busy", "paused", "stopping", "backoff", "stopped", "failed"]
    Event = Literal[
        "launched", "launch_failed", "call", "answered", "pause", "resume_idle", "resume_busy", "stop", "child_died", "ended",
        "restart", "gave_up", "close",
    ]  # fmt: skip

TABLE: dict[tuple[State, Event], State] = {
    ("starting", "launched"): "ready",
    ("starting", "launch_failed"): "backoff",
    ("starting", "ended"): "stopped",
    ("starting", "stop"): "stopping",
    ("starting", "close"): "stopped",
    ("ready", "call"): "busy",
    ("ready", "pause"): "paused",
    ("ready", "stop"): "stopping",
    ("ready", "child_died"): "backoff",
    ("ready", "ended"): "stopped",
    ("ready", "close"): "stopped",
    ("busy", "answered"): "ready",
    ("busy", "pause"): "paused",
    ("busy", "stop"): "stopping",
    ("busy", "child_died"): "backoff",
    ("busy", "ended"): "stopped",
    ("busy", "close"): "stopped",
    ("paused", "call"): "paused",
    ("paused", "answered"): "paused",
    ("paused", "resume_idle"): "ready",
    ("paused", "resume_busy"): "busy",
    ("paused", "stop"): "stopping",
    ("paused", "child_died"): "backoff",
    ("paused", "ended"): "stopped",
    ("paused", "close"): "stopped",
    ("stopping", "call"): "stopping",
    ("stopping", "answered"): "stopping",
    ("stopping", "stop"): "stopping",
    ("stopping", "launch_failed"): "stopped",
    ("stopping", "child_died"): "stopped",
    ("stopping", "ended"): "stopped",
    ("stopping", "close"): "stopped",
    ("backoff", "answered"): "backoff",
    ("backoff", "restart"): "starting",
    ("backoff", "gave_up"): "failed",
    ("backoff", "stop"): "stopped",
    ("backoff", "close"): "stopped",
    ("stopped", "answered"): "stopped",
    ("stopped", "restart"): "starting",
    ("stopped", "gave_up"): "failed",
    ("stopped", "stop"): "stopped",
    ("stopped", "close"): "stopped",
    ("failed", "restart"): "starting",
    ("failed", "gave_up"): "failed",
    ("failed", "stop"): "failed",
    ("failed", "close"): "stopped",
}


def next_state(state: State, event: Event) -> State:
    """Raises RuntimeError for a pair that cannot happen: that is a defect of this library, not of its caller."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise RuntimeError(f"an isolator that is {state!r} cannot see {event!r}: please report this") from None
