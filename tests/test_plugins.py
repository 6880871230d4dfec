"""Plugins on every kind of host: one contract, and what each host adds."""

from __future__ import annotations

import abc
import asyncio
import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, write
from rootfs import shared

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    IsolationContext,
    IsolationOptions,
    IsolatorClosed,
    NullHost,
    OptionsError,
    Plugin,
    PluginResult,
    ProcessHost,
    ProtocolError,
    RemoteError,
    RestartPolicy,
    RootfsHost,
    ScannedHost,
    SerializationError,
)
from pisupervisor.scan import imports

pytestmark = linux

OPTIONS = IsolationOptions(restart=RestartPolicy(backoff=0.0))
HOSTS: dict[str, Callable[[], Any]] = {
    "null": NullHost,
    "process": lambda: ProcessHost(OPTIONS),
    "rootfs": lambda: RootfsHost(shared(), OPTIONS),
    "scanned null": lambda: ScannedHost(NullHost(), deny=["ctypes"]),
    "scanned process": lambda: ScannedHost(ProcessHost(OPTIONS), deny=["ctypes"]),
}


class Adder(Plugin):
    def __init__(self, n: int = 1) -> None:
        self.n = n

    def execute(self, context: IsolationContext) -> Any:
        return self.n + sum(context.arguments)


