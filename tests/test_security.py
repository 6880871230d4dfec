"""SECURITY.md promises nothing that no test shows: each test it names is there, and no promise names none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "SECURITY.md").read_text()
PROMISES = [row for row in TEXT.split("## Promised")[1].split("\n## ")[0].splitlines() if row.startswith("| ")][1:]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_promise_names_a_test() -> None:
    assert len(PROMISES) >= 15
    for row in PROMISES:
        assert re.search(r"`[\w/]+\.py::test_\w+`", row.split("|")[3]), row


def test_every_test_that_is_named_is_there() -> None:
    missing = [
        f"{file}::{name}" for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT) if name not in names_in(file)
    ]
    assert missing == []


def test_files_and_scripts_that_are_named_are_there() -> None:
    for name in re.findall(r"`((?:docs|scripts|tests)/[\w./]+)`", TEXT):
        assert (TESTS.parent / name).exists(), name
