"""Results as pickles, for a host that trusts this child: see ``arenas.ship_pickled``."""

from __future__ import annotations

import _pickle
import sys

from pihost.inside.encode import NotData
from pihost.inside.writers import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_FUNCTION: Any = type(lambda: None)


class HostModule:
    """A module of the host's application, which is not here: its classes have come by value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        from importlib import import_module

        return import_module, (self.name,)


class ByName(_pickle.Pickler):
    """Names classes and functions that cannot be imported here as the host knows them: there they are found."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, (type, _FUNCTION)) or _is_here(value):
            return NotImplemented
        from operator import attrgetter

        return attrgetter(value.__qualname__), (HostModule(value.__module__),)


def _is_here(value: Any) -> bool:
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def dump(value: object, new_buffers: Callable[[], Callable[[Any], bool]]) -> bytes:
    """Its pickle. ``new_buffers()`` makes what takes the buffers of one try. Raises NotData for what has none."""
    try:
        return _pickle.dumps(value, 5, buffer_callback=new_buffers())
    except Exception:
        return _dump_by_name(value, new_buffers())


def _dump_by_name(value: object, take: Callable[[Any], bool]) -> bytes:
    from io import BytesIO

    file = BytesIO()
    try:
        ByName(file, 5, buffer_callback=take).dump(value)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise NotData(f"result: {shown(value)} cannot be pickled ({why}); return what can, or plain data") from None
    return file.getvalue()
