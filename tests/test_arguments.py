"""What goes to the child: plain pickles where they do, code by value where the child has no such module."""

from __future__ import annotations

import enum
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import pytest

from pisupervisor.errors import SerializationError
from pisupervisor.link.serializer import child_importable, dump_call, dump_function

STDLIB_ONLY = child_importable(())


@dataclass
class Basket:
    owner: str
    fruits: list[str]

    def add(self, fruit: str) -> Basket:
        self.fruits.append(fruit)
        return self


class Mood(enum.Enum):
    GOOD = 1


def helper(number: int) -> int:
    return number * FACTOR


FACTOR = 10


def uses_helper(number: int) -> int:
    return helper(number) + 1


@functools.singledispatch
def kind_of(value: object) -> str:
    return "something"


@kind_of.register
def _(value: int) -> str:
    return f"a number below {FACTOR}"


@kind_of.register
def _(value: Mood) -> str:
    return "a mood"


class Parcel:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    @functools.cached_property
    def postage(self) -> int:
        """Of one parcel."""
        self.weight += 1
        return self.weight * FACTOR


@functools.lru_cache(maxsize=7, typed=True)
def fibonacci(number: int) -> int:
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)


@pytest.fixture
def in_child(tmp_path: pathlib.Path) -> Any:
    """Runs a dump in a bare interpreter that has cloudpickle and nothing else of ours; the repr of its result."""
    (tmp_path / "cloudpickle").symlink_to(pathlib.Path(cloudpickle.__file__).parent)
    program = (
        "import sys, pickle; sys.path.append(sys.argv[1])\n"
        "fn, args, kwargs = pickle.load(sys.stdin.buffer)\n"
        "print(repr(fn(*args, **kwargs)))\n"
    )
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]

    def run(data: bytes) -> str:
        command = [python, "-I", "-S", "-c", program, str(tmp_path)]
        done = subprocess.run(command, input=data, capture_output=True, cwd="/", check=False)
        return done.stdout.decode().strip() or done.stderr.decode()

    return run


def test_plain_arguments_need_no_cloudpickle() -> None:
    args = (1, "a", None, [1.5, {"k": (b"x",)}], {1, 2}, pathlib.Path("/x"), 2**100)
    data, needs_cloudpickle = dump_call(args, {"size": 128})
    assert not needs_cloudpickle
    assert pickle.loads(data) == (args, {"size": 128})


def test_any_number_of_arguments_travel() -> None:
    """parity: 46"""
    args = tuple(range(12))
    kwargs = {f"name{number}": number for number in range(12)}
    assert pickle.loads(dump_call(args, kwargs)[0]) == (args, kwargs)
    assert pickle.loads(dump_call((), {})[0]) == ((), {})


@pytest.mark.parametrize(
    "value",
    [lambda: 1, helper, Basket("a", []), Basket, Mood.GOOD, [{"deep": Basket("b", [])}]],
    ids=["lambda", "function", "instance", "class", "enum", "nested"],
)
def test_code_the_child_does_not_have_needs_cloudpickle(value: object) -> None:
    assert dump_call((value,), {})[1]
    assert dump_call((), {"x": value})[1]


def test_modules_the_child_has_travel_by_name() -> None:
    here = child_importable([os.path.dirname(__file__)])
    data, needs_cloudpickle = dump_call((Basket("a", []), helper), {}, importable=here)
    assert not needs_cloudpickle
    assert __name__.encode() in data


def test_another_minor_version_gets_plain_pickles_only() -> None:
    assert not dump_call((1,), {}, python_minor_matches=False)[1]
    with pytest.raises(SerializationError, match=r"argument 2 \(<builtins.function>\).*same minor version") as caught:
        dump_call((1, helper), {}, python_minor_matches=False)
    assert caught.value.direction == "to child"


def test_arguments_by_value_load_in_a_bare_interpreter(in_child: Any) -> None:
    (args, kwargs), needs_cloudpickle = (None, None), False
    data, needs_cloudpickle = dump_call((Basket("ann", ["fig"]), Mood.GOOD), {"f": lambda x: x + 1})
    assert needs_cloudpickle
    args, kwargs = pickle.loads(data)
    fn = dump_function(lambda basket, mood, f: (basket.add("pear").fruits, mood.name, f(1)), args, kwargs, STDLIB_ONLY)
    assert in_child(fn) == "(['fig', 'pear'], 'GOOD', 2)"


