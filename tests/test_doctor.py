"""The doctor: its verdicts on this host, on an ordinary user's, and on hosts that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import OrdinaryUser
from helpers import DEGRADE

from pisupervisor import doctor
from pisupervisor.doctor import Finding, Report, lab as doctor_lab, probes as doctor_probes, report as doctor_report
from pisupervisor.errors import LaunchError
from pisupervisor.launch import features, templates
from pisupervisor.limits.cgroups import CONTROLLER_OF, CgroupHost, Place
from pisupervisor.options import PROTECTIONS
from pisupervisor.results import Applied

TOP = Path(__file__).parent.parent
LIMITS = ("memory", "cpus", "cpu_weight", "cpuset", "pids", "io")
WALLS = (
    "devices",
    "user",
    "mount",
    "pid",
    "network",
    "ipc",
    "uts",
    "cgroup",
    "time",
    "landlock",
    "seccomp",
    "capabilities",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pisupervisor", "doctor", *arguments], cwd=TOP, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.linux
def test_an_answer_that_comes_too_late_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = doctor_lab.Plain()
    try:
        assert plain.run("got = ['first']") == ["first"]
        monkeypatch.setattr(doctor_lab, "_PATIENCE", 0.1)
        with pytest.raises(doctor_lab.ProbeFailed, match="no answer"):
            plain.run("import time; time.sleep(0.3); got = ['late']")
        monkeypatch.setattr(doctor_lab, "_PATIENCE", 10.0)
        assert plain.run("got = ['second']") == ["second"]
        with pytest.raises(doctor_lab.ProbeFailed, match="in the control: ValueError"):
            plain.run("raise ValueError('x')")
        plain.process.kill()
        plain.process.wait()
        with pytest.raises(doctor_lab.ProbeFailed, match="has ended"):
            plain.run("got = []")
    finally:
        plain.close()


# --- this host -------------------------------------------------------------------------------------------------------


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.bed
def test_everything_holds_here_and_each_control_got_through(need: Callable[..., None]) -> None:
    need("landlock")
    done = run("--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["works"], told["obstacle"], done.stderr) == (0, True, "", "")
    assert list(told["protections"]) == list(PROTECTIONS)
    for name, found in told["protections"].items():
        excused = name in ("io", "io_weight", "cpuset") and found["verdict"] in ("not asked", "missing", "unproved")
        assert excused or found["verdict"] in ("holds", "degraded"), (name, found)
        assert excused or found["proof"], name
    for name in set(PROTECTIONS) - {"io", "io_weight", "cpuset", "swap"}:
        assert told["protections"][name]["proof"].startswith("without it, the probe "), name
    assert {"kernel", "python", "cgroups", "landlock", "user namespaces"} <= set(told["host"])


@pytest.mark.linux
@pytest.mark.root
def test_the_witness_agrees() -> None:
    pytest.importorskip("prctl")
    witness = json.loads(run("--json").stdout)["witness"]
    assert witness["capabilities"] == []
    assert witness["no_new_privs"] == 1
    assert witness["securebits"] & 0b10101111 == 0b10101111, "noroot, no_setuid_fixup, no_ambient_raise: set and locked"


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.root
def test_the_text_fits_and_nothing_is_left() -> None:
    before = set(Path("/tmp").glob("pisupervisor-doctor-*")), Path("/proc/sysvipc/shm").read_text()
    done = run()
    assert done.returncode == 0
    assert "The default options work here." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    for name in PROTECTIONS:
        assert f"\n  {name} " in done.stdout
    assert (set(Path("/tmp").glob("pisupervisor-doctor-*")), Path("/proc/sysvipc/shm").read_text()) == before


@pytest.mark.rootless
@pytest.mark.bed
def test_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    environment = {"PYTHONPATH": str(TOP), **ordinary_user.environment}
    user = OrdinaryUser(ordinary_user.home, ordinary_user.python, environment)
    done = user.run(user.python, "-m", "pisupervisor", "doctor", "--json")
    told = json.loads(done.stdout)
    found = told["protections"]
    hidden = set(re.findall(r":(/.*)", Path("/proc/self/cgroup").read_text())) == {"/"}  # by a container's namespace
    for name in set(WALLS) - set(DEGRADE) - ({"cgroup"} if hidden else set()):
        assert found[name]["verdict"] in ("holds", "degraded"), (name, found[name])
        assert found[name]["proof"]
    assert "Traceback" not in done.stderr
    if found["memory"]["verdict"] == "holds":
        pytest.skip("this user may make groups here")
    for name in LIMITS:
        assert found[name]["verdict"] == "missing"
        assert found[name]["cause"]
        assert any(
            way in found[name]["remedy"] for way in ("chown -R 1000", "mount", "systemd-run --user", "chown 1000")
        )
    assert (done.returncode, told["works"]) == (1, False)
    assert any(name in told["obstacle"].lower() for name in ("memory", *DEGRADE)), told["obstacle"]


# --- hosts that lack something -----------------------------------------------------------------------------------------


def without_cgroups() -> CgroupHost:
    places = {name: Place(None, None, f"there is no cgroup v1 {name} hierarchy") for name in CONTROLLER_OF.values()}
    return CgroupHost(mode="none", places=places, memsw=False, swap_on=True, uid=os.geteuid())


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> features.Features:
    """A host whose features differ in this; what remains is real."""
    changed = replace(features.probe(), **changes)
    monkeypatch.setattr(features, "probe", lambda *_wishes: changed)
    monkeypatch.setattr(templates, "probe", lambda *_wishes: changed, raising=False)
    return changed


def by_name(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


@pytest.mark.linux
def test_a_host_without_landlock_and_cgroups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, landlock_abi=0, cgroups=without_cgroups())
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    report = doctor.examine()
    found = by_name(report)
    for name in (*LIMITS, "swap", "landlock"):
        assert found[name].verdict == "missing"
        assert found[name].cause
        assert found[name].remedy
    assert "lsm=landlock" in found["landlock"].remedy
    assert "mount -t cgroup" in found["memory"].remedy
    for name in set(WALLS) - {"landlock"}:
        assert found[name].verdict == "holds", found[name]
    assert not report.works
    assert report.obstacle
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, fds)
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "landlock: missing" in text
    assert "The default options would not work here" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_the_features_tell_needs_no_child() -> None:
    bare = features.Features(
        root=False, uid=1000, gid=1000, kernel="4.4.0", namespaces=frozenset({"mnt", "net", "pid"}), landlock_abi=0,
        cgroups=without_cgroups(),
    )  # fmt: skip
    found = doctor.missing_here(bare)
    assert set(found) == {*LIMITS, "io_weight", "swap", "landlock", "user", "ipc", "uts", "cgroup", "time"}
    assert all(finding.cause and finding.remedy for finding in found.values())


@pytest.mark.linux
def test_a_host_where_no_child_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)

    def refuse(*_arguments: object, **_changes: object) -> None:
        raise LaunchError("Operation not permitted", step="namespaces", errno=1, remedy="sysctl something")

    monkeypatch.setattr(doctor_lab.ProcessIsolator, "create", refuse)
    report = doctor.examine()
    assert not report.works
    for finding in report.findings:
        assert finding.verdict == "missing"
        assert finding.remedy
    assert "namespaces" in by_name(report)["seccomp"].cause
    assert by_name(report)["seccomp"].remedy == "sysctl something"


@pytest.mark.linux
def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a read-only root."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(doctor_lab.tempfile, "gettempdir", none)
    found = by_name(doctor.examine())["seccomp"]
    assert "no folder to write" in found.cause
    assert "--tmpfs /tmp" in found.remedy


@pytest.mark.linux
@pytest.mark.root
def test_a_wall_that_does_not_stand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The children get no seccomp filter behind the doctor's back."""
    really = doctor_lab.Lab._in_child

    def unfiltered(lab: Any, probe: Any, changes: Any, without: tuple[str, ...]) -> Any:
        return really(lab, probe, changes, (*without, "seccomp") if probe.name == "seccomp" else without)

    only = {"seccomp", "time"}
    every = doctor_probes.probes
    monkeypatch.setattr(doctor_lab.Lab, "_in_child", unfiltered)
    monkeypatch.setattr(doctor_probes, "probes", lambda scene: [one for one in every(scene) if one.name in only])
    with doctor_lab.Lab(features.probe(), ()) as lab:
        found = doctor._probe_all(lab, {})
    assert found["time"].verdict == "holds"
    assert found["seccomp"].verdict == "missing"
    assert "opened a netlink socket" in found["seccomp"].cause
    assert "defect" in found["seccomp"].remedy


