"""Objects that live in the child, and methods of classes there."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, write

from pisupervisor import (
    AsyncProcessIsolator,
    ChildTerminated,
    IsolatedMethod,
    IsolatedObject,
    ObjectReleased,
    OptionsError,
    ProcessIsolator,
    RemoteError,
    RestartPolicy,
    SerializationError,
    TargetNotFound,
)

pytestmark = linux

PLUGIN = """
    import os

    class Counter:
        unit = "apples"

        def __init__(self, start=0, *, step=1):
            self.value, self._step, self.invoke = start, step, "an attribute of a name that handles have"

        def add(self, times=1):
            self.value += times * self._step
            return self.value

        def release(self):
            return "the object's own release"

        def _secret(self):
            return "private"

        def __len__(self):
            return self.value

        def itself(self):
            return self

        def many(self, *args, **kwargs):
            return [list(args), kwargs]

        def fail(self):
            raise KeyError("no such thing")

        def absorb(self, other, others=()):
            self.value += other.value + sum(each.value for each in others)
            return self.value

    class Outer:
        class Item:
            def name(self):
                return "Outer.Item"

    class Other:
        class Item:
            def name(self):
                return "Other.Item"

    class Broken:
        def __init__(self):
            raise ValueError("cannot be made")

    def make_counter(start):
        return Counter(start * 10)

    def value_of(counter):
        return counter.value

    def die():
        os._exit(3)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("objects"), "plugin.py", PLUGIN)


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        yield isolator


