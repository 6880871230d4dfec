"""``returns=``: a result is checked against the declared type and built as it."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import pathlib
import time
import typing
import uuid
from collections.abc import Generator, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers import linux
from test_values import BERLIN, Color, Level, Pair, Point, Row, Shape, Size, cross

from pisupervisor import OptionsError, ProcessIsolator, SerializationError
from pisupervisor.link import returns as returning


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create() as isolator:
        yield isolator


def test_returns_builds_and_checks() -> None:
    shape = Shape(
        [Point(1, 2), Point(3, 4, "x")], Size.SMALL, datetime.datetime.now(BERLIN), pathlib.Path("/a"), 2j, b"xy"
    )
    assert cross(shape)["points"] == [{"x": 1, "y": 2, "label": None}, {"x": 3, "y": 4, "label": "x"}]
    assert cross(shape, Shape) == shape
    plain = Shape(shape.points, "small", shape.made, "/a", 2, b"z" * 600)  # type: ignore[arg-type]
    assert cross(plain, Shape) == dataclasses.replace(shape, factor=2 + 0j, digest=b"z" * 600)


BUILT = [
    (Point(1.0, 2.0), Point), ([Point(1.0, 2.0)], list[Point]), ({"name": "a", "size": 1}, Row), (Pair(1, "x"), Pair),
    (None, int | None), (5, int | None), ({1: "a"}, dict[int, str]), ({1, 2}, set[int]), ((1, "a"), tuple[int, str]),
    (Level.HIGH, Level), (pathlib.Path("/x"), pathlib.Path), (1 + 2j, complex), (uuid.UUID(int=5), uuid.UUID),
    (decimal.Decimal("1.5"), decimal.Decimal), (datetime.date(2024, 1, 1), datetime.date), (b"x", bytes),
    (datetime.timedelta(1), datetime.timedelta), (datetime.time(1, tzinfo=BERLIN), datetime.time),
    ({"a": [Point(1.0, 2.0, "l")]}, dict[str, list[Point]]), (0, int), (False, bool), ("", str), ([], list[int]),
    (bytearray(b"x"), bytearray), (frozenset({1}), frozenset[int]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns"), BUILT, ids=[str(returns) for _, returns in BUILT])
def test_returns_gives_back_the_declared_type(value: object, returns: object) -> None:
    got = cross(value, returns)
    assert got == value
    assert type(got) is type(value)


def test_returns_for_types_beyond_json() -> None:
    assert cross(Color.RED, Color) is Color.RED
    assert cross(Color.PAIR, Color) is Color.PAIR
    assert cross("/x", pathlib.Path) == pathlib.Path("/x")
    assert cross(3, complex) == 3 + 0j
    assert cross(3, float) == 3.0
    np.testing.assert_array_equal(cross(np.arange(3), np.ndarray), np.arange(3))
    assert cross(np.float64(0.5), np.float64) == np.float64(0.5)
    assert returning.build([1], typing.Any) == [1]


Value = typing.TypeVar("Value")


@dataclasses.dataclass
class Box(typing.Generic[Value]):
    value: Value


OF_ENUMS = [
    ([Color.RED, Color.PAIR], list[Color]), ({"a": Color.PAIR}, dict[str, Color]), (Color.RED, Color | None),
    (None, Color | None), ((Color.RED, 5), tuple[Color, int]), ({Color.RED}, set[Color]),
    (Color.RED, typing.Annotated[Color, "any"]), (Color.PAIR, typing.Optional[Color]),  # noqa: UP045
    ([Color.RED], list[Color] | int), (5, list[Color] | int), ({"a": Color.PAIR}, dict[str, Color] | str | None),
    ([[Color.RED]], typing.List[typing.Sequence[Color]]), ([Box(Color.PAIR)], list[Box[Color]]),  # noqa: UP006
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns"), OF_ENUMS, ids=[str(returns) for _, returns in OF_ENUMS])
def test_enums_of_mixed_values_inside_of_other_types(value: object, returns: object) -> None:
    assert cross(value, returns) == value


@dataclasses.dataclass
class Paint:
    color: Color
    coats: int = 2
    spare: list[Color] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Wall:
    paint: Paint | None
    beside: list[Wall] = dataclasses.field(default_factory=list)
    by_name: dict[str, Paint] = dataclasses.field(default_factory=dict)
    area: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if self.area < 0:
            raise ValueError("no area")


class Coat(typing.NamedTuple):
    color: Color
    paint: Paint | None = None


class Order(typing.TypedDict):
    paints: list[Paint]
    coat: typing.NotRequired[Coat]


class Urgent(Order, total=False):
    marks: set[Color]


@dataclasses.dataclass
class Mixed(typing.Generic[Value]):
    color: Color
    value: Value
    rest: list[Value]


RED, BOTH = {"color": "red"}, {"color": (1, 2), "coats": 1, "spare": ["red", (1, 2)]}
OF_FIELDS = [
    (RED, Paint, Paint(Color.RED)), (BOTH, Paint, Paint(Color.PAIR, 1, [Color.RED, Color.PAIR])),
    ([RED], list[Paint], [Paint(Color.RED)]), ({"a": RED}, dict[str, Paint], {"a": Paint(Color.RED)}), (None, Paint | None, None),
    (RED, typing.Optional[Paint], Paint(Color.RED)), ((RED, 1), tuple[Paint, int], (Paint(Color.RED), 1)),  # noqa: UP045
    ({"paint": None, "beside": [{"paint": RED, "area": 2.5}], "by_name": {"x": RED}}, Wall, None),
    ([(1, 2)], Coat, Coat(Color.PAIR)), (("red", RED), Coat, Coat(Color.RED, Paint(Color.RED))),
    ({"paints": [RED]}, Order, {"paints": [Paint(Color.RED)]}),
    ({"paints": [], "coat": ["red"], "marks": ["red"]}, Urgent, {"paints": [], "coat": Coat(Color.RED), "marks": {Color.RED}}),
    ({"color": "red", "value": 5, "rest": [6]}, Mixed[int], Mixed(Color.RED, 5, [6])),
    (RED, typing.Annotated[Paint, "x"], Paint(Color.RED)),
    ({"color": "red", "value": RED, "rest": []}, Mixed[Paint], Mixed(Color.RED, Paint(Color.RED), [])),
    ({"color": "red", "value": 5, "rest": ["x"]}, Mixed, Mixed(Color.RED, 5, ["x"])),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns", "built"), OF_FIELDS, ids=[f"{r}-{v!r:.30}" for v, r, _ in OF_FIELDS])
def test_fields_may_be_enums_of_mixed_values(value: object, returns: object, built: object) -> None:
    if returns is Wall:
        beside = Wall(Paint(Color.RED))
        object.__setattr__(beside, "area", 2.5)
        built = Wall(None, [beside], {"x": Paint(Color.RED)})
    got = cross(value, returns)
    assert got == built
    assert type(got) is type(built)


def test_what_was_such_a_class_in_the_child_comes_back_as_it() -> None:
    for value in (
        Paint(Color.PAIR, 3, [Color.RED]),
        Wall(Paint(Color.RED), [Wall(None)]),
        Coat(Color.RED),
        Mixed(Color.RED, 1, [2]),
    ):
        got = cross(value, type(value))
        assert got == value
        assert type(got) is type(value)


@pytest.mark.parametrize(
    ("value", "returns", "why"),
    [
        ({"color": "no"}, Paint, r"'no' is not a valid Color - at `\$.color`"), ({}, Paint, "missing required field `color`"),
        ({"color": "red", "coats": "2"}, Paint, r"Expected `int`, got `str` - at `\$.coats`"), (5, Paint, "Expected `object`"),
        ([RED, {"color": "red", "spare": ["no"]}], list[Paint], r"'no' is not a valid Color - at `\$\[1\].spare\[0\]`"),
        ({"paint": None, "beside": [{"paint": {"color": 1}}]}, Wall, r"1 is not a valid Color - at `\$.beside\[0\].paint.color`"),
        ({"paint": None, "beside": [{"paint": None, "area": -1.0}]}, Wall, r"no area - at `\$.beside\[0\]`"),
        ([], Coat, "length 1 to 2"), (["red", 5], Coat, r"Expected `object`, got `int` - at `\$\[1\]`"),
        ({"coat": ["red"]}, Order, "missing required field `paints`"),
        ({"paints": [], "marks": ["no"]}, Urgent, "not a valid Color"),
        ({"color": "red", "value": "x", "rest": []}, Mixed[int], r"Expected `int`, got `str` - at `\$.value`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_such_a_field_is_named(value: object, returns: object, why: str) -> None:
    with pytest.raises(SerializationError, match=f"the result is not a .*{why}"):
        cross(value, returns)


class Tin(msgspec.Struct):
    size: int
    color: Color


@dataclasses.dataclass
class Shelf:
    tins: list[Tin]


@dataclasses.dataclass
class OfInt(Mixed[int]):
    more: int


@dataclasses.dataclass
class Either:
    one: Color | int


@dataclasses.dataclass
class Given:
    color: Color
    extra: dataclasses.InitVar[int]


@pytest.mark.parametrize(
    ("returns", "why"),
    [
        (Tin, "field 'color' of Tin: .*only a dataclass, a TypedDict or a NamedTuple can have such a field"),
        (dict[str, Shelf], "field 'tins' of Shelf: field 'color' of Tin: .*only a dataclass"),
        (Either, "field 'one' of Either: in .*Color | int there can be nothing but None beside Color"),
        (Paint | int, r"nothing but None beside Paint"), (Given, "field 'extra' of Given"), (OfInt, "is a variable of a base"),
    ],
    ids=str,
)  # fmt: skip
def test_the_field_for_which_a_class_cannot_be_built_is_named(returns: Any, why: str) -> None:
    with pytest.raises(OptionsError, match=f"cannot be built: .*{why}"):
        returning.check_returns(returns)


def test_what_is_nested_deeply_is_built_and_tried_once() -> None:
    """Who tried each part anew without numpy's scalars would double the work with each level."""
    value: Any = {"paint": {"color": np.int64(1)}}
    for _ in range(30):
        value = {"paint": None, "beside": [value]}
    began = time.thread_time()
    with pytest.raises(SerializationError, match="1 is not a valid Color"):
        cross(value, Wall)
    assert time.thread_time() - began < 5
    deep = Wall(None)
    for _ in range(40):
        deep = Wall(None, [deep])
    assert cross(deep, Wall) == deep


