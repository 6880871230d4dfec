"""Frames and packed values: there and back, and everything that is no frame."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings, strategies

from pihost import wire
from pihost.wire import BadFrame

KINDS = (wire.CODE, wire.CALL, wire.INNER, *sorted(wire.FROM_CHILD))


@given(
    kind=strategies.sampled_from(KINDS),
    ident=strategies.integers(0, (1 << 64) - 1),
    length=strategies.integers(1, wire.MAX_FRAME),
    before=strategies.binary(max_size=20),
)
def test_a_header_comes_back(kind: int, ident: int, length: int, before: bytes) -> None:
    header = wire.pack_header(kind, ident, length)
    assert len(header) == wire.HEADER.size == 16
    assert wire.unpack_header(before + header, len(before)) == (kind, ident, length)


def test_the_bytes_are_the_documented_ones() -> None:
    assert wire.pack_header(wire.CALL, 7, 300) == bytes.fromhex("4951 01 02 0700000000000000 2c010000")


def test_host_and_child_kinds_are_apart() -> None:
    assert not {wire.CODE, wire.CALL, wire.INNER} & wire.FROM_CHILD
    assert len(set(KINDS)) == len(KINDS)


@pytest.mark.parametrize(
    ("magic", "version", "length"),
    [
        (0, wire.VERSION, 1),
        (wire.MAGIC + 1, wire.VERSION, 1),
        (wire.MAGIC, wire.VERSION + 1, 1),
        (wire.MAGIC, 0, 1),
        (wire.MAGIC, wire.VERSION, 0),
        (wire.MAGIC, wire.VERSION, wire.MAX_FRAME + 1),
        (wire.MAGIC, wire.VERSION, 0xFFFFFFFF),
    ],
)
def test_no_header_of_ours(magic: int, version: int, length: int) -> None:
    with pytest.raises(BadFrame):
        wire.unpack_header(wire.HEADER.pack(magic, version, wire.RESULT, 1, length))


def test_the_host_sets_its_own_bound() -> None:
    header = wire.pack_header(wire.CALL, 1, wire.MAX_FRAME + 1)
    assert wire.unpack_header(header, 0, 1 << 32)[2] == wire.MAX_FRAME + 1
    with pytest.raises(BadFrame, match="1 to 10 are allowed"):
        wire.unpack_header(wire.pack_header(wire.CALL, 1, 11), 0, 10)


@given(text=strategies.binary(), buffers=strategies.lists(strategies.binary(), max_size=5))
def test_a_value_comes_back(text: bytes, buffers: list[bytes]) -> None:
    body = b"".join(wire.pack_value(text, buffers))
    found_text, found_buffers = wire.unpack_value(body)
    assert (found_text, [bytes(buffer) for buffer in found_buffers]) == (text, buffers)


def test_buffers_are_counted_in_bytes_and_not_copied() -> None:
    import array

    body = b"".join(wire.pack_value(b"{}", [array.array("d", [1.0, 2.0])]))
    _text, (buffer,) = wire.unpack_value(body)
    assert buffer.nbytes == 16
    assert buffer.obj is body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 7,
        struct.pack("<II", 1, 0),
        struct.pack("<II", 0, 1),
        struct.pack("<II", 0xFFFFFFFF, 0) + b"x",
        struct.pack("<II", 0, 0xFFFFFFFF) + b"\0" * 64,
        struct.pack("<II", 0, 0) + b"x",
        struct.pack("<IIQ", 0, 1, 2) + b"x",
        struct.pack("<IIQ", 0, 1, 0) + b"x",
        struct.pack("<IIQQ", 0, 2, (1 << 64) - 1, 2) + b"x",
    ],
)
def test_lengths_must_add_up(body: bytes) -> None:
    with pytest.raises(BadFrame):
        wire.unpack_value(body)


@given(body=strategies.binary(max_size=64))
@settings(max_examples=300)
def test_arbitrary_bytes_are_a_value_or_a_bad_frame(body: bytes) -> None:
    try:
        text, buffers = wire.unpack_value(body)
    except BadFrame:
        return
    assert b"".join(wire.pack_value(text, list(buffers))) == body
