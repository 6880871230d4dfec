"""Library: code that came as bytes, and what a dotted target names in it. In this process."""

from __future__ import annotations

import dataclasses
import io
import linecache
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pihost.inside.importer import Importer
from pihost.inside.resolve import CompileFailed, Library, NotFound
from pisupervisor.link.sources import CodeReader


@pytest.fixture(autouse=True)
def clean_interpreter() -> Iterator[None]:
    modules, finders = set(sys.modules), list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    linecache.clearcache()


@pytest.fixture
def library() -> Library:
    return Library()


def add_file(library: Library, source: str | bytes, origin: str = "/host/plugin.py") -> str:
    content = textwrap.dedent(source).encode() if isinstance(source, str) else source
    name = Path(origin).stem
    key = f"file:{hash(content)}:{origin}"
    library.add((key, "file", name, origin, [(f"{name}.py", content)]))
    return key


def add_tree(library: Library, kind: str, origin: str, files: dict[str, str | bytes]) -> str:
    contents = [(n, textwrap.dedent(c).encode() if isinstance(c, str) else c) for n, c in files.items()]
    key = f"{kind}:{hash(tuple(contents))}:{origin}"
    library.add((key, kind, Path(origin).stem, origin, contents))
    return key


PLUGIN = """
    import dataclasses
    calls = 0
    VALUE = 7

    def shrink(data, *, size=1):
        return data[:size]

    def _private(*args, **kwargs):
        return len(args) + len(kwargs)

    def count():
        global calls
        calls += 1
        return calls

    class Tools:
        made = 0

        def __init__(self):
            Tools.made += 1
            self.uses = 0

        @staticmethod
        def double(x):
            return 2 * x

        @classmethod
        def label(cls):
            return cls.__name__

        def plain(data):
            return data + 1

        def nothing():
            return "nothing"

        def use(self, by=1):
            self.uses += by
            return self.uses

        class Inner:
            @staticmethod
            def deep():
                return "deep"

    class Child(Tools):
        pass

    class NeedsName:
        def __init__(self, name, *, colour, size=1):
            self.name = name

        def hello(self):
            return self.name

    @dataclasses.dataclass
    class Point:
        x: "int"
        y: int = 0

    def point():
        return Point(1)

    if __name__ == "__main__":
        raise SystemExit("run as a script")
"""


@pytest.mark.parametrize(
    ("target", "args", "result"),
    [
        ("shrink", ("abc",), "a"), ("Tools.double", (4,), 8), ("Tools.label", (), "Tools"), ("Tools.plain", (1,), 2),
        ("Tools.nothing", (), "nothing"), ("Tools.use", (3,), 3), ("Tools.Inner.deep", (), "deep"),
        ("Child.label", (), "Child"), ("Child.use", (2,), 2), ("Child.double", (1,), 2),
    ],
)  # fmt: skip
def test_targets_of_a_file(library: Library, target: str, args: tuple[Any, ...], result: Any) -> None:
    """parity: 38"""
    assert library.callable_for(add_file(library, PLUGIN), target)(*args) == result


def test_private_names_and_any_number_of_arguments(library: Library) -> None:
    """parity: 46"""
    assert library.callable_for(add_file(library, PLUGIN), "_private")(*range(12), a=1) == 13


def test_an_instance_method_gets_a_new_instance_for_each_call(library: Library) -> None:
    key = add_file(library, PLUGIN)
    assert [library.callable_for(key, "Tools.use")(5) for _ in range(3)] == [5, 5, 5]
    assert sys.modules["plugin"].Tools.made == 3


def test_a_module_is_loaded_once_and_keeps_its_state(library: Library) -> None:
    key = add_file(library, PLUGIN)
    assert [library.callable_for(key, "count")() for _ in range(3)] == [1, 2, 3]
    assert add_file(library, PLUGIN) == key
    assert library.callable_for(key, "count")() == 4
    assert library.callable_for(key, "count") is library.callable_for(key, "count")


