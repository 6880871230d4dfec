"""The life of an isolator: every pair of state and event is in the table, or is a defect that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pisupervisor import ProcessIsolator
from pisupervisor.supervise.lifecycle import TABLE, next_state

if TYPE_CHECKING:  # as there: typing is not imported on the way to a first result
    from pisupervisor.supervise.lifecycle import Event, State

STATES = ("starting", "ready", "busy", "paused", "stopping", "backoff", "stopped", "failed")
EVENTS = tuple(dict.fromkeys(event for _state, event in TABLE))
PAIRS = [(state, event) for state in STATES for event in EVENTS]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_listed_or_refused(state: State, event: Event) -> None:
    if (state, event) in TABLE:
        assert next_state(state, event) == TABLE[state, event]
    else:
        with pytest.raises(RuntimeError, match=f"{state!r} cannot see {event!r}"):
            next_state(state, event)


def test_the_table_speaks_of_known_states_only() -> None:
    assert {state for state, _ in TABLE} | set(TABLE.values()) <= set(STATES)


def test_the_states_are_the_public_ones() -> None:
    assert ProcessIsolator.state.__doc__ == f"One of {' '.join(STATES)}."


def test_a_stopped_isolator_starts_only_when_asked() -> None:
    assert {TABLE[pair] for pair in TABLE if pair[0] == "stopped"} == {"stopped", "starting", "failed"}
    assert {event for state, event in TABLE if state == "stopped" and TABLE[state, event] == "starting"} == {"restart"}


def test_every_state_that_is_reached_can_be_closed() -> None:
    reached = {"starting", *TABLE.values()}
    assert all(TABLE[state, "close"] == "stopped" for state in reached)  # type: ignore[index]


@pytest.mark.parametrize(
    ("events", "end"),
    [
        (("launched", "call", "answered", "close"), "stopped"),
        (("launched", "call", "child_died", "restart", "launched"), "ready"),
        (("launch_failed", "restart", "launched"), "ready"),
        (("launched", "child_died", "gave_up"), "failed"),
        (("launched", "child_died", "gave_up", "restart", "launched"), "ready"),
        (("launched", "call", "pause", "answered", "resume_idle", "close"), "stopped"),
        (("launched", "pause", "call", "resume_busy", "answered"), "ready"),
        (("launched", "call", "child_died", "answered", "stop", "restart", "launched"), "ready"),
        (("launched", "stop", "child_died", "restart", "launched"), "ready"),
        (("launched", "ended", "restart"), "starting"),
    ],
)
def test_lives(events: tuple[Event, ...], end: State) -> None:
    state: State = "starting"
    for event in events:
        state = next_state(state, event)
    assert state == end
