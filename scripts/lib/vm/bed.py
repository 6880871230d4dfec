"""bed.py IMAGES [--arch A] [--all] [--kernel K]... [--mode M]... [-j N] [--table FILE] [-- PYTEST ARGUMENT...]

Runs the tests marked ``bed`` in VMs, one for each kernel and mode, and says what came of each. A cell is green when
nothing failed and every skipped test was skipped for a word on the closed list of what this cell lacks.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import threading
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import machine

TOP = Path(__file__).resolve().parents[3]
_LINES = Path(__file__).with_name("kernels.txt").read_text().splitlines()
KERNELS = tuple(line.split()[0] for line in _LINES if not line.startswith("#"))
EVERY_RUN = (
    "root",
    "user-plain",
    "container",
    "user",
    "container-user",
)  # the longest first; what any of them is not, --all runs
#: what a mode has (features of tests/features.py): a test that is skipped for want of one of these fails
HAS = {
    "root": "root,rootless,sys_resource,children,cgroups,v2,v2_io,v2_cpuset,limits",
    "user": "children,cgroups,v2,v2_io,v2_cpuset,limits",
    "user-scope": "children,cgroups,v2,v2_io,v2_cpuset,limits",
    "user-stock": "children,cgroups,v2,limits",
    "user-plain": "children,limits,scope",
    "bare": "root,rootless,sys_resource,children,cgroups,v2,v2_io,v2_cpuset,limits",
    "bare-user": "children,undelegated",
    "container": "root,rootless,undelegated",
    "container-user": "children,undelegated",
    "container-priv": "root,rootless,children,cgroups,v2,v2_io,v2_cpuset,limits",
}
EVERYWHERE = {
    "userns", "seccomp", "landlock", "landlock_net", "landlock_scopes", "nproc_apart", "cgroup_kill", "memory_peak",
    "overlay", "own_machine",
}  # fmt: skip
#: what a kernel lacks: Landlock came with 5.13, its rules for TCP with 6.7, its scopes with 6.12; cgroup.kill with 5.14,
#: memory.peak with 5.19
LACKS = {
    "5.10": {"landlock", "landlock_net", "landlock_scopes", "nproc_apart", "cgroup_kill", "memory_peak"},
    "6.1": {"landlock_net", "landlock_scopes"},
}
#: words that tests skip with and no probe answers to -> the modes that lack it. No word beside these explains a skip.
WORDS = {
    "systemd": {"bare", "bare-user", "container", "container-user", "container-priv"},
    "mounts": {"container"},  # its root has no CAP_SYS_ADMIN
    "no_mounts": set(machine.MODES) - {"container"},
    "ahead": {"container", "container-priv"},  # where root may not go before others
    "io_cost": {"container-priv"},  # only the top of the tree has its switch, and a container does not see that
}
SECONDS, SECONDS_OF_MANY = 900.0, 1500.0  # for one cell; --all and --arch run more tests in each
MEASURED = "of the limit: "
HEAD = "| kernel | mode | passed | skipped | result | seconds |\n|---|---|---|---|---|---|\n"
LIMITS = ("memory", "quota", "weight", "pids")
LIMITS_HEAD = f"| kernel | mode | {' | '.join(LIMITS)} |\n|---|---|{'---|' * len(LIMITS)}\n"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What came of one kernel in one mode. ``trouble`` is empty where it is green; ``repeats``: VMs that got stuck;
    ``why``: how many tests were skipped for want of what; ``shares``: of each limit, what was had.
    """

    kernel: str
    mode: str
    version: str
    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    repeats: int = 0
    trouble: tuple[str, ...] = ()
    why: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def row(self) -> str:
        result = "; ".join(self.trouble) or "green" + (f" (VM stuck {self.repeats} time)" if self.repeats else "")
        skipped = str(self.skipped) + (
            f": {', '.join(f'{name} {n}' for name, n in self.why.items())}" if self.why else ""
        )
        return f"| {self.version} | {self.mode} | {self.passed} | {skipped} | {result} | {self.seconds:.0f} |\n"

    def limits_row(self) -> str:
        told = (f"{self.shares[name]:.1%}" if name in self.shares else "" for name in LIMITS)
        return f"| {self.version} | {self.mode} | {' | '.join(told)} |\n"