def test_missing_attribute_says_what_is_near(library: Library) -> None:
    """parity: 41 (missing attribute)"""
    key = add_file(library, PLUGIN)
    with pytest.raises(
        NotFound, match=r"/host/plugin.py: module 'plugin' has no 'shrnk'; did you mean shrink\?"
    ) as info:
        library.callable_for(key, "shrnk")
    assert info.value.stage == "attribute"
    with pytest.raises(NotFound, match="class 'Tools' has no 'dobule'; did you mean double"):
        library.callable_for(key, "Tools.dobule")
    with pytest.raises(NotFound, match="it has"):
        library.callable_for(key, "Tools.zzzzzz")
    for bad in ("", "a..b", "shrink()", "a b"):
        with pytest.raises(NotFound, match="no dotted name") as info:
            library.callable_for(key, bad)


def test_not_callable(library: Library) -> None:
    """parity: 41 (not callable)"""
    with pytest.raises(NotFound, match="'VALUE' is of type int, which cannot be called") as info:
        library.callable_for(add_file(library, PLUGIN), "VALUE")
    assert info.value.stage == "callable"


def test_a_class_that_needs_arguments_cannot_be_made_for_a_call(library: Library) -> None:
    key = add_file(library, PLUGIN)
    with pytest.raises(NotFound, match="cannot be made without name, colour") as info:
        library.callable_for(key, "NeedsName.hello")
    assert info.value.stage == "callable"
    assert library.callable_for(key, "NeedsName")("x", colour=1).hello() == "x"
    abstract = "import abc\nclass A(abc.ABC):\n    @abc.abstractmethod\n    def f(self): pass\n    def g(self): pass\n"
    with pytest.raises(NotFound, match="which is abstract: f not defined"):
        library.callable_for(add_file(library, abstract, "/host/abstract.py"), "A.g")


def test_decorated_methods(library: Library) -> None:
    source = """
        import functools
        def bare(f):
            def wrapper(*args):
                return f(*args)
            return wrapper
        class T:
            @functools.lru_cache
            def cached(self, x): return x
            @bare
            def hidden(self, x): return x
            @staticmethod
            @functools.lru_cache
            def static(x): return x
    """
    key = add_file(library, source)
    assert [library.callable_for(key, f"T.{name}")(4) for name in ("cached", "hidden", "static")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("x = 1\ndef f(:\n", 2, "def f(:"), ("x = 1\nreturn x\n", 2, "return x"), (b"x = '\xff'\n", None, ""),
        (b"x = 1\0\n", None, ""), ("(" * 300 + "\n", 1, "(((("), ("# coding: nonsense\n", None, "nonsense"),
        ("class C:\n  def f(self):\n pass", 3, "unindent"),
    ],
)  # fmt: skip
def test_bad_syntax(library: Library, source: str | bytes, line: int | None, text: str) -> None:
    """parity: 41 (bad syntax)"""
    content = source.encode() if isinstance(source, str) else source
    with pytest.raises(CompileFailed) as info:
        library.callable_for(add_file(library, content), "f")
    assert info.value.file == "/host/plugin.py"
    assert line is None or info.value.line == line
    assert text in str(info.value)
    assert str(info.value) == info.value.message


def test_the_modules_own_exception_is_the_users(library: Library) -> None:
    key = add_file(library, "import json\nvalue = json.loads('{')\n")
    with pytest.raises(ValueError, match="Expecting") as info:
        library.callable_for(key, "f")
    frames = [frame for frame in traceback.extract_tb(info.value.__traceback__) if frame.filename == "/host/plugin.py"]
    assert [(frame.lineno, frame.line) for frame in frames] == [(2, "value = json.loads('{')")]
    assert "plugin" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        library.callable_for(add_file(library, "import no_such_dependency"), "f")
    with pytest.raises(SyntaxError) as raised:  # the user's own call of the compiler is no failed compilation
        library.callable_for(add_file(library, "compile('x x', 'y', 'exec')"), "f")
    assert not isinstance(raised.value, CompileFailed)


def test_traceback_shows_the_users_file_line_and_text(library: Library) -> None:
    key = add_file(library, "def fail():\n    return 1 / 0  # here\n", "/home/me/plugin.py")
    with pytest.raises(ZeroDivisionError) as info:
        library.callable_for(key, "fail")()
    text = "".join(traceback.format_exception(info.value))
    assert 'File "/home/me/plugin.py", line 2, in fail\n    return 1 / 0  # here\n' in text


