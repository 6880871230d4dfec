"""Ends that were asked for, waiting for ends, and pauses."""

from __future__ import annotations

import _signal as signal
import time

from pihost import wire
from pisupervisor import checks
from pisupervisor.errors import CallTimeout, IsolationError, IsolatorClosed, OptionsError
from pisupervisor.link.connection import DeadlinePassed, LinkClosed
from pisupervisor.results import ExitInfo, ExitReason
from pisupervisor.supervise import replacing
from pisupervisor.supervise.child import END_GRACE, Child
from pisupervisor.supervise.keeper import Keeper

_ABORT_GRACE = 1.0


def leave(keeper: Keeper, reason: str | None, timeout: float) -> ExitInfo:
    """Have the child end by itself, after the call that runs: threads joined, exit handlers run. Killed after ``timeout``."""
    deadline = time.monotonic() + _seconds(timeout, "timeout")
    text = _text(reason, "exit() was called")
    keeper.turn.check_not_mine()
    keeper.check_open()
    keeper.is_left = True  # also where there is no child at the moment
    child = _stop(keeper)
    if child is None:
        return last_exit(keeper)
    if keeper.turn.take(timeout):
        try:
            child.farewell(text)
            connection = keeper.connection
            if connection is not None and keeper.child is child:
                connection.tidy(deadline)
                connection.send(wire.EXIT, text.encode(), deadline=deadline)
        except (LinkClosed, DeadlinePassed):
            pass  # what that means is seen below
        finally:
            keeper.turn.give()
    if not child.wait(max(0.0, deadline - time.monotonic())):
        child.kill(ExitReason.KILLED, f"it had not left {timeout:g} s after exit({reason or ''})")
    return keeper.bury(child)


def terminate(keeper: Keeper, grace: float) -> bool:
    """SIGTERM to the payload, and after ``grace`` seconds SIGKILL to everything; True when all of it is dead."""
    return _signalled(keeper, signal.SIGTERM, "terminate() was called", _seconds(grace, "grace"))


def abort(keeper: Keeper, reason: str | None) -> bool:
    """SIGABRT to the payload, whose end is the end of everything; SIGKILL where it survives that."""
    return _signalled(keeper, signal.SIGABRT, _text(reason, "abort() was called"), _ABORT_GRACE)


def _seconds(value: float, name: str) -> float:
    """Checked before anything is begun."""
    return checks.number(value, name, 0.0, checks.LONGEST)


def _text(reason: str | None, default: str) -> str:
    if reason is not None and not isinstance(reason, str):
        raise OptionsError(f"reason: expected text, not {reason!r}")
    return (reason or default).encode("utf-8", "backslashreplace").decode()


def _signalled(keeper: Keeper, number: int, message: str, grace: float) -> bool:
    child = _stop(keeper)
    if child is None:
        return keeper.starter == 0
    child.order(ExitReason.KILLED, message)
    if grace > 0:
        child.signal_payload(number)
        child.wait(grace)
    child.kill(ExitReason.KILLED, message)
    dead = child.wait(END_GRACE)
    keeper.bury(child, within=keeper.turn.is_mine())
    return dead


def _stop(keeper: Keeper) -> Child | None:
    """From here on the end of the child is wanted; a launch or a wait for one is overtaken. A paused child runs on, to die."""
    keeper.check_open()
    keeper.notice()
    with keeper.lock:
        child, launching = keeper.child, keeper.launching
        paused = keeper.state == "paused"
        keeper.stops += 1
        if keeper.state == "backoff":
            keeper.overtaken = keeper.stops
        keeper.enter_locked("stop")
    if launching is not None:
        launching.kill(ExitReason.KILLED, "the isolator was stopped")
    if child is None:
        keeper.await_starter()
    if child is not None and paused:
        child.resume()
    return child


def restart(keeper: Keeper) -> None:
    """Another child, whatever the policy says; past crashes are forgotten."""
    keeper.turn.check_not_mine()
    child = _stop(keeper)
    keeper.is_left = False
    if child is not None:
        keeper.end(child, ExitReason.KILLED, "restart() was called")
    with keeper.turn:
        keeper.check_open()
        if keeper.child is None:
            keeper.forget_crashes()
            replacing.start_another(keeper)


def wait_for_exit(keeper: Keeper, timeout: float | None) -> ExitInfo:
    """The final exit: what the policy makes good on the way is made good by the waiting thread.

    An exit that has happened, or is happening at this moment, is returned as it is: the next call makes it good.
    """
    deadline = None if timeout is None else time.monotonic() + _seconds(timeout, "timeout")
    keeper.check_owner()
    child = keeper.child
    if child is None:
        return last_exit(keeper)
    keeper.turn.check_not_mine()
    if _is_over(child, deadline):
        return keeper.bury(child)
    while True:
        info = None
        if child is not None:
            if not child.wait(_left(deadline)):
                raise TimeoutError(f"the child is still running after {timeout:g} s")
            info = keeper.bury(child)
        if keeper.state not in ("backoff", "starting"):
            return info or last_exit(keeper)
        _make_good(keeper, deadline)
        child = keeper.child
        if child is None and _left(deadline) == 0:
            raise TimeoutError(f"a restart was still waited for after {timeout:g} s")


def _make_good(keeper: Keeper, deadline: float | None) -> None:
    """Start another child if that is due and nobody else is at it. What fails here fails for whoever calls."""
    left = _left(deadline)
    if not keeper.turn.take(left):
        return
    try:
        if keeper.child is None and keeper.state == "backoff":
            replacing.replace(keeper, deadline)
    except CallTimeout:  # not before the deadline: but it may be stopped or started before that
        with keeper.lock:
            keeper.changed.wait(_left(deadline))
    except IsolationError:
        pass
    finally:
        keeper.turn.give()


def _is_over(child: Child, deadline: float | None) -> bool:
    """Whether it has ended, or is about to: a signal that was sent before we were asked must not look like one sent later."""
    while child.is_dying() and _left(deadline) != 0:
        if child.wait(0.005):
            break
    return child.ended


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def last_exit(keeper: Keeper) -> ExitInfo:
    if keeper.last_exit is None:
        raise IsolatorClosed("this isolator has had no child")
    return keeper.last_exit


def pause(keeper: Keeper) -> None:
    """Freeze everything in the child; calls wait, and their deadlines run on. Paused again: nothing happens."""
    keeper.check_open()
    keeper.notice()
    child = keeper.child
    with keeper.lock:
        if keeper.state == "paused":
            return
        if child is None or keeper.child is not child or keeper.state not in ("ready", "busy"):
            raise IsolationError(f"there is nothing to pause: this isolator is {keeper.state}")
        keeper.enter_locked("pause")  # before it is frozen: a stop must know that it has to be thawed
    try:
        child.pause()
    except IsolationError:
        if _unpause(keeper, child):
            raise  # else it was stopped meanwhile, and that is what holds
    if not _is_paused(keeper, child):
        child.resume()  # somebody said so while it was being frozen


def _is_paused(keeper: Keeper, child: Child) -> bool:
    with keeper.lock:
        return keeper.child is child and keeper.state == "paused"


def resume(keeper: Keeper) -> None:
    """Let a paused child run on. Not paused: nothing happens."""
    keeper.check_open()
    child = keeper.child
    if child is None or keeper.state != "paused":
        return
    child.resume()
    _unpause(keeper, child)


def _unpause(keeper: Keeper, child: Child) -> bool:
    with keeper.lock:
        if keeper.state != "paused" or keeper.child is not child:
            return False
        keeper.enter_locked("resume_busy" if keeper.in_call else "resume_idle")
        return True
