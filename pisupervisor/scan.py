"""Which modules a class's source imports, and the sources of its application's own modules among those: read, never run."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import NamedTuple

from pisupervisor.errors import OptionsError

_IMPORTERS = frozenset(("__import__", "import_module"))
_OURS = ("pisupervisor", "pihost")  # in a checkout they lie beside the application, not in site-packages


class Import(NamedTuple):
    """``module`` is the full name of what is imported (of ``from a import b``: ``a.b``, which may be no module)."""

    module: str
    file: str
    line: int


def scan(kind: type) -> Iterator[Import]:
    """Every import in the module of ``kind``, and in what that imports of the application's own. Raises OptionsError where
    there is no source to look at.
    """
    first = kind.__module__
    if not isinstance(first, str):
        raise OptionsError(f"{kind.__qualname__}: its module has no name, so there is no source that could be scanned")
    pending, seen = [first], set(_OURS)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        file, source = _source(name)
        if source is None and name == first:
            raise OptionsError(f"{name}: there is no source that could be scanned")
        if source is None:
            continue
        is_package = hasattr(sys.modules[name], "__path__")
        for found in imports(source, file, name + ".__init__" if is_package else name):
            yield found
            pending += _own_modules(found.module)


def imports(source: str, file: str, module: str) -> Iterator[Import]:
    """The imports that stand in a source text. ``module`` is its name, for relative ones (of a package with ``.__init__``).
    Raises OptionsError.
    """
    try:
        tree = ast.parse(source, file)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise OptionsError(f"{file}: cannot be scanned: {error}") from None
    for node in ast.walk(tree):
        for name in _imported(node, module):
            yield Import(name, file, getattr(node, "lineno", 0))


def _imported(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".")[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        return [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        first = node.args[0]
        if called in _IMPORTERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
            return [first.value]
    return []


def _source(name: str) -> tuple[str, str | None]:
    """Of a module that is loaded: looking for another would run the packages around it."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or name
    try:
        return file, inspect.getsource(module) if module is not None else None
    except (OSError, TypeError, ValueError):
        return file, None


def _own_modules(name: str) -> list[str]:
    """Loaded modules of the application that ``name`` leads to. What is installed (and the standard library) is not the
    application's: its own imports are its own affair.
    """
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or parts[0] in _OURS:
        return []
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [prefix for prefix in prefixes if prefix in sys.modules and not _is_installed(sys.modules[prefix])]


def _is_installed(module: object) -> bool:
    file = getattr(module, "__file__", None) or ""
    return "/site-packages/" in file or "/dist-packages/" in file
