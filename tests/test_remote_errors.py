"""Exceptions of user code: described in the child as text, raised on the host from a fixed table."""

from __future__ import annotations

import asyncio
import copy
import json
import linecache
import pickle
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

import pisupervisor
from pihost.inside.raised import describe_exception
from pisupervisor import (
    CallCancelled,
    CallTimeout,
    ChildTerminated,
    CompileError,
    ExitInfo,
    ExitReason,
    FeatureUnavailable,
    IsolationError,
    IsolatorClosed,
    LaunchError,
    MemoryLimitExceeded,
    OptionsError,
    ProfileError,
    ProtocolError,
    RemoteError,
    SerializationError,
    SyscallViolation,
    TargetNotFound,
    errors,
)
from pisupervisor.link import remote_errors
from pisupervisor.link.remote_errors import remote_error

NOTHING_HIDDEN = ("/no/such/prefix",)


def raised(source: str, name: str = "/plugins/user_tool.py") -> BaseException:
    """The exception that ``source`` ends with, with its lines known as those of a file."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    try:
        exec(compile(source, name, "exec"), {"__name__": "user_tool"})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def described(exc: BaseException, hide: tuple[str, ...] = NOTHING_HIDDEN) -> dict[str, Any]:
    payload = describe_exception(exc, hide)
    again: dict[str, Any] = json.loads(json.dumps(payload, ensure_ascii=False).encode())
    assert again == payload
    assert len(payload["message"].encode()) <= 8 << 10
    assert len(payload["traceback"].encode()) <= 64 << 10
    return payload


def crossed(exc: BaseException) -> RemoteError:
    return remote_error(described(exc))


def test_type_message_and_the_users_file_and_line_arrive() -> None:
    """parity: 51"""
    error = crossed(
        raised("class PluginError(Exception): pass\ndef inner():\n    raise PluginError('boom')\ninner()\n")
    )
    with pytest.raises(RemoteError) as caught:
        raise error
    assert (caught.value.type_name, caught.value.message) == ("user_tool.PluginError", "boom")
    assert 'File "/plugins/user_tool.py", line 3, in inner\n    raise PluginError(' in caught.value.remote_traceback
    assert str(caught.value).startswith("user_tool.PluginError: boom\n\nTraceback (most recent call last):")


@pytest.mark.parametrize("builtin", remote_errors._BUILTINS, ids=lambda builtin: builtin.__name__)
def test_listed_builtins_are_also_themselves(builtin: type[Exception]) -> None:
    """parity: 51"""
    arguments = {"UnicodeDecodeError": ("utf-8", b"x", 0, 1, "why"), "UnicodeEncodeError": ("utf-8", "x", 0, 1, "why")}
    original = builtin(*arguments.get(builtin.__name__, ("first char intact",)))
    error = crossed(original)
    assert isinstance(error, builtin)
    assert isinstance(error, RemoteError)
    assert (error.type_name, error.message.split("\n")[0]) == (builtin.__name__, str(original))
    assert error.args == (error.type_name, error.message, error.remote_traceback)
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert (again.args, str(again), repr(again), vars(again)) == (error.args, str(error), repr(error), vars(error))
    assert builtin.__name__ in "".join(traceback.format_exception(error))


def test_except_clauses_work_for_both() -> None:
    error = crossed(raised("1 / 0"))
    for clause in (ZeroDivisionError, ArithmeticError, RemoteError, Exception):
        with pytest.raises(clause):
            raise error


NOT_LISTED = (
    "SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration", "ExceptionGroup",
    "SyntaxError", "UserWarning", "eval", "object", "type",
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_LISTED)
def test_what_is_not_listed_stays_a_remote_error(name: str) -> None:
    error = remote_error({"module": "builtins", "type": name, "message": "x", "traceback": "", "causes": []})
    assert type(error) is RemoteError
    assert error.type_name == name
    assert type(pickle.loads(pickle.dumps(error))) is RemoteError


def test_a_class_of_the_same_name_is_not_the_builtin() -> None:
    error = crossed(raised("class ValueError(Exception): pass\nraise ValueError('mine')"))
    assert type(error) is RemoteError
    assert error.type_name == "user_tool.ValueError"
    assert type(crossed(raised("class Mine(ValueError): pass\nraise Mine('x')"))) is RemoteError


def test_errors_pass_through_futures() -> None:
    async def fail() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(crossed(raised("next(iter([]))")))
        await future

    with pytest.raises(RemoteError, match="StopIteration"):
        asyncio.run(fail())
    done: Future[None] = Future()
    done.set_exception(crossed(raised("{}[1]")))
    with pytest.raises(KeyError):
        done.result()


INFO = ExitInfo(exit_code=None, signal=9, reason=ExitReason.MEMORY)


@pytest.mark.parametrize(
    "error",
    [
        OptionsError("m"), ProfileError("m", file="f", line=3), FeatureUnavailable("m", feature="time", remedy="r"),
        LaunchError("m", step="mount", errno=3, remedy="r"), ChildTerminated("m", INFO), MemoryLimitExceeded("m", INFO),
        SyscallViolation("m", INFO, "ptrace"), CompileError("m", file="f", line=1), TargetNotFound("m"),
        CallTimeout("m"), CallCancelled("m"), SerializationError("m", direction="to child"), IsolatorClosed("m"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_every_error_survives_a_pickle_and_a_copy(error: IsolationError) -> None:
    """One that does not breaks the pool of processes whose worker raises it."""
    error.stdout = "what it wrote"
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (type(again), str(again), again.args, vars(again)) == (type(error), str(error), error.args, vars(error))


def test_all_errors_are_found_in_one_place() -> None:
    for name in ("CallCancelled", "CallTimeout", "IsolationError"):
        assert getattr(errors, name) is getattr(pisupervisor, name)
    with pytest.raises(AttributeError, match="Nonsense"):
        errors.Nonsense  # noqa: B018


def test_errno_arrives() -> None:
    error = crossed(raised("open('/no/such/file')"))
    assert isinstance(error, FileNotFoundError)
    assert error.errno == 2
    assert "No such file" in error.message
    again = pickle.loads(pickle.dumps(error))
    assert again.errno == 2
    assert crossed(OSError("no number")).errno is None  # type: ignore[attr-defined]


def test_a_missing_module_gets_a_hint() -> None:
    error = crossed(raised("import no_such_module_xyz"))
    assert isinstance(error, ModuleNotFoundError)
    assert error.message.startswith("No module named 'no_such_module_xyz'\n")
    assert "import_paths=[...]" in error.message


def test_causes_arrive_as_a_chain() -> None:
    inner = "try:\n  try:\n    1/0\n  except Exception as e:\n    raise ValueError('b') from e\n"
    source = inner + "except Exception as e:\n  raise OSError('c') from e"
    error = crossed(raised(source))
    first, second = error.__cause__, error.__cause__.__cause__  # type: ignore[union-attr]
    assert [(type(e), e.type_name, e.message) for e in (first, second)] == [  # type: ignore[union-attr]
        (RemoteError, "ValueError", "b"), (RemoteError, "ZeroDivisionError", "division by zero"),
    ]  # fmt: skip
    assert second.__cause__ is None  # type: ignore[union-attr]
    assert error.remote_traceback.count("direct cause") == 2
    assert error.remote_traceback.index("ZeroDivisionError") < error.remote_traceback.index("ValueError: b")


def test_contexts_notes_and_groups_are_rendered() -> None:
    text = crossed(raised("try:\n  1/0\nexcept Exception:\n  raise KeyError('k')")).remote_traceback
    assert "During handling of the above exception" in text
    text = crossed(raised("e = ValueError('x')\ne.add_note('look here')\nraise e")).remote_traceback
    assert "ValueError: x\nlook here\n" in text
    text = crossed(raised("raise ExceptionGroup('many', [ValueError('one'), TypeError('two')])")).remote_traceback
    assert "ValueError: one" in text
    assert "TypeError: two" in text


def test_our_own_frames_are_hidden() -> None:
    outer = raised("def call(fn):\n    fn()\ncall(lambda: 1/0)", "/pis/pihost/inside/serve.py")
    assert "serve.py" in described(outer)["traceback"]
    hidden = described(outer, ("/pis/pihost", "<frozen importlib", __file__))["traceback"]
    assert "File" not in hidden
    assert hidden.endswith("ZeroDivisionError: division by zero\n")


def test_syntax_errors_say_file_and_line() -> None:
    payload = described(raised("compile('x = 1\\nif:\\n', '/plugins/broken.py', 'exec')"))
    assert (payload["type"], payload["file"], payload["line"]) == ("SyntaxError", "/plugins/broken.py", 2)
    assert type(remote_error(payload)) is RemoteError
    odd = SyntaxError("x")
    odd.filename, odd.lineno = 5, "no"  # type: ignore[assignment]
    assert (described(odd)["file"], described(odd)["line"]) == (None, None)


# Exceptions that fight back


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Huge(Exception):
    def __str__(self) -> str:
        return "ä" * (64 << 20)


class LyingText(str):
    def __str__(self) -> str:
        raise ValueError("no")

    encode = __getitem__ = __len__ = __str__  # type: ignore[assignment]


class Dressed(Exception):
    def __str__(self) -> str:
        return LyingText("the text itself")


class Unreachable(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class LyingMeta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError

    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Masked(Exception, metaclass=LyingMeta):
    pass


class Nameless(Exception):
    __module__ = 5  # type: ignore[assignment]


class EvilOSError(OSError):
    errno = property(lambda self: 1 / 0)  # type: ignore[assignment]


EVIL: dict[str, tuple[Callable[[], Exception], str]] = {
    "Unprintable": (Unprintable, "[str() of it raised SystemExit]"),
    "NotText": (NotText, "[str() of it raised TypeError]"),
    "Dressed": (Dressed, "the text itself"),
    "Unreachable": (Unreachable, ""),
    "Masked": (lambda: Masked("x"), "x"),
    "ValueError": (lambda: ValueError("\ud800 \x1b"), "\\ud800 \x1b"),
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_exceptions_are_described(name: str) -> None:
    make, message = EVIL[name]
    try:
        raise make()
    except Exception as exc:
        payload = described(exc)
    assert (payload["type"], payload["message"]) == (name, message)
    assert 'test_remote_errors.py", line' in payload["traceback"]
    assert remote_error(payload).type_name.endswith(name)


def test_huge_messages_are_cut() -> None:
    payload = described(Huge())
    assert payload["message"].startswith("ä" * 1000)
    assert payload["message"].endswith(" [cut]")
    assert len(payload["traceback"].encode()) < 9 << 10


def test_odd_modules_and_numbers() -> None:
    assert described(Nameless())["module"] == "?"
    assert described(EvilOSError(2, "x"))["errno"] == 2
    odd = OSError()
    odd.errno = 10**30
    assert described(odd)["errno"] is None


def test_cycles_and_long_chains_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert [cause["message"] for cause in described(one)["causes"]] == ["two"]
    last: BaseException = ValueError("first")
    for number in range(100_000):
        following = ValueError(str(number))
        following.__cause__ = following.__context__ = last
        last = following
    started = time.monotonic()
    payload = described(last)
    assert time.monotonic() - started < 1
    assert len(payload["causes"]) == 8
    while last.__cause__ is not None:  # one by one: the interpreter's own clean-up would recurse
        last.__cause__, last = None, last.__cause__


def test_deep_recursion_keeps_the_innermost_frames() -> None:
    payload = described(raised("def f(n):\n    return f(n + 1)\nf(0)"))
    assert payload["type"] == "RecursionError"
    assert "more times]" in payload["traceback"]
    frames = "".join(f"def f{n}(): f{n + 1}()\n" for n in range(400)) + "def f400(): 1/0\nf0()"
    text = described(raised(frames))["traceback"]
    assert "in f400" in text
    assert "in f150\n" not in text


# Payloads that fight back

GOOD = {"module": "builtins", "type": "ValueError", "message": "m", "traceback": "t", "errno": None, "causes": []}
BAD: list[Any] = [
    None, [], "x", {}, {**GOOD, "message": 5}, {**GOOD, "message": None}, {**GOOD, "message": "x" * (17 << 10)},
    {**GOOD, "traceback": "x" * (97 << 10)}, {**GOOD, "traceback": []}, {**GOOD, "type": ["ValueError"]},
    {**GOOD, "type": "x" * 2000}, {**GOOD, "module": None}, {**GOOD, "errno": "2"}, {**GOOD, "errno": True},
    {**GOOD, "errno": 2**31}, {**GOOD, "causes": None}, {**GOOD, "causes": [GOOD] * 9}, {**GOOD, "causes": ["x"]},
    {**GOOD, "causes": [{"module": "a"}]}, {key: value for key, value in GOOD.items() if key != "type"},
    {key: value for key, value in GOOD.items() if key != "traceback"},
]  # fmt: skip


@pytest.mark.parametrize("payload", BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_wrong_payloads_are_protocol_errors(payload: object) -> None:
    with pytest.raises(ProtocolError):
        remote_error(payload)


def test_a_childs_text_cannot_steer_a_terminal() -> None:
    error = remote_error({**GOOD, "message": "a\x1b[2Jb\r\nc\td\x9b", "traceback": "\x1b]0;owned\x07"})
    assert error.message == "a\\x1b[2Jb\\x0d\nc\td\\x9b"
    assert error.remote_traceback == "\\x1b]0;owned\\x07"
    assert remote_error({**GOOD, "message": "a\u202eb\u200f\u061c\u2028c"}).message == "a\\u202eb\\u200f\\u061c\\u2028c"
    named = remote_error({**GOOD, "module": "__main__", "type": "E\nERROR: all is lost"})
    assert named.type_name == "E\\nERROR: all is lost", "a name is one line of whatever log it is written to"


def test_names_are_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 52"""
    for name in ("os.system", "_again", "__class__", "RemoteError", "_CLASSES", "RemoteValueError", "pickle"):
        for module in ("builtins", "pisupervisor.link.remote_errors", "os"):
            assert type(remote_error({**GOOD, "module": module, "type": name})) is RemoteError