POINT = {"x": 1.0, "y": 2.0, "label": None}
PATH = pathlib.Path("/a")


@dataclasses.dataclass
class SizeOfFiles:
    sizes: dict[pathlib.Path, int]
    more: SizeOfFiles | None = None


OF_KEYS = [
    ({"/a": 1}, dict[pathlib.Path, int], {PATH: 1}), ({PATH: 1}, dict[pathlib.Path, int], {PATH: 1}),
    ([{"/a": {"/a": POINT}}], list[dict[pathlib.Path, dict[pathlib.Path, Point]]], [{PATH: {PATH: Point(1.0, 2.0)}}]),
    ({"/a": 1}, typing.Mapping[pathlib.Path, int] | None, {PATH: 1}), ({"red": 1}, dict[Color, int], {Color.RED: 1}),
    ({"value": {"red": 1}}, Box[dict[Color, int]], Box({Color.RED: 1})), ({1: 2}, dict[complex, int], {1 + 0j: 2}),
    ({"sizes": {"/a": 1}, "more": {"sizes": {}}}, SizeOfFiles, SizeOfFiles({PATH: 1}, SizeOfFiles({}))),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns", "built"), OF_KEYS, ids=[f"{v!r:.20}-{r}" for v, r, _ in OF_KEYS])
def test_keys_are_built_and_checked_too(value: object, returns: object, built: object) -> None:
    got = cross(value, returns)
    assert got == built
    assert repr(got) == repr(built)  # "1 + 0j" and 1 are equal


@pytest.mark.parametrize(
    ("value", "returns"),
    [({"a": 1}, dict[complex, int]), ({"a": 1}, dict[Color, int]), ([1], dict[pathlib.Path, int])],
    ids=str,
)
def test_keys_that_are_not_as_declared(value: object, returns: object) -> None:
    with pytest.raises(SerializationError, match="the result is not a dict"):
        cross(value, returns)


def test_what_is_no_member_is_named() -> None:
    with pytest.raises(SerializationError, match=r"'no' is not a valid Color - at `\$\[1\]`"):
        cross([Color.RED.value, "no"], list[Color])


class Answer(msgspec.Struct):
    total: int
    parts: list[Point] = []


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Square(msgspec.Struct, tag="square"):
    side: float


class Reply(typing.TypedDict):
    status: typing.Literal["ok", "failed"]
    points: typing.NotRequired[list[Point]]


DECLARED = [
    ({"total": 1, "parts": [POINT]}, Answer, Answer(1, [Point(1.0, 2.0)])),
    ({"type": "square", "side": 2.0}, Circle | Square, Square(2.0)),
    ({"status": "ok", "points": [POINT]}, Reply, {"status": "ok", "points": [Point(1.0, 2.0)]}),
    ({"status": "failed"}, Reply, {"status": "failed"}),
    ([1, "x"], Pair, Pair(1, "x")), ("ok", typing.Literal["ok", 1], "ok"), (1, typing.Literal["ok", 1], 1),
    ("a", int | str, "a"), (7, int | str, 7), ([POINT], list[Point], [Point(1.0, 2.0)]), (POINT, Point | None, Point(1.0, 2.0)),
    ({"a": [POINT]}, dict[str, list[Point]], {"a": [Point(1.0, 2.0)]}), (1 << 5000, int, 1 << 5000),
    ([-(1 << 64)], list[int], [-(1 << 64)]), (7, typing.Annotated[int, msgspec.Meta(ge=5)], 7), (math.inf, float, math.inf),
    (np.mean([1.0, 2.0]), float, 1.5), (np.int64(3), int, 3), ([np.int8(3)], list[int], [3]),
    ({"x": np.float64(1), "y": np.float32(2)}, Point, Point(1.0, 2.0)), ({np.int64(1): np.bool_(1)}, dict[int, bool], {1: True}),
    ((np.int64(1), "a"), tuple[int, str], (1, "a")), ({np.int64(1)}, set[int], {1}),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns", "built"), DECLARED, ids=[str(returns) for _, returns, _ in DECLARED])
def test_what_is_declared_is_built(value: object, returns: object, built: object) -> None:
    got = cross(value, returns)
    assert got == built
    assert type(got) is type(built)


def test_nan_is_a_float() -> None:
    assert math.isnan(cross(math.nan, float))
    assert math.isnan(cross([math.nan], list[float])[0])


UNDECLARED = [
    ({"total": 1, "parts": [{"x": 1.0}]}, Answer), ({"type": "line", "side": 2.0}, Circle | Square),
    ({"side": 2.0}, Circle | Square), ({"status": "maybe"}, Reply), ({"points": []}, Reply),
    ({"status": "ok", "points": [5]}, Reply), ([1, "x", 2], Pair), (["x"], Pair),
    ("no", typing.Literal["ok", 1]), (True, typing.Literal[1]), (1.5, int | str), (3, typing.Annotated[int, msgspec.Meta(ge=5)]),
    ([POINT, None], list[Point]), (1 << 2000, float), (math.nan, int),
    (np.float64(1.5), int), (np.int64(1), str), (np.datetime64("2020", "ns"), int), (np.array([1]), list[int]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns"), UNDECLARED, ids=[f"{v!r:.20}-{r}" for v, r in UNDECLARED])
def test_what_is_not_declared_is_refused(value: object, returns: object) -> None:
    with pytest.raises(SerializationError, match="the result is not a"):
        cross(value, returns)


MISFITS = [
    ("x", int), (1, str), ({"x": 1.0}, Point), ({"x": 1.0, "y": "no"}, Point), ([1, "x"], list[int]), ("green", Color),
    (1, Level), (None, int), (5, pathlib.Path), ("1j", complex), (1, np.ndarray), (b"x", str), (True, int), ("1", int),
]  # fmt: skip


@pytest.mark.parametrize(("value", "returns"), MISFITS, ids=[f"{v!r}-{r}" for v, r in MISFITS])
def test_returns_that_does_not_fit_says_what(value: object, returns: object) -> None:
    with pytest.raises(SerializationError, match="the result is not a") as caught:
        cross(value, returns)
    assert caught.value.direction == "from child"


def test_returns_names_the_part_that_does_not_fit() -> None:
    with pytest.raises(SerializationError, match=r"Point.*\[0\]\.y|\[0\]\.y"):
        cross([{"x": 1.0, "y": "no"}], list[Point])


def test_returns_that_nobody_can_build_is_said() -> None:
    with pytest.raises(SerializationError, match=r"cannot be built|is not a"):
        cross({"a": 1}, "not a type")


class SizeOfTins(msgspec.Struct):
    sizes: dict[pathlib.Path, int]


@dataclasses.dataclass
class Dangling:
    x: "NoSuchName"  # type: ignore[name-defined]  # noqa: F821, UP037


@linux
@pytest.mark.parametrize(
    "returns",
    [
        "int", 5, Color | int, SizeOfTins, list[SizeOfTins], Tin, list[Shelf],
        Point | Shape, list[Point | Shape], Dangling, Iterator["int"],
        Generator[int, None, Point | Shape], typing.Self,
    ],
    ids=str,
)  # fmt: skip
def test_a_type_that_nothing_can_be_built_as_is_told_before_the_call(isolator: ProcessIsolator, returns: Any) -> None:
    done: list[int] = []
    isolator.register_callback("done", lambda: done.append(1))

    def work() -> None:
        import pihost

        pihost.call_host("done")

    with pytest.raises(OptionsError, match="cannot be built"):
        isolator.invoke(work, returns=returns)
    with pytest.raises(OptionsError, match="cannot be built"):
        isolator.execute(work, returns=returns)
    assert done == []


@linux
def test_a_list_where_an_iterator_was_asked_for_is_checked_too(isolator: ProcessIsolator) -> None:
    assert isolator.invoke(lambda: [POINT], returns=Iterator[Point]) == [Point(1.0, 2.0)]
    for wrong in ([1], POINT, 5, None):
        with pytest.raises(SerializationError, match="is not a list"):
            isolator.invoke(lambda value: value, wrong, returns=Iterator[Point])


@linux
def test_anything_may_be_a_generator_too(isolator: ProcessIsolator) -> None:
    assert isolator.invoke(lambda: 5, returns=Any) == 5
    assert list(isolator.invoke(lambda: (n for n in (1, "a")), returns=Any)) == [1, "a"]
    with pytest.raises(SerializationError, match="returned a generator"):
        isolator.invoke(lambda: (n for n in (1, "a")), returns=object)


@linux
def test_classes_that_results_were_built_as_can_still_be_sent(isolator: ProcessIsolator) -> None:
    for value, returns in ((7, Level), ("small", Size), ({"x": 1.0, "y": 2.0}, Point), ({"name": "a", "size": 1}, Row)):
        built = isolator.invoke(lambda value: value, value, returns=returns)
        assert isolator.invoke(lambda value: value, built, returns=returns) == built
        assert isolator.invoke(lambda kind: kind.__name__, returns) == returns.__name__


class Custom:
    pass


@linux
def test_what_comes_as_a_pickle_is_checked_and_built_too() -> None:
    with ProcessIsolator.create(results="pickle") as isolator:
        for value, returns in ((5, int), ({"x": 1.0, "y": 2.0}, Point), (Point(1.0, 2.0), Point), (range(3), range)):
            got = isolator.invoke(lambda value: value, value, returns=returns)
            assert isinstance(got, returns)
        assert isinstance(isolator.invoke(lambda: [Custom()], returns=list[Custom])[0], Custom)
        for value, returns in ((5, str), (5, Custom), ({"x": 1.0}, Point)):
            with pytest.raises(SerializationError, match="the result is not a"):
                isolator.invoke(lambda value: value, value, returns=returns)
