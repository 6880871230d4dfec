"""Calls into one isolator's child: whose turn it is, and what a call gets when the child dies under it.

There is a short way for the commonest call, and one that all others go, on which whatever may happen is seen to. Both are the
calling thread's; an event loop goes the short one by itself (see ``aio_link``), and leaves the other to a thread.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time

from pihost import wire
from pisupervisor.checks import check_timeout
from pisupervisor.errors import (
    CallError,
    CallTimeout,
    IsolationError,
    IsolatorClosed,
    ObjectReleased,
    ProtocolError,
    SerializationError,
)
from pisupervisor.link.callers import acting_for, this_caller
from pisupervisor.link.calls import Payload, body_of, pack_code, unpack_answer
from pisupervisor.link.connection import Answer, Connection, DeadlinePassed, LinkClosed
from pisupervisor.link.returns import build
from pisupervisor.link.serializer import decode_plain
from pisupervisor.link.sources import Code
from pisupervisor.results import ExitReason, Usage
from pisupervisor.supervise.call import (
    Call,
    Outcome,
    Sent,
    Short,
    WouldWait,
    check_value,
    forget_frames,
    may_repeat,
    no_stream,
    timed_out,
)
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.exits import termination
from pisupervisor.supervise.keeper import Keeper
from pisupervisor.supervise.ways import Begun, Message, Way

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


_loop_callers = itertools.count(-1, -1)  # keys of calls that no thread makes
_NOT_ASKED = Usage()
_SLICE = 0.05  # seconds
_NOT_WANTED = "the call was cancelled before it ran"


class Session:
    """So many calls at once as the options say, and within each those that its callbacks make; the thread that calls does the
    waiting.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.options = keeper, keeper.options
        self._under_way: dict[int, list[Call]] = {}  # by caller: a callback may call in turn
        self._unwanted: set[int] = set()  # callers whose present call was cancelled while it waited
        self._calls = 0  # that the present child has answered
        self._caller: Child | None = None  # the child they were counted on
        self._way = Way()
        self._loop_thread = 0  # while an event loop's thread makes a call
        options = self.options  # what the short way leaves out
        self._is_simple = (options.max_concurrency, options.max_calls, options.call_timeout, options.results) == (
            1, None, None, "data",
        )  # fmt: skip

    def call(self, verb: str, *arguments: Any, **settings: Any) -> Outcome:
        """Have one call done, on a new child where the last has died, and its answer understood: ``settings`` are those of
        ``prepare``. Raises what the call raised, CallTimeout, ChildTerminated, ProtocolError, RestartLimitReached,
        IsolatorClosed, LaunchError.
        """
        if self._loop_thread == threading.get_ident():
            raise WouldWait
        return self.run(self.prepare(verb, *arguments, **settings), self._way)

    def call_plain(
        self, call: tuple[Any, ...], head: bytes, arguments: bytes | Payload, code: Code | None = None,
        timeout: float | None = None, idempotent: bool = False, only_on: Connection | None = None, returns: Any = None,
        check: Callable[[Any], bool] | None = None, streams: bool = True,
    ) -> Any:  # fmt: skip
        """``call`` for the commonest case, in as few steps as can be. ``call``: the verb and all that goes with it; ``head``:
        what ``pack_head`` makes of it without its ``arguments``.

        What it comes to is the value itself, where that is plain data and came at once; else an Outcome, by the long way,
        which goes on from wherever the short one ended. In a loop's thread (see ``on_loop``) it is Sent.
        """
        keeper, caller, child = self.keeper, threading.get_ident(), None
        connection, on_loop = keeper.connection, self._loop_thread == caller
        if (
            connection is not None and type(arguments) is bytes and self._is_simple and not self._unwanted
            and (code is None or code.key in connection.sent) and (only_on is None or only_on is connection)
        ):  # fmt: skip
            deadline = None if timeout is None else time.monotonic() + check_timeout(timeout)
            if on_loop:
                caller = next(_loop_callers)
            body, ident, text, error, is_next = head + arguments, connection.new_ident(), None, None, False
            child = keeper.begin_at_once(caller, connection)
        if child is None or connection is None or type(arguments) is not bytes:
            return self.call(
                *call, code=code, timeout=timeout, idempotent=idempotent, only_on=only_on, returns=returns, check=check,
                streams=streams,
            )  # fmt: skip
        try:
            if self._unwanted and caller in self._unwanted:  # since we looked, and before the turn was ours
                raise IsolatorClosed(_NOT_WANTED)
            if on_loop:
                is_next = connection.put(ident, body, deadline)
            elif (text := connection.ask(ident, body, deadline)) is not None:
                value = decode_plain(text, keeper.reader)
                if check is not None:
                    check_value(value, check)
                keeper.end_at_once(caller, child)
        except BaseException as raised:
            error = raised
        if text is not None and error is None:
            return value if returns is None else build(value, returns)
        if error is not None and not keeper.turn.has(caller):
            raise error  # a signal's handler raised when the call had ended
        rest = Call(body, code, timeout, deadline, False, returns, only_on, check, streams, idempotent)
        short = Short(rest, caller, ident, child, connection)
        return Sent(short, is_next, error) if on_loop else self.finish(short, error)

    def end_short(self, short: Short, text: bytes) -> Any:
        """The value that ``text`` says, which is the end of the call. Raises ProtocolError before it is."""
        value = decode_plain(text, self.keeper.reader)
        if short.call.check is not None:
            check_value(value, short.call.check)
        self.keeper.end_at_once(short.caller, short.child)
        return value

    def on_loop(self, method: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Sent | None:
        """That call, made in an event loop's thread, which may not wait. None: it would have to, and nothing has happened."""
        self._loop_thread = threading.get_ident()
        try:
            sent: Sent = method(*args, **keywords)
            return sent
        except WouldWait:
            return None
        finally:
            self._loop_thread = 0

    def finish(self, short: Short, error: BaseException | None) -> Outcome:
        """The long way of a call that has begun the short one, and has come to that error, or to nothing yet."""
        begun = (short.child, short.connection)
        with acting_for(short.caller):
            return self._run_outermost(short.call, short.caller, Begun(short.ident, error), begun)

    def prepare(
        self, verb: str, *arguments: Any, code: Code | None = None, timeout: float | None = None, idempotent: bool = False,
        capture: bool = False, returns: Any = None, only_on: Connection | None = None,
        check: Callable[[Any], bool] | None = None, streams: bool = False,
    ) -> Call:  # fmt: skip
        """A call whose time runs from now on."""
        limit = self.options.call_timeout if timeout is None else check_timeout(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        body = body_of(verb, capture, arguments)
        return Call(body, code, limit, deadline, capture, returns, only_on, check, streams, idempotent)

    def run(self, call: Call, way: Way) -> Outcome:
        """The long way of one call."""
        caller = this_caller()
        try:
            if self.keeper.turn.has(caller):
                return self._run_from_callback(call, caller, way)
            return self._run_outermost(call, caller, way)
        finally:
            if type(call.body) is not bytes:
                call.close()

    def _run_outermost(
        self, call: Call, caller: int, way: Way, begun: tuple[Child, Connection] | None = None
    ) -> Outcome:
        """``begun``: the turn is taken and the call sent already."""
        keeper, came = self.keeper, self.keeper.stops
        if begun is None:
            self._take_turn(call, caller)
        try:
            stops = keeper.stops
            while True:
                counted = begun is not None
                child, connection = (
                    begun
                    or keeper.usable_child()
                    or keeper.ready_child(call.deadline, lambda: caller not in self._unwanted, came)
                )
                begun = None
                try:
                    counted = counted or keeper.begin_call(child)
                    return self._attempt(call, child, connection, caller, way)
                except LinkClosed as gone:
                    forget_frames(gone)
                    info = keeper.bury(child, truncated=gone.written[2])
                    was_stopped = keeper.stops != stops or keeper.closed.is_set() or caller in self._unwanted
                    if not may_repeat(call, gone, info.reason, was_stopped=was_stopped):
                        raise termination(info, gone.written) from None
                finally:
                    if counted:
                        keeper.end_call(child)
                    self._after(child, call)
        finally:
            keeper.turn.give(caller)

    def _run_from_callback(self, call: Call, caller: int, way: Way) -> Outcome:
        """The child waits for a callback's answer, and serves calls meanwhile. It is never replaced in the middle, and the
        time of the outer call is the most that the inner one gets.
        """
        under_way = self._under_way.get(caller)
        child, connection = self.keeper.child, self.keeper.connection
        if child is None or connection is None:
            if not under_way:
                raise IsolationError("the child is not ready yet: a callback of on_start cannot call into it")
            raise IsolatorClosed("the child whose callback this is has ended")
        if not under_way or not connection.in_callback(caller):
            raise IsolationError(
                "this thread is in the middle of a call into that child, and not in a callback of it; a signal's handler "
                "leaves that to another thread"
            )
        outer = under_way[-1]
        if outer.deadline is not None and (call.deadline is None or outer.deadline < call.deadline):
            call = call._replace(deadline=outer.deadline, limit=outer.limit)
        if len(under_way) > self.options.callback_depth:
            raise CallError(f"callbacks and calls are nested more than {self.options.callback_depth} deep")
        has_risen = call.capture and self._rise(call.deadline, connection)
        try:
            return self._attempt(call, child, connection, caller, way)
        except LinkClosed as gone:
            forget_frames(gone)
            raise termination(self.keeper.bury(child, truncated=False), gone.written) from None
        finally:
            if has_risen:
                self.keeper.turn.sink()

    def _rise(self, deadline: float | None, connection: Connection) -> bool:
        """Before a captured call within another: whether the place for such calls was to be had, and is to be given back. While
        a map is under way nobody waits for it: who has it may wait for a callback of that which this thread is in.
        """
        turn, ends = self.keeper.turn, float("inf") if deadline is None else deadline
        if self.options.max_concurrency == 1 or turn.is_my_captured():
            return False
        while not connection.has_a_map():
            if turn.rise(max(0.0, min(_SLICE, ends - time.monotonic()))):
                return True
            if time.monotonic() >= ends:
                raise CallTimeout("other calls that capture their output were still running at the deadline")
        return False

    # --- one try ----------------------------------------------------------------------------------------------

    def _attempt(self, call: Call, child: Child, connection: Connection, caller: int, way: Way) -> Outcome:
        """Raises LinkClosed when the child dies of it, else what the call comes to."""
        if call.only_on is not None and call.only_on is not connection:
            raise ObjectReleased("the child in which the object lived has ended")
        keeper = self.keeper
        try:
            before = child.meter.usage() if call.capture else _NOT_ASKED
            answer = self._exchange(call, connection, caller, way)
            if answer.truncated:
                keeper.teller.output_limit(child)
            value = self.value(answer, call, connection)
            return Outcome(value, answer, before, child.meter.usage() if call.capture else _NOT_ASKED, connection)
        except DeadlinePassed as late:
            forget_frames(late)
            paused = ", paused by pause()" if keeper.state == "paused" else ""
            message = f"the call was still running after {call.limit:g} s{paused}"
            info = keeper.end(child, ExitReason.TIMEOUT, message, truncated=late.written[2])
            raise timed_out(message, info).with_output(*late.written) from None
        except ProtocolError as error:
            keeper.end(child, ExitReason.PROTOCOL, str(error), truncated=False)
            raise
        except (IsolationError, LinkClosed):
            raise  # the call's own outcome
        except BaseException as error:  # such as KeyboardInterrupt: an answer nobody waits for must not come
            why = f"the call was interrupted by {type(error).__name__}"
            keeper.end(child, ExitReason.KILLED, why, truncated=False)
            raise

    def _exchange(self, call: Call, connection: Connection, caller: int, way: Way) -> Answer:
        if caller in self._unwanted:
            raise IsolatorClosed(_NOT_WANTED)
        chain = self._under_way.get(caller)
        within = connection.in_callback(caller) if chain else 0
        if chain is None:
            chain = self._under_way[caller] = []
        ident = way.new_ident(connection)
        chain.append(call)
        try:
            code = call.code
            if code is not None and code.key not in connection.sent:
                connection.send(wire.CODE, pack_code(code), deadline=call.deadline)
                connection.sent.add(code.key)
            kept = int(self.options.limits.output) if call.capture else None
            return way.exchange(connection, Message(call.body, call.deadline, kept, ident, within))
        finally:
            chain.pop()
            if not chain:
                del self._under_way[caller]

    def value(self, answer: Answer, call: Call, connection: Connection) -> Any:
        """What an answer means. Raises ProtocolError for a value that no honest child gives to such a call."""
        try:
            value = unpack_answer(answer, self.keeper.reader, call.returns, connection.arenas)
            if answer.kind == wire.STREAM and not call.streams:
                if call.check is not None:
                    raise ProtocolError("a generator, where there can be none")
                connection.released.append(value)
                raise SerializationError(no_stream(call.returns), direction="from child")
            if answer.kind == wire.STREAM:
                connection.streams.add(value)
            elif call.check is not None:
                check_value(value, call.check)
            return value
        except IsolationError as error:
            error.with_output(answer.stdout, answer.stderr, answer.truncated)
            raise

    # --- turns ------------------------------------------------------------------------------------------------

    def _take_turn(self, call: Call, caller: int) -> None:
        keeper = self.keeper
        keeper.check_open()
        use: Any = "captured" if call.capture else "plain"
        if not keeper.turn.enter(caller, use):
            left = None if call.deadline is None else max(0.0, call.deadline - time.monotonic())
            if not keeper.turn.take(left, use):
                raise CallTimeout("other calls were still running at the deadline; this one was not started")
            if keeper.closed.is_set():
                keeper.turn.give(caller)
                keeper.check_open()
        if caller in self._unwanted:
            keeper.turn.give(caller)
            raise IsolatorClosed(_NOT_WANTED)

    def _after(self, child: Child, call: Call) -> None:
        """A try is over: that may have been the child's last. A stream is one call, which is over when its last item is."""
        keeper, most = self.keeper, self.options.max_calls
        if most is None:
            return
        with keeper.lock:
            before = self._calls if self._caller is child else 0
            self._calls, self._caller = before + (not call.is_step), child
            link = keeper.connection
            in_use = child.calls or (link is not None and (link.calls or link.streams))
            over = self._calls >= most and keeper.child is child and not in_use
            if over:
                keeper.enter_locked("stop")
        if over:
            keeper.end(child, ExitReason.KILLED, f"max_calls={most} calls answered")

    def calls_left(self) -> int:
        """How many more calls the present child may answer."""
        if self.options.max_calls is None:
            return sys.maxsize
        with self.keeper.lock:
            return self.options.max_calls - (self._calls if self._caller is self.keeper.child else 0)

    # --- from outside -----------------------------------------------------------------------------------------

    def cancel(self, caller: int) -> None:
        """End the call that ``caller`` (a thread) makes: kill its child if it is that call's turn (not one that another call
        has launched, which others wait for), and see that it runs on no other.
        """
        keeper = self.keeper
        with keeper.lock:
            launching = keeper.launching if keeper.launcher == caller else None
            child = (keeper.child or launching) if keeper.turn.has(caller) else None
            self._unwanted.add(caller)
            keeper.changed.notify_all()
        if child is not None:
            child.kill(ExitReason.KILLED, "the call was cancelled")

    def want(self, caller: int) -> None:
        """``caller`` begins another call: what was cancelled before is past."""
        with self.keeper.lock:
            self._unwanted.discard(caller)
