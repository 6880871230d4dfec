"""One supervised child: from its launch to the account of its end. Owns its link, status socket and group."""

from __future__ import annotations

import _signal as signal  # signal imports enum for names that nobody needs here
import os
import select
import threading
import time

from pisupervisor.errors import IsolationError, LaunchError
from pisupervisor.launch.templates import Template
from pisupervisor.launch.zygote import has_ended, host_failure, send_kill
from pisupervisor.limits import cgroups
from pisupervisor.limits.freezer import Freezer, make_freezer
from pisupervisor.options import IsolationOptions
from pisupervisor.records import replace
from pisupervisor.results import Applied, ExitInfo, ExitReason
from pisupervisor.supervise import groups, metrics
from pisupervisor.supervise.birth import LAUNCH_GRACE, Birth
from pisupervisor.supervise.exits import explain_exit, limits_matter
from pisupervisor.supervise.output import Line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from pisupervisor.link.bells import PollBell

END_GRACE = 5.0  # seconds for the kernel to empty a killed pid namespace; measured: 1 to 5 ms
DEATH_GRACE = 0.25  # seconds for a child that closed its link to be seen dying of what it was doing
_BUSY_GRACE = 1.5  # the same where its payload is dead
_DISCARD_GRACE = 1.0  # the same for a child that nobody has used
_AGAIN = 0.005  # seconds from one look to the next where nothing tells of the end
_QUICK_END = 0.02  # seconds; who takes longer may be held back by its CPU quota
_KILLED_END = 0.008  # the same of one that we have killed: at 0.1 cores ten loops took 200 ms to die, with this 50
_IN_THE_ACCOUNT = (
    "the child has ended, and this thread is giving back what it had: a signal's handler came in between; leave that to the "
    "thread, or to another one"
)


