"""Objects of the application's own types come back by their codecs, and whole results by its own serializer."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, write

from pisupervisor import (
    IsolationOptions,
    LaunchError,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    SerializationError,
    Serializer,
    TypeCodec,
)
from pisupervisor.link import serializer
from pisupervisor.link.reader import Reader


class Money:
    def __init__(self, amount: Any, currency: str) -> None:
        self.amount, self.currency = amount, currency

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and (self.amount, self.currency) == (other.amount, other.currency)

    __hash__ = None  # type: ignore[assignment]


class Tip(Money):
    pass


@dataclass
class Point:
    x: int
    y: int


def to_money(data: Any) -> Money:
    amount, currency = data
    if currency not in ("EUR", "USD"):
        raise ValueError(f"no currency: {currency}")
    return Money(amount, currency)


MONEY = TypeCodec(type=Money, encode=lambda money: [money.amount, money.currency], decode=to_money)
FRACTION = TypeCodec(type=Fraction, encode=str, decode=Fraction)


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with nothing_left(), ProcessIsolator.create(types=[MONEY, FRACTION]) as isolator:
        yield isolator


@linux
def test_they_come_back_wherever_they_stand(isolator: ProcessIsolator) -> None:
    assert isolator.invoke(lambda: Money(3, "EUR")) == Money(3, "EUR")
    value = isolator.invoke(lambda: {"a": [Money(Fraction(1, 3), "EUR")], "b": (Tip(2, "USD"), Fraction(2))})
    assert value == {"a": [Money(Fraction(1, 3), "EUR")], "b": (Money(2, "USD"), Fraction(2))}
    assert type(value["b"][0]) is Money, "what is derived from it and has no codec is what it is derived from"


@linux
def test_in_streams_callbacks_and_output_and_after_a_restart(isolator: ProcessIsolator) -> None:
    def pay() -> Iterator[Money]:
        import pihost

        yield pihost.call_host("rate", Money(1, "EUR"))
        yield Money(2, "USD")

    isolator.register_callback("rate", lambda money: money.amount)
    assert list(isolator.invoke(pay)) == [1, Money(2, "USD")]
    isolator.restart()
    assert isolator.execute(lambda: Money(1, "EUR")).value == Money(1, "EUR")


@linux
def test_a_codec_that_the_child_finds_itself(tmp_path: Path) -> None:
    plugin = write(tmp_path, "plugin.py", """\
        class Price:
            def __init__(self, cents): self.cents = cents
        def to_data(price): return {"cents": price.cents}
        def make(cents): return [Price(cents)]
        """)  # fmt: skip
    codec = TypeCodec(type=f"{plugin}:Price", encode=f"{plugin}:to_data", decode=lambda data: ("price", data["cents"]))
    by_name = TypeCodec(type="fractions:Fraction", encode="operator:attrgetter", decode=str)
    with ProcessIsolator.create(types=[codec]) as isolator:
        assert isolator.invoke_method(plugin, "make", 5) == [("price", 5)]
    with ProcessIsolator.create(types=[by_name]) as isolator, pytest.raises(TypeError):  # attrgetter takes text alone
        isolator.invoke(lambda: Fraction(1))


@linux
def test_the_nearest_class_decides(isolator: ProcessIsolator) -> None:
    tip = TypeCodec(type=Tip, encode=lambda tip: tip.amount, decode=lambda amount: Tip(amount, "EUR"))
    with ProcessIsolator.create(types=[MONEY, tip]) as both:
        assert [type(each) for each in both.invoke(lambda: [Tip(1, "EUR"), Money(1, "EUR")])] == [Tip, Money]


@linux
def test_a_dataclass_with_a_codec_is_no_dict(isolator: ProcessIsolator) -> None:
    codec = TypeCodec(type=Point, encode=lambda point: (point.x, point.y), decode=lambda data: Point(*data))
    with ProcessIsolator.create(types=[codec]) as own:
        assert own.invoke(lambda: Point(1, 2)) == Point(1, 2)
        assert own.invoke(lambda: Point(1, 2), returns=Point) == Point(1, 2)
        assert own.invoke(lambda: {"a": [Point(1, 2)]}, returns=dict[str, list[Point]]) == {"a": [Point(1, 2)]}
        with pytest.raises(SerializationError, match="is not a"):
            own.invoke(lambda: Point(1, 2), returns=int)
    assert isolator.invoke(lambda: Point(1, 2)) == {"x": 1, "y": 2}
    assert isolator.invoke(lambda: [Money(1, "EUR")], returns=list[Money]) == [Money(1, "EUR")]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@linux
def test_a_decoder_that_raises_fails_the_call_alone(isolator: ProcessIsolator) -> None:
    pid = isolator.pid
    with pytest.raises(SerializationError, match="ValueError: no currency: XXX") as caught:
        isolator.invoke(lambda: Money(1, "XXX"))
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.direction == "from child"
    assert isolator.pid == pid


@linux
def test_a_decoder_that_raises_fails_a_callback_alone(
    isolator: ProcessIsolator, caplog: pytest.LogCaptureFixture
) -> None:
    def pay(currency: str) -> str:
        import pihost

        try:
            return str(pihost.call_host("currency", [Money(1, currency)]))
        except pihost.HostError as error:
            return f"refused: {error}"

    isolator.register_callback("currency", lambda paid: paid[0].currency)
    with caplog.at_level(logging.ERROR, "pisupervisor"):
        assert isolator.invoke(pay, "XXX") == "refused: the host cannot read these arguments"
    assert "no currency: XXX" in caplog.text
    assert isolator.invoke(pay, "EUR") == "EUR"


@linux
def test_an_encoder_that_raises_is_user_code_that_raises() -> None:
    with ProcessIsolator.create(types=[TypeCodec(type=Money, encode=lambda money: 1 / 0, decode=to_money)]) as isolator:
        with pytest.raises(ZeroDivisionError) as caught:
            isolator.invoke(lambda: Money(1, "EUR"))
        assert isinstance(caught.value, RemoteError)


@linux
def test_an_encoder_that_makes_no_data() -> None:
    itself = TypeCodec(type=Money, encode=lambda money: money, decode=to_money)
    nothing = TypeCodec(type=Fraction, encode=lambda fraction: object(), decode=Fraction)
    with ProcessIsolator.create(types=[itself, nothing]) as isolator:
        with pytest.raises(SerializationError, match="nested deeper"):
            isolator.invoke(lambda: Money(1, "EUR"))
        with pytest.raises(SerializationError, match=r"fractions\.Fraction: <class 'object'> is not data"):
            isolator.invoke(lambda: [Fraction(1)])


@linux
def test_as_keys_they_are_refused(isolator: ProcessIsolator) -> None:
    for make in (lambda: {Fraction(1)}, lambda: {(Fraction(1), 2): 3}):
        with pytest.raises(SerializationError, match="cannot be a key or an element"):
            isolator.invoke(make)


@linux
def test_without_a_codec_it_is_no_data() -> None:
    with ProcessIsolator.create() as isolator, pytest.raises(SerializationError, match="is not data"):
        isolator.invoke(lambda: Money(1, "EUR"))


@linux
def test_what_cannot_be_taught_is_no_isolator(tmp_path: Path) -> None:
    plugin = write(tmp_path, "plugin.py", "class Price: pass\nvalue = 3\n")
    with nothing_left():
        for target in ("Nothing", "value"):
            codec = TypeCodec(type=f"{plugin}:{target}", encode=str, decode=str)
            with pytest.raises(LaunchError) as caught:
                ProcessIsolator.create(types=[codec])
            assert caught.value.step == "types"
        with pytest.raises(OptionsError, match="no such file"):
            ProcessIsolator.create(types=[TypeCodec(type=f"{plugin}x.py:Price", encode=str, decode=str)])
        with pytest.raises(LaunchError, match="types: 'f' is to be a class"):
            ProcessIsolator.create(types=[TypeCodec(type="operator:add", encode=str, decode=str, name="f")])
        lock = threading.Lock()
        with pytest.raises(SerializationError):
            ProcessIsolator.create(types=[TypeCodec(type=Money, encode=lambda money: lock, decode=str)])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"type": 3, "encode": str, "decode": str}, "expected a class"),
        ({"type": "Money", "encode": str, "decode": str}, "expected a class"),
        ({"type": int, "encode": str, "decode": str}, "what data is made of"),
        ({"type": tuple, "encode": str, "decode": str}, "what data is made of"),
        ({"type": Money, "encode": 3, "decode": str}, "encode"),
        ({"type": Money, "encode": str, "decode": "a.py:f"}, "it runs in the host"),
        ({"type": Money, "encode": str, "decode": str, "name": "a b"}, "no name"),
        ({"type": Money, "encode": str, "decode": str, "name": "x" * 201}, "no name"),
    ],
)
def test_what_is_no_codec(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionsError, match=match):
        TypeCodec(**wrong)


def test_any_class_has_a_name() -> None:
    for kind in (type("Gr\u00f6\u00dfe", (), {}), type("x" * 500, (), {}), Money):
        assert 0 < len(TypeCodec(type=kind, encode=str, decode=str).name) <= 200


@pytest.mark.parametrize("wrong", [None, 5, MONEY, "arrow", ["parrow"], [Money], [MONEY, MONEY], [MONEY, TypeCodec(
    type=Tip, encode=str, decode=str, name=MONEY.name)]])  # fmt: skip
def test_what_are_no_types(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="types"):
        IsolationOptions(types=wrong)


READER = Reader(decoders={"money": to_money})


@pytest.mark.parametrize(
    "payload",
    [
        ["other", [1, "EUR"]], ["mone", 1], ["Money", 1], ["money.__class__", 1], ["", 1], [None, 1], [["money"], 1],
        ["money"], ["money", 1, 2], "money", None,
    ],
)  # fmt: skip
def test_names_are_exact(payload: Any) -> None:
    """What no honest child says ends in a ProtocolError, and no decoder is asked."""
    text = json.dumps({"$": "own", "v": payload}).encode()
    with pytest.raises(ProtocolError):
        serializer.decode(text, [], reader=READER)


def test_a_child_cannot_name_a_type_where_there_are_none() -> None:
    text = json.dumps({"$": "own", "v": ["money", [1, "EUR"]]}).encode()
    assert serializer.decode(text, [], reader=READER) == Money(1, "EUR")
    with pytest.raises(ProtocolError, match="not among types="):
        serializer.decode(text, [])
    with pytest.raises(ProtocolError, match="none is plugged in"):
        serializer.decode(json.dumps({"$": "serialized", "v": ""}).encode(), [])


# --- a serializer of the application's own ----------------------------------------------------------------------------


class Json:
    """Keeps a list of what it has read, in the host."""

    def __init__(self) -> None:
        self.read: list[bytes] = []

    def dumps(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def loads(self, data: bytes) -> Any:
        self.read.append(data)
        return json.loads(data)


@linux
def test_a_plugged_serializer_reads_every_result() -> None:
    plugged = Json()
    checked: Serializer = plugged
    with nothing_left(), ProcessIsolator.create(results=checked) as isolator:
        assert isolator.invoke(lambda: (1, {2: None})) == [1, {"2": None}]
        assert isolator.invoke(lambda: 0) == 0
        assert list(isolator.invoke(letters)) == ["a", "b"]
        assert isolator.run_source("(1, 2)").value == [1, 2]
        counted = isolator.create_object(list, (3, 4))
        assert counted.copy() == [3, 4]
        assert isolator.object_count() == 1
    assert plugged.read == [b'[1, {"2": null}]', b"0", b'"a"', b'"b"', b'"end"', b"[1, 2]", b"[3, 4]"]


def letters() -> Iterator[str]:
    yield from "ab"
    return "end"


@linux
def test_the_standard_librarys_json_is_such_a_serializer() -> None:
    with ProcessIsolator.create(results=json) as isolator:
        assert isolator.invoke(lambda: {"a": [1, "\u00e4", None]}) == {"a": [1, "\u00e4", None]}
        assert list(isolator.map(str.upper, ["a"])) == ["A"]
        assert isolator.invoke(lambda: [1.0], returns=tuple[float, ...]) == (1.0,)


@linux
def test_what_such_a_serializer_may_get_wrong() -> None:
    class Wrong(Json):
        def dumps(self, value: Any) -> Any:
            return 5 if value == "text" else super().dumps(value)

        def loads(self, data: bytes) -> Any:
            if data == b'"bad"':
                raise KeyError("of the host's")
            return super().loads(data)

    with ProcessIsolator.create(results=Wrong()) as isolator:
        pid = isolator.pid
        with pytest.raises(SerializationError, match=r"results= raised KeyError: .*of the host's"):
            isolator.invoke(lambda: "bad")
        with pytest.raises(TypeError, match="must make bytes or text, not int"):
            isolator.invoke(lambda: "text")
        with pytest.raises(TypeError, match="not JSON serializable"):
            isolator.invoke(lambda: {1, 2})
        with pytest.raises(SerializationError, match=r"more than Limits\.result"):
            isolator.invoke(lambda: "x" * (65 << 20))
        assert isolator.pid == pid


@linux
def test_a_module_can_be_a_serializer() -> None:
    with ProcessIsolator.create(results=pickle) as isolator:
        assert isolator.invoke(lambda: frozenset({1})) == frozenset({1})
    with ProcessIsolator.create(results="pickle") as isolator:
        assert isolator.invoke(lambda: object) is object


@pytest.mark.parametrize("wrong", ["json", "", None, 5, object(), sys])
def test_what_is_no_serializer(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="results"):
        IsolationOptions(results=wrong)


# --- pickles of a child that is trusted --------------------------------------------------------------------------


class Basket:
    def __init__(self, *fruits: str) -> None:
        self.fruits = fruits


@pytest.fixture(scope="module")
def trusting() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(results="pickle") as isolator:
        yield isolator


def test_pickled_objects_of_the_applications_own_classes(trusting: ProcessIsolator) -> None:
    """The class went by value: the child has no module of that name, and the host finds its own again."""
    made = trusting.invoke(lambda: [Basket("fig"), Basket])
    assert (type(made[0]), made[0].fruits) == (Basket, ("fig",))
    assert made[1] is Basket


def test_what_cannot_be_pickled(trusting: ProcessIsolator) -> None:
    pid = trusting.pid
    for make, why in (
        (threading.Lock, "'_thread.lock'> cannot be pickled"),
        (lambda: lambda: 1, "does not load here"),
    ):
        with pytest.raises(SerializationError, match=why) as caught:
            trusting.invoke(make)
        assert caught.value.direction == "from child"
    assert trusting.pid == pid


def test_map_in_a_child_whose_pickles_are_trusted(trusting: ProcessIsolator) -> None:
    assert list(trusting.map(range, [1, 2])) == [range(1), range(2)]
    assert [basket.fruits for basket in trusting.map(Basket, ["fig", "pear"])] == [("fig",), ("pear",)]
