"""The life of an isolator: one table, (state, event) -> state. An unlisted pair is a bug that says so. Pure."""

from __future__ import annotations

from typing import Literal

State = Literal["starting", "ready", "busy", "paused", "stopping", "backoff", "stopped", "failed"]
Event = Literal["launched", "launch_failed", "call", "answered", "child_died", "restart", "gave_up", "close"]

TABLE: dict[tuple[State, Event], State] = {
    ("starting", "launched"): "ready",
    ("starting", "launch_failed"): "backoff",
    ("starting", "close"): "stopped",
    ("ready", "call"): "busy",
    ("ready", "child_died"): "backoff",
    ("ready", "close"): "stopped",
    ("busy", "answered"): "ready",
    ("busy", "child_died"): "backoff",
    ("busy", "close"): "stopped",
    ("backoff", "restart"): "starting",
    ("backoff", "gave_up"): "failed",
    ("backoff", "close"): "stopped",
    ("failed", "gave_up"): "failed",
    ("failed", "close"): "stopped",
    ("failed", "restart"): "starting",
    ("stopped", "close"): "stopped",
    ("stopped", "call"): "stopped",
    ("stopped", "restart"): "stopped",
    ("stopped", "gave_up"): "stopped",
    ("stopped", "answered"): "stopped",
    ("stopped", "child_died"): "stopped",
    ("stopped", "launched"): "stopped",
    ("stopped", "launch_failed"): "stopped",
}


def next_state(state: State, event: Event) -> State:
    """Raises RuntimeError for a pair that cannot happen: that is a defect of this library, not of its caller."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise RuntimeError(f"an isolator that is {state!r} cannot see {event!r}: please report this") from None
