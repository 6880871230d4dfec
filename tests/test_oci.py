"""OCI image layouts: layers on top of each other, and images that want more than to be unpacked."""

from __future__ import annotations

import errno
import gc
import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left
from rootfs import shared
from test_rootfs import Reader

from pisupervisor import IsolationContext, OptionsError, RootfsHost, oci as module, unpack_image

Entry = tuple[str, Any]  # name; bytes: a file, None: a folder, str: a link, TarInfo: as it is


class Layout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs/sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str = "x", **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data), **more}

    def image(self, *layers: bytes, **manifest: Any) -> Path:
        kind = "application/vnd.oci.image.layer.v1.tar"
        described = [self.blob(layer, f"{kind}+gzip" if layer[:2] == b"\x1f\x8b" else kind) for layer in layers]
        self.index(self.blob(json.dumps({"layers": described, **manifest}).encode()))
        return self.folder

    def index(self, *manifests: dict[str, Any]) -> None:
        (self.folder / "index.json").write_text(json.dumps({"manifests": manifests}))


def layer(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, what in entries:
            member = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name)
            if what is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, str):
                member.type, member.linkname = tarfile.SYMTYPE, what
            elif isinstance(what, bytes):
                member.size = len(what)
            tar.addfile(member, io.BytesIO(what) if isinstance(what, bytes) else None)
    return buffer.getvalue()


def special(name: str, kind: bytes, **fields: Any) -> Entry:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return name, member


