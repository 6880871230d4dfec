"""The scripts around the library, the examples, and the gate of continuous integration."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import features
import pytest

TOP = Path(__file__).parent.parent
SHELL = [
    "scripts/test", "scripts/demo", "scripts/bench", "scripts/soak", "scripts/fuzz", "scripts/vm-test", "scripts/compat",
    "scripts/container-test", "scripts/python-test", ".ci/run",
    *sorted(str(path.relative_to(TOP)) for path in (TOP / "scripts/lib").rglob("*.sh")),
]  # fmt: skip
# deploy holds an application, which knows us
EXAMPLES = sorted(str(file.relative_to(TOP)) for file in (TOP / "examples").rglob("*.py") if "deploy" not in file.parts)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, TOP / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, timeout: float = 110, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    return subprocess.run(
        command, cwd=TOP, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


# -- shell ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL)
def test_the_shell_parses_it(script: str) -> None:
    assert run("bash", "-n", script).stderr == ""


@pytest.mark.parametrize("script", [name for name in SHELL if not name.endswith(".sh")])
def test_it_is_executable_and_strict(script: str) -> None:
    assert os.access(TOP / script, os.X_OK)
    assert "\nset -euo pipefail\n" in (TOP / script).read_text()


@pytest.mark.parametrize("script", ["test", "demo", "bench", "soak", "ablate", "vm-test", "compat"])
def test_help_sets_nothing_up(script: str, tmp_path: Path) -> None:
    shutil.copytree(TOP / "scripts", tmp_path / "scripts")
    done = run(str(tmp_path / "scripts" / script), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{script}")
    assert not (tmp_path / ".venv").exists()


def test_bench_lists_what_it_measures_and_refuses_what_it_does_not_know() -> None:
    assert "launch" in run("scripts/bench", "--help").stdout
    assert run("scripts/bench").returncode == 2
    unknown = run("scripts/bench", "../demo")
    assert unknown.returncode == 2
    assert "no benchmark named ../demo" in unknown.stderr


def setup_sh(body: str) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", f"set -euo pipefail; source scripts/lib/setup.sh; {body}")


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no Debian")
def test_packages_that_are_there_need_nothing() -> None:
    done = setup_sh("apt-get() { exit 9; }; need_packages bash coreutils")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no Debian")
def test_a_missing_package_is_installed_by_root_and_named_to_others(ordinary_user) -> None:
    body = 'apt-get() { echo called "$@"; }; need_packages bash pisupervisor-no-such-package'
    done = setup_sh(body)
    assert done.returncode == 0
    assert "called -qq -y install --no-install-recommends pisupervisor-no-such-package" in done.stderr
    shutil.copytree(TOP / "scripts", ordinary_user.home / "scripts")
    done = ordinary_user.run("bash", "-c", f"set -euo pipefail; source scripts/lib/setup.sh; {body}; echo went on")
    assert done.returncode == 1
    assert "as root, run: apt-get update && apt-get install pisupervisor-no-such-package" in done.stderr
    assert "went on" not in done.stdout


def test_the_interpreter_is_recent_enough() -> None:
    python = setup_sh("choose_python").stdout.strip()
    assert run(python, "-c", "import sys, venv, ensurepip; assert sys.version_info >= (3, 11)").returncode == 0


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_know_nothing_of_us(path: str) -> None:
    tree = ast.parse((TOP / path).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_the_survey_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def one(self):\n        return 1\n\nasync def two():\n    return 2\n")
    (tmp_path / "b.py").write_text("this is no Python\n")
    (tmp_path / "c.txt").write_text("def no(): pass\n")
    (tmp_path / "dist-packages").mkdir()
    (tmp_path / "dist-packages" / "d.py").write_text("def no(): pass\n")
    plugin = load("examples/stdlib_survey.py")
    monkeypatch.setattr(plugin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    result = plugin.survey()
    counts = {name: result[name] for name in ("files", "lines", "classes", "functions", "unparsable")}
    assert counts == {"files": 2, "lines": 7, "classes": 1, "functions": 2, "unparsable": 1}
    assert result["largest"] == [(2, "a.py:5 two"), (2, "a.py:2 one")]
    assert plugin.survey(limit=1)["files"] == 1
    assert plugin.survey(top=1)["largest"] == [(2, "a.py:5 two")]


def test_the_survey_finds_the_real_standard_library() -> None:
    result = load("examples/stdlib_survey.py").survey(limit=30)
    assert (result["files"], result["unparsable"]) == (30, 0)
    assert len(result["largest"]) == 10
    assert result["largest"] == sorted(result["largest"], reverse=True)


def test_the_snooper_does_get_what_nothing_keeps_from_it(tmp_path: Path) -> None:
    """The control: without walls its tries succeed, so a refusal in the demo means something."""
    secret = tmp_path / "secret"
    secret.write_text("loot")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        source = f"import json, snooper; print(json.dumps(snooper.attack({str(secret)!r}, {port})))"
        # In a process of its own: as root the plugin does change its root folder.
        met = json.loads(run(sys.executable, "-c", source, PYTHONPATH=str(TOP / "examples/hostile")).stdout)
    assert met["read the path"] == "GOT loot"
    assert met["connect over IPv4"] == "GOT a connection to 127.0.0.1"


def test_the_witness_sees_what_is_left_behind() -> None:
    witness = load("scripts/lib/witness.py").Witness()
    assert not witness.facts(with_groups=False)[2][1], "nothing was seen, so nothing is proved"
    with subprocess.Popen(["sleep", "60"]) as process:
        witness.look(SimpleNamespace(pids=lambda: [process.pid]))
        text, fine = witness.facts(with_groups=False)[2]
        assert (witness.most, fine) == (1, False)
        assert "1 seen, 1 left; the host has 1 children" in text
        process.kill()
    assert witness.facts(with_groups=False)[2][1]


@pytest.mark.root
def test_the_witness_sees_a_cgroup_that_is_left_behind() -> None:
    witness = load("scripts/lib/witness.py").Witness()
    folder = features.own_cgroup("pids")
    assert folder is not None
    group = folder / f"pisupervisor-witness-{os.getpid()}"
    group.mkdir()
    try:
        with subprocess.Popen(["sleep", "60"]) as process:
            (group / "cgroup.procs").write_text(str(process.pid))
            witness.look(SimpleNamespace(pids=lambda: [process.pid]))
            process.kill()
        assert witness.facts(with_groups=True)[3] == (f"cgroups: 1 seen, 1 left {group}", False)
    finally:
        group.rmdir()
    assert witness.facts(with_groups=True)[3] == ("cgroups: 1 seen, 0 left", True)


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.root
def test_an_interrupted_demo_leaves_nothing() -> None:
    command = [sys.executable, "scripts/lib/demo.py"]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("  memory_bomb"):  # now the fork bomb is on
            assert process.poll() is None
        time.sleep(0.5)
        below = load("scripts/lib/witness.py").descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert len(below) > 5
    assert (process.returncode, errors) == (130, "\ninterrupted\n")
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.root
def test_the_demo_holds_everything() -> None:
    done = run(sys.executable, "scripts/lib/demo.py", "--files", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 files" in done.stdout
    table = re.findall(r"^  (\w+) .*? (held|NOT HELD|not run) ", done.stdout, re.MULTILINE)
    assert table == [(name, "held") for name in ("memory_bomb", "fork_bomb", "stubborn_loop", "snooper")]
    assert done.stdout.endswith("All held.\n")


@pytest.mark.linux
@pytest.mark.root
def test_the_demo_says_so_when_a_wall_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOP / "scripts/lib"))
    demo = importlib.import_module("demo")
    verdict = demo.snooper(replace(demo.HOSTILE, network="host"), demo.Witness())
    assert verdict.held is False
    assert "listener heard 1 calls" in verdict.outcome


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.rootless
def test_an_ordinary_user_is_told_what_is_missing(ordinary_user) -> None:
    for folder in ("scripts", "examples"):
        shutil.copytree(TOP / folder, ordinary_user.home / folder, dirs_exist_ok=True)
    done = ordinary_user.run(ordinary_user.python, "scripts/lib/demo.py", "--files", "40", timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    limited = "Degraded by name" not in done.stdout
    assert limited == ("128 MB (watched)" not in done.stdout)
    table = dict(re.findall(r"^  (\w+) .*? (held|NOT HELD|not run) ", done.stdout, re.MULTILINE))
    counted = limited or not features.missing("nproc_apart")  # else a fork bomb is not for a demonstration
    assert table.pop("fork_bomb") == ("held" if counted else "not run")
    assert table == dict.fromkeys(("memory_bomb", "stubborn_loop", "snooper"), "held")
    assert done.stdout.endswith("All held.\n" if counted else "All that ran was held.\n")


@pytest.mark.linux
@pytest.mark.root
def test_the_arrays_benchmark_reports_multiples_of_memcpy() -> None:
    done = run(sys.executable, "scripts/lib/bench_arrays.py", "--json", "--rounds", "1", "--size", str(4 << 20))
    found = json.loads(done.stdout)
    for name in ("in an arena that is used again", "back, copied once", "ProcessPoolExecutor"):
        assert found[name]["x memcpy"] > 0
    assert found["in a shared array of 4 MB"]["seconds"] > 0


@pytest.mark.linux
@pytest.mark.root
def test_the_launch_benchmark_reports_ratios_beside_targets() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    done = run(sys.executable, "scripts/lib/bench_launch.py", "--json", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {row["target"] for row in result["ratios"]} == {0.15, 3.5, None, 1.4, 8.0}
    assert {"memory", "pids", "network", "landlock", "seccomp", "capabilities"} <= set(result["isolator_holds"])
    assert all(row["ratio"] > 0 for row in result["ratios"])
    assert len(result["pinned_to_cpu"]) == 1


@pytest.mark.linux
def test_the_seccomp_benchmark_loads_what_it_compares() -> None:
    done = run(sys.executable, "scripts/lib/bench_seccomp.py", "--json", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    ours, theirs = (next(row for name, row in figures.items() if name.startswith(who)) for who in ("ours", "libs"))
    assert 1 < ours["instructions"] < theirs["instructions"] / 2
    assert {"default", "strict", "permissive"} < figures.keys()
    assert [name for name, row in figures.items() if not row["load_us"]] == ["no filter"]
    assert all(row["getppid_ns"] > 0 and row["fcntl_ns"] > 0 for row in figures.values())


@pytest.mark.linux
@pytest.mark.root
def test_the_benchmark_of_walls_calls_both_children() -> None:
    done = run(sys.executable, "scripts/lib/bench_walls.py", "--json", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    for figures in json.loads(done.stdout).values():
        assert {"add", "compute", "read", "look"} == figures.keys()
        assert all(row["bare_us"] > 0 and row["ratio"] > 0 for row in figures.values())


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.root
def test_a_short_soak() -> None:
    """parity: 11"""
    done = run(sys.executable, "scripts/lib/soak.py", "--kills", "60", "--seed", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["total"], sum(result["kills"].values()), result["seed"]) == (60, 60, 1)
    assert result["kills"]["host"] == 5
    assert result["right"] > 0
    assert set(result["errors"]) <= {"ChildTerminated", "MemoryLimitExceeded", "LaunchError", "IsolatorClosed"}
    violations = ("wrong answers", "other errors", "orphans", "leaks", "hangs")
    assert [result[name] for name in violations] == [0] * 5


@pytest.mark.alone
@pytest.mark.linux
@pytest.mark.root
def test_a_soak_sees_what_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a process that outlives its host, a thread and a descriptor that stay, are told."""
    source = """
        import os, sys, threading, time
        sys.path.insert(0, "scripts/lib")
        import soak, soak_arena
        soak.use_isolators = lambda _random: (os.fork() and time.sleep(20)) or time.sleep(5)
        fight = soak.Arena.round
        def leaking(arena, kills, until):
            fight(arena, 1, until)
            os.dup(0)
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
            soak_arena.PATIENCE = 0.2
            arena.look_for_leaks()
        soak.Arena.round = leaking
        referee = soak.Referee(1, 14, time.monotonic() + 60)
        referee.run()
        print(sorted({kind for kind, _text in referee.tally.violations}))
        print(referee.tally.violations, file=sys.stderr)
    """
    done = run(sys.executable, "-c", textwrap.dedent(source))
    assert done.stdout == "['leaks', 'orphans']\n", done.stderr


