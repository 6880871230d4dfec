"""One isolator's child and what becomes of it: launched, dead, replaced, or not."""

from __future__ import annotations

import _signal as signal
import os
import threading
import time
from collections.abc import Callable, Mapping

from pisupervisor.errors import CallTimeout, IsolatorClosed, LaunchError
from pisupervisor.launch.templates import Template, release
from pisupervisor.link.callers import this_caller
from pisupervisor.link.connection import Connection, NeverSent
from pisupervisor.link.reader import reader_for
from pisupervisor.options import IsolationOptions
from pisupervisor.results import Applied, ExitInfo, ExitReason
from pisupervisor.supervise import replacing, restart, spare, watch
from pisupervisor.supervise.child import DEATH_GRACE, Child
from pisupervisor.supervise.lifecycle import next_state
from pisupervisor.supervise.starting import LIVED_ON, FirstCall
from pisupervisor.supervise.telling import Teller
from pisupervisor.supervise.turn import Turn, wake

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.link.answers import Answerer
    from pisupervisor.supervise.lifecycle import Event, State
    from pisupervisor.supervise.listener import Log

CALLED, ANSWERED = next_state("ready", "call"), next_state("busy", "answered")
_TIDYING = 1.0  # seconds for another thread to give up a launch that was stopped; measured: 2 to 10 ms
_FRESH = 0.001  # seconds after an answer in which a child counts as alive; if it is not, its link tells before a call is sent