def test_a_closure_takes_its_variables_along_and_the_host_keeps_its_own(in_child: Any) -> None:
    """parity: 42. A closure over three types, one of them its own class; what the child changes is the child's."""
    total, names, basket = 5, ["a"], Basket("ann", ["fig"])

    def work(extra: int, *, more: int = 0) -> tuple[int, list[str], list[str]]:
        names.append("b")
        basket.add("pear")
        return total + extra + more, names, basket.fruits

    data = dump_function(work, (1,), {"more": 2}, STDLIB_ONLY)
    assert in_child(data) == "(8, ['a', 'b'], ['fig', 'pear'])"
    assert (names, basket.fruits) == (["a"], ["fig"])


def test_a_cached_function_travels_with_what_it_caches_for(in_child: Any) -> None:
    assert in_child(dump_function(fibonacci, (40,), {}, STDLIB_ONLY)) == "102334155"
    ask = dump_function(lambda cached: (cached(30), cached.cache_parameters()), (fibonacci,), {}, STDLIB_ONLY)
    assert in_child(ask) == "(832040, {'maxsize': 7, 'typed': True})"
    assert dump_call((fibonacci,), {})[1]
    assert b"fibonacci" in dump_call((fibonacci,), {}, importable=child_importable([os.path.dirname(__file__)]))[0]


def test_cached_properties_travel_with_their_class(in_child: Any) -> None:
    ask = dump_function(lambda one: (one.postage, one.postage, Parcel.postage.__doc__), (Parcel(4),), {}, STDLIB_ONLY)
    assert in_child(ask) == "(50, 50, 'Of one parcel.')"


def test_a_function_of_several_types_travels_with_all_of_them(in_child: Any) -> None:
    assert kind_of(5) == "a number below 10"  # which it remembers, weakly
    ask = dump_function(lambda *values: [kind_of(value) for value in values], (5, "a", Mood.GOOD), {}, STDLIB_ONLY)
    assert in_child(ask) == "['a number below 10', 'something', 'a mood']"


def test_functions_take_their_helpers_and_globals_along(in_child: Any) -> None:
    assert in_child(dump_function(uses_helper, (4,), {}, STDLIB_ONLY)) == "41"
    assert in_child(dump_function(Basket("x", []).add, ("y",), {}, STDLIB_ONLY)) == "Basket(owner='x', fruits=['y'])"


def test_a_module_of_ours_travels_whole(in_child: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tools.py").write_text("LIMIT = 3\ndef double(x):\n    return x * 2 + LIMIT\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_tools  # type: ignore[import-not-found]

    monkeypatch.delitem(sys.modules, "own_tools")  # leave nothing behind
    monkeypatch.setitem(sys.modules, "own_tools", own_tools)
    (tmp_path / "own_tools.py").unlink()
    assert in_child(dump_function(lambda x: own_tools.double(x), (2,), {}, STDLIB_ONLY)) == "7"


def test_the_registry_of_cloudpickle_stays_as_it_was() -> None:
    this = sys.modules[__name__]
    dump_function(uses_helper, (1,), {}, STDLIB_ONLY)
    with pytest.raises(SerializationError):
        dump_function(lambda: helper, (threading.Lock(),), {}, STDLIB_ONLY)
    assert cloudpickle.list_registry_pickle_by_value() == set()
    cloudpickle.register_pickle_by_value(this)
    try:
        dump_function(uses_helper, (1,), {}, STDLIB_ONLY)
        assert cloudpickle.list_registry_pickle_by_value() == {__name__}
    finally:
        cloudpickle.unregister_pickle_by_value(this)


def test_dumps_from_many_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(50):
                assert b"uses_helper" in dump_function(uses_helper, (1,), {}, STDLIB_ONLY)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_what_cannot_be_pickled_is_named() -> None:
    for call in (
        lambda: dump_call((1, threading.Lock()), {}),
        lambda: dump_function(helper, (1, threading.Lock()), {}, STDLIB_ONLY),
    ):
        with pytest.raises(
            SerializationError, match=r"argument 2 \(<_thread.lock>\) cannot be sent to the child: .*pickle"
        ) as caught:
            call()
        assert caught.value.direction == "to child"
        assert "inside the child" in str(caught.value)
    with (
        pytest.raises(SerializationError, match=r"argument 'stream' \(<_io.BufferedReader>\)"),
        open(__file__, "rb") as stream,
    ):
        dump_call((), {"stream": stream})


def test_a_variable_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match=r"'lock', used by the function .*<lambda> \(<_thread.lock>\)"):
        dump_function(lambda: lock.acquire(), (), {}, STDLIB_ONLY)


