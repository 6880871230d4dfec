"""JSON text from the interpreter's own C encoder, without the ``json`` package: that one imports ``re`` and ``enum`` (6 ms),
which would be most of a zygote's start.
"""

from __future__ import annotations

if False:  # only a type checker reads this
    from collections.abc import Callable
    from typing import Any


def _refuse(value: object) -> None:
    raise TypeError(f"{type(value).__name__} is not JSON")


def _encoder() -> Callable[[object, int], Any]:
    try:
        from _json import encode_basestring_ascii, make_encoder
    except ImportError:  # an interpreter without the accelerator
        import json

        slow = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":"))
        return lambda value, _indent: slow.iterencode(value)
    # markers, default, encoder, indent, key separator, item separator, sort_keys, skipkeys, allow_nan
    fast: Any = make_encoder
    made: Callable[[object, int], Any] = fast(
        None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False
    )
    return made


_encode = _encoder()


def dump(value: object) -> bytes:
    """ASCII JSON. Raises TypeError for what JSON lacks, ValueError for nan and infinities, RecursionError when too deep."""
    return "".join(_encode(value, 0)).encode("ascii")
