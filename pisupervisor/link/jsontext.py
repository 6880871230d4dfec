"""Small JSON texts read by the interpreter's own C scanner, without the ``json`` package, which imports re: 4 ms in all."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Settings:
    """What ``json.JSONDecoder`` would tell the scanner."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None  # the last one since 3.15
    parse_float, parse_int, parse_constant = float, int, float


def _scanner() -> Callable[[str, int], tuple[Any, int]]:
    try:
        from _json import make_scanner

        settings: Any = _Settings()
        return make_scanner(settings)
    except (ImportError, AttributeError):  # no accelerator, or one that wants to know more
        import json

        decoder: Any = json.JSONDecoder()
        return decoder.raw_decode  # type: ignore[no-any-return]


_scan = _scanner()


def load(data: bytes) -> dict[str, Any]:
    """The object in ``data``, which has no space around it. Raises ValueError for anything else."""
    text = data.decode("ascii")
    try:
        value, end = _scan(text, 0)
    except (StopIteration, RecursionError) as error:
        raise ValueError("no JSON") from error
    if end != len(text) or not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value
