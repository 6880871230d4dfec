"""The doctor's advice, applied: what was missing holds afterwards."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parent.parent
DOCTOR = [sys.executable, "-m", "pisupervisor", "doctor", "--json"]
NO_BUS = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/nonexistent"}  # else systemd is asked for a scope, and nothing lacks


def examined(*command: str, **changes: str) -> dict[str, Any]:
    environment = {**os.environ, **changes}
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=200, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.scope
@pytest.mark.bed
def test_started_as_the_doctor_says_limits_hold() -> None:
    before = examined(*DOCTOR, **NO_BUS)
    assert not before["works"]
    assert before["protections"]["memory"]["verdict"] == "missing"
    told = re.search(r"systemd-run .*? -- COMMAND", before["protections"]["memory"]["remedy"])
    assert told is not None
    command = shlex.split(told[0].removesuffix("COMMAND"))
    after = examined(*command, *DOCTOR)
    for name in ("memory", "cpus", "cpu_weight", "cpuset", "pids"):
        assert after["protections"][name]["verdict"] == "holds", after["protections"][name]
    assert after["host"]["delegation"].startswith("delegated by systemd to run-")


@pytest.mark.scope
@pytest.mark.bed
def test_the_doctor_sees_the_scope_that_children_would_get() -> None:
    found = examined(*DOCTOR)
    assert found["protections"]["memory"]["verdict"] == "holds"
    assert "asked of the user's systemd" in found["host"]["delegation"]
