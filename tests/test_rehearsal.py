"""What a zygote does while nobody waits: it leaves nothing behind but what the interpreter has learnt."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import nothing_left

from pihost import rehearsal, wire
from pihost.inside import serve
from pisupervisor import ProcessIsolator, Template

TOP = Path(__file__).parent.parent
ALL_OF_IT = f"""
import gc, os, sys
sys.path.insert(0, {str(TOP)!r})
from pihost import zygote
from pihost import rehearsal
from pihost.inside import callbacks, objects
def state():
    return sorted(os.listdir("/proc/self/fd")), list(sys.meta_path), os.listdir("/proc/self/task"), len(objects.kept)
had = set(sys.modules)
rehearsal.once(0)
before = state()
pieces = list(rehearsal.pieces(gc.collect))
assert state() == before, (before, state())
assert callbacks.host is None
print(len(pieces), *sorted(set(sys.modules) - had))
"""


def test_nothing_is_left_but_the_imports() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", ALL_OF_IT], capture_output=True, text=True)
    assert done.stderr == ""
    count, *modules = done.stdout.split()
    assert int(count) == rehearsal.ROUNDS + len(rehearsal._IMPORTS)
    assert set(rehearsal._IMPORTS) <= set(modules)
    assert not [name for name in modules if name.startswith("rehearsed")]


def test_each_call_is_answered_as_a_childs_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[int] = []
    original = serve.Link.send
    monkeypatch.setattr(
        serve.Link, "send", lambda link, kind, *rest: (kinds.append(kind), original(link, kind, *rest))[1]
    )
    rehearsal.once(1)
    assert kinds == [wire.RESULT, wire.RESULT, wire.RAISED, wire.RESULT]


@pytest.mark.linux
def test_a_module_of_the_users_may_have_the_same_name(tmp_path: Path) -> None:
    plugin = tmp_path / "rehearsed.py"
    plugin.write_text("import sys\ndef answer(): return [name for name in sys.modules if 'rehearsed' in name]\n")
    with nothing_left(), Template() as template:
        template.create().close()
        time.sleep(0.3)  # it has rehearsed by now
        with template.create(), template.create() as isolator:
            assert isolator.invoke_method(plugin, "answer") == ["rehearsed"]


@pytest.mark.linux
def test_pickle_finds_what_a_snippet_defines() -> None:
    with nothing_left(), Template() as template:
        template.create().close()
        time.sleep(0.3)  # it has rehearsed by now
        with template.create(), template.create() as isolator:
            isolator.run_source("class Answer:\n    value = 42\n")
            assert isolator.run_source("import pickle\npickle.loads(pickle.dumps(Answer())).value").value == 42


@pytest.mark.linux
def test_a_preloaded_module_that_breaks_it_breaks_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "spoiler.py").write_text(
        "from pihost import rehearsal\ndef fail(number): raise RuntimeError\nrehearsal.once = fail\n"
    )
    with nothing_left(), ProcessIsolator.create(import_paths=[tmp_path], preload=["spoiler"]) as isolator:
        time.sleep(0.3)
        with ProcessIsolator.create(import_paths=[tmp_path], preload=["spoiler"]) as other:
            assert isolator.invoke(os.getpid) == other.invoke(os.getpid) == 2