class Child(Birth):
    """A running child. ``request`` and ``complete`` make it; ``link`` is the socket that calls go over."""

    def __init__(self, options: IsolationOptions, template: Template) -> None:
        super().__init__(options, template)
        self.applied: dict[str, Applied] = {}
        self.last_events = cgroups.GroupEvents()  # the counters at its end
        self.last_lines: list[Line] = []  # what it wrote last
        self.requesting = True  # until the plan is with the zygote
        self.exit_info: ExitInfo | None = None
        self.calls = 0  # under way in it
        self.is_killed = False  # whether we have: it may take a moment to die
        self._cpu_time: float | None = None  # at that moment, where no group counts it
        self.started = time.monotonic()
        # Re-entrant, both: a signal's handler may come in while its thread has one, and end the child.
        self._lock = threading.RLock()
        self._accountant = 0  # the thread that takes the account
        self._freezer: Freezer | None = None
        self._pausing = threading.RLock()  # taken before _lock, never after
        self._is_paused = False  # by the application; see ``hold_back``
        self._is_held = False
        self._farewell = ""

    # --- launch -----------------------------------------------------------------------------------------------

    def request(self, without: tuple[str, ...] = (), *, when_idle: bool = False, deadline: float | None = None) -> None:
        """The first half: make the group, hand the plan to the zygote, do not wait for the child. ``when_idle``: see ``hurry``.
        ``deadline``: for a zygote so busy that there is no room for a request.
        """
        try:
            self._request(without, when_idle, deadline)
        except BaseException as error:
            self._undo(error)
        self.requesting = False

    def hurry(self) -> None:
        """Somebody waits for it now."""
        if self._when_idle:
            self._zygote.hurry()

    def complete(self, deadline: float | None) -> None:
        """The second half: wait until it is ready, and read back what holds."""
        try:
            self._await_ready(self._zygote, deadline)
            self.applied = self._held()
            self.started = time.monotonic()
        except BaseException as error:
            self._undo(error)

    def _held(self) -> dict[str, Applied]:
        try:
            return self._read_back()
        except LaunchError:
            # A dead child has no walls: that is no defect of theirs. It leaves its groups before its pidfd says so.
            if has_ended(self.payload_pidfd, LAUNCH_GRACE):
                from pisupervisor.launch.remedies import LOOK

                raise LaunchError("the child ended as soon as it was ready", step="payload", remedy=LOOK) from None
            raise

    def _undo(self, error: BaseException) -> NoReturn:
        """Its launch has failed: leave nothing of it, and tell why."""
        self.discard("its launch failed", LAUNCH_GRACE)
        if isinstance(error, OSError):
            raise host_failure(error) from error
        raise error

    def discard(self, why: str, grace: float = _DISCARD_GRACE) -> ExitInfo:
        """Kill it and give everything back. Nobody asks how it ended, and a stopped zygote is not waited for."""
        self.kill(ExitReason.KILLED, why)
        return self.finish(grace)

    # --- death ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether PID 1 of the sandbox, and with it everything inside, is gone."""
        return self.wait(0)

    def wait(self, timeout: float | None) -> bool:
        """Wait until it has ended; False if it has not after ``timeout`` seconds."""
        with self._hold():
            if self.exit_info is not None:
                return True
            if timeout == 0 or self.init_pidfd < 0:
                return self.init_pidfd >= 0 and has_ended(self.init_pidfd)
            try:  # another thread may take the account, and close ours, while this one waits
                fd = os.dup(self.init_pidfd)
            except OSError:
                fd = -1
        if fd < 0:
            return self._ask_until_ended(timeout)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(None if timeout is None else timeout * 1000))
        finally:
            os.close(fd)

    def wait_with(self, bell: PollBell) -> bool:
        """Wait until it has ended, or the bell rings; whether it has ended."""
        with self._hold():
            if self.exit_info is not None or self.init_pidfd < 0:
                return self.exit_info is not None
            fd = os.dup(self.init_pidfd)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(bell, select.POLLIN)
            return fd in (ready for ready, _event in poll.poll())
        finally:
            os.close(fd)

    def _ask_until_ended(self, timeout: float | None) -> bool:
        """``wait`` where no descriptor is to be had."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.wait(0):
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(_AGAIN)
        return True

    @property
    def payload_ended(self) -> bool:
        """Whether its payload is gone, which PID 1 may not have noticed yet."""
        with self._hold():
            return self.exit_info is not None or has_ended(self.payload_pidfd)

    def leaves(self) -> bool:
        """Whether it ends within a moment: it has closed its link. One whose payload is dead does, but on a busy machine, or
        beside others under a small quota, its PID 1 may wait for CPU time (and one that was paused may be frozen).
        """
        if self.is_killed and not self.wait(_KILLED_END) and self._group is not None:
            self._group.let_die()
        if self.wait(DEATH_GRACE):
            return True
        if not self.payload_ended or self._freezer is not None:
            return False
        if self._group is not None:
            self._group.let_die()
        return self.wait(_BUSY_GRACE)

    def is_over(self) -> bool:
        """For a caller who has heard nothing for a while: whether it has ended, or is to end because the kernel has killed
        a part of it for memory. v2 kills all of it then (memory.oom.group); on v1 the rest would wait for the lost part.
        """
        if self.meter.has_lost_a_process():
            self.kill(ExitReason.MEMORY, "the kernel killed one of its processes; the rest was ended")
        return self.wait(0)

    def is_dying(self) -> bool:
        """Whether its payload is gone, or a signal is on the way to it."""
        return self.payload_ended or metrics.has_signal_pending(self.pid)

    def kill(self, reason: ExitReason, message: str = "") -> None:
        """``cgroup.kill`` where that is; and SIGKILL to PID 1, through its pidfd: the kernel then ends everything in its
        namespace. The first order wins.
        """
        with self._hold():
            self._kill_locked(reason, message)

    def kill_late(self) -> None:
        """At the deadline of a call whose callback still runs here."""
        self.kill(ExitReason.TIMEOUT, "a call was still running at its deadline, in a callback of the host")

    def _kill_locked(self, reason: ExitReason, message: str) -> None:
        if self.exit_info is not None:
            return
        if self.init_pidfd >= 0 and has_ended(self.init_pidfd):
            return  # of something else, and that is the first cause
        if self._ordered is None:
            self._ordered = (reason, message)
        if self._group is None and self.applied and not self.is_killed:
            # Before: what dies with PID 1 is in no rusage (seen on 6.18: 0.001 s of 1.2): the kernel ignores SIGCHLD then.
            self._cpu_time = self.meter.cpu_time()
        self.is_killed = True
        freezer = self._freezer
        if freezer is not None:
            freezer.kill()  # what is paused is in a group of its own
        if self._group is not None:
            self._group.kill_at_once()
        if self.init_pidfd >= 0:
            send_kill(self.init_pidfd)

    def _kill_for_syscall(self, message: str) -> bool:
        """By the listener's thread, which whoever takes the account waits for: it must not wait for that in turn."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._kill_locked(ExitReason.SECCOMP, message)
        finally:
            self._lock.release()
        return True

    def order(self, reason: ExitReason, message: str) -> None:
        """The same account, for an end that is only asked for: by a signal that the child may heed."""
        with self._hold():
            alive = self.exit_info is None and not has_ended(self.init_pidfd)
            if alive and self._ordered is None:
                self._ordered = (reason, message)

    def farewell(self, message: str) -> None:
        """It is told to leave: its end is no order of ours, but the message belongs to it."""
        with self._hold():
            self._farewell = message

    def signal_payload(self, number: int) -> None:
        """Send a signal to the payload alone; nothing happens when it has ended."""
        with self._hold():
            if self.exit_info is None:
                try:
                    signal.pidfd_send_signal(self.payload_pidfd, number)
                except ProcessLookupError:
                    pass

    def finish(self, timeout: float = END_GRACE, *, in_call: bool = False, truncated: bool = False) -> ExitInfo:
        """Wait for the end, take the account, give everything back. Idempotent; the account is then in ``exit_info``.
        ``in_call`` and ``truncated``: see ``explain_exit``.
        """
        with self._hold():
            if self.exit_info is None:
                self._accountant = threading.get_ident()
                try:
                    self.exit_info = self._account(timeout, in_call, truncated)
                finally:
                    self._accountant = 0
        self._remove_freezer()
        return self.exit_info

    def _hold(self) -> threading.RLock:
        """The lock. Raises IsolationError in a signal's handler that has interrupted its own thread in the account: that can
        be neither waited for nor taken twice.
        """
        if self._accountant == threading.get_ident():
            raise IsolationError(_IN_THE_ACCOUNT)
        return self._lock

    def _account(self, timeout: float, in_call: bool, truncated: bool) -> ExitInfo:
        deadline = time.monotonic() + timeout
        if self.init_pidfd >= 0:
            self._reports.drain(min(deadline, time.monotonic() + _QUICK_END), self.init_pidfd)
            if not self._reports.is_gone and self._group is not None:
                self._group.let_die()
            self._reports.drain(deadline, self.init_pidfd)
        elif self._asked:
            self._reports.abandon(deadline)
        events, used = cgroups.GroupEvents(), cgroups.GroupUsage()
        if self._group is not None:
            used = self._group.used()
            if self.options.events is not None or limits_matter(self._ordered[0] if self._ordered else None):
                events = self._group.events()
            self._part_with(self._group, deadline)
        self.last_events = events
        self.last_lines = self.pipes.finish() if self.pipes is not None else []
        tail = self._output.tail() if self._asked else ""
        while self._cleanup:
            self._cleanup.pop()()  # off the list first: whatever interrupts us, nothing is closed twice
        ordered, message = self._ordered or (None, self._farewell)
        info = explain_exit(
            self._reports.known if self._asked else {}, events.since(self.meter.before), ordered,
            duration=time.monotonic() - self.started, peak_memory=used.peak_memory,
            cpu_time=self._cpu_time if used.cpu_time is None else used.cpu_time,
            message=message, cpu_limit=self.options.limits.cpu_time, in_call=in_call, truncated=truncated, stderr_tail=tail,
            killed=self.is_killed and self._asked,
        )  # fmt: skip
        if info.reason is ExitReason.SECCOMP and self.listener is not None:
            info = replace(info, syscall=self.listener.killed_for)
        return info

    def _part_with(self, group: cgroups.ChildGroup, deadline: float) -> None:
        has_lived = self._asked and self._reports.is_gone and self.applied  # with limits as they were asked for
        if has_lived and groups.keep(self.template, cgroups.wanted_limits(self.options.limits), group):
            return
        if not group.remove():
            group.kill(max(0.0, deadline - time.monotonic()))
            group.remove()

    # --- pause ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Freeze every process: but PID 1, unless the child's own v2 group does it. Raises IsolationError, also for a child
        that is dead.
        """
        with self._pausing:
            if self.ended:
                raise IsolationError("there is nothing to pause: the child has ended")
            self._stop()
            self._is_paused = True

    def _stop(self) -> bool:
        if self._freezer is None:
            own = self._group.freezer() if self._group is not None else None
            self._freezer = own or make_freezer(
                self.template.features.cgroups, groups.next_name(), self.meter.frozen_pids
            )
        return self._freezer.pause()

    def resume(self) -> None:
        with self._pausing:
            self._is_paused = self._is_held = False
            if self._freezer is not None:
                self._freezer.resume()

    def hold_back(self) -> bool:
        """Stop everything for a moment, on the supervisor's own behalf; whether something ran that was held back already.
        Raises IsolationError. What the application has paused stays so, whoever lets go.
        """
        with self._pausing:
            if self._is_paused or self.ended:
                return False
            was_held, self._is_held = self._is_held, True
            return self._stop() and was_held

    def let_go(self) -> None:
        with self._pausing:
            self._is_held = False
            if not self._is_paused and self._freezer is not None:
                self._freezer.resume()

    def _remove_freezer(self) -> None:
        with self._pausing:
            freezer, self._freezer = self._freezer, None
            if freezer is not None:
                freezer.remove()
