"""How one isolator reads what its children send: as data, and beside that only what its options name."""

from __future__ import annotations

from pisupervisor.errors import SerializationError
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from pisupervisor.options import IsolationOptions


class Reader(NamedTuple):
    """``decoders`` of the application's own types by their names; ``loads`` of its serializer; ``pickled``: whether it
    trusts its children's pickles; ``arrow``: whether pyarrow may read their bytes.
    """

    decoders: Mapping[str, Callable[[Any], Any]] = {}
    loads: Callable[[bytes], Any] | None = None
    pickled: bool = False
    arrow: bool = False

    def own(self, name: str, data: Any) -> Any:
        """An object of a type of the application's. Raises SerializationError where its decoder raises."""
        try:
            return self.decoders[name](data)
        except Exception as error:
            raise _refusal(f"the decoder for {name!r} in types=", error) from error

    def load(self, data: bytes) -> Any:
        """What the application's serializer makes of a child's bytes. Raises SerializationError where that raises."""
        assert self.loads is not None
        try:
            return self.loads(data)
        except Exception as error:
            raise _refusal("the serializer in results=", error) from error


DATA = Reader()


def reader_for(options: IsolationOptions) -> Reader:
    results: Any = options.results
    codecs: list[Any] = [each for each in options.types if not isinstance(each, str)]
    return Reader(
        decoders={codec.name: codec.decode for codec in codecs},
        loads=None if isinstance(results, str) else results.loads,
        pickled=results == "pickle" if isinstance(results, str) else False,
        arrow="arrow" in options.types,
    )


def text_of(error: object, most: int = 1000) -> str:
    """What an exception says, perhaps in a child's words: they must neither drive a terminal nor fill a log."""
    from pisupervisor.link.remote_errors import CONTROLS

    return str(error)[:most].translate(CONTROLS)


def _refusal(what: str, error: Exception) -> SerializationError:
    """Whatever class it is of: a decoder that lets ours out has not taken the value either."""
    return SerializationError(f"{what} raised {type(error).__name__}: {text_of(error)}", direction="from child")
