"""Which network namespace the next child gets: one of a dead child only when it is known to be as it was."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from pihost import zygote


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> zygote.Zygote:
    """A zygote with one namespace of a dead child, which enters none in truth."""
    made: zygote.Zygote = zygote.Zygote.__new__(zygote.Zygote)
    made.plan = SimpleNamespace(network="none")  # type: ignore[assignment]
    made.network, made.free_networks, made.untouched = -1, [os.open("/dev/null", os.O_RDONLY)], [b"as it was"]
    monkeypatch.setattr(zygote.syscalls, "setns", lambda _fd, _kind: None)
    monkeypatch.setattr(zygote.syscalls, "unshare", lambda _flags: None)
    monkeypatch.setattr(zygote, "traces", lambda: [b"as it was"])
    return made


def test_one_that_is_as_it_was(used: zygote.Zygote) -> None:
    kept = used.free_networks[0]
    used.enter_network()
    assert (used.network, used.free_networks) == (kept, [])
    os.close(kept)


def test_one_that_tells_of_its_child(used: zygote.Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "traces", lambda: [b"of another"])
    dirty = os.fstat(used.free_networks[0])
    used.enter_network()
    assert used.free_networks == []
    assert os.fstat(used.network).st_ino != dirty.st_ino, "a new one"
    os.close(used.network)


@pytest.mark.parametrize("step", ["traces", "syscalls.setns"])
def test_one_of_which_nobody_knows(used: zygote.Zygote, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """No descriptor left to look with, or to enter it by: the launch fails, and the next one looks again."""
    kept = used.free_networks[0]

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(f"pihost.zygote.{step}", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="Too many"):
            used.enter_network()
        assert (used.network, used.free_networks) == (-1, [kept])
    os.close(kept)
