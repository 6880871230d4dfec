"""The host's end of a zygote: start one, hand it launches, end it.

A zygote is exec'd, never forked from the host application, and shared by all isolators that need the same template.
"""

from __future__ import annotations

import _signal as signal  # signal, socket and json would cost a start 7 ms, mostly for enum and re
import _socket
import errno
import fcntl
import os
import select
import struct
import sys
import time

import pihost
from pihost.plan import ChildPlan, TemplatePlan
from pisupervisor.errors import IsolatorClosed, LaunchError, OptionsError
from pisupervisor.launch import priority

PACKAGE = os.path.dirname(os.path.abspath(pihost.__file__))
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SPARE_FD = 10  # duplicates go above the numbers that the zygote expects them at
_CONTROL, _HOST, _LIFELINE = 3, 4, 5
_GRACE = 2.0  # seconds to hear why it ended
_ROOM_GRACE = 0.02  # seconds to have room for a request: a zygote that is busy, or stopped, must not hold its host
_END_GRACE = 0.1  # seconds to end by itself, as it does in 1 ms unless a preloaded module or a signal holds it


class Zygote:
    """One running zygote. ``launch`` may be called from any thread; each child answers on a socket of its own."""

    def __init__(self, python: str) -> None:
        """Start the interpreter. It waits for its plan (see ``prepare``), so that its wake-up costs nobody time."""
        _ensure_compiled()
        self.owner, self.python = os.getpid(), python
        self.preload: list[str] = []
        self.pid, self.pidfd = 0, -1
        try:
            host, ours, theirs, self._lifeline, lifeline_theirs = _ends()
        except OSError as error:
            raise host_failure(error) from error
        try:
            self.pid = _spawn(python, theirs.fileno(), host, lifeline_theirs.fileno())
            self.pidfd = os.pidfd_open(self.pid)
            _kill_at_hangup(lifeline_theirs, self.pid)
        except BaseException as error:
            ours.close()
            self._lifeline.close()
            if self.pidfd >= 0:
                os.close(self.pidfd)
            if self.pid:
                _end_unseen(self.pid)
            if not isinstance(error, OSError):
                raise
            from pisupervisor.launch import remedies

            why, remedy = f"{python} does not start: {error.strerror}", remedies.of_start(python, error.errno)
            raise LaunchError(why, step="zygote", errno=error.errno, remedy=remedy) from error
        finally:
            theirs.close()
            lifeline_theirs.close()
            os.close(host)
        self.control = ours  # SOCK_SEQPACKET: writing to a dead zygote raises no SIGPIPE
        ours.settimeout(_GRACE)
        # A plan with a large environment must fit.
        ours.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, 1 << 20)

    def prepare(
        self, plan: TemplatePlan, write_maps: Callable[[int], None] | None = None, patience: float | None = None
    ) -> None:
        """Tell it what to be. ``write_maps`` is called with its pid as soon as it has its user namespace, for which it has
        ``patience`` seconds. Raises LaunchError.
        """
        priority.shed(self.pid)
        self.preload = plan.preload
        try:
            self.control.send(plan.dump())  # once for the stage that builds the root,
            if write_maps is not None and self._has_unshared(patience):
                write_maps(self.pid)
                self.control.send(b"1")
            # once for the zygote that wakes up inside it, whose memory children inherit: host paths are none of theirs
            self.control.send(TemplatePlan(**{**vars(plan), "root": []}).dump())
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise OptionsError(
                    "environment, import_paths and filesystem together are too large for one plan"
                ) from None
            # else it has ended already, and the first launch will say why
        self.control.settimeout(_ROOM_GRACE)

    def _has_unshared(self, patience: float | None) -> bool:
        """Whether it waits for its maps. False: it says why not, which the first launch will tell. Raises LaunchError."""
        self.control.settimeout(patience)
        try:
            if b"unshared" not in self.control.recv(4096, _socket.MSG_PEEK):
                return False
            self.control.recv(4096)
            return True
        except TimeoutError:
            why = f"the zygote made no user namespace within {patience:g} s"
            remedy = "raise start_timeout, or look at what the machine is busy with"
            raise LaunchError(why, step="namespaces", remedy=remedy) from None
        finally:
            self.control.settimeout(_GRACE)

    def launch(self, plan: ChildPlan, fds: list[int], *, when_idle: bool = False) -> bool:
        """Ask for a child; False: there is no room for a request at the moment. ``fds``: its end of the status socket, what it
        writes to, then its groups' ``tasks`` files. ``when_idle``: nobody waits for it, until ``hurry``.
        """
        if os.getpid() != self.owner:
            raise IsolatorClosed("this isolator belongs to the process that created it, not to a fork of it")
        try:
            rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
            self.control.sendmsg([b"when idle ", plan.dump()] if when_idle else [plan.dump()], [rights])
            return True
        except TimeoutError:
            return False
        except OSError as error:
            raise self.explain_end(error.errno) from error

    def hurry(self) -> None:
        """Somebody waits for the child that was to be launched when there is time. Best effort: it is launched anyway."""
        try:
            self.control.send(b"hurry")
        except OSError:
            pass

    def warm(self, modules: list[str]) -> None:
        """Have ``modules`` imported for the children to come. Best effort."""
        try:
            self.control.send(b"import " + " ".join(modules).encode())
        except OSError:
            pass

    def explain_end(self, number: int | None = None) -> LaunchError:
        """Why this zygote is gone: its own word, where it still could speak."""
        import json

        try:
            self.control.settimeout(_GRACE)
            # Its end with our plans unread makes the first recv fail (ECONNRESET), before what it still said.
            self.control.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
            while data := self.control.recv(65536):
                message = json.loads(data)
                if "failed" in message:
                    return failure(message)
        except (OSError, ValueError):
            pass
        try:
            self.control.settimeout(_ROOM_GRACE)
        except OSError:
            pass  # another thread has replaced it already
        from pisupervisor.launch import remedies, userns

        found = userns.situation()
        remedy = userns.remedy(found) if found.lacks else remedies.of_gone(self.python, self.preload)
        return LaunchError("the zygote ended before the child was there", step="zygote", errno=number, remedy=remedy)

    def alive(self) -> bool:
        return self.pidfd >= 0 and not has_ended(self.pidfd)

    def close(self) -> None:
        """End the zygote and reap it. Its children end with it."""
        self.control.close()
        self._lifeline.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd < 0:
            return
        if os.getpid() == self.owner:
            end_process(pidfd, _END_GRACE)
        os.close(pidfd)


