"""The fuzzer's targets over the kept corpus, a short round of each engine, and that it sees what it looks for."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[1]
CORPUS = TOP / "tests" / "corpus"
sys.path.append(str(TOP / "scripts" / "lib"))

import fuzz  # noqa: E402
import fuzz_targets  # noqa: E402

FILES = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_corpus_of_every_target_lets_nothing_out(target: str) -> None:
    files = [file for file in FILES if file.parent.name == target]
    assert len(files) >= 4
    for file in files:
        fuzz.attempt(fuzz_targets.TARGETS[target], file.read_bytes())


def test_seeds_reach_what_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fuzzer would try the first error only."""
    seen: list[Any] = []
    monkeypatch.setattr(fuzz_targets, "unpack_answer", lambda answer, *_: seen.append(answer.kind))
    for name in (
        "result-text",
        "raised",
        "refused-compile",
        "stream",
        "callback",
        "callback-pieces",
        "pieces",
        "room",
        "mapped",
    ):
        before = len(seen)
        fuzz_targets.frames((CORPUS / "frames" / name).read_bytes())
        assert len(seen) > before, name


@pytest.mark.parametrize("engine", ["mutate", "hypothesis"])
def test_a_short_round(engine: str) -> None:
    command = [sys.executable, "scripts/lib/fuzz.py", "--seconds", "5", "--engine", engine, "--seed", "7", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
    assert done.returncode == 0, done.stderr
    rows = {row["target"]: row["inputs"] for row in json.loads(done.stdout)["rows"]}
    assert rows.keys() == fuzz_targets.TARGETS.keys()
    assert min(rows.values()) >= 10


def test_a_short_round_that_follows_branches() -> None:
    if not fuzz.has_atheris():
        pytest.skip("atheris is not installed (the extra fuzz)")
    assert fuzz.with_atheris("report", 1, keep=False) > 10


def break_on(mark: bytes) -> fuzz.Target:
    def target(data: bytes) -> None:
        if mark in data:
            raise KeyError("planted")

    return target


@pytest.mark.parametrize("engine", [fuzz.mutate, fuzz.with_hypothesis])
def test_a_planted_defect_is_found_and_its_input_kept(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CORPUS / "report", tmp_path / "report")
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    with pytest.raises(fuzz.Found, match="KeyError") as caught:
        engine("report", break_on(b"launched"), fuzz.time.monotonic() + 20, random.Random(3))
    assert fuzz.tell(caught.value, "report", 3) == 1
    (kept,) = (tmp_path / "report").glob("found-*")
    assert b"launched" in kept.read_bytes()
    assert "FOUND in report (seed 3)" in capsys.readouterr().err


def test_frames_of_a_stream_are_split_and_counted() -> None:
    stream = fuzz_targets.frame(65, 1, b"one") + fuzz_targets.frame(69, 2, b"three")
    assert list(fuzz.split(stream)) == [stream[:19], stream[19:]]
    assert list(fuzz.split(stream[:-1]))[1] == stream[19:-1]
    data, count = fuzz.stream([b"\0\0" + stream], random.Random(1))
    assert count >= 2
    assert len(data) > 2
