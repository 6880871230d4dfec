"""DotNetIsolator's own tests, each by its name there with its counterpart here, and the three that its comments miss."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, write

from pisupervisor import ObjectReleased, ProcessIsolator, RemoteError, TargetNotFound

pytestmark = linux

PLUGIN = """
    import pihost

    class Person:
        def __init__(self, name="nobody", age=0):
            self.name, self.age, self._secret = name, age, "private field"

        def greet(self):
            return f"Hello from {self.name}, {self.age}"

        class Nested:
            def who(self):
                return "Person.Nested"

    class Other:
        class Nested:
            def who(self):
                return "Other.Nested"

    class Base:
        def name(self):
            return "base"

        def describe(self):
            return f"I am {self.name()}"

    class Derived(Base):
        def name(self):
            return "derived"

    class Needy:
        def __init__(self, needed):
            self.needed = needed

    class Methods:
        def _private(self):
            return "private"

        def identity(self, value):
            return value

        def three(self, number, text, flag):
            return f"{number} {text} {flag}"

        def person(self, person):
            return {"name": person["name"], "age": person["age"] + 1}

        def complex_return(self):
            return vars(Person("Bert", 123))

        def fail(self):
            raise ValueError("guest says no")

    called = []

    def call_void():
        called.append(pihost.call_host("void"))
        return called

    def call_with(*arguments):
        return pihost.call_host("with", *arguments)

    def call_raw(data):
        return pihost.call_host_raw("raw", data)

    def call_and_catch(name):
        try:
            return pihost.call_host(name)
        except Exception as error:
            return [type(error).__name__, str(error)]
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dotnet"), "plugin.py", PLUGIN)


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create() as isolator:
        yield isolator


# --- HostCallback -----------------------------------------------------------------------------------------------------


def test_host_callback_parameterless_void(isolator: ProcessIsolator, plugin: Path) -> None:
    """HostCallback.ParameterlessVoid. parity: 48"""
    calls: list[int] = []
    isolator.register_callback("void", lambda: calls.append(1))
    assert isolator.invoke_method(plugin, "call_void") == [None]
    assert calls == [1]


def test_host_callback_supply_params(isolator: ProcessIsolator, plugin: Path) -> None:
    """HostCallback.SupplyParams: equal values, not the same instance. parity: 48"""
    got: list[Any] = []
    isolator.register_callback("with", lambda *arguments: got.extend(arguments))
    sent = {"name": "Bert", "scores": [1, 2]}
    isolator.invoke_method(plugin, "call_with", 123, "text", sent)
    assert got == [123, "text", sent]
    assert got[2] is not sent


def test_host_callback_get_result(isolator: ProcessIsolator, plugin: Path) -> None:
    """HostCallback.GetResult. parity: 48"""
    isolator.register_callback("with", lambda number: {"twice": 2 * number})
    assert isolator.invoke_method(plugin, "call_with", 21) == {"twice": 42}


def test_host_callback_raw_call(isolator: ProcessIsolator, plugin: Path) -> None:
    """HostCallback.RawCall: bytes in, bytes out. parity: 50"""
    isolator.register_callback("raw", lambda data: data[::-1])
    assert isolator.invoke_method(plugin, "call_raw", b"\0\1\2\xff") == b"\xff\2\1\0"


def test_host_callback_unknown_name(isolator: ProcessIsolator, plugin: Path) -> None:
    """HostCallback.UnknownName. parity: 48"""
    assert isolator.invoke_method(plugin, "call_and_catch", "nothing of that name")[0] == "UnknownCallback"


