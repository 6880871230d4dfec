"""pandas and pyarrow objects come back through Arrow's stream format; what is in such a stream is not believed."""

from __future__ import annotations

import datetime
import decimal
import pickle
import random
import re
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from helpers import linux, resident

from pihost.inside import encode as child, taught
from pisupervisor import Limits, ProcessIsolator, ProtocolError, SerializationError
from pisupervisor.link import arrow, arrow_messages, serializer
from pisupervisor.link.arguments import write_call
from pisupervisor.link.attachments import Attachments
from pisupervisor.link.reader import Reader

numpy = pytest.importorskip("numpy")
pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")

LIMIT = 64 << 20
PACKAGES = [next(path for path in sys.path if path.endswith("site-packages"))]


READER = Reader(arrow=True)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's half runs in this process here, and has been told."""
    monkeypatch.setattr(taught, "arrow", True)


def cross(value: Any) -> Any:
    text, buffers = child.encode(value, LIMIT)
    return serializer.decode(text, [bytes(buffer) for buffer in buffers], reader=READER)


FRAME = pandas.DataFrame({
    "whole": [1, 2, 3], "real": [1.5, None, 3.0], "flag": [True, False, True], "text": ["x", "y\u00e9", None],
    "time": pandas.date_range("2024", periods=3, tz="Europe/Berlin"), "span": pandas.to_timedelta([1, 2, 3], unit="s"),
    "kind": pandas.Categorical(["u", "v", "u"], ordered=True), "maybe": pandas.array([1, None, 3], dtype="Int64"),
    "perhaps": pandas.array([True, None, False], dtype="boolean"), "arrow": pandas.array([1, 2, None], dtype="int32[pyarrow]"),
    "day": [datetime.date(2024, 1, 1)] * 3, "price": [decimal.Decimal("1.50")] * 3,
    "bytes": pandas.Series([b"x", b"", None], dtype=object),
})  # fmt: skip
FRAMES = {
    "all kinds": FRAME, "an index": FRAME.set_index("text"), "two levels": FRAME.set_index(["whole", "text"]),
    "every second": FRAME.iloc[::2], "no rows": FRAME.iloc[:0], "no columns": pandas.DataFrame(index=[1, 2]),
    "nothing": pandas.DataFrame(), "tuples": pandas.DataFrame({("a", 1): [1], ("b", 2): [2.5]}),
    "twice": pandas.DataFrame([[1, 2]], columns=["x", "x"]), "numbers": pandas.DataFrame({1: [1], 2: ["x"]}),
    "named": pandas.DataFrame({"a": [1]}, index=pandas.Index([5], name="key")),
    "large": pandas.DataFrame({"x": range(300_000), "y": [0.5] * 300_000}),
}  # fmt: skip
SERIES = {
    "of each": FRAME["time"], "categories": FRAME["kind"], "nullable": FRAME["maybe"], "empty": pandas.Series([], dtype=float),
    "labelled": pandas.Series([1, 2], index=["a", "b"], name=("x", 1)),
}  # fmt: skip
TABLE = pyarrow.table({
    "whole": [1, 2], "lists": [[1], [2, None]], "structs": [{"x": 1.5}, None], "nothing": pyarrow.nulls(2),
    "words": pyarrow.array(["a", "b"]).dictionary_encode(),
    "map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
    "half": pyarrow.array([1.0, 2.0], pyarrow.float16()), "fixed": pyarrow.array([b"abc", b"def"], pyarrow.binary(3)),
})  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_comes_back(name: str) -> None:
    pandas.testing.assert_frame_equal(cross(FRAMES[name]), FRAMES[name], check_freq=False)


@pytest.mark.parametrize("name", SERIES)
def test_a_series_comes_back(name: str) -> None:
    pandas.testing.assert_series_equal(cross(SERIES[name]), SERIES[name], check_freq=False)


def test_tables_and_batches_come_back() -> None:
    assert cross(TABLE).equals(TABLE)
    assert cross(TABLE.slice(0, 0)).equals(TABLE.slice(0, 0))
    batch = TABLE.to_batches()[0]
    assert cross(batch).equals(batch)
    many = pyarrow.concat_tables([TABLE] * 5000)
    assert cross(many).equals(many)
    assert cross({"a": [TABLE, (batch,)]})["a"][1][0].equals(batch)


