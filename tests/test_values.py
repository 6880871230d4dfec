"""Values from a child to the host: what is data arrives as it was, and hostile bytes are only ever refused."""

from __future__ import annotations

import ast
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import pickle
import re
import subprocess
import sys
import typing
import uuid
import zoneinfo

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pihost.inside import encode as child
from pisupervisor.link import returns as returning, serializer

LIMIT = 64 << 20
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
INSIDE = pathlib.Path(child.__file__).parent


def cross(value: object, returns: object = None) -> typing.Any:
    text, buffers = child.encode(value, LIMIT)
    text.decode("ascii")
    built = serializer.decode(text, [memoryview(bytes(buffer)) for buffer in buffers])
    return built if returns is None else returning.build(built, returns)


def tagged(tag: object, payload: object, **more: object) -> bytes:
    return json.dumps({"$": tag, "v": payload, **more}).encode()


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Size(enum.Enum):
    SMALL = "small"


class Level(enum.IntEnum):
    HIGH = 7


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: float
    y: float
    label: str | None = None


@dataclasses.dataclass
class Shape:
    points: list[Point]
    size: Size
    made: datetime.datetime
    where: pathlib.Path
    factor: complex
    digest: bytes


class Pair(typing.NamedTuple):
    left: int
    right: str


class Row(typing.TypedDict):
    name: str
    size: int


class Text(str):
    def __str__(self) -> str:
        return "a lie"


UNCHANGED = [
    None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 1 << 10_000, 0.0, -0.0, 1.5, 5e-324, 1e308,
    math.inf, -math.inf, "", "a", "\x00\x1f\x7f", 'quote " and \\ and {"$":1}', "ä€😀", "\ud800", "\ud83d\ude00",
    "ok \udcff mixed ä", "x" * 100_000, b"", b"\x00\xff", b"x" * 5000, bytearray(b"abc"), bytearray(5000), [], {}, (),
    set(), frozenset(), [[], {}, ()], {"": None}, {"$": 1}, {"$": "tuple", "v": [1]}, {"a": {"$": {"$": "x"}}},
    {1: "a", None: 2, 2.5: 3, (1, ("x", b"y")): 4, frozenset({1}): 5}, {"\ud800": 1}, {0: 1, "0": 2}, (1, (2, [{3}])),
    {1, "1", (1,), None}, frozenset({frozenset({1}), 2}), 3 + 4j, complex(-0.0, math.inf), decimal.Decimal("1.50"),
    decimal.Decimal("-0"), decimal.Decimal("1E+999999"), decimal.Decimal("Infinity"), decimal.Decimal("1e-9"),
    uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), pathlib.Path("/a/b c"), pathlib.Path("x\udcff"),
    pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\x"), datetime.date(1, 1, 1), datetime.date(9999, 12, 31),
    datetime.datetime(2024, 1, 2, 3, 4, 5, 6), datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.time(1, 2),
    datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone(-datetime.timedelta(hours=3, seconds=7))),
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    datetime.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    datetime.time(23, 59, 59, 999999, tzinfo=BERLIN), datetime.time(1, tzinfo=datetime.UTC), datetime.timedelta(0),
    datetime.timedelta(-1, 5, 6), datetime.timedelta.max, datetime.timedelta.min,
    [1] * 10_000, {str(i): i for i in range(999)},
]  # fmt: skip


def name_of(value: object) -> str:
    """The same in every process: sets have no order."""
    return type(value).__name__ + ("" if isinstance(value, (set, frozenset)) else f"-{str(value)[:12]!a}")


@pytest.mark.parametrize("value", UNCHANGED, ids=name_of)
def test_a_value_arrives_with_its_type(value: object) -> None:
    got = cross(value)
    assert type(got) is type(value)
    assert got == value
    assert repr(got) == repr(value) or isinstance(value, (set, frozenset))
    if isinstance(value, (datetime.datetime, datetime.time)):
        assert (got.fold, got.tzinfo) == (value.fold, value.tzinfo)


@pytest.mark.parametrize("value", [0, False, "", None, 0.0, [], {}, (), b""])
def test_falsy_values_arrive_unchanged(value: object) -> None:
    """parity: 84"""
    got = cross(value)
    assert got == value
    assert type(got) is type(value)
    assert cross({"wrapped": [value]}) == {"wrapped": [value]}


def test_ints_beyond_what_python_prints_arrive() -> None:
    assert cross([1 << 50_000, -(1 << 4_000_000)]) == [1 << 50_000, -(1 << 4_000_000)]
    largest = 1 << 8 * LIMIT // 3  # in hexadecimal digits
    assert cross(largest) == largest
    with pytest.raises(child.NotData, match=r"more than Limits\.result"):
        child.encode(1 << 8 * LIMIT, LIMIT)


