"""What is imported, where, and how much of it there is: the house's rules about its own walls."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PIHOST = sorted((TOP / "pihost").rglob("*.py"))
PISUPERVISOR = sorted((TOP / "pisupervisor").rglob("*.py"))
#: of everything outside of pihost/inside: what runs before the walls are up (1,047 of them), the wire format and what an idle
#: zygote rehearses. Comments counted, blank lines not: one sitting. PID 1, which runs behind its walls, is in pihost/inside.
AUDITED_LINES = 1227
#: of the 10 to 40 ms kind: the zygote pays for them at every start, and each child with the pages it copies
HEAVY = {
    "asyncio", "concurrent", "dataclasses", "email", "enum", "inspect", "json", "logging", "multiprocessing", "pickle",
    "re", "socket", "subprocess", "tempfile", "threading", "traceback", "typing",
}  # fmt: skip
THIRD_PARTY = {
    "cgroupspy",
    "cloudpickle",
    "msgspec",
    "numpy",
    "pandas",
    "prctl",
    "psutil",
    "pyarrow",
    "pyroute2",
    "pyseccomp",
}


def name(path: Path) -> str:
    return str(path.relative_to(TOP))


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which package is meant"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def at_import(path: Path) -> set[str]:
    """Top names that importing the file imports: not what functions import when they run."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {alias.name.split(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names} | {
        (node.module or "").split(".")[0] for node in body if isinstance(node, ast.ImportFrom)
    }


def modules_after(source: str, *flags: str) -> set[str]:
    """What a clean interpreter has loaded after running this, beyond what it had before."""
    source = f"import sys; sys.path.insert(0, {str(TOP)!r}); had = set(sys.modules)\n{source}\nprint(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, *flags, "-c", source], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


@pytest.mark.parametrize("path", PIHOST, ids=name)
def test_pihost_stands_on_the_standard_library_alone(path: Path) -> None:
    tops = {module.split(".")[0] for module in imported(path)}
    assert tops <= sys.stdlib_module_names | {"pihost"}


@pytest.mark.parametrize("path", PIHOST, ids=name)
def test_pihost_is_read_by_python_3_9(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


@pytest.mark.parametrize("path", PISUPERVISOR, ids=name)
def test_pisupervisor_takes_only_the_language_of_plans_from_pihost(path: Path) -> None:
    ours = {module for module in imported(path) if module.startswith("pihost")}
    rooms = {".".join(module.split(".")[:2]) for module in ours}
    assert rooms <= {
        "pihost", "pihost.wire", "pihost.plan", "pihost.syscalls", "pihost.mounts",
        "pihost.inside",  # one name in a pickle: what a handle among the arguments becomes there
    }  # fmt: skip


def test_what_is_trusted_is_small() -> None:
    trusted = [path.read_text() for path in (TOP / "pihost").glob("*.py")]
    assert sum(bool(line.strip()) for text in trusted for line in text.splitlines()) <= AUDITED_LINES


def test_ctypes_lives_in_one_place() -> None:
    users = [
        name(path)
        for path in PIHOST + PISUPERVISOR
        if {"ctypes", "_ctypes"} & {top.split(".")[0] for top in imported(path)}
    ]
    assert users == ["pihost/syscalls.py"]


def test_importing_the_package_costs_next_to_nothing() -> None:
    assert modules_after("import pisupervisor") <= {"__future__", "pisupervisor"}


def test_the_isolator_is_imported_without_what_is_heavy() -> None:
    loaded = {module.split(".")[0] for module in modules_after("import pisupervisor; pisupervisor.ProcessIsolator")}
    assert not loaded & THIRD_PARTY
    assert not loaded & {
        "asyncio",
        "concurrent",
        "json",
        "logging",
        "multiprocessing",
        "subprocess",
        "tempfile",
        "typing",
    }


def test_the_zygote_imports_nothing_heavy() -> None:
    loaded = modules_after("import pihost.zygote", "-I", "-S")
    assert "pihost.zygote" in loaded
    assert not {module.split(".")[0] for module in loaded} & HEAVY


@pytest.mark.parametrize("path", PISUPERVISOR, ids=name)
def test_heavy_packages_are_imported_where_they_are_needed(path: Path) -> None:
    lazy = THIRD_PARTY - {"msgspec"} | {"logging", "asyncio", "multiprocessing", "subprocess"}
    if "doctor" not in path.parts and not path.name.startswith(("cli", "aio")):  # programs of their own; asyncio's
        assert not at_import(path) & lazy


@pytest.mark.linux
def test_a_first_result_on_one_cpu_needs_nothing_heavy() -> None:
    """Where nothing can be imported while the zygote works, everything is waited for."""
    from pisupervisor import ProcessIsolator

    ProcessIsolator.create().close()  # compiles what is kept compiled: the filter, pihost
    loaded = modules_after(
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from pisupervisor import ProcessIsolator\n"
        "with ProcessIsolator.create() as isolator: assert isolator.invoke_method('operator', 'add', 40, 2) == 42\n"
        "",
        "-I",
    )
    assert "pisupervisor.supervise.child" in loaded
    tops = {module.split(".")[0] for module in loaded}
    assert not tops & (HEAVY - {"enum", "threading"} | THIRD_PARTY)


@pytest.mark.linux
def test_a_child_starts_with_little() -> None:
    from pisupervisor import ProcessIsolator

    with ProcessIsolator.create() as isolator:
        loaded = isolator.run_source("import sys; sorted(sys.modules)").value
    assert not {module.split(".")[0] for module in loaded} & {"pisupervisor", "logging", "asyncio", "typing", "runpy"}
    assert len(loaded) < 120
