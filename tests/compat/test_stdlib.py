"""CPython's own tests, a sample of them, end in a confined child as they end outside; ``scripts/compat`` runs them all."""

from __future__ import annotations

from pathlib import Path

import features
import pytest
from compare import Run, differences, inside, known, outside
from differences import KNOWN
from libraries import NEEDS
from modules import MODULES, SAMPLE

features.need("testsuite")
TIMEOUT = 50.0


@pytest.mark.linux
@pytest.mark.parametrize("module", SAMPLE)
def test_ends_inside_as_outside(module: str) -> None:
    before, after = outside(module, TIMEOUT), inside(module, TIMEOUT)
    assert (before.ended, after.ended) == ("", "")
    assert "ok" in before.outcomes.values()
    assert [found for found in differences(module, before, after) if not found.reason] == []


def test_a_difference_is_seen_and_only_a_known_one_has_a_reason() -> None:
    one = Run(
        {"test.test_pty.PtyTest.test_fork": "ok", "test.test_pty.Other.test": "ok", "test.test_pty.Gone.test": "ok"}
    )
    other = Run({"test.test_pty.PtyTest.test_fork": "error", "test.test_pty.Other.test": "fail"}, ended="killed")
    found = [(each.test, each.inside, bool(each.reason)) for each in differences("test_pty", one, other)]
    assert found == [
        ("Gone.test", "not run", False), ("Other.test", "fail", False), ("PtyTest.test_fork", "error", True),
        ("(the module)", "killed", False),
    ]  # fmt: skip


def test_the_lists_fit_together() -> None:
    assert len(set(MODULES)) == len(MODULES) >= 60
    assert set(KNOWN) <= set(MODULES)


def test_the_document_is_of_these_modules_and_leaves_nothing_unexplained() -> None:
    """docs/compat.md, as scripts/compat last wrote it."""
    text = (Path(__file__).parents[2] / "docs" / "compat.md").read_text()
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")][1:]
        for part in text.split("\n## ")
    ]
    different, libraries, strict, modules = tables
    assert [row[0] for row in modules] == list(MODULES)
    assert [row for row in different if row[-1] != known(row[0], row[1]) or not row[-1]] == []
    assert [(row[0], row[2]) for row in libraries] == [(name.replace("_", " "), "works") for name in NEEDS]
    assert [row[0] for row in strict] == list(SAMPLE)
