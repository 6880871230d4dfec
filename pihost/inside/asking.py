"""Modules that the child does not have are asked of the host, which has loaders for what may be imported. Asked last of all."""

from __future__ import annotations

import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import SourceLoader

from pihost.inside import callbacks
from pihost.inside.importer import CompileFailed, compile_failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

NAME = "\0import"  # no application can register a callback of this name


class Loader(SourceLoader):
    """One module whose source the host gave. ``exec_module`` is the interpreter's own."""

    def __init__(self, origin: str, source: bytes) -> None:
        self._origin, self._source = origin, source

    def get_filename(self, _name: str = "") -> str:
        return self._origin

    def get_data(self, path: str) -> bytes:
        if path != self._origin:
            raise FileNotFoundError(2, "Only the module's own source is here", path)
        return self._source

    def get_code(self, _name: str) -> CodeType:
        try:
            return compile(self._source, self._origin, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise compile_failed(error, self._source.decode("utf-8", "replace"), self._origin) from error

    def get_source(self, _name: str) -> str:
        from importlib.util import decode_source

        return decode_source(self._source)


class Finder:
    """For the end of ``sys.meta_path``."""

    def find_spec(self, name: str, _path: Any = None, _target: object = None) -> ModuleSpec | None:
        if not all(part.isidentifier() for part in name.split(".")):
            return None
        try:
            answer = callbacks.call_host_raw(NAME, name.encode())
        except (callbacks.UnknownCallback, RuntimeError):
            return None  # nobody has it; or another thread asks, which cannot speak with the host
        except callbacks.HostError as error:
            raise ImportError(f"{name}: {error}", name=name) from None
        kind, origin, source = answer.split(b"\0", 2)
        path = origin.decode("utf-8", "surrogateescape")
        loader: Any = Loader(path, source)
        spec = ModuleSpec(name, loader, origin=path, is_package=kind == b"p")
        spec.has_location = True
        return spec


def install() -> None:
    sys.meta_path.append(Finder())


__all__ = ["CompileFailed", "Finder", "install"]
