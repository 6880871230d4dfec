"""One supervised child: launch, read back, kill, and the account of its end. Owns its link, status socket and group."""

from __future__ import annotations

import _signal as signal  # signal and socket import enum for names that nobody needs here: 5 ms of a start
import _socket as socket
import itertools
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pihost import wire
from pisupervisor.errors import IsolationError, LaunchError
from pisupervisor.launch import attest, planning
from pisupervisor.launch.templates import Template
from pisupervisor.launch.zygote import Zygote, deadline_left, failure, has_ended, host_failure
from pisupervisor.limits import cgroups, rlimits
from pisupervisor.limits.freezer import Freezer, make_freezer
from pisupervisor.options import IsolationOptions
from pisupervisor.results import Applied, ExitInfo, ExitReason
from pisupervisor.supervise import metrics
from pisupervisor.supervise.exits import explain_exit, limits_matter
from pisupervisor.supervise.output import Line, OutputPipes, StderrTail
from pisupervisor.supervise.reports import Reports, send_kill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CREDENTIALS = struct.Struct("3i")
END_GRACE = 5.0  # seconds for the kernel to empty a killed pid namespace; measured: 1 to 5 ms
_LAUNCH_GRACE = 0.2  # the same for a launch that failed: a zygote that hangs must not hold the caller as well
_DISCARD_GRACE = 1.0  # the same for a child that nobody has used
_QUICK_END = 0.02  # seconds; who takes longer may be held back by its CPU quota


