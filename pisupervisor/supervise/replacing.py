"""Another child for one that has died: if, when and how often, as the policy says. Called with the keeper's turn held."""

from __future__ import annotations

import time

from pisupervisor.errors import CallTimeout, IsolationError, IsolatorClosed, LaunchError, RestartLimitReached
from pisupervisor.results import predicate
from pisupervisor.supervise import restart, starting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.supervise.keeper import Keeper

_SOON = 0.05
_SETTLING = 1.0  # seconds for a handler to say that a crash is handled, before it is one too many


def replace(keeper: Keeper, deadline: float | None, wanted: Callable[[], bool] | None = None) -> None:
    """Another child for the one that has died, if and when the policy says so. Called with the turn held; ``wanted``
    says whether the caller still waits for it.
    """
    if keeper.state == "starting":
        raise IsolationError("this isolator was never started: make it with ProcessIsolator.create(), which does that")
    stops = keeper.stops
    delay = _delay(keeper)
    if deadline is not None and time.monotonic() + delay > deadline:
        if not keeper.crashed:
            raise CallTimeout("the last child has ended, and the deadline leaves no time to start another")
        raise CallTimeout(f"the child crashed, and the next one starts in {delay:.1f} s, after the deadline")
    if keeper.crashed or keeper.last_exit is None:
        keeper.teller.tell(
            "RestartAttempt", keeper.last_pid, attempt=len(keeper.crashes), max_restarts=keeper.options.restart.max_restarts,
            delay=delay, exit_info=keeper.last_exit,
        )  # fmt: skip
    _wait_out(keeper, delay, stops, wanted)
    start_another(keeper, deadline)


def _wait_out(keeper: Keeper, delay: float, stops: int, wanted: Callable[[], bool] | None) -> None:
    ends = time.monotonic() + delay
    with keeper.lock:
        while True:
            if keeper.closed.is_set() or keeper.stops != stops:
                raise IsolatorClosed("the isolator was stopped while a restart was waited for")
            if wanted is not None and not wanted():
                raise IsolatorClosed("the call was cancelled before it ran")
            if (left := ends - time.monotonic()) <= 0:
                return
            keeper.changed.wait(left)


def start_another(keeper: Keeper, deadline: float | None = None) -> None:
    """Launch the next child, now. A launch that fails counts as a crash, but not where the caller had no time for it."""
    keeper.enter("restart")
    try:
        starting.start(keeper, deadline)
    except LaunchError as error:
        if starting.was_too_late(error, deadline):
            raise CallTimeout("the deadline passed while another child was being started") from error
        raise
    if keeper.last_exit is not None:
        child = keeper.child
        keeper.teller.tell("Restarted", child.pid if child is not None else None, old_pid=keeper.last_pid)


def _delay(keeper: Keeper) -> float:
    """Seconds to wait for the next start. Raises IsolatorClosed or RestartLimitReached where there will be none."""
    policy, info = keeper.options.restart, keeper.last_exit
    if info is not None and not restart.permits(policy, info, crashed=keeper.crashed):
        why = f"the child {predicate(info)}, and restart mode {policy.mode!r} starts no other; restart() does"
        raise IsolatorClosed(why)
    if keeper.is_left and policy.mode != "always":
        raise IsolatorClosed(
            f"exit() was called, and restart mode {policy.mode!r} starts no other child; restart() does"
        )
    with keeper.lock:
        delay = None if keeper.state == "failed" else keeper.crashes.delay(time.monotonic())
        if delay is None and keeper.state != "failed" and not keeper.teller.is_telling():
            keeper.changed.wait_for(lambda: not keeper.unsettled, _SETTLING)
            delay = keeper.crashes.delay(time.monotonic())
        count = len(keeper.crashes)
    if delay is None:
        _give_up(keeper, count)
        last = info.describe() if info is not None else "its launch failed"
        raise RestartLimitReached(
            f"{count} crashes within {policy.within:g} s; the last: {last}\n"
            "  restart() starts another child all the same; RestartPolicy(max_restarts=...) allows more"
        )
    return delay


def _give_up(keeper: Keeper, attempts: int) -> None:
    first = keeper.state != "failed"
    keeper.enter("gave_up")
    if first:
        keeper.teller.tell("RestartAttemptsExceeded", keeper.last_pid, attempts=attempts, exit_info=keeper.last_exit)


def revive(keeper: Keeper) -> float | None:
    """What the watch does where there is no child: the restart that is due. Seconds until it shall look again."""
    if keeper.state != "backoff":
        return None
    if not keeper.turn.take(0):
        return _SOON  # a call is at it
    try:
        if keeper.child is None and keeper.state == "backoff":
            replace(keeper, None)
    except LaunchError:
        return 0.0  # counted as a crash: tried again, until it is one too many
    except IsolationError:
        return None
    finally:
        keeper.turn.give()
    return 0.0
