"""What a child may have done to the bytes of a result: hostile data is refused, quickly, and never executed."""

from __future__ import annotations

import ast
import base64
import dataclasses
import enum
import json
import pathlib
import pickle
import random
import re
import sys
import time
import traceback
import typing
from decimal import Decimal

import msgspec
import numpy as np
import pytest
from test_values import ARRAYS, LIMIT, SCALARS, UNCHANGED, Point, cross

from pihost.inside import encode as child
from pisupervisor.errors import ProtocolError, SerializationError
from pisupervisor.link import returns as returning, serializer
from pisupervisor.link.keys import Keys


def tagged(tag: object, payload: object, **more: object) -> bytes:
    return json.dumps({"$": tag, "v": payload, **more}).encode()


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
    "nothing": b"",
    "half": b"[1",
    "two": b"1 2",
    "nan": b"NaN",
    "infinity": b"[-Infinity]",
    "overflow": b"1e999",
    "nesting": b"[" * 100_000 + b"]" * 100_000,
    "unclosed nesting": b'{"a":' * 100_000,
    "quiet nesting": b"[" * 300 + b"]" * 300,
    "empty lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "commas": b"," * 2_000_001,
    "digits": b"1" * 4301,
    "zeros": b"[007]",
    "leading zero": b"01",
    "lone surrogate": b'"\\ud800"',
    "bad utf-8": b'"\xff"',
    "utf-8 surrogate": b'"\xed\xa0\x80"',
    "control": b'"a\x00b"',
    "number key": b"{1:2}",
    "tagged nesting": b'{"$":"tuple","v":[' * 5000 + b"]}" * 5000,
    "no payload": b'{"$":"tuple"}',
    "more members": tagged("tuple", [], more=1),
    "other member": b'{"$":"tuple","w":[]}',
    "not a list": tagged("tuple", {}),
    "text for a list": tagged("set", "abc"),
    "unhashable": tagged("set", [[]]),
    "unhashable key": tagged("dict", [{}, 1]),
    "odd dict": tagged("dict", [1]),
    "same key": tagged("dict", [1, 2, 1, 3]),
    "equal keys": tagged("dict", [1, 2, True, 3]),
    "same element": tagged("frozenset", ["a", "a"]),
    "unsure hash": tagged("set", [{"$": "decimal", "v": "sNaN"}]),
    "no buffer": tagged("bytes", 0),
    "minus buffer": tagged("bytes", -1),
    "true buffer": tagged("bytes", True),
    "bad base64": tagged("bytes", "a$=="),
    "text bytes": tagged("str", base64.b64encode(b"\xff").decode()),
    "hex": tagged("int", "0x10"),
    "spaced hex": tagged("int", " 10"),
    "underscored": tagged("int", "1_0"),
    "int for hex": tagged("int", 5),
    "float words": tagged("float", "infinity"),
    "unicode digits": tagged("float", "\u0661"),
    "complex": tagged("complex", [1, 2]),
    "complex parts": tagged("complex", ["1"]),
    "date": tagged("date", "2024-13-01"),
    "date by week": tagged("date", "2024-W01-1"),
    "loose time": tagged("time", ["0102", 0, None]),
    "fold": tagged("datetime", ["2024-01-02T00:00:00", 2, None]),
    "true fold": tagged("datetime", ["2024-01-02T00:00:00", True, None]),
    "zone path": tagged("time", ["01:02:00", 0, "../../etc/passwd"]),
    "zone root": tagged("time", ["01:02:00", 0, "/etc/passwd"]),
    "zone dots": tagged("time", ["01:02:00", 0, "Europe/../../x"]),
    "zone nul": tagged("time", ["01:02:00", 0, "UTC\x00"]),
    "zone number": tagged("time", ["01:02:00", 0, 5]),
    "zone newline": tagged("time", ["01:02:00", 0, "UTC\n"]),
    "seconds": tagged("timedelta", [0, 86400, 0]),
    "days": tagged("timedelta", [10**10, 0, 0]),
    "float days": tagged("timedelta", [1.0, 0, 0]),
    "long decimal": tagged("decimal", "1" * 10_001),
    "no decimal": tagged("decimal", "1__0"),
    "huge exponent": tagged("decimal", "1E" + "9" * 30),
    "uuid": tagged("uuid", "g" * 32),
    "uuid braces": tagged("uuid", "{" + "0" * 30 + "}"),
    "path": tagged("path", 1),
    "shape and bytes": tagged("array", ["<f8", [2], ""]),
    "minus shape": tagged("array", ["<f8", [-1], ""]),
    "twice minus": tagged("array", ["|u1", [-1, -1], "AA=="]),
    "true shape": tagged("array", ["|u1", [True], "AA=="]),
    "huge shape": tagged("array", ["|u1", [2**62], ""]),
    "huge product": tagged("array", ["<f8", [2**31, 2**31, 0, 2**61], ""]),
    "wrapping shape": tagged("array", ["|u1", [2**32, 2**32], ""]),
    "many dims": tagged("array", ["|u1", [1] * 65, "AA=="]),
    "dtype number": tagged("array", [8, [1], "AA=="]),
    "dtype size": tagged("array", ["<f7", [1], "AAAAAAAAAA=="]),
    "no size": tagged("array", ["<U0", [10**12], ""]),
    "dtype order": tagged("array", ["f8", [0], ""]),
    "dtype expression": tagged("array", ["f8,f8", [0], ""]),
    "dtype of nothing": tagged("array", ["<M8[0s]", [1], "AAAAAAAAAAA="]),  # whose repr is an OverflowError
    "dtype newline": tagged("array", ["<f8\n", [0], ""]),
    "dtype huge": tagged("array", ["|S999999999", [1], ""]),
    "bool of two": tagged("array", ["|b1", [1], "Ag=="]),
    "no character": tagged("array", ["<U1", [1], "/////w=="]),
    "records of nothing": tagged("array", [[1, []], [1], "AA=="]),
    "records without fields": tagged("array", [[1], [1], "AA=="]),
    "records by text": tagged("array", [["1", [["a", "|u1", [], 0]]], [1], "AA=="]),
    "records too small": tagged("array", [[1, [["a", "<u2", [], 0]]], [1], "AA=="]),
    "records too large": tagged("array", [[1 << 31, [["a", "|u1", [], 0]]], [0], ""]),
    "fields upon each other": tagged("array", [[2, [["a", "|u1", [], 0], ["b", "|u1", [], 0]]], [1], "AAA="]),
    "fields of one name": tagged("array", [[2, [["a", "|u1", [], 0], ["a", "|u1", [], 1]]], [1], "AAA="]),
    "a field before": tagged("array", [[2, [["a", "|u1", [], -1]]], [1], "AAA="]),
    "a field of three": tagged("array", [[1, [["a", "|u1", []]]], [1], "AA=="]),
    "a field of objects": tagged("array", [[8, [["a", "|O8", [], 0]]], [1], "AAAAAAAAAAA="]),
    "a field's name": tagged("array", [[1, [[1, "|u1", [], 0]]], [1], "AA=="]),
    "a field's shape": tagged("array", [[8, [["a", "|u1", [2**31, 2**31, 4], 0]]], [1], "AAAAAAAAAAA="]),
    "a bool in records": tagged("array", [[2, [["a", "|u1", [], 0], ["b", "|b1", [], 1]]], [1], "AAI="]),
    "no character in records": tagged("array", [[5, [["a", "|u1", [], 0], ["b", "<U1", [], 1]]], [1], "AP////8="]),
    "many fields": tagged("array", [[1001, [[str(n), "|u1", [], n] for n in range(1001)]], [0], ""]),
    "many fields in all": tagged(
        "array",
        [
            [
                60000,
                [[str(n), [1000, [[f"{n}.{m}", "|b1", [], m] for m in range(1000)]], [], 1000 * n] for n in range(60)],
            ],
            [0],
            "",
        ],
    ),
    "other fields each": tagged(
        "tuple",
        [
            {
                "$": "scalar",
                "v": [
                    [1000, [[f"{n}.{m}", "|b1", [], m] for m in range(1000)]],
                    base64.b64encode(bytes(1000)).decode(),
                ],
            }
            for n in range(60)
        ],
    ),
    "scalar": tagged("scalar", ["<f8", "AA=="]),
    "scalar object": tagged("scalar", ["|O8", "AAAAAAAAAAA="]),
    "escaped tag": b'[{"\\u0024":"tuple","v":1},{"$":"tuple","v":1}]',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_are_protocol_errors(text: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(ProtocolError):
        serializer.decode(text, [])
    assert time.monotonic() - started < 2


def test_records_of_one_kind_are_described_once() -> None:
    """Each comes with its description, which costs next to nothing when it is known: twenty thousand of them are no attack."""
    kind = [9, [["a", "<f8", [], 0], ["b", "|b1", [], 8]]]
    one = {"$": "scalar", "v": [kind, base64.b64encode(b"\0" * 9).decode()]}
    assert len(serializer.decode(json.dumps([one] * 20_000).encode(), [])) == 20_000


def test_buffers_are_used_exactly_once() -> None:
    twice = json.dumps([{"$": "bytes", "v": 0}, {"$": "bytes", "v": 0}]).encode()
    for text, buffers in (
        (twice, [b"x"]),
        (b"1", [b"x"]),
        (tagged("bytes", 0), [b"x", b"y"]),
        (tagged("bytes", 1), [b"x"]),
    ):
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


def _keys_that_walk(bits: int, count: int) -> list[int]:
    """Whole numbers, the last ``count`` of which go past most of the others in a dict of 2**bits places: those lie one after
    the other on the way that the interpreter looks for a free one (i = 5 * i + 1 + what is left of the hash).
    """
    mask, filled = (1 << bits) - 1, (1 << bits) * 3 // 5
    way, place = np.empty(filled, np.int64), 0
    for step in range(filled):
        way[step], place = place, (place * 5 + 1) & mask
    steps = np.full(mask + 1, -1)
    steps[way] = np.arange(filled)
    dice, found = np.random.default_rng(1), [*way.tolist()]
    while len(found) < filled + count:
        keys = dice.integers(0, 1 << 60, 1 << 20)
        places, rests = keys & mask, keys.copy()
        for _ in range(13):
            taken = steps[places] >= 0
            keys, places, rests = keys[taken], places[taken], rests[taken] >> 5
            places = (places * 5 + rests + 1) & mask
        found += keys[(steps[places] >= 0) & (steps[places] < filled // 4)].tolist()
    return found[: filled + count]


def test_keys_that_take_long_to_insert_are_refused() -> None:
    """None of one hash. Measured: 70,000 of them behind 630,000 others, in 7 MB, took 6 minutes."""
    keys = _keys_that_walk(18, 3000)
    with pytest.raises(SerializationError, match="too long to insert"):
        Keys(spare=0.1).dict_of(keys, keys)
    honest = [*keys[:-3000], *range(1 << 40, (1 << 40) + 3000)]
    assert Keys(spare=0.1).dict_of(honest, honest) == dict(zip(honest, honest, strict=True))
    assert Keys(spare=0.1).set_of(honest) == set(honest)


def test_numbers_of_one_hash_that_take_long_to_compare_are_refused() -> None:
    """A Decimal and a whole number are compared in the square of its length: 4 MB take 7 minutes."""
    five = {"$": "decimal", "v": "5"}
    large = {"$": "int", "v": f"{5 + (sys.hash_info.modulus << 1_000_000):x}"}
    inside = [{"$": "tuple", "v": [{"$": "frozenset", "v": [number]}]} for number in (five, large)]
    for text in (tagged("set", [five, large]), tagged("dict", [large, 0, five, 0]), tagged("frozenset", inside)):
        with pytest.raises(SerializationError, match="of one hash"):
            serializer.decode(text, [])
    with pytest.raises(SerializationError, match="of one hash"):
        returning.build(serializer.decode(json.dumps(large).encode(), []), Price)
    for both in ({Decimal(5), 5 + (sys.hash_info.modulus << 400)}, {Decimal(5), 1 << 10_000, ("a", Decimal(5))}):
        assert cross(both) == both
    assert returning.build(Decimal(5), Price) is Price.LOW


@dataclasses.dataclass
class Basket:
    numbers: set[int]
    prices: set[int | Decimal]


@dataclasses.dataclass
class Bag:
    inner: Basket
    price: Price
    more: list[Bag]


def test_sets_made_of_lists_are_no_way_around_that() -> None:
    """``returns=set[int]`` takes a list, too."""
    prime = sys.hash_info.modulus
    many = [prime * number for number in range(1, 80_000)]
    few = [Decimal(5), 5 + (prime << 1_000_000)]
    for value, wanted in (
        (many, set[int]), ([[number, 1] for number in many], frozenset[tuple[int, int]]), ([few] * 3, list[set[int | Decimal]]),
        ({"numbers": many, "prices": []}, Basket), ({"numbers": [], "prices": few}, Basket),
        ({"price": "", "inner": {"numbers": many, "prices": []}, "more": []}, Bag), ({"/a": many}, dict[pathlib.Path, set[int]]),
        ({"more": [{"price": "", "inner": {"numbers": [], "prices": few}, "more": []}]}, Bag),
    ):  # fmt: skip
        with pytest.raises(SerializationError, match=r"too long to insert|of one hash"):
            returning.build(value, wanted)
    assert returning.build([0] * 100_000 + [*range(100_000)], set[int]) == set(range(100_000))
    assert returning.build(many, list[int]) == many


def test_an_error_of_what_was_to_be_built_cannot_steer_a_terminal() -> None:
    class Strict(msgspec.Struct, forbid_unknown_fields=True):
        x: int

    with pytest.raises(SerializationError) as caught:
        returning.build({"\x1b[2J" + "x" * 100_000: 1}, Strict)
    told = "".join(traceback.format_exception(caught.value))
    assert "\x1b" not in told
    assert "\\x1b[2J" in told
    assert len(told) < 10_000


class Price(enum.Enum):
    LOW = Decimal(5)
    NONE = ""


def test_numbers_that_a_type_cannot_take_are_an_error_of_ours() -> None:
    for value, wanted in ((1 << 5000, complex), (Decimal("sNaN"), Price)):
        with pytest.raises(SerializationError):
            returning.build(value, wanted)


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
            data[at:at] = dice.choice(
                [b'{"$":"tuple","v":', b"[", b"]", b"}", b",", b'"', b"9" * 25, b"null", b"true", b"-1"]
            )
        elif action == 3:
            end = dice.randrange(len(data) + 1)
            data[at:at] = data[min(at, end) : max(at, end)]
        else:
            tags = re.findall(rb'"\$":"(\w+)"', bytes(data))
            if tags:
                data = bytearray(bytes(data).replace(dice.choice(tags), dice.choice(TAGS), 1))
    return bytes(data)


TAGS = [
    b"tuple", b"set", b"dict", b"bytes", b"str", b"int", b"float", b"complex", b"datetime", b"time", b"date",
    b"timedelta", b"decimal", b"uuid", b"path", b"array", b"scalar",
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


def test_counting_past_strings_agrees_with_the_decoded_value() -> None:
    dice = random.Random(7)
    pieces = ['"', "\\", ",", "[", "{", "ä", "x" * 50]
    for _ in range(300):
        texts = ["".join(dice.choices(pieces, k=dice.randrange(40))) for _ in range(dice.randrange(1, 30))]
        count = len(texts)  # one bracket, and a comma between two each
        text = json.dumps(texts, separators=(",", ":")).encode()
        assert serializer.decode(text, [], max_items=count) == texts
        with pytest.raises(ProtocolError, match="items"):
            serializer.decode(text, [], max_items=count - 1)


def test_counting_past_strings_works_across_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 2, 3, 7):
        monkeypatch.setattr(serializer, "_CHUNK", chunk)
        test_counting_past_strings_agrees_with_the_decoded_value()