@pytest.mark.linux
@pytest.mark.root
def test_who_may_not_listen_can_start_children_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of another isolator, or a unit with SocketBindDeny=: only the probe that needs it proves nothing."""

    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_lab.socket, "create_server", refuse)
    with doctor_lab.Lab(features.probe(), ()) as lab:
        network = next(probe for probe in doctor_probes.probes(lab.scene) if probe.name == "network")
        assert doctor._try(lab, network).verdict == "unproved"


@pytest.mark.linux
@pytest.mark.root
def test_a_probe_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor_probes.Probe(name="uts", source="raise RuntimeError('odd')")
    with doctor_lab.Lab(features.probe(), ()) as lab:
        finding = doctor._try(lab, broken)
        assert finding.verdict == "unproved"
        assert "RuntimeError: odd" in finding.cause
        finding = doctor._try(lab, doctor_probes.Probe(name="uts", source="got = 'no list'"))
        assert finding.verdict == "unproved"
        finding = doctor._try(lab, doctor_probes.Probe(name="uts", source="got = 1 / 0", plain=True))
        assert finding.verdict == "unproved"


# --- verdicts, pure --------------------------------------------------------------------------------------------------

HOLDS = Applied(asked=True, holds=True, how="namespace")


def host(abi: int) -> Any:
    return SimpleNamespace(landlock_abi=abi, kernel="6.1")


@pytest.mark.parametrize(
    ("got", "control", "applied", "verdict"),
    [
        ([], ["got through"], HOLDS, "holds"), (["got through"], ["got through"], HOLDS, "missing"),
        (["got through"], [], HOLDS, "missing"), ([], [], HOLDS, "unproved"),
        ([], ["got through"], Applied(asked=True, holds=False, detail="why"), "missing"),
    ],
)  # fmt: skip
def test_verdicts(got: list[str], control: list[str], applied: Applied, verdict: str) -> None:
    finding = doctor._judge(host(7), "uts", got, control, applied)
    assert finding.verdict == verdict
    assert finding.proof if verdict == "holds" else finding.cause
    assert bool(finding.remedy) == (verdict == "missing")


@pytest.mark.parametrize(
    ("abi", "verdict", "word"), [(7, "holds", ""), (5, "degraded", "scopes"), (3, "degraded", "TCP")]
)
def test_older_landlock_is_less(abi: int, verdict: str, word: str) -> None:
    finding = doctor._judge(host(abi), "landlock", [], ["got through"], HOLDS)
    assert finding.verdict == verdict
    assert finding.proof
    assert word in finding.cause


def test_there_is_a_probe_for_every_protection() -> None:
    scene = {"FIRST": 0, "BLOCK": "/some/file"}
    tried = tuple(name for name in PROTECTIONS if name != "io_weight")  # read back alone
    assert tuple(probe.name for probe in doctor_probes.probes(scene)) == tried
    assert {probe.name for probe in doctor_probes.probes({**scene, "BLOCK": None})} == set(tried) - {"io"}
    for probe in doctor_probes.probes(scene):
        assert probe.plain or probe.without or probe.control != probe.options, f"{probe.name} has no control"
        if probe.source != doctor_probes.RIVALS:
            compile(probe.source, probe.name, "exec")


def test_the_report_fits_whatever_it_says() -> None:
    long = "a cause of many words " * 20 + "\x1b[31m"
    findings = tuple(
        Finding(name=name, verdict="missing", cause=long + name, remedy=long + "\n" + long) for name in PROTECTIONS
    )
    report = Report(
        host={"kernel": long}, findings=findings, works=False, obstacle=long, witness={"a": []}, seconds=1.0
    )
    text = doctor_report.as_text(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 103  # an escape may come on top
    assert text.count("remedy: ") == len(PROTECTIONS)


def test_what_has_one_cause_is_told_once() -> None:
    findings = tuple(Finding(name=name, verdict="missing", cause="no child", remedy="do this") for name in PROTECTIONS)
    other = Finding(name="io", verdict="missing", cause="no disk", remedy="buy one")
    report = Report(
        host={}, findings=(*findings[:3], other, *findings[4:]), works=False, obstacle="", witness=None, seconds=1.0
    )
    text = doctor_report.as_text(report)
    assert text.count("do this") == text.count("buy one") == 1
    assert f"\n{findings[0].name}, {findings[1].name}, {findings[2].name}, {findings[4].name}" in text
    assert "\nio: missing\n" in text
