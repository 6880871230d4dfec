"""Calls into real children: every way to call, what comes back, and what becomes of calls that go wrong."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import enum
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers import living, nothing_left, resident, wait_until, write, zygote_of

import pisupervisor
from pisupervisor import (
    CallCancelled,
    CallTimeout,
    ChildTerminated,
    CompileError,
    Descriptor,
    ExitReason,
    IsolationError,
    IsolationOptions,
    IsolatorClosed,
    Limits,
    MemoryLimitExceeded,
    OptionsError,
    ProcessIsolator,
    RemoteError,
    RestartLimitReached,
    RestartPolicy,
    SerializationError,
    SyscallViolation,
    TargetNotFound,
)

pytestmark = [pytest.mark.linux, pytest.mark.matrix]
INSIDE = Path(__file__).with_name("inside.py")
PLUGIN = """
    class Tools:
        seen = 0

        @staticmethod
        def shrink(data, size=1):
            return data[:size]

        @classmethod
        def count(cls):
            cls.seen += 1
            return cls.seen

        class Inner:
            @staticmethod
            def deep():
                return "deep"

    def _private(*args, **kwargs):
        return list(args), kwargs

    def fail(value):
        return 1 / value

    def count_them(values):
        return {value: len(value) for value in values}

    def nothing():
        pass

    def parameters(timeout, returns, idempotent, kwargs):
        return [timeout, returns, idempotent, kwargs]
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessIsolator]:
    """One child for the tests that do it no harm."""
    with ProcessIsolator.create(environment={"A_ZYGOTE": "of its own"}) as isolator:
        yield isolator


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plugins"), "plugin.py", PLUGIN)


# --- invoke_method -----------------------------------------------------------------------------------------------


def as_package(folder: Path) -> Path:
    write(folder / "pack", "__init__.py", "from .part import value\n")
    write(folder / "pack", "part.py", "value = 7\ndef twice(x): return 2 * x\n")
    return folder / "pack"


def as_archive(folder: Path, name: str) -> Path:
    package = as_package(folder)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in package.iterdir():
            archive.write(file, f"pack/{file.name}")
        archive.writestr("pack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n")
    return folder / name


