"""What the host's application has taught this child to send beside plain data: objects of its own types, each written as data
by a function of theirs, and what a serializer of its own makes of a whole result.
"""

from __future__ import annotations

from pihost.inside import awaiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pihost.inside.encode import Walk

encoders: dict[type, tuple[str, Callable[[Any], Any]]] = {}
serializer: Any = None
arrow = False  # whether the host reads what pandas and pyarrow hold


class Serialized:
    """A value as the application's serializer wrote it."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


def learn(entries: Iterable[tuple[str, type, Callable[[Any], Any]]], own_serializer: Any, reads_arrow: bool) -> None:
    global serializer, arrow
    for name, kind, encoder in entries:
        if not isinstance(kind, type):
            raise TypeError(f"types: {name!r} is to be a class, not {kind!r}")
        encoders[kind] = (name, encoder)
    serializer, arrow = own_serializer, reads_arrow


def find_writer(kind: type) -> Callable[[Walk, Any], Any] | None:
    """For a kind met for the first time: the codec of the nearest class it is derived from."""
    if kind is Serialized:
        return lambda walk, value: walk.tagged("serialized", walk.blob(value.data))
    known = next((encoders[base] for base in type.mro(kind) if base in encoders), None) if encoders else None
    if known is None:
        return None
    name, encoder = known
    return lambda walk, value: walk.tagged("own", [name, walk.part((name,), encoder(value))])


def serialized(value: Any) -> Any:
    """What a call returned or a stream yields, as it is to be encoded."""
    if serializer is None or awaiting.is_stream(value):
        return value
    data = serializer.dumps(value)
    if isinstance(data, str):  # as the standard library's json makes it, which reads bytes too
        data = data.encode()
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError(f"the serializer in results= must make bytes or text, not {type(data).__name__}")
    return Serialized(bytes(data))
