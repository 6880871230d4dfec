"""``pisupervisor doctor``: what this host can enforce, proved by doing, and the remedy for what it cannot.

Each protection is tried twice: in a child that has it, where the probe must be stopped, and in a control without it,
where the same probe must get through. Only then is the verdict "holds".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pisupervisor.errors import FeatureUnavailable, IsolationError, LaunchError, OptionsError
from pisupervisor.launch.landlock import SCOPES_SINCE, TCP_SINCE
from pisupervisor.options import PROTECTIONS, IsolationOptions, Limits

if TYPE_CHECKING:
    from pisupervisor.doctor.lab import Lab
    from pisupervisor.doctor.probes import Probe
    from pisupervisor.launch.features import Features
    from pisupervisor.results import Applied

Verdict = Literal["holds", "degraded", "unproved", "missing", "not asked"]
_DEFECT = "this is a defect: do not rely on it, and report it with the kernel's version"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One protection. ``how`` is the mechanism, ``proof`` what the control could do and the child could not."""

    name: str
    verdict: Verdict
    how: str = ""
    proof: str = ""
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """``works``: the default options would; ``obstacle`` says why not. ``witness`` is what python-prctl read inside."""

    host: Mapping[str, str]
    findings: tuple[Finding, ...]
    works: bool
    obstacle: str
    witness: Mapping[str, Any] | None
    seconds: float


def main(*, as_json: bool = False) -> int:
    """Examine, print, and return the exit code: 0 when the default options would work here, else 1."""
    from pisupervisor.doctor.report import as_text

    report = examine()
    if as_json:
        import json

        told = asdict(report)
        told["protections"] = {finding.pop("name"): finding for finding in told.pop("findings")}
        text = json.dumps(told, indent=2, default=str) + "\n"
    else:
        text = as_text(report)
    sys.stdout.write(text)
    return 0 if report.works else 1