def test_importing_shows_no_frames_of_ours(library: Library) -> None:
    files = {"pkg/__init__.py": "", "pkg/a.py": "from pkg import b\n", "pkg/b.py": "1 / 0\n"}
    with pytest.raises(ZeroDivisionError) as info:
        library.callable_for(add_tree(library, "package", "/host/pkg", files), "a.f")
    frames = [frame.filename for frame in traceback.extract_tb(info.value.__traceback__)]
    last = frames[frames.index("/host/pkg/a.py") :]
    assert last == ["/host/pkg/a.py", "/host/pkg/b.py"]


def test_source_encodings(library: Library) -> None:
    latin = "# -*- coding: latin-1 -*-\ndef f(): return 'grün'\n".encode("latin-1")
    marked = b"\xef\xbb\xbfdef f(): return 'gr\xc3\xbcn'\n"
    dos = "def f():\r\n    return 'grün'\r\n".encode()
    for number, source in enumerate((latin, marked, dos)):
        assert library.callable_for(add_file(library, source, f"/host/enc{number}.py"), "f")() == "grün"
    assert "grün" in linecache.getline("/host/enc0.py", 2, vars(sys.modules["enc0"]))


def test_files_with_one_stem_do_not_collide(library: Library) -> None:
    source = "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\ndef make(): return P({0})\n"
    first = add_file(library, source.format(1), "/host/a/plugin.py")
    second = add_file(library, source.format(2), "/host/b/plugin.py")
    one, two = (library.callable_for(key, "make")() for key in (first, second))
    assert (one.x, two.x) == (1, 2)
    assert [type(value).__module__ for value in (one, two)] == ["plugin", "plugin~2"]
    assert [pickle.loads(pickle.dumps(value)) for value in (one, two)] == [one, two]
    assert dataclasses.is_dataclass(two)


def test_changed_content_is_a_new_module_and_the_old_one_lives_on(library: Library) -> None:
    source = "calls = {0}\ndef count():\n    global calls\n    calls += 1\n    return calls\n"
    old = add_file(library, source.format(0))
    assert library.callable_for(old, "count")() == 1
    new = add_file(library, source.format(100))
    assert library.callable_for(new, "count")() == 101
    assert library.callable_for(old, "count")() == 2


@pytest.mark.parametrize("origin", ["/h/json.py", "/h/sys.py", "/h/wave.py", "/h/__main__.py", "/h/pytest.py"])
def test_a_file_never_takes_the_place_of_another_module(library: Library, origin: str) -> None:
    stem = Path(origin).stem
    before = sys.modules.get(stem)
    key = add_file(library, "import json\ndef f(): return __name__, json.dumps([1])\n", origin)
    assert library.callable_for(key, "f")() == (f"{stem}~2", "[1]")
    assert sys.modules.get(stem) is before


def test_odd_file_names(library: Library, tmp_path: Path) -> None:
    for name in ("my-tool.py", "a.b.py", "ünï.py", "tool"):
        path = tmp_path / name
        path.write_text("def f(): return 1 / 0\n")
        code = CodeReader().read(path)
        library.add(code.payload())
        with pytest.raises(ZeroDivisionError) as info:
            library.callable_for(code.key, "f")()
        assert traceback.extract_tb(info.value.__traceback__)[-1].filename == str(path)


PACKAGE: dict[str, str | bytes] = {
    "pkg/__init__.py": "from .run import run\nfrom pkg.sub import shared\n",
    "pkg/run.py": "from . import sub\ndef run(): return 'run ' + sub.shared\ndef more(): return 'more'\n",
    "pkg/sub/__init__.py": "shared = 'shared'\n",
    "pkg/sub/mod.py": """
        import pkgutil
        import importlib.resources as resources
        from ..run import run
        from . import shared as again

        def func(): return run() + again
        def data(): return pkgutil.get_data("pkg", "data/words.txt")
        def text(): return (resources.files("pkg") / "data" / "words.txt").read_text(encoding="utf-8")
        def names(): return sorted(entry.name for entry in resources.files(__package__).parent().iterdir())
        def on_disk():
            with resources.as_file(resources.files("pkg").joinpath("data/words.txt")) as path:
                return path.read_bytes()
        def missing(): return (resources.files("pkg") / "nothing.txt").read_bytes()
        class Tools:
            def use(self): return 'used'
    """,
    "pkg/data/words.txt": "hello\n",
    "pkg/loose/mod.py": "def f(): return __name__\n",
}