class Child:
    """A running child. ``launch`` makes one; ``link`` is the socket that calls go over."""

    def __init__(self, options: IsolationOptions, template: Template) -> None:
        self.options, self.template = options, template
        self.pid = 0  # of the payload, as this process numbers it
        self.init_pidfd = self.payload_pidfd = -1
        self.init_pid = 0  # PID 1 of the sandbox, as this process numbers it
        self.applied: dict[str, Applied] = {}
        self.pipes: OutputPipes | None = None  # where the application wants to see what is written
        self.last_events = cgroups.GroupEvents()  # the counters at its end
        self.last_lines: list[Line] = []  # what it wrote last
        self.requesting = True  # until the plan is with the zygote
        self.exit_info: ExitInfo | None = None
        self.is_killed = False  # whether we have: it may take a moment to die
        self.started = time.monotonic()
        self._ordered: tuple[ExitReason, str] | None = None
        self._reports: Reports
        self._lock = threading.Lock()
        self._outer_id: int | None = None
        self._group: cgroups.ChildGroup | None = None
        self.meter = metrics.Meter()
        self._freezer: Freezer | None = None
        self._pausing = threading.Lock()  # taken before _lock, never after
        self._output: OutputPipes | StderrTail
        self.link: socket.socket
        self._farewell = ""
        self._asked = False  # whether the zygote was given the plan
        self._cleanup: list[Callable[[], object]] = []

    # --- launch -----------------------------------------------------------------------------------------------

    def request(self, without: tuple[str, ...] = (), *, when_idle: bool = False) -> None:
        """The first half: make the group, hand the plan to the zygote, do not wait. ``when_idle``: see ``hurry``."""
        self._when_idle = when_idle
        with self._undone_on_failure():
            self._request(without)
        self.requesting = False

    def hurry(self) -> None:
        """Somebody waits for it now."""
        if self._when_idle:
            self._zygote.hurry()

    def complete(self, deadline: float | None) -> None:
        """The second half: wait until it is ready, and read back what holds."""
        with self._undone_on_failure():
            self._await_ready(self._zygote, deadline)
            try:
                self.applied = self._read_back()
            except LaunchError:
                if has_ended(self.payload_pidfd):  # a dead child has no walls: that is no defect of theirs
                    raise LaunchError("the child ended as soon as it was ready", step="payload") from None
                raise
            self.started = time.monotonic()

    def _read_back(self) -> dict[str, Applied]:
        readings = attest.read(self.pid, self.template.host_links)
        self.meter.open(self._group, self.pid, self.init_pid)
        groups = self._group.read_back() if self._group is not None else {}
        filtered = bool(self.template.plan.seccomp)
        return attest.verify(
            self._plan, self.options, readings, filtered=filtered, groups=groups, missing=self._missing
        )

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard("its launch failed", _LAUNCH_GRACE)
            raise host_failure(error) from error
        except BaseException:
            self.discard("its launch failed", _LAUNCH_GRACE)
            raise

    def discard(self, why: str, grace: float = _DISCARD_GRACE) -> ExitInfo:
        """Kill it and give everything back. Nobody asks how it ended, and a stopped zygote is not waited for."""
        self.kill(ExitReason.KILLED, why)
        return self.finish(grace)

    def _request(self, without: tuple[str, ...]) -> None:
        self._missing = self._make_group(without)
        self._make_output()
        if self.template.ids is not None:
            self._outer_id = outer = self.template.ids.take()
            self._cleanup.append(partial(self.template.ids.give_back, outer))
        self._plan = planning.child_plan(
            self.options, self.template.features, interpreter=self.template.interpreter, outer_id=self._outer_id,
            rlimits=rlimits.rlimit_plan(self.options.limits), output=len(self._output.fds()),
            cgroups=len(self._attach_fds()), clone_flags=self._group.clone_flags if self._group is not None else 0,
            without=without,
        )  # fmt: skip
        self._zygote = self.template.usable_zygote()
        try:
            self._send_plan(self._zygote, self._plan)
        except LaunchError as error:
            # It was dying when it was asked: killed, but not yet seen to have ended. Once, with another.
            pidfd = self._zygote.pidfd  # -1: another thread has closed and replaced it
            if error.step != "zygote" or (pidfd >= 0 and not has_ended(pidfd, _LAUNCH_GRACE)):
                raise
            self._zygote = self.template.usable_zygote()
            self._send_plan(self._zygote, self._plan)

    def _make_group(self, without: tuple[str, ...]) -> dict[str, str]:
        """Create the group with all limits written. Returns why a limit is missing, by name (all of them degraded)."""
        host = self.template.features.cgroups
        lacking = planning.lacking_limits(self.options, host)
        if "limits" not in without and host.directories():
            self._group = cgroups.create_group(host, cgroups.wanted_limits(self.options.limits), _next_name())
        return lacking

    def _make_output(self) -> None:
        events = self.options.events
        if events is not None and events.wanted() & {"stdout", "stderr"}:
            self._output = self.pipes = OutputPipes()
        else:
            self._output = StderrTail()
        self._cleanup.append(self._output.close)

    def stdio(self) -> tuple[int, ...]:
        """Where its stdout and stderr (or stderr alone) go outside of captured calls."""
        return self._output.stdio()

    def _attach_fds(self) -> tuple[int, ...]:
        return self._group.attach_fds if self._group is not None else ()

    def _send_plan(self, zygote: Zygote, plan: Any) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cleanup.append(self.link.close)
        try:
            status, reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            theirs.close()
            raise
        self._reports = Reports(status)
        self._cleanup.append(status.close)
        # The kernel then tells who sends READY: the payload's pid as we number it, which the child cannot forge.
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._asked = True
        try:
            fds = [theirs.fileno(), reports.fileno(), *self._output.fds(), *self._attach_fds()]
            zygote.launch(plan, fds, when_idle=self._when_idle)
        finally:
            theirs.close()
            reports.close()
        self._output.launched()
        if self._group is not None:
            self._group.close_attach_fds()

    def _await_ready(self, zygote: Zygote, deadline: float | None) -> None:
        poll = select.poll()
        for sock in (self._reports.sock, self.link):
            poll.register(sock, select.POLLIN)
        while not self.pid or self.init_pidfd < 0:
            left = deadline_left(deadline)
            ready = {fd for fd, _event in poll.poll(None if left is None else left * 1000)}
            if self._ordered is not None:
                raise LaunchError(self._ordered[1], step="stopped")
            if not ready:
                remedy = "raise start_timeout, or look at what the machine is busy with"
                message = f"no answer within start_timeout={self.options.start_timeout} s"
                raise LaunchError(message, step="start_timeout", remedy=remedy)
            if self._reports.sock.fileno() in ready:
                self._read_launch_report(zygote)
            elif self.link.fileno() in ready and not self._read_ready():
                poll.unregister(self.link)  # closed: the status socket will say why
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)

    def _read_launch_report(self, zygote: Zygote) -> None:
        message, fds = self._reports.read()
        if message is None:
            raise zygote.explain_end()
        if "launched" in message and fds:
            self.init_pidfd, self.init_pid = fds[0], int(message["launched"])
            self._cleanup.append(partial(os.close, fds[0]))
        elif "failed" in message:
            raise failure(message)
        else:
            self._reports.known.update(message)
            raise LaunchError(f"the child ended before it was ready ({message})", step="payload")

    def _read_ready(self) -> bool:
        data, ancillary, _flags, _address = self.link.recvmsg(
            wire.HEADER.size + 1, socket.CMSG_SPACE(_CREDENTIALS.size)
        )
        if not data:
            return False
        _check_ready(data)
        for _level, kind, content in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(content)[0]
                try:
                    self.payload_pidfd = os.pidfd_open(pid)
                except ProcessLookupError:
                    return False  # killed since
                self._cleanup.append(partial(os.close, self.payload_pidfd))
                self.pid = pid
        return True

    # --- death ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether PID 1 of the sandbox, and with it everything inside, is gone."""
        return self.wait(0)

    def wait(self, timeout: float | None) -> bool:
        """Wait until it has ended; False if it has not after ``timeout`` seconds."""
        with self._lock:
            if self.exit_info is not None:
                return True
            if timeout == 0 or self.init_pidfd < 0:
                return self.init_pidfd >= 0 and has_ended(self.init_pidfd)
            fd = os.dup(self.init_pidfd)  # another thread may take the account, and close ours, while this one waits
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(None if timeout is None else timeout * 1000))
        finally:
            os.close(fd)

    @property
    def payload_ended(self) -> bool:
        """Whether its payload is gone, which PID 1 may not have noticed yet."""
        with self._lock:
            return self.exit_info is not None or has_ended(self.payload_pidfd)

    def is_over(self) -> bool:
        """For a caller who has heard nothing for a while: whether it has ended, or is to end because the kernel has killed
        a part of it for memory. v2 kills all of it then (memory.oom.group); on v1 the rest would wait for the lost part.
        """
        if self.meter.has_lost_a_process():
            self.kill(
                ExitReason.MEMORY, "the kernel killed a process of the child at its memory limit; the rest was ended"
            )
        return self.wait(0)

    def is_dying(self) -> bool:
        """Whether its payload is gone, or a signal is on the way to it."""
        return self.payload_ended or metrics.has_signal_pending(self.pid)

    def kill(self, reason: ExitReason, message: str = "") -> None:
        """``cgroup.kill`` where that is; and SIGKILL to PID 1, through its pidfd: the kernel then ends everything in its
        namespace. The first order wins.
        """
        with self._lock:
            if self.exit_info is not None:
                return
            if self.init_pidfd >= 0 and has_ended(self.init_pidfd):
                return  # of something else, and that is the first cause
            if self._ordered is None:
                self._ordered = (reason, message)
            self.is_killed = True
            freezer = self._freezer
            if freezer is not None:
                freezer.kill()  # what is paused is in a group of its own
            if self._group is not None:
                self._group.kill_at_once()
            if self.init_pidfd >= 0:
                send_kill(self.init_pidfd)
            elif self._asked:
                self.link.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it to be ready

    def order(self, reason: ExitReason, message: str) -> None:
        """The same account, for an end that is only asked for: by a signal that the child may heed."""
        with self._lock:
            alive = self.exit_info is None and not has_ended(self.init_pidfd)
            if alive and self._ordered is None:
                self._ordered = (reason, message)

    def farewell(self, message: str) -> None:
        """It is told to leave: its end is no order of ours, but the message belongs to it."""
        with self._lock:
            self._farewell = message

    def signal_payload(self, number: int) -> None:
        """Send a signal to the payload alone; nothing happens when it has ended."""
        with self._lock:
            if self.exit_info is None:
                try:
                    signal.pidfd_send_signal(self.payload_pidfd, number)
                except ProcessLookupError:
                    pass

    def finish(self, timeout: float = END_GRACE, *, in_call: bool = False, truncated: bool = False) -> ExitInfo:
        """Wait for the end, take the account, give everything back. Idempotent; the account is then in ``exit_info``.
        ``in_call`` and ``truncated``: see ``explain_exit``.
        """
        with self._lock:
            if self.exit_info is None:
                self.exit_info = self._account(timeout, in_call, truncated)
        self._remove_freezer()
        return self.exit_info

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
            used = self._group.usage()
            if limits_matter(self._ordered[0] if self._ordered else None):
                events = self._group.events()
            if not self._group.remove():
                self._group.kill(max(0.0, deadline - time.monotonic()))
                self._group.remove()
        self.last_events = events
        self.last_lines = self.pipes.finish() if self.pipes is not None else []
        tail = self._output.tail() if self._asked else ""
        while self._cleanup:
            self._cleanup.pop()()  # off the list first: whatever interrupts us, nothing is closed twice
        ordered, message = self._ordered or (None, self._farewell)
        return explain_exit(
            self._reports.known if self._asked else {}, events.since(self.meter.before), ordered,
            duration=time.monotonic() - self.started, cpu_time=used.cpu_time, peak_memory=used.peak_memory,
            message=message, cpu_limit=self.options.limits.cpu_time, in_call=in_call, truncated=truncated, stderr_tail=tail,
        )  # fmt: skip

    # --- pause ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Freeze every process but PID 1. Raises IsolationError, also for a child that is dead."""
        with self._pausing:
            if self.ended:
                raise IsolationError("there is nothing to pause: the child has ended")
            if self._freezer is None:
                own = self._group.freezer() if self._group is not None else None
                self._freezer = own or make_freezer(
                    self.template.features.cgroups, _next_name(), self.meter.frozen_pids
                )
            self._freezer.pause()

    def resume(self) -> None:
        with self._pausing:
            if self._freezer is not None:
                self._freezer.resume()

    def _remove_freezer(self) -> None:
        with self._pausing:
            freezer, self._freezer = self._freezer, None
            if freezer is not None:
                freezer.remove()


_numbers = itertools.count(1)


def _check_ready(data: bytes) -> None:
    """Its first word, in the one version of the protocol that this host speaks. Raises LaunchError."""
    try:
        if len(data) == wire.HEADER.size + 1 and wire.unpack_header(data)[0] == wire.READY:
            return
    except wire.BadFrame as error:
        raise LaunchError(f"the child said {error}, and not that it is ready", step="payload") from None
    raise LaunchError("the child said something else than that it is ready", step="payload")


def _next_name() -> str:
    """A group name of this process: owner pid, its start time, a number. Sweeping reads the owner from it."""
    return cgroups.group_name(next(_numbers))