def examine() -> Report:
    """Look at this host. What goes wrong on the way becomes part of the report."""
    from pisupervisor.doctor.host import facts
    from pisupervisor.launch import features

    started = time.monotonic()
    try:
        with _stand_in() as member:  # systemd may give a scope to a zygote: look at what it then would have
            found = features.probe(member)
    except IsolationError as error:  # without a /proc of one's own nothing can be found out
        return Report(
            host={"kernel": os.uname().release, "python": sys.executable}, findings=_no_child(error, {}), works=False,
            obstacle=_first_line(error), witness=None, seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip
    lacking = missing_here(found)
    findings, witness = _find(found, lacking)
    obstacle = _obstacle(findings)
    return Report(
        host=facts(found), findings=findings, works=not obstacle, obstacle=obstacle, witness=witness,
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip


@contextmanager
def _stand_in() -> Iterator[int | None]:
    """The pid of a process that does nothing, in place of a zygote; None where this interpreter cannot be started."""
    import subprocess

    try:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    except OSError:
        yield None
        return
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def missing_here(features: Features) -> dict[str, Finding]:
    """What cannot hold here as far as the host's features tell, by name, with cause and remedy."""
    from pisupervisor.limits import cgroups

    everything = cgroups.wanted_limits(Limits(cpu_weight=100, cpuset="0", io_weight=100))
    lacking = {
        one.feature: _missing(one.feature, one.why, one.remedy) for one in cgroups.missing(features.cgroups, everything)
    }
    io = cgroups.place_of(features.cgroups, "io")
    if not io.usable:
        lacking["io"] = _missing("io", io.why, cgroups.remedy(features.cgroups, "io"))
    while (error := _refusal(features, tuple(lacking))) is not None:
        lacking[error.feature] = _missing(error.feature, _first_line(error), error.remedy)
    return lacking


def _refusal(features: Features, degrade: tuple[str, ...]) -> FeatureUnavailable | None:
    """The next protection that the kernel or libseccomp cannot give."""
    from pisupervisor.launch import requirements
    from pisupervisor.launch.seccomp import compile_profile

    try:
        requirements.check_kernel(IsolationOptions(degrade=degrade), features)
        if "seccomp" not in degrade:
            compile_profile("default")
    except FeatureUnavailable as error:
        return error
    return None


def _missing(name: str, cause: str, remedy: str, how: str = "") -> Finding:
    return Finding(name=name, verdict="missing", how=how, cause=cause, remedy=remedy)


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]


def _find(features: Features, lacking: dict[str, Finding]) -> tuple[tuple[Finding, ...], Mapping[str, Any] | None]:
    from pisupervisor.doctor.lab import Lab

    try:
        with Lab(features, tuple(lacking)) as lab:
            lab.check()
            found = _probe_all(lab, lacking)
            return tuple(found[name] for name in PROTECTIONS), _ask_witness(lab)
    except (IsolationError, OSError) as error:
        return _no_child(error, lacking), None


def _no_child(error: Exception, lacking: Mapping[str, Finding]) -> tuple[Finding, ...]:
    cause = f"no child can be started here: {_first_line(error)}"
    remedy = getattr(error, "remedy", None) or "see the cause"
    return tuple(lacking.get(name) or _missing(name, cause, remedy) for name in PROTECTIONS)


def _probe_all(lab: Lab, lacking: Mapping[str, Finding]) -> dict[str, Finding]:
    from pisupervisor.doctor.probes import probes

    found = dict(lacking)
    for probe in probes(lab.scene):
        if probe.name not in found:
            found[probe.name] = _try(lab, probe)
    where = "no folder that this user may write to lies on a block device of its own (tmpfs, overlay?)"
    found.setdefault("io", Finding(name="io", verdict="not asked", cause=where))
    if "io_weight" not in found:
        found["io_weight"] = _read_weight(lab)
    return found


def _read_weight(lab: Lab) -> Finding:
    """Two children at one disk for long enough to see who gets more would keep everybody waiting who uses that disk."""
    try:
        applied = lab.applied(Limits(io_weight=200))["io_weight"]
    except (IsolationError, OSError) as error:
        return _missing("io_weight", _first_line(error), getattr(error, "remedy", None) or _DEFECT)
    return Finding(
        name="io_weight", verdict="unproved", how=f"{applied.how}: {applied.detail}", cause="read back alone"
    )


def _try(lab: Lab, probe: Probe) -> Finding:
    """Try it with and without the protection. Whatever happens on the way is a finding."""
    if probe.name == "swap" and not lab.features.cgroups.swap_on:
        return Finding(name=probe.name, verdict="holds", proof="the host has no swap, so none can be used")
    try:
        got, applied = lab.attempt(probe)
        control = lab.control(probe)
        if not got and not control:  # a busy machine may starve the control: once more
            control = lab.control(probe)
    except (LaunchError, FeatureUnavailable, OptionsError) as error:
        return _missing(probe.name, _first_line(error), getattr(error, "remedy", None) or _DEFECT)
    except Exception as error:  # a doctor that crashes helps nobody
        cause = f"the probe itself failed: {type(error).__name__}: {_first_line(error)}"
        return Finding(name=probe.name, verdict="unproved", cause=cause, remedy="run the doctor once more")
    return _judge(lab.features, probe.name, got, control, applied)


def _judge(features: Features, name: str, got: list[str], control: list[str], applied: Applied) -> Finding:
    """The verdict on what a probe could do (``got``) where the protection is, and where it is not. Pure."""
    if got:
        return _missing(name, f"the probe got through: it {'; '.join(got)}", _DEFECT, applied.how)
    if not applied.holds:
        return _missing(name, f"read back as not holding: {applied.detail}", _DEFECT, applied.how)
    if not control:
        cause = "the control was stopped too, so there is nothing to compare with"
        return Finding(name=name, verdict="unproved", how=applied.how, cause=cause)
    proof = f"without it, the probe {'; '.join(control)}"
    return _full_or_less(features, Finding(name=name, verdict="holds", how=applied.how, proof=proof))


def _full_or_less(features: Features, finding: Finding) -> Finding:
    """Landlock grew: older versions hold, but less."""
    if finding.name != "landlock" or features.landlock_abi >= SCOPES_SINCE:
        return finding
    tcp = "" if features.landlock_abi >= TCP_SINCE else ", no rules for TCP"
    less = f"no scopes for abstract sockets and signals{tcp}"
    cause = f"this kernel's Landlock is version {features.landlock_abi}: {less}; namespaces hold these by themselves"
    return Finding(
        name=finding.name, verdict="degraded", how=finding.how, proof=finding.proof, cause=cause,
        remedy="Linux 6.12 or newer has all of it",
    )  # fmt: skip


def _ask_witness(lab: Lab) -> Mapping[str, Any] | None:
    try:
        return lab.ask_witness()
    except Exception as error:  # as above
        return {"failed": f"{type(error).__name__}: {_first_line(error)}"}


def _obstacle(findings: tuple[Finding, ...]) -> str:
    """Why the default options would not work here; empty when they would."""
    from pisupervisor.isolator import ProcessIsolator

    try:
        with ProcessIsolator.create() as isolator:
            asked = {name for name, entry in isolator.applied.items() if entry.asked not in (None, False, ())}
    except (IsolationError, OSError) as error:
        return _first_line(error)
    broken = [finding.name for finding in findings if finding.verdict == "missing" and finding.name in asked]
    return f"probes got through: {', '.join(broken)}" if broken else ""