def test_a_file(shared: ProcessIsolator, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 38"""
    assert shared.invoke_method(plugin, "Tools.shrink", [1, 2, 3], size=2) == [1, 2]
    assert shared.invoke_method(plugin, "Tools.Inner.deep") == "deep"
    assert shared.invoke_method(plugin, "count_them", ["a", "bc"]) == {"a": 1, "bc": 2}
    assert shared.invoke_method(plugin, "nothing") is None
    monkeypatch.chdir(plugin.parent)
    assert shared.invoke_method("plugin.py", "Tools.shrink", "abc") == "a"


@pytest.mark.parametrize("name", ["folder", "pack.zip", "pack-1.0-py3-none-any.whl"])
def test_a_package(shared: ProcessIsolator, tmp_path: Path, name: str) -> None:
    """parity: 38"""
    path = as_package(tmp_path) if name == "folder" else as_archive(tmp_path, name)
    assert shared.invoke_method(path, "part.twice", 21) == 42


def test_a_module_by_name(shared: ProcessIsolator) -> None:
    """parity: 38"""
    assert shared.invoke_method("json", "dumps", {"a": 1}) == '{"a": 1}'
    assert shared.invoke_method("os.path", "join", "a", "b") == "a/b"


def test_a_private_method_and_twelve_arguments(shared: ProcessIsolator, plugin: Path) -> None:
    """parity: 46"""
    letters = dict(zip("abcdefghijkl", range(12), strict=True))
    assert shared.invoke_method(plugin, "_private", *range(12), **letters) == (list(range(12)), letters)


def test_parameters_named_like_ours(shared: ProcessIsolator, plugin: Path) -> None:
    given = {"timeout": 1, "returns": 2, "idempotent": 3, "kwargs": 4}
    assert shared.invoke_method(plugin, "parameters", kwargs=given) == [1, 2, 3, 4]


@pytest.mark.parametrize("kwargs", [[1], 5, {1: 2}, "ab"], ids=repr)
def test_what_are_no_keyword_arguments(shared: ProcessIsolator, plugin: Path, kwargs: Any) -> None:
    for call in (
        lambda: shared.invoke_method(plugin, "_private", kwargs=kwargs),
        lambda: shared.invoke(dict, kwargs=kwargs),
        lambda: shared.execute(dict, kwargs=kwargs),
        lambda: shared.create_object(dict, kwargs=kwargs),
        lambda: shared.get_method(plugin, "_private")(kwargs=kwargs),
    ):
        with pytest.raises(OptionsError, match="kwargs: expected a dict with names as keys"):
            call()


def test_an_isolator_that_was_not_created_says_so() -> None:
    with nothing_left(), ProcessIsolator(IsolationOptions()) as made:
        for call in (
            lambda: made.invoke(len, "abc"),
            lambda: made.run_source("1"),
            lambda: list(made.map(len, ["abc"])),
        ):
            with pytest.raises(IsolationError, match=r"make it with ProcessIsolator\.create"):
                call()


def test_a_keyword_argument_is_given_once(shared: ProcessIsolator, plugin: Path) -> None:
    """Which of the two values was meant nobody can know."""
    for call in (
        lambda: shared.invoke_method(plugin, "_private", n=1, kwargs={"n": 2}),
        lambda: shared.execute(dict, n=1, kwargs={"m": 1, "n": 1}),
        lambda: shared.get_method(plugin, "_private")(n=1, kwargs={"n": 2}),
    ):
        with pytest.raises(OptionsError, match="kwargs: 'n' is given as a keyword argument, too"):
            call()


def test_an_isolator_is_no_argument_and_has_no_copy(shared: ProcessIsolator) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a ProcessIsolator is one child's master: it cannot be copied"):
            copied(shared)
    with pytest.raises(SerializationError, match=r"'shared', used by the function .*a ProcessIsolator is one child's"):
        shared.invoke(lambda: shared.id)
    assert shared.invoke(len, "abc") == 3


@pytest.mark.parametrize("text", ["plugin.py", ":shrink", "plugin.py:", ""], ids=repr)
def test_a_target_as_text_says_both_where_and_what(shared: ProcessIsolator, text: str) -> None:
    for call in (shared.execute, shared.map):
        with pytest.raises(OptionsError, match=r"is no target; write it as .plugin\.py:function."):
            call(text, [1])


def test_state_stays_in_the_child(plugin: Path) -> None:
    with ProcessIsolator.create() as one, ProcessIsolator.create() as two:
        assert [one.invoke_method(plugin, "Tools.count") for _ in range(3)] == [1, 2, 3]
        assert two.invoke_method(plugin, "Tools.count") == 1


def test_what_a_module_puts_in_the_place_of_its_function_is_called(tmp_path: Path) -> None:
    source = """
        def work(): return "first"
        def swap():
            global work
            work = lambda: "second"
        class Tools:
            @staticmethod
            def use(): return "first"
        def swap_class():
            global Tools
            class Tools:
                def use(self): return "second"
    """
    path = write(tmp_path, "plugin.py", source)
    with ProcessIsolator.create() as isolator:
        work = isolator.get_method(path, "work")
        assert [work() for _ in range(3)] == ["first"] * 3
        assert isolator.invoke_method(path, "Tools.use") == "first"
        isolator.invoke_method(path, "swap")
        isolator.invoke_method(path, "swap_class")
        assert [work() for _ in range(3)] == ["second"] * 3
        assert isolator.invoke_method(path, "Tools.use") == "second"


def test_a_module_that_was_not_given_says_how_to_give_it(shared: ProcessIsolator) -> None:
    with pytest.raises(TargetNotFound, match=r"no module 'numpy'(.|\n)*import_paths=\[...\] or modules="):
        shared.invoke_method("numpy", "zeros", 3)


def test_four_ways_to_be_wrong(shared: ProcessIsolator, plugin: Path, tmp_path: Path) -> None:
    """parity: 41"""
    with pytest.raises(OptionsError, match=r"nowhere\.py"):
        shared.invoke_method(tmp_path / "nowhere.py", "f")
    with pytest.raises(TargetNotFound, match="no 'absent'; it has Tools"):
        shared.invoke_method(plugin, "absent")
    with pytest.raises(CompileError) as caught:
        shared.invoke_method(write(tmp_path, "bad.py", "def f(:\n"), "f")
    assert caught.value.line == 1
    with pytest.raises(TypeError):
        shared.invoke_method(plugin, "Tools.shrink")
    with pytest.raises(OptionsError):
        shared.invoke_method(plugin, "Tools..shrink")
    with pytest.raises(TargetNotFound):
        shared.invoke_method("no_such_module_anywhere", "f")
    assert shared.state == "ready"


# --- invoke ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Account:
    owner: str
    total: Decimal


class Counter:
    def __init__(self) -> None:
        self.values: list[int] = []

    def add(self, value: int) -> int:
        self.values.append(value)
        return len(self.values)


def own_function(left: int, right: int = 1) -> int:
    return left * 10 + right


def test_lambdas_and_functions_of_this_module(shared: ProcessIsolator) -> None:
    """parity: 42"""
    total = 41
    assert shared.invoke(lambda: total + 1) == 42
    assert shared.invoke(lambda x, *, y: x + y, 1, y=2) == 3
    assert shared.invoke(own_function, 4, right=2) == 42
    assert shared.invoke(len, [1, 2, 3]) == 3


def test_a_closure_over_own_classes(shared: ProcessIsolator) -> None:
    """parity: 42. What the child changes stays in the child."""
    account, counter, numbers = Account("me", Decimal("1.5")), Counter(), [1, 2]

    def change() -> tuple[str, int, int]:
        account.total += 1
        numbers.append(3)
        return str(account.total), counter.add(5), len(numbers)

    assert shared.invoke(change) == ("2.5", 1, 3)
    assert (account, counter.values, numbers) == (Account("me", Decimal("1.5")), [], [1, 2])


def test_what_is_no_function(shared: ProcessIsolator) -> None:
    with pytest.raises(OptionsError, match="invoke_method"):
        shared.invoke("plugin.py")  # type: ignore[arg-type]


def test_a_closure_that_cannot_be_sent(shared: ProcessIsolator) -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="'lock', used by the function") as caught:
        shared.invoke(lambda: lock.acquire())
    assert caught.value.direction == "to child"


# --- submit ------------------------------------------------------------------------------------------------------


def test_submit(plugin: Path) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        future = isolator.submit(own_function, 4, right=2)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(5) == 42
        assert isolator.submit_call(isolator.invoke_method, plugin, "Tools.count").result(5) == 1
        assert isinstance(isolator.submit(lambda: 1 / 0).exception(5), ZeroDivisionError)
        done, _ = concurrent.futures.wait([isolator.submit(own_function, n) for n in range(5)], timeout=5)
        assert sorted(future.result() for future in done) == [1, 11, 21, 31, 41]


def test_submit_call_runs_nothing_here(plugin: Path) -> None:
    """It called whatever it was given, in the host."""
    ran: list[int] = []
    with ProcessIsolator.create() as isolator, ProcessIsolator.create() as other:
        for wrong in (ran.append, own_function, other.invoke, 5, None):
            with pytest.raises(OptionsError, match="submit_call"):
                isolator.submit_call(wrong, 1)  # type: ignore[arg-type]
        assert ran == []
        tools, text = isolator.create_object(plugin, "Tools"), isolator.copy_object("text")
        assert isolator.submit_call(isolator.get_method(plugin, "Tools.count")).result(5) == 1
        assert (
            isolator.submit_call(text.upper).result(5) == isolator.submit_call(text.invoke, "upper").result(5) == "TEXT"
        )
        assert isolator.submit_call(isolator.get_method("builtins", "repr").invoke, tools).result(5)


def test_cancel_kills_what_runs() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        future = isolator.submit(time.sleep, 1000)
        assert wait_until(future.running)
        assert wait_until(lambda: isolator.state == "busy")
        assert future.cancel() is True
        with pytest.raises(concurrent.futures.CancelledError) as caught:
            future.result(5)
        assert isinstance(caught.value, CallCancelled)
        assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        assert isolator.invoke(lambda: "next") == "next"
        assert isolator.pid != pid


def test_cancel_takes_back_what_waits() -> None:
    with ProcessIsolator.create() as isolator:
        pid = isolator.pid
        first = isolator.submit(time.sleep, 0.2)
        second = isolator.submit(time.sleep, 1000)
        assert second.cancel() is True
        with pytest.raises(CallCancelled):
            second.result(5)
        assert first.result(5) is None
        assert isolator.pid == pid, "nobody was killed for a call that had not begun"
        assert first.cancel() is False


def test_close_ends_what_was_submitted() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        running, waiting = isolator.submit(time.sleep, 1000), isolator.submit(time.sleep, 1000)
        assert wait_until(running.running)
        started = time.monotonic()
        isolator.close()
        assert time.monotonic() - started < 2
        assert isinstance(running.exception(5), (ChildTerminated, IsolatorClosed))
        assert waiting.cancelled() or isinstance(waiting.exception(5), IsolatorClosed)


# --- output ------------------------------------------------------------------------------------------------------


def test_everything_that_is_written_is_captured(shared: ProcessIsolator) -> None:
    """parity: 37 (one at a time)"""
    result = shared.execute(f"{INSIDE}:talk")
    assert result.value == "value"
    assert sorted(result.stdout.split()) == ["C", "from", "printed", "raw", "shell", "sub"]
    assert sorted(result.stderr.split()) == ["suberr", "warned"]
    assert (result.truncated, result.duration > 0) == (False, True)
    assert shared.execute(lambda: None).stdout == "", "each call has its own"


def test_a_flood_is_bounded_and_flagged() -> None:
    before = resident()
    with ProcessIsolator.create(limits=Limits(output="64K")) as isolator:
        result = isolator.execute(f"{INSIDE}:flood", 64 << 20)
        assert (len(result.stdout), result.stderr, result.truncated) == (64 << 10, "the end\n", True)
        assert result.value == 64 << 20
        assert isolator.execute(f"{INSIDE}:talk").truncated is False
    assert resident() - before < 16 << 20


def test_output_of_an_error_is_lost_but_the_error_is_not(shared: ProcessIsolator) -> None:
    def shout() -> None:
        print("before")
        raise KeyError("x")

    with pytest.raises(KeyError):
        shared.execute(shout)
    assert shared.execute(lambda: print("after")).stdout == "after\n"


@pytest.mark.alone
def test_usage_is_told(shared: ProcessIsolator, need: Callable[..., None]) -> None:
    done = shared.execute(f"{INSIDE}:burn", 0.1)
    usage = done.usage
    assert 0.8 * done.value <= (usage.cpu_time or 0) < done.value + 0.1, "what the child says that it has used"
    need("memory_peak")
    assert (usage.peak_memory or 0) > 1 << 20


# --- sources and scripts -----------------------------------------------------------------------------------------


def test_source_keeps_its_state() -> None:
    with ProcessIsolator.create() as isolator:
        result = isolator.run_source("x = 6 * 7\nprint('hi')\nx")
        assert (result.value, result.stdout) == (42, "hi\n")
        assert isolator.run_source("x + 1").value == 43
        assert isolator.run_source("def f(): return x").value is None
        assert isolator.run_source("f()").value == 42


def test_source_that_does_not_compile(shared: ProcessIsolator) -> None:
    """parity: 83"""
    with pytest.raises(CompileError) as caught:
        shared.run_source("a = 1\nb = (\n")
    assert caught.value.line == 2
    with pytest.raises(RemoteError, match="NameError") as raised:
        shared.run_source("a = 1\nundefined_name")
    assert "line 2" in raised.value.remote_traceback


SCRIPT = """
    import sys
    print(sys.argv[1:], __name__)
    print("to stderr", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3, 255])