def test_host_callback_can_catch_exceptions(
    isolator: ProcessIsolator, plugin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """HostCallback.CanCatchExceptions: the guest learns that it failed, and nothing secret; the host's log has all. parity: 49"""

    def fail() -> None:
        raise RuntimeError("a secret of the host")

    isolator.register_callback("fail", fail)
    with caplog.at_level(logging.ERROR, "pisupervisor"):
        kind, text = isolator.invoke_method(plugin, "call_and_catch", "fail")
    assert (kind, "secret" in text) == ("HostError", False)
    assert "a secret of the host" in caplog.text


# --- Lambda -----------------------------------------------------------------------------------------------------------


def test_lambda_static_void(isolator: ProcessIsolator) -> None:
    """Lambda, static void. parity: 42"""
    assert isolator.invoke(lambda: None) is None


def test_lambda_static_int(isolator: ProcessIsolator) -> None:
    """Lambda, static int. parity: 42"""
    assert isolator.invoke(lambda: 123) == 123


def test_lambda_capturing(isolator: ProcessIsolator) -> None:
    """Lambda, capturing: what the guest does to it is not seen here. parity: 42"""
    number, seen = 40, [1]

    def add() -> int:
        seen.append(2)
        return number + len(seen)

    assert isolator.invoke(add) == 42
    assert seen == [1]


@dataclass
class Order:
    item: str
    count: int


def test_lambda_capturing_complex(isolator: ProcessIsolator) -> None:
    """Lambda, capturing complex. parity: 42"""
    order = Order("apple", 3)
    assert isolator.invoke(lambda: Order(order.item.upper(), order.count + 1), returns=Order) == Order("APPLE", 4)
    assert order == Order("apple", 3)


# --- Method -----------------------------------------------------------------------------------------------------------


def test_method_private(isolator: ProcessIsolator, plugin: Path) -> None:
    """Method, private. parity: 46"""
    assert isolator.invoke_method(plugin, "Methods._private") == "private"


@pytest.mark.parametrize(
    "value", [123, "text", True, {"name": "Bert", "ages": [1, None, 2.5]}], ids=["int", "string", "bool", "complex"]
)
def test_method_parameters(isolator: ProcessIsolator, plugin: Path, value: Any) -> None:
    """Method, int/string/bool/complex params: four of them. parity: 38"""
    assert isolator.invoke_method(plugin, "Methods.identity", value) == value


def test_method_three_params(isolator: ProcessIsolator, plugin: Path) -> None:
    """Method, 3 params. parity: 46"""
    assert isolator.invoke_method(plugin, "Methods.three", 1, "two", True) == "1 two True"


def test_method_complex_param_and_return(isolator: ProcessIsolator, plugin: Path) -> None:
    """Method, complex param to complex return. parity: 38"""
    assert isolator.invoke_method(plugin, "Methods.person", {"name": "Bert", "age": 1}) == {"name": "Bert", "age": 2}


def test_method_complex_return(isolator: ProcessIsolator, plugin: Path) -> None:
    """Method, complex return incl. private field. parity: 38"""
    assert isolator.invoke_method(plugin, "Methods.complex_return") == {
        "name": "Bert",
        "age": 123,
        "_secret": "private field",
    }


def test_method_guest_exception(isolator: ProcessIsolator, plugin: Path) -> None:
    """Method, guest exception text and stack. parity: 51"""
    with pytest.raises(ValueError, match="guest says no") as caught:
        isolator.invoke_method(plugin, "Methods.fail")
    assert isinstance(caught.value, RemoteError)
    assert f'File "{plugin}"' in caught.value.remote_traceback
    assert 'raise ValueError("guest says no")' in caught.value.remote_traceback


@pytest.mark.parametrize(
    ("module", "target", "said"),
    [
        ("no_such_module_of_ours", "f", "no module 'no_such_module_of_ours'"), (None, "NoClass.method", "NoClass"),
        (None, "Methods.no_method", "no_method"),
    ],
    ids=["assembly", "type", "method"],
)  # fmt: skip
def test_method_not_found(isolator: ProcessIsolator, plugin: Path, module: str | None, target: str, said: str) -> None:
    """Method, assembly/type/method not found messages: three of them. parity: 41"""
    with pytest.raises(TargetNotFound, match=said):
        isolator.invoke_method(module or plugin, target)


# --- Object -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "target", "said"),
    [
        ("no_such_module_of_ours", "Person", "no module"),
        ("json.no_namespace", "Person", "no module"),
        (None, "NoClass", "NoClass"),
    ],
    ids=["assembly", "namespace", "type"],
)
def test_object_not_found(isolator: ProcessIsolator, plugin: Path, module: str | None, target: str, said: str) -> None:
    """Object, assembly/namespace/type not found: three of them. parity: 41, 43"""
    with pytest.raises(TargetNotFound, match=said):
        isolator.create_object(module or plugin, target)