def features(kernel: str, mode: str, arch: str = "x86_64") -> set[str]:
    """What the cell has: a machine that lacks one of these, or a test that is skipped for it, is a failure."""
    has = EVERYWHERE | set(HAS[mode].split(","))
    has |= {"arm32"} if arch == "aarch64" else set()  # QEMU's CPU has that mode
    # a container's root without CAP_SYS_ADMIN mounts nothing, and users may mount overlays since 5.11
    without_overlay = mode == "container" or (kernel == "5.10" and "root" not in HAS[mode].split(","))
    return has - LACKS.get(kernel, set()) - ({"overlay"} if without_overlay else set())


def lacks(kernel: str, mode: str, arch: str = "x86_64") -> set[str]:
    """The only words that explain a skip in that cell."""
    known = {name for names in HAS.values() for name in names.split(",")} | EVERYWHERE | {"v1", "arm32"}
    return known - features(kernel, mode, arch) | {word for word, modes in WORDS.items() if mode in modes}


def skips(junit: Path) -> dict[str, int]:
    """Why tests were skipped, and how many for each reason's first word: the feature that the cell lacks."""
    words = (word(str(skip.get("message"))) for skip in ElementTree.parse(junit).iter("skipped"))
    return dict(Counter(words).most_common())


def shares(junit: Path) -> dict[str, float]:
    """What tests/test_exact_limits.py measured: the limit -> what was had, as a share of it."""
    found = {str(one.get("name")): str(one.get("value")) for one in ElementTree.parse(junit).iter("property")}
    return {name.removeprefix(MEASURED): float(value) for name, value in found.items() if name.startswith(MEASURED)}


def judge(junit: Path, lacking: set[str]) -> tuple[int, int, list[str]]:
    """(passed, skipped, trouble) of a pytest run, from its report."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    trouble = []
    skipped = 0
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            trouble.append(f"failed: {name}")
        elif (skip := case.find("skipped")) is not None:
            skipped += 1
            reason = str(skip.get("message"))
            if word(reason) not in lacking:
                trouble.append(f"skipped: {name}: {reason}")
    return len(cases) - skipped - sum(text.startswith("failed") for text in trouble), skipped, trouble


def word(reason: str) -> str:
    """What a skip is for: reasons begin with the feature's name."""
    return reason.removeprefix("Skipped: ").split(":")[0].strip()


class Bed:
    """Runs cells and tells what happens, line by line."""

    def __init__(self, images: Path, arguments: Sequence[str], seconds: float = SECONDS, arch: str = "x86_64") -> None:
        self.images, self.arguments, self.seconds, self.arch = images, arguments, seconds, arch
        self._telling = threading.Lock()

    def tell(self, text: str) -> None:
        with self._telling:
            print(text, flush=True)

    def try_to_run(self, kernel: str, mode: str) -> Cell:
        """The same; whatever goes wrong in one cell, the others have their turn."""
        try:
            return self.run(kernel, mode)
        except Exception as error:
            self.tell(f"[{kernel} {mode}] {traceback.format_exc()}")
            trouble = (f"could not be run: {type(error).__name__}: {error}",)
            return Cell(kernel=kernel, mode=mode, version=kernel, trouble=trouble)

    def run(self, kernel: str, mode: str) -> Cell:
        """Once more where the VM got stuck: that says nothing about the tests. Never for a failed test."""
        version = (self.images / kernel / "version").read_text().strip()
        for attempt in (0, 1):
            with tempfile.TemporaryDirectory(prefix="pisupervisor-bed-") as name:
                outcome = self._boot(kernel, mode, Path(name))
                if outcome.status not in (machine.TIMEOUT, machine.NO_REPORT):
                    return self._judged(kernel, mode, version, outcome, Path(name), attempt)
            self.tell(f"[{kernel} {mode}] the VM got stuck after {outcome.seconds:.0f} s\n{outcome.console}")
        stuck = ("the VM got stuck twice",)
        return Cell(kernel=kernel, mode=mode, version=version, seconds=outcome.seconds, repeats=2, trouble=stuck)

    def _boot(self, kernel: str, mode: str, output: Path) -> machine.Outcome:
        has = ",".join(sorted(features(kernel, mode, self.arch)))
        pytest = machine.quoted("python", "-m", "pytest", *self.arguments)
        command = f"PISUPERVISOR_REQUIRE={has} {pytest} -p no:cacheprovider --junitxml=$VM_OUT/junit.xml"
        say = lambda line: self.tell(f"[{kernel} {mode}] {line}")  # noqa: E731
        return machine.run(
            self.images, self.arch, kernel, mode, TOP, command, output=output, timeout=self.seconds, say=say
        )

    def _judged(
        self, kernel: str, mode: str, version: str, outcome: machine.Outcome, output: Path, repeats: int
    ) -> Cell:
        junit = output / "junit.xml"
        there = junit.exists()
        passed, skipped, trouble = judge(junit, lacks(kernel, mode, self.arch)) if there else (0, 0, [])
        if outcome.status and not trouble:
            trouble = [f"pytest ended with {outcome.status}"]
        cell = Cell(
            kernel=kernel, mode=mode, version=version, passed=passed, skipped=skipped, seconds=outcome.seconds,
            repeats=repeats, trouble=tuple(trouble), why=skips(junit) if there else {}, shares=shares(junit) if there else {},
        )  # fmt: skip
        measured = ", ".join(f"{name} {share:.1%}" for name, share in cell.shares.items())
        self.tell(f"[{kernel} {mode}] {cell.row().strip()} {measured}")
        return cell