def failure(message: dict[str, Any]) -> LaunchError:
    """A reported step as an error. The sender is trusted code, but beside user code: only text and a number are taken."""
    step, number = str(message.get("failed"))[:200], message.get("errno")
    detail = str(message.get("detail"))[:2000]
    from pisupervisor.launch import remedies

    return LaunchError(
        detail,
        step=step,
        errno=number if isinstance(number, int) and number else None,
        remedy=remedies.of_step(step, number, detail),
    )


def host_failure(error: OSError) -> LaunchError:
    """What this process itself could not do for a launch, most often for want of descriptors."""
    from pisupervisor.launch import remedies

    remedy = remedies.of_errno(error.errno)
    if error.errno == errno.EACCES:
        from pisupervisor.launch import userns

        remedy = remedies.STDIO if userns.situation().profile else remedy
    return LaunchError(str(error), step="launch", errno=error.errno, remedy=remedy)


def end_process(pidfd: int, grace: float) -> None:
    """Wait for a child process of ours to end, kill it after ``grace`` seconds, reap it if nobody else did."""
    if not has_ended(pidfd, grace):
        send_kill(pidfd)
        has_ended(pidfd, _GRACE)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # by number it might be another child by now
    except ChildProcessError:
        pass  # the application ignores SIGCHLD or reaps everything: the status is not ours to have


def send_kill(pidfd: int) -> None:
    """SIGKILL, and nothing where it is dead already."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass


def has_ended(pidfd: int, timeout: float = 0.0) -> bool:
    """Whether that process ends within ``timeout`` seconds. poll, because select refuses fds from 1024 on."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _end_unseen(pid: int) -> None:
    """End a child process of ours that nobody has seen yet."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except OSError:
        pass  # the application ignores SIGCHLD or reaps everything


def _ends() -> tuple[int, _socket.socket, _socket.socket, _socket.socket, _socket.socket]:
    """A pidfd of this process, both ends of the control socket, both of the lifeline; all or none. Raises OSError."""
    host = os.pidfd_open(os.getpid())
    try:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        try:
            return host, ours, theirs, *_socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        except OSError:
            ours.close()
            theirs.close()
            raise
    except OSError:
        os.close(host)
        raise


def _kill_at_hangup(sock: _socket.socket, pid: int) -> None:
    """Have the kernel kill the zygote when this end's peer, which is ours, is gone: also one that was stopped before it
    could arm its death signal. (A fork of the application may keep our end open: that is what the signal is for.)
    """
    fcntl.fcntl(sock, fcntl.F_SETOWN, pid)
    fcntl.fcntl(sock, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)


def _spawn(python: str, control: int, host: int, lifeline: int) -> int:
    """posix_spawn, not fork: no code of the host application runs in between, whatever threads it has."""
    spares: list[int] = []
    try:
        for fd in (control, host, lifeline):
            spares.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SPARE_FD))  # noqa: PERF401  those made are closed again
        return _spawn_with(python, spares)
    finally:
        for fd in spares:
            os.close(fd)


def _spawn_with(python: str, spares: list[int]) -> int:
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, spares[0], _CONTROL),
        (os.POSIX_SPAWN_DUP2, spares[1], _HOST),
        (os.POSIX_SPAWN_DUP2, spares[2], _LIFELINE),
    ]
    if not _keeps_over_exec(2):  # else what is opened first would be the stderr of all children
        actions.append((os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_RDWR, 0))
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    arguments = [python, "-I", "-S", f"{PACKAGE}/__main__.py", "root", str(_CONTROL), str(_HOST)]
    return os.posix_spawn(
        python,
        arguments,
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=signal.valid_signals(),
    )


def _keeps_over_exec(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # it is closed
        return False


def _ensure_compiled() -> None:
    """The zygote reads pihost through a read-only mount and cannot keep compiled files: make them before, once."""
    folders = (PACKAGE, os.path.join(PACKAGE, "inside"))
    if all(
        _is_compiled(entry) for folder in folders for entry in list(os.scandir(folder)) if entry.name.endswith(".py")
    ):
        return
    import compileall

    compileall.compile_dir(PACKAGE, quiet=2)  # no right to write there costs 30 ms a zygote, nothing else


def _is_compiled(entry: os.DirEntry[str]) -> bool:
    name = f"{entry.name[:-3]}.{sys.implementation.cache_tag}.pyc"
    try:
        return os.stat(os.path.join(os.path.dirname(entry.path), "__pycache__", name)).st_mtime >= entry.stat().st_mtime
    except OSError:
        return False


def deadline_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