class Keeper:
    """Belongs to one isolator, in one process. ``turn`` is held for the time of one call, or of one restart."""

    def __init__(
        self, options: IsolationOptions, template: Template, isolator_id: int, without: tuple[str, ...] = ()
    ) -> None:
        self.options, self.id, self.without = options, isolator_id, without
        self.owner = os.getpid()
        self.state: State = "starting"
        self.child: Child | None = None
        self.connection: Connection | None = None
        self.last_exit: ExitInfo | None = None
        self.last_pid: int | None = None
        self.applied: Mapping[str, Applied] = {}
        self.reader = reader_for(options)
        self.first_calls: list[FirstCall] = []  # that each new child gets
        self.answer: Answerer | None = None  # what a child asks of the host is answered by this
        self.idle_since = time.monotonic()
        self._replacing = threading.Lock()  # by one of the calls that have seen the child die
        self.lock = threading.RLock()  # held for a change of state
        self.turn = Turn(options.max_concurrency, self.lock)
        self.changed = threading.Condition(self.lock)  # of the state, or of what somebody wants
        self.closed = threading.Event()
        self.stops = 0  # how often a stop was asked for: a launch or a wait that began before is overtaken
        self.overtaken = 0  # the stops, up to the last one that came while a restart was waited for
        self.launching: Child | None = None
        self.launcher = 0  # the caller whose call has it launched
        self.starter = 0  # the thread that launches
        self._template: Template | None = template
        self.crashes = restart.Crashes(options.restart)
        self.crashed = False  # whether the last child died of itself
        self.is_left = False  # exit() was called, and restart() not since
        self.unsettled: set[int] = set()  # crashes whose handlers have not returned yet
        self.log: Log | None = None
        self.watched = self._watched()
        self._watch: watch.Watch | None = None
        self._start_threads()

    def _watched(self) -> tuple[str, ...]:
        """Limits that have no group to hold them, and are watched instead."""
        if not self.options.degrade:
            return ()
        from pisupervisor.supervise import stand_in

        return stand_in.watched(self.options, self.template.features.cgroups)

    def _start_threads(self) -> None:
        """Those that the options ask for. Raises LaunchError."""
        try:
            self.teller = Teller(self.options, self.id, self._settle)
            try:
                # A listener's thread may be the one in which we are collected, and cannot end itself (see ``abandon``).
                is_needed = self.watched or self.template.answers is not None or watch.is_needed(self.options)
                self._watch = watch.Watch(self) if is_needed else None
            except BaseException:
                self.teller.close()
                raise
        except (RuntimeError, OSError) as error:
            remedy = "raise ulimit -u and ulimit -n, or ask for nothing that needs a helper thread"
            raise LaunchError(f"no helper thread: {error}", step="watch", remedy=remedy) from error

    @property
    def template(self) -> Template:
        """Raises IsolatorClosed after ``close``."""
        template = self._template
        if template is None:
            raise IsolatorClosed("this isolator is closed")
        return template

    def present_template(self) -> Template:
        return self.template

    def check_not_overtaken(self, stops: int) -> None:
        """For who came after so many stops, and waited behind another who waited for a restart."""
        if stops < self.overtaken:
            raise IsolatorClosed("the isolator was stopped while a restart was waited for")

    def check_open(self) -> None:
        """Raises IsolatorClosed after ``close``, and in a fork of the application."""
        self.check_owner()
        if self.closed.is_set():
            raise IsolatorClosed("this isolator is closed")

    def check_owner(self) -> None:
        if os.getpid() != self.owner:
            raise IsolatorClosed("this isolator belongs to the process that created it, not to a fork of it")

    def enter(self, event: Event) -> None:
        with self.lock:
            self.enter_locked(event)

    def enter_locked(self, event: Event) -> None:
        if not self.closed.is_set():
            self.state = next_state(self.state, event)
            self.changed.notify_all()

    # --- for its children ---------------------------------------------------------------------------------------

    def forget_memory(self, number: int) -> None:
        """A shared array is gone here. Comes from a collector, at any moment: the child is told with the next call."""
        connection = self.connection
        if connection is not None and os.getpid() == self.owner:
            connection.forget_memory(number)

    def log_of(self, template: Template) -> Log | None:
        """Where a listener notes what it sees, kept for all children. None: nobody listens."""
        if template.answers is not None and self.log is None:
            from pisupervisor.supervise.listener import Log

            self.log = Log(lambda call: self.teller.tell("SystemCallSeen", call.pid, call=call))
        return self.log

    # --- restart ----------------------------------------------------------------------------------------------

    def usable_child(self) -> tuple[Child, Connection] | None:
        """The child for the next call, where there is one that lives."""
        child, connection = self.child, self.connection
        if child is None or connection is None or child.is_killed:
            return None
        if time.monotonic() - self.idle_since > _FRESH and child.payload_ended:
            return None
        return child, connection

    def ready_child(self, deadline: float | None, wanted: Callable[[], bool], stops: int) -> tuple[Child, Connection]:
        """The same, started anew where the last one has died. Called with a turn held, by who came after so many stops."""
        if not self._replacing.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise CallTimeout("another child was still being started at the deadline; the call was not begun")
        try:
            child = self.child
            if child is not None and (child.payload_ended or child.is_killed):
                self.bury(child)
            if self.child is None:
                self.check_not_overtaken(stops)
                self.launcher = this_caller()
                replacing.replace(self, deadline, wanted)
        finally:
            self.launcher = 0
            self._replacing.release()
        child, connection = self.child, self.connection
        if child is None or connection is None:
            self.check_open()
            raise IsolatorClosed("the isolator was stopped before the call began")
        return child, connection

    # --- calls ------------------------------------------------------------------------------------------------

    @property
    def in_call(self) -> bool:
        child = self.child
        return child is not None and child.calls > 0

    def begin_call(self, child: Child) -> bool:
        """True. Raises NeverSent where that is no longer the child."""
        with self.lock:
            if self.child is not child:
                raise NeverSent  # stopped or closed by another thread in this very moment
            child.calls += 1
            if child.calls == 1 and not self.closed.is_set():
                self.state = next_state(self.state, "call")  # nobody waits for that
        child.meter.begin_call()
        return True

    def begin_at_once(self, caller: int, connection: Connection) -> Child | None:
        """The turn, the child and its beginning of a call in one, where nothing stands in the way of that."""
        if os.getpid() != self.owner:
            return None
        now = time.monotonic()
        with self.lock:
            child, rules = self.child, self.turn.rules
            if child is None or self.state != "ready" or child.is_killed or self.connection is not connection:
                return None
            if rules.users or rules.waiting or (now - self.idle_since > _FRESH and child.payload_ended):
                return None
            rules.users[caller] = "plain"
            child.calls = 1
            self.state = CALLED
        if now > child.meter.look_at:
            child.meter.begin_call(now)
        return child

    def end_at_once(self, caller: int, child: Child) -> None:
        with self.lock:
            child.calls -= 1
            if self.child is child:
                if self.state == CALLED:
                    self.state = ANSWERED
                elif not self.closed.is_set():
                    self.state = next_state(self.state, "answered")
            rules = self.turn.rules
            if rules.waiting:
                admitted = rules.leave(caller)
            else:
                admitted = None
                del rules.users[caller]  # a plain call, of which nothing else is counted
        self.idle_since = time.monotonic()
        if admitted:
            wake(admitted)

    def end_call(self, child: Child) -> None:
        with self.lock:
            child.calls -= 1
            if not child.calls and self.child is child and not self.closed.is_set():
                self.state = next_state(self.state, "answered")
        self.idle_since = time.monotonic()

    # --- death ------------------------------------------------------------------------------------------------

    def bury(self, child: Child, *, truncated: bool | None = None, within: bool = False) -> ExitInfo:
        """Take the account of a child that is dying or closed its link, and decide what it means. Any thread may come
        first; the account is the same for all. ``truncated``: the call that ran reached its output limit; only the
        thread that calls knows, and goes before all others. ``within``: by a thread that is itself in the middle of a call.
        """
        if truncated is None:
            self._let_callers_go_first(child, own=int(within))
        if not child.leaves():
            child.kill(ExitReason.PROTOCOL, LIVED_ON)
        info = child.finish(in_call=child.calls > 0 and child is self.child, truncated=bool(truncated))
        with self.lock:
            if self.child is not child:
                return info
            connection = self.connection
            self.crashed = self.state != "stopping" and restart.is_crash(info, in_call=child.calls > 0)
            self.child = self.connection = None
            self.last_exit, self.last_pid = info, child.pid
            crash = self.add_crash() if self.crashed and not self.closed.is_set() else 0
            due = restart.permits(self.options.restart, info, crashed=self.crashed)
            self.enter_locked("child_died" if due else "ended")
        if connection is not None:
            connection.give_up()
            connection.forget_arenas()
        self.teller.ended(child, crash, truncated=bool(truncated))
        self.wake_watch()
        return info

    def add_crash(self) -> int:
        crash = self.crashes.add(time.monotonic())
        if self.teller.wants("exit_with_error"):
            self.unsettled.add(crash)
        return crash

    def _let_callers_go_first(self, child: Child, own: int) -> None:
        deadline = time.monotonic() + DEATH_GRACE
        while child.calls > own and self.child is child and time.monotonic() < deadline:
            time.sleep(0.001)  # they are reading from the link, and see its end now

    def end(self, child: Child, reason: ExitReason, message: str, *, truncated: bool | None = None) -> ExitInfo:
        child.kill(reason, message)
        return self.bury(child, truncated=truncated)

    def await_starter(self) -> bool:
        """After a kill of what is launched: wait until the thread that does it has tidied up, unless that is this one (a signal's
        handler, a callback of on_start). Not for ever: it may wait for whoever stops. Whether nothing is left of the launch.
        """
        with self.lock:
            here = (0, threading.get_ident())
            return self.changed.wait_for(lambda: self.starter in here, _TIDYING) and self.starter == 0

    def forget_crashes(self) -> None:
        with self.lock:
            self.crashes.clear()

    def notice(self) -> None:
        """See whether the child has died while nobody was looking."""
        child = self.child
        if child is not None and os.getpid() == self.owner and not child.calls and child.ended:
            self.bury(child)

    def _settle(self, kind: str, crash: int, handled: bool) -> None:
        """After the handler of an event: what ``handled`` changes, and what happens where nobody handled it."""
        with self.lock:
            self.unsettled.discard(crash)
            if handled and crash:
                self.crashes.forgive(crash)
            if handled and kind == "restart_attempts_exceeded":
                self.crashes.clear()
            if handled and self.state == "failed" and self.crashes.delay(time.monotonic()) is not None:
                self.state = "backoff"
            self.changed.notify_all()
        self.wake_watch()
        if kind == "exit_with_error" and not handled and self.options.die_on_crash and not self.closed.is_set():
            os.kill(self.owner, signal.SIGTERM)

    def ends_pause(self) -> bool:
        """After a callback: whether it has left its child paused where nobody else could resume it. It runs on then."""
        if self.state != "paused" or _other_threads():
            return False
        from pisupervisor.supervise import stopping

        stopping.resume(self)
        return True

    # --- the end ----------------------------------------------------------------------------------------------

    def wake_watch(self) -> None:
        if self._watch is not None:
            self._watch.wake()

    @property
    def is_given_back(self) -> bool:
        """Whether a ``close`` has come to its end."""
        return self.closed.is_set() and self.child is None and self._template is None

    def abandon(self) -> None:
        """What is left of ``close`` for the garbage collector."""
        if self._watch is not None and os.getpid() == self.owner and not self.closed.is_set():
            self._watch.abandon()
        else:
            self.close()

    def close(self) -> None:
        """Idempotent. In a fork of the application nothing happens: it must not end what belongs to the original."""
        if os.getpid() != self.owner:
            return
        with self.lock:
            self.enter_locked("close")
            self.closed.set()
            self.changed.notify_all()
            child, launching = self.child, self.launching
            template, self._template = self._template, None
        try:
            if launching is not None:
                launching.kill(ExitReason.KILLED, "the isolator was closed")  # who launches it sees that, and tidies up
            if child is not None:
                self._close_child(child, template)
            self.await_starter()
        finally:
            if template is not None:
                release(template)
            if self._watch is not None:
                self._watch.close()
            self.teller.close()

    def _close_child(self, child: Child, template: Template | None) -> None:
        child.kill(ExitReason.KILLED, "the isolator was closed")
        if template is not None and not self.without:
            spare.closing(template, self.options)
        self.bury(child, within=self.turn.is_mine())


def _other_threads() -> list[threading.Thread]:
    """The application's own."""
    here = threading.current_thread()
    return [one for one in threading.enumerate() if one is not here and not one.name.startswith("pisupervisor-")]
