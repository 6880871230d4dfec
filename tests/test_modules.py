"""What a child may import is what it was given; the rest comes from loaders of the host, or not at all. parity: 53"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, write

from pisupervisor import CompileError, OptionsError, ProcessIsolator, ProtocolError, RemoteError
from pisupervisor.modules import Modules, Source

pytestmark = linux


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "lib/helper.py",
        "import json\nVALUE = json.loads('41') + 1\ndef fail():\n    raise KeyError('in the helper')\n",
    )
    write(tmp_path, "lib/package/__init__.py", "from . import inner\nname = __name__\n")
    write(tmp_path, "lib/package/inner.py", "from .sub import value\n")
    write(tmp_path, "lib/package/sub.py", "value = 'deep'\n")
    write(tmp_path, "lib/broken.py", "def f(:\n")
    write(tmp_path, "secret.py", "VALUE = 'not given'\n")
    return tmp_path / "lib"


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "lib.zip"
    with zipfile.ZipFile(path, "w") as opened:
        for file in folder.rglob("*.py"):
            opened.write(file, file.relative_to(folder))
    return path


def get(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name)


def test_without_a_loader_there_is_nothing_but_the_standard_library(folder: Path) -> None:
    with ProcessIsolator.create() as isolator:
        assert isolator.invoke(get, "json", "__name__") == "json"
        for module in ("helper", "msgspec", "pisupervisor"):
            with pytest.raises(ModuleNotFoundError, match="modules="):
                isolator.invoke(get, module, "VALUE")


def test_a_folder_and_a_zip(folder: Path, archive: Path) -> None:
    for loader in (folder, str(archive)):
        with nothing_left(), ProcessIsolator.create(modules=[loader]) as isolator:
            assert isolator.invoke(get, "helper", "VALUE") == 42
            assert isolator.invoke(get, "package.inner", "value") == "deep"
            assert isolator.invoke(get, "package", "__path__") == []
            assert isolator.run_source("import os, package; os.path.exists(package.__file__)").value is False
            with pytest.raises(ModuleNotFoundError):
                isolator.invoke(get, "secret", "VALUE")
            with pytest.raises(KeyError, match="in the helper") as caught:
                isolator.run_source("import helper; helper.fail()")
            assert isinstance(caught.value, RemoteError)
            assert "raise KeyError('in the helper')" in caught.value.remote_traceback
            with pytest.raises((CompileError, SyntaxError)):
                isolator.run_source("import broken")


def test_a_function_and_the_order(folder: Path) -> None:
    asked: list[str] = []

    def load(name: str) -> str | bytes | None:
        asked.append(name)
        return {"helper": "VALUE = 'first'", "made.up": b"VALUE = __name__", "made": ""}.get(name)

    with ProcessIsolator.create(modules=[load, folder]) as isolator:
        assert isolator.invoke(get, "helper", "VALUE") == "first"
        assert isolator.invoke(get, "made.up", "VALUE") == "made.up"
        assert isolator.invoke(get, "package.sub", "value") == "deep"
    assert "helper" in asked
    assert "json" not in asked, "the standard library is nobody's affair"
    with ProcessIsolator.create(modules=[folder, load]) as isolator:
        assert isolator.invoke(get, "helper", "VALUE") == 42


def test_a_loader_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    def load(name: str) -> Any:
        raise ValueError("a secret of the loader")

    with ProcessIsolator.create(modules=[load]) as isolator, caplog.at_level(logging.ERROR, "pisupervisor"):
        error = isolator.submit(get, "helper", "VALUE").exception(10)
    assert isinstance(error, ImportError)
    assert "secret" not in str(error)
    assert "a secret of the loader" in caplog.text


def test_closures_over_modules_that_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They travel by name then, and the child gets the loader's module."""
    write(tmp_path, "app_module_of_mine.py", "class Thing:\n    value = 1\ndef make():\n    return Thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    import app_module_of_mine  # type: ignore[import-not-found]

    try:
        with ProcessIsolator.create(modules=[tmp_path]) as isolator:
            assert isolator.invoke(lambda: app_module_of_mine.make().__module__) == "app_module_of_mine"
            assert isolator.run_source("import sys; 'app_module_of_mine' in sys.modules").value is True
    finally:
        del sys.modules["app_module_of_mine"]


@pytest.mark.parametrize("plant", ["link", "linked folder", "fifo", "endless"])
def test_what_somebody_has_put_into_the_folder(folder: Path, tmp_path: Path, plant: str) -> None:
    """A child that may write to a folder of modules reads nothing of the host's that way, and holds nobody."""
    (tmp_path / "outside").mkdir()
    write(tmp_path, "outside/sub.py", "VALUE = 'of the host'\n")
    if plant == "link":
        (folder / "planted.py").symlink_to(tmp_path / "secret.py")
    elif plant == "linked folder":
        (folder / "planted").symlink_to(tmp_path / "outside")
    elif plant == "fifo":
        os.mkfifo(folder / "planted.py")
    else:
        os.truncate(os.open(folder / "planted.py", os.O_CREAT | os.O_RDWR), 1 << 40)
    module = "planted.sub" if plant == "linked folder" else "planted"
    with ProcessIsolator.create(modules=[folder]) as isolator:
        with pytest.raises(ImportError):
            isolator.invoke(get, module, "VALUE", timeout=10)
        assert isolator.invoke(get, "helper", "VALUE") == 42


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "other.py").symlink_to("helper.py")
    (folder.parent / "way").symlink_to(folder)
    with ProcessIsolator.create(modules=[folder.parent / "way"]) as isolator:
        assert isolator.invoke(get, "other", "VALUE") == 42


