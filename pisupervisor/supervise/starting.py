"""One isolator's next child: launched, or the spare one taken, its first calls made, and then the keeper's. Functions on a
keeper, called with its turn held and its state "starting".
"""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import partial

from pihost import wire
from pisupervisor.errors import IsolationError, IsolatorClosed, LaunchError, OptionsError
from pisupervisor.link.connection import Connection, DeadlinePassed, LinkClosed
from pisupervisor.records import NamedTuple
from pisupervisor.results import ExitReason
from pisupervisor.supervise import spare
from pisupervisor.supervise.child import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.link.arenas import Arenas
    from pisupervisor.link.packing import Packer
    from pisupervisor.link.sources import CodeReader
    from pisupervisor.options import IsolationOptions
    from pisupervisor.supervise.keeper import Keeper

LIVED_ON = "it closed its link and lived on"
_NEVER = float("inf")


class FirstCall(NamedTuple):
    """Something that each new child does before anything else: ``body`` of a call, and the code for it (key, CODE frame)."""

    step: str
    body: bytes
    codes: tuple[tuple[str, bytes], ...] = ()


def first_calls(options: IsolationOptions, packer: Packer, reader: CodeReader) -> list[FirstCall]:
    """What ``types``, ``results`` and ``on_start`` ask for."""
    from pisupervisor.codecs import lesson
    from pisupervisor.link.calls import pack_call, pack_code

    calls = []
    if options.types or not isinstance(options.results, str):
        arguments, codes = lesson(options.types, options.results, packer, reader)
        packed = tuple((code.key, pack_code(code)) for code in codes)
        calls.append(FirstCall("types", pack_call("learn", False, arguments), packed))
    if options.on_start is not None:
        payload = packer.plain_function(options.on_start)
        calls.append(FirstCall("on_start", pack_call("start", False, payload)))
    return calls


def start(keeper: Keeper, deadline: float | None = None) -> None:
    """Launch a child, or take the spare one, and let it begin. The state is "starting"."""
    keeper.starter = threading.get_ident()
    try:
        _start(keeper, deadline)
    finally:
        with keeper.lock:
            keeper.starter = 0
            keeper.changed.notify_all()


def _start(keeper: Keeper, deadline: float | None) -> None:
    limit = keeper.options.start_timeout
    until = min(deadline or _NEVER, _NEVER if limit is None else time.monotonic() + limit)
    stops, child, connection = keeper.stops, None, None
    try:
        child = _launch(keeper, None if until == _NEVER else until)
        connection = Connection(
            child.link, int(keeper.options.limits.result), child.stdio(), keeper.answer, child.is_over,
            partial(_arenas, keeper.options), child.kill_late,
            shared=keeper.options.max_concurrency > 1,
        )  # fmt: skip
        _begin(keeper, child, connection, None if until == _NEVER else until)
        _adopt(keeper, child, connection, stops)
        if not keeper.without:
            spare.opened(child.template, keeper.options)
    except BaseException as error:
        if connection is not None and keeper.connection is not connection:
            connection.give_up()
        _start_failed(keeper, child, error, stops, is_late=was_too_late(error, deadline))
        raise
    if keeper.options.debug:
        line = f"pisupervisor: child {child.pid} is stopped before user code; debug it, then: kill -CONT {child.pid}\n"
        sys.stderr.write(line)
        sys.stderr.flush()


def was_too_late(error: BaseException, deadline: float | None) -> bool:
    """Whether it was the caller's time that did not suffice: that says nothing against the child."""
    return deadline is not None and getattr(error, "step", "") == "start_timeout" and time.monotonic() >= deadline


def _arenas(options: IsolationOptions) -> Arenas:
    from pisupervisor.link.arenas import arenas_for

    return arenas_for(options)