def test_nan_arrives_as_nan() -> None:
    assert math.isnan(cross(math.nan))
    assert math.isnan(cross([math.nan, 1.0])[0])
    assert cross(decimal.Decimal("NaN")).is_nan()


leaves = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text()
    | st.text(st.characters(categories=["L", "Cs"])) | st.binary() | st.binary(min_size=600, max_size=700)
    | st.decimals(allow_nan=False) | st.uuids() | st.dates() | st.times() | st.datetimes()
    | st.datetimes(timezones=st.just(BERLIN)) | st.timedeltas() | st.complex_numbers(allow_nan=False)
)  # fmt: skip
hashable = st.recursive(leaves, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4) | st.sets(hashable, max_size=4)
        | st.dictionaries(st.sampled_from(["$", "v", "a"]), inner)
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(nested)
def test_nested_values_arrive_equal(value: object) -> None:
    got = cross(value)
    assert got == value
    assert type(got) is type(value)


@settings(max_examples=200, deadline=None)
@given(nested)
def test_the_child_never_counts_fewer_items_than_the_host(value: object) -> None:
    walk = child.Walk(LIMIT)
    bare = re.sub(rb'"(\\.|[^"\\])*"', b"", walk.run(value)[0])
    assert sum(bare.count(mark) for mark in (b",", b"[", b"{")) <= walk.items


def test_as_much_as_the_child_lets_out_the_host_takes() -> None:
    for value in ([[]] * 999_000, [{}] * 999_000, [0] * 1_999_000, [()] * 280_000, {str(i): i for i in range(999_000)}):
        assert cross(value) == value
    with pytest.raises(child.NotData, match="items"):
        child.encode([[]] * 1_000_001, LIMIT)
    deep: typing.Any = np.zeros(3)
    for level in range(child.MAX_DEPTH):
        deep = (deep,) if level % 2 else {1: deep}
    got = cross(deep)
    for level in reversed(range(child.MAX_DEPTH)):
        got = got[0] if level % 2 else got[1]
    assert got.shape == (3,)
    with pytest.raises(child.NotData, match="deeper than 100"):
        child.encode((deep,), LIMIT)


def test_subclasses_travel_as_what_they_are_built_on() -> None:
    ordered = collections.OrderedDict(a=1, b=2)
    ordered.move_to_end("a")
    assert list(cross(ordered)) == ["b", "a"]
    assert type(cross(ordered)) is dict
    assert cross(collections.defaultdict(list, x=[1])) == {"x": [1]}
    assert cross(collections.Counter("aab")) == {"a": 2, "b": 1}
    assert cross(Text("truth")) == "truth"
    assert type(cross(Text("truth"))) is str
    assert cross({Text("key"): Text("value")}) == {"key": "value"}
    assert cross(Pair(1, "x")) == (1, "x")
    assert type(cross(Pair(1, "x"))) is tuple


def test_enums_travel_by_value() -> None:
    assert cross([Color.RED, Color.PAIR, Level.HIGH, Access.READ | Access.WRITE]) == ["red", (1, 2), 7, 3]
    assert cross({Color.RED: 1}) == {"red": 1}


def test_keys_that_become_the_same_data_are_refused_in_the_child() -> None:
    with pytest.raises(child.NotData, match="become the same data"):
        child.encode({Color.RED: 1, "red": 2}, LIMIT)
    frozen = dataclasses.make_dataclass("Frozen", ["x"], frozen=True)
    with pytest.raises(child.NotData, match="cannot be a key"):
        child.encode({frozen(1): 2}, LIMIT)


def test_memoryviews_arrive_as_bytes() -> None:
    assert cross(memoryview(b"abc")) == b"abc"
    assert cross(memoryview(b"abcdef")[::2]) == b"ace"
    assert cross(memoryview(np.arange(4, dtype="i4"))) == np.arange(4, dtype="i4").tobytes()


def test_other_tzinfo_classes_travel_as_their_offset() -> None:
    class Plus2(datetime.tzinfo):
        def utcoffset(self, moment: datetime.datetime | None) -> datetime.timedelta:
            return datetime.timedelta(hours=2)

    moment = datetime.datetime(2024, 5, 5, tzinfo=Plus2())
    assert cross(moment) == moment
    assert cross(moment).utcoffset() == datetime.timedelta(hours=2)