def test_metadata_comes_back_but_not_what_pandas_would_believe() -> None:
    told = TABLE.replace_schema_metadata({"unit": "m", "pandas": '{"columns": "os.system"}'})
    assert cross(told).schema.metadata == {b"unit": b"m"}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (pandas.DataFrame({"mixed": [1, "x"]}), "the column 'mixed' is not data"),
        (pandas.DataFrame({"thing": [object()]}), "the column 'thing' is not data"),
        (pandas.DataFrame({"lists": [[1]]}), "return a pyarrow.Table"),
        (pandas.DataFrame({"month": pandas.period_range("2024", periods=1, freq="M")}), "column 'month' of period"),
        (type("Own", (pandas.DataFrame,), {})({"a": [1]}), "may say more"),
        (type("Own", (pandas.Series,), {})([1]), "may say more"),
        (pandas.DataFrame({"a": [1]}, index=[object()]), "index level 0"),
        (pandas.DataFrame({object(): [1]}), "is not data"),
    ],
)
def test_what_is_not_data_is_named(value: Any, match: str) -> None:
    with pytest.raises(child.NotData, match=match):
        child.encode(value, LIMIT)


def test_too_large_is_said_before_it_is_copied() -> None:
    with pytest.raises(child.NotData, match=r"more than Limits\.result"):
        child.encode(FRAMES["large"], 1 << 20)


# --- through a real child ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    limits = Limits(memory="1G", pids=128)
    with ProcessIsolator.create(import_paths=PACKAGES, limits=limits, types=["arrow"]) as isolator:
        yield isolator


@linux
def test_there_and_back(isolator: ProcessIsolator) -> None:
    def describe(frame: Any) -> Any:
        return frame.assign(double=frame["whole"] * 2), frame["real"], int(frame["whole"].sum())

    frame, series, total = isolator.invoke(describe, FRAME)
    pandas.testing.assert_frame_equal(frame, FRAME.assign(double=[2, 4, 6]), check_freq=False)
    pandas.testing.assert_series_equal(series, FRAME["real"])
    assert total == 6
    assert isolator.invoke(lambda table: table, TABLE).equals(TABLE)
    assert isolator.invoke(lambda table: table.to_batches()[0], TABLE).equals(TABLE.to_batches()[0])


@linux
def test_in_streams_and_callbacks(isolator: ProcessIsolator) -> None:
    def parts(table: Any) -> Iterator[Any]:
        import pihost

        yield pihost.call_host("rows", table)
        yield from table.to_batches(max_chunksize=1)

    isolator.register_callback("rows", lambda table: table.num_rows)
    rows, *batches = isolator.invoke(parts, TABLE)
    assert (rows, pyarrow.Table.from_batches(batches)) == (2, TABLE)


@linux
def test_declared_as_a_frame(isolator: ProcessIsolator) -> None:
    frame = isolator.invoke(lambda frame: {"a": [frame]}, FRAME, returns=dict[str, list[pandas.DataFrame]])["a"][0]
    pandas.testing.assert_frame_equal(frame, FRAME, check_freq=False)
    with pytest.raises(SerializationError, match="is not a"):
        isolator.invoke(lambda: 1, returns=pandas.DataFrame)


@linux
def test_nobody_asked_for_it() -> None:
    """The child says so; one that sends it all the same has broken the protocol, and pyarrow reads nothing of it."""
    with ProcessIsolator.create(import_paths=PACKAGES, limits=Limits(memory="1G", pids=128)) as plain:
        for make in (lambda: pandas.DataFrame({"a": [1]}), lambda: [pyarrow.table({"a": [1]})]):
            with pytest.raises(SerializationError, match=r"types=\['arrow'\]"):
                plain.invoke(make)

        def send_all_the_same() -> Any:
            from pihost.inside import taught

            taught.arrow = True
            return pandas.DataFrame({"a": [1]})

        with pytest.raises(ProtocolError, match="not among types="):
            plain.invoke(send_all_the_same)


# --- without the extra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_a_host_without_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    text, buffers = child.encode(FRAME, LIMIT)
    kept = [bytes(buffer) for buffer in buffers]
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SerializationError, match=r"pip install 'pisupervisor\[arrow\]'") as caught:
        serializer.decode(text, kept, reader=READER)
    assert caught.value.direction == "from child"