def test_what_a_values_own_reduce_raises_is_a_serialization_error() -> None:
    class Moody:
        def __reduce__(self) -> str:
            raise ZeroDivisionError("mood")

    with pytest.raises(SerializationError, match=r"argument 1 .*Moody.*mood") as caught:
        dump_call((Moody(),), {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_bottomless_argument_is_a_serialization_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError, match="argument 1"):
        dump_call((deep,), {})


def test_a_compiled_package_must_be_in_the_child() -> None:
    array = np.arange(3)
    with pytest.raises(SerializationError, match=r"argument 1 .*'numpy' has compiled parts.*import_paths"):
        dump_call((array,), {})
    with pytest.raises(SerializationError) as caught:
        dump_call((array,), {})
    assert f"import_paths=[{str(pathlib.Path(np.__file__).parent.parent)!r}]" in str(caught.value)
    with pytest.raises(SerializationError, match=r"'np', used by the function .*import_paths"):
        dump_function(uses_numpy, (), {}, STDLIB_ONLY)
    site = child_importable([pathlib.Path(np.__file__).parent.parent])
    data, needs_cloudpickle = dump_call((array,), {}, importable=site)
    assert not needs_cloudpickle
    np.testing.assert_array_equal(pickle.loads(data)[0][0], array)


def uses_numpy() -> Any:
    return np.arange(3)


def test_importable_is_stdlib_ours_and_import_paths(tmp_path: pathlib.Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "single.py").write_text("")
    (tmp_path / f"speed{'.cpython-311-x86_64-linux-gnu.so'}").write_text("")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("wheeled/__init__.py", "")
        wheel.writestr("flat.py", "")
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    importable = child_importable([tmp_path, str(tmp_path / "some.whl"), tmp_path / "broken.zip", tmp_path / "absent"])
    for name in (
        "json",
        "os.path",
        "builtins",
        "pihost.wire",
        "cloudpickle.cloudpickle",
        "package.sub",
        "single",
        "speed",
        "wheeled.a",
        "flat",
    ):
        assert importable(name), name
    for name in ("__main__", "numpy", "pack", "singles", "pisupervisor", __name__, ""):
        assert not importable(name), name


def test_a_folder_with_nothing_but_data_is_no_module(tmp_path: pathlib.Path) -> None:
    """An editable install leaves one of our own name in site-packages; a namespace around packages is another thing."""
    for file in ("left/profiles/one.json", "space/inner/__init__.py", "space.txt", "deep/a/b/c/mod.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    importable = child_importable([tmp_path], stdlib=())
    assert [name for name in ("left", "space", "space.inner", "deep") if importable(name)] == ["space", "space.inner"]


def test_plain_data_never_asks_what_is_importable() -> None:
    def never(_: str) -> bool:
        raise AssertionError("asked")

    assert not dump_call(([1, {"a": (2.5, None, b"x", True)}], "s"), {"k": {1}}, importable=never)[1]


def test_code_with_constants_of_any_kind_travels(in_child: Any) -> None:
    """marshal takes no such code; cloudpickle does."""

    def give() -> Any:
        return "a constant"

    marker = pathlib.PurePosixPath("/put/in/there")
    constants = tuple(marker if const == "a constant" else const for const in give.__code__.co_consts)
    give.__code__ = give.__code__.replace(co_consts=constants)
    assert in_child(dump_function(give, (), {}, STDLIB_ONLY)) == repr(marker)
