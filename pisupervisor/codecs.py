"""What may come back beside plain data, each because the application asked for it by name: objects of its own types, and
bytes that only a serializer of its own can read.
"""

from __future__ import annotations

from pisupervisor.errors import OptionsError
from pisupervisor.records import Protocol, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pisupervisor.link.packing import Packer
    from pisupervisor.link.sources import Code, CodeReader

_WORDS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-:<>")
_LONGEST_NAME = 200
#: in ``types``: objects of pandas and pyarrow may come back, whose bytes pyarrow then reads in the host
ARROW = "arrow"
#: what the closed format itself is made of; a codec for one of these would never be asked
_OWN = (type(None), bool, int, float, complex, str, bytes, bytearray, memoryview, list, tuple, dict, set, frozenset)


@dataclass(frozen=True, kw_only=True)
class TypeCodec:
    """How objects of one type come back: ``encode`` turns one into data, in the child; ``decode`` makes one of that data,
    in the host.

    type    a class (and what is derived from it, unless that has a codec of its own), or where the child finds it, as text:
            ``"plugin.py:Money"``, ``"package.module:Money"``
    encode  takes an object and returns anything that is data; a function, which is sent by value, or text likewise
    decode  takes that data (in which objects with codecs are made already). A child has chosen it, and only its being data is
            certain: check it. What it raises is a SerializationError of the call
    name    the word for it on the wire; by default that of the class

    Objects of such a type can be anywhere in a result or in the arguments of a callback, but not keys or elements of a set.
    """

    type: type | str
    encode: Callable[[Any], Any] | str
    decode: Callable[[Any], Any]
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.type, type) and not _is_target(self.type):
            raise OptionsError(f'types: expected a class or text such as "plugin.py:Money", not {self.type!r}')
        if self.type in _OWN:
            raise OptionsError(f"types: {self.type!r} is what data is made of, and travels as it is")
        if not callable(self.encode) and not _is_target(self.encode):
            raise OptionsError(
                f'types: encode: expected a function or text such as "plugin.py:to_data", not {self.encode!r}'
            )
        if not callable(self.decode):
            raise OptionsError(f"types: decode: expected a function, not {self.decode!r}; it runs in the host")
        if not self.name:
            object.__setattr__(self, "name", _name_of(self.type))
        if not isinstance(self.name, str) or len(self.name) > _LONGEST_NAME or not set(self.name) <= _WORDS:
            raise OptionsError(f"types: name: {self.name!r} is no name (letters, digits, _ . - :)")


class Serializer(Protocol):
    """``IsolationOptions(results=...)``: any object or module with these two.

    It is for what calls return and streams yield. Arguments still go to the child as pickles, and what a callback is called
    with comes as data. ``loads`` reads in the host whatever bytes a child has made up, before anything has looked at them:
    that it can be trusted with them is up to who plugs it in.
    """

    def dumps(self, value: Any, /) -> bytes | str:
        """In the child, where the serializer is sent by value, or imported if it is a module. Text travels as UTF-8."""

    def loads(self, data: bytes, /) -> Any:
        """In the host. What it raises is a SerializationError of the call."""


def check_types(types: Any) -> tuple[TypeCodec | str, ...]:
    """Raises OptionsError for what are no codecs, or two for one thing."""
    if not isinstance(types, (list, tuple)) or not all(isinstance(each, TypeCodec) or each == ARROW for each in types):
        raise OptionsError(f'types: expected a list of TypeCodec(...) and "arrow", not {types!r}')
    for part in ("name", "type"):
        values = [getattr(codec, part) for codec in codecs_of(types)]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise OptionsError(f"types: two codecs for {twice[0]!r}; give each a {part} of its own")
    return tuple(types)


def codecs_of(types: Sequence[TypeCodec | str]) -> list[TypeCodec]:
    """Without the words for what we know ourselves."""
    return [each for each in types if isinstance(each, TypeCodec)]


def check_results(results: Any) -> None:
    """Raises OptionsError for what is neither a word we know nor a serializer."""
    if results in ("data", "pickle") if isinstance(results, str) else _is_serializer(results):
        return
    raise OptionsError(f"results: {results!r} is neither 'data' nor 'pickle', nor has it dumps and loads to call")


def lesson(
    types: Sequence[TypeCodec | str], results: Any, packer: Packer, reader: CodeReader
) -> tuple[bytes, list[Code]]:
    """What each new child has to learn: the arguments of its call "learn", and the code that they name. Raises OptionsError
    for code that is not there, SerializationError for what cannot travel.
    """
    codes: list[Code] = []
    entries = [
        (codec.name, _reference(codec.type, reader, codes), _reference(codec.encode, reader, codes))
        for codec in codecs_of(types)
    ]
    serializer = None if isinstance(results, str) else results
    return packer.plain_arguments((entries, serializer, ARROW in types), {}), codes


def _reference(part: Any, reader: CodeReader, codes: list[Code]) -> Any:
    """The thing itself, or (key of the code, target) for text."""
    if not isinstance(part, str):
        return part
    from pisupervisor.link.sources import check_target

    path, _, target = part.rpartition(":")
    check_target(target)
    code = reader.read(path)
    codes.append(code)
    return code.key, target


def _is_target(part: Any) -> bool:
    return isinstance(part, str) and all(part.rpartition(":")[::2])


def _is_serializer(results: Any) -> bool:
    return callable(getattr(results, "dumps", None)) and callable(getattr(results, "loads", None))


def _name_of(kind: Any) -> str:
    said = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return "".join(letter if letter in _WORDS else "_" for letter in said)[-_LONGEST_NAME:]
