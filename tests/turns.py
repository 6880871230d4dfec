"""Tests in several processes at once (``-n 2``): those marked ``alone`` have the machine to themselves.

Everybody else's tests share a lock and theirs exclude all; whoever wants it waits in a line, so that nobody starves.
conftest.py loads this in the processes that ``-n`` starts. A plain pytest knows nothing of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

LINE, MACHINE = 0, 1


def is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


class Turns:
    """Two bytes of a file in the run's temporary folder are locked. Not with flock: what a test forks would hold that too."""

    def __init__(self, config: pytest.Config) -> None:
        shared = Path(config.getoption("basetemp")).parent  # each process has a folder of its own in it
        self._file = os.open(shared / "turns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._kept = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The last ones of their file: then the others wait once for each file."""
        files = {item.path: number for number, item in enumerate(items)}
        items.sort(key=lambda item: (files[item.path], is_alone(item)))

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the timeout: waiting is no fault of the test's
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        if not self._kept:
            self._wait(fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            self._kept = is_alone(item) and is_alone(nextitem)
            if not self._kept:
                self._lock(MACHINE, fcntl.LOCK_UN)

    def _wait(self, how: int) -> None:
        self._lock(LINE, fcntl.LOCK_EX)
        try:
            self._lock(MACHINE, how)
        finally:
            self._lock(LINE, fcntl.LOCK_UN)

    def _lock(self, byte: int, how: int) -> None:
        fcntl.lockf(self._file, how, 1, byte)
