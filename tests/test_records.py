"""Our dataclass and NamedTuple are as good as the standard library's, for which they stand in."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pisupervisor import IsolationOptions, Limits, RestartPolicy
from pisupervisor.launch.interpreter import Interpreter
from pisupervisor.limits.detect import Place
from pisupervisor.records import dataclass, field, fields, replace


@dataclass(frozen=True, kw_only=True)
class Used:
    """Like results.Usage."""

    cpu_time: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """Like results.ExitInfo."""

    exit_code: int | None
    signal: int | None
    reason: str
    stdout: str = field(default="", repr=False)


INFO = Info(exit_code=1, signal=None, reason="exited", stdout="hidden")


def test_it_is_a_dataclass_to_everybody() -> None:
    assert dataclasses.is_dataclass(Used)
    assert [one.name for one in dataclasses.fields(Used)] == ["cpu_time", "peak_memory"]
    assert dataclasses.asdict(Used(cpu_time=1.0)) == {"cpu_time": 1.0, "peak_memory": None}
    assert dataclasses.replace(Used(cpu_time=1.0), peak_memory=2) == Used(cpu_time=1.0, peak_memory=2)
    assert dataclasses.fields(IsolationOptions)[0].default_factory is Limits
    assert dataclasses.fields(Interpreter)[0].default is dataclasses.MISSING


def test_its_signature_is_shown() -> None:
    assert str(inspect.signature(Used)).startswith("(*, cpu_time: 'float | None' = None, peak_memory:")


def test_a_standard_dataclass_can_be_made_from_it() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(RestartPolicy):
        extra: int = 1

    assert (Mine(extra=2).extra, Mine().max_restarts) == (2, 10)


def test_equality_and_hash() -> None:
    assert Used(cpu_time=1.0) == Used(cpu_time=1.0) != Used(cpu_time=2.0)
    assert hash(Used(cpu_time=1.0)) == hash(Used(cpu_time=1.0))
    assert Used() != "Used()"
    assert len({Limits(), Limits(), Limits(pids=5)}) == 2


def test_repr() -> None:
    assert repr(Used(cpu_time=1.0)) == "Used(cpu_time=1.0, peak_memory=None)"
    assert "hidden" not in repr(INFO)


def test_frozen() -> None:
    for change in (
        lambda: setattr(INFO, "signal", 9),
        lambda: delattr(INFO, "signal"),
        lambda: setattr(INFO, "new", 9),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()


def test_copies() -> None:
    assert pickle.loads(pickle.dumps(INFO)) == copy.copy(INFO) == copy.deepcopy(INFO) == INFO
    assert replace(INFO, signal=9).signal == 9
    assert replace(INFO, signal=9).stdout == "hidden"


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"Used.__init__\(\) got an unexpected keyword argument 'memory'"):
        Used(memory=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing required keyword-only arguments: signal, reason"):
        Info(exit_code=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Used(1.0)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unexpected keyword argument 'memory'"):
        replace(Used(), memory=1)


def test_each_instance_gets_its_own_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Holder:
        things: list[int] = field(default_factory=list)
        plain: int = 3

    assert Holder().things is not Holder().things
    assert [one.name for one in fields(Holder)] == ["things", "plain"]
    assert Holder.plain == 3


def test_a_named_tuple() -> None:
    place = Place("/x", why="closed")
    assert place == ("/x", None, "closed", "")
    assert (place.usable, place._replace(why="").usable) == (False, True)
    assert pickle.loads(pickle.dumps(place)) == place
    assert repr(place) == "Place(directory='/x', errno=None, why='closed', remedy='')"
    with pytest.raises(AttributeError):
        place.why = ""  # type: ignore[misc]


def test_nothing_heavy_is_imported_for_it() -> None:
    source = "import sys; sys.path.insert(0, sys.argv[1]); import pisupervisor.options; print(*sys.modules)"
    top = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", source, top], capture_output=True, text=True, check=True)
    assert not {"dataclasses", "inspect", "re", "enum", "typing"} & set(done.stdout.split())