# -- the gate ---------------------------------------------------------------------------------------------------------


def gate(folder: Path, source: str, required: str, probes: str = "{}", *more: str) -> subprocess.CompletedProcess[str]:
    """A pytest run of its own over one test file, behind the real conftest; ``probes`` takes the place of real ones."""
    for name in ("conftest.py", "lacking.py", "turns.py"):
        shutil.copy(TOP / "tests" / name, folder)
    real = (TOP / "tests/features.py").read_text()
    (folder / "features.py").write_text(f"{real}\nPROBES.update({probes})\n")
    (folder / "test_it.py").write_text("import pytest\n" + source)
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    linux: x\n    root: x\n    rootless: x\n    alone: x\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(folder), *more]
    return run(*command, PISUPERVISOR_REQUIRE=required, PYTHONPATH=str(TOP))


SKIPS = {
    "in the test": "def test_it():\n    pytest.skip('seccomp: pretended')\n",
    "by need": "import features\nfeatures.missing = str.title\ndef test_it(need):\n    need('seccomp')\n",
    "by marker": "import features\nfeatures.missing = lambda _: 'pretended'\nfeatures.MARKERS['linux'] = ['seccomp']\n"
    "@pytest.mark.linux\ndef test_it():\n    pass\n",
    "by mark": "@pytest.mark.skipif(True, reason='seccomp: pretended')\ndef test_it():\n    pass\n",
    "whole module": "pytest.skip('seccomp: pretended', allow_module_level=True)\n",
    "in a fixture": "@pytest.fixture\ndef f():\n    pytest.skip('seccomp: pretended')\ndef test_it(f):\n    pass\n",
}


