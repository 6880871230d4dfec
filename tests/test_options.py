"""Options check themselves when they are built, and stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

import pisupervisor
from pisupervisor import (
    CpuSet,
    Filesystem,
    IoLimit,
    IsolationEvents,
    IsolationExecutor,
    IsolationOptions,
    Limits,
    OptionsError,
    ProcessHost,
    ProcessIsolator,
    ProfileError,
    RestartPolicy,
    SeccompProfile,
    Security,
    Template,
    TypeCodec,
)
from pisupervisor.limits.sizes import parse_size
from pisupervisor.link.sources import CodeReader
from pisupervisor.options import PROTECTIONS

PARTS = [
    IsolationOptions(environment={"A": "b"}),
    Limits(),
    Filesystem(),
    Security(),
    RestartPolicy(),
    IoLimit(device="/", read_bps=1),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_options_are_frozen(part: Any) -> None:
    """parity: 3"""
    for field in dataclasses.fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(part, field.name, 1)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_options_are_keyword_only_and_a_copy_is_equal(part: Any) -> None:
    with pytest.raises(TypeError):
        type(part)("positional")
    assert replace(part) == part


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_options_are_copied_and_pickled_and_hashed_like_other_data(part: Any) -> None:
    for same in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert (same, hash(same)) == (part, hash(part))
        with pytest.raises(FrozenInstanceError):
            setattr(same, dataclasses.fields(part)[0].name, 1)
    assert dataclasses.asdict(part).keys() == {field.name for field in dataclasses.fields(part)}


def test_an_environment_is_frozen_too() -> None:
    given = {"A": "b"}
    environment: Any = IsolationOptions(environment=given).environment
    given["A"] = "c"
    assert environment == {"A": "b"}
    with pytest.raises(TypeError, match="cannot be changed"):
        environment["A"] = "c"
    with pytest.raises(TypeError, match="cannot be changed"):
        environment.update(A="c")
    with pytest.raises(TypeError, match="cannot be changed"):
        environment |= given


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ProcessIsolator.create(degrad=["memory"]), "argument 'degrad'; did you mean degrade?"),
        (lambda: ProcessIsolator.create(memory="64M"), "argument 'memory'; write limits=Limits(memory=...)"),
        (
            lambda: ProcessIsolator.create(IsolationOptions(), writable=["/tmp"]),
            "; write filesystem=Filesystem(writable=...)",
        ),
        (lambda: ProcessIsolator.create(timeout=1), "did you mean start_timeout or call_timeout or idle_timeout?"),
        (lambda: IsolationEvents(stdou=print), "argument 'stdou'; did you mean stdout?"),  # type: ignore[call-arg]
        (lambda: Limits(cpu=1.0), "argument 'cpu'; did you mean cpus?"),  # type: ignore[call-arg]
        (lambda: RestartPolicy(zzz=1), "it has mode, max_restarts, within,"),  # type: ignore[call-arg]
        (lambda: IoLimit(read_bps=1), "missing required keyword-only arguments: device"),  # type: ignore[call-arg]
    ],
    ids=range(8),
)
def test_an_option_that_does_not_exist_is_the_callers_mistake(build: Any, said: str) -> None:
    with pytest.raises(OptionsError) as caught:
        build()
    assert said in str(caught.value)
    assert isinstance(caught.value, TypeError), "as for any keyword that a function does not take"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_replace_makes_a_checked_copy() -> None:
    """parity: 3"""
    options = IsolationOptions(limits=Limits(memory="64M"))
    assert replace(options, network="host").limits.memory == 64 << 20
    assert options.network == "none"
    with pytest.raises(OptionsError):
        replace(options, network="everything")


def test_the_defaults_are_the_documented_numbers() -> None:
    limits = Limits()
    assert (limits.memory, limits.swap, limits.cpus, limits.pids) == (512 << 20, 0, 1.0, 64)
    assert (limits.open_files, limits.scratch, limits.output, limits.result) == (256, 64 << 20, 1 << 20, 64 << 20)
    for number in ("536870912", "67108864", "1048576"):
        assert number in (Limits.__doc__ or "")
    options = IsolationOptions()
    assert (options.network, options.results, options.security.seccomp) == ("none", "data", "default")
    assert (options.restart.mode, options.restart.max_restarts, options.restart.within) == ("on-failure", 10, 60.0)


@pytest.mark.parametrize("kind", [Limits, IsolationOptions, Security, Filesystem, RestartPolicy])
def test_every_field_is_documented(kind: Any) -> None:
    undocumented = [field.name for field in dataclasses.fields(kind) if field.name not in (kind.__doc__ or "")]
    assert set(undocumented) <= {"limits", "filesystem", "security", "restart", "landlock", "mode"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (7, 7),
        ("12", 12),
        ("1K", 1024),
        ("256M", 256 << 20),
        ("3GB", 3 << 30),
        ("1.5M", 3 << 19),
        ("9007199254740993", (1 << 53) + 1),
        ("2kib", 2048),
        (" 2 \tMiB\n", 2 << 20),
        ("2B", 2),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize(
    "text",
    [
        -1,
        True,
        1.5,
        None,
        "",
        "M",
        "12X",
        "1e6",
        "-1M",
        "0x10",
        "1 2",
        "1.",
        ".5",
        "1.5.5",
        "1kk",
        "1i",
        "B",
        "1 .5K",
        "\u00b2",
        "1\u00a0K",
        "1\u212a",
        "1bb",
        "9" * 400,
        "9" * 5000,
        "1." + "9" * 400,
    ],
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(OptionsError, match="memory"):
        parse_size(text, "memory")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "4M"), ("memory", "lots"), ("swap", -1), ("cpus", 0), ("cpus", "1"), ("cpus", True), ("cpus", -0.5),
        ("cpus", float("nan")), ("cpu_time", 0), ("cpu_weight", 0), ("cpu_weight", 10001), ("cpu_weight", 1.5),
        ("io_weight", 0), ("io_weight", 10001),
        ("pids", 3), ("pids", 1.0), ("pids", True), ("nice", -1), ("nice", 20), ("open_files", 31), ("scratch", 0),
        ("output", 0), ("result", 0), ("file_size", "x"), ("cpuset", "cpu0+cpu1"), ("io", ["/dev/sda"]),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"(?i){name}"):
        Limits(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", "bridge"), ("results", "json"), ("limits", {"memory": 1}), ("filesystem", []), ("security", "strict"),
        ("restart", "always"), ("debug", 1), ("environment", ["A=B"]), ("environment", {"A": 1}),
        ("environment", {"A=B": "x"}), ("environment", {"": "x"}), ("environment", {"A": "x\0y"}),
        ("inherit_environment", "PATH"), ("inherit_environment", [""]), ("inherit_environment", ["\ud800"]),
        ("inherit_environment", ["A=B"]), ("inherit_environment", ["A\0"]), ("preload", "json"), ("preload", ["a b"]),
        ("preload", ["os; evil"]), ("tenant", 7), ("import_paths", "/usr/lib"), ("import_paths", ["/nowhere/at/all"]),
        ("import_paths", ["/"]), ("import_paths", ["/etc"]), ("import_paths", ["/tmp"]), ("import_paths", ["/dev/shm"]),
        ("import_paths", ["/proc/self"]), ("environment", {"A": "x" * ((1 << 17) - 2)}), ("environment", {"A": 7 * 10**2000}),
        ("degrade", ["memroy"]), ("degrade", "memory"), ("start_timeout", -1), ("start_timeout", "5"),
        ("call_timeout", 0), ("log_level", "LOUD"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"(?i){name}"):
        IsolationOptions(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Security, "user", 0), (Security, "user", 65534), (Security, "user", "nobody"), (Security, "landlock", 1),
        (Security, "hostname", ""), (Security, "hostname", "x" * 64), (Security, "hostname", "ü"),
        (RestartPolicy, "mode", "sometimes"), (RestartPolicy, "max_restarts", -1), (RestartPolicy, "within", "60"),
        (Filesystem, "read_only", "/usr"), (Filesystem, "read_only", ["/nowhere/at/all"]), (Filesystem, "writable", [7]),
        (Filesystem, "frozen", ["/etc/passwd"]), (Filesystem, "frozen", ["/nowhere/at/all"]), (Filesystem, "frozen", "/usr"),
        (Filesystem, "writable", [("/usr", "relative")]), (Filesystem, "writable", [("/usr", "/proc/self")]),
        (Filesystem, "read_only", [("/usr", "/")]), (Filesystem, "read_only", [("/usr", "/etc")]),
        (Filesystem, "read_only", [("/usr", "/x\0y")]), (Filesystem, "writable", [("/usr", "/x\ud800")]),
        (Filesystem, "read_only", [b"/usr"]), (Filesystem, "read_only", [("/usr", b"/x")]), (Filesystem, "read_only", [""]),
        (Filesystem, "overlay", ["/x\0y"]), (Filesystem, "overlay", ["/x\ud800"]),
        (Filesystem, "read_only", [("/usr", "/a/../etc")]), (Filesystem, "read_only", [("/usr", "/dev/sda")]),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_is_named(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=f"(?i){name}"):
        kind(**{name: value})


def test_a_rate_that_limits_nothing() -> None:
    with pytest.raises(OptionsError, match="limits nothing"):
        IoLimit(device="/dev/sda")
    with pytest.raises(OptionsError, match="read_bps: 0"):
        IoLimit(device="/dev/sda", read_bps=0)


def test_a_cpuset_is_parsed() -> None:
    """parity: 25"""
    assert Limits(cpuset="cpu0 cpu1").cpuset == CpuSet.parse("0-1")


def test_paths_are_made_absolute_where_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    monkeypatch.chdir(tmp_path)
    options = IsolationOptions(import_paths=["lib"], filesystem=Filesystem(read_only=["lib", ("lib", "/data")]))
    monkeypatch.chdir("/")
    assert options.import_paths == (str(tmp_path / "lib"),)
    assert options.filesystem.shown("read_only") == ((str(tmp_path / "lib"),) * 2, (str(tmp_path / "lib"), "/data"))


def test_what_was_given_may_change_afterwards() -> None:
    variables, names = {"A": "1"}, ["json"]
    options = IsolationOptions(environment=variables, preload=names)
    variables["B"] = "2"
    names.append("os")
    assert (dict(options.environment), options.preload) == ({"A": "1"}, ("json",))
    with pytest.raises(TypeError):
        options.environment["C"] = "3"  # type: ignore[index]


def test_no_start_timeout_is_none_or_zero() -> None:
    """parity: 2"""
    assert IsolationOptions(start_timeout=0).start_timeout is None
    assert IsolationOptions(start_timeout=None).start_timeout is None


def test_the_log_level_comes_from_the_environment_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 18, 85"""
    monkeypatch.delenv("PISUPERVISOR_LOG_LEVEL", raising=False)
    assert IsolationOptions().log_level == "WARNING"
    monkeypatch.setenv("PISUPERVISOR_LOG_LEVEL", "debug")
    assert IsolationOptions().log_level == "DEBUG"
    assert IsolationOptions(log_level="ERROR").log_level == "ERROR"
    monkeypatch.setenv("PISUPERVISOR_LOG_LEVEL", "chatty")
    with pytest.raises(OptionsError, match="CHATTY"):
        IsolationOptions()