def test_a_child_without_pyarrow_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(child.NotData, match="which this child cannot import"):
        child.encode(FRAME, LIMIT)


# --- a stream that lies -----------------------------------------------------------------------------------------------


def stream(table: Any, **options: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def refused(data: bytes, match: str, error: type[Exception] = ProtocolError) -> None:
    with pytest.raises(error, match=match):
        arrow.build_table(data)


def not_taken(data: bytes, match: str) -> None:
    """What an honest child may have: it lives on."""
    refused(data, match, SerializationError)


def test_the_control_is_read() -> None:
    assert arrow.build_table(stream(TABLE)).equals(TABLE)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_what_is_compressed_is_refused_before_anything_is_inflated(codec: str) -> None:
    bomb = stream(pyarrow.table({"a": [0] * (8 << 20)}), compression=codec)
    assert len(bomb) < 1 << 20
    before = resident()
    refused(bomb, "compressed")
    words = pyarrow.table({"a": pyarrow.array(["x" * 10_000] * 100).dictionary_encode()})
    refused(stream(words, compression=codec), "compressed")
    assert resident() - before < 16 << 20


def test_a_column_of_nothing_has_no_million_rows() -> None:
    not_taken(stream(pyarrow.table({"a": pyarrow.nulls(1 << 27)})), "cells in")
    not_taken(stream(pyarrow.table({"a": pyarrow.array([[None] * 3_000_000])})), "cells in")
    empty = pyarrow.table({"a": pyarrow.array([b""] * 2, pyarrow.binary(0))})
    assert arrow.build_table(stream(empty)).num_rows == 2


class Loud(pyarrow.ExtensionType):  # type: ignore[misc]
    asked: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        super().__init__(pyarrow.int64(), "pisupervisor.loud")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"chosen by the child"

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: Any, serialized: bytes) -> Any:
        cls.asked.append(serialized)
        return cls()


def test_no_extension_type_is_ever_asked() -> None:
    pyarrow.register_extension_type(Loud())
    try:
        table = pyarrow.table({"a": pyarrow.ExtensionArray.from_storage(Loud(), pyarrow.array([1]))})
        data = stream(table)
        Loud.asked.clear()
        not_taken(data, "extension type")
        assert Loud.asked == []
        pyarrow.ipc.open_stream(data).read_all()
        assert Loud.asked, "the control: pyarrow alone would have asked it"
    finally:
        pyarrow.unregister_extension_type("pisupervisor.loud")
    not_taken(stream(pyarrow.table({"a": pyarrow.array([], pyarrow.json_())})), "extension type")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["x" * 100] * 3, pyarrow.string_view()), pyarrow.RunEndEncodedArray.from_arrays([1 << 14], [5]),
        pyarrow.UnionArray.from_sparse(pyarrow.array([0], pyarrow.int8()), [pyarrow.array([1])]),
        pyarrow.array([[1]], pyarrow.list_view(pyarrow.int64())), pyarrow.array([["x"]], pyarrow.list_(pyarrow.string_view())),
        pyarrow.array([{"a": "x"}], pyarrow.struct({"a": pyarrow.binary_view()})),
    ],
    ids=lambda column: str(column.type),
)  # fmt: skip
def test_types_whose_values_may_take_no_room(column: Any) -> None:
    not_taken(stream(pyarrow.table({"a": column})), "of the type")


def _of_one_hash(count: int) -> Any:
    """Whole numbers that pandas' tables take for equal at first: the hash of one is key >> 33 ^ key ^ key << 11."""
    low = numpy.arange(count)
    return ((low ^ (low << 11)) << 33) | low


def test_an_index_of_chosen_numbers_is_made_quickly() -> None:
    """Measured: pandas' own way took 8 s for 40,000 rows, and the square of that for more."""
    data = stream(pyarrow.table({"a": _of_one_hash(120_000), "b": numpy.arange(120_000)}))
    started = time.monotonic()
    frame = arrow.build_frame([], [None], [["a", "b"]], ["", "Int64"], data)
    assert time.monotonic() - started < 5
    assert frame.index[5] == (_of_one_hash(6)[5], 5)


