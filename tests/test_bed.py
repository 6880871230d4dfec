"""The test bed's own decisions: what a cell must have, which skips are explained, and the table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import features
import pytest

TOP = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bed() -> ModuleType:
    sys.path.insert(0, str(TOP / "scripts/lib/vm"))
    import bed

    return bed


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="assert 0">x</failure></testcase>
<testcase classname="tests.a" name="lacking"><skipped message="rootless: this is not root">x</skipped></testcase>
<testcase classname="tests.a" name="lazy"><skipped message="no time today">x</skipped></testcase>
</testsuite></testsuites>"""


def test_a_failure_and_an_unexplained_skip_are_trouble(bed: ModuleType, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    passed, skipped, trouble = bed.judge(junit, {"rootless"})
    assert (passed, skipped) == (1, 2)
    assert trouble == ["failed: tests.a::bad", "skipped: tests.a::lazy: no time today"]


def test_a_skip_for_what_the_cell_has_is_unexplained(bed: ModuleType) -> None:
    assert bed.word("Skipped: v2: cgroups are hybrid here") == "v2"
    assert "v2" in bed.lacks("6.1", "container")
    assert "v2" not in bed.lacks("6.1", "root")


def test_what_explains_a_skip_is_a_closed_list_for_each_cell(bed: ModuleType) -> None:
    assert bed.lacks("7", "root") == {"undelegated", "scope", "v1", "arm32", "no_mounts"}
    assert bed.lacks("6.1", "user-stock") - bed.lacks("6.12", "user-stock") == {"landlock_net", "landlock_scopes"}
    assert {"v2_io", "v2_cpuset"} <= bed.lacks("7", "user-stock")
    for kernel in bed.KERNELS:
        for mode in bed.machine.MODES:
            assert not bed.lacks(kernel, mode) & bed.features(kernel, mode)
            assert not bed.lacks(kernel, mode) & {"numpy", "psi", "testsuite", "seccomp", "userns", "own_machine"}


def test_every_mode_says_what_it_has_in_words_that_the_suite_knows(bed: ModuleType) -> None:
    assert set(bed.HAS) == set(bed.machine.MODES)
    known = set(features.PROBES)
    assert {name for names in bed.HAS.values() for name in names.split(",")} <= known
    assert {name for names in bed.LACKS.values() for name in names} <= known
    assert known >= bed.EVERYWHERE
    assert not bed.WORDS.keys() & known
    assert set(bed.EVERY_RUN) <= set(bed.machine.MODES)


def test_old_kernels_lack_what_came_later(bed: ModuleType) -> None:
    assert "landlock" not in bed.features("5.10", "root")
    assert "overlay" in bed.features("5.10", "root")  # a user may mount them since 5.11
    assert "overlay" not in bed.features("5.10", "user")
    assert "landlock_scopes" not in bed.features("6.1", "root")
    assert "landlock_scopes" in bed.features("6.12", "root")


def test_only_files_with_chosen_tests_are_collected(bed: ModuleType) -> None:
    arguments = bed.chosen(("bed",))
    files = {name for name in arguments if name.endswith(".py")}
    assert "tests/test_limits_v2.py" in files
    assert "tests/test_wire.py" not in files
    assert all((TOP / name).exists() for name in files)


def test_the_table_replaces_the_last_one(bed: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "platforms.md"
    page.write_text("before\n<!-- bed: begin -->\nold\n<!-- bed: end -->\nafter\n")
    green = bed.Cell(kernel="6.1", mode="root", version="6.1.0-9", passed=7, seconds=12.3)
    red = bed.Cell(kernel="6.1", mode="user", version="6.1.0-9", trouble=("failed: x",), repeats=1)
    bed.write_table(page, [green, red], "2026-01-02")
    text = page.read_text()
    assert text.startswith("before\n<!-- bed: begin -->\nRun on 2026-01-02.\n")
    assert text.endswith("<!-- bed: end -->\nafter\n")
    assert "| 6.1.0-9 | root | 7 | 0 | green | 12 |" in text
    assert "| 6.1.0-9 | user | 0 | 0 | failed: x | 0 |" in text
    assert "old" not in text


def test_each_architecture_has_a_table_of_its_own(bed: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "platforms.md"
    page.write_text(
        "<!-- bed: begin -->\nours\n<!-- bed: end -->\n<!-- bed aarch64: begin -->\nold\n<!-- bed aarch64: end -->\n"
    )
    bed.write_table(page, [bed.Cell(kernel="6.1", mode="bare", version="6.1.0-9-arm64")], "2026-01-02", "aarch64")
    text = page.read_text()
    assert text.startswith("<!-- bed: begin -->\nours\n<!-- bed: end -->\n")
    assert "| 6.1.0-9-arm64 | bare |" in text
    assert "old" not in text


def test_an_aarch64_guest_runs_what_only_that_machine_can_try(bed: ModuleType) -> None:
    args = bed.parse(["images", "--arch", "aarch64"])
    assert "tests/test_seccomp.py" in args.pytest  # there the kernel runs the filter for aarch64
    assert "tests/test_seccomp.py" not in bed.parse(["images"]).pytest
    assert bed.features("6.1", "root", "aarch64") - bed.features("6.1", "root") == {"arm32"}
    assert "arm32" not in bed.lacks("6.1", "root", "aarch64")


@pytest.mark.parametrize(("arch", "console"), [("x86_64", "ttyS0"), ("aarch64", "ttyAMA0")])
def test_each_architecture_has_its_emulator_and_console(
    bed: ModuleType, arch: str, console: str, tmp_path: Path
) -> None:
    disks = [(tmp_path / "image", "on"), (tmp_path / "job", "off")]
    command = bed.machine._qemu_command(arch, tmp_path, disks, tmp_path, ["vmjob.mode=bare"])
    assert command[0] == f"qemu-system-{arch}" == bed.machine.missing_tools(arch, which=lambda _: None)[0]
    words = command[command.index("-append") + 1].split()
    assert f"console={console}" in words
    assert ("clocksource=hpet" in words) == (arch == "x86_64")
    assert [word.split(",")[-1] for word in command if word.startswith("file=")] == ["snapshot=on", "snapshot=off"]


def test_pytest_arguments_follow_two_dashes(bed: ModuleType) -> None:
    args = bed.parse(["images", "--mode", "user", "--", "-q", "tests/test_run.py"])
    assert (args.mode, args.pytest) == (["user"], ["-q", "tests/test_run.py"])
    with pytest.raises(SystemExit):
        bed.parse(["images", "--mode", "nowhere"])


def test_the_page_has_a_place_for_the_table() -> None:
    text = (TOP / "docs/platforms.md").read_text()
    for name in ("bed", "bed aarch64"):
        assert text.count(f"<!-- {name}: begin -->\n") == text.count(f"<!-- {name}: end -->\n") == 1


def test_a_cell_that_cannot_be_run_does_not_end_the_others(
    bed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = bed.Bed(tmp_path, []).try_to_run("6.1", "root")
    assert cell.trouble[0].startswith("could not be run: FileNotFoundError")
    assert "| 6.1 | root | 0 | 0 | could not be run" in bed.table([cell])
    assert "Traceback" in capsys.readouterr().out


def test_the_whole_matrix_has_every_kernel_in_every_mode(bed: ModuleType) -> None:
    args = bed.parse(["images", "--all", "-j", "3"])
    assert (args.all, args.jobs) == (True, 3)
    assert len(bed.KERNELS) * len(bed.machine.MODES) == 40
    assert set(bed.HAS) == set(bed.machine.MODES)


def test_what_was_skipped_is_told_by_its_reason(bed: ModuleType, tmp_path: Path) -> None:
    skip = '<testcase classname="t" name="{}"><skipped message="Skipped: {}" /></testcase>'
    rows = "".join(skip.format(number, why) for number, why in enumerate(("v1: no", "v1: no", "testsuite: none")))
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{rows}</testsuite></testsuites>")
    assert bed.skips(tmp_path / "junit.xml") == {"v1": 2, "testsuite": 1}


def test_what_was_measured_of_each_limit_has_a_table_of_its_own(bed: ModuleType, tmp_path: Path) -> None:
    rows = '<property name="of the limit: memory" value="0.9971" /><property name="other" value="x" />'
    (tmp_path / "junit.xml").write_text(
        f"<testsuites><testsuite><properties>{rows}</properties></testsuite></testsuites>"
    )
    shares = bed.shares(tmp_path / "junit.xml")
    assert shares == {"memory": 0.9971}
    cells = [bed.Cell(kernel="6.1", mode="user", version="6.1.0-9", shares=shares, skipped=2, why={"v1": 2})]
    assert "| 6.1.0-9 | user | 0 | 2: v1 2 | green | 0 |" in bed.table(cells)
    assert "\n| 6.1.0-9 | user | 99.7% |  |  |  |\n" in bed.table(cells)
