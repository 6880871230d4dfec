"""What a root is made of: each kind says what it is, and asks the kernel for exactly that."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import Recorder

from pihost import mounts
from pihost.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["bind", "/usr", "/usr", 7], "bind /usr at /usr"),
        (["layer", "/lib/x", "/x", 7], "layer /lib/x at /x"),
        (["tmpfs", "/tmp", 1024, 8, 1000, 1000], "tmpfs /tmp"),
        (["proc", "/proc", "subset=pid"], "proc /proc"),
        (["folder", "/dev/shm"], "folder /dev/shm"),
        (["file", "/etc/hosts", "127.0.0.1 localhost\n"], "file /etc/hosts"),
        (["symlink", "/bin", "usr/bin"], "symlink /bin"),
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


def test_a_folder_is_read_only_before_it_is_mounted(tmp_path: Path) -> None:
    source, base, kernel = tmp_path / "source", tmp_path / "base", Recorder()
    source.mkdir()
    base.mkdir()
    bind = mounts.Bind(str(source), "/a/b", mounts.READ_ONLY)
    bind.open(kernel)
    tree = bind.tree
    bind.execute(str(base), kernel)
    assert kernel.calls == [
        ("open_tree", str(source)),
        ("set_mount_flags", tree, MS_RDONLY | MS_NOSUID | MS_NODEV),
        ("move_mount", tree, f"{base}/a/b"),
    ]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tree)


@pytest.mark.root
@pytest.mark.parametrize("name", ["a b", "a\\b", "a\tb", "a\nb", "a\\134b", "a\rb", "M\udcfcller"], ids=ascii)
def test_before_linux_5_12_flags_come_mount_by_mount(tmp_path: Path, name: str) -> None:
    """In a mount namespace of its own, a folder with another file system below it: both read-only, noexec kept."""
    source, base = tmp_path / "the source", tmp_path / "the base"
    (source / "deep").mkdir(parents=True)
    base.mkdir()
    script = f"""
        import os
        from pihost import mounts, syscalls
        def refuse(_tree, _flags): raise OSError(38, "Function not implemented", "mount_setattr")
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", {str(source / "deep")!r}, "tmpfs", syscalls.MS_NOEXEC)
        syscalls.set_mount_flags = refuse
        mounts.Bind({str(source)!r}, {"/" + name!r}, mounts.READ_ONLY).execute({str(base)!r})
        for line in open("/proc/self/mountinfo", "rb"):
            fields = line.split(b" ")
            if b"the\\\\040base" in fields[4]: print(fields[5].decode())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    first, second = (line.split(",") for line in done.stdout.splitlines())
    assert {"ro", "nosuid", "nodev"} <= set(first)
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(second)


def test_flags_of_a_mount_that_is_not_listed(tmp_path: Path) -> None:
    """Whatever its name is: it would keep those that it had."""
    kernel = Recorder()
    with pytest.raises(OSError, match="keeps the flags"):
        mounts.set_flags_late(str(tmp_path / "none"), mounts.READ_ONLY, kernel)
    assert kernel.calls == []


def test_a_layer_names_no_path(tmp_path: Path) -> None:
    class Looking(Recorder):
        def mount(self, source: str, target: str, *rest: Any) -> None:
            assert os.path.samefile(target, base / "a/b")
            super().mount(source, target, *rest)

    source, base, kernel = tmp_path / "source", tmp_path / "base", Looking()
    source.mkdir()
    base.mkdir()
    before = os.listdir("/proc/self/fd")
    layer = mounts.Layer(str(source), "/a/b", mounts.READ_ONLY)
    layer.open(kernel)
    layer.execute(str(base), kernel)
    ((name, _source, _target, kind, flags, data),) = kernel.calls
    assert (name, kind, flags) == ("mount", "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV)
    assert str(tmp_path) not in data
    assert os.listdir("/proc/self/fd") == before


def test_a_layer_that_the_kernel_refuses_is_a_bind(tmp_path: Path) -> None:
    source, base, kernel = tmp_path / "source", tmp_path / "base", Recorder(failing="mount")
    source.mkdir()
    base.mkdir()
    layer = mounts.Layer(str(source), "/a/b", mounts.READ_ONLY)
    layer.open(kernel)
    layer.execute(str(base), kernel)
    assert kernel.names() == ["mount", "open_tree", "set_mount_flags", "move_mount"]
    assert kernel.calls[2][2] == MS_RDONLY | MS_NOSUID | MS_NODEV
    assert kernel.calls[3][2] == f"{base}/a/b"


def test_a_layer_that_must_be_one(tmp_path: Path) -> None:
    kernel = Recorder(failing="mount")
    layer = mounts.Layer(str(tmp_path), "/a", 0)
    layer.open(kernel)
    with pytest.raises(OSError, match="not permitted"):
        layer.execute(str(tmp_path), kernel)
    assert kernel.names() == ["mount"]


def test_a_file_is_bound_over_an_empty_one(tmp_path: Path) -> None:
    source, base, kernel = tmp_path / "hosts", tmp_path / "base", Recorder()
    source.write_text("secret")
    base.mkdir()
    mounts.Bind(str(source), "/etc/hosts", 0).execute(str(base), kernel)
    assert (base / "etc/hosts").read_bytes() == b""
    assert kernel.names() == ["open_tree", "move_mount"], "no flags were asked for"


@pytest.mark.parametrize("target", ["/link/made/here", "/link", "/folder/link/x"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_no_symbolic_link_is_followed_to_a_target(tmp_path: Path, target: str, kind: str) -> None:
    """CVE-2021-30465: whoever may write into a folder that is shown could lead us elsewhere."""
    victim, base = tmp_path / "victim", tmp_path / "base"
    (base / "folder").mkdir(parents=True)
    victim.mkdir()
    for link in (base / "link", base / "folder/link"):
        link.symlink_to(victim)
    source = tmp_path / "source"
    source.mkdir() if kind == "folder" else source.write_text("")
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        mounts.Bind(str(source), target, 0).execute(str(base), Recorder())
    assert list(victim.iterdir()) == []


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


def test_an_overlay_has_its_layer_put_out_of_sight(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "over").mkdir()
    kernel = Recorder()
    (overlay,) = mounts.read([["overlay", "/app", "/over", 4096, 16, 1000, 1000]])
    overlay.execute(str(tmp_path), kernel)
    assert kernel.names() == ["mount", "mount", "umount_detach"]
    scratch, layers, hidden = kernel.calls
    assert scratch[2] == hidden[1] == f"{tmp_path}/over"
    assert "size=4096" in scratch[-1]
    assert layers[4] == MS_NOSUID | MS_NODEV
    assert f"upperdir={tmp_path}/over/upper,workdir={tmp_path}/over/work,userxattr" in layers[5]


def test_an_overlay_follows_no_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "over").mkdir()
    (tmp_path / "app").symlink_to(tmp_path / "over")
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        mounts.Overlay("/app", "/over", 4096, 16, 1000, 1000).execute(str(tmp_path), Recorder())