def test_levels_are_what_pandas_makes_of_the_same_columns() -> None:
    columns = [FRAME[name].sample(12, replace=True, random_state=1, ignore_index=True) for name in FRAME]
    made, pandas_own = (
        arrow._levels(pandas, columns, list(FRAME)),
        pandas.MultiIndex.from_arrays(columns, names=list(FRAME)),
    )
    pandas.testing.assert_index_equal(made, pandas_own)
    for ours, theirs in zip((*made.levels, *made.codes), (*pandas_own.levels, *pandas_own.codes), strict=True):
        assert list(ours) == list(theirs)


def test_categories_have_a_bound() -> None:
    """Whether they are all different is seen by tables as well."""
    words = pyarrow.array(map(str, range(arrow.MAX_CATEGORIES))).dictionary_encode()
    table = pyarrow.table({"a": pyarrow.chunked_array([words] * 3)})
    rows = [0, len(table), 1, None]
    assert arrow.build_frame(["a"], [None], [*rows], [""], stream(table)).shape == (len(table), 1)
    both = table.append_column("b", pyarrow.array(["x"] * len(table)).dictionary_encode())
    with pytest.raises(SerializationError, match="categories"):
        arrow.build_frame(["a", "b"], [None], rows, ["", ""], stream(both))


def test_labels_that_take_long_to_compare_are_refused() -> None:
    labels = [(decimal.Decimal(5), 1), (5 + (sys.hash_info.modulus << 1_000_000), 1)]
    with pytest.raises(SerializationError, match="of one hash"):
        arrow.build_frame(labels, [None, None], [0, 1, 1, None], ["", ""], stream(pyarrow.table({"a": [1], "b": [1]})))


def test_no_name_of_a_field_steers_a_terminal() -> None:
    union = pyarrow.UnionArray.from_sparse(pyarrow.array([0], pyarrow.int8()), [pyarrow.array([1])], ["\x1b[2J"])
    not_taken(stream(pyarrow.table({"a": union})), re.escape("<\\x1b[2J: "))


def test_no_path_for_a_time_zone() -> None:
    for zone in ("../../etc/passwd", "/etc/passwd", "", "x" * 200):
        table = pyarrow.table({"a": pyarrow.array([0], pyarrow.timestamp("s", zone))})
        if zone:
            not_taken(stream(table), "time zone")


def test_values_are_validated_in_full() -> None:
    offsets = pyarrow.py_buffer(struct.pack("<3i", 0, 1 << 30, 2))
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ab")])
    data = bytearray(stream(pyarrow.table({"a": pyarrow.array(["a", "b"])})))
    place = bytes(data).rindex(struct.pack("<3i", 0, 1, 2))
    data[place : place + 12] = struct.pack("<3i", 0, 1 << 30, 2)
    refused(bytes(data), "not valid")
    words = bytearray(stream(pyarrow.table({"a": pyarrow.array(["word", "other"]).dictionary_encode()})))
    place = bytes(words).rindex(struct.pack("<2i", 0, 1))
    words[place : place + 8] = struct.pack("<2i", 0, 99)
    refused(bytes(words), "not valid")
    surrogates = bytearray(stream(pyarrow.table({"a": pyarrow.array(["abcdefgh"])})))
    place = bytes(surrogates).rindex(b"abcdefgh")
    surrogates[place : place + 2] = b"\xff\xfe"
    refused(bytes(surrogates), "not valid")
    assert text.type == pyarrow.string()


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1, -8, -9])
def test_streams_that_end_elsewhere(cut: int) -> None:
    data = stream(TABLE)
    refused(data[:cut], "Arrow")
    refused(data + b"\0" * 8 if cut else data + data, "Arrow")


def test_too_many_batches_and_columns() -> None:
    table = pyarrow.table({"a": [1]})
    not_taken(stream(pyarrow.concat_tables([table] * (arrow_messages.MAX_MESSAGES + 5))), "messages")
    not_taken(stream(pyarrow.table({str(n): [1] for n in range(10_001)})), "columns")
    deep = pyarrow.int8()
    for _ in range(25):
        deep = pyarrow.list_(deep)
    not_taken(stream(pyarrow.table({"a": pyarrow.array([], deep)})), "nested too deep")


FRAME_PARTS: list[Any] = [["a"], [None], [0, 2, 1, None], [""]]


