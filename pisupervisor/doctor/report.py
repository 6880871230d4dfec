"""The doctor's report as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pisupervisor.cli_output import escaped

if TYPE_CHECKING:
    from pisupervisor.doctor import Finding, Report

WIDTH = 100
_LEGEND = (
    "holds: the probe was stopped in a child and got through in a control without the protection. degraded: holds, but"
    " less than newer hosts give. unproved: read back, not shown by doing. missing: cannot hold here."
)


def as_text(report: Report) -> str:
    """The whole report."""
    lines = ["This host"]
    for name, text in report.host.items():
        lines += _entry(f"  {name:17}", text)
    lines += ["", f"What it enforces (probed in {report.seconds:.1f} s)"]
    for finding in report.findings:
        lines += _entry(f"  {finding.name:13}{finding.verdict:10}", _evidence(finding))
    lines += textwrap.wrap(_LEGEND, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += _witness(report)
    for names, finding in _by_trouble(report.findings).items():
        lines += _trouble(names, finding)
    verdict = f"would not work here: {report.obstacle}" if report.obstacle else "work here."
    lines += ["", *textwrap.wrap(f"The default options {verdict}", WIDTH)]
    return escaped("\n".join(lines) + "\n")


def _entry(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text or "-", WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _evidence(finding: Finding) -> str:
    return "; ".join(text for text in (finding.how, finding.proof) if text) or "see below"


def _witness(report: Report) -> list[str]:
    if report.witness is None:
        return []
    said = ", ".join(f"{name} {value or 'none'}" for name, value in report.witness.items())
    return ["", *_entry("Witness: ", f"python-prctl, run in a child, reads {said}")]


def _by_trouble(findings: Iterable[Finding]) -> dict[str, Finding]:
    """One finding for all that have the same cause and remedy, by their names: where no child starts, that is most."""
    names: dict[tuple[str, ...], list[str]] = {}
    first: dict[tuple[str, ...], Finding] = {}
    for finding in findings:
        if finding.cause:
            key = (finding.verdict, finding.cause, finding.remedy)
            names.setdefault(key, []).append(finding.name)
            first.setdefault(key, finding)
    return {", ".join(names[key]): finding for key, finding in first.items()}


def _trouble(names: str, finding: Finding) -> list[str]:
    lines = ["", *_entry("", f"{names}: {finding.verdict}"), *_entry("  cause:  ", finding.cause)]
    for number, remedy in enumerate(finding.remedy.split("\n")) if finding.remedy else ():
        lines += _entry("          " if number else "  remedy: ", remedy.strip())
    return lines