@pytest.mark.parametrize("name", ["../secret", "..secret", "/etc/passwd", "a/b", "a..b", "", "a\0b", ".", "x" * 2000])
def test_what_is_no_name_is_looked_for_nowhere(folder: Path, name: str) -> None:
    asked: list[str] = []
    assert Modules([lambda each: asked.append(each), folder]).find(name) is None
    assert asked == []


@pytest.mark.parametrize("wrong", [[3], ["/nowhere"], "text", [None]])
def test_what_is_no_loader(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="modules"):
        ProcessIsolator.create(modules=wrong)


@pytest.fixture
def asking(folder: Path) -> Iterator[ProcessIsolator]:
    with nothing_left(), ProcessIsolator.create(modules=[folder]) as isolator:
        yield isolator


def test_a_child_that_asks_wrongly(asking: ProcessIsolator) -> None:
    def ask(*parts: bytes) -> bytes:
        import pihost

        return pihost.call_host_raw("\0import", *parts)

    assert asking.invoke(ask, b"helper").startswith(b"m\0")
    with pytest.raises(Exception, match="no loader has it"):
        asking.invoke(ask, b"\xff../secret")
    with pytest.raises(ProtocolError):
        asking.invoke(ask)


def test_the_name_cannot_be_registered(asking: ProcessIsolator) -> None:
    with pytest.raises(OptionsError):
        asking.register_callback("\0import", print)


def test_calls_side_by_side_import_too(folder: Path) -> None:
    """Each asks on behalf of its own call."""
    for name in ("one", "two"):
        write(folder, f"{name}.py", "import helper\n")
    names = ["helper", "one", "two", "helper"]
    with ProcessIsolator.create(modules=[folder], max_concurrency=4) as isolator:
        found: list[Any] = [None] * 4

        def call(number: int) -> None:
            found[number] = isolator.invoke(get, names[number], "__name__", timeout=10)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == names