@pytest.mark.parametrize(
    ("part", "lie", "error"),
    [
        (0, [], ProtocolError), (0, ["a", "b"], ProtocolError), (0, [[1]], SerializationError), (1, [], ProtocolError),
        (1, [None, None], SerializationError), (2, [], ProtocolError), (2, [0, 3, 1, None], ProtocolError),
        (2, [0, 2, 0, None], ProtocolError),
        (2, [0, 1 << 70, 1, None], ProtocolError), (2, [["k", "l"]], ProtocolError), (2, [[]], ProtocolError),
        (2, [0, 2, 1, [1]], SerializationError),
        (3, [], ProtocolError), (3, ["object"], ProtocolError), (3, ["Sparse[int]"], ProtocolError),
        (3, [["Int64"]], ProtocolError),
        (3, [None], ProtocolError),
    ],
)  # fmt: skip
def test_lies_around_a_frame(part: int, lie: Any, error: type[Exception]) -> None:
    data = stream(pyarrow.table({"0": [1, 2]}))
    assert arrow.build_frame(*FRAME_PARTS, data)["a"].tolist() == [1, 2]
    parts = [*FRAME_PARTS]
    parts[part] = lie
    with pytest.raises(error):
        arrow.build_frame(*parts, data)


def test_lies_around_a_series() -> None:
    with pytest.raises(ProtocolError):
        arrow.build_series(None, [0, 2, 1, None], ["", ""], stream(pyarrow.table({"0": [1, 2], "1": [1, 2]})))
    with pytest.raises(ProtocolError):
        arrow.build_frame(["a"], [None], [0, 1, 1, None], [""], stream(TABLE.select(["lists"])))
    with pytest.raises(SerializationError):
        arrow.build_series([1], [0, 2, 1, None], [""], stream(pyarrow.table({"0": [1, 2]})))


def test_python_objects_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "MAX_OBJECTS", 10)
    for column in (pyarrow.array([True, None] * 6), pyarrow.array([datetime.date(2024, 1, 1)] * 11), pyarrow.nulls(11)):
        with pytest.raises(SerializationError, match=r"pyarrow\.Table"):
            arrow.build_series(None, [0, len(column), 1, None], [""], stream(pyarrow.table({"0": column})))
    assert len(arrow.build_series(None, [0, 12, 1, None], [""], stream(pyarrow.table({"0": [1] * 12})))) == 12


@linux
def test_a_table_that_is_not_taken_ends_no_child(isolator: ProcessIsolator) -> None:
    def views() -> Any:
        import pyarrow

        return pyarrow.table({"a": pyarrow.array(["x"], pyarrow.string_view())})

    pid = isolator.pid
    with pytest.raises(SerializationError, match="of the type string_view; return plain columns"):
        isolator.invoke(views)
    with pytest.raises(SerializationError, match="cells in"):
        isolator.invoke(lambda: __import__("pyarrow").table({"a": __import__("pyarrow").nulls(5_000_000)}))
    assert isolator.pid == pid


def test_many_small_ones_are_counted() -> None:
    text, _buffers = child.encode(pandas.DataFrame({"a": [1]}), LIMIT)
    with pytest.raises(SerializationError, match="too many tables and columns"):
        serializer.decode(b"[" + b",".join([bytes(text)] * 4000) + b"]", [], reader=READER)
    with pytest.raises(child.NotData, match="more than 2000000 items"):
        child.encode([pyarrow.table({"a": [1]})] * 4000, LIMIT)
    assert len(cross([pyarrow.table({"a": [1]})] * 3000)) == 3000


def test_mutated_streams_only_ever_raise_our_errors() -> None:
    dice = random.Random(48)
    seeds = [
        stream(TABLE),
        stream(TABLE.select(["whole"])),
        stream(pyarrow.Table.from_pandas(FRAME.drop(columns="arrow"))),
    ]
    refused_ones = 0
    for _ in range(6_000):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            table = arrow.build_table(bytes(data))
            labels, words = [*map(str, range(table.num_columns))], [""] * table.num_columns
            arrow.build_frame(labels, [None], [0, table.num_rows, 1, None], words, bytes(data))
        except (ProtocolError, SerializationError):
            refused_ones += 1
    assert 1_000 < refused_ones < 6_000


# --- arguments ------------------------------------------------------------------------------------------------------


