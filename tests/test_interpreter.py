"""Which Python a child runs: found, asked, and seen inside in its own place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from helpers import nothing_left
from test_planning import HOME, SYSTEM

from pihost.plan import TemplatePlan
from pisupervisor import ProcessIsolator
from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.launch import interpreter
from pisupervisor.launch.interpreter import find_interpreter, host_python
from pisupervisor.launch.zygote import Zygote


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_hosts_own() -> None:
    found = find_interpreter(None)
    assert found.executable == host_python() == os.path.realpath(sys.executable)
    assert found.version == sys.version_info[:2]
    assert os.path.isfile(f"{found.stdlib}/os.py")
    assert not found.packages, "what the host may import is not what a child may import"


def test_asking_says_the_same() -> None:
    assert find_interpreter(host_python()) == find_interpreter(None)


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python", "/"])
def test_an_application_that_embeds_its_interpreter(monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable, raising=False)
    with pytest.raises(LaunchError, match="no interpreter") as caught:
        find_interpreter(None)
    assert (caught.value.step, "python=" in caught.value.remedy) == ("interpreter", True)


def test_a_venv_brings_its_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    for python in (tmp_path / "env", tmp_path / "env/bin/python"):
        found = find_interpreter(str(python))
        assert found.executable == host_python()
        assert [os.path.relpath(path, tmp_path) for path in found.packages] == [
            f"env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        ]


def test_a_shell_script_in_front_of_python_is_seen_through(tmp_path: Path) -> None:
    shim = script(tmp_path / "python", f'exec {sys.executable} "$@"')
    assert find_interpreter(shim).executable == host_python()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="does not exist"):
        find_interpreter(str(tmp_path / "python"))
    with pytest.raises(OptionsError, match="does not exist; give an interpreter or the folder of a venv"):
        find_interpreter(str(tmp_path))


def test_what_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("")
    with pytest.raises(OptionsError, match="is not executable"):
        find_interpreter(str(tmp_path / "python"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("echo I am no python >&2; exit 3", r"no working Python \(exit code 3\): I am no python"),
        ("echo garbage", "no working Python"),
        ("", "no working Python"),
    ],
)
def test_what_is_no_python(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(LaunchError, match=match) as caught:
        find_interpreter(script(tmp_path / "python", text))
    assert caught.value.step == "interpreter"
    assert "by hand" in str(caught.value.remedy)


@pytest.mark.parametrize("content", [b"\x7fELF junk", b"#!/nowhere/at/all\n"])
def test_what_does_not_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "python").write_bytes(content)
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(LaunchError, match="does not start") as caught:
        find_interpreter(str(tmp_path / "python"))
    assert caught.value.errno


@pytest.mark.linux
@pytest.mark.unhurried
@pytest.mark.parametrize("text", ["exec sleep 60", "sleep 60", "sleep 60 & exit 0"])
def test_a_python_that_hangs(tmp_path: Path, text: str) -> None:
    """parity: 2. It is waited for no longer than a child, and what it has started ends with it."""
    python, started = script(tmp_path / "python", text), time.monotonic()
    with nothing_left(), pytest.raises(LaunchError, match=r"did not say within 0\.5 s which Python it is") as caught:
        ProcessIsolator.create(python=python, start_timeout=0.5)
    assert (caught.value.step, caught.value.remedy[:14]) == ("interpreter", "try it by hand")
    assert time.monotonic() - started < 1.5


@pytest.mark.linux
@pytest.mark.unhurried
def test_a_python_that_hangs_when_it_is_to_be_a_zygote(tmp_path: Path) -> None:
    """parity: 2. A stub that sleeps, behind a wrapper that says what Python it is."""
    asked = subprocess.run(
        [sys.executable, "-I", "-c", interpreter._QUESTION], capture_output=True, text=True, check=True
    )
    stub = script(tmp_path / "stub", "exec sleep 60")
    python = script(tmp_path / "python", f"cat <<'END'\n{asked.stdout.replace(host_python(), stub)}END")
    started = time.monotonic()
    with nothing_left(), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(python=python, start_timeout=0.5)
    assert caught.value.step == "start_timeout"
    assert 0.4 < time.monotonic() - started < 1.0


@pytest.mark.linux
@pytest.mark.unhurried
def test_a_python_that_hangs_when_it_is_to_have_a_user_namespace(tmp_path: Path) -> None:
    """As a child's ids of its own need one; who writes the maps waits for it."""
    with nothing_left():
        zygote = Zygote(script(tmp_path / "stub", "exec sleep 60"))
        started = time.monotonic()
        try:
            fields = {name: (kind if isinstance(kind, type) else list)() for name, kind in TemplatePlan.FIELDS.items()}
            with pytest.raises(LaunchError, match=r"no user namespace within 0\.3 s") as caught:
                zygote.prepare(TemplatePlan(**fields), lambda pid: None, 0.3)
        finally:
            zygote.close()
        assert caught.value.step == "namespaces"
        assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "answer", ["((3, 8), '/usr', '/usr/bin/python3.8', '/usr/lib/python3.8', [])", "((2, 7), '/u', '/p', '/l', [])"]
)
def test_a_python_that_is_too_old(tmp_path: Path, answer: str) -> None:
    with pytest.raises(OptionsError, match=r"a child needs 3\.9"):
        find_interpreter(script(tmp_path / "python", f'echo "{answer}"'))


@pytest.mark.parametrize("answer", ["1", "(1, 2)", "('a', 'b', 'c', 'd', 'e')", "((3, 11), None, None, None, None)"])
def test_an_answer_of_another_shape(tmp_path: Path, answer: str) -> None:
    with pytest.raises(LaunchError, match="no working Python"):
        find_interpreter(script(tmp_path / "python", f'echo "{answer}"'))


def test_an_interpreter_below_usr_stays_where_it_is() -> None:
    assert not SYSTEM.relocated
    assert SYSTEM.inside("/usr/lib/python3.11") == "/usr/lib/python3.11"
    assert SYSTEM.library_path() is None


def test_any_other_is_shown_in_one_place_and_its_home_is_not() -> None:
    assert HOME.relocated
    assert HOME.inside(HOME.executable) == "/py/bin/python3"
    assert HOME.inside(HOME.prefix) == "/py"
    assert HOME.inside("/home/me/python-other/x") == "/home/me/python-other/x"


def test_a_shared_libpython_is_found(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    found = type(HOME)(executable="/x", prefix=str(tmp_path), stdlib="/x", version=(3, 12))
    assert found.library_path() is None
    (tmp_path / "lib" / "libpython3.12.so.1.0").write_text("")
    assert found.library_path() == "/py/lib"
