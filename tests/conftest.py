"""The gate: tests skip for want of a feature on a desk, and fail for it where PISUPERVISOR_REQUIRE says so."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import features
import lacking
import pytest

# Some tests import numpy here, and others make a bare clone of this process that forks: OpenBLAS would then wait for its
# threads, which the clone has not got.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell without a terminal starts what is to run behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_configure(config: pytest.Config) -> None:
    lacking.adapt()
    if hasattr(config, "workerinput"):  # one of the processes that -n has started
        import turns

        config.pluginmanager.register(turns.Turns(config))
        return
    absent = [f"{name} ({reason})" for name in features.required() if (reason := features.missing(name))]
    if absent:
        raise pytest.UsageError("PISUPERVISOR_REQUIRE asks for what this machine lacks: " + "; ".join(absent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the tests (-n) go by these names."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"these names differ from run to run, give ids: {changing}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in features.MARKERS:
        if item.get_closest_marker(marker):
            features.need(*lacking.needed(item, marker))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with lacking.what(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _no_excuse((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _no_excuse((yield))


def _no_excuse(report: Report) -> Report:
    """A skip for want of a required feature becomes a failure."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if feature := features.refused(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, though PISUPERVISOR_REQUIRE names {feature}: {reason}"
    return report


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """So that a collection looks at what a test has made, not at all that was imported (0.1 s each time)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def need() -> Callable[..., None]:
    """``need("cgroups")`` skips the test where that is missing; the features are those of tests/features.py."""
    return features.need


@dataclass(frozen=True)
class OrdinaryUser:
    """Somebody with uid 1000 and no privilege. ``home`` is a folder of theirs; ``python`` can import pisupervisor."""

    home: Path
    python: str
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Runs a command as that user, in their home, with captured output; the test looks at the return code."""
        user = features.ORDINARY_USER
        return subprocess.run(
            command, user=user, group=user, extra_groups=[], umask=0o022, cwd=self.home, env=self.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def run_python(self, source: str, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The same for Python source text."""
        return self.run(self.python, "-c", source, *arguments, timeout=timeout)


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[OrdinaryUser]:
    """An OrdinaryUser; where the checkout or its .venv is out of their reach, they get a copy."""
    features.need("rootless")
    # Not pytest's own temporary folder: that one is root's, mode 0700.
    home = Path(tempfile.mkdtemp(prefix="pisupervisor-user-"))
    try:
        os.chown(home, features.ORDINARY_USER, features.ORDINARY_USER)
        environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(home), "LANG": "C.UTF-8"}
        environment["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/nonexistent"  # no systemd of theirs that gives groups
        user = OrdinaryUser(home, sys.executable, environment)
        yield user if _can_import(user) else _with_copy(user)
    finally:
        shutil.rmtree(home)


def _can_import(user: OrdinaryUser) -> bool:
    try:
        return user.run_python("import pisupervisor, pihost, msgspec").returncode == 0
    except PermissionError:
        return False


def _with_copy(user: OrdinaryUser) -> OrdinaryUser:
    """The system's interpreter with a copy of this checkout and of what it depends on."""
    top = Path(__file__).parent.parent
    heavy = shutil.ignore_patterns("__pycache__", "numpy*", "mypy*", "ruff*", "pip*", "hypothesis*", "pisupervisor*")
    packages = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    shutil.copytree(packages, user.home / "copy", ignore=heavy)
    for name in ("pisupervisor", "pihost", "seccomp_profiles"):
        shutil.copytree(top / name, user.home / "copy" / name)
    base = os.path.realpath(sys.executable)
    copied = OrdinaryUser(user.home, base, {**user.environment, "PYTHONPATH": str(user.home / "copy")})
    if not _can_import(copied):
        pytest.skip(f"rootless: uid {features.ORDINARY_USER} cannot run {base}")
    return copied