def test_a_script(shared: ProcessIsolator, tmp_path: Path, code: int) -> None:
    """parity: 39"""
    info = shared.run_script(write(tmp_path, "tool.py", SCRIPT), [str(code), "--fast"])
    assert (info.exit_code, info.reason) == (code, ExitReason.EXITED)
    assert info.stdout == f"['{code}', '--fast'] __main__\n"
    assert info.stderr == "to stderr\n"
    assert info.describe() == f"exited with code {code}"


def test_a_script_is_called_what_it_was_called_by(
    shared: ProcessIsolator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a tool/tool.py", "import sys\nprint(sys.argv)")
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "a tool/tool.py", "./a tool/tool.py"):
        assert shared.run_script(name, ["--fast"]).stdout == f"{[name, '--fast']}\n"
    assert shared.run_script(Path("a tool") / "tool.py").stdout == "['a tool/tool.py']\n"


def test_a_script_whose_import_is_refused_says_how_to_allow_it(shared: ProcessIsolator, tmp_path: Path) -> None:
    info = shared.run_script(write(tmp_path, "tool.py", "import not_given\n"))
    assert info.exit_code == 1
    assert "No module named 'not_given'\n  hint: modules come into the child through import_paths=" in info.stderr


@pytest.mark.parametrize("argv", ["--fast", b"--fast", [1], [b"x"], None, 5], ids=repr)
def test_what_are_no_arguments_of_a_script(shared: ProcessIsolator, tmp_path: Path, argv: Any) -> None:
    with pytest.raises(OptionsError, match="argv: expected a list of texts"):
        shared.run_script(write(tmp_path, "tool.py", ""), argv)