@pytest.mark.parametrize(
    ("target", "result"),
    [
        ("run", "run shared"), ("run.run", "run shared"), ("run.more", "more"), ("sub.mod.func", "run sharedshared"),
        ("sub.mod.Tools.use", "used"), ("sub.mod.data", b"hello\n"), ("sub.mod.text", "hello\n"),
        ("sub.mod.on_disk", b"hello\n"), ("loose.mod.f", "pkg.loose.mod"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["package", "archive", "named"])
def test_targets_of_packages_and_archives(library: Library, kind: str, target: str, result: Any) -> None:
    """parity: 38"""
    origin = "/host/pkg" if kind == "package" else "/host/pkg-1.0-py3-none-any.whl"
    key = add_tree(library, "package" if kind == "package" else "archive", origin, PACKAGE)
    assert library.callable_for(key, f"pkg.{target}" if kind == "named" else target)() == result
    assert (
        sys.modules["pkg"].__file__ == f"/host/{'pkg' if kind == 'package' else Path(origin).name + '/pkg'}/__init__.py"
    )


@pytest.mark.parametrize("kind", ["package", "archive"])
def test_packages_list_their_modules(library: Library, kind: str) -> None:
    """What plugins find each other by; names that the module has here, which may not be those it was written with."""
    source = """
        import pkgutil, sys
        package = sys.modules[__name__.rpartition('.')[0]]
        def direct(): return sorted((found.name, found.ispkg) for found in pkgutil.iter_modules(package.__path__))
        def all_(): return sorted(found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."))
    """
    key = add_tree(library, kind, f"/host/{kind}", {name.replace("pkg/", f"{kind}/"): text for name, text in {
        "pkg/__init__.py": "", "pkg/find.py": source, "pkg/sub/__init__.py": "", "pkg/sub/mod.py": "",
        "pkg/data/words.txt": "", "pkg/loose/mod.py": "", "pkg/no-module.py": "",
    }.items()})  # fmt: skip
    lead = "" if kind == "package" else f"{kind}."
    assert library.callable_for(key, f"{lead}find.direct")() == [("find", False), ("sub", True)]
    assert library.callable_for(key, f"{lead}find.all_")() == [f"{kind}.find", f"{kind}.sub", f"{kind}.sub.mod"]


def test_package_attributes(library: Library) -> None:
    key = add_tree(library, "package", "/host/pkg", PACKAGE)
    library.callable_for(key, "loose.mod.f")
    pkg, sub, loose = (sys.modules[name] for name in ("pkg", "pkg.sub", "pkg.loose"))
    assert pkg.__path__ == ["/host/pkg"]
    assert pkg.__spec__ is not None
    assert pkg.__spec__.origin == "/host/pkg/__init__.py"
    assert sub.__package__ == "pkg.sub"
    assert list(loose.__path__) == ["/host/pkg/loose"]
    assert getattr(loose, "__file__", None) is None
    with pytest.raises(FileNotFoundError):
        library.callable_for(key, "sub.mod.missing")()
    with pytest.raises(NotFound, match="is a module"):
        library.callable_for(key, "sub.mod")
    with pytest.raises(NotFound, match=r"module 'pkg\.sub' has no 'mood'"):
        library.callable_for(key, "sub.mood.func")


def test_the_same_package_in_two_archives(library: Library) -> None:
    files = {
        "pkg/__init__.py": "",
        "pkg/a.py": "import pkg.b\nimport pkg.b as again\nfrom pkg import b\nfrom pkg.b import C\nfrom .b import D\n"
        "def f():\n    import pkg\n    assert again is b is pkg.b and C.__module__ == b.__name__\n"
        "    return b.C.v, C.v, D.v\n",
        "pkg/b.py": "class C: v = {0}\nclass D: v = {0}\n",
    }
    keys = [
        add_tree(
            library, "archive", f"/host/v{number}.zip", {n: c.replace("{0}", str(number)) for n, c in files.items()}
        )
        for number in (1, 2, 3)
    ]
    found = [library.callable_for(key, "a.f")() for key in keys]
    assert found == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert sys.modules["pkg.b"].C is not sys.modules["pkg~2.b"].C


def test_an_archives_own_modules_go_before_installed_ones(library: Library) -> None:
    """parity: 40 (own versions of a dependency, in one archive)"""
    files = {
        "app.py": "import json, pytest\ndef f(): return json.v, pytest.v",
        "json.py": "v = 1",
        "pytest/__init__.py": "v = 2",
    }
    assert library.callable_for(add_tree(library, "archive", "/host/app.zip", files), "app.f")() == (1, 2)
    assert sys.modules["json"].loads("1") == 1


def test_archive_tops(library: Library) -> None:
    two = add_tree(library, "archive", "/h/two.zip", {"one.py": "def f(): return 1", "two.py": "def f(): return 2"})
    assert library.callable_for(two, "two.f")() == 2
    with pytest.raises(NotFound, match="no top module or package 'f'; the archive has one, two") as info:
        library.callable_for(two, "f")
    assert info.value.stage == "module"
    single = add_tree(library, "archive", "/h/single.zip", {"only.py": "def f(): return 3", "x-1.dist-info/RECORD": ""})
    assert [library.callable_for(single, target)() for target in ("f", "only.f")] == [3, 3]


def test_folder_without_init(library: Library) -> None:
    files = {"tools/a.py": "import b\nfrom . import b as c\ndef f(): return b.v, b is c", "tools/b.py": "v = 1"}
    assert library.callable_for(add_tree(library, "package", "/host/tools", files), "a.f")() == (1, True)


def test_module_names(library: Library) -> None:
    for name in ("json", "os.path", "email", "no_such_thing", "jsom", "os.nothing"):
        library.add((f"module:{name}", "module", name, "", ()))
    assert library.callable_for("module:json", "dumps")([1]) == "[1]"
    assert library.callable_for("module:os.path", "join")("a", "b") == "a/b"
    assert library.callable_for("module:email", "message.Message")() is not None
    for name in ("no_such_thing", "os.nothing"):
        with pytest.raises(NotFound, match=f"no module '{name}'") as info:
            library.callable_for(f"module:{name}", "f")
        assert info.value.stage == "module"
    with pytest.raises(NotFound, match="did you mean json"):
        library.callable_for("module:jsom", "f")
    with pytest.raises(NotFound, match="was never sent"):
        library.callable_for("file:unknown", "f")


def test_c_extension_in_an_archive_says_what_to_do(library: Library) -> None:
    files = {
        "fast/__init__.py": "from fast._speed import go\n",
        "fast/_speed.cpython-311-x86_64-linux-gnu.so": b"\x7fELF",
    }
    with pytest.raises(ImportError, match=r"C extension of /host/fast\.whl; give its folder with import_paths"):
        library.callable_for(add_tree(library, "archive", "/host/fast.whl", files), "go")


def test_only_one_finder_however_much_is_added(library: Library) -> None:
    for number in range(5):
        assert library.callable_for(add_file(library, f"def f(): return {number}"), "f")() == number
    assert len([finder for finder in sys.meta_path if isinstance(finder, Importer)]) == 1


def test_threads_load_a_module_once(library: Library) -> None:
    key = add_file(library, "import time\ntime.sleep(0.05)\nmark = object()\ndef f(): return mark\n")
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(library.callable_for(key, "f")())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_from_the_hosts_files_to_a_result(library: Library, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in PACKAGE.items():
            archive.writestr(name, textwrap.dedent(str(content)))
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(str(content)))
    (tmp_path / "pkg.zip").write_bytes(stream.getvalue())
    for path in (tmp_path / "pkg", tmp_path / "pkg.zip"):
        payload = CodeReader().read(path).payload()
        library.add(pickle.loads(pickle.dumps(payload)))
        assert library.callable_for(payload[0], "sub.mod.func")() == "run sharedshared"
        assert library.callable_for(payload[0], "sub.mod.func").__code__.co_filename == f"{path}/" + (
            "sub/mod.py" if path.suffix == "" else "pkg/sub/mod.py"
        )


def test_the_import_is_cheap() -> None:
    """What is imported beside capture and syscalls: nothing that the interpreter has not loaded already."""
    script = "import sys, os; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
    script += "import pihost.inside.resolve; print(*sorted(set(sys.modules) - before))"
    root = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, root],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    loaded = {name for name in result.stdout.split() if not name.startswith("pihost")}
    assert loaded == {"__future__"}
