"""How a child comes to be: its group and sockets made, the plan handed to the zygote, its word awaited, its walls read back."""

from __future__ import annotations

import _socket as socket  # socket imports enum for names that nobody needs here: 4 ms of a start
import errno
import os
import select
import struct
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from pihost import wire
from pisupervisor.errors import LaunchError
from pisupervisor.launch import attest, planning, requirements
from pisupervisor.launch.templates import Template
from pisupervisor.launch.zygote import Zygote, deadline_left, failure, has_ended, host_failure, send_kill
from pisupervisor.limits import cgroups, rlimits
from pisupervisor.options import IsolationOptions
from pisupervisor.results import Applied, ExitReason
from pisupervisor.supervise import groups, metrics
from pisupervisor.supervise.output import OutputPipes, StderrTail
from pisupervisor.supervise.reports import Reports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.supervise.listener import Listener, Log

#: seconds to end, for what belongs to a launch that failed: a zygote that hangs must not hold the caller
LAUNCH_GRACE = 0.2
_LOOK_AROUND = 20  # ms until a launch sees that it was stopped
_CREDENTIALS = struct.Struct("3i")
_SO_PASSRIGHTS = 83


class Birth:
    """The part of a ``Child`` that launches it. What is made on the way is in ``_cleanup``, to be given back by the rest."""

    def __init__(self, options: IsolationOptions, template: Template) -> None:
        self.options, self.template = options, template
        self.link: socket.socket
        self.pid = 0  # of the payload, as this process numbers it
        self.init_pidfd = self.payload_pidfd = -1
        self.init_pid = 0  # PID 1 of the sandbox, as this process numbers it
        self.meter = metrics.Meter()
        self.pipes: OutputPipes | None = None  # where the application wants to see what is written
        self._output: OutputPipes | StderrTail
        self._reports: Reports
        self._group: cgroups.ChildGroup | None = None
        self._instead: dict[str, str] = {}  # what stands in for limits that no group holds
        self._when_idle = False
        self._asked = False  # whether the zygote was given the plan
        self.log: Log | None = None  # of what a listener sees
        self.listener: Listener | None = None
        self._ordered: tuple[ExitReason, str] | None = None  # an end that somebody wanted, and why
        self._cleanup: list[Callable[[], object]] = []

    def _request(self, without: tuple[str, ...], when_idle: bool, deadline: float | None) -> None:
        """Make the group, the output and the sockets, and hand the plan to the zygote."""
        self._when_idle = when_idle
        self._zygote = self.template.usable_zygote()  # before the group, which may live and die with it
        try:
            self._missing = self._make_group(without)
        except LaunchError as error:
            if not self.template.features.cgroups.scope or self._zygote.alive():
                raise
            raise self._zygote.explain_end() from error  # it came first: the scope in which groups are made went with it
        self._make_output()
        outer = None
        if self.template.ids is not None:
            outer = self.template.ids.take()
            self._cleanup.append(partial(self.template.ids.give_back, outer))
        self._plan = planning.child_plan(
            self.options, self.template.features, interpreter=self.template.interpreter, outer_id=outer,
            rlimits=self._rlimits(), output=len(self._output.fds()),
            cgroups=len(self._attach_fds()), clone_flags=self._group.clone_flags if self._group is not None else 0,
            without=without,
        )  # fmt: skip
        try:
            self._send_plan(self._zygote, deadline)
        except LaunchError as error:
            # It was dying when it was asked: killed, but not yet seen to have ended. Once, with another.
            pidfd = self._zygote.pidfd  # -1: another thread has closed and replaced it
            if error.step != "zygote" or (pidfd >= 0 and not has_ended(pidfd, LAUNCH_GRACE)):
                raise
            self._zygote = self.template.usable_zygote()
            if self._group is not None and self.template.features.cgroups.scope:
                self._group.remove()
                self._make_group(without)
            self._send_plan(self._zygote, deadline)

    def _make_group(self, without: tuple[str, ...]) -> dict[str, str]:
        """Create the group with all limits written. Returns why a limit is missing, by name (all of them degraded)."""
        host = self.template.features.cgroups
        lacking = requirements.lacking_limits(self.options, host)
        if "memory" in lacking and self.options.limits.memory is not None:
            from pisupervisor.supervise import stand_in

            stand_in.check_sight(self.options, self.template.features.root, bool(self.template.outside))
        if "limits" not in without and host.directories():
            wanted = cgroups.wanted_limits(self.options.limits)
            self._group = groups.take(self.template, wanted) or cgroups.create_group(host, wanted, groups.next_name())
        return lacking

    def _rlimits(self) -> list[rlimits.Rlimit]:
        """Those that are always set, and those that stand in for missing groups: ``applied`` will say which."""
        features = self.template.features
        instead = rlimits.stand_ins(self.options.limits, self._missing, features.kernel, features.root)
        self._missing.update((name, f"{self._missing[name]}; instead, {words}") for name, (_, words) in instead.items())
        if self._missing:
            from pisupervisor.supervise import stand_in

            self._instead = stand_in.words(self.options.limits, self._missing, instead)
        return rlimits.rlimit_plan(self.options.limits, extra=[entry for entry, _words in instead.values()])

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

    def _send_plan(self, zygote: Zygote, deadline: float | None) -> None:
        status, reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reports = Reports(status)
        self._cleanup.append(status.close)
        self._asked = True
        try:
            fds = [reports.fileno(), *self._output.fds(), *self._attach_fds()]
            while not zygote.launch(self._plan, fds, when_idle=self._when_idle):
                self._check_wanted()
                self._check_time(deadline)
        finally:
            reports.close()
        self._output.launched()
        if self._group is not None:
            self._group.close_attach_fds()

    def _await_ready(self, zygote: Zygote, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._reports.sock, select.POLLIN)
        while not self.pid or self.init_pidfd < 0:
            left = deadline_left(deadline)
            ready = [fd for fd, _event in poll.poll(_LOOK_AROUND if left is None else min(left * 1000, _LOOK_AROUND))]
            self._check_wanted()
            if not ready:
                self._check_time(deadline)
            if self._reports.sock.fileno() in ready:
                self._read_launch_report(zygote)
                if self.init_pidfd >= 0:
                    poll.register(self.link, select.POLLIN)
            elif ready and not self._read_ready():
                poll.unregister(self.link)  # closed: the status socket will say why
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        _take_no_descriptors(self.link)

    def _check_wanted(self) -> None:
        if self._ordered is not None:
            raise LaunchError(self._ordered[1], step="stopped", remedy="restart() starts another child")

    def _check_time(self, deadline: float | None) -> None:
        if deadline_left(deadline) == 0:
            remedy = "raise start_timeout, or look at what the machine is busy with"
            message = f"no answer within start_timeout={self.options.start_timeout} s"
            raise LaunchError(message, step="start_timeout", remedy=remedy)

    def _read_launch_report(self, zygote: Zygote) -> None:
        """With "launched" comes the link. Its first word, READY, will tell the payload's pid, as we number it: the kernel says
        so, and the child cannot forge it.
        """
        message, fds = self._reports.read()
        if message is None:
            raise zygote.explain_end()
        if "launched" in message and len(fds) == 2:
            self.init_pidfd, self.init_pid = fds[0], int(message["launched"])
            self._cleanup.append(partial(os.close, fds[0]))
            self.link = socket.socket(fileno=fds[1])
            self._cleanup.append(self.link.close)
        elif "listener" in message and len(fds) == 1:
            self._listen(fds[0])
        else:
            self._refuse(message, fds)

    def _refuse(self, message: dict[str, Any], fds: list[int]) -> None:
        """Raises LaunchError for a report of something else than what was to come."""
        if fds and "launched" in message:
            send_kill(fds[0])
        for fd in fds:
            os.close(fd)
        if "failed" in message:
            raise failure(message)
        if "launched" in message or "listener" in message:
            raise host_failure(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a child's descriptors"))
        self._reports.known.update(message)
        from pisupervisor.launch import remedies

        words, remedy = remedies.of_end(message, self.options.security.seccomp)
        raise LaunchError(f"the child ended before it was ready: it {words}", step="payload", remedy=remedy)

    def _listen(self, fd: int) -> None:
        """At once: the child may wait for its first answer already."""
        answers = self.template.answers
        if answers is None or self.log is None or self.listener is not None:
            os.close(fd)
            raise LaunchError("a listener for which nobody asked", step="seccomp", remedy=attest.REMEDY)
        from pisupervisor.supervise.listener import Listener

        try:
            self.listener = Listener(fd, answers, self.log, self._kill_for_syscall)
        except (RuntimeError, OSError) as error:
            os.close(fd)
            remedy = "raise ulimit -u and ulimit -n, or do not watch"
            raise LaunchError(f"no helper thread: {error}", step="seccomp", remedy=remedy) from error
        self._cleanup.append(self.listener.close)

    @abstractmethod
    def _kill_for_syscall(self, message: str) -> bool:
        """What a listener does about a call that kills; False: not now. (A parameter would be a cycle for the collector.)"""

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

    def _read_back(self) -> dict[str, Applied]:
        readings = attest.read(self.pid, self.template.host_links)
        self.meter.open(self._group, self.pid, self.init_pid)
        limits = self._group.read_back() if self._group is not None else {}
        filtered = bool(self.template.plan.seccomp)
        return attest.verify(
            self._plan,
            self.options,
            readings,
            filtered=filtered,
            groups=limits,
            missing=self._missing,
            instead=self._instead,
            shift=self.template.outside,
            places=self._group.places() if self._group is not None else {},
        )


def _take_no_descriptors(link: socket.socket) -> None:
    """From before the child has anything to run. Who reads what descriptors ride on closes them, and waits as long as the child
    has said that the end of a connection may take (SO_LINGER), whatever the deadline. Linux before 6.16 cannot refuse them:
    there the profiles refuse SO_LINGER.
    """
    try:
        link.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def _check_ready(data: bytes) -> None:
    """Its first word, in the one version of the protocol that this host speaks. Raises LaunchError."""
    remedy = "pisupervisor and pihost must be of one version: install the package anew"
    try:
        if len(data) == wire.HEADER.size + 1 and wire.unpack_header(data)[0] == wire.READY:
            return
    except wire.BadFrame as error:
        said = f"the child said {error}, and not that it is ready"
        raise LaunchError(said, step="payload", remedy=remedy) from None
    raise LaunchError("the child said something else than that it is ready", step="payload", remedy=remedy)