@pytest.mark.parametrize("argument", ["a\0b", "\0", "\ud800", "x" * 5000 + "\udfff"], ids=lambda text: ascii(text)[:9])
def test_what_no_process_takes_as_an_argument(shared: ProcessIsolator, tmp_path: Path, argument: str) -> None:
    path = write(tmp_path, "tool.py", "")
    with pytest.raises((ValueError, UnicodeError)):
        subprocess.run([sys.executable, path, argument], check=True)
    with pytest.raises(OptionsError, match=r"argv: .* cannot be an argument") as caught:
        shared.run_script(path, ["--fast", argument])
    assert len(str(caught.value)) < 300


class Mode(enum.StrEnum):
    FAST = "--fast"


@pytest.mark.parametrize(
    "argument", ["", "\udcff", "\U0001f600", "a\nb", "-", Mode.FAST, "x" * 200_000], ids=lambda text: ascii(text)[:9]
)
def test_what_a_process_takes_as_an_argument(shared: ProcessIsolator, tmp_path: Path, argument: str) -> None:
    """Also longer ones than the kernel takes."""
    info = shared.run_script(
        write(tmp_path, "tool.py", "import sys\nprint(ascii(sys.argv[1]), type(sys.argv[1]))"), [argument]
    )
    assert info.stdout == f"{str.__str__(argument)!a} <class 'str'>\n"


class Name(enum.StrEnum):
    FUNCTION = "upper"
    KIND = "Kind"
    METHOD = "twice"
    MODULE = "math"
    TARGET = "sqrt"
    SOURCE = "1 + 1"


def test_names_may_be_members_of_an_enum(shared: ProcessIsolator, tmp_path: Path) -> None:
    """Which the child knows nothing of: it died of them."""
    source = "def upper(x): return x.upper()\nclass Kind:\n    def twice(self, x): return 2 * x"
    path, pid = write(tmp_path, "plugin.py", source), shared.pid
    assert shared.invoke_method(path, Name.FUNCTION, "a") == "A"
    assert shared.invoke_method(Name.MODULE, Name.TARGET, 4) == 2.0
    assert shared.get_method(path, Name.FUNCTION)("b") == "B"
    assert shared.create_object(path, Name.KIND).invoke(Name.METHOD, 2) == 4
    assert shared.run_source(Name.SOURCE).value == 2
    assert shared.pid == pid


@pytest.mark.parametrize("source", [5, b"1", None], ids=repr)
def test_what_is_no_source(shared: ProcessIsolator, source: Any) -> None:
    with pytest.raises(OptionsError, match="source: expected text"):
        shared.run_source(source)


def test_a_script_that_raises(shared: ProcessIsolator, tmp_path: Path) -> None:
    """parity: 39"""
    path = write(tmp_path, "tool.py", "import sys\nassert len(sys.argv) == 1, sys.argv\nprint(1)\nundefined\n")
    info = shared.run_script(path)
    assert (info.exit_code, info.stdout) == (1, "1\n")
    assert "NameError" in info.stderr_tail
    assert f'"{path}", line 4' in info.stderr_tail


# --- values ------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


VALUES: list[Any] = [
    None, True, False, 0, -1, 2**63, -(2**200), 0.0, -0.5, float("inf"), "", "text ü 日本", b"", b"\0\xff", [], [1, [2, [3]]],
    (), (1, (2,)), {}, {"a": {"b": None}}, {1: 2, (3, 4): "tuple key"}, set(), {1, "a"}, frozenset({1}), 1 + 2j,
    datetime(2024, 2, 29, 1, 2, 3, 4), datetime(2024, 1, 1, tzinfo=UTC), date(1, 1, 1),
    timedelta(days=-1, microseconds=3), Decimal("1.10"), uuid.UUID(int=7), Path("/a/b"),
]  # fmt: skip


def identity(value: Any) -> Any:
    return value


READS = "import sys; text = sys.stdin.read(); print(len(text), text[:8])"


def test_a_script_reads_what_it_is_given(shared: ProcessIsolator, tmp_path: Path) -> None:
    script = write(tmp_path, "tool.py", READS)
    given = (
        ("h\u00e9llo", 5),
        ("", 0),
        (b"bytes", 5),
        (bytearray(b"more"), 4),
        (b"x" * 5_000_000, 5_000_000),
        ("\udce9", 1),
    )
    for stdin, size in given:
        assert shared.run_script(script, stdin=stdin).stdout.startswith(f"{size} ")
        assert shared.run_script(script).stdout == "0 \n"  # nothing is left of it


def test_a_script_reads_what_is_open(shared: ProcessIsolator, tmp_path: Path) -> None:
    script = write(tmp_path, "tool.py", READS)
    with open(write(tmp_path, "text", "first\nsecond\n")) as file:
        file.readline()
        assert shared.run_script(script, stdin=file).stdout == "7 second\n\n"
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    assert shared.run_script(script, stdin=Descriptor(reader)).stdout == "5 piped\n"
    os.close(reader)
    ours, theirs = socket.socketpair()
    ours.sendall(b"said")
    ours.close()
    with theirs:
        assert shared.run_script(script, stdin=theirs).stdout == "4 said\n"


def test_what_a_script_starts_reads_on_where_it_stopped(shared: ProcessIsolator, tmp_path: Path) -> None:
    source = "import os, subprocess; os.read(0, 4); subprocess.run(['/bin/cat'])"
    assert shared.run_script(write(tmp_path, "tool.py", source), stdin="one\ntwo\n").stdout == "two\n"