def test_an_object_with_constructor_arguments(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 43"""
    counter = isolator.create_object(plugin, "Counter", 5, step=2)
    assert isinstance(counter, IsolatedObject)
    assert (counter.add(), counter.add(10), counter.invoke("add", times=2)) == (7, 27, 31)


def test_an_object_without_arguments(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 43"""
    assert isolator.create_object(plugin, "Counter").add() == 1


def test_where_and_what_in_one_text(isolator: ProcessIsolator, plugin: Path, tmp_path: Path) -> None:
    """parity: 43"""
    assert isolator.create_object(f"{plugin}:Counter", 5, step=2).add() == 7
    assert isolator.create_object("collections:Counter", "aab").most_common(1) == [("a", 2)]
    odd = write(tmp_path, "odd:name.py", "class Counter:\n    def add(self): return 3")
    assert isolator.create_object(str(odd), "Counter").add() == 3
    with pytest.raises(TargetNotFound, match="nothing"):
        isolator.create_object(f"{plugin}:nothing")
    with pytest.raises(OptionsError, match="is no target"):
        isolator.create_object(f"{plugin}:")


def test_an_object_of_a_nested_class_a_factory_and_a_module(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 43, 45. Nested classes of one name do not collide."""
    items = [isolator.create_object(plugin, f"{outer}.Item") for outer in ("Outer", "Other")]
    assert [item.name() for item in items] == ["Outer.Item", "Other.Item"]
    assert isolator.create_object(plugin, "make_counter", 3).add() == 31
    assert isolator.create_object("collections", "Counter", ["a", "b", "a"]).invoke("most_common", 1) == [("a", 2)]


def test_an_object_of_a_class_sent_by_value(isolator: ProcessIsolator) -> None:
    class Local:
        def __init__(self, text: str, times: int = 1) -> None:
            self.text = text * times

        def shout(self) -> str:
            return self.text.upper()

    assert isolator.create_object(Local, "ab", times=2).shout() == "ABAB"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("nowhere.py", "Counter"), OptionsError, "nowhere.py"),
        (("no_such_module", "Counter"), TargetNotFound, "no_such_module"),
        (("json", "Missing"), TargetNotFound, "Missing"),
        (("json", "decoder.Missing"), TargetNotFound, "Missing"),
        (("json", "tool"), TargetNotFound, "module"),
        (("json",), OptionsError, "name a class"),
        ((3, "x"), OptionsError, "3"),
    ],
)
def test_what_is_not_found_says_what(isolator: ProcessIsolator, arguments: Any, error: Any, said: str) -> None:
    """parity: 41, 43"""
    with pytest.raises(error, match=said):
        isolator.create_object(*arguments)


def test_a_constructor_that_raises(isolator: ProcessIsolator, plugin: Path) -> None:
    with pytest.raises(RemoteError, match="cannot be made") as caught:
        isolator.create_object(plugin, "Broken")
    assert "plugin.py" in caught.value.remote_traceback


def test_a_copy_lives_in_the_child(isolator: ProcessIsolator) -> None:
    """parity: 44"""
    original = {"a": [1, 2]}
    copied = isolator.copy_object(original)
    copied.invoke("update", b=3)
    assert copied.invoke("get", "b") == 3
    assert (copied.invoke("__len__"), original) == (2, {"a": [1, 2]})


class Bomb:
    def __reduce__(self) -> Any:
        return (int, ("no number",))


class Unsendable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be copied")


def test_copies_that_cannot_be_made(isolator: ProcessIsolator) -> None:
    """parity: 44"""
    with pytest.raises(SerializationError, match="not to be copied"):
        isolator.copy_object(Unsendable())
    with pytest.raises(RemoteError, match="no number") as caught:  # user code raised, in the child
        isolator.copy_object(Bomb())
    error = caught.value
    assert isinstance(error, SerializationError)
    assert (error.type_name, error.direction) == ("ValueError", "to child")
    assert error.message.startswith("invalid literal for int()")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


class Picky:
    def __setstate__(self, state: Any) -> None:
        self.state = state
        raise LookupError(f"{state} will not do")


def test_a_copy_whose_code_fails_shows_where(isolator: ProcessIsolator) -> None:
    """parity: 44"""
    picky = Picky()
    vars(picky)["size"] = 3
    with pytest.raises(RemoteError) as caught:
        isolator.copy_object(picky)
    line = Picky.__setstate__.__code__.co_firstlineno + 2
    assert f'File "{__file__}", line {line}, in __setstate__' in str(caught.value)


def test_private_and_special_methods(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 46"""
    counter = isolator.create_object(plugin, "Counter", 4)
    assert (counter._secret(), counter.invoke("_secret"), counter.invoke("__len__")) == ("private", "private", 4)
    for name in ("__len__", "_repr_html_", "_ipython_display_"):
        with pytest.raises(AttributeError, match="invoke"):
            getattr(counter, name)
    with pytest.raises(TypeError):
        len(counter)  # type: ignore[arg-type]


def test_a_method_travels_as_itself(isolator: ProcessIsolator, plugin: Path) -> None:
    """To whatever takes a function."""
    counter = isolator.create_object(plugin, "Counter", 5)
    assert isolator.invoke(counter.add, 2) == 7
    assert isolator.submit(counter.add, 3).result() == 10
    assert list(isolator.map(counter.find_method("add"), [1, 2])) == [11, 13]
    assert isolator.execute(counter.add, 1).value == 14
    assert isolator.invoke(lambda add: add(6), counter.add) == 20
    with ProcessIsolator.create() as other, pytest.raises(ObjectReleased):
        other.invoke(counter.add)
    counter.release()
    with pytest.raises(ObjectReleased):
        isolator.invoke(counter.add)


def test_a_handle_to_a_method_does_not_travel(isolator: ProcessIsolator, plugin: Path) -> None:
    method = isolator.get_method(plugin, "make_counter")
    for call in (lambda: isolator.invoke(method, 1), lambda: list(isolator.map(method, [1]))):
        with pytest.raises(
            SerializationError, match=r"submit_call; map and execute take the text .*plugin\.py:make_counter"
        ):
            call()


def test_any_number_of_arguments(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 46"""
    counter = isolator.create_object(plugin, "Counter")
    assert counter.many(*range(12), a=1, b=2) == [list(range(12)), {"a": 1, "b": 2}]
    assert counter.invoke("many", kwargs={"timeout": 3}) == [[], {"timeout": 3}]


def test_names_that_the_handle_has_itself(isolator: ProcessIsolator, plugin: Path) -> None:
    counter = isolator.create_object(plugin, "Counter")
    assert counter.invoke("release") == "the object's own release"
    with pytest.raises(TargetNotFound, match="cannot be called"):
        counter.invoke("invoke")


def test_an_attribute_is_set_in_the_child_or_not_at_all(isolator: ProcessIsolator, plugin: Path) -> None:
    counter = isolator.create_object(plugin, "Counter", 5)
    for name in ("value", "_value", "__doc__"):
        with pytest.raises(AttributeError, match=rf"invoke\(setattr, obj, '{name}'"):
            setattr(counter, name, 6)
    assert counter.add() == 6
    isolator.invoke(setattr, counter, "value", 10)
    assert counter.add() == 11


class DiesOnce:
    """Where it is unpickled, if the host says so."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os')._exit(1) if __import__('pihost').call_host('first') else [7]",)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_copy_is_made_again_in_another_child(is_async: bool) -> None:
    answers = iter([True, False])
    if not is_async:
        with ProcessIsolator.create(restart=RestartPolicy(backoff=0)) as isolator:
            isolator.register_callback("first", lambda: next(answers))
            assert isolator.copy_object(DiesOnce(), idempotent=True).pop() == 7
        return

    async def main() -> None:
        async with AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0)) as isolator:
            isolator.register_callback("first", lambda: next(answers))
            copied = await isolator.copy_object(DiesOnce(), idempotent=True)
            assert await copied.pop() == 7

    asyncio.run(main())


def test_an_object_of_another_isolator(isolator: ProcessIsolator, plugin: Path) -> None:
    """Its child lives: the error said that it had ended."""
    counter = isolator.create_object(plugin, "Counter")
    with ProcessIsolator.create() as other, pytest.raises(OptionsError, match="another isolator"):
        other.get_method(plugin, "Counter.add").invoke(counter)
    assert counter.add() == 1