def test_object_parameterless_constructor(isolator: ProcessIsolator, plugin: Path) -> None:
    """Object, parameterless ctor; and with arguments, which was still to do there. parity: 43"""
    assert isolator.create_object(plugin, "Person").greet() == "Hello from nobody, 0"
    assert isolator.create_object(plugin, "Person", "Bert", age=5).greet() == "Hello from Bert, 5"


def test_object_nested_type(isolator: ProcessIsolator, plugin: Path) -> None:
    """Object, nested type; two of one name do not collide, which they do there. parity: 43, 45"""
    first, second = isolator.create_object(plugin, "Person.Nested"), isolator.create_object(plugin, "Other.Nested")
    assert (first.who(), second.who(), first.who()) == ("Person.Nested", "Other.Nested", "Person.Nested")


class Dog:
    def __init__(self, name: str) -> None:
        self.name = name

    def bark(self) -> str:
        return f"{self.name} barks"


class Unwilling:
    def __setstate__(self, _state: Any) -> None:
        raise ValueError("cannot be made here")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


def test_object_copy_object(isolator: ProcessIsolator) -> None:
    """Object, CopyObject. parity: 44"""
    dog = Dog("Rex")
    copy = isolator.copy_object(dog)
    dog.name = "Max"
    assert copy.bark() == "Rex barks"


def test_object_copy_object_constructor_throws(isolator: ProcessIsolator) -> None:
    """Object, CopyObject ctor throws. parity: 44"""
    with pytest.raises(RemoteError, match="cannot be made here"):
        isolator.copy_object(Unwilling())
    assert isolator.invoke(len, "abc") == 3


# --- Startup ----------------------------------------------------------------------------------------------------------


def test_startup_default_configuration() -> None:
    """Startup, default config. parity: 1"""
    with ProcessIsolator.create() as isolator:
        assert isolator.state == "ready"
        assert isolator.invoke(lambda: 1 + 1) == 2


def test_startup_standard_library_without_loader(isolator: ProcessIsolator) -> None:
    """Startup, BCL without loader. parity: 53"""
    assert isolator.invoke_method("json", "dumps", [1]) == "[1]"
    assert isolator.run_source("import sqlite3, ssl, decimal; decimal.Decimal(1) + 1").value == 2


def test_startup_other_module_refused_without_loader(isolator: ProcessIsolator) -> None:
    """Startup, other assembly refused without loader; the refusal says how to allow it. parity: 53"""
    with pytest.raises(ModuleNotFoundError, match="modules="):
        isolator.run_source("import msgspec")


def test_startup_folder_loader(plugin: Path) -> None:
    """Startup, bin dir loader. parity: 53"""
    with ProcessIsolator.create(modules=[plugin.parent]) as isolator:
        assert isolator.run_source("import plugin; plugin.Person('Bert').greet()").value == "Hello from Bert, 0"
        assert isolator.invoke_method("plugin", "Methods._private") == "private"


# --- what its comments list as untested -------------------------------------------------------------------------------


def test_wrong_arguments(isolator: ProcessIsolator, plugin: Path) -> None:
    """Wrong arg count/types."""
    with pytest.raises(TypeError, match="positional argument"):
        isolator.invoke_method(plugin, "Methods.three", 1)
    with pytest.raises(TypeError):
        isolator.create_object(plugin, "Needy")
    with pytest.raises(TypeError):
        isolator.invoke_method(plugin, "Methods.person", 5)


def test_polymorphism_and_overrides(isolator: ProcessIsolator, plugin: Path) -> None:
    """Polymorphism, virtual overrides: a method of the base, called on what is derived, runs the derived one's. parity: 45"""
    derived = isolator.create_object(plugin, "Derived")
    assert derived.describe() == "I am derived"
    describe = isolator.get_method(plugin, "Base.describe")
    assert describe.invoke(derived) == "I am derived"
    assert describe.invoke(isolator.create_object(plugin, "Base")) == "I am base"


def test_released_in_all_ways(isolator: ProcessIsolator, plugin: Path) -> None:
    """IsolatedObject.Dispose, which was still to do there. parity: 47"""
    before = isolator.object_count()
    with isolator.create_object(plugin, "Person") as person:
        greet = person.find_method("greet")
        assert greet() == "Hello from nobody, 0"
    with pytest.raises(ObjectReleased):
        greet()
    assert isolator.object_count() == before
