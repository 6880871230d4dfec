"""Values from a child to the host: what is data arrives as it was, and hostile bytes are only ever refused."""

from __future__ import annotations

import ast
import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import pickle
import random
import re
import subprocess
import sys
import time
import typing
import uuid
import zoneinfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pihost.inside import encode as child
from pisupervisor.errors import ProtocolError, SerializationError
from pisupervisor.link import serializer

LIMIT = 64 << 20
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
INSIDE = pathlib.Path(child.__file__).parent


def cross(value: object, returns: object = None) -> typing.Any:
    text, buffers = child.encode(value, LIMIT)
    text.decode("ascii")
    built = serializer.decode(text, [memoryview(bytes(buffer)) for buffer in buffers])
    return built if returns is None else serializer.build(built, returns)


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
    {1: "a", None: 2, 2.5: 3, (1, ("x", b"y")): 4, frozenset({1}): 5, True: 6} , {"\ud800": 1}, (1, (2, [3, {4}])),
    {1, "1", (1,), None}, frozenset({frozenset({1}), 2}), 3 + 4j, complex(-0.0, math.inf), decimal.Decimal("1.50"),
    decimal.Decimal("-0"), decimal.Decimal("1E+999999"), decimal.Decimal("Infinity"), decimal.Decimal("1e-9"),
    uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), pathlib.Path("/a/b c"), pathlib.Path("x\udcff"),
    pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\x"), datetime.date(1, 1, 1), datetime.date(9999, 12, 31),
    datetime.datetime(2024, 1, 2, 3, 4, 5, 6), datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.time(1, 2),
    datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone(-datetime.timedelta(hours=3, seconds=7))),
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN), datetime.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    datetime.time(23, 59, 59, 999999, tzinfo=BERLIN), datetime.time(1, tzinfo=datetime.UTC), datetime.timedelta(0),
    datetime.timedelta(-1, 5, 6), datetime.timedelta.max, datetime.timedelta.min, [1] * 10_000, {str(i): i for i in range(999)},
]  # fmt: skip


@pytest.mark.parametrize("value", UNCHANGED, ids=lambda value: f"{type(value).__name__}-{str(value)[:12]!a}")
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
    with pytest.raises(child.NotData, match="cannot be a key"):
        frozen = dataclasses.make_dataclass("Frozen", ["x"], frozen=True)
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
    (Lying(), "Lying'> is not data"), (Evil(), "is not data|None"), (ITSELF, "deeper than 100 levels, or it contains itself"),
    (np.array([object()]), "dtype 'object' is not data"), (np.zeros(2, [("a", "i4")]), "dtype .* is not data"),
    (MASKED, "may say more than an array can hold"), (NAT, "more than a datetime can hold"),
    (1 << (1 << 23), "bits is too large"), (decimal.Decimal("1" * 10_001), "10001 characters is too long"),
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
    wide: list[typing.Any] = [0]
    for _ in range(60):
        wide = [wide, wide]  # 2**60 items in 60 lists
    with pytest.raises(child.NotData, match="items"):
        child.encode(wide, LIMIT)


# What a child may have done to the bytes


class Exploit:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> typing.Any:
        import os

        return os.system, (f"touch {self.path}",)