class Changer(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["old"] += 1
        context.properties["new"] = {"added": [1, 2]}
        del context.properties["gone"]
        context.arguments.append("appended")
        return None


class Talker:
    """No subclass of Plugin: it has execute, and that is enough."""

    def execute(self, context: IsolationContext) -> str:
        print("to stdout\n\nafter a blank line")
        print("to stderr", file=sys.stderr)
        return "said"


class Failing(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["touched"] = True
        raise KeyError("what it was looking for")


class Falsy(Plugin):
    def __init__(self, value: Any) -> None:
        self.value = value

    def execute(self, context: IsolationContext) -> Any:
        return self.value


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> Iterator[Any]:
    with HOSTS[request.param]() as host:
        yield host


# --- the contract --------------------------------------------------------------------------------------------------


def test_an_instance_with_its_state(host: Any) -> None:
    """parity: 59, 60, 62"""
    result = host.execute_plugin(Adder(5), IsolationContext(arguments=[1, 2]))
    assert isinstance(result, PluginResult)
    assert (result.result, result.stdout, result.stderr) == (8, "", "")


def test_a_class_is_made_an_instance_of(host: Any) -> None:
    assert host.execute_plugin(Adder).result == 1


def test_changes_of_the_context_are_seen_by_the_caller(host: Any) -> None:
    """parity: 58"""
    properties, arguments = {"old": 1, "gone": None}, [0]
    context = IsolationContext(properties, arguments)
    result = host.execute_plugin(Changer(), context)
    assert result.context is context
    assert (context.properties, context.arguments) == ({"old": 2, "new": {"added": [1, 2]}}, [0, "appended"])
    assert properties is context.properties
    assert arguments is context.arguments
    assert result.result is None


def test_the_streams_are_kept_apart_and_whole(host: Any) -> None:
    """parity: 37"""
    result = host.execute_plugin(Talker())
    assert (result.stdout, result.stderr, result.result) == ("to stdout\n\nafter a blank line\n", "to stderr\n", "said")
    assert host.execute_plugin(Adder()).stdout == ""


def test_what_a_plugin_raises(host: Any) -> None:
    with pytest.raises(RemoteError, match="what it was looking for") as caught:
        host.execute_plugin(Failing())
    assert isinstance(caught.value, KeyError)
    assert "execute" in caught.value.remote_traceback
    assert host.execute_plugin(Adder()).result == 1


@pytest.mark.parametrize("value", [0, False, "", None, [], {}, 0.0, b""])
def test_falsy_results_arrive(host: Any, value: Any) -> None:
    """parity: 84"""
    result = host.execute_plugin(Falsy(value)).result
    assert (type(result), result) == (type(value), value)


@dataclass
class Point:
    x: int


def test_a_result_is_what_data_makes_of_it(host: Any) -> None:
    """Also in this process: a plugin that is tried there meets no surprise in a child."""
    value = {"at": Point(1), "pair": (1, b"x" * 1000), "set": {1, 2}}
    assert host.execute_plugin(Falsy(value)).result == {"at": {"x": 1}, "pair": (1, b"x" * 1000), "set": {1, 2}}


class Unanswerable(Plugin):
    """Puts what is no data where it is told to."""

    def __init__(self, place: str) -> None:
        self.place = place

    def execute(self, context: IsolationContext) -> Any:
        print("said before")
        if self.place == "result":
            return [1, object()]
        if self.place == "properties":
            context.properties["new"] = object()
        else:
            context.arguments.append(lambda: 1)
        return None


@pytest.mark.parametrize("place", ["result", "properties", "arguments"])
def test_what_is_no_data_does_not_come_back(host: Any, place: str) -> None:
    context = IsolationContext({"old": 1}, [1])
    with pytest.raises(SerializationError, match=f"'{place}'.*not data") as caught:
        host.execute_plugin(Unanswerable(place), context)
    assert (caught.value.direction, caught.value.stdout) == ("from child", "said before\n")
    assert context == IsolationContext({"old": 1}, [1])


class NoPlugin:
    def run(self) -> None: ...


class Unfinished(Plugin):
    pass


class Abstract(Plugin, abc.ABC):
    def execute(self, context: IsolationContext) -> Any:
        return self.missing()

    @abc.abstractmethod
    def missing(self) -> Any: ...


class WithData:
    execute = 3


@pytest.mark.parametrize(
    "wrong", [NoPlugin(), NoPlugin, Unfinished(), Abstract, WithData(), None, 3, "text", lambda: 1]
)
def test_what_is_no_plugin(host: Any, wrong: Any) -> None:
    """parity: 73"""
    with pytest.raises(OptionsError, match="is no plugin"):
        host.execute_plugin(wrong)


def test_what_is_no_context(host: Any) -> None:
    with pytest.raises(OptionsError, match="IsolationContext"):
        host.execute_plugin(Adder(), {"properties": {}})


@pytest.mark.parametrize(
    ("properties", "arguments", "name"),
    [(5, [], "properties"), (None, [], "properties"), ([("a", 1)], [], "properties"), ({}, (1,), "arguments"),
     ({}, "abc", "arguments"), ({}, None, "arguments")],
)  # fmt: skip
def test_what_a_context_must_not_hold(host: Any, properties: Any, arguments: Any, name: str) -> None:
    """The caller's mistake, told before the plugin runs."""
    with pytest.raises(OptionsError, match=f"context.{name}: expected a"):
        host.execute_plugin(Adder(), IsolationContext(properties, arguments))


@pytest.mark.parametrize("kind", HOSTS)
def test_a_closed_host_refuses(kind: str) -> None:
    host = HOSTS[kind]()
    host.close()
    host.close()
    with pytest.raises(IsolatorClosed):
        host.execute_plugin(Adder())


# --- in a child ----------------------------------------------------------------------------------------------------


class Spawner(Plugin):
    def execute(self, context: IsolationContext) -> int:
        import os

        os.write(1, b"by descriptor\n")
        subprocess.run(["echo", "by a subprocess"], check=True)
        return os.getpid()


class Sleeper(Plugin):
    def execute(self, context: IsolationContext) -> None:
        time.sleep(1000)


class Dier(Plugin):
    def execute(self, context: IsolationContext) -> None:
        import os

        os._exit(3)


def test_a_child_captures_what_c_code_and_subprocesses_write() -> None:
    """parity: 37"""
    with ProcessHost() as host:
        result = host.execute_plugin(Spawner())
        assert (result.stdout, result.result) == ("by descriptor\nby a subprocess\n", 2)


def test_a_child_can_be_killed_and_die() -> None:
    alone = replace(OPTIONS, log_level="ERROR")  # shares its zygote with no other test's host
    with nothing_left(), ProcessHost(alone) as host:
        with pytest.raises(CallTimeout):
            host.execute_plugin(Sleeper(), timeout=0.2)
        with pytest.raises(ChildTerminated):
            host.execute_plugin(Dier())
        with pytest.raises(SerializationError, match="object"):
            host.execute_plugin(Unanswerable("properties"))
        assert host.execute_plugin(Adder(2)).result == 2


class Importer(Plugin):
    """Loads a module that keeps count of how often it was loaded."""

    def execute(self, context: IsolationContext) -> Any:
        import colorsys
        import sys

        colorsys.loaded = getattr(colorsys, "loaded", 0) + 1  # type: ignore[attr-defined]
        return [colorsys.loaded, "colorsys" in sys.modules]  # type: ignore[attr-defined]


def test_a_fresh_host_is_a_fresh_context_of_modules() -> None:
    """parity: 61. What a plugin loads is there for the next one in the same host, and nowhere else; unloaded with its child."""
    import sys

    sys.modules.pop("colorsys", None)
    with ProcessHost() as host:
        assert [host.execute_plugin(Importer()).result for _ in range(2)] == [[1, True], [2, True]]
    with ProcessHost() as another:
        assert another.execute_plugin(Importer()).result == [1, True]
    assert "colorsys" not in sys.modules


def test_nothing_can_be_killed_in_this_process() -> None:
    with NullHost() as host, pytest.raises(OptionsError, match="timeout"):
        host.execute_plugin(Adder(), timeout=1.0)


# --- scanned -------------------------------------------------------------------------------------------------------

MODULES = {
    "direct": "import ctypes, json",
    "member": "from os import path, system",
    "hidden": "def f():\n    import importlib\n    return importlib.import_module('ctypes.util')",
    "called": "x = __import__('ctypes')",
    "helper": "import socket",
    "through": "import scanned_helper\nfrom scanned_helper import socket",
    "clean": "import json\nfrom collections import abc",
}


@pytest.fixture
def scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in MODULES.items():
        write(tmp_path, f"scanned_{name}.py", text + "\nclass P:\n    def execute(self, context):\n        return 42\n")
    yield lambda name: importlib.import_module(f"scanned_{name}").P()
    for name in MODULES:
        sys.modules.pop(f"scanned_{name}", None)


@pytest.mark.parametrize(
    ("name", "deny", "where"),
    [
        ("direct", ["ctypes"], "scanned_direct.py:1"),
        ("member", ["os.system"], "scanned_member.py:1"),
        ("hidden", ["ctypes"], "scanned_hidden.py:3"),
        ("called", ["ctypes"], "scanned_called.py:1"),
        ("through", ["socket"], "scanned_helper.py:1"),
    ],
)
def test_a_denied_import(scanned: Callable[[str], Any], name: str, deny: list[str], where: str) -> None:
    """parity: 65. Refused before anything runs, and told where."""
    with ScannedHost(_Refusing(), deny=deny) as host, pytest.raises(OptionsError, match=rf"{where}: .* denied"):
        host.execute_plugin(scanned(name))


def test_all_must_be_allowed(scanned: Callable[[str], Any]) -> None:
    """parity: 65. One harmless import does not pass for the others."""
    with ScannedHost(NullHost(), allow=["json", "collections"]) as host:
        assert host.execute_plugin(scanned("clean")).result == 42
        with pytest.raises(OptionsError, match="ctypes"):
            host.execute_plugin(scanned("direct"))


def test_allowed_is_not_enough_where_it_is_denied(scanned: Callable[[str], Any]) -> None:
    host = ScannedHost(NullHost(), allow=["json", "collections"], deny=["collections.abc"])
    with host, pytest.raises(OptionsError, match=r"collections\.abc"):
        host.execute_plugin(scanned("clean"))


def test_a_plugin_without_a_source() -> None:
    space: dict[str, Any] = {"__name__": "made_of_nothing"}
    exec("class P:\n    def execute(self, context): return 1", space)
    with ScannedHost(NullHost(), deny=["ctypes"]) as host, pytest.raises(OptionsError, match="no source"):
        host.execute_plugin(space["P"]())


def test_closing_closes_the_inner_host() -> None:
    inner = NullHost()
    ScannedHost(inner).close()
    with pytest.raises(IsolatorClosed):
        inner.execute_plugin(Adder())


@pytest.mark.parametrize("wrong", ["ctypes", ["no module"], [3], ["a..b"], 5, None])
def test_lists_of_names_are_checked(wrong: Any) -> None:
    with pytest.raises(OptionsError):
        ScannedHost(NullHost(), deny=wrong)


def test_what_is_installed_is_judged_by_its_name_alone() -> None:
    """psutil imports ctypes for itself, and this module's helpers import psutil."""
    import psutil

    assert psutil
    with ScannedHost(NullHost(), deny=["ctypes"]) as host:
        assert host.execute_plugin(Adder()).result == 1
    with ScannedHost(NullHost(), deny=["pytest"]) as host, pytest.raises(OptionsError, match="pytest"):
        host.execute_plugin(Adder())


def test_relative_imports_have_full_names() -> None:
    found = imports("from . import a\nfrom ..b import c\nfrom .d import *", "x.py", "top.middle.own")
    assert [each.module for each in found] == ["top.middle.a", "top.b.c", "top.middle.d"]


@pytest.mark.parametrize(
    "text", ["import json.decoder", "from json import decoder", "from json.decoder import JSONDecoder"]
)
def test_a_submodule_that_is_allowed_may_be_imported_in_every_way(text: str) -> None:
    found = [each.module for each in imports(text, "x.py", "x")]
    host = ScannedHost(NullHost(), allow=["json.decoder"])
    for module in found:
        host._judge(module, "x.py:1")
    with pytest.raises(OptionsError, match="denied"):
        ScannedHost(NullHost(), deny=["json"])._judge(found[0], "x.py:1")


class _Refusing(NullHost):
    def execute_plugin(self, *_arguments: object, **_keywords: object) -> PluginResult:  # type: ignore[override]
        raise AssertionError("it was run")


def test_relative_imports_of_a_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "from .hidden import helper\nclass P:\n    def execute(self, context):\n        return 1\n"
    write(tmp_path, "scanned_package/__init__.py", source)
    write(tmp_path, "scanned_package/hidden.py", "import subprocess\nhelper = 1\n")
    plugin = importlib.import_module("scanned_package").P()
    for deny in (["scanned_package.hidden"], ["subprocess"]):
        with ScannedHost(_Refusing(), deny=deny) as host, pytest.raises(OptionsError, match="denied"):
            host.execute_plugin(plugin)


@pytest.mark.parametrize("name", [None, 5, "never_imported.at_all"])
def test_scanning_runs_nothing(name: Any) -> None:
    kind = type("P", (), {"execute": lambda self, context: 1, "__module__": name})
    with ScannedHost(NullHost(), deny=["ctypes"]) as host, pytest.raises(OptionsError, match="no source"):
        host.execute_plugin(kind())


class Misplacer(Plugin):
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def execute(self, context: IsolationContext) -> Any:
        setattr(context, self.name, self.value)


@pytest.mark.parametrize(("name", "value"), [("properties", 5), ("properties", None), ("arguments", (1,))], ids=repr)
def test_a_context_that_is_none_any_more(host: Any, name: str, value: Any) -> None:
    """The plugin's mistake, and no breach of the protocol."""
    context = IsolationContext({"a": 1}, [1])
    with pytest.raises(TypeError, match=f"the place of its context's {name}") as caught:
        host.execute_plugin(Misplacer(name, value), context)
    assert isinstance(caught.value, RemoteError)
    assert context == IsolationContext({"a": 1}, [1])
    assert host.execute_plugin(Adder()).result == 1


class Breaking(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["b"] = 2
        context.arguments.clear()
        raise KeyError("in the middle")


class DeepBreaking(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["a"].append(2)
        raise KeyError("in the middle")


def test_nor_does_it_change_what_lies_deeper(host: Any) -> None:
    context = IsolationContext({"a": [1]})
    with pytest.raises(KeyError):
        host.execute_plugin(DeepBreaking(), context)
    assert context == IsolationContext({"a": [1]})
    with pytest.raises(SerializationError):
        host.execute_plugin(Adder(), IsolationContext({"a": threading.Lock()}))


def test_a_failed_plugin_leaves_the_callers_context_alone(host: Any) -> None:
    context = IsolationContext({"a": 1}, [1])
    with pytest.raises(KeyError):
        host.execute_plugin(Breaking(), context)
    assert context == IsolationContext({"a": 1}, [1])


def test_another_dict_in_the_place_of_the_contexts(host: Any) -> None:
    context = IsolationContext({"a": 1}, [1])
    host.execute_plugin(Misplacer("properties", {"b": 2}), context)
    assert context == IsolationContext({"b": 2}, [1])


class Leaver(Plugin):
    def execute(self, _context: IsolationContext) -> Any:
        print("going")
        sys.exit(3)


def test_a_plugin_that_leaves(host: Any) -> None:
    with pytest.raises(RemoteError, match="SystemExit: 3") as caught:
        host.execute_plugin(Leaver())
    assert caught.value.stdout == "going\n"
    frames = [line for line in caught.value.remote_traceback.splitlines() if line.startswith("  File")]
    assert len(frames) == 1, "the plugin's own"
    assert __file__ in frames[0]


class Napper(Plugin):
    async def execute(self, context: IsolationContext) -> Any:
        await asyncio.sleep(0.01)
        context.properties["slept"] = True
        return 7


def test_a_plugin_that_is_a_coroutine(host: Any) -> None:
    context = IsolationContext()
    assert host.execute_plugin(Napper(), context).result == 7
    assert context.properties == {"slept": True}


def test_a_child_that_lies_about_the_outcome() -> None:
    class Liar(Plugin):
        def execute(self, context: IsolationContext) -> Any:
            from pihost.inside import plugins

            plugins._outcome = lambda *_any: 5  # type: ignore[assignment,misc]

    with ProcessHost(OPTIONS) as host:
        with pytest.raises(ProtocolError):
            host.execute_plugin(Liar(), IsolationContext({"a": 1}))
        assert host.execute_plugin(Adder()).result == 1


@pytest.mark.parametrize("wrong", [5, None, Adder(), b"/srv"])
def test_what_is_no_host_and_no_root(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="inner: expected a host"):
        ScannedHost(wrong)
    with pytest.raises(OptionsError, match="rootfs: expected the path"):
        RootfsHost(wrong)
