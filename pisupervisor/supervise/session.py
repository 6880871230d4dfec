"""Calls into one isolator's child: whose turn it is, and what a call gets when the child dies under it."""

from __future__ import annotations

import time

from pihost import wire
from pisupervisor.errors import (
    CallError,
    CallTimeout,
    IsolationError,
    IsolatorClosed,
    ObjectReleased,
    ProtocolError,
    SerializationError,
)
from pisupervisor.link.calls import Attached, body_of, pack_code, unpack_answer
from pisupervisor.link.connection import Answer, Connection, DeadlinePassed, LinkClosed
from pisupervisor.link.sources import Code
from pisupervisor.options import check_timeout
from pisupervisor.records import NamedTuple
from pisupervisor.results import ExitReason, Usage
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.exits import termination
from pisupervisor.supervise.keeper import Keeper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


_NOT_ASKED = Usage()


class Outcome(NamedTuple):
    """A call that was answered: its value, the answer's output, what the child had used before and after (where that was
    captured), and the link it went over.
    """

    value: Any
    answer: Answer
    before: Usage
    after: Usage
    connection: Connection


class Call(NamedTuple):
    """What a call needs for each of its tries. ``limit`` is the time it was given, ``deadline`` when that is over;
    ``only_on`` the link of the child that has the object it is about; ``check`` what an honest child's value is like;
    ``streams`` whether it may be a generator.
    """

    body: bytes | Attached
    code: Code | None
    limit: float | None
    deadline: float | None
    capture: bool
    returns: Any
    only_on: Connection | None
    check: Callable[[Any], bool] | None
    streams: bool

    def close(self) -> None:
        """It will not be tried again: the copies of descriptors that were for the child are closed."""
        if isinstance(self.body, Attached):
            for file in self.body.payload.files:
                file.close()


