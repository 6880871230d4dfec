"""An OCI image layout unpacked into a folder, for ``RootfsHost``: nothing in it is run, and nothing is written outside.

What is believed of an image: nothing. Blobs must have their digest, names stay inside, links are followed as after chroot,
devices and setuid bits are left out, and the whole has a bound.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import posixpath
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pisupervisor import checks
from pisupervisor.errors import OptionsError
from pisupervisor.launch.rootfs import resolve
from pisupervisor.limits.sizes import parse_size

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
#: layer types -> whether they are compressed
_LAYERS = {
    "application/vnd.oci.image.layer.v1.tar": False,
    "application/vnd.oci.image.layer.v1.tar+gzip": True,
    "application/vnd.docker.image.rootfs.diff.tar": False,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": True,
}
_MAX_JSON = 4 << 20
_MAX_ENTRIES = 500_000
_MAX_HEADERS = 16 << 20  # bytes before a member: tarfile takes a header at its word
_REMOVED, _OPAQUE = ".wh.", ".wh..wh..opq"


def is_layout(path: str | os.PathLike[str]) -> bool:
    """Whether that folder is an OCI image layout."""
    return os.path.isfile(os.path.join(path, "oci-layout")) and os.path.isfile(os.path.join(path, "index.json"))


def unpack_image(layout: str | os.PathLike[str], folder: str | os.PathLike[str], max_size: int | str = "8G") -> None:
    """Unpack the image for this machine in the OCI image layout ``layout`` (a folder, as ``skopeo copy ... oci:FOLDER``
    makes it) into ``folder``, which must not exist, or be empty.

    All files belong to the caller, with the image's permissions but for setuid and setgid. Raises OptionsError for what is
    no such image, is damaged or reaches outside, and for more than ``max_size`` bytes; ``folder`` is then removed. Also for a
    ``folder`` that cannot be made, or has something in it, which stays.
    """
    source, named = checks.path(layout, "layout"), checks.path(folder, "folder")
    if not is_layout(source):
        raise OptionsError(f"{source} is no OCI image layout: it has no oci-layout and index.json")
    try:
        target = os.path.realpath(named)
        os.makedirs(target, exist_ok=True)
        present = os.listdir(target)
    except OSError as error:
        raise OptionsError(f"cannot unpack an image into {named}: {error.strerror}") from error
    if present:
        raise OptionsError(f"{target} is not empty; an image is unpacked into a folder of its own")
    try:
        room = _Room(parse_size(max_size, "max_size"))
        for layer in _manifest(source)["layers"]:
            _apply(source, layer, target, room)
    except BaseException as error:  # Ctrl-C, and whatever a hostile image can provoke in three readers: tar, gzip, JSON
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OptionsError) or not isinstance(error, Exception):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"no room for the image in {target}: {error.strerror}; free some, or set TMPDIR to where more is"
            raise OptionsError(why) from error
        raise OptionsError(f"{source} is no OCI image that can be unpacked: {type(error).__name__}: {error}") from error


class _Room:
    """What an image may still take: bytes and entries."""

    def __init__(self, size: int) -> None:
        self.size, self.entries = size, _MAX_ENTRIES

    def take(self, size: int) -> None:
        self.size, self.entries = self.size - size, self.entries - 1
        if self.size < 0 or self.entries < 0:
            raise OptionsError("the image is too large; raise max_size, if you trust it")


def _manifest(layout: str) -> dict[str, Any]:
    with open(os.path.join(layout, "index.json"), "rb") as file:
        found: dict[str, Any] = json.loads(file.read(_MAX_JSON))
    for _ in range(3):  # an index may hold indexes
        if "layers" in found:
            return found
        found = json.loads(_blob(layout, _choose(found["manifests"])))
    raise OptionsError("the image's indexes do not end in a manifest")


def _choose(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = _MACHINES.get(os.uname().machine, os.uname().machine)
    fitting = [entry for entry in manifests if (entry.get("platform") or {}).get("architecture", wanted) == wanted]
    fitting = [entry for entry in fitting if (entry.get("platform") or {}).get("os", "linux") == "linux"]
    if len(fitting) != 1:
        raise OptionsError(f"{len(fitting)} images for linux/{wanted} in the layout, not one; copy just one into it")
    return fitting[0]


@contextmanager
def _open_blob(layout: str, descriptor: dict[str, Any]) -> Iterator[BinaryIO]:
    """The blob, when it has the digest and the size that are said of it."""
    digest = _DIGEST.fullmatch(descriptor["digest"])
    if digest is None:
        raise OptionsError(f"a digest of a kind that is not known: {descriptor['digest'][:80]!r}")
    with open(os.path.join(layout, "blobs", "sha256", digest[1]), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest[1] or file.tell() != descriptor["size"]:
            raise OptionsError(f"the blob {digest[1][:16]}... is damaged: its digest or size is another")
        file.seek(0)
        yield file


def _blob(layout: str, descriptor: dict[str, Any]) -> bytes:
    with _open_blob(layout, descriptor) as file:
        return file.read(_MAX_JSON)


class _Reader:
    """A layer as tarfile reads it: never more than so much between two members, whatever a header says. (Not at once: from 3.13
    on tarfile takes a header's 2 GB a piece at a time, and keeps them all.)
    """

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self.left = _MAX_HEADERS

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise OptionsError(f"headers of more than {_MAX_HEADERS} bytes in a layer")
        data: bytes = self._file.read(size)
        self.left -= len(data)
        return data


def _apply(layout: str, descriptor: dict[str, Any], root: str, room: _Room) -> None:
    is_compressed = _LAYERS.get(descriptor["mediaType"])
    if is_compressed is None:
        raise OptionsError(f"a layer of the type {descriptor['mediaType'][:80]!r}; tar and tar+gzip are known")
    own: set[str] = set()  # what this layer has made: it is not what its whiteouts mean
    with _open_blob(layout, descriptor) as file:
        reader: Any = _Reader(gzip.GzipFile(fileobj=file) if is_compressed else file)
        with tarfile.open(fileobj=reader, mode="r:") as layer:
            for member in layer:
                layer.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte for each
                room.take(max(0, member.size))
                reader.left = max(0, member.size) + _MAX_HEADERS
                own.update(_extract(layer, member, root, own))
                reader.left = _MAX_HEADERS


def _extract(layer: tarfile.TarFile, member: tarfile.TarInfo, root: str, own: set[str]) -> Iterator[str]:
    """Make one member; the paths that this layer has now made."""
    name = posixpath.normpath("/" + member.name.lstrip("/"))  # ".." at the top leads nowhere, as in chroot
    folder, base = posixpath.split(name)
    if not base:
        return  # the top itself
    parent = root + _folder(root, folder)
    path = os.path.join(parent, base)
    if base == _OPAQUE:
        for entry in os.listdir(parent):
            if os.path.join(parent, entry) not in own:
                _remove(os.path.join(parent, entry))
    elif base.startswith(_REMOVED):
        victim = base[len(_REMOVED) :]
        if victim in ("", ".", ".."):
            raise OptionsError(f"a whiteout of {victim!r}")
        _remove(os.path.join(parent, victim))
    elif _make(layer, member, root, path):
        yield path


def _make(layer: tarfile.TarFile, member: tarfile.TarInfo, root: str, path: str) -> bool:
    """Whether it is of a kind that is made: no device and no pipe is."""
    if member.isdir():
        if not os.path.isdir(path) or os.path.islink(path):
            _remove(path)
            os.mkdir(path)
        os.chmod(path, member.mode & 0o1777 | 0o700)  # we must be able to fill it, and to remove it
        return True
    if not (member.isfile() or member.issym() or member.islnk()):
        return False
    _remove(path)
    if member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        found = resolve(root, member.linkname)
        if found is None or not os.path.isfile(root + found):
            raise OptionsError(f"the hard link {member.name[:80]!r} leads to no file of the image")
        os.link(root + found, path, follow_symlinks=False)
    else:
        _write(layer, member, path)
    return True


def _write(layer: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    content = layer.extractfile(member)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file)
        os.fchmod(fd, member.mode & 0o777 | 0o400)


def _folder(root: str, path: str) -> str:
    """That folder in the image, "" for the top, made where it is missing; links on the way are followed inside of it."""
    found = resolve(root, path)
    if found is None:
        above, base = posixpath.split(path)
        found = f"{_folder(root, above)}/{base}"
        os.mkdir(root + found, 0o755)  # a dangling link in its place: FileExistsError, and the image is refused
    if not os.path.isdir(root + found):
        raise OptionsError(f"the image puts something below {path[:80]!r}, which is no folder")
    return "" if found == "/" else found


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