@pytest.mark.parametrize(
    ("how", "more"), [*((how, "-v") for how in SKIPS), ("in the test", "-n2"), ("whole module", "-n2")]
)
def test_a_skipped_required_feature_fails_the_run(how: str, more: str, tmp_path: Path) -> None:
    done = gate(tmp_path, SKIPS[how], "seccomp", "{}", more)
    assert done.returncode not in (0, 5), done.stdout
    assert "skipped, though PISUPERVISOR_REQUIRE names seccomp: Skipped: seccomp: " in done.stdout


@pytest.mark.parametrize("how", sorted(SKIPS.keys() - {"whole module"}))
def test_the_same_skip_passes_where_the_feature_is_not_required(how: str, tmp_path: Path) -> None:
    done = gate(tmp_path, SKIPS[how], required="")
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def test_a_skip_for_another_reason_passes_the_gate(tmp_path: Path) -> None:
    done = gate(tmp_path, "def test_it():\n    pytest.skip('numpy: seccomp: is not the reason')\n", required="seccomp")
    assert done.returncode == 0, done.stdout


def test_a_required_feature_that_is_absent_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    done = gate(tmp_path, "def test_it():\n    pass\n", required="seccomp", probes="{'seccomp': lambda: 'pretended'}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "this machine lacks: seccomp (pretended)" in done.stderr


def test_a_required_feature_that_nobody_knows_is_a_mistake(tmp_path: Path) -> None:
    done = gate(tmp_path, "def test_it():\n    pass\n", required="seccomp,telepathy")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "telepathy is none of root, rootless" in done.stderr


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    assert gate(tmp_path, "", required="").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


#: Two such tests meet where they run side by side.
MEETING = """
import pathlib, time
mine, other = (pathlib.Path(__file__).with_name(name) for name in {names})
@pytest.mark.{mark}
def test_it():
    mine.touch()
    until = time.monotonic() + {patience}
    while not other.exists() and time.monotonic() < until:
        time.sleep(0.01)
    met = other.exists()
    {at_the_end}
    assert met is {meets}
"""


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_marked_alone_runs_beside_no_other(alone: bool, tmp_path: Path) -> None:
    """The control: without the mark they do meet."""
    end = {"patience": 0.5, "at_the_end": "mine.unlink()"} if alone else {"patience": 60, "at_the_end": "pass"}
    first = MEETING.format(names=("a", "b"), mark="alone" if alone else "usefixtures", meets=not alone, **end)
    second = MEETING.format(names=("b", "a"), mark="usefixtures", meets=not alone, **end)
    (tmp_path / "test_other.py").write_text("import pytest\n" + second)
    done = gate(tmp_path, first, "", "{}", "-n2", "--dist=loadfile")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(("how", "order"), [("-v", ["one", "two"]), ("-n1", ["two", "one"])])
def test_what_is_marked_alone_comes_last_in_its_file_side_by_side(how: str, order: list[str], tmp_path: Path) -> None:
    source = "@pytest.mark.alone\ndef test_one(): pass\ndef test_two(): pass\n"
    assert re.findall(r"PASSED .*::test_(\w+)", gate(tmp_path, source, "", "{}", how).stdout) == order


def test_ci_requires_every_feature_that_tests_can_ask_for() -> None:
    listed = re.search(r"required=\((.*?)\n\)", (TOP / ".ci/run").read_text(), re.DOTALL)
    assert listed is not None
    names = [line.split()[0] for line in listed[1].splitlines() if line.strip()]
    # no machine has all: the VMs have
    elsewhere = {"v1", "v2", "v2_io", "v2_cpuset", "undelegated", "scope", "own_machine", "arm32", "sys_resource"}
    assert sorted(names) == sorted(features.PROBES.keys() - elsewhere)


def test_markers_ask_for_features_that_exist() -> None:
    assert {name for needed in features.MARKERS.values() for name in needed} <= set(features.PROBES)
