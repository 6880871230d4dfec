"""CodeReader: what becomes code, what is refused, and when the files are read again. Pure: no privilege needed."""

from __future__ import annotations

import io
import os
import pickle
import threading
import time
import zipfile
from pathlib import Path

import pytest

from pisupervisor.errors import OptionsError
from pisupervisor.link import sources
from pisupervisor.link.sources import CodeReader, check_target


@pytest.fixture
def reader() -> CodeReader:
    return CodeReader()


def package(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def make_zip(path: Path, files: dict[str, str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_file_is_read_and_travels_as_plain_data(reader: CodeReader, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_bytes(b"x = 1\n")
    code = reader.read(tmp_path / "plugin.py")
    assert (code.kind, code.name, code.origin) == ("file", "plugin", str(tmp_path / "plugin.py"))
    assert code.payload() == (code.key, "file", "plugin", code.origin, (("plugin.py", b"x = 1\n"),))
    assert pickle.loads(pickle.dumps(code.payload())) == code.payload()
    with pytest.raises(AttributeError):
        code.key = "other"


def test_relative_path_starts_from_the_hosts_working_directory(
    reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    assert reader.read("plugin.py") is reader.read(str(tmp_path / "plugin.py"))
    monkeypatch.chdir("/")
    with pytest.raises(OptionsError, match=r"^/plugin\.py: no such file"):
        reader.read("plugin.py")


@pytest.mark.parametrize("name", ["json", "os.path", "_private.mod"])
def test_dotted_name_is_a_module(reader: CodeReader, name: str) -> None:
    code = reader.read(name)
    assert code.payload() == (f"module:{name}", "module", name, "", ())


def test_folder_with_python_files_wins_over_a_module_name(
    reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    package(tmp_path / "tools", {"__init__.py": ""})
    assert reader.read("tools").kind == "package"
    assert reader.read("empty").kind == "module"
    with pytest.raises(OptionsError, match="no Python files"):
        reader.read(Path("empty"))


@pytest.mark.parametrize("bad", ["", "no-module", "a..b", "1x", "x\0y", b"x.py", 3, None])
def test_neither_path_nor_module_name(reader: CodeReader, bad: object) -> None:
    """parity: 38 (bad spec)"""
    with pytest.raises(OptionsError):
        reader.read(bad)  # type: ignore[arg-type]


def test_a_file_that_is_no_code_is_no_module(
    reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x = 1")
    with pytest.raises(OptionsError, match=r"'notes\.txt' is neither a \.py file"):
        reader.read("notes.txt")


def test_missing_file_names_the_path_looked_at(reader: CodeReader, tmp_path: Path) -> None:
    """parity: 41 (missing file)"""
    for path in (tmp_path / "gone.py", tmp_path / "gone" / "plugin.py", tmp_path / "gone.zip"):
        with pytest.raises(OptionsError, match=f"^{path}: no such file or folder"):
            reader.read(path)


def test_a_target_in_the_path_is_told_where_it_belongs(reader: CodeReader, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text("x = 1\n")
    with pytest.raises(OptionsError, match=r"argument of its own: '.*/plugin\.py', 'Tools\.shrink'"):
        reader.read(f"{tmp_path}/plugin.py:Tools.shrink")


def test_target_is_checked_before_anything_is_sent() -> None:
    """parity: 38 (bad spec)"""
    assert check_target("_private.Tools.shrink") == "_private.Tools.shrink"
    for bad in ("", "a..b", "f()", "a b", ".f", "x-y", None):
        with pytest.raises(OptionsError, match="no dotted name"):
            check_target(bad)  # type: ignore[arg-type]


def test_unreadable_file(reader: CodeReader, tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text("x = 1\n")
    path.chmod(0)
    tmp_path.chmod(0o755)
    pid = os.fork()  # root reads everything, so an ordinary user has to try
    if pid == 0:
        code = 3
        try:
            if os.getuid() == 0:
                os.setuid(65533)
            reader.read(str(path))
        except OptionsError as error:
            code = 0 if "readable by uid" in str(error) or "cannot" in str(error) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", ["fast.cpython-311-x86_64-linux-gnu.so", "plugin.pyc"])
def test_compiled_code_is_refused_with_the_way_out(reader: CodeReader, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x7fELF")
    with pytest.raises(OptionsError, match="import_paths"):
        reader.read(tmp_path / name)


@pytest.mark.alone
def test_fifo_and_device_do_not_hang(reader: CodeReader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    for path in (tmp_path / "pipe.py", Path("/dev/zero")):
        started = time.monotonic()
        with pytest.raises(OptionsError, match="neither a regular file nor a folder"):
            reader.read(path)
        assert time.monotonic() - started < 1


def test_package_brings_sources_and_data(reader: CodeReader, tmp_path: Path) -> None:
    folder = package(
        tmp_path / "tools",
        {
            "__init__.py": "", "sub/mod.py": "y = 2\n", "sub/data.bin": b"\0\1", "__pycache__/x.pyc": b"",
            ".git/HEAD": "", "old.pyc": b"",
        },
    )  # fmt: skip
    os.mkfifo(folder / "pipe")
    code = reader.read(folder)
    assert (code.kind, code.name) == ("package", "tools")
    assert dict(code.files) == {
        "tools/__init__.py": b"",
        "tools/sub/mod.py": b"y = 2\n",
        "tools/sub/data.bin": b"\0\1",
    }


def test_package_links(reader: CodeReader, tmp_path: Path) -> None:
    folder = package(tmp_path / "tools", {"__init__.py": "", "real.py": "x = 1\n", "sub/a.py": ""})
    (folder / "alias.py").symlink_to("real.py")
    (folder / "loop").symlink_to(".")
    (folder / "again").symlink_to("sub")
    (folder / "dangling.py").symlink_to("nowhere.py")
    files = dict(reader.read(folder).files)
    assert sorted(files) == [
        f"tools/{name}" for name in ("__init__.py", "again/a.py", "alias.py", "real.py", "sub/a.py")
    ]
    assert files["tools/alias.py"] == b"x = 1\n"
    (folder / "secret.py").symlink_to("/etc/hostname")
    with pytest.raises(OptionsError, match=r"secret\.py: this link leads out of the package"):
        reader.read(folder)


def test_package_bounds(reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "tools", {f"m{number}.py": "x = 1\n" for number in range(20)})
    monkeypatch.setattr(sources, "MAX_ENTRIES", 19)
    with pytest.raises(OptionsError, match="more than 19 files"):
        reader.read(folder)
    monkeypatch.undo()
    os.truncate(folder / "m3.py", (64 << 20) + 1)  # sparse
    for path in (folder, folder / "m3.py"):
        with pytest.raises(OptionsError, match="more than 64 MiB"):
            reader.read(path)


def test_zip_and_wheel(reader: CodeReader, tmp_path: Path) -> None:
    for name in ("tools.zip", "tools-1.0-py3-none-any.whl"):
        files = {
            "tools/": "",
            "tools/__init__.py": "x = 1\n",
            "./tools//data.txt": "hello",
            "tools/__pycache__/a.pyc": "",
        }
        code = reader.read(make_zip(tmp_path / name, files))
        assert code.kind == "archive"
        assert dict(code.files) == {"tools/__init__.py": b"x = 1\n", "tools/data.txt": b"hello"}


@pytest.mark.parametrize("name", ["../out.py", "/etc/out.py", "a/../../out.py", "..\\out.py", "C:\\out.py"])
def test_zip_entries_outside_the_archive(reader: CodeReader, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionsError, match="outside the archive"):
        reader.read(make_zip(tmp_path / "bad.zip", {"ok.py": "", name: ""}))


def test_zip_bombs(reader: CodeReader, tmp_path: Path) -> None:
    big = make_zip(tmp_path / "big.zip", {f"m{number}.py": "\0" * (9 << 20) for number in range(8)})
    assert big.stat().st_size < 1 << 20
    with pytest.raises(OptionsError, match="more than 64 MiB"):
        reader.read(big)
    many = make_zip(tmp_path / "many.zip", {f"m{number}.py": "" for number in range(10_001)})
    with pytest.raises(OptionsError, match="more than 10000"):
        reader.read(many)
    with pytest.raises(OptionsError, match="not deflated"):
        reader.read(make_zip(tmp_path / "lzma.zip", {"m.py": "x = 1"}, zipfile.ZIP_LZMA))


def test_zip_that_lies_about_a_size(reader: CodeReader, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "lies.zip", {"m.py": "#" * (60 << 20)})
    data = path.read_bytes()
    path.write_bytes(data.replace((60 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(OptionsError, match="not a usable zip"):
        reader.read(path)


def test_encrypted_and_corrupt_zips(reader: CodeReader, tmp_path: Path) -> None:
    data = make_zip(tmp_path / "good.zip", {"m.py": "x = 1\n" * 50}).read_bytes()
    central = data.index(b"PK\x01\x02")
    (tmp_path / "locked.zip").write_bytes(data[: central + 8] + b"\1" + data[central + 9 :])
    with pytest.raises(OptionsError, match="encrypted"):
        reader.read(tmp_path / "locked.zip")
    for cut in range(0, len(data) - 1, 7):
        (tmp_path / "cut.zip").write_bytes(data[:cut])
        with pytest.raises(OptionsError):
            reader.read(tmp_path / "cut.zip")
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        (tmp_path / "broken.zip").write_bytes(broken)
        try:
            reader.read(tmp_path / "broken.zip")  # some bytes, such as dates, do not matter
        except OptionsError:
            continue


def test_unchanged_files_are_not_read_again(
    reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path / "tools", {"__init__.py": "", "a.py": "x = 1\n"})
    (tmp_path / "plugin.py").write_text("x = 1\n")
    time.sleep(0.07)
    known = [reader.read(path) for path in (folder, tmp_path / "plugin.py")]
    monkeypatch.setattr(sources, "_read_file", None)
    assert [reader.read(path) for path in (folder, tmp_path / "plugin.py")] == known


def test_changed_content_is_seen_at_once_and_same_content_keeps_its_key(reader: CodeReader, tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    keys = set()
    for number in range(10, 60):  # same size, faster than the file system's clock ticks
        path.write_text(f"x = {number}\n")
        code = reader.read(path)
        assert code.files[0][1] == f"x = {number}\n".encode()
        keys.add(code.key)
    assert len(keys) == 50
    time.sleep(0.07)
    reader.read(path)
    os.utime(path)
    assert reader.read(path) is code
    before = path.stat()
    path.write_text("x = 99\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a modification time that was set back
    assert reader.read(path).files[0][1] == b"x = 99\n"


def test_a_clock_that_has_not_ticked_between_two_writes(
    reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(sources, "_stamp", lambda status: (now, now, 0, 0, 0))
    for content in (b"x = 1\n", b"x = 2\n"):
        (tmp_path / "plugin.py").write_bytes(content)
        assert reader.read(tmp_path / "plugin.py").files[0][1] == content


def test_changes_in_a_package_are_seen(reader: CodeReader, tmp_path: Path) -> None:
    folder = package(tmp_path / "tools", {"__init__.py": "", "sub/a.py": "x = 1\n"})
    keys = [reader.read(folder).key]
    for change in (
        lambda: (folder / "sub" / "b.py").write_text(""),
        lambda: (folder / "sub" / "a.py").write_text("x = 2\n"),
        lambda: (folder / "sub" / "b.py").rename(folder / "sub" / "c.py"),
        lambda: (folder / "sub" / "c.py").unlink(),
    ):
        time.sleep(0.07)
        assert reader.read(folder).key == keys[-1]
        change()
        keys.append(reader.read(folder).key)
    assert len(set(keys)) == 5
    (folder / "sub" / "a.py").write_text("x = 1\n")
    assert reader.read(folder).key == keys[0]


def test_a_file_that_vanishes(reader: CodeReader, tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text("x = 1\n")
    reader.read(path)
    path.unlink()
    with pytest.raises(OptionsError, match="no such file"):
        reader.read(path)


def test_what_is_remembered_is_bounded(reader: CodeReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CACHED_PATHS", 3)
    keys = []
    for number in range(6):
        (tmp_path / f"m{number}.py").write_text("x = 1\n")
        keys.append(reader.read(tmp_path / f"m{number}.py").key)
    assert len(reader._cache) == 3
    assert reader.read(tmp_path / "m0.py").key == keys[0]
    monkeypatch.setattr(sources, "_CACHED_BYTES", 1)
    reader.read(tmp_path / "m5.py")
    (tmp_path / "m6.py").write_text("x = 1\n")
    reader.read(tmp_path / "m6.py")
    assert len(reader._cache) == 1


def test_threads_get_the_same_code(reader: CodeReader, tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text("x = 1\n")
    found = []
    threads = [threading.Thread(target=lambda: found.append(reader.read(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({code.key for code in found}) == 1


def test_a_stored_zip_inside_is_not_opened(reader: CodeReader, tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.py", "")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("m.py", "")
        archive.writestr("inner.zip", inner.getvalue())
    assert sorted(dict(reader.read(tmp_path / "outer.zip").files)) == ["inner.zip", "m.py"]