def test_what_methods_raise_and_return(isolator: ProcessIsolator, plugin: Path) -> None:
    counter = isolator.create_object(plugin, "Counter")
    with pytest.raises(KeyError, match="no such thing"):
        counter.fail()
    with pytest.raises(SerializationError, match="Counter"):
        counter.itself()
    with pytest.raises(TargetNotFound, match="did you mean add"):
        counter.ad()
    assert counter.invoke("add", returns=int) == 1


def test_a_method_handle_serves_many_objects(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 45"""
    add = isolator.get_method(plugin, "Counter.add")
    assert isinstance(add, IsolatedMethod)
    first, second = isolator.create_object(plugin, "Counter", 1), isolator.create_object(plugin, "Counter", 100)
    assert [add.invoke(first), add.invoke(second, times=5), add.invoke(first)] == [2, 105, 3]
    assert add() == 1, "without an object: a new one for the call"
    assert isolator.get_method(plugin, "value_of")(first) == 3
    bound = first.find_method("add")
    assert (bound.__name__, bound(), bound(times=2)) == ("add", 4, 6)
    with pytest.raises(OptionsError):
        isolator.get_method("nowhere.py", "f")


def test_objects_among_the_arguments(isolator: ProcessIsolator, plugin: Path) -> None:
    one, two, three = (isolator.create_object(plugin, "Counter", start) for start in (1, 20, 300))
    assert one.absorb(two, others=[three]) == 321
    assert isolator.invoke_method(plugin, "value_of", one) == 321
    assert isolator.invoke(lambda counter: counter.value + 1, one) == 322


def test_objects_of_another_child_are_no_objects_here(isolator: ProcessIsolator, plugin: Path) -> None:
    with ProcessIsolator.create() as other:
        foreign = other.create_object(plugin, "Counter", 1)
        isolator.create_object(plugin, "Counter", 2)
        with pytest.raises(ObjectReleased):
            isolator.invoke_method(plugin, "value_of", foreign)


def test_released_is_gone(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 47"""
    before = isolator.object_count()
    with isolator.create_object(plugin, "Counter") as counter:
        assert isolator.object_count() == before + 1
    assert isolator.object_count() == before
    for use in (lambda: counter.add(), lambda: isolator.invoke_method(plugin, "value_of", counter)):
        with pytest.raises(ObjectReleased, match="was released"):
            use()
    counter.release()
    assert "released" in repr(counter)


def test_forgotten_is_gone(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 47"""
    before = isolator.object_count()
    kept = [isolator.create_object(plugin, "Counter") for _ in range(50)]
    assert isolator.object_count() == before + 50
    kept.clear()
    gc.collect()
    assert isolator.object_count() == before


def test_objects_end_with_their_child(plugin: Path) -> None:
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        counter = isolator.create_object(plugin, "Counter")
        with pytest.raises(ChildTerminated):
            isolator.invoke_method(plugin, "die")
        with pytest.raises(ObjectReleased, match="has ended"):
            counter.add()
        assert isolator.create_object(plugin, "Counter").add() == 1, "a new child"
        with pytest.raises(ObjectReleased, match="has ended"):
            counter.add()
        assert isolator.object_count() == 0 or gc.collect() is not None
        counter.release()
    counter.release()


def test_names_that_belong_to_the_call(isolator: ProcessIsolator, plugin: Path) -> None:
    options = {"timeout": 1, "returns": 2, "idempotent": 3, "kwargs": 4}
    with isolator.create_object(plugin, "Counter", idempotent=True) as counter:
        assert counter.many(1, timeout=5, returns=list, idempotent=True) == [[1], {}]
        assert counter.many(kwargs=options) == [[], options]
        many = isolator.get_method(plugin, "Counter.many")
        assert many.invoke(counter, 1, timeout=5, returns=list, idempotent=True) == [[1], {}]
        assert many.invoke(counter, kwargs=options) == [[], options]
        for wrong in (5, None, b"add"):
            with pytest.raises(OptionsError, match="expected the name of a method"):
                counter.invoke(wrong)  # type: ignore[arg-type]


def test_an_object_that_may_be_made_twice_is_made_where_the_child_lives_on(tmp_path: Path) -> None:
    plugin = write(
        tmp_path,
        "plugin.py",
        """
        import os, pihost

        def make():
            if pihost.call_host("first"):
                os._exit(3)
            return [1, 2]
        """,
    )
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        answers = [True, False, True]
        isolator.register_callback("first", lambda: answers.pop(0))
        assert isolator.create_object(plugin, "make", idempotent=True).invoke("__len__") == 2
        with pytest.raises(ChildTerminated):
            isolator.create_object(plugin, "make")
