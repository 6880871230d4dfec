"""The host's decoders against hostile bytes, for a bounded time; see scripts/fuzz."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"
ENGINES = ("mutate", "hypothesis", "atheris")
_STACK = 8  # changes of one input, at most

Target = Callable[[bytes], None]


class Found(Exception):
    """An input that lets out what must never come out."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.data, self.error = data, error


def seeds(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def attempt(target: Target, data: bytes) -> None:
    """Raises Found."""
    try:
        target(data)
    except Exception as error:
        raise Found(data, error) from error


# mutate: no feedback, but a hundred times the speed ------------------------------------------------------------------


def mutate(name: str, target: Target, until: float, chance: random.Random) -> int:
    """Changed seeds until the time is over; how many frames (or inputs) that were. Raises Found."""
    known, done = seeds(name), 0
    changed = stream if name == "frames" else changed_bytes
    while time.monotonic() < until:
        for _ in range(200):
            data, count = changed(known, chance)
            attempt(target, data)
            done += count
    return done


def changed_bytes(known: list[bytes], chance: random.Random) -> tuple[bytes, int]:
    data = bytearray(chance.choice(known))
    for _ in range(chance.randint(1, _STACK)):
        at, kind = chance.randint(0, len(data)), chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == 2:
            del data[at : at + chance.randint(1, 16)]
        elif kind == 3:
            other = chance.choice(known)
            begin = chance.randint(0, len(other))
            data[at:at] = other[begin : begin + chance.randint(1, 64)]
        elif kind == 4:
            data[at : at + 1] = chance.choice(
                (b"[", b"{", b'"$":', b"]", b"0", b"\xff", b"-", b"9" * 20, b"\\u0000", b"null")
            )
        else:
            data += data[at : at + 32]
    return bytes(data), 1


def stream(known: list[bytes], chance: random.Random) -> tuple[bytes, int]:
    """Some frames of some seeds, most of them whole, with wrong kinds, ids, lengths and bodies among them."""
    parts = [part for _ in range(chance.randint(1, 4)) for part in split(chance.choice(known)[2:])]
    chance.shuffle(parts)
    made = [changed_frame(part, known, chance) if chance.random() < 0.3 else part for part in parts]
    return bytes((chance.randrange(256), chance.randrange(4))) + b"".join(made), len(made)


def changed_frame(part: bytes, known: list[bytes], chance: random.Random) -> bytes:
    from pihost import wire

    if len(part) < wire.HEADER.size or chance.random() < 0.1:
        return changed_bytes([part], chance)[0]
    body = part[wire.HEADER.size :]
    kind, ident, length = part[3], int.from_bytes(part[4:12], "little"), len(body)
    choice = chance.randrange(5)
    if choice == 0:
        kind = chance.choice((*wire.FROM_CHILD, *range(1, 9), chance.randrange(256)))
    elif choice == 1:
        ident = chance.choice((*range(12), 1 << 63, (1 << 64) - 1))
    elif choice == 2:
        length = chance.choice((0, 1, length + 1, wire.MAX_FRAME, wire.MAX_FRAME + 1, (1 << 32) - 1))
    else:
        body = changed_bytes([body, *known[:4]], chance)[0][: 1 << 16]
        length = len(body)
    return wire.HEADER.pack(wire.MAGIC, wire.VERSION, kind, ident, length) + body


def split(data: bytes) -> Iterator[bytes]:
    """The frames of a stream, by their headers; what is left is the last one."""
    from pihost import wire

    while len(data) >= wire.HEADER.size:
        size = wire.HEADER.size + int.from_bytes(data[12:16], "little")
        yield data[:size]
        data = data[size:]
    if data:
        yield data


# hypothesis: shrinks what it finds -----------------------------------------------------------------------------------


def with_hypothesis(name: str, target: Target, until: float, chance: random.Random) -> int:
    from hypothesis import HealthCheck, given, seed, settings, strategies as st

    known, done = seeds(name), 0
    built = st.integers(0, (1 << 64) - 1).map(lambda number: stream(known, random.Random(number))[0])
    inputs = st.binary(max_size=512) | st.sampled_from(known) | (built if name == "frames" else st.nothing())

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        if time.monotonic() < until:
            attempt(target, data)

    examples = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < until:
        seed(chance.getrandbits(32))(examples(given(inputs)(one)))()
    return done


# atheris: follows the branches ---------------------------------------------------------------------------------------


def with_atheris(name: str, seconds: float, keep: bool) -> int:
    """In a process of its own: libFuzzer ends it. Raises Found. What opens new branches joins the corpus with ``keep``."""
    with tempfile.TemporaryDirectory() as folder:
        fresh, crash = Path(folder) / "fresh", Path(folder) / "crash"
        fresh.mkdir()
        command = [
            sys.executable, __file__, "--inside-atheris", name, str(fresh), str(CORPUS / name),
            f"-max_total_time={max(1, round(seconds))}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048",
            f"-exact_artifact_path={crash}", "-print_final_stats=1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if crash.exists():
            from fuzz_targets import TARGETS

            attempt(TARGETS[name], crash.read_bytes())  # again, for the error itself
            raise Found(crash.read_bytes(), RuntimeError(f"only under atheris: {done.stderr[-3000:]}"))
        if done.returncode:
            raise SystemExit(f"atheris did not run:\n{done.stderr[-2000:]}")
        if keep:
            for file in fresh.iterdir():
                shutil.copy(file, CORPUS / name / file.name)
        counted = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        return int(counted[0]) if counted else 0


def inside_atheris(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["pisupervisor", "pihost"]):
        import fuzz_targets
    atheris.Setup([sys.argv[0], *arguments], fuzz_targets.TARGETS[name])
    atheris.Fuzz()


# -----------------------------------------------------------------------------------------------------------------------


def run(engine: str, name: str, seconds: float, chance: random.Random, keep: bool) -> dict[str, object]:
    from fuzz_targets import TARGETS

    start = time.monotonic()
    if engine == "atheris":
        done = with_atheris(name, seconds, keep)
    else:
        work = mutate if engine == "mutate" else with_hypothesis
        done = work(name, TARGETS[name], start + seconds, chance)
    took = time.monotonic() - start
    return {
        "engine": engine,
        "target": name,
        "inputs": done,
        "per_second": round(done / took),
        "seconds": round(took, 1),
    }


def has_atheris() -> bool:
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


def main() -> int:
    if sys.argv[1:2] == ["--inside-atheris"]:
        inside_atheris(sys.argv[2], sys.argv[3:])
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it (default 60)")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all that are installed")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", action="store_true", help="add what opens new branches to tests/corpus (atheris)")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if parsed.seed is None else parsed.seed
    engines = parsed.engine or [engine for engine in ENGINES if engine != "atheris" or has_atheris()]
    rounds = [(engine, name) for engine in engines for name in parsed.target or TARGETS]
    rows = []
    for engine, name in rounds:
        try:
            rows.append(run(engine, name, parsed.seconds / len(rounds), random.Random(f"{seed} {name}"), parsed.keep))
        except Found as found:
            return tell(found, name, seed)
        if not parsed.json:
            print("{engine:10} {target:8} {inputs:9} inputs  {per_second:7}/s".format(**rows[-1]), flush=True)
    if parsed.json:
        print(json.dumps({"seed": seed, "rows": rows}))
    return 0


def tell(found: Found, name: str, seed: int) -> int:
    """Keep the input, so that from now on the tests try it first."""
    file = CORPUS / name / f"found-{hashlib.sha256(found.data).hexdigest()[:16]}"
    file.write_bytes(found.data)
    traceback.print_exception(found.error)
    print(f"FOUND in {name} (seed {seed}): {found}\n  the input is kept: {file}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
