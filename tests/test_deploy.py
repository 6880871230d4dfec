"""examples/deploy: the units are started as they are, with the doctor in place of the application."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DEGRADE

from pisupervisor.launch.seccomp import NESTING, load_profile

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


def test_the_document_names_every_file() -> None:
    document = (TOP / "docs/deployment.md").read_text()
    assert [path.name for path in DEPLOY.iterdir() if f"`{path.name}`" not in document] == []


@pytest.mark.bed
@pytest.mark.parametrize(
    ("name", "manager"), [("pisupervisor-app.service", "--system"), ("pisupervisor-app.user.service", "--user")]
)
def test_systemd_has_nothing_to_say_against_the_units(name: str, manager: str, tmp_path: Path) -> None:
    """``systemd-analyze verify``, which also tells of a word that it does not know."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd: there is no systemd-analyze here")
    text = (DEPLOY / name).read_text()
    unit = tmp_path / "pisupervisor-app.service"

    def verified(text: str) -> subprocess.CompletedProcess[str]:
        unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
        command = ["systemd-analyze", manager, "--man=no", "verify", str(unit)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    done = verified(text)
    mine = [line for line in done.stderr.splitlines() if "pisupervisor-app" in line]
    assert mine == [], done.stderr
    wrong = verified(text.replace("Delegate=", "Delegates="))
    assert re.search(r"Unknown key.* 'Delegates'", wrong.stderr), "the control"


@pytest.mark.bed
def test_a_users_unit_holds_everything_that_their_systemd_has(need: Callable[..., None], tmp_path: Path) -> None:
    """Written where the unit says, started as it says, with the doctor in place of the application."""
    need("scope")
    folder = Path.home() / ".config/systemd/user"
    unit, told = folder / "pisupervisor-app.service", tmp_path / "told.json"
    start = f"Type=oneshot\nExecStart={sys.executable} -m pisupervisor doctor --json"
    text = re.sub(r"^ExecStart=.*$", start, (DEPLOY / "pisupervisor-app.user.service").read_text(), flags=re.MULTILINE)
    own = f"Environment=PYTHONPATH={TOP}\nStandardOutput=truncate:{told}\n"
    folder.mkdir(parents=True, exist_ok=True)
    unit.write_text(text.replace("[Install]", f"{own}\n[Install]"))
    try:
        subprocess.run(["systemctl", "--user", "daemon-reload"], check=True)
        subprocess.run(["systemctl", "--user", "start", unit.name], timeout=200, check=False)
        found: dict[str, Any] = json.loads(told.read_text())
    finally:
        unit.unlink()
        subprocess.run(["systemctl", "--user", "daemon-reload"], check=False)
    assert found["host"]["delegation"] == "delegated by systemd to pisupervisor-app.service"
    for name in ("memory", "cpus", "pids", "user", "mount", "network", "seccomp", "capabilities"):
        assert found["protections"][name]["verdict"] == "holds", (name, found["protections"][name])


def test_the_dockerfile_names_what_there_is() -> None:
    """Its packages, as this machine's apt knows them, and our own name as the package has it."""
    text = (DEPLOY / "Dockerfile").read_text()
    packages = re.findall(r"--no-install-recommends (.*?) &&", text)[0].split()
    if shutil.which("apt-cache"):
        listed = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout.split()
        assert not listed or set(packages) <= set(listed)
    name = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["name"]
    assert f" --no-index --find-links /wheels {name}\n" in text, "from no index, where anybody may have taken the name"
    assert "python3-venv" in packages
    assert "libseccomp2" in packages
    for copied in re.findall(r"^COPY (\S+)", text, flags=re.MULTILINE):
        assert copied == "wheels" or (DEPLOY / copied).exists()
    assert os.access(DEPLOY / "entrypoint", os.X_OK)


def names(*profiles: Path, action: str = "SCMP_ACT_ALLOW") -> set[str]:
    rules = [rule for profile in profiles for rule in json.loads(profile.read_text())["syscalls"]]
    return {name for rule in rules if rule["action"] == action for name in rule["names"]}


def test_the_engines_profile_has_all_that_a_child_takes_and_no_more() -> None:
    """A filter inside a filter can only take away: what children are allowed, and what makes them, must be in it."""
    engine, ours = names(DEPLOY / "seccomp.json"), TOP / "seccomp_profiles"
    assert names(ours / "default.json", ours / "strict.json") | {*NESTING, "clone3"} <= engine
    more = engine - names(ours / "default.json") - {*NESTING, "clone3"}
    the_applications = (
        "inotify_add_watch inotify_init inotify_init1 inotify_rm_watch sync syncfs get_mempolicy mbind set_mempolicy"
    )
    assert more == set(the_applications.split())
    refused = names(ours / "permissive.json", action="SCMP_ACT_ERRNO")
    assert {"bpf", "ptrace", "process_vm_readv", "keyctl", "open_by_handle_at", "userfaultfd"} <= refused - engine
    load_profile(DEPLOY / "seccomp.json").compile()


@pytest.mark.linux
def test_the_example_application_says_what_held(need: Callable[..., None]) -> None:
    need("userns")
    words = [sys.executable, str(DEPLOY / "app"), "memory", "swap", "cpus", "pids", *DEGRADE]
    done = subprocess.run(
        words, cwd=TOP, env={**os.environ, "PYTHONPATH": str(TOP)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("answer: 42\n")
    assert "\npid: holds, namespace\n" in done.stdout


@pytest.mark.linux
def test_the_entrypoint_leaves_an_ordinary_user_alone(need: Callable[..., None]) -> None:
    """What it does as root, scripts/container-test shows: this machine's own groups are not its business."""
    need("root")
    words = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", str(DEPLOY / "entrypoint"), "id", "-u"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "1000\n"