def test_what_was_given_and_what_loaders_know(folder: Path, tmp_path: Path) -> None:
    """parity: 53. ``import_paths`` come first, the standard library before all, and a loader is asked for the rest."""
    write(tmp_path, "given/helper.py", "VALUE = 'given'\n")
    write(tmp_path, "given/json.py", "dumps = None\n")
    with ProcessIsolator.create(import_paths=[tmp_path / "given"], modules=[folder]) as isolator:
        assert isolator.invoke(get, "helper", "VALUE") == "given"
        assert isolator.invoke(get, "package.sub", "value") == "deep"
        assert isolator.run_source("import json; json.dumps([1])").value == "[1]"
        with pytest.raises(ModuleNotFoundError, match=r"import_paths=.*modules="):
            isolator.invoke(get, "nobody_has_this", "VALUE")


def test_a_zip_is_read_once_however_often_a_child_asks(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when it has changed. To read the list of a large one takes the host 10 ms, to ask takes the child nothing."""
    opened, open_zip = [], zipfile.ZipFile

    def counted(*arguments: Any) -> zipfile.ZipFile:
        opened.append(arguments)
        return open_zip(*arguments)

    asks = """
def ask(name):
    try: return __import__(name).VALUE
    except ImportError: return "none"
    finally: sys.modules.pop(name, None)
import sys
[{ask(f"missing{number}") for number in range(300)}, {ask("helper") for _ in range(300)}]
"""
    with ProcessIsolator.create(modules=[archive]) as isolator:
        monkeypatch.setattr(zipfile, "ZipFile", counted)
        assert isolator.run_source(asks).value == [{"none"}, {42}]
        assert len(opened) <= 2
        with open_zip(archive, "w") as changed:
            changed.writestr("helper.py", "VALUE = 'changed'\n")
        assert isolator.run_source(asks).value == [{"none"}, {"changed"}]
        assert 3 <= len(opened) <= 4


def test_two_threads_that_ask_one_zip(archive: Path) -> None:
    """Calls side by side: one adds to what is kept while the other adds up how large that is."""
    modules = Modules([str(archive)])
    kept = modules._finders[0].__self__._current()[2]  # type: ignore[attr-defined]

    class Text(bytes):
        def __len__(self) -> int:
            kept.setdefault("another", Source(b"", "", False))
            return 0

    kept["one"] = Source(Text(), "", False)
    assert modules.find("helper") is not None


def test_large_modules_are_paid_for(tmp_path: Path) -> None:
    """By the child that has the host read and unpack them, with what it may send to the host in a second."""
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("large.py", "VALUE = '" + "x" * (5 << 20) + "'\n")
    again = "import sys, large; del sys.modules['large']; 1"
    with ProcessIsolator.create(modules=[path], callback_bytes=1) as isolator:
        assert isolator.run_source(again).value == 1
        with pytest.raises(ImportError, match="more than 1 bytes"):
            isolator.run_source(again)
    with ProcessIsolator.create(modules=[path], callback_bytes=None) as isolator:
        assert [isolator.run_source(again).value for _ in range(3)] == [1, 1, 1]


def test_code_that_is_shown_cannot_be_written_whatever_its_mode(folder: Path, tmp_path: Path) -> None:
    """parity: 86"""
    path = folder / "helper.py"
    folder.chmod(0o777)
    path.chmod(0o666)
    source = path.read_text()

    def write_to(name: str, flags: int) -> int:
        import os

        try:
            os.close(os.open(name, flags, 0o666))
        except OSError as error:
            return error.errno or 0
        return 0

    with ProcessIsolator.create(import_paths=[folder]) as isolator:
        assert isolator.invoke_method("helper", "fail.__qualname__.upper") == "FAIL"
        for name, flags in (
            (path, os.O_WRONLY | os.O_TRUNC),
            (path, os.O_RDWR),
            (folder / "new.py", os.O_WRONLY | os.O_CREAT),
        ):
            assert isolator.invoke(write_to, str(name), flags) == errno.EROFS
        with pytest.raises(OSError) as caught:
            isolator.invoke(os.unlink, str(path))
        assert caught.value.errno == errno.EROFS
    assert path.read_text() == source
    assert not (folder / "new.py").exists()
