"""Reports of the zygote, read without the json package."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest

from pihost.jsontext import dump
from pisupervisor.link import jsontext

MESSAGES: list[dict[str, Any]] = [
    {}, {"launched": 17}, {"exited": [None, 9], "cpu": 0.25}, {"failed": "bind /ü at /x", "errno": 2, "detail": '"\n\x00'},
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_what_the_zygote_says_arrives(message: dict[str, Any]) -> None:
    assert jsontext.load(dump(message)) == json.loads(dump(message)) == message


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"1", b'{"a":1}x', b'{"a":', b"\xff", b'{"a": \x00}', b"[" * 100_000]
)
def test_everything_else_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        jsontext.load(data)


def test_an_interpreter_without_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "_json":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(jsontext, "_scan", jsontext._scanner())
    assert jsontext.load(b'{"launched":17}') == {"launched": 17}
    with pytest.raises(ValueError):
        jsontext.load(b"{")
