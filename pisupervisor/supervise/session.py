"""One isolator's engine: its child, whose turn it is to call, and what happens when the child dies."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pihost import wire
from pisupervisor.errors import (
    CallTimeout,
    IsolationError,
    IsolatorClosed,
    LaunchError,
    ProtocolError,
    RestartLimitReached,
)
from pisupervisor.launch.templates import Template, release
from pisupervisor.link.calls import pack_call, unpack_answer
from pisupervisor.link.connection import Answer, Connection, DeadlinePassed, LinkClosed
from pisupervisor.link.sources import Code
from pisupervisor.options import IsolationOptions, check_timeout
from pisupervisor.results import Applied, ExitInfo, ExitReason, Usage
from pisupervisor.supervise import restart, spare
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.exits import termination
from pisupervisor.supervise.lifecycle import Event, State, next_state

_DEATH_GRACE = 0.25  # a child that closed its link gets this long to be seen dying of what it was doing


class Outcome(NamedTuple):
    """A call that was answered: its value, the answer's output, and (where captured) what the child had used before and after."""

    value: Any
    answer: Answer
    before: Usage
    after: Usage


class Session:
    """Belongs to one isolator, in one process. One call at a time; the thread that calls does the waiting."""

    def __init__(self, options: IsolationOptions, template: Template, without: tuple[str, ...] = ()) -> None:
        self.options, self.without = options, without
        self.owner = os.getpid()
        self.state: State = "starting"
        self.child: Child | None = None
        self.last_exit: ExitInfo | None = None
        self.applied: Mapping[str, Applied] = {}
        self._template: Template | None = template
        self._connection: Connection | None = None
        self._sent: set[str] = set()
        self._crashes: list[float] = []
        self._crashed = False  # whether the last child died of itself
        self._turn = threading.Lock()  # held for the time of one call
        self._holder: int | None = None  # the thread whose turn it is
        self._unwanted: set[int] = set()  # threads whose present call was cancelled while it waited
        self._lock = threading.Lock()  # held for a change of state
        self._closing = threading.Event()

    @property
    def template(self) -> Template:
        """Raises IsolatorClosed after ``close``."""
        template = self._template
        if template is None:
            raise IsolatorClosed("this isolator is closed")
        return template

    def check_open(self) -> None:
        """Raises IsolatorClosed after ``close``, and in a fork of the application."""
        if os.getpid() != self.owner:
            raise IsolatorClosed("this isolator belongs to the process that created it, not to a fork of it")
        if self.state == "stopped":
            raise IsolatorClosed("this isolator is closed")

    # --- calls ------------------------------------------------------------------------------------------------

    def call(
        self, verb: str, *arguments: Any, code: Code | None = None, timeout: float | None = None, idempotent: bool = False,
        capture: bool = False, returns: Any = None,
    ) -> Outcome:  # fmt: skip
        """Have one call done, on a new child where the last has died, and its answer understood. Raises what the call
        raised, CallTimeout, ChildTerminated, ProtocolError, RestartLimitReached, IsolatorClosed, LaunchError.
        """
        limit = self.options.call_timeout if timeout is None else check_timeout(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        body = pack_call(verb, capture, *arguments)
        self._take_turn(deadline)
        try:
            self._begin()
            while True:
                child, connection = self._ready_child(deadline)
                try:
                    before = child.usage() if capture else Usage()
                    answer = self._exchange(connection, code, body, deadline, capture)
                    return Outcome(self._value(answer, returns), answer, before, child.usage() if capture else Usage())
                except LinkClosed:
                    info = self.bury(child, in_call=True)
                    if not idempotent or info.reason is ExitReason.KILLED:
                        raise termination(info).with_output(*connection.written) from None
                except DeadlinePassed:
                    self._end(child, ExitReason.TIMEOUT, f"the call was still running after {limit:g} s")
                    message = f"the call was still running after {limit:g} s; its child was killed"
                    raise CallTimeout(message).with_output(*connection.written) from None
                except ProtocolError as error:
                    self._end(child, ExitReason.PROTOCOL, str(error))
                    raise
                except IsolationError:
                    raise  # the call's own outcome
                except BaseException as error:  # such as KeyboardInterrupt: an answer nobody waits for must not come
                    self._end(child, ExitReason.KILLED, f"the call was interrupted by {type(error).__name__}")
                    raise
        finally:
            self._holder = None
            self._turn.release()

    def _begin(self) -> None:
        """The turn is won: from here on ``cancel`` means the child; what was cancelled before does not run."""
        own = threading.get_ident()
        with self._lock:
            self._holder = own
            unwanted = own in self._unwanted
        if unwanted:
            raise IsolatorClosed("the call was cancelled before it ran")

    def _exchange(
        self, connection: Connection, code: Code | None, body: bytes, deadline: float | None, capture: bool
    ) -> Answer:
        self._enter("call")
        if code is not None and code.key not in self._sent:
            connection.send(wire.CODE, pickle.dumps(code.payload(), 5), deadline=deadline)
            self._sent.add(code.key)
        try:
            return connection.call(body, deadline, int(self.options.limits.output) if capture else None)
        finally:
            self._enter("answered")

    def _value(self, answer: Answer, returns: Any) -> Any:
        try:
            return unpack_answer(answer, pickled=self.options.results == "pickle", returns=returns)
        except IsolationError as error:
            error.with_output(answer.stdout, answer.stderr, answer.truncated)
            raise

    def _take_turn(self, deadline: float | None) -> None:
        self.check_open()
        left = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._turn.acquire(timeout=left):
            raise CallTimeout("other calls were still running at the deadline; this one was not started")
        try:
            self.check_open()
        except BaseException:
            self._turn.release()
            raise

    # --- the child --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Launch a child, or take the spare one. The state is "starting"."""
        template, limit = self.template, self.options.start_timeout
        deadline = None if limit is None else time.monotonic() + limit
        try:
            child = None if self.without else spare.take(template, self.options, deadline)
            if child is None:
                child = Child(self.options, template)
                child.request(self.without)
                _import_call_path()
                child.complete(deadline)
        except BaseException:
            self._enter("launch_failed")
            raise
        self._adopt(child)
        if self.options.debug:
            line = (
                f"pisupervisor: child {child.pid} is stopped before user code; debug it, then: kill -CONT {child.pid}\n"
            )
            sys.stderr.write(line)
            sys.stderr.flush()

    def _adopt(self, child: Child) -> None:
        with self._lock:
            closed = self.state == "stopped"  # by another thread, while this one launched
            if not closed:
                self._connection = Connection(child.link, int(self.options.limits.result))
                self._sent, self.child, self.applied = set(), child, child.applied
                self.state = next_state(self.state, "launched")
        if closed:
            child.discard("the isolator was closed")
            raise IsolatorClosed("this isolator is closed")

    def _ready_child(self, deadline: float | None) -> tuple[Child, Connection]:
        """The child for the next call, started anew where the last one has died. Called with the turn held."""
        child = self.child
        if child is not None and child.ended:
            self.bury(child)
        if self.child is None:
            self._restart(deadline)
        child, connection = self.child, self._connection
        if child is None or connection is None:
            raise IsolatorClosed("this isolator is closed")
        return child, connection

    def _restart(self, deadline: float | None) -> None:
        policy, info = self.options.restart, self.last_exit
        if info is not None and not restart.permits(policy, info, crashed=self._crashed):
            raise IsolatorClosed(f"the child {info.describe()}, and restart mode {policy.mode!r} starts no other")
        now = time.monotonic()
        delay = None if self.state == "failed" else restart.decide(policy, self._crashes, now)
        if delay is None:
            self._enter("gave_up")
            last = info.describe() if info is not None else "its launch failed"
            raise RestartLimitReached(f"{len(self._crashes)} crashes within {policy.within:g} s; the last: {last}")
        if deadline is not None and now + delay > deadline:
            raise CallTimeout(f"the child crashed, and the next one starts in {delay:.1f} s, after the deadline")
        if self._closing.wait(delay):
            raise IsolatorClosed("this isolator is closed")
        self._enter("restart")
        try:
            self.start()
        except LaunchError:
            self._crashes.append(time.monotonic())
            raise

    def bury(self, child: Child, *, in_call: bool = False) -> ExitInfo:
        """Take the account of a child that is dying or closed its link, and remember it for the restart policy."""
        if not child.wait(_DEATH_GRACE):
            child.kill(ExitReason.PROTOCOL, "it closed its link and lived on")
        info = child.finish()
        with self._lock:
            if self.child is not child:
                return info
            self.child = self._connection = None
            self.last_exit = info
            self._crashed = restart.is_crash(info, in_call=in_call)
            if self._crashed:
                self._crashes = [*self._crashes, time.monotonic()][-self.options.restart.max_restarts - 1 :]
            self.state = next_state(self.state, "child_died")
        return info

    def _end(self, child: Child, reason: ExitReason, message: str) -> None:
        child.kill(reason, message)
        self.bury(child)

    def _enter(self, event: Event) -> None:
        with self._lock:
            self.state = next_state(self.state, event)

    # --- from outside -----------------------------------------------------------------------------------------

    def terminate(self) -> None:
        self.check_open()
        child = self.child
        if child is not None:
            child.kill(ExitReason.KILLED, "terminate() was called")
            child.wait(_DEATH_GRACE * 4)

    def cancel(self, thread: int) -> None:
        """End the call that ``thread`` makes: kill its child if it is that call's turn, else see that it does not run."""
        with self._lock:
            child = self.child if self._holder == thread else None
            if self._holder != thread:
                self._unwanted.add(thread)
        if child is not None:
            child.kill(ExitReason.KILLED, "the call was cancelled")

    def want(self, thread: int) -> None:
        """``thread`` begins another call: what was cancelled before is past."""
        with self._lock:
            self._unwanted.discard(thread)

    def wait_for_exit(self, timeout: float | None) -> ExitInfo:
        child = self.child
        if child is None:
            if self.last_exit is None:
                raise IsolatorClosed("this isolator has had no child")
            return self.last_exit
        if not child.wait(timeout):
            raise TimeoutError(f"the child is still running after {timeout:g} s")
        return child.finish()

    def usage(self) -> Usage:
        child = self.child
        return child.usage() if child is not None else Usage()

    def close(self) -> None:
        """Idempotent. In a fork of the application nothing happens: it must not end what belongs to the original."""
        if os.getpid() != self.owner:
            return
        self._closing.set()
        with self._lock:
            self.state = next_state(self.state, "close")
            child, self.child, self._connection = self.child, None, None
            template, self._template = self._template, None
        try:
            self._close_child(child, template)
        finally:
            if template is not None:
                release(template)

    def _close_child(self, child: Child | None, template: Template | None) -> None:
        if child is not None:
            child.kill(ExitReason.KILLED, "the isolator was closed")
            if template is not None and template.users > 1 and not self.without:
                spare.prepare(template, self.options)  # launched while the old one dies
            self.last_exit = child.finish()


def _import_call_path() -> None:
    """What the first call will need, imported while the zygote works: 10 ms that nobody then waits for."""
    import pisupervisor.link.arguments
    import pisupervisor.link.serializer  # noqa: F401

    if len(os.sched_getaffinity(0)) > 1:  # on a single CPU nothing is won, and small answers do without
        import msgspec.json  # noqa: F401
