"""CPython's own tests and well-known libraries in confined children, beside the same outside: writes docs/compat.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / "tests" / "compat"))
from compare import Difference, Run, differences, inside, outside  # noqa: E402
from libraries import NEEDS, PACKAGES, attempt  # noqa: E402
from modules import MODULES, SAMPLE  # noqa: E402

DOCUMENT = TOP / "docs" / "compat.md"
BOX = 300.0  #: seconds for one module

HEAD = """# Real programs inside

Written by `scripts/compat` ({date}); not by hand. {machine}.

Each of {modules} modules of CPython's own regression tests was run in a confined child (the default walls and profile,
`network="loopback"`) and outside (as an ordinary user, with a session, umask and folder of its own): {tests} tests, of
which {equal} ended alike. The others, each with the reason, are what a program must do without inside. (A module that
shows a difference nobody has explained is run once more: some tests measure time.)

"""


STRICT = """
## What `strict` refuses

Beside what `default` refuses: locks on files (`fcntl` and `flock`; so no sqlite), watches on them, extended
attributes (an answer as of a file system without them), and these system calls: {names}.

What that means to the sample of CPython's tests that continuous integration runs:

| module | tests | end otherwise than under `default` | they say |
|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="only these, and write no document")
    chosen = parser.parse_args().modules
    os.nice(5)
    results = {module: compare(module) for module in chosen or MODULES}
    libraries, strict = ([], []) if chosen else (list(library_rows()), list(strict_rows(results)))
    found = {module: differences(module, *runs) for module, runs in results.items()}
    strange = [(module, each) for module, list_ in found.items() for each in list_ if not each.reason]
    for module, each in strange:
        print(f"UNEXPLAINED {module} {each.test}: {each.outside} -> {each.inside}\n{each.said[-1500:]}")
    if not chosen and not strange:
        DOCUMENT.write_text(document(results, found, libraries, strict))
        print(f"{DOCUMENT} written")
    return 1 if strange else 0


def compare(module: str) -> tuple[Run, Run]:
    """Outside, then inside; one after the other, since tests measure time. Once more where that shows something new."""
    for _ in range(2):
        started = time.monotonic()
        runs = outside(module, BOX), inside(module, BOX)
        other = differences(module, *runs)
        print(
            f"{module}: {len(runs[0].outcomes)} tests, {len(other)} differ, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if all(each.reason for each in other):
            break
    return runs


def library_rows() -> Iterable[str]:
    """What each library's piece of work came to under two profiles."""
    for name, module in NEEDS.items():
        said = [attempt(name, profile) for profile in ("default", "strict")]
        print(f"{name}: {said}", flush=True)
        yield f"| {name.replace('_', ' ')} | {_version(module)} | {said[0]} | {said[1]} |"


def refused_by_strict() -> str:
    """System calls that ``default`` lets pass, in whatever form, and ``strict`` in none: read off the profiles."""
    allowed = []
    for profile in ("default", "strict"):
        rules = json.loads((TOP / "seccomp_profiles" / f"{profile}.json").read_text())["syscalls"]
        allowed.append({name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]})
    return ", ".join(f"`{name}`" for name in sorted(allowed[0] - allowed[1]))


def strict_rows(results: dict[str, tuple[Run, Run]]) -> Iterable[str]:
    """The sample behind ``strict``: how many tests end otherwise than behind ``default``, and what these say."""
    for module in SAMPLE:
        there = inside(module, BOX, "strict")
        other = differences(module, results[module][1], there)
        print(f"{module} under strict: {len(other)} differ", flush=True)
        lines = Counter(_last_line(each.said) or each.inside for each in other)
        said = "; ".join(f"{count} x {line}" for line, count in lines.most_common(4))
        yield f"| {module} | {len(there.outcomes)} | {len(other)} | {said} |"


def _last_line(said: str) -> str:
    """Of an error, without the paths and commands that differ from test to test, fit for a table."""
    last = (said.strip().splitlines() or [""])[-1]
    return re.split(r": ['\[]|Command '| '", last.replace("|", " ").replace(": [Errno", " [Errno"))[0].rstrip(": ")


def _version(module: str) -> str:
    return version(PACKAGES[module]) if module in PACKAGES else "standard library"


def document(
    results: dict[str, tuple[Run, Run]], found: dict[str, list[Difference]], libraries: list[str], strict: list[str]
) -> str:  # fmt: skip
    """The text of docs/compat.md. Pure but for the machine's name."""
    tests = sum(len(before.outcomes) for before, _ in results.values())
    equal = tests - sum(len(each) for each in found.values())
    machine = f"CPython {platform.python_version()}, Linux {platform.release().split('-')[0]}, {platform.machine()}"
    lines = [
        HEAD.format(machine=machine, date=time.strftime("%Y-%m-%d"), modules=len(results), tests=tests, equal=equal)
    ]
    lines += ["| module | test | outside | inside | reason |\n|---|---|---|---|---|\n"]
    lines += [
        f"| {m} | {d.test} | {d.outside} | {d.inside} | {d.reason} |\n" for m, list_ in found.items() for d in list_
    ]
    lines += [
        "\n## Libraries\n\nReal work of each (tests/compat/work.py) in a child, and what the profile `strict` says to it.\n"
    ]
    lines += ["\n| work | version | default | strict |\n|---|---|---|---|\n", *(f"{row}\n" for row in libraries)]
    lines += [STRICT.format(names=refused_by_strict()), *(f"{row}\n" for row in strict)]
    lines += ["\n## Modules\n\n| module | tests | ok | skipped outside too | differ |\n|---|---|---|---|---|\n"]
    for module, (before, after) in results.items():
        outcomes = list(after.outcomes.values())
        counts = f"{len(outcomes)} | {outcomes.count('ok')} | {list(before.outcomes.values()).count('skip')}"
        lines.append(f"| {module} | {counts} | {len(found[module])} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
