"""Where the doctor's probes run: children with every wall, controls that lack one, and a bare interpreter beside them."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

from pisupervisor.doctor import probes
from pisupervisor.doctor.probes import Probe
from pisupervisor.errors import ChildTerminated, LaunchError, OptionsError
from pisupervisor.isolator import ProcessIsolator
from pisupervisor.launch.features import Features
from pisupervisor.launch.landlock import SCOPES_SINCE
from pisupervisor.limits.blockdev import block_device
from pisupervisor.options import Filesystem, IsolationOptions, Limits, RestartPolicy, Security
from pisupervisor.results import Applied
from pisupervisor.template import Template

_PATIENCE = 10.0  # seconds for one probe; the slowest takes half a second
_INSIDE = "/doctor"  # where the child sees what the probes need
_SERVER = """
import json, sys
for line in sys.stdin:
    number, source = json.loads(line)
    names, answer = {}, {"number": number}
    try:
        exec(source, names)
        answer["got"] = names["got"]
    except BaseException as error:
        answer["error"] = repr(error)
    print(json.dumps(answer), flush=True)
"""


class ProbeFailed(Exception):
    """A probe could not be carried out: that says nothing about what it was to try."""


class Plain:
    """A bare interpreter without any wall: the control for what only the host's side can show, and a decoy to find."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", _SERVER]
        self.process = subprocess.Popen(  # unbuffered: a line that is there is seen by poll
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._asked = 0

    def run(self, source: str) -> Any:
        """What ``source`` leaves in ``got``. Raises ProbeFailed."""
        assert self.process.stdin is not None
        self._asked += 1
        try:
            self.process.stdin.write(json.dumps([self._asked, source]).encode() + b"\n")
        except BrokenPipeError:
            raise ProbeFailed("the control's interpreter has ended") from None
        answer = self._answer()
        if "error" in answer:
            raise ProbeFailed(f"in the control: {answer['error']}")
        return answer["got"]

    def _answer(self) -> dict[str, Any]:
        """To what was asked last: what comes too late for another is passed over."""
        assert self.process.stdout is not None
        poll, until = select.poll(), time.monotonic() + _PATIENCE  # not select: it refuses fds from 1024 on
        poll.register(self.process.stdout, select.POLLIN)
        while poll.poll(max(0.0, until - time.monotonic()) * 1000) and (line := self.process.stdout.readline()):
            answer: dict[str, Any] = json.loads(line)
            if answer["number"] == self._asked:
                return answer
        return {"error": "no answer"}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Lab:
    """A context manager. ``degrade`` names what is known to be missing here."""

    def __init__(self, features: Features, degrade: tuple[str, ...]) -> None:
        self.features, self.degrade = features, degrade
        self.scene: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        with self._stack:
            self.plain = Plain()
            self._stack.callback(self.plain.close)
            self.scene = self._make_scene()
            self.options = self._base_options()
            self._make_segment()
            for network in ("none", "host"):  # one zygote for each, kept for all probes
                self._stack.enter_context(Template(self.options, network=network))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _make_scene(self) -> dict[str, Any]:
        """What the probes look for, and their constants."""
        folder, block = self._files()
        path, token = os.path.join(folder, "secret"), os.urandom(16).hex()
        with open(path, "w") as file:
            file.write(token)
        os.chmod(path, 0o644)
        abstract = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0pisupervisor-doctor-{os.getpid()}-{token}")
        abstract.listen()
        scoped = self.features.landlock_abi >= SCOPES_SINCE
        return {
            "HOST": os.uname().nodename, "BOOT": time.clock_gettime(time.CLOCK_BOOTTIME), "PATH": path, "TOKEN": token,
            "PORT": self._listen(), "SOCKET": "\0" + abstract.getsockname()[1:].decode() if scoped else None,
            "DECOY": self.plain.process.pid, "KEY": int(token[:7], 16) | 1, "FIRST": min(os.sched_getaffinity(0)),
            "BLOCK": block, "IO_PATH": f"{_INSIDE}/block", "WITNESS_PATH": f"{_INSIDE}/witness",
        }  # fmt: skip

    def _listen(self) -> int:
        """The port of a listener on loopback; 0 where this process may have none (Landlock, a unit's rules): no proof then."""
        try:
            address = self._stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()
        except OSError:
            return 0
        return int(address[1])

    def _files(self) -> tuple[str, str | None]:
        """A folder of ours, and a file in it of which parts can be read from a disk (None where no folder lies on one)."""
        folders = [folder for folder in (_temporary(), "/var/tmp", os.getcwd()) if os.access(folder, os.W_OK)]
        on_disk = next((folder for folder in folders if _lies_on_disk(folder)), None)
        made = tempfile.TemporaryDirectory(prefix="pisupervisor-doctor-", dir=on_disk)
        folder = self._stack.enter_context(made)
        os.chmod(folder, 0o755)  # noqa: S103  open to every user, as the files in it: only the walls keep a child out
        if on_disk is None or "io" in self.degrade:
            return folder, None
        block = os.path.join(folder, "block")
        with open(block, "wb") as file:
            file.write(os.urandom(1 << 19))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(block, 0o644)
        return folder, block

    def _base_options(self) -> IsolationOptions:
        shown = [(self.scene["BLOCK"], self.scene["IO_PATH"])] if self.scene["BLOCK"] else []
        shown += [(path, f"{self.scene['WITNESS_PATH']}/{os.path.basename(path)}") for path in _witness_files()]
        hostname = "pihost" if self.scene["HOST"] != "pihost" else "pihost-2"
        return IsolationOptions(
            filesystem=Filesystem(read_only=shown), degrade=self.degrade, restart=RestartPolicy(mode="never"),
            security=Security(seccomp=None if "seccomp" in self.degrade else "default", hostname=hostname),
        )  # fmt: skip

    # --- probes -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Start a child, so that a host where none can be started is known as such. Raises what its launch raises."""
        ProcessIsolator.create(self.options).close()

    def applied(self, limits: Limits) -> Mapping[str, Applied]:
        """What is read back of a child with these limits."""
        with ProcessIsolator.create(replace(self.options, limits=limits)) as isolator:
            return isolator.applied

    def attempt(self, probe: Probe) -> tuple[list[str], Applied]:
        """What the probe could do in a child with the protection, and how that was read back."""
        if probe.source == probes.RIVALS:
            return self._compete(probe, probe.options["limits"])
        return self._in_child(probe, probe.options, ())

    def control(self, probe: Probe) -> list[str]:
        """What it could do without the protection."""
        if probe.source == probes.RIVALS:
            return self._compete(probe, probe.control["limits"])[0]
        if probe.plain:
            return _checked(self.plain.run(self.constants() + probe.source))
        return self._in_child(probe, probe.control, probe.without)[0]

    def _make_segment(self) -> None:
        """Shared memory of the host for the ipc probe to find; it goes with the lab."""
        self.plain.run(self.constants() + probes.IPC_MAKE)
        self._stack.callback(self.plain.run, self.constants() + probes.IPC_REMOVE)

    def constants(self) -> str:
        return "".join(f"{name} = {value!r}\n" for name, value in self.scene.items())

    def _in_child(self, probe: Probe, changes: Any, without: tuple[str, ...]) -> tuple[list[str], Applied]:
        with ProcessIsolator(replace(self.options, **changes), without=without) as isolator:
            isolator._start()
            applied = isolator.applied[probe.name]
            try:
                result = isolator.run_source(f"{self.constants()}{probe.source}\ngot", timeout=_PATIENCE)
            except ChildTerminated as error:
                if error.exit_info.reason.value not in probe.killed:
                    raise
                return [], applied
            return _checked(result.value), applied

    def _compete(self, probe: Probe, limits: Limits) -> tuple[list[str], Applied]:
        """A child with ``limits`` and one of weight 1000 on one CPU: did the first get its half?"""
        with self._burning(limits) as subject, self._burning(Limits(cpu_weight=1000)) as rival:
            before = [_cpu_time(isolator) for isolator in (subject, rival)]
            time.sleep(0.3)
            used = [_cpu_time(one) - then for one, then in zip((subject, rival), before, strict=True)]
            applied = subject.applied[probe.name]
        share = used[0] / (sum(used) or 1.0)
        return [f"got {share:.0%} of what two children on one CPU used"] if share > 0.25 else [], applied

    def _burning(self, limits: Limits) -> ProcessIsolator:
        """It burns when this returns: on a busy machine the other one would have had a CPU for itself meanwhile."""
        isolator = ProcessIsolator.create(replace(self.options, limits=limits))
        enough, until = _cpu_time(isolator) + 0.1, time.monotonic() + 5
        isolator.submit_call(isolator.run_source, self.constants() + probes.RIVAL)
        while _cpu_time(isolator) < enough and time.monotonic() < until:
            time.sleep(0.01)
        return isolator

    def ask_witness(self) -> dict[str, Any] | None:
        """What python-prctl reads inside; None where it is not installed."""
        if not _witness_files():
            return None
        with ProcessIsolator.create(self.options) as isolator:
            found = isolator.run_source(f"{self.constants()}{probes.WITNESS}\ngot", timeout=_PATIENCE).value
        return dict(found)


def _checked(got: Any) -> list[str]:
    if not isinstance(got, list) or not all(isinstance(item, str) for item in got):
        raise ProbeFailed(f"it answered {got!r}"[:200])
    return got


def _cpu_time(isolator: ProcessIsolator) -> float:
    used = isolator.resource_usage().cpu_time
    if used is None:
        raise ProbeFailed("nobody counts CPU time here")
    return used


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # in a container with a read-only root
        remedy = "docker or podman run --tmpfs /tmp, Kubernetes: an emptyDir at /tmp; or TMPDIR=FOLDER"
        raise LaunchError("the doctor has no folder to write its secrets to", step="doctor", remedy=remedy) from None


def _lies_on_disk(folder: str) -> bool:
    try:
        block_device(folder)
    except OptionsError:
        return False
    return True


def _witness_files() -> list[str]:
    """The two modules of python-prctl; empty where it is not installed."""
    from importlib.util import find_spec

    specs = [find_spec(name) for name in ("prctl", "_prctl")]
    return [spec.origin for spec in specs if spec is not None and spec.origin] if all(specs) else []