def tree(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
    return found


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def test_layers_on_top_of_each_other(layout: Layout, tmp_path: Path) -> None:
    first = layer(
        ("etc", None), ("etc/kept", b"1"), ("etc/gone", b"2"), ("old", None), ("old/a", b"3"), ("old/b", b"4"),
        ("lib", "usr/lib"), ("usr/lib", None), ("changed", b"5"), ("folder", None), ("folder/x", b"6"),
    )  # fmt: skip
    second = layer(
        ("etc/.wh.gone", b""), ("old/new", b"7"), ("old/.wh..wh..opq", b""), ("lib/x.so", b"8"), ("./changed", b"9"),
        ("/absolute", b"10"), ("folder", b"now a file"), ("made/on/the/way", b"11"),
        special("hard", tarfile.LNKTYPE, linkname="etc/kept"),
    )  # fmt: skip
    for layers in ((first, second), (gzip.compress(first), second)):
        root = tmp_path / f"root{len(layers[0])}"
        unpack_image(layout.image(*layers), root)
        assert tree(root) == {
            "etc": "/", "etc/kept": "1", "old": "/", "old/new": "7", "lib": "-> usr/lib", "usr": "/", "usr/lib": "/",
            "usr/lib/x.so": "8", "changed": "9", "absolute": "10", "folder": "now a file", "made": "/", "made/on": "/",
            "made/on/the": "/", "made/on/the/way": "11", "hard": "1",
        }  # fmt: skip


def test_privileges_and_devices_are_left_out(layout: Layout, tmp_path: Path) -> None:
    made = layer(
        special("setuid", tarfile.REGTYPE, mode=0o6755), special("null", tarfile.CHRTYPE), special("disk", tarfile.BLKTYPE),
        special("pipe", tarfile.FIFOTYPE), special("closed", tarfile.DIRTYPE, mode=0o000), ("closed/file", b"x"),
    )  # fmt: skip
    unpack_image(layout.image(made), tmp_path / "root")
    assert sorted(os.listdir(tmp_path / "root")) == ["closed", "setuid"]
    assert (tmp_path / "root/setuid").stat().st_mode & 0o7777 == 0o755


def test_the_image_for_this_machine_is_chosen(layout: Layout, tmp_path: Path) -> None:
    mine = module._MACHINES[os.uname().machine]
    layout.image(layer(("mine", b"x")))
    manifest = json.loads((layout.folder / "index.json").read_text())["manifests"][0]
    here = {**manifest, "platform": {"os": "linux", "architecture": mine}}
    other = layout.blob(b"{}", platform={"os": "linux", "architecture": "s390x"})
    inner = layout.blob(json.dumps({"manifests": [other, here]}).encode())
    layout.index(inner)
    unpack_image(layout.folder, tmp_path / "root")
    assert os.listdir(tmp_path / "root") == ["mine"]
    layout.index(here, here)
    with pytest.raises(OptionsError, match="2 images"):
        unpack_image(layout.folder, tmp_path / "two")


def test_a_full_disk_is_not_the_images_fault(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_told: object) -> None:
        (tmp_path / "root/part").write_text("of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_apply", refuse)
    with pytest.raises(OptionsError, match=r"no room for the image in .*root: No space left on device; .* TMPDIR"):
        unpack_image(layout.image(layer(("file", b"x"))), tmp_path / "root")
    assert not (tmp_path / "root").exists()


HOSTILE: dict[str, tuple[bytes, ...]] = {
    "above": (layer(("../../victim/file", b"x")),),
    "absolute link": (layer(("out", "/victim"), ("out/file", b"x")),),
    "relative link": (layer(("out", "../victim"), ("out/file", b"x")),),
    "link in a layer below": (layer(("out", "../../victim")), layer(("out/file", b"x"))),
    "link replaced": (layer(("out", "../victim"), ("out", b"x")),),
    "hard link": (layer(special("out", tarfile.LNKTYPE, linkname="../victim/kept")),),
    "hard link to a link": (layer(("a", "../victim/kept"), special("b", tarfile.LNKTYPE, linkname="a")),),
    "whiteout above": (layer(("x", None), ("x/.wh...", b"")),),
    "whiteout of itself": (layer(("x", None), ("x/.wh..", b"")),),
    "whiteout through a link": (layer(("out", "../victim"), ("out/.wh.kept", b"")),),
    "opaque through a link": (layer(("out", "../victim"), ("out/.wh..wh..opq", b"")),),
    "below a file": (layer(("file", b"x"), ("file/below", b"y")),),
    "round": (layer(("a", "b"), ("b", "a"), ("a/x", b"y")),),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_outside_is_touched(layout: Layout, tmp_path: Path, case: str) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/kept").write_text("as it was")
    try:
        unpack_image(layout.image(*HOSTILE[case]), tmp_path / "root")
    except OptionsError:
        assert not (tmp_path / "root").exists()  # all of it, or nothing
    assert tree(tmp_path / "victim") == {"kept": "as it was"}
    assert (tmp_path / "victim/kept").stat().st_nlink == 1
    assert sorted(os.listdir(tmp_path)) in (["layout", "root", "victim"], ["layout", "victim"])


def headers(count: int, size: int) -> bytes:
    """A layer of nothing but headers, so many of that size."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, size
    return gzip.compress((member.tobuf(tarfile.USTAR_FORMAT) + bytes(size)) * count, 1)


@pytest.mark.parametrize(("count", "size"), [(1, 32 << 20), (64, 512 << 10)], ids=["one", "many"])
def test_headers_do_not_fill_the_memory(layout: Layout, tmp_path: Path, count: int, size: int) -> None:
    with pytest.raises(OptionsError, match="headers of more than"):
        unpack_image(layout.image(headers(count, size)), tmp_path / "root")


def test_bounds(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = layout.image(gzip.compress(layer(("zeros", bytes(2 << 20)))))
    with pytest.raises(OptionsError, match="too large"):
        unpack_image(big, tmp_path / "root", max_size="1M")
    unpack_image(big, tmp_path / "root", max_size="2M")
    monkeypatch.setattr(module, "_MAX_ENTRIES", 3)
    with pytest.raises(OptionsError, match="too large"):
        unpack_image(layout.image(layer(*((str(number), b"") for number in range(4)))), tmp_path / "many")


def test_what_is_no_image(layout: Layout, tmp_path: Path) -> None:
    good = layer(("file", b"x"))
    with pytest.raises(OptionsError, match="no OCI image layout"):
        unpack_image(tmp_path, tmp_path / "root")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(OptionsError, match="not empty"):
        unpack_image(layout.image(good), tmp_path / "full")
    for damage in (b"not a tar" * 100, gzip.compress(good)[:40], good[:600], b"\x1f\x8b" + bytes(50)):
        with pytest.raises(OptionsError):
            unpack_image(layout.image(damage), tmp_path / "root")
    for index in (
        "[]",
        "{}",
        '{"manifests": []}',
        '{"manifests": [{"digest": "md5:0", "size": 1}]}',
        "[" * 100_000,
        "nothing",
    ):
        (layout.folder / "index.json").write_text(index)
        with pytest.raises(OptionsError):
            unpack_image(layout.folder, tmp_path / "root")
    layout.index(layout.blob(json.dumps({"layers": [layout.blob(good, "application/zstd")]}).encode()))
    with pytest.raises(OptionsError, match="a layer of the type"):
        unpack_image(layout.folder, tmp_path / "root")
    for blob in (layout.folder / "blobs/sha256").iterdir():
        blob.write_bytes(blob.read_bytes() + b" ")
    with pytest.raises(OptionsError, match="damaged"):
        unpack_image(layout.folder, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@linux
def test_a_plugin_host_takes_an_image_and_forgets_it(layout: Layout) -> None:
    """parity: 64"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(shared(), arcname=".")
    image = layout.image(gzip.compress(buffer.getvalue(), 1), layer(("etc/hostname", b"of-the-image\n")))
    with nothing_left(), RootfsHost(image) as host:
        unpacked = host._unpacked.name
        assert os.path.exists(unpacked)
        assert host.execute_plugin(Reader(), IsolationContext(arguments=["/etc/hostname"])).result == "of-the-image\n"
    assert not os.path.exists(unpacked)
    with pytest.raises(OptionsError, match="no Python in"):
        RootfsHost(layout.image(layer(("file", b"x"))))


@linux
def test_a_forgotten_plugin_host_takes_its_image_along(layout: Layout) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(shared(), arcname=".")
    image = layout.image(gzip.compress(buffer.getvalue(), 1))

    def forget() -> str:
        folder: str = RootfsHost(image)._unpacked.name
        return folder

    with nothing_left():
        with pytest.warns(ResourceWarning, match="pisupervisor-rootfs-"):
            folder = forget()
        gc.collect()
    assert not os.path.exists(folder)


def test_a_place_for_an_image_that_is_none(layout: Layout, tmp_path: Path) -> None:
    image = layout.image(layer(("file", b"x")))
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/1/root"):
        with pytest.raises(OptionsError, match=r"cannot unpack an image into|not empty"):
            unpack_image(image, place)
    for wrong in (b"bytes", 5, "a\0b"):
        with pytest.raises(OptionsError, match="expected a path"):
            unpack_image(image, wrong)  # type: ignore[arg-type]
        with pytest.raises(OptionsError, match="expected a path"):
            unpack_image(wrong, tmp_path / "root")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interrupted_unpacking_leaves_nothing(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = module._apply

    def interrupted(*arguments: Any) -> None:
        apply(*arguments)
        assert (tmp_path / "root" / "file").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack_image(layout.image(layer(("file", b"x"))), tmp_path / "root")
    assert not (tmp_path / "root").exists()
