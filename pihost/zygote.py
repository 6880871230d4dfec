"""The fork server: a warm, single-threaded interpreter that forks children, owns their exit status, and is the subreaper.

    host                               zygote
      | TemplatePlan ------------------> |  (twice: once for each stage)
      | <-------------- {"failed": step, "errno": n, "detail": text}   only where it cannot become one
      | ChildPlan + fds ---------------> |  fds: status, output, then the groups to join
      | WHEN_IDLE + ChildPlan + fds ---> |  the same, for a child that nobody waits for yet
      | HURRY -------------------------> |  now somebody does
      | IMPORT + names ----------------> |  modules to keep warm for the next children
    on the child's status socket, host <-- zygote or PID 1:
      {"launched": pid} + pidfd and the host's end of its link   {"listener": 1} + fd   {"failed": ...}
      {"exited": [code, signal], "cpu": s}   {"gone": [how, status]}

The end of the host (its pidfd) or of the control socket ends the zygote, and its end ends every child.
"""

from __future__ import annotations

import _signal
import _sitebuiltins
import _socket
import builtins
import fcntl
import gc
import os
import select
import struct
import sys

from pihost import confine, rehearsal, syscalls, wire
from pihost.inside import init, serve
from pihost.jsontext import dump
from pihost.plan import ChildPlan, PlanError, TemplatePlan
from pihost.root import StepFailed, await_plan, write_proc

if False:  # typing costs 5 ms, and only a type checker reads this
    from typing import Any

IMPORT, WHEN_IDLE, HURRY = b"import ", b"when idle ", b"hurry"
_MAX_FDS = 16
_MAX_MESSAGE = 1 << 20
_DEBUG = 10
_FREE_NETWORKS = 16
_IDLE_AFTER = 3  # ms without a request
_FIRST_IDLE_AFTER = 30  # the first child starts and answers in less, and shall have the machine to itself


def main(control: int, host: int) -> None:
    """Become a zygote: read the template plan, preload, serve until the host is gone. It says a word only where it cannot."""
    syscalls.close_range(max(control, host) + 2, syscalls.LAST_FD)  # the next is the lifeline: its hangup is a SIGKILL
    sock = _socket.socket(fileno=control)
    data = await_plan(control, host)
    if not data:
        return  # the host is gone, or thought better of it
    plan = TemplatePlan.load(data)
    try:
        prepare(plan)
    except StepFailed as failure:
        tell(sock, failure.report())
        return
    Zygote(sock, host, plan).serve()


def prepare(plan: TemplatePlan) -> None:
    """Imports once, for all children; then as few reasons as possible for a child to copy a page."""
    if len(plan.own_ids) != 2:  # a child cannot: its user namespace denies setgroups, as does that of a single id
        os.setgroups([])
    syscalls.set_subreaper()
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # else Python's handler would let a payload interrupt PID 1
    sys.path[:] = plan.sys_path
    sys.argv[:] = [""]
    for name in ("exit", "quit"):  # what site would have put there, and scripts use
        setattr(builtins, name, _sitebuiltins.Quitter(name, "end of file"))
    sys.path += plan.import_paths
    for name in plan.preload:
        try:
            __import__(name)
        except BaseException as error:  # SystemExit too: a silent end would explain nothing
            raise StepFailed(f"preload {name}", Exception(f"{type(error).__name__}: {error}")) from error
    # From here on the zygote, which has rights, imports nothing of the user's: even the standard library tries names
    # that a folder of the user's could hold (pickle: org.python.core).
    sys.path[:] = plan.sys_path
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise StepFailed("preload", OSError(0, f"a module started {threads - 1} threads: a zygote must have one"))
    settle(collect=bool(plan.preload))  # our own imports left nothing to collect


def settle(collect: bool = True) -> None:
    """Nothing that is there now is looked at again by the collector, so that children need not copy its page."""
    if collect:
        gc.collect()
    gc.freeze()
    gc.disable()