def table(cells: Iterable[Cell]) -> str:
    """All cells, and of those that measured limits, what they measured."""
    cells = list(cells)
    measured = "".join(cell.limits_row() for cell in cells if cell.shares)
    return HEAD + "".join(cell.row() for cell in cells) + (f"\n{LIMITS_HEAD}{measured}" if measured else "")


def write_table(path: Path, cells: Iterable[Cell], date: str, arch: str = "x86_64") -> None:
    """Put the table where this architecture's last one stood in a Markdown file: between two comments."""
    name = "bed" if arch == "x86_64" else f"bed {arch}"
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    head, _, rest = path.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}Run on {date}.\n\n{table(cells)}{end}{tail}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    modes = "\n".join(f"  {name:15}{text}" for name, text in machine.MODES.items())
    parser = argparse.ArgumentParser(
        prog="scripts/vm-test", description="\n".join((__doc__ or "").splitlines()[2:]), epilog=f"modes:\n{modes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("images", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arch", choices=machine.ARCHES, default="x86_64", help="default: x86_64")
    parser.add_argument(
        "--all", action="store_true", help="more tests, in every kernel and mode but where some are named"
    )
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: 6.1")
    parser.add_argument("--mode", action="append", choices=machine.MODES, help=f"default: {', '.join(EVERY_RUN)}")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="VMs at once")
    parser.add_argument("--table", type=Path, help="write the table into this Markdown file")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:split])
    marks = ("bed", *(["matrix"] if args.all else []), *(["arch"] if args.arch != "x86_64" else []))
    args.pytest = list(arguments[split + 1 :]) or chosen(marks)
    return args


def chosen(marks: tuple[str, ...]) -> list[str]:
    """pytest's arguments for the tests that wear one of these marks. Collecting all files takes a VM a minute."""
    tests = sorted((TOP / "tests").rglob("test_*.py"))
    files = [str(path.relative_to(TOP)) for path in tests if any(f"mark.{mark}" in path.read_text() for mark in marks)]
    return [
        "-q",
        "-m",
        f"({' or '.join(marks)}) and not unhurried",
        "--color=no",
        "--timeout=240",
        "--durations=10",
        *files,
    ]


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    kernels = args.kernel or (KERNELS if args.all else ("6.1",))
    modes = args.mode or (tuple(machine.MODES) if args.all else EVERY_RUN)
    if missing := machine.missing_tools(args.arch):
        print(f"vm-test: not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    many = args.all or args.arch != "x86_64"
    bed = Bed(args.images, args.pytest, SECONDS_OF_MANY if many else SECONDS, args.arch)
    with ThreadPoolExecutor(args.jobs) as pool:
        cells = list(
            pool.map(lambda pair: bed.try_to_run(*pair), [(kernel, mode) for kernel in kernels for mode in modes])
        )
    print(table(cells))
    if args.table:
        write_table(args.table, cells, datetime.date.today().isoformat(), args.arch)
    return 1 if any(cell.trouble for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
