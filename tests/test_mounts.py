"""What a root is made of: each kind says what it is, and asks the kernel for exactly that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_kernel import Recorder

from pihost import mounts
from pihost.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["bind", "/usr", "/usr", 7], "bind /usr at /usr"),
        (["tmpfs", "/tmp", 1024, 8, 1000, 1000], "tmpfs at /tmp (size=1024,nr_inodes=8,mode=1777,uid=1000,gid=1000)"),
        (["proc", "/proc", "subset=pid"], "proc at /proc (subset=pid)"),
        (["folder", "/dev/shm"], "folder /dev/shm"),
        (["file", "/etc/hosts", "127.0.0.1 localhost\n"], "file /etc/hosts"),
        (["symlink", "/bin", "usr/bin"], "symlink /bin -> usr/bin"),
    ],
)
def test_an_entry_of_a_plan_describes_itself(entry: list[object], text: str) -> None:
    assert mounts.read([entry])[0].describe() == text


@pytest.mark.parametrize("entry", [["ramfs", "/x"], ["folder"], ["folder", "/x", "more"], []])
def test_an_entry_that_nobody_understands(entry: list[object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        mounts.read([entry])


def test_scratch_is_bounded_and_gives_no_devices_or_setuid() -> None:
    kernel = Recorder()
    mounts.Tmpfs("/tmp", 4096, 16, 1000, 1000).execute("/base", kernel)
    data = "size=4096,nr_inodes=16,mode=1777,uid=1000,gid=1000"
    assert kernel.calls == [("mount", "tmpfs", "/base/tmp", "tmpfs", MS_NOSUID | MS_NODEV, data)]


def test_proc_shows_processes_only() -> None:
    kernel = Recorder()
    mounts.Proc("/proc", "subset=pid,hidepid=invisible").execute("", kernel)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    assert kernel.calls == [("mount", "proc", "/proc", "proc", flags, "subset=pid,hidepid=invisible")]


def test_a_folder_is_bound_with_all_below_it_then_made_read_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    bind = mounts.Bind(str(source), "/a/b", mounts.READ_ONLY)
    bind.open()
    kernel, fd = Recorder(), bind.fd
    bind.execute(str(tmp_path / "base"), kernel)
    target = f"{tmp_path}/base/a/b"
    assert os.path.isdir(target)
    assert kernel.calls == [
        ("mount", f"/proc/self/fd/{fd}", target, "", MS_BIND | MS_REC, ""),
        ("set_mount_flags", target, MS_RDONLY | MS_NOSUID | MS_NODEV),
    ]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_is_bound_over_an_empty_one(tmp_path: Path) -> None:
    source = tmp_path / "hosts"
    source.write_text("secret")
    bind = mounts.Bind(str(source), "/etc/hosts", 0)
    bind.open()
    kernel = Recorder()
    bind.execute(str(tmp_path / "base"), kernel)
    assert (tmp_path / "base/etc/hosts").read_bytes() == b""
    assert kernel.names() == ["mount"], "no flags were asked for"


def test_the_source_is_found_once_before_anything_is_mounted(tmp_path: Path) -> None:
    """A folder put in its place afterwards is not what gets bound."""
    source = tmp_path / "source"
    source.mkdir()
    bind = mounts.Bind(str(source), "/x", 0)
    bind.open()
    source.rename(tmp_path / "moved")
    assert os.readlink(f"/proc/self/fd/{bind.fd}") == str(tmp_path / "moved")
    os.close(bind.fd)


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mounts.Bind(str(tmp_path / "nowhere"), "/x", 0).open()


def test_files_folders_and_links_of_our_own(tmp_path: Path) -> None:
    base, kernel = str(tmp_path), Recorder()
    entries = [["folder", "/dev/shm"], ["file", "/etc/passwd", "user:x:1000\n"], ["symlink", "/usr/lib64", "lib"]]
    for entry in mounts.read(entries):
        entry.execute(base, kernel)
    assert (tmp_path / "dev/shm").is_dir()
    assert (tmp_path / "etc/passwd").read_text() == "user:x:1000\n"
    assert not (tmp_path / "etc/passwd").stat().st_mode & 0o222
    assert os.readlink(tmp_path / "usr/lib64") == "lib"
    assert kernel.calls == []


def test_a_file_of_ours_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("somebody else's")
    with pytest.raises(FileExistsError):
        mounts.File("/passwd", "ours").execute(str(tmp_path))
