"""Source snippets and scripts. Snippets run here; scripts also in a plain interpreter, beside ``python tool.py``."""

from __future__ import annotations

import linecache
import os
import pickle
import subprocess
import sys
import textwrap
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pihost.inside.resolve import IMPORT_HINT, CompileFailed, Library, NotFound
from pihost.inside.run import exit_code, run_script, run_source, source_module, strip_frames
from pisupervisor.link.sources import CodeReader

ROOT = Path(__file__).parent.parent

#: Runs the code on stdin as a script with argv[1:] as its ``sys.argv``, as the child does.
DRIVER = """
import sys, os, pickle
sys.path.insert(0, {root!r})
pid = os.getpid()
from pihost.inside.resolve import Library
from pihost.inside.run import run_script
library = Library()
payload = pickle.loads(sys.stdin.buffer.read())
library.add(payload)
before = sys.argv, sys.modules["__main__"], sys.excepthook
code = run_script(library, payload[0], sys.argv[1:])
if os.getpid() != pid:
    print("a second answer")
assert (sys.argv, sys.modules["__main__"], sys.excepthook) == before
if code < 0:
    import signal
    signal.signal(-code, signal.SIG_DFL)
    os.kill(pid, -code)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def clean_interpreter() -> Iterator[None]:
    modules, finders, main = set(sys.modules), list(sys.meta_path), sys.modules["__main__"]
    yield
    sys.meta_path[:] = finders
    sys.modules["__main__"] = main
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    linecache.clearcache()


@pytest.fixture
def namespace() -> dict[str, Any]:
    main = sys.modules["__main__"] = source_module()
    return main.__dict__


def as_script(path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """``path`` through CodeReader and run_script, in a plain interpreter that cannot see ``path``'s text on disk."""
    payload = pickle.dumps(CodeReader().read(path).payload())
    moved = path.rename(path.with_name(path.name + ".moved"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", DRIVER.format(root=str(ROOT)), str(path), *argv],
            input=payload,
            capture_output=True,
        )
    finally:
        moved.rename(path)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def as_python(path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(path), *argv], capture_output=True, text=True)


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("x = 6 * 7\nx", 42), ("x = 1", None), ("", None), ("# nothing", None), ("'text'", "text"), ("0", 0),
        ("1;2;", 2), ("def f(): return 3\nf()", 3), ("if True:\n    5", None), ("__name__", "__main__"), ("None", None),
        ("from __future__ import annotations\ndef f(x: nope): return 1\nf(2)", 1), ("(\n1 +\n2\n)", 3),
    ],
)  # fmt: skip
def test_value_of_the_last_expression(namespace: dict[str, Any], source: str, value: Any) -> None:
    assert run_source(namespace, source) == value


def test_state_is_kept_between_snippets(namespace: dict[str, Any]) -> None:
    run_source(namespace, "import math\ntotal = 1")
    run_source(namespace, "def add(n):\n    global total\n    total += n\n    return total")
    assert run_source(namespace, "add(math.floor(2.5))") == 3
    assert run_source({"__name__": "__main__", "__builtins__": __builtins__}, "'total' in dir()") is False


def test_classes_of_snippets_can_be_found(namespace: dict[str, Any]) -> None:
    source = "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n"
    run_source(namespace, source + "p = pickle.loads(pickle.dumps(P(1)))")
    assert run_source(namespace, "p == P(1)") is True


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("x = 1\ny = = 2", 2, "y = = 2"), ("await f()", 1, "await"), ("return 1", 1, "return 1"), ("a\0b", None, ""),
        ("(" * 300, 1, "("), ("-" * 100_000 + "1", None, ""), ("\n\nbreak", 3, "break"), ("x = '\ud800'", None, ""),
    ],
)  # fmt: skip
def test_bad_syntax(namespace: dict[str, Any], source: str, line: int | None, text: str) -> None:
    with pytest.raises(CompileFailed) as info:
        run_source(namespace, source)
    assert info.value.file == "<source>"
    assert line is None or info.value.line == line
    assert text in str(info.value)
    assert run_source(namespace, "1") == 1


def test_traceback_shows_lines_also_of_earlier_snippets(namespace: dict[str, Any]) -> None:
    run_source(namespace, "def divide(x):\n    return 1 / x  # first\n")
    with pytest.raises(ZeroDivisionError) as info:
        run_source(namespace, "y = 0\ndivide(y)  # second\n")
    strip_frames(info.value)
    text = "".join(traceback.format_exception(info.value))
    assert 'File "<source>", line 2, in divide\n    return 1 / x  # first\n' in text
    assert 'File "<source 2>", line 2, in <module>\n    divide(y)  # second\n' in text
    assert "inside/run.py" not in text