def sent(*args: Any) -> tuple[bytes, list[bytes]]:
    """The pickle and the buffers beside it, as a host that asks for Arrow sends them."""
    written, _by_value = write_call(lambda: Attachments(0, False, True), args, {}, lambda _name: True, True)
    payload = written.payload()
    return (
        (payload, []) if isinstance(payload, bytes) else (b"".join(payload.pickle), [bytes(b) for b in payload.buffers])
    )


def received(*args: Any) -> Any:
    data, buffers = sent(*args)
    return pickle.loads(data, buffers=buffers)[0][0]


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_goes_as_it_is(name: str) -> None:
    """To the last detail, the index's frequency too: where Arrow has no word for one, as a pickle."""
    pandas.testing.assert_frame_equal(received(FRAMES[name]), FRAMES[name])


@pytest.mark.parametrize("name", SERIES)
def test_a_series_goes_as_it_is(name: str) -> None:
    pandas.testing.assert_series_equal(received(SERIES[name]), SERIES[name])


ARROWS = {
    "table": TABLE, "batch": TABLE.to_batches()[0], "chunks": pyarrow.concat_tables([TABLE, TABLE]), "none": TABLE.slice(0, 0),
    "frame": FRAME[["whole", "real", "flag", "time", "span", "kind", "maybe", "arrow"]], "series": SERIES["nullable"],
    "an index": FRAME[["real", "whole", "flag"]].set_index(["whole", "flag"]), "large": FRAMES["large"],
}  # fmt: skip


@pytest.mark.parametrize("name", ARROWS)
def test_what_goes_in_arrows_format(name: str) -> None:
    assert b"pihost.inside.arrow" in sent(ARROWS[name])[0]
    assert received(ARROWS[name]).equals(ARROWS[name])


def test_of_a_slice_no_more_travels_than_is_in_it() -> None:
    part = pyarrow.table({"x": range(1_000_000)}).slice(10, 5)
    data, buffers = sent(part)
    assert len(data) + sum(map(len, buffers)) < 10_000
    assert received(part).equals(part)


class Labelled(pandas.DataFrame):  # type: ignore[misc]
    pass


SAID_BETTER = {
    "attributes": pandas.DataFrame({"x": [1]}), "twice": pandas.DataFrame([[1, 2]], columns=["x", "x"]),
    "objects": pandas.DataFrame({"x": pandas.Series([1, "x", None], dtype=object)}),
    "frequency": pandas.DataFrame({"x": [1, 2]}, index=pandas.date_range("2024", periods=2)),
    "periods": pandas.DataFrame({"x": pandas.period_range("2024", periods=2)}),
    "subclass": Labelled({"x": [1]}), "sparse": pandas.DataFrame({"x": pandas.arrays.SparseArray([0, 0, 1])}),
}  # fmt: skip
SAID_BETTER["attributes"].attrs["unit"] = "m"


@pytest.mark.parametrize("name", SAID_BETTER)
def test_what_a_pickle_says_better(name: str) -> None:
    value = SAID_BETTER[name]
    assert b"pihost.inside.arrow" not in sent(value)[0]
    pandas.testing.assert_frame_equal(received(value), value)
    assert type(received(value)) is type(value)
    assert received(value).attrs == value.attrs


@linux
@pytest.mark.parametrize("name", ARROWS)
def test_arguments_in_a_child(name: str) -> None:
    with ProcessIsolator.create(types=["arrow"], import_paths=PACKAGES, limits=Limits(memory="1G")) as isolator:
        assert isolator.invoke(lambda value: type(value).__module__ + str(len(value)), ARROWS[name]).endswith(
            str(len(ARROWS[name]))
        )
        assert isolator.invoke(lambda value: value, ARROWS[name]).equals(ARROWS[name])


@linux
def test_a_frame_among_the_arguments_can_be_written_to() -> None:
    def doubled(frame: Any) -> float:
        frame.iloc[0, 0] = 7.0
        frame["y"] = frame["x"] * 2
        return float(frame["y"].sum())

    frame = pandas.DataFrame({"x": [1.0] * 300_000})
    with ProcessIsolator.create(types=["arrow"], import_paths=PACKAGES, limits=Limits(memory="1G")) as isolator:
        assert isolator.invoke(doubled, frame) == 600_012.0
        assert isolator.invoke(doubled, frame) == 600_012.0
    assert frame.iloc[0, 0] == 1.0