def test_what_a_script_has_done_to_its_input_is_no_matter(shared: ProcessIsolator, tmp_path: Path) -> None:
    before = shared.invoke(os.listdir, "/proc/self/fd")
    sources = (
        "input()", "import os; os.read(0, 2)", "import os; os.close(0)", "import sys; sys.stdin.close(); del sys.stdin",
        "import sys; sys.stdin = 5",
    )  # fmt: skip
    for source in sources:
        assert shared.run_script(write(tmp_path, "tool.py", source), stdin="one\ntwo\n").exit_code == 0
        assert shared.run_script(write(tmp_path, "reads.py", READS)).stdout == "0 \n"
        script = write(tmp_path, "reads.py", READS)
        assert shared.run_script(script, stdin="again").stdout == "5 again\n"
        assert shared.run_script(script).stdout == "0 \n"
    assert shared.invoke(os.listdir, "/proc/self/fd") == before


@pytest.mark.parametrize(
    "stdin", [5, io.StringIO("x"), ["x"], "\ud800"], ids=["number", "StringIO", "list", "surrogate"]
)
def test_what_no_script_can_read(shared: ProcessIsolator, tmp_path: Path, stdin: object) -> None:
    with pytest.raises(OptionsError, match="stdin: "):
        shared.run_script(write(tmp_path, "tool.py", READS), stdin=stdin)


def test_what_can_be_read_once_is_not_read_again(shared: ProcessIsolator, tmp_path: Path) -> None:
    script = write(tmp_path, "tool.py", READS)
    with open(script) as file, pytest.raises(OptionsError, match="gone for the next one"):
        shared.run_script(script, stdin=file, idempotent=True)
    assert shared.run_script(script, stdin="text", idempotent=True).stdout == "4 text\n"


def test_what_a_script_reads_is_counted(tmp_path: Path) -> None:
    with ProcessIsolator.create(limits=Limits(memory="64M")) as isolator:
        script = write(tmp_path, "tool.py", READS)
        with pytest.raises((ChildTerminated, RemoteError)):
            isolator.run_script(script, stdin=b"x" * (100 << 20))
        assert isolator.run_script(script, stdin="text").stdout == "4 text\n"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: "set" if isinstance(value, set) else repr(value))
def test_data_comes_back_as_it_went(shared: ProcessIsolator, value: Any) -> None:
    found = shared.invoke(identity, value)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("value", [0, False, "", None, b"", [], {}, 0.0])
def test_falsy_values_are_values(shared: ProcessIsolator, value: Any) -> None:
    """parity: 84"""
    assert shared.execute(identity, value).value == value
    assert shared.run_source(repr(value)).value == value


def test_enums_and_dataclasses_are_built_as_declared(shared: ProcessIsolator) -> None:
    account = Account("me", Decimal("2.5"))
    assert shared.invoke(identity, Colour.RED) == "red"
    assert shared.invoke(identity, Colour.RED, returns=Colour) is Colour.RED
    assert shared.invoke(identity, account, returns=Account) == account
    assert shared.invoke(identity, [account], returns=list[Account]) == [account]
    with pytest.raises(SerializationError):
        shared.invoke(identity, {"owner": 1}, returns=Account)


def test_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    with ProcessIsolator.create(import_paths=[sysconfig.get_path("purelib")]) as isolator:
        for value in (numpy.arange(12.0).reshape(3, 4)[:, ::2], numpy.array([], dtype="i2"), numpy.array(["a", "bc"])):
            found = isolator.invoke(identity, value)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert (found == value).all()
        assert isolator.invoke(identity, numpy.float32(1.5)) == 1.5
        assert isolator.invoke(lambda: numpy.ones(3).sum()) == 3.0


def test_results_larger_than_a_frame(shared: ProcessIsolator) -> None:
    assert shared.invoke(lambda: bytes(range(256)) * (10 << 12)) == bytes(range(256)) * (10 << 12)
    assert shared.invoke(lambda: "xü" * 3_000_000) == "xü" * 3_000_000
    assert shared.invoke(lambda: list(range(100_000))) == list(range(100_000))


@pytest.mark.parametrize("size", [(1 << 20) - 10, 1 << 20, (4 << 20) - 8, 4 << 20, 9 << 20])
def test_a_known_target_whose_result_is_larger_than_a_frame(shared: ProcessIsolator, tmp_path: Path, size: int) -> None:
    """The short way, which the second call takes, must not send what is for the long one."""
    plugin = write(tmp_path, "plugin.py", "def text(size): return 'x' * size")
    for length in (1, size, size):
        assert shared.invoke_method(plugin, "text", length) == "x" * length


def test_arguments_larger_than_a_frame(shared: ProcessIsolator) -> None:
    data = os.urandom(10 << 20)
    assert shared.invoke(lambda data: hash(data) and len(data), data) == 10 << 20


@pytest.mark.parametrize("results", ["data", "pickle"])
def test_a_result_above_the_limit(results: Any) -> None:
    with ProcessIsolator.create(limits=Limits(result="1M"), results=results) as isolator:
        pid = isolator.pid
        assert len(isolator.invoke(lambda: bytes(1_000_000))) == 1_000_000
        for make in (lambda: bytes(2 << 20), lambda: "x" * (2 << 20), lambda: list(range(1 << 20))):
            with pytest.raises(SerializationError, match="result") as caught:
                isolator.invoke(make)
            assert caught.value.direction == "from child"
        assert isolator.pid == pid, "nobody dies of it"


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: {"a": [1, object()]}, r"\['a'\]\[1\]"),
        (lambda: [lambda: 1], r"\[0\]"),
        (lambda: Fraction(1, 2), "Fraction"),
        (lambda: [(n for n in ())], "generator"),
    ],
)
def test_what_is_not_data_is_named(shared: ProcessIsolator, make: Any, part: str) -> None:
    with pytest.raises(SerializationError, match=part) as caught:
        shared.invoke(make)
    assert caught.value.direction == "from child"