ARRAYS = [
    np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(10)[::2], np.array(5.0),
    np.zeros((0, 3)), np.zeros((3, 0, 2), "i1"), np.array(["a", "bb", "ä😀"]), np.array([b"a", b"bcd"]),
    np.array([True, False]), np.array([1, 2], "u2"), np.arange(3, dtype=">f8"), np.array([1.5], "f2"),
    np.array([1 + 2j], "c8"), np.array([1], np.longdouble), np.array(["2020", "NaT"], "M8[ns]"), np.array([5], "m8[D]"),
    np.array([5], "m8"), np.random.default_rng(1).random((64, 64)), np.array([["2020-01-01"]], "M8[25s]"),
]  # fmt: skip


MIXED = np.array([(1, 2.5, "ab", True), (2, 3.5, "ü", False)], [("a", "i4"), ("b", ">f8"), ("c", "U3"), ("d", "?")])
RECORDS = (
    MIXED, MIXED[::-1], MIXED[["a", "d"]], MIXED[:0], np.zeros((2, 3), MIXED.dtype), np.array((1, 2), "i4,f8"),
    np.zeros(3, np.dtype([("a", "i1"), ("b", "f8")], align=True)), np.arange(12.0).view([("m", "f8", (2, 3))]),
    np.zeros(2, [("p", [("x", "f4"), ("y", "M8[s]")]), ("q", "m8[D]", 2)]), np.zeros(1, [("$", "S2"), ("ü\ud800", "S0")]),
    np.ones(2, {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [4, 0], "itemsize": 10}),
    np.zeros(1, ",".join(["i1"] * 1000)),
)  # fmt: skip


@pytest.mark.parametrize("array", RECORDS, ids=lambda array: str(array.dtype)[:60])
def test_records_arrive_as_they_were(array: typing.Any) -> None:
    got = cross(array)
    assert (got.dtype, got.shape, got.flags.writeable) == (array.dtype, array.shape, True)
    assert repr(got.tolist()) == repr(array.tolist())
    if array.size:
        one = cross([array.reshape(-1)[0]])[0]
        assert (type(one), one.dtype, str(one)) == (np.void, array.dtype, str(array.reshape(-1)[0]))


def test_a_record_is_no_key() -> None:
    text, buffers = child.encode({"a": np.zeros(1, "i4,i4")[0]}, LIMIT)
    assert not buffers
    assert isinstance(serializer.decode(text, [])["a"], np.void)
    one = np.zeros(1, "i4,i4")
    one.flags.writeable = False
    with pytest.raises(child.NotData, match="cannot be a key"):
        child.encode({one[0]}, LIMIT)


def test_what_records_say_of_themselves_is_counted() -> None:
    """The child never counts less than the host does."""
    walk = child.Walk(LIMIT)
    text, _buffers = walk.run([np.zeros(1, [(f"f{n}", "i1", (1, 1)) for n in range(900)])] * 3)
    assert text.count(b"[") + text.count(b"{") + text.count(b",") <= walk.items


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}-{array.shape}")
def test_arrays_arrive_as_owned_writable_copies(array: typing.Any) -> None:
    got = cross({"array": array})["array"]
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(got, array)
    assert got.flags.owndata
    assert got.flags.writeable


SCALARS = [
    np.float64(1.5), np.float32("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(False), np.str_(""), np.str_("ä"),
    np.bytes_(b""), np.bytes_(b"ab"), np.complex64(1j), np.datetime64("2020-01-01"), np.timedelta64(5, "s"),
    np.datetime64("NaT"),
]  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS, ids=repr)
def test_numpy_scalars_arrive_as_they_were(scalar: typing.Any) -> None:
    got = cross(scalar)
    assert type(got) is type(scalar)
    assert got.dtype == scalar.dtype
    assert got == scalar or got != got


def test_a_large_array_is_not_copied_in_the_child() -> None:
    array = np.arange(1 << 20, dtype="f8")
    _, buffers = child.encode(array, LIMIT)
    assert np.shares_memory(np.frombuffer(buffers[0], "u1"), array)


def test_many_small_buffers_are_bounded() -> None:
    value = [bytes([i % 256]) * 600 for i in range(1500)]
    text, buffers = child.encode(value, LIMIT)
    assert len(buffers) == child.MAX_BUFFERS
    assert serializer.decode(text, buffers) == value


class Owner:
    pass


class Lying:
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return dict


class EvilMeta(type):
    def __getattr__(cls, name: str) -> typing.Any:
        return {"x": 1}

    __module__ = property(lambda cls: 1 / 0)  # type: ignore[assignment]


class Evil(metaclass=EvilMeta):
    pass