class Session:
    """One call at a time, and within it those that its callbacks make; the thread that calls does the waiting."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.options = keeper, keeper.options
        self._under_way: list[Call] = []  # of the thread whose turn it is: a callback may call in turn
        self._unwanted: set[int] = set()  # threads whose present call was cancelled while it waited
        self._calls = 0  # that the present child has answered
        self._caller: Child | None = None  # the child they were counted on

    def call(
        self, verb: str, *arguments: Any, code: Code | None = None, timeout: float | None = None, idempotent: bool = False,
        capture: bool = False, returns: Any = None, only_on: Connection | None = None,
        check: Callable[[Any], bool] | None = None, streams: bool = False,
    ) -> Outcome:  # fmt: skip
        """Have one call done, on a new child where the last has died, and its answer understood. Raises what the call
        raised, CallTimeout, ChildTerminated, ProtocolError, RestartLimitReached, IsolatorClosed, LaunchError.
        """
        limit = self.options.call_timeout if timeout is None else check_timeout(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        body = body_of(verb, capture, arguments)
        call = Call(body, code, limit, deadline, capture, returns, only_on, check, streams)
        if self.keeper.turn.is_mine():
            return self._call_from_callback(call)
        self._take_turn(deadline)
        try:
            self._begin()
            while True:
                child, connection = self.keeper.ready_child(deadline, self._is_wanted)
                try:
                    return self._attempt(call, child, connection)
                except LinkClosed:
                    info = self.keeper.bury(child, truncated=connection.written[2])
                    if not idempotent or info.reason is ExitReason.KILLED:
                        raise termination(info, connection.written) from None
                finally:
                    self._end_turn(child)
        finally:
            self.keeper.turn.give()
            call.close()

    def _call_from_callback(self, call: Call) -> Outcome:
        """The child waits for a callback's answer, and serves calls meanwhile. It is never replaced in the middle, and the
        time of the outer call is the most that the inner one gets.
        """
        if not self._under_way:
            raise IsolationError("the child is not ready yet: a callback of on_start cannot call into it")
        outer = self._under_way[-1]
        if outer.deadline is not None and (call.deadline is None or outer.deadline < call.deadline):
            call = call._replace(deadline=outer.deadline, limit=outer.limit)
        if len(self._under_way) > self.options.callback_depth:
            raise CallError(f"callbacks and calls are nested more than {self.options.callback_depth} deep")
        child, connection = self.keeper.child, self.keeper.connection
        if child is None or connection is None:
            raise IsolatorClosed("the child whose callback this is has ended")
        try:
            return self._attempt(call, child, connection)
        except LinkClosed:
            raise termination(self.keeper.bury(child, truncated=False), connection.written) from None
        finally:
            call.close()

    # --- one try ----------------------------------------------------------------------------------------------

    def _attempt(self, call: Call, child: Child, connection: Connection) -> Outcome:
        """Raises LinkClosed when the child dies of it, else what the call comes to."""
        if call.only_on not in (None, connection):
            raise ObjectReleased("the child in which the object lived has ended")
        try:
            before = child.meter.usage() if call.capture else _NOT_ASKED
            answer = self._exchange(call, child, connection)
            value = self._value(answer, call, connection)
            return Outcome(value, answer, before, child.meter.usage() if call.capture else _NOT_ASKED, connection)
        except DeadlinePassed:
            message = f"the call was still running after {call.limit:g} s"
            info = self.keeper.end(child, ExitReason.TIMEOUT, message, truncated=connection.written[2])
            raise _timeout(message, info).with_output(*connection.written) from None
        except ProtocolError as error:
            self.keeper.end(child, ExitReason.PROTOCOL, str(error), truncated=False)
            raise
        except (IsolationError, LinkClosed):
            raise  # the call's own outcome
        except BaseException as error:  # such as KeyboardInterrupt: an answer nobody waits for must not come
            why = f"the call was interrupted by {type(error).__name__}"
            self.keeper.end(child, ExitReason.KILLED, why, truncated=False)
            raise

    def _exchange(self, call: Call, child: Child, connection: Connection) -> Answer:
        self._enter_call(child)
        self._under_way.append(call)
        outer_wrote, connection.written = connection.written, (b"", b"", False)
        try:
            code = call.code
            if code is not None and code.key not in connection.sent:
                connection.send(wire.CODE, pack_code(code), deadline=call.deadline)
                connection.sent.add(code.key)
            kept = int(self.options.limits.output) if call.capture else None
            answer = self._send(call, connection, kept)
        finally:
            self._under_way.pop()
        if self._under_way:
            connection.written = outer_wrote
        if answer.truncated:
            self.keeper.teller.output_limit(child)
        return answer

    def _send(self, call: Call, connection: Connection, kept: int | None) -> Answer:
        if isinstance(call.body, bytes):
            return connection.call(call.body, call.deadline, kept)
        from pisupervisor.link import attachments

        body, fds = attachments.send(call.body, connection, call.deadline)
        answer = connection.call(body, call.deadline, kept, fds)
        if answer.kind != wire.REFUSED:
            connection.arenas().shared.update(memory.number for memory in call.body.payload.shared)
        return answer

    def _enter_call(self, child: Child) -> None:
        keeper = self.keeper
        with keeper.lock:
            if keeper.child is not child:
                raise LinkClosed  # stopped or closed by another thread in this very moment
            if not self._is_wanted():
                raise IsolatorClosed("the call was cancelled before it ran")
            if self._under_way:
                return
            keeper.in_call = True
            keeper.enter_locked("call")
        child.meter.begin_call()

    def _value(self, answer: Answer, call: Call, connection: Connection) -> Any:
        """Raises ProtocolError for a value that no honest child gives to such a call."""
        try:
            value = unpack_answer(answer, self.keeper.reader, call.returns, connection.arenas)
            if answer.kind == wire.STREAM and not call.streams:
                if call.returns is None:
                    raise ProtocolError("a generator, where there can be none")
                message = f"the call returned a generator, not {call.returns}; ask for returns=Iterator[...]"
                raise SerializationError(message, direction="from child")
            if call.check is not None and answer.kind != wire.STREAM and not call.check(value):
                raise ProtocolError("an answer that is none to such a call")
            return value
        except IsolationError as error:
            error.with_output(answer.stdout, answer.stderr, answer.truncated)
            raise

    # --- turns ------------------------------------------------------------------------------------------------

    def _take_turn(self, deadline: float | None) -> None:
        keeper = self.keeper
        keeper.check_open()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not keeper.turn.take(left):
            raise CallTimeout("other calls were still running at the deadline; this one was not started")
        try:
            keeper.check_open()
        except BaseException:
            keeper.turn.give()
            raise

    def _begin(self) -> None:
        """The turn is won: from here on ``cancel`` means the child; what was cancelled before does not run."""
        if not self._is_wanted():
            raise IsolatorClosed("the call was cancelled before it ran")

    def _is_wanted(self) -> bool:
        return self.keeper.turn.owner not in self._unwanted

    def _end_turn(self, child: Child) -> None:
        keeper = self.keeper
        with keeper.lock:
            if keeper.in_call:
                keeper.in_call = False
                keeper.enter_locked("answered")
        keeper.idle_since = time.monotonic()
        self._calls, self._caller = self._calls + 1 if self._caller is child else 1, child
        if self.options.max_calls is not None and self._calls >= self.options.max_calls and keeper.child is child:
            keeper.enter("stop")
            keeper.end(child, ExitReason.KILLED, f"max_calls={self.options.max_calls} calls answered")

    # --- from outside -----------------------------------------------------------------------------------------

    def cancel(self, thread: int) -> None:
        """End the call that ``thread`` makes: kill its child if it is that call's turn, and see that it runs on no other."""
        keeper = self.keeper
        with keeper.lock:
            child = (keeper.child or keeper.launching) if keeper.turn.owner == thread else None
            self._unwanted.add(thread)
            keeper.changed.notify_all()
        if child is not None:
            child.kill(ExitReason.KILLED, "the call was cancelled")

    def want(self, thread: int) -> None:
        """``thread`` begins another call: what was cancelled before is past."""
        with self.keeper.lock:
            self._unwanted.discard(thread)


def _timeout(message: str, info: Any) -> CallTimeout:
    why = "" if info.reason is ExitReason.TIMEOUT else f" ({info.describe()})"
    error = CallTimeout(f"{message}; its child was killed{why}")
    error.exit_info = info
    return error
