"""Everything that README.md and docs/guide.md show runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
README, GUIDE = ((TOP / name).read_text() for name in ("README.md", "docs/guide.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
PROGRAMS = [block for block in BLOCKS if block.startswith("# run\n")]
COMMANDS = re.findall(r"^\$ pisupervisor ((?:run|learn) .*)$", README + GUIDE, re.MULTILINE)


def plugin_folder(folder: Path) -> Path:
    for block in BLOCKS:
        if block.startswith("# file: "):
            folder.joinpath(block.split("\n", 1)[0].removeprefix("# file: ")).write_text(block)
    return folder


def test_there_are_programs_and_commands() -> None:
    assert len(PROGRAMS) == 11
    assert len(COMMANDS) == 2
    assert all(block.startswith(("# run\n", "# file: ")) for block in BLOCKS), "a block that no test runs"


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_runs_as_printed(program: str, tmp_path: Path) -> None:
    script = plugin_folder(tmp_path) / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for printed in re.findall(r"print\(.*\)\s+# (.*)", program):
        if printed.startswith(("b'", "[Errno")):
            assert printed in done.stdout


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_as_printed(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pisupervisor", *command.split()], cwd=plugin_folder(tmp_path), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0123456789" in done.stdout + done.stderr


def test_the_readme_names_every_document() -> None:
    assert [path.name for path in (TOP / "docs").iterdir() if f"`docs/{path.name}`" not in README] == []


def test_the_guide_links_to_chapters_that_it_has() -> None:
    chapters = {
        re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)$", GUIDE, re.MULTILINE)
    }
    assert set(re.findall(r"\(#([^)]*)\)", GUIDE)) == chapters


def test_numbers_of_the_profile_are_those_of_the_readme() -> None:
    import json

    profile = json.loads((TOP / "seccomp_profiles" / "default.json").read_text())
    allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    said = re.search(r"about (\d+) of 470", README)
    assert said is not None
    assert abs(len(allowed) - int(said[1])) <= 15