ITSELF: list[typing.Any] = []
ITSELF.append({"again": ITSELF})
NAT = type("NaT", (datetime.datetime,), {"isoformat": lambda self: "NaT"})(1, 1, 1)
MASKED = np.ma.masked_array([1, 2], [True, False])
NOT_DATA = [
    ({"rows": [0, 1, {"owner": Owner()}]}, r"result\['rows'\]\[2\]\['owner'\]: <class '.*Owner'> is not data"),
    (Point(1.0, Owner()), r"result\.y: <class '.*Owner'> is not data; return plain data .* create_object.*pickle"),
    ((1, {"k": {Owner: 1}}), r"result\[1\]\['k'\]\{key\}: <class 'type'> is not data"),
    (lambda: 1, "<class 'function'> is not data"), (iter([]), "is not data"), (range(3), "is not data"),
    (Lying(), "Lying'> is not data"), (Evil(), "is not data|None"),
    (ITSELF, "deeper than 100 levels, or it contains itself"),
    (np.array([object()]), "dtype 'object' is not data"), (np.zeros(2, [("a", "O")]), "dtype 'object' is not data"),
    (np.zeros(2, "V3"), "dtype .* is not data"), (np.zeros(2, [(("t", "a"), "i4")]), "dtype .* is not data"),
    (np.zeros(1, {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]}), "dtype .* is not data"),
    (np.zeros(2, []), "dtype .* is not data"), (np.zeros(1, ",".join(["i1"] * 1001)), "dtype .* is not data"),
    (MASKED, "may say more than an array can hold"), (NAT, "more than a datetime can hold"),
    (decimal.Decimal("1" * 10_001), "10001 characters is too long"),
    (ValueError("x"), "is not data"), (..., "is not data"), (pickle, "<class 'module'> is not data"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), NOT_DATA, ids=[message[:30] for _, message in NOT_DATA])
def test_what_is_not_data_is_named_with_its_place(value: object, message: str) -> None:
    with pytest.raises((child.NotData, AttributeError)) as caught:
        child.encode(value, LIMIT)
    assert re.search(message, str(caught.value)) or type(value) is Evil
    assert len(str(caught.value)) < 700


def test_overridden_methods_cannot_change_what_is_sent() -> None:
    class List(list):  # type: ignore[type-arg]
        def __iter__(self) -> typing.Any:
            return iter(["lie"])

        def __len__(self) -> int:
            return 10**9

    class Dict(dict):  # type: ignore[type-arg]
        def items(self) -> typing.Any:
            return [("lie", 1)]

        __iter__ = keys = items

    class Int(int):
        __int__ = __index__ = __pos__ = lambda self: 13

    assert cross(List([1, 2])) == [1, 2]
    assert cross(Dict(a=1)) == {"a": 1}
    assert cross([Int(7)]) == [7]


def test_what_the_users_own_property_raises_comes_out_as_it_is() -> None:
    @dataclasses.dataclass
    class Moody:
        x: int

        def __getattribute__(self, name: str) -> typing.Any:
            if name == "x":
                raise ZeroDivisionError("mood")
            return object.__getattribute__(self, name)

    with pytest.raises(ZeroDivisionError, match="mood"):
        child.encode([Moody(1)], LIMIT)


def test_a_result_larger_than_its_limit_names_the_limit() -> None:
    for value in ("x" * 2000, ["x" * 2000], (b"x" * 2000,), np.zeros(2000), memoryview(bytes(2000))):
        with pytest.raises(child.NotData, match=r"more than Limits\.result \(1000\)"):
            child.encode(value, 1000)


def test_too_many_items_are_refused_in_the_child() -> None:
    with pytest.raises(child.NotData, match="more than 2000000 items"):
        child.encode([0] * 2_000_001, LIMIT)
    inner = [0] * 1000
    with pytest.raises(child.NotData, match="items"):
        child.encode([[inner] * 1000] * 1000, LIMIT)  # a thousand million items in three lists


# What the child's side costs and needs


def test_the_childs_side_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pihost.inside import encode, raised\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'__main__'}))\n"
        "print(*sorted({'dataclasses', 'datetime', 'inspect', 'typing', 'traceback', 'logging'} & set(sys.modules)))\n"
    )
    root = str(INSIDE.parent.parent)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, root], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["pihost", ""]


@pytest.mark.parametrize("name", ["encode", "writers", "raised"])
def test_the_childs_side_is_python_3_9(name: str) -> None:
    ast.parse((INSIDE / f"{name}.py").read_text(), feature_version=(3, 9))
