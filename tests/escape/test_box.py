"""The catalogue: 85 ways out, each tried inside a child. ``needs`` in box_checks.json names the single layers without
which a check gets out (read off by running all checks with one layer off at a time); where it is empty, two layers or
more hold, or an ordinary process cannot do it either.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import box
import features
import pytest
from present import absent

from pisupervisor import CallTimeout, ExitReason, Limits, MemoryLimitExceeded, ProcessIsolator

pytestmark = [pytest.mark.linux, pytest.mark.root]

#: what counts is seen from outside: a test each, below
SEEN_FROM_OUTSIDE = frozenset(("R03", "R12", "R16", "R19"))
ABLATIONS = [(name, layer) for name, check in box.CHECKS.items() for layer in check["needs"]]


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[box.Outside]:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(box.SECRET, "of the host")
        found = stack.enter_context(box.outside(tmp_path_factory.mktemp("host")))
        stack.enter_context(ProcessIsolator.create(box.options()))  # keeps one zygote warm for all of them
        yield found


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(box.options()) as made:
        yield made


def test_all_checks_are_here() -> None:
    assert len(box.CATALOGUE) == 85


def told_of(check: str, *layer: str) -> Any:
    """Those who count the CPU time they get must have the machine to themselves."""
    return pytest.param(check, *layer, marks=[pytest.mark.alone] if check in ("R10", "R11") else [])


@pytest.mark.parametrize("check", [told_of(name) for name in box.CHECKS if name not in SEEN_FROM_OUTSIDE])
def test_blocked(check: str, around: box.Outside) -> None:
    if reason := absent(check):
        pytest.skip(f"absent here, so nothing would be proved: {reason}")
    with ProcessIsolator.create(box.options(check)) as isolator:
        lines = box.run(isolator, check, around)
    assert box.blocked(lines), f"{box.CHECKS[check]['title']}: {lines}"


@pytest.mark.parametrize(("check", "layer"), [told_of(*each) for each in ABLATIONS])
def test_gets_out_without_its_layer(check: str, layer: str, around: box.Outside) -> None:
    """A check proves a layer only if it fails with that layer switched off."""
    if reason := absent(check):
        pytest.skip(f"absent here, so nothing would be proved: {reason}")
    with box.isolator_without(box.options(check), layer) as isolator:
        lines = box.run(isolator, check, around)
    assert not box.blocked(lines), f"{box.CHECKS[check]['title']} holds without {layer} too: {lines}"


@pytest.mark.bed
@pytest.mark.parametrize("check", ["K23", "P07"])
def test_root_gets_out_that_has_all_rights(check: str, around: box.Outside) -> None:
    """No layer is shown by these, for each takes CAP_SYS_RESOURCE: they prove that a child is without root's rights."""
    features.need("root", "sys_resource")
    code = box.PRELUDE + around.fill_in(box.CHECKS[check]["code"])
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20).stdout.splitlines()
    assert not box.blocked(lines), f"{box.CHECKS[check]['title']} is refused to root: {lines}"


def test_R03_memory_bomb_is_counted_and_the_next_call_is_right(isolator: ProcessIsolator, around: box.Outside) -> None:
    with pytest.raises(MemoryLimitExceeded) as caught:
        box.run(isolator, "R03", around)
    assert caught.value.exit_info.reason is ExitReason.MEMORY
    assert isolator.run_source("6 * 7").value == 42


def test_R12_an_orphan_daemon_dies_with_the_box(isolator: ProcessIsolator, around: box.Outside) -> None:
    assert box.blocked(box.run(isolator, "R12", around))
    members = isolator.pids()
    assert len(members) >= 3, "the daemon should be running by now"
    groups = list(isolator._keeper.child._group.paths.values())  # type: ignore[union-attr]
    isolator.close()
    assert [pid for pid in members if os.path.exists(f"/proc/{pid}")] == []
    assert [path for path in groups if os.path.exists(path)] == []


def test_R16_a_stdout_flood_is_capped(around: box.Outside) -> None:
    with ProcessIsolator.create(box.options(limits=Limits(memory="128M", output="1M"))) as isolator:
        result = isolator.run_source(box.PRELUDE + box.CHECKS["R16"]["code"])
        assert result.truncated
        assert len(result.stdout) <= 1 << 20
        assert isolator.run_source("6 * 7").value == 42


def test_R17_a_crash_of_a_copy_leaves_the_reply_right(isolator: ProcessIsolator, around: box.Outside) -> None:
    box.run(isolator, "R17", around)
    assert isolator.run_source("6 * 7").value == 42


def test_R19_sleeping_forever_ends_at_the_deadline(around: box.Outside) -> None:
    with ProcessIsolator.create(box.options(call_timeout=0.5)) as isolator:
        started = time.monotonic()
        with pytest.raises(CallTimeout):
            box.run(isolator, "R19", around)
        assert time.monotonic() - started < 2.0
        assert isolator.run_source("6 * 7").value == 42


def test_K25_the_session_is_its_own(isolator: ProcessIsolator, around: box.Outside) -> None:
    pid = isolator.pid
    assert pid is not None
    assert os.getsid(pid) == pid == os.getpgid(pid)


def test_K27_killing_the_init_changes_nothing(isolator: ProcessIsolator, around: box.Outside) -> None:
    before = isolator.pid
    assert box.blocked(box.run(isolator, "K27", around))
    assert isolator.pid == before
    assert isolator.run_source("6 * 7").value == 42


def test_F24_etc_is_synthetic(isolator: ProcessIsolator, around: box.Outside) -> None:
    inside = isolator.run_source("open('/etc/passwd').read()").value
    names = {line.split(":")[0] for line in inside.splitlines()}
    assert names == {"root", "user", "nobody"}
    assert inside != Path("/etc/passwd").read_text()


def test_K15_x32_is_killed_by_the_filter(isolator: ProcessIsolator, around: box.Outside) -> None:
    """Most kernels lack x32, and would answer ENOSYS: SIGSYS (31) is the filter's own answer."""
    lines = box.run(isolator, "K15", around)
    assert lines in (["B status 31"], ["B status 159"])


def test_the_document_of_layers_is_of_these_checks() -> None:
    """docs/containment.md, as scripts/ablate last wrote it: every check is in it, and every layer holds at least one."""
    text = (Path(__file__).parents[2] / "docs" / "containment.md").read_text()
    layers, _, rest = text.partition("## What they cost a call")
    checks = rest.partition("## Checks")[2]
    listed = [line.split("|")[1].strip() for line in checks.splitlines() if line.startswith("| ")]
    assert set(box.CHECKS) == set(listed) - {"check"}
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in layers.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert [layer for layer, alone, together in rows if alone == together == "-"] == []
    assert "NOT HELD" not in text