def test_the_protections_are_the_public_ones() -> None:
    names = (
        "memory swap cpus cpu_weight cpuset pids io io_weight devices user mount pid network ipc uts cgroup time landlock seccomp"
        " capabilities"
    )
    assert set(PROTECTIONS) == set(names.split())


def test_an_option_nobody_knows() -> None:
    with pytest.raises(TypeError):
        pisupervisor.ProcessIsolator.create(memory="64M")


@pytest.mark.parametrize("options", [5, {"limits": Limits()}, "memory=256M", Limits()], ids=repr)
def test_what_are_no_options_at_all(options: Any) -> None:
    for make in (ProcessIsolator.create, Template, IsolationExecutor, ProcessHost):
        with pytest.raises(OptionsError, match="options: expected IsolationOptions"):
            make(options)


NONSENSE = (
    5, -1, 0, "x", "", None, True, [5], [None], {"a": 1}, (1, 2), object(), float("nan"), b"x", "a\0b", ["a\0b"], ["\ud800"],
    {"A": "\ud800"}, 10**30, -5.5, "9" * 400, "1." + "9" * 5000, [b"/usr"], [("/usr", b"/x")], [("/usr", 5)], [("/usr",)],
)  # fmt: skip
KINDS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (IsolationOptions, {}), (Limits, {}), (Filesystem, {}), (Security, {}), (RestartPolicy, {}), (IsolationEvents, {}),
    (IoLimit, {"device": "/", "read_bps": 1}), (TypeCodec, {"type": Limits, "encode": len, "decode": len}),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "others"), KINDS, ids=lambda part: getattr(part, "__name__", ""))
