"""Well-known libraries do real work in a child under the default walls, and most of it under ``strict`` too."""

from __future__ import annotations

import importlib.util

import pytest
from libraries import NEEDS, attempt

pytestmark = pytest.mark.linux

#: what ``strict`` refuses, and how that shows
STRICT_REFUSES = {
    "sqlite": "sqlite3.OperationalError: ",  # its locks
    "sqlite_wal": "sqlite3.OperationalError: ",
}


@pytest.mark.parametrize("profile", ["default", "strict"])
@pytest.mark.parametrize("name", NEEDS)
def test_real_work(name: str, profile: str) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: scripts/compat does that (extra compat)")
    refusal = STRICT_REFUSES.get(name) if profile == "strict" else None
    said = attempt(name, profile)
    assert said.startswith(refusal) if refusal else said == "works"
