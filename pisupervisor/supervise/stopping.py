"""Ends that were asked for, waiting for ends, and pauses."""

from __future__ import annotations

import _signal as signal
import time

from pihost import wire
from pisupervisor.errors import IsolationError, IsolatorClosed
from pisupervisor.link.connection import DeadlinePassed, LinkClosed
from pisupervisor.results import ExitInfo, ExitReason
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.keeper import Keeper

_SURELY = 5.0  # seconds for the kernel to empty a killed pid namespace; measured: 1 to 5 ms
_ABORT_GRACE = 1.0


def leave(keeper: Keeper, reason: str | None, timeout: float) -> ExitInfo:
    """Have the child end by itself, after the call that runs: threads joined, exit handlers run. Killed after ``timeout``."""
    deadline = time.monotonic() + timeout
    child = _stop(keeper)
    if child is None:
        return last_exit(keeper)
    if keeper.turn.acquire(timeout=timeout):
        try:
            child.farewell(reason or "exit() was called")
            if keeper.connection is not None and keeper.child is child:
                keeper.connection.restore_stdio(deadline)
                keeper.connection.send(wire.EXIT, (reason or "-").encode(), deadline=deadline)
        except (LinkClosed, DeadlinePassed):
            pass  # what that means is seen below
        finally:
            keeper.turn.release()
    if not child.wait(max(0.0, deadline - time.monotonic())):
        child.kill(ExitReason.KILLED, f"it had not left {timeout:g} s after exit({reason or ''})")
    return keeper.bury(child)


def terminate(keeper: Keeper, grace: float) -> bool:
    """SIGTERM to the payload, and after ``grace`` seconds SIGKILL to everything; True when all of it is dead."""
    return _signalled(keeper, signal.SIGTERM, "terminate() was called", grace)


def abort(keeper: Keeper, reason: str | None) -> bool:
    """SIGABRT to the payload, whose end is the end of everything; SIGKILL where it survives that."""
    return _signalled(keeper, signal.SIGABRT, reason or "abort() was called", _ABORT_GRACE)


def _signalled(keeper: Keeper, number: int, message: str, grace: float) -> bool:
    child = _stop(keeper)
    if child is None:
        return True
    child.order(ExitReason.KILLED, message)
    if grace > 0:
        child.signal_payload(number)
        child.wait(grace)
    child.kill(ExitReason.KILLED, message)
    dead = child.wait(_SURELY)
    keeper.bury(child)
    return dead


def _stop(keeper: Keeper) -> Child | None:
    """From here on the end of the child is wanted; a restart that is waited for is overtaken. A paused child runs on, to die."""
    keeper.check_open()
    keeper.notice()
    with keeper.lock:
        child = keeper.child
        paused = keeper.state == "paused"
        if keeper.state != "starting":
            keeper.enter_locked("stop")
    keeper.overtaken.set()
    if child is not None and paused:
        child.resume()
    return child


def restart(keeper: Keeper) -> None:
    """Another child, whatever the policy says; past crashes are forgotten."""
    keeper.check_open()
    child = keeper.child
    if child is not None:
        with keeper.lock:
            keeper.enter_locked("stop")
        keeper.end(child, ExitReason.KILLED, "restart() was called")
    with keeper.turn:
        keeper.check_open()
        if keeper.child is None:
            keeper.forget_crashes()
            keeper.start_another()


def wait_for_exit(keeper: Keeper, timeout: float | None) -> ExitInfo:
    """The final exit: what the policy makes good on the way is made good by the waiting thread.

    An exit that has happened, or is happening at this moment, is returned as it is: the next call makes it good.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    child = keeper.child
    if child is None or _is_over(child, deadline):
        return keeper.bury(child) if child is not None else last_exit(keeper)
    while True:
        child = keeper.child
        if child is not None:
            if not child.wait(_left(deadline)):
                raise TimeoutError(f"the child is still running after {timeout:g} s")
            keeper.bury(child)
        if keeper.state not in ("backoff", "starting"):
            return last_exit(keeper)
        left = _left(deadline)
        if left == 0 or not keeper.make_good(deadline, -1 if left is None else left):
            raise TimeoutError(f"a restart was still waited for after {timeout:g} s")


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