def test_nonsense_is_taken_or_refused_and_nothing_else(kind: Any, others: dict[str, Any]) -> None:
    refused = 0
    for field in dataclasses.fields(kind):
        for value in NONSENSE:
            try:
                kind(**{**others, field.name: value})
            except OptionsError:
                refused += 1
    assert refused > 10


def test_what_is_no_choice() -> None:
    for name in ("within", "backoff", "max_backoff", "max_restarts"):
        with pytest.raises(OptionsError, match=name):
            RestartPolicy(**{name: None})
    for seccomp in (5, True, b"strict", [], object()):
        with pytest.raises(ProfileError, match="expected a name, a path or a SeccompProfile"):
            Security(seccomp=seccomp)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match=r"io\.device"):
        IoLimit(device=None, read_bps=1)  # type: ignore[arg-type]


def test_no_user_is_the_usual_one() -> None:
    assert Security(user=None).user == Security().user == 1000


def test_relative_paths_where_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for made in (
        lambda: IsolationOptions(import_paths=["lib"]),
        lambda: IsolationOptions(modules=["lib"]),
        lambda: IsolationOptions(python="venv"),
        lambda: Filesystem(read_only=["data"]),
        lambda: Filesystem(rootfs="tree"),
        lambda: SeccompProfile.from_file("mine.json"),
        lambda: CodeReader().read("tool.py"),
    ):
        with pytest.raises(OptionsError, match="relative to a working directory that is gone"):
            made()
    assert IsolationOptions(import_paths=[tmp_path]).import_paths == (str(tmp_path),)
    assert CodeReader().read("json").key
