"""examples/deploy: the units are started as they are, with the doctor in place of the application."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parent.parent
DEPLOY = TOP / "examples/deploy"
UNIT = Path("/run/systemd/system/pisupervisor-app.service")
TOLD = Path("/run/pisupervisor-doctor.json")
LIMITS = ("memory", "cpus", "cpu_weight", "cpuset", "pids")


@pytest.fixture
def system_unit(need: Callable[..., None]) -> Iterator[None]:
    need("own_machine", "root")
    if not Path("/run/systemd/system").is_dir():
        pytest.skip("systemd: it does not run here")
    start = f"Type=oneshot\nExecStart={sys.executable} -m pisupervisor doctor --json"
    text = re.sub(r"^ExecStart=.*$", start, (DEPLOY / "pisupervisor-app.service").read_text(), flags=re.MULTILINE)
    own = f"Environment=PYTHONPATH={TOP}\nStandardOutput=truncate:{TOLD}\n"
    UNIT.write_text(text.replace("[Install]", f"{own}\n[Install]"))
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    yield
    UNIT.unlink()
    TOLD.unlink(missing_ok=True)
    subprocess.run(["systemctl", "daemon-reload"], check=True)


@pytest.mark.bed
@pytest.mark.usefixtures("system_unit")
def test_a_service_without_privileges_holds_everything() -> None:
    """DynamicUser, hardening and all: no root anywhere, and every limit."""
    subprocess.run(["systemctl", "start", "pisupervisor-app.service"], timeout=200, check=False)
    told: dict[str, Any] = json.loads(TOLD.read_text())
    assert told["host"]["user"].startswith("uid ")
    assert told["host"]["delegation"] == "delegated by systemd to pisupervisor-app.service"
    for name in LIMITS:
        assert told["protections"][name]["verdict"] == "holds", (name, told["protections"][name])
    for name in ("user", "mount", "pid", "network", "cgroup", "seccomp", "capabilities"):
        assert told["protections"][name]["verdict"] == "holds", (name, told["protections"][name])


def test_the_units_delegate() -> None:
    assert "\nDelegate=cpu cpuset io memory pids\n" in (DEPLOY / "pisupervisor-app.service").read_text()
    assert "\nDelegate=yes\n" in (DEPLOY / "pisupervisor-app.user.service").read_text()
    assert "\nDelegate=cpu cpuset io memory pids\n" in (DEPLOY / "user-delegate.conf").read_text()


def test_the_readme_names_every_file() -> None:
    readme = (TOP / "README.md").read_text()
    assert [path.name for path in DEPLOY.iterdir() if f"`{path.name}`" not in readme] == []