class Zygote:
    def __init__(self, control: _socket.socket, host: int, plan: TemplatePlan) -> None:
        self.control, self.host, self.plan = control, host, plan
        self.own_pidfd = os.pidfd_open(os.getpid())
        self.filter = plan.seccomp and syscalls.seccomp_program(plan.seccomp)
        self.children: dict[int, tuple[_socket.socket, int]] = {}  # PID 1's pidfd -> status socket, network
        self.idle_work = rehearsal.pieces(settle)
        self.worker = serve.Worker()
        self.is_warm, self.launches = False, 0
        self.postponed: tuple[bytes, list[int]] | None = None
        self.network = -1  # namespace that the next child will inherit; -1: none is ready
        self.free_networks: list[int] = []
        self.untouched: list[bytes] = []  # see ``traces``
        self.network_failed = False
        self.poll = select.poll()
        for fd in (control.fileno(), host):
            self.poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        while True:
            ready = self.poll.poll(self.patience())
            if not ready:
                self.use_idle_time()
            for fd, _events in ready:
                if fd == self.host:
                    os._exit(0)
                elif fd == self.control.fileno():
                    self.handle_request()
                else:
                    self.report_end(fd)

    def patience(self) -> int | None:
        """How many ms without a request are time to use; None: there is nothing to do."""
        if self.postponed is not None:
            return _IDLE_AFTER
        if self.network < 0 and not self.network_failed:
            return 0 if self.is_warm else _IDLE_AFTER
        if self.is_warm:
            return None
        return _IDLE_AFTER if self.launches > 1 else _FIRST_IDLE_AFTER

    def use_idle_time(self) -> None:
        """The child that nobody waits for, the next one's network namespace (0.4 ms), then what makes us warm."""
        if self.postponed is not None:
            self.launch_postponed()
        elif self.network < 0 and not self.network_failed:
            try:
                self.enter_network()
            except OSError:
                self.network_failed = True  # the next launch tries again, and says why it cannot
        else:
            self.is_warm = next(self.idle_work, True)

    def enter_network(self) -> None:
        """A network namespace for the next child, which inherits it and, from its own user namespace, has no rights
        over it. Each living child has another one. Without interfaces nobody can leave much in one, so those of dead
        children that are as they were are used again: making one costs 0.4 ms, the clean-up as much, a look 0.1.
        """
        while self.free_networks:
            syscalls.setns(self.free_networks[-1], syscalls.CLONE_NEWNET)
            is_untouched, network = traces() == self.untouched, self.free_networks.pop()  # a look may fail: it is first
            if is_untouched:
                self.network = network
                return
            os.close(network)
        if self.plan.network != "host":
            syscalls.unshare(syscalls.CLONE_NEWNET)
        if self.plan.network == "loopback":
            bring_loopback_up()
        if self.plan.network == "none":
            self.untouched = self.untouched or traces()
        self.network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def leave_network(self, network: int) -> None:
        """A child is dead: keep its namespace for another, or let it go."""
        if self.plan.network == "none" and len(self.free_networks) < _FREE_NETWORKS:
            self.free_networks.append(network)
        else:
            os.close(network)

    def handle_request(self) -> None:
        try:
            data, ancillary, flags, _address = self.control.recvmsg(_MAX_MESSAGE, _socket.CMSG_SPACE(4 * _MAX_FDS))
        except ConnectionError:
            data = b""
        if not data:
            os._exit(0)  # the host closed us; our end is the death signal of every child
        fds = [fd for _level, _kind, content in ancillary for (fd,) in struct.iter_unpack("i", content)]
        if flags & _socket.MSG_CTRUNC:  # no room for all of them here: the host sees its sockets close
            for fd in fds:
                os.close(fd)
        elif data.startswith(WHEN_IDLE):
            self.launch_postponed()
            self.postponed = data[len(WHEN_IDLE) :], fds
        elif data == HURRY:
            self.launch_postponed()
        elif data.startswith(IMPORT):
            rehearsal.keep(data[len(IMPORT) :].decode().split())
            settle()
        else:
            self.launch(data, fds)

    def launch_postponed(self) -> None:
        postponed, self.postponed = self.postponed, None
        if postponed is not None:
            self.launch(*postponed)

    def log(self, text: str) -> None:
        os.write(2, f"pihost[{os.getpid()}] DEBUG {text}\n".encode())

    def launch(self, data: bytes, fds: list[int]) -> None:
        self.launches += 1
        status_fd, *others = fds
        status = _socket.socket(fileno=status_fd)
        link = far_link = go = say_go = -1
        pid, pidfd, step = -1, -1, "plan"
        try:
            go, say_go = os.pipe()
            plan = ChildPlan.load(data)
            output, cgroups = others[: plan.output], others[plan.output :]
            if plan.cgroups != len(cgroups):
                raise PlanError("not the fds that the plan speaks of")
            step = "network"
            if self.network < 0:
                self.enter_network()
            self.network_failed = False
            link, far_link = make_link()
            step = "clone"
            into = plan.namespaces & syscalls.CLONE_INTO_CGROUP
            pid, pidfd = syscalls.clone(plan.namespaces, cgroups[0] if into else 0)
            if pid == 0:
                held = confine.Fds(link, status_fd, go, self.host, self.own_pidfd, output, cgroups)
                self.become_child(plan, held)
            step = "id maps"
            map_ids(pid, plan)
            os.write(say_go, b"1")
        except (OSError, PlanError) as error:
            tell(status, StepFailed(step, error).report())
        if pid > 0:
            tell(status, {"launched": pid}, pidfd, far_link)
        for fd in (link, far_link, go, say_go, *others):
            if fd >= 0:
                os.close(fd)
        if pid > 0:
            self.children[pidfd], self.network = (status, self.network), -1
            self.poll.register(pidfd, select.POLLIN)
        else:
            status.close()

    def become_child(self, plan: ChildPlan, fds: confine.Fds) -> None:
        """PID 1 of the new sandbox, and from the fork on the payload. Never returns."""
        code, step = 1, "confine"
        try:
            log = self.log if self.plan.log_level <= _DEBUG else None
            confine.run(confine.BEFORE_FORK, plan, fds, log=log)
            confine.run((("seccomp", self.load_filter),), plan, fds, log=log)
            syscalls.set_dumpable(False)  # before there is a payload that could look
            step = "fork"
            payload = init.fork()
            if payload == 0:
                code = self.become_payload(plan, fds)
            else:
                init.run(fds, payload, lifeline="lifeline" not in plan.without)
        except BaseException as error:
            failure = error if isinstance(error, StepFailed) else StepFailed(step, error)
            tell(_socket.socket(fileno=fds.status), failure.report())
        finally:
            os._exit(code)

    def load_filter(self, _plan: ChildPlan, fds: confine.Fds, kernel: Any) -> None:
        if not self.plan.listen:
            if self.filter:
                kernel.load_seccomp(self.filter)
            return
        # Made before: until the host has the listener, a call that is handed to it would wait for ever.
        status = _socket.socket(fileno=fds.status)
        try:
            listener = kernel.load_seccomp(self.filter, listen=True)
            tell(status, {"listener": 1}, listener)
            os.close(listener)
        finally:
            status.detach()

    def become_payload(self, plan: ChildPlan, fds: confine.Fds) -> int:
        confine.run(confine.PAYLOAD, plan, fds)
        sys.path += self.plan.import_paths
        gc.enable()
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # KeyboardInterrupt, as programs expect
        link = serve.Link(confine.LINK)
        link.send(wire.READY, 0, [b"1"])
        return serve.serve(self.worker, link, plan.limits, plan.debug)

    def report_end(self, pidfd: int) -> None:
        status, network = self.children.pop(pidfd)
        self.leave_network(network)
        self.poll.unregister(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        tell(status, {"gone": [result.si_code, result.si_status] if result else [0, 0]})
        status.close()


def traces() -> list[bytes]:
    """What /proc/self/net tells of who had it: counters of what was sent in vain, labels of IPv6 flows with their text."""
    found = []
    for name in ("snmp", "snmp6", "rt6_stats", "ip6_flowlabel"):
        try:
            with open(f"/proc/self/net/{name}", "rb", 0) as file:
                found.append(file.read())
        except FileNotFoundError:  # a kernel without IPv6
            continue
    return found


def make_link() -> tuple[int, int]:
    """The child's end and the host's. Made here, in the child's network namespace: a UNIX socket keeps the one that it was
    made in, with its abstract names and its ioctls.
    """
    theirs, ours = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    # Before anything is sent: the kernel then tells by whom.
    ours.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
    return theirs.detach(), ours.detach()


def bring_loopback_up() -> None:
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    # SIOCSIFFLAGS with IFF_UP: one ioctl, where a netlink library would cost more than a hundred launches
    fcntl.ioctl(probe.fileno(), 0x8914, struct.pack("16sh22x", b"lo", 1))
    probe.close()


def map_ids(pid: int, plan: ChildPlan) -> None:
    write_proc(pid, "setgroups", "deny")  # before gid_map: CVE-2014-8989
    write_proc(pid, "uid_map", plan.uid_map)
    write_proc(pid, "gid_map", plan.gid_map)


def tell(status: _socket.socket, message: dict[str, object], *fds: int) -> None:
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        status.sendmsg([dump(message)], rights)
    except OSError:
        pass  # the host closed its end: it no longer wants to know