def test_lines_are_there_when_linecache_is_imported_last() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    script += """if True:
        from pihost.inside.run import run_source, source_module
        sys.modules.pop("linecache", None)  # from 3.13 on, -c itself has imported it
        assert "ast" not in sys.modules
        namespace = source_module().__dict__
        run_source(namespace, "def f():\\n    1 / 0  # here")
        try:
            run_source(namespace, "f()")
        except ZeroDivisionError:
            import traceback
            traceback.print_exc()
    """
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert "    1 / 0  # here\n" in done.stderr


def test_traceback_that_the_snippet_itself_prints(namespace: dict[str, Any]) -> None:
    source = (
        "import traceback\ntry:\n    1 / 0  # mine\nexcept ZeroDivisionError:\n    text = traceback.format_exc()\ntext"
    )
    assert "1 / 0  # mine" in run_source(namespace, source, "cell.py")


def test_remembered_snippets_are_bounded(namespace: dict[str, Any]) -> None:
    for number in range(200):
        run_source(namespace, f"x = {number}")
    assert len(namespace["__loader__"].sources) == 64
    assert len([name for name in linecache.cache if name.startswith("<source")]) <= 64
    run_source(namespace, "globals().clear()")
    assert run_source(namespace, "1 + 1") == 2


def test_exit_in_a_snippet_is_an_exception(namespace: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        run_source(namespace, "import sys\nsys.exit(3)")


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nprint(sys.argv[1:], __name__, __spec__, __package__)",
        "import sys\nsys.exit()", "import sys\nsys.exit(7)", "import sys\nsys.exit(-1)",
        "import sys\nsys.exit(256 + 3)",
        "import sys\nsys.exit(True)", "import sys\nsys.exit('went wrong')",
        "import sys\nsys.exit((1, 2))", "raise SystemExit", "raise SystemExit(None)",
        "def f():\n    raise ValueError('bad')  # here\n\nf()", "x = 1\nx = = 2", "x = 1\nreturn x",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
        "import sys\nsys.excepthook = lambda kind, *rest: print('hook', kind.__name__)\n1 / 0",
        "import sys\nsys.excepthook = lambda *_: sys.exit(5)\n1 / 0",
        "import sys\ndef hook(*_): raise ValueError('in the hook')\nsys.excepthook = hook\n1 / 0",
        "raise KeyboardInterrupt", "import os\nos.kill(os.getpid(), 2)",
        "import atexit\natexit.register(print, 'after')\nraise KeyboardInterrupt('why')",
        "import sys\nsys.exit(1 << 70)", "import sys\nsys.exit(-(1 << 70))", "import sys\nsys.exit(1 << 40 | 5)",
        "import sys\nsys.exit('')", "import sys\nsys.exit('\\ud800')", "raise SystemExit(SystemExit(4))",
        "import json\njson.loads('{')", "import no_such_module_anywhere",
        "import traceback\ntry:\n    1 / 0  # mine\nexcept ZeroDivisionError:\n    traceback.print_exc()",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n"
        "print(pickle.loads(pickle.dumps(P(1))))",
        "import sys\nsys.stdout.write('no newline')",
        "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('main')",
        "import atexit, sys\natexit.register(print, 'bye')\n@atexit.register\ndef last():\n    print('last')\nsys.exit(3)",
        "import atexit\natexit.register(print, 'no')\natexit.unregister(print)\nfrom atexit import register\nregister(print, 1)",
        "import atexit\natexit.register(print, 'after')\n1 / 0",
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor()\nprint(pool.submit(pow, 2, 3).result())",
        "import os, sys\nif os.fork() == 0:\n    print('copy')\n    sys.exit(4)\nprint(os.wait()[1] >> 8)",
    ],
)  # fmt: skip
def test_scripts_do_what_python_does(tmp_path: Path, source: str) -> None:
    """parity: 39"""
    path = write(tmp_path / "tool.py", source)
    ours, theirs = as_script(path, "--fast", "x y"), as_python(path, "--fast", "x y")
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    hint = [f"  hint: {IMPORT_HINT}"] if "No module named" in theirs.stderr else []
    assert without_carets(ours.stderr) == without_carets(theirs.stderr) + hint


def without_carets(text: str) -> list[str]:
    return [line for line in text.splitlines() if set(line.strip()) - set("^~")]


def test_script_sees_its_own_name_and_arguments(tmp_path: Path) -> None:
    """parity: 39"""
    path = write(tmp_path / "tool.py", "import sys\nprint(sys.argv, __file__)\nsys.exit(len(sys.argv))")
    done = as_script(path, "--fast", "2")
    assert done.returncode == 3
    assert done.stdout == f"{[str(path), '--fast', '2']} {path}\n"


