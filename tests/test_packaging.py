"""What a user gets from the wheel, tried in a fresh venv and without a network."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PROFILES = {"default", "strict", "permissive"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=TOP)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh venv that holds the wheel alone; its dependencies come from the venv of this run."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    run(sys.executable, *install, cwd=venv.parent)
    packages = next(venv.glob("lib/python*/site-packages"))
    ours = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "zz_dependencies.pth").write_text("\n".join(ours) + "\n")
    return python


def test_the_wheel_carries_both_packages_the_profiles_and_the_type_markers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    needed = {"pisupervisor/__init__.py", "pisupervisor/py.typed", "pihost/__main__.py", "pihost/py.typed"}
    needed |= {"pihost/inside/__init__.py"}
    needed |= {f"pisupervisor/seccomp_profiles/{name}.json" for name in PROFILES}
    assert needed <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pisupervisor", "pihost"}
    assert not [name for name in names if "__pycache__" in name]


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [file for package in ("pisupervisor", "pihost") for file in (TOP / package).rglob("*.py")]
    assert {str(file.relative_to(TOP)) for file in files} <= names


def test_the_sdist_can_test_itself(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    scripts = {"scripts/test", "scripts/demo", "scripts/bench", "scripts/lib/setup.sh", "examples/stdlib_survey.py"}
    assert scripts | {"tests/conftest.py", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= names
    assert {f"seccomp_profiles/{name}.json" for name in PROFILES} <= names


def test_the_installed_packages_are_found_and_not_the_checkout(python: Path, tmp_path: Path) -> None:
    source = "import pisupervisor, pihost; print(pisupervisor.__file__); print(pihost.__file__)"
    files = run(python, "-I", "-c", source, cwd=tmp_path).split()
    assert len(files) == 2
    assert all(file.startswith(str(python.parent.parent)) for file in files)


def test_the_installed_profiles_compile(python: Path, tmp_path: Path) -> None:
    source = "from pisupervisor.launch import seccomp; print(len(seccomp.compile_profile('default')))"
    assert int(run(python, "-I", "-c", source, cwd=tmp_path)) > 0


def test_the_installed_command_answers(python: Path, tmp_path: Path) -> None:
    assert "doctor" in run(python.parent / "pisupervisor", "--help", cwd=tmp_path)


@pytest.mark.linux
@pytest.mark.root
def test_an_installed_wheel_runs_a_child(python: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text("def twice(n):\n    return 2 * n\n")
    source = (
        "from pisupervisor import ProcessIsolator\n"
        "with ProcessIsolator.create() as isolator:\n"
        "    print(isolator.invoke_method('plugin.py', 'twice', 21))\n"
    )
    assert run(python, "-I", "-c", source, cwd=tmp_path) == "42\n"