def test_pickles_from_a_child_stay_inert(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 52"""
    bait = tmp_path / "pwned"
    with pytest.raises(child.NotData, match="is not data"):
        child.encode(Exploit(bait), LIMIT)
    payload = pickle.dumps(Exploit(bait))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("the host unpickled"))
    assert cross(payload) == payload
    hostile = base64.b64encode(payload).decode()
    for tag in ("pickle", "object", "Exploit", "os.system", "dataclass", "__reduce__", "eval", None, [], {}, 1):
        with pytest.raises(ProtocolError):
            serializer.decode(tagged(tag, hostile), [])
    for dtype in ("|O8", "O", "|V8", "object", "<f8,O", "[('a','O')]", "|O"):
        with pytest.raises(ProtocolError):
            serializer.decode(tagged("array", [dtype, [1], 0]), [payload[:8]])
    with pytest.raises(ProtocolError):
        serializer.decode(payload, [])
    assert not bait.exists()


def test_only_load_pickled_unpickles() -> None:
    """parity: 52. In the code that reads what a child sends, one function calls pickle.loads, and says so."""
    folder = pathlib.Path(serializer.__file__).parent
    for name in ("serializer", "tagged", "arrays", "remote_errors"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and "pickle.loads" in ast.unparse(node):
                assert node.name == "load_pickled"


def test_load_pickled_loads_and_says_what_does_not() -> None:
    assert serializer.load_pickled(pickle.dumps({1: Point(1, 2)})) == {1: Point(1, 2)}
    with pytest.raises(SerializationError, match="does not load here"):
        serializer.load_pickled(b"cno_such_module\nX\n.")


HOSTILE = {
    "nothing": b"", "half": b"[1", "two": b"1 2", "nan": b"NaN", "infinity": b"[-Infinity]", "overflow": b"1e999",
    "nesting": b"[" * 100_000 + b"]" * 100_000, "unclosed nesting": b'{"a":' * 100_000, "quiet nesting": b"[" * 300 + b"]" * 300,
    "empty lists": b"[" + b"[]," * 2_000_000 + b"[]]", "commas": b"," * 2_000_001, "digits": b"1" * 4301,
    "zeros": b"[007]", "leading zero": b"01", "lone surrogate": b'"\\ud800"', "bad utf-8": b'"\xff"', "utf-8 surrogate": b'"\xed\xa0\x80"',
    "control": b'"a\x00b"', "number key": b"{1:2}", "tagged nesting": b'{"$":"tuple","v":[' * 5000 + b"]}" * 5000,
    "no payload": b'{"$":"tuple"}', "more members": tagged("tuple", [], more=1), "other member": b'{"$":"tuple","w":[]}',
    "not a list": tagged("tuple", {}), "text for a list": tagged("set", "abc"), "unhashable": tagged("set", [[]]),
    "unhashable key": tagged("dict", [{}, 1]), "odd dict": tagged("dict", [1]), "same key": tagged("dict", [1, 2, 1, 3]),
    "equal keys": tagged("dict", [1, 2, True, 3]), "same element": tagged("frozenset", ["a", "a"]),
    "unsure hash": tagged("set", [{"$": "decimal", "v": "sNaN"}]),
    "no buffer": tagged("bytes", 0), "minus buffer": tagged("bytes", -1), "true buffer": tagged("bytes", True),
    "bad base64": tagged("bytes", "a$=="), "text bytes": tagged("str", base64.b64encode(b"\xff").decode()),
    "hex": tagged("int", "0x10"), "spaced hex": tagged("int", " 10"), "long hex": tagged("int", "f" * ((1 << 20) + 1)),
    "underscored": tagged("int", "1_0"), "int for hex": tagged("int", 5), "float words": tagged("float", "infinity"),
    "unicode digits": tagged("float", "\u0661"), "complex": tagged("complex", [1, 2]), "complex parts": tagged("complex", ["1"]),
    "date": tagged("date", "2024-13-01"), "date by week": tagged("date", "2024-W01-1"), "loose time": tagged("time", ["0102", 0, None]),
    "fold": tagged("datetime", ["2024-01-02T00:00:00", 2, None]), "true fold": tagged("datetime", ["2024-01-02T00:00:00", True, None]),
    "zone path": tagged("time", ["01:02:00", 0, "../../etc/passwd"]), "zone root": tagged("time", ["01:02:00", 0, "/etc/passwd"]),
    "zone dots": tagged("time", ["01:02:00", 0, "Europe/../../x"]), "zone nul": tagged("time", ["01:02:00", 0, "UTC\x00"]),
    "zone number": tagged("time", ["01:02:00", 0, 5]), "zone newline": tagged("time", ["01:02:00", 0, "UTC\n"]),
    "seconds": tagged("timedelta", [0, 86400, 0]), "days": tagged("timedelta", [10**10, 0, 0]), "float days": tagged("timedelta", [1.0, 0, 0]),
    "long decimal": tagged("decimal", "1" * 10_001), "no decimal": tagged("decimal", "1__0"), "huge exponent": tagged("decimal", "1E" + "9" * 30),
    "uuid": tagged("uuid", "g" * 32), "uuid braces": tagged("uuid", "{" + "0" * 30 + "}"), "path": tagged("path", 1),
    "shape and bytes": tagged("array", ["<f8", [2], ""]), "minus shape": tagged("array", ["<f8", [-1], ""]),
    "twice minus": tagged("array", ["|u1", [-1, -1], "AA=="]), "true shape": tagged("array", ["|u1", [True], "AA=="]),
    "huge shape": tagged("array", ["|u1", [2**62], ""]), "huge product": tagged("array", ["<f8", [2**31, 2**31, 0, 2**61], ""]),
    "wrapping shape": tagged("array", ["|u1", [2**32, 2**32], ""]), "many dims": tagged("array", ["|u1", [1] * 65, "AA=="]),
    "dtype number": tagged("array", [8, [1], "AA=="]), "dtype size": tagged("array", ["<f7", [1], "AAAAAAAAAA=="]),
    "no size": tagged("array", ["<U0", [10**12], ""]), "dtype order": tagged("array", ["f8", [0], ""]),
    "dtype expression": tagged("array", ["f8,f8", [0], ""]), "dtype newline": tagged("array", ["<f8\n", [0], ""]),
    "dtype huge": tagged("array", ["|S999999999", [1], ""]), "bool of two": tagged("array", ["|b1", [1], "Ag=="]),
    "no character": tagged("array", ["<U1", [1], "/////w=="]), "scalar": tagged("scalar", ["<f8", "AA=="]),
    "scalar object": tagged("scalar", ["|O8", "AAAAAAAAAAA="]), "escaped tag": b'[{"\\u0024":"tuple","v":1},{"$":"tuple","v":1}]',
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_are_protocol_errors(text: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(ProtocolError):
        serializer.decode(text, [])
    assert time.monotonic() - started < 2


def test_buffers_are_used_exactly_once() -> None:
    twice = json.dumps([{"$": "bytes", "v": 0}, {"$": "bytes", "v": 0}]).encode()
    for text, buffers in ((twice, [b"x"]), (b"1", [b"x"]), (tagged("bytes", 0), [b"x", b"y"]), (tagged("bytes", 1), [b"x"])):
        with pytest.raises(ProtocolError, match="buffer"):
            serializer.decode(text, buffers)


def test_an_array_that_lies_about_its_buffer_is_refused_before_memory_is_taken() -> None:
    for shape in ([3], [1 << 40], [0], [1, 3], []):
        with pytest.raises(ProtocolError):
            serializer.decode(tagged("array", ["<f8", shape, 0]), [bytes(16)])
    assert serializer.decode(tagged("array", ["<f8", [2], 0]), [bytes(16)]).shape == (2,)


def test_keys_made_to_collide_are_refused_quickly() -> None:
    prime = sys.hash_info.modulus
    numbers = [{"$": "int", "v": f"{prime * i:x}"} for i in range(1, 60_000)]
    flat = [part for number in numbers for part in (number, 0)]
    started = time.monotonic()
    for text in (tagged("set", numbers), tagged("dict", flat)):
        with pytest.raises(SerializationError, match="of one hash"):
            serializer.decode(text, [])
    assert time.monotonic() - started < 5
    assert cross({1 << i for i in range(2000)}) == {1 << i for i in range(2000)}


def test_text_full_of_commas_and_brackets_is_one_item() -> None:
    table = "1,2,[3],{4}\n" * 600_000 + '"\\'
    assert cross(table) == table
    assert cross([table, {"a": 1}]) == [table, {"a": 1}]
    with pytest.raises(ProtocolError, match="items"):
        serializer.decode(b'["' + b'\\",' * 3_000_000 + b'",' + b"0," * 2_000_000 + b"0]", [])
    with pytest.raises(ProtocolError, match="items"):
        serializer.decode(b'"",' * 5_000_000, [])


def test_the_item_cap_is_a_parameter() -> None:
    assert serializer.decode(b"[1,2,3]", [], max_items=3) == [1, 2, 3]
    with pytest.raises(ProtocolError, match="more than 2 items"):
        serializer.decode(b"[1,2,3]", [], max_items=2)


def _mutated(text: bytes, dice: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        action = dice.randrange(5)
        if action == 0 and data:
            data[at % len(data)] = dice.choice(b'[]{}",:$v0123456789-eE.\\untrf\xff\x00')
        elif action == 1:
            del data[at : at + dice.randint(1, 6)]
        elif action == 2:
            data[at:at] = dice.choice([b'{"$":"tuple","v":', b"[", b"]", b"}", b",", b'"', b"9" * 25, b"null", b"true", b"-1"])
        elif action == 3:
            end = dice.randrange(len(data) + 1)
            data[at:at] = data[min(at, end) : max(at, end)]
        else:
            tags = re.findall(rb'"\$":"(\w+)"', bytes(data))
            if tags:
                data = bytearray(bytes(data).replace(dice.choice(tags), dice.choice(TAGS), 1))
    return bytes(data)


TAGS = [
    b"tuple", b"set", b"dict", b"bytes", b"str", b"int", b"float", b"complex", b"datetime", b"time", b"date", b"timedelta",
    b"decimal", b"uuid", b"path", b"array", b"scalar",
]  # fmt: skip


def test_mutated_texts_only_ever_raise_our_errors() -> None:
    dice = random.Random(20240229)
    values = [value for value in UNCHANGED if len(str(value)[:3000]) < 2000] + [[a] for a in ARRAYS[:-1]] + SCALARS
    seeds = [child.encode(value, LIMIT) for value in values]
    seeds += [child.encode(values[i : i + 4], LIMIT) for i in range(len(values) - 4)]
    refused = 0
    for _ in range(20_000):
        text, buffers = dice.choice(seeds)
        kept = [bytes(buffer) for buffer in buffers] if dice.random() < 0.9 else [b"x" * 8]
        try:
            serializer.decode(_mutated(text, dice), kept)
        except (ProtocolError, SerializationError):
            refused += 1
    assert 8_000 < refused < 20_000


def test_an_unknown_zone_is_no_breach_of_the_protocol() -> None:
    for name in ("Mars/Olympus", "America", "leapseconds"):
        with pytest.raises(SerializationError, match="not known on the host"):
            serializer.decode(tagged("time", ["01:02:00", 0, name]), [])


def test_a_host_without_numpy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text, buffers = child.encode(np.zeros(3), LIMIT)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SerializationError, match="pip install numpy") as caught:
        serializer.decode(text, buffers)
    assert caught.value.direction == "from child"


# returns=


def test_returns_builds_and_checks() -> None:
    shape = Shape([Point(1, 2), Point(3, 4, "x")], Size.SMALL, datetime.datetime.now(BERLIN), pathlib.Path("/a"), 2j, b"xy")
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
    assert serializer.build([1], typing.Any) == [1]


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
    with pytest.raises(SerializationError, match="cannot be built|is not a"):
        cross({"a": 1}, "not a type")


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