def _launch(keeper: Keeper, deadline: float | None) -> Child:
    template = keeper.template
    child = None if keeper.without else spare.take(template, keeper.options, deadline)
    if child is None:
        child = Child(keeper.options, template)
        child.log = keeper.log_of(template)
        with keeper.lock:
            keeper.launching = child
        child.request(keeper.without, deadline=deadline)
        _import_call_path()
        child.complete(deadline)
    else:
        with keeper.lock:
            keeper.launching = child
    return child


def _start_failed(keeper: Keeper, child: Child | None, error: BaseException, stops: int, *, is_late: bool) -> None:
    """Nothing is left of the launch. Raises IsolatorClosed where it was stopped: that came first."""
    if child is not None:
        if keeper.child is child:
            return  # it was all there when a signal's handler raised: nothing of the launch has failed
        child.discard("its launch failed")
    with keeper.lock:
        keeper.launching = None
        overtaken = keeper.stops != stops or keeper.closed.is_set() or getattr(error, "step", "") == "stopped"
        crash = 0
        if isinstance(error, IsolationError) and keeper.last_exit is not None and not (overtaken or is_late):
            crash = keeper.add_crash()
        due = keeper.options.restart.mode != "never" or keeper.state != "starting"
        keeper.enter_locked("launch_failed" if due else "ended")
    if overtaken:
        keeper.check_open()
        raise IsolatorClosed("the isolator was stopped while a child was being started") from error
    if isinstance(error, IsolationError):
        keeper.teller.tell("StartFailed", child.pid if child is not None else None, error=error, crash=crash)


def _begin(keeper: Keeper, child: Child, connection: Connection, deadline: float | None) -> None:
    """What comes first in a new child: ``types`` and ``on_start``. What that raises there is a failed launch."""
    for first in keeper.first_calls:
        _call_first(keeper, first, child, connection, deadline)


def _call_first(keeper: Keeper, first: FirstCall, child: Child, connection: Connection, deadline: float | None) -> None:
    from pisupervisor.link.calls import unpack_answer

    step = first.step
    try:
        for key, code in first.codes:
            connection.send(wire.CODE, code, deadline=deadline)
            connection.sent.add(key)
        answer = connection.call(first.body, deadline)
        unpack_answer(answer, keeper.reader, arenas=connection.arenas)
        if answer.kind == wire.STREAM:
            raise OptionsError("it is a generator, which nobody would run")
    except DeadlinePassed:
        remedy = f"raise start_timeout, or have {step} do less"
        raise LaunchError(f"{step} was not over at start_timeout", step=step, remedy=remedy) from None
    except LinkClosed:
        if not child.leaves():
            child.kill(ExitReason.PROTOCOL, LIVED_ON)
        died = f"the child died in {step}: {child.finish(in_call=True).describe()}"
        remedy = f"{step} must return, within the limits of the child"
        raise LaunchError(died, step=step, remedy=remedy) from None
    except IsolationError as error:
        raise LaunchError(
            str(error), step=step, remedy=f"mend what it raised: {step} runs in the child first"
        ) from error


def _adopt(keeper: Keeper, child: Child, connection: Connection, stops: int) -> None:
    keeper.teller.started(child)
    with keeper.lock:
        refused = keeper.closed.is_set() or keeper.stops != stops  # by another thread, while this one launched
        if not refused:
            keeper.connection, keeper.child, keeper.applied = connection, child, child.applied
            keeper.launching, keeper.idle_since = None, time.monotonic()
            keeper.enter_locked("launched")
    if refused:
        child.discard("the isolator was stopped")
        keeper.teller.ended(child)
        raise IsolatorClosed("the isolator was stopped while a child was being started")
    keeper.wake_watch()


def _import_call_path() -> None:
    """What the first call will need, imported while the zygote works: 10 ms that nobody then waits for."""
    import pisupervisor.link.arguments
    import pisupervisor.link.serializer  # noqa: F401

    if len(os.sched_getaffinity(0)) > 1:  # on a single CPU nothing is won, and small answers do without
        import msgspec.json  # noqa: F401
