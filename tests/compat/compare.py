"""A module of CPython's own tests, run in a confined child and outside of any: the outcome of each of its tests, twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from differences import KNOWN

from pisupervisor import IsolationError, IsolationOptions, Limits, ProcessIsolator, RestartPolicy, Security

SUITE = Path(__file__).parent / "suite.py"
NOBODY = 65534
#: The walls are those of the defaults. Room is what the tests outside have too; a network of one's own is asked for by many.
OPTIONS = IsolationOptions(
    network="loopback", restart=RestartPolicy(mode="never"),
    limits=Limits(memory="1G", pids=256, cpus=None, open_files=1024, scratch="256M", output="16M"),
)  # fmt: skip


@dataclass
class Run:
    """What became of each test, by its id; ``ended`` says why there is no more."""

    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ended: str = ""


@dataclass
class Difference:
    """A test that ended otherwise inside; ``reason`` is empty where nobody knows why."""

    test: str
    outside: str
    inside: str
    reason: str
    said: str


def inside(module: str, timeout: float, profile: str = "default") -> Run:
    """In a confined child."""
    try:
        with ProcessIsolator.create(replace(OPTIONS, security=Security(seccomp=profile))) as isolator:
            return Run(**isolator.invoke_method(SUITE, "run", module, True, timeout=timeout))
    except IsolationError as error:
        return Run(ended=f"{type(error).__name__}: {error}")


def outside(module: str, timeout: float) -> Run:
    """The same interpreter without walls: as nobody (if we are root), with an own session, umask and folder as inside."""
    folder = tempfile.mkdtemp(prefix="pisupervisor-compat-", dir="/var/tmp")
    other = NOBODY if os.geteuid() == 0 else None
    os.chown(folder, -1 if other is None else other, -1)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", SUITE.read_text(), module]
    try:
        done = subprocess.run(
            command, user=other, group=other, extra_groups=None if other is None else [], umask=0o077, cwd=folder,
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        return Run(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return Run(ended=f"not done in {timeout:.0f} s")
    except ValueError:
        return Run(ended=f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def differences(module: str, one: Run, other: Run) -> list[Difference]:
    """Pure: tests of ``one`` (outside) that ended otherwise in ``other`` (inside)."""
    found = []
    for test in sorted({*one.outcomes, *other.outcomes}):
        before, after = one.outcomes.get(test, "not run"), other.outcomes.get(test, "not run")
        if before != after:
            short = test.removeprefix(f"test.{module}.")
            found.append(Difference(short, before, after, known(module, short), other.reasons.get(test, "")))
    if one.ended != other.ended:
        found.append(Difference("(the module)", one.ended or "ran", other.ended or "ran", "", ""))
    return found


def known(module: str, test: str) -> str:
    """Why this test ends otherwise inside; empty where that is news. An entry that ends with a dot stands for a class."""
    for name, reason in KNOWN.get(module, {}).items():
        if test == name or (name.endswith(".") and test.startswith(name)):
            return reason
    return ""