class Canary:
    """Whoever unpickles this, touches a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_the_host_never_unpickles(shared: ProcessIsolator, tmp_path: Path) -> None:
    """parity: 52"""
    path = tmp_path / "canary"
    with pytest.raises(SerializationError):
        shared.run_source(f"import os\nclass C:\n def __reduce__(self): return os.system, ('touch {path}',)\n[C(), 1]")
    assert not path.exists()


def test_pickle_for_those_who_ask(tmp_path: Path) -> None:
    """parity: 52 (the opt-in)"""
    with ProcessIsolator.create(results="pickle") as isolator:
        assert isolator.invoke(lambda: Fraction(1, 3)) == Fraction(1, 3)
        assert isolator.invoke(lambda: {"a": 1}) == {"a": 1}
        isolator.run_source(f"import os\nclass C:\n def __reduce__(self): return os.mkdir, ('{tmp_path}/canary',)\nC()")
        assert (tmp_path / "canary").is_dir(), "the canary works: what the caller trusts is run"


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_exception_says_type_message_file_and_line(shared: ProcessIsolator, plugin: Path) -> None:
    """parity: 51"""
    with pytest.raises(RemoteError) as caught:
        shared.invoke_method(plugin, "fail", 0)
    error = caught.value
    assert (error.type_name, error.message) == ("ZeroDivisionError", "division by zero")
    line = 1 + PLUGIN.splitlines().index("        return 1 / value")
    assert f'File "{plugin}", line {line}, in fail' in error.remote_traceback
    assert "return 1 / value" in error.remote_traceback
    assert "pihost" not in error.remote_traceback
    with pytest.raises(ZeroDivisionError):
        shared.invoke_method(plugin, "fail", 0)


def test_an_exception_of_a_closure_says_file_and_line(shared: ProcessIsolator) -> None:
    """parity: 51. cloudpickle alone sends code without the name of its file."""

    def outer(value: int) -> float:
        def inner() -> float:
            return 1 / value

        return inner()

    with pytest.raises(ZeroDivisionError) as caught:
        shared.invoke(outer, 0)
    text, line = str(caught.value), outer.__code__.co_firstlineno
    assert f'File "{__file__}", line {line + 4}, in outer' in text
    assert f'File "{__file__}", line {line + 2}, in inner' in text


def test_an_exception_class_of_their_own(shared: ProcessIsolator) -> None:
    with pytest.raises(RemoteError) as caught:
        shared.run_source("class Odd(Exception): pass\nraise Odd('so')")
    assert (caught.value.type_name.rpartition(".")[2], caught.value.message) == ("Odd", "so")
    assert type(caught.value).__mro__[1] is not KeyError


def test_an_interrupt_is_what_it_is_in_every_python() -> None:
    """Programs send SIGINT to themselves, and catch what comes."""
    source = "import os, signal\ntry:\n    os.kill(os.getpid(), 2)\n    signal.pause()\nexcept KeyboardInterrupt: caught = True"
    with ProcessIsolator.create() as isolator:
        before = isolator.pid
        assert isolator.run_source(f"{source}\ncaught", timeout=10.0).value is True
        assert isolator.pid == before


@pytest.mark.parametrize("source", ["raise KeyboardInterrupt", "import os\nos.kill(os.getpid(), 2)"])
def test_a_script_that_catches_no_interrupt_dies_of_it(shared: ProcessIsolator, tmp_path: Path, source: str) -> None:
    """As its process does outside; the child lives on."""
    pid = shared.pid
    info = shared.run_script(write(tmp_path, "tool.py", source))
    assert (info.exit_code, info.signal, info.reason) == (None, 2, ExitReason.SIGNALED)
    assert info.describe() == "killed by SIGINT"
    assert info.stderr.endswith("KeyboardInterrupt\n")
    assert shared.pid == pid


def test_the_hook_of_a_script_decides_its_exit_code(shared: ProcessIsolator, tmp_path: Path) -> None:
    source = "import sys\nsys.excepthook = lambda *_: sys.exit(5)\nraise KeyboardInterrupt"
    assert shared.run_script(write(tmp_path, "tool.py", source)).exit_code == 5


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "raise KeyboardInterrupt", "exit(4)"])
def test_leaving_ends_the_call_not_the_child(source: str) -> None:
    with ProcessIsolator.create() as isolator:
        pid = isolator.pid
        with pytest.raises(RemoteError):
            isolator.run_source(source)
        assert isolator.run_source("1").value == 1
        assert isolator.pid == pid


# --- timeouts ----------------------------------------------------------------------------------------------------


def test_no_time_at_all(shared: ProcessIsolator) -> None:
    """The answer where it is there at once, as with a lock or a future; else the call is over, and nothing was waited for."""
    met: set[int | None] = set()
    for _ in range(20):
        began = time.monotonic()
        try:
            met.add(shared.invoke(abs, -1, timeout=0))
        except CallTimeout:
            met.add(None)
        assert time.monotonic() - began < 1
        with pytest.raises(CallTimeout):
            shared.invoke(time.sleep, 1, timeout=0)
        assert shared.invoke(abs, -1) == 1
    assert met <= {1, None}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("spin", ()),
        ("spin_deaf", ()),
        ("sleep", (1000,)),
        ("spin_in_c", ()),
        ("spin_with_family", ()),
        ("close_link", ()),
    ],
)
def test_a_timeout_kills_whatever_it_is(target: str, arguments: tuple[Any, ...]) -> None:
    ends_itself = target == "close_link"  # and is not to be overtaken, where a first call takes half a second
    timeout = 20.0 if ends_itself else 0.5
    with nothing_left(), ProcessIsolator.create() as isolator:
        zygote, pid = zygote_of(isolator), isolator.pid
        started = time.monotonic()
        with pytest.raises((CallTimeout, ChildTerminated)) as caught:
            isolator.invoke_method(INSIDE, target, *arguments, timeout=timeout)
        took = time.monotonic() - started
        assert isinstance(caught.value, ChildTerminated if ends_itself else TimeoutError)
        assert took < timeout + 1.0
        assert living(zygote) == [], "the whole family is gone"
        assert isolator.invoke(lambda: "next") == "next"
        assert isolator.pid != pid


@pytest.mark.root
def test_a_timeout_after_a_limit_tells_of_the_limit() -> None:
    source = "import os, time\ntry:\n    while os.fork(): pass\nexcept OSError: pass\ntime.sleep(60)"
    with ProcessIsolator.create(limits=Limits(pids=8)) as isolator:
        with pytest.raises(CallTimeout) as caught:
            isolator.run_source(source, timeout=0.5)
        assert caught.value.exit_info is not None
        assert caught.value.exit_info.reason is ExitReason.PIDS


def test_a_timeout_for_all_calls() -> None:
    with ProcessIsolator.create(call_timeout=0.2) as isolator:
        with pytest.raises(CallTimeout, match=r"0\.2 s"):
            isolator.invoke_method(INSIDE, "sleep", 60)
        assert isolator.invoke_method(INSIDE, "sleep", 0.4, timeout=5) == 0.4


def test_timeouts_never_count_as_crashes() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(max_restarts=1)) as isolator:
        for _ in range(4):
            with pytest.raises(CallTimeout):
                isolator.invoke(time.sleep, 60, timeout=0.05)
        assert isolator.invoke(lambda: 1) == 1


def test_nor_does_a_launch_that_the_caller_had_no_time_for() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(max_restarts=1, backoff=0)) as isolator:
        told = []
        for _ in range(8):
            with pytest.raises(CallTimeout) as caught:
                isolator.invoke(time.sleep, 60, timeout=0.001)  # a launch takes longer
            told.append(str(caught.value))
        assert any("while another child was being started" in text for text in told)
        assert isolator.invoke(lambda: 1) == 1


def test_waiting_for_ones_turn_is_part_of_the_timeout() -> None:
    with ProcessIsolator.create() as isolator:
        future, pid = isolator.submit(time.sleep, 0.6), isolator.pid
        assert wait_until(lambda: isolator.state == "busy")
        with pytest.raises(CallTimeout, match="was not started"):
            isolator.invoke(lambda: 1, timeout=0.1)
        assert future.result(5) is None
        assert isolator.pid == pid


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.bed
class TestLimits:
    def test_a_memory_bomb(self) -> None:
        """parity: 23"""
        with nothing_left(), ProcessIsolator.create(limits=Limits(memory="64M")) as isolator:
            assert isolator.invoke_method(INSIDE, "eat", 32 << 20) == 32 << 20
            with pytest.raises(MemoryLimitExceeded, match="memory limit") as caught:
                isolator.invoke_method(INSIDE, "eat", 256 << 20)
            info = caught.value.exit_info
            assert (info.reason, info.signal) == (ExitReason.MEMORY, signal.SIGKILL)
            assert "oom-killed" in info.describe()
            assert isolator.wait_for_exit(0).reason is ExitReason.MEMORY
            assert isolator.run_source("1").value == 1

    def test_children_that_exceed_it_together(self) -> None:
        """parity: 27"""
        with ProcessIsolator.create(limits=Limits(memory="96M")) as isolator:
            assert isolator.invoke_method(INSIDE, "eat_in_children", 1, 48 << 20) == [0]
            try:
                codes = isolator.invoke_method(INSIDE, "eat_in_children", 3, 48 << 20)
            except MemoryLimitExceeded:
                return
            assert -signal.SIGKILL in codes

    def test_a_fork_bomb(self) -> None:
        """parity: 26"""
        with nothing_left(), ProcessIsolator.create(limits=Limits(pids=16)) as isolator:
            assert isolator.invoke_method(INSIDE, "fork_bomb", 1000) == 14, "PID 1 and the payload are of the 16"
            assert isolator.applied["pids"].holds

    @pytest.mark.alone
    def test_half_a_core(self) -> None:
        """parity: 24. The control is in ``test_limits``: without a quota nothing holds it back."""
        with ProcessIsolator.create(limits=Limits(cpus=0.5)) as isolator:
            assert 1.3 < isolator.invoke_method(INSIDE, "burn", 3.0) < 1.7

    def test_one_cpu_of_many(self) -> None:
        """parity: 25"""
        last = max(os.sched_getaffinity(0))
        with ProcessIsolator.create(limits=Limits(cpuset=f"cpu{last}")) as isolator:
            assert isolator.invoke_method(INSIDE, "facts")["cpus"] == [last]

    def test_cpu_time(self) -> None:
        with ProcessIsolator.create(limits=Limits(cpu_time=1)) as isolator:
            with pytest.raises(pisupervisor.CpuLimitExceeded) as caught:
                isolator.invoke_method(INSIDE, "spin", timeout=10)
            assert caught.value.exit_info.reason is ExitReason.CPU_TIME

    def test_usage_and_pids(self) -> None:
        with ProcessIsolator.create() as isolator:
            isolator.invoke_method(INSIDE, "eat", 16 << 20)
            usage = isolator.resource_usage()
            assert (usage.peak_memory or 0) > 16 << 20
            assert (usage.cpu_time or 0) > 0
            assert isolator.pid in isolator.pids()
            assert len(isolator.pids()) == 2


# --- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "argument", "reason", "code", "number"),
    [
        ("leave", 3, ExitReason.EXITED, 3, None),
        ("leave", 0, ExitReason.EXITED, 0, None),
        ("die", signal.SIGSEGV, ExitReason.SIGNALED, None, signal.SIGSEGV),
        ("die", signal.SIGKILL, ExitReason.SIGNALED, None, signal.SIGKILL),
        ("die", signal.SIGSYS, ExitReason.SECCOMP, None, signal.SIGSYS),
    ],
)
def test_a_child_that_ends_in_a_call(
    target: str, argument: int, reason: ExitReason, code: int | None, number: int | None
) -> None:
    with ProcessIsolator.create(restart=RestartPolicy(mode="always")) as isolator:
        with pytest.raises(ChildTerminated) as caught:
            isolator.invoke_method(INSIDE, target, int(argument))
        info = caught.value.exit_info
        assert (info.reason, info.exit_code, info.signal) == (reason, code, number)
        assert isinstance(caught.value, SyscallViolation) is (reason is ExitReason.SECCOMP)
        assert isolator.wait_for_exit(1) == info
        assert isolator.run_source("1").value == 1


def test_on_failure_starts_nothing_after_a_clean_exit() -> None:
    """A clean exit between calls is no crash; in a call it is one, whatever the code says."""
    with ProcessIsolator.create() as isolator:
        with pytest.raises(ChildTerminated):
            isolator.invoke_method(INSIDE, "leave", 0)
        isolator.run_source("import os, threading; threading.Timer(0.1, os._exit, (0,)).start()")
        assert isolator.wait_for_exit(5).exit_code == 0
        with pytest.raises(IsolatorClosed, match="exited with code 0"):
            isolator.run_source("1")


def test_never_starts_nothing() -> None:
    with ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.invoke_method(INSIDE, "leave", 3)
        with pytest.raises(IsolatorClosed, match="exited with code 3"):
            isolator.run_source("1")


def test_one_crash_too_many() -> None:
    with nothing_left():
        policy = RestartPolicy(max_restarts=2, backoff=0.01)
        with ProcessIsolator.create(restart=policy) as isolator:
            for _ in range(3):
                with pytest.raises(ChildTerminated):
                    isolator.invoke_method(INSIDE, "leave", 3)
            with pytest.raises(
                RestartLimitReached, match="3 crashes within 60 s; the last: exited with code 3"
            ) as caught:
                isolator.run_source("1")
            assert isolator.state == "failed"
            assert "restart() starts another child all the same" in str(caught.value)
            isolator.restart()
            assert isolator.run_source("1").value == 1


def test_an_idempotent_call_is_repeated(tmp_path: Path) -> None:
    marker = tmp_path / "shared"
    marker.mkdir(mode=0o777)
    marker.chmod(0o777)
    shown = pisupervisor.Filesystem(writable=[(str(marker), "/shared")])
    with ProcessIsolator.create(IsolationOptions(filesystem=shown)) as isolator:
        source = """
            import os
            def once_then_value():
                try:
                    os.mkdir("/shared/been-here")
                except FileExistsError:
                    return "second time"
                os._exit(3)
        """
        path = write(tmp_path, "once.py", source)
        assert isolator.invoke_method(path, "once_then_value", idempotent=True) == "second time"


def test_terminate_and_waiting_for_it() -> None:
    with ProcessIsolator.create() as isolator:
        with pytest.raises(TimeoutError):
            isolator.wait_for_exit(0.05)
        isolator.terminate()
        info = isolator.wait_for_exit(1)
        assert (info.reason, info.signal) == (ExitReason.KILLED, signal.SIGTERM)
        assert isolator.run_source("1").value == 1


@pytest.mark.unhurried
def test_killed_from_outside_is_seen_at_the_next_call() -> None:
    with ProcessIsolator.create() as isolator:
        pid = isolator.pid or 0
        os.kill(pid, signal.SIGKILL)
        assert isolator.wait_for_exit(5).signal == signal.SIGKILL
        assert isolator.run_source("1").value == 1
        assert isolator.pid != pid


def test_the_first_cause_wins() -> None:
    """Closing a child that has died of something else does not change what it died of."""
    isolator = ProcessIsolator.create()
    os.kill(isolator.pid or 0, signal.SIGSEGV)
    assert wait_until(lambda: (child := isolator._keeper.child) is None or child.ended)  # None: the watch was first
    isolator.terminate()
    assert isolator.wait_for_exit(1).reason is ExitReason.SIGNALED
    isolator.close()


def test_after_close() -> None:
    isolator = ProcessIsolator.create()
    isolator.set_data("name", [1])
    isolator.close()
    for use in (lambda: isolator.run_source("1"), lambda: isolator.submit(len, []), isolator.pids, isolator.terminate):
        with pytest.raises(IsolatorClosed):
            use()
    assert isolator.get_data("name") == [1]
    assert isolator.wait_for_exit(0).reason is ExitReason.KILLED


def test_calls_from_many_threads_take_turns(shared: ProcessIsolator) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: shared.invoke(own_function, n), range(200)))
    assert found == [n * 10 + 1 for n in range(200)]


def test_a_fork_of_user_code_does_not_answer_twice(shared: ProcessIsolator) -> None:
    assert shared.run_source("import os\nos.fork() >= 0").value is True
    assert shared.run_source("2").value == 2
    assert subprocess.run(["true"], check=True).returncode == 0


def test_snippets_and_scripts_are_repeated_where_they_may_be(tmp_path: Path) -> None:
    source = "import os, pihost\nif pihost.call_host('first'): os._exit(3)\n"
    script = write(tmp_path, "tool.py", source + "print('done')\n")
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        answers = [True, False, True, False, True, True]
        isolator.register_callback("first", lambda: answers.pop(0))
        assert isolator.run_source(source + "'done'", idempotent=True).value == "done"
        info = isolator.run_script(script, idempotent=True)
        assert (info.exit_code, info.stdout) == (0, "done\n")
        for call in (lambda: isolator.run_source(source), lambda: isolator.run_script(script)):
            with pytest.raises(ChildTerminated):
                call()
    assert answers == []