def test_package_and_archives_as_scripts(tmp_path: Path) -> None:
    source = """
        import sys
        from app import words
        from .words import more
        print(__name__, __package__, words.text, more, sys.argv[1:])
        sys.exit(5)
    """
    write(tmp_path / "app/__main__.py", source)
    write(tmp_path / "app/__init__.py", "print('init')")
    write(tmp_path / "app/words.py", "text, more = 'text', 'more'")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in ("__main__.py", "__init__.py", "words.py"):
            archive.write(tmp_path / "app" / name, f"app/{name}")
    with zipfile.ZipFile(tmp_path / "flat.pyz", "w") as archive:
        archive.writestr("__main__.py", "import helper, sys\nprint(helper.text, __package__)\nsys.exit(helper.code)")
        archive.writestr("helper.py", "text, code = 'helped', 6")
    for name in ("app", "whole.zip"):
        done = as_script(tmp_path / name, "-v")
        assert (done.returncode, done.stdout, done.stderr) == (5, "init\n__main__ app text more ['-v']\n", "")
    done = as_script(tmp_path / "flat.pyz")
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (6, "helped", "")


def test_compile_error_in_a_module_of_a_script(tmp_path: Path) -> None:
    write(tmp_path / "app/__main__.py", "from . import broken")
    write(tmp_path / "app/broken.py", "x = 1\nreturn 2\n")
    done = as_script(tmp_path / "app")
    assert done.returncode == 1
    assert f'File "{tmp_path}/app/__main__.py", line 1' in done.stderr
    assert f'File "{tmp_path}/app/broken.py", line 2\n    return 2\n' in done.stderr
    assert "SyntaxError: 'return' outside function" in done.stderr
    assert "pihost" not in done.stderr


def test_what_cannot_run_as_a_script() -> None:
    library = Library()
    library.add(("module:json", "module", "json", "", ()))
    library.add(("package:1", "package", "pkg", "/host/pkg", [("pkg/__init__.py", b"")]))
    for key, text in (("module:json", "module name"), ("package:1", "no __main__.py"), ("gone", "never sent")):
        with pytest.raises(NotFound, match=text) as info:
            run_script(library, key, [])
        assert info.value.stage == "module"


def test_each_run_starts_afresh(capfd: pytest.CaptureFixture[str]) -> None:
    library = Library()
    helper = b"import sys\ncount = 0\n"
    main = b"from . import helper\nhelper.count += 1\nprint(helper.count, 'seen' in globals())\nseen = 1\n"
    files = [("pkg/__init__.py", b""), ("pkg/__main__.py", main), ("pkg/helper.py", helper)]
    library.add(("package:1", "package", "pkg", "/host/pkg", files))
    callers_own = library.callable_for
    before = dict(sys.modules), list(sys.meta_path)
    assert [run_script(library, "package:1", []) for _ in range(2)] == [0, 0]
    assert capfd.readouterr().out == "1 False\n1 False\n"
    assert {name for name in sys.modules if name not in before[0] and name.startswith("pkg")} == set()
    assert sys.meta_path == before[1]
    with pytest.raises(NotFound, match="is of type int"):
        callers_own("package:1", "helper.count")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (None, 0),
        (0, 0),
        (5, 5),
        (300, 44),
        (-1, 255),
        (1 << 63, 255),
        (-(1 << 63), 0),
        (False, 0),
        ("text", 1),
        (1.5, 1),
    ],
)
def test_exit_codes(code: object, status: int) -> None:
    assert exit_code(code) == status


def test_closed_or_hostile_streams_change_no_exit_code(tmp_path: Path) -> None:
    for source, code in (
        ("import sys\nsys.stderr.close()\nsys.exit('x')", 1),
        ("import sys\nsys.stdout = None\nsys.stderr = None\n1 / 0", 1),
        ("class Bad:\n    def __str__(self): raise ValueError\nraise SystemExit(Bad())", 1),
        ("import sys\nsys.stderr.close()\nraise ValueError('x')", 1),
    ):
        assert as_script(write(tmp_path / "tool.py", source)).returncode == code


def test_a_script_that_forks_answers_once(tmp_path: Path) -> None:
    source = "import os\nif os.fork() == 0:\n    raise ValueError('copy')\nprint('status', os.wait()[1] >> 8)"
    done = as_script(write(tmp_path / "tool.py", source))
    assert (done.returncode, done.stdout) == (0, "status 1\n")
    assert done.stderr.count("ValueError: copy") == 1


def test_frames_of_a_chain_and_of_groups_are_the_users_only() -> None:
    library = Library()
    source = b"def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise ValueError from e\n"
    library.add(("file:1", "file", "plugin", "/host/plugin.py", [("plugin.py", source)]))

    with pytest.raises(ValueError) as info:
        library.callable_for("file:1", "f")()
    error = info.value
    error.__context__ = error  # a ring must not hang
    strip_frames(error)
    assert error.__cause__ is not None
    frames = traceback.extract_tb(error.__cause__.__traceback__)
    assert [(frame.filename, frame.lineno) for frame in frames] == [("/host/plugin.py", 3)]


def test_works_on_the_oldest_supported_syntax() -> None:
    """The child may be another interpreter, from 3.9 on: what runs there must at least parse there."""
    import ast

    for name in ("importer", "resolve", "resources", "run"):
        source = (ROOT / "pihost" / "inside" / f"{name}.py").read_text()
        ast.parse(source, feature_version=(3, 9))
        assert os.linesep == "\n"
