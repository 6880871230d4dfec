"""A plugin like any other: it surveys the running interpreter's own standard library, and knows of no supervisor."""

from __future__ import annotations

import ast
import heapq
import os
import sysconfig
from collections.abc import Iterator
from typing import Any


def survey(limit: int | None = None, top: int = 10) -> dict[str, Any]:
    """Parses every source file (at most ``limit``) and returns counts and the ``top`` largest functions."""
    root = sysconfig.get_paths()["stdlib"]
    counts = {"files": 0, "lines": 0, "classes": 0, "functions": 0, "unparsable": 0}
    largest: list[tuple[int, str]] = []
    for path in source_files(root, limit):
        count_file(path, os.path.relpath(path, root), counts, largest)
        largest = heapq.nlargest(top, largest)  # one file at a time: only its best survive
    return {**counts, "python": sysconfig.get_python_version(), "root": root, "largest": largest}


def source_files(root: str, limit: int | None) -> Iterator[str]:
    """The paths of the ``.py`` files below ``root``, installed packages left out."""
    found = 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages"})
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path) and (limit is None or found < limit):  # no dead links
                found += 1
                yield path


def count_file(path: str, shown: str, counts: dict[str, int], largest: list[tuple[int, str]]) -> None:
    """Adds one file to ``counts``, and its functions to ``largest`` as (lines, where)."""
    with open(path, "rb") as file:
        source = file.read()
    counts["files"] += 1
    counts["lines"] += source.count(b"\n")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the standard library's tests carry broken files on purpose
        counts["unparsable"] += 1
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            counts["classes"] += 1
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            counts["functions"] += 1
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            largest.append((lines, f"{shown}:{node.lineno} {node.name}"))
