"""Zips and wheels, opened on the host, with bounds that hold against archives made to hurt."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

from pisupervisor.errors import OptionsError

_ENCRYPTED = 0x1
_CENTRAL_ENTRY = b"PK\x01\x02"


def read_archive(
    where: str, data: bytes, take: Callable[[int, int], None], max_entries: int
) -> tuple[tuple[str, bytes], ...]:
    """((relative path, bytes), ...) of the zip ``data``, sorted by path.

    ``take(entries, bytes)`` counts, and refuses what is too much. Raises OptionsError for an archive that is corrupt,
    encrypted, too large, or names files outside itself.
    """
    # zipfile builds an object of 700 bytes for each entry before anyone can count them: 1.4 million fit into 64 MiB.
    take(min(data.count(_CENTRAL_ENTRY), max_entries + 1), 0)
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            for info in entries:
                take(0, info.file_size)
                _check_entry(where, info)
            for info in entries:
                name = _relative(where, info.filename)
                if name and "__pycache__" not in name and not name.endswith(".pyc"):
                    files[name] = _read_entry(archive, info)
    except OptionsError:
        raise
    except Exception as error:  # a crafted archive makes zipfile raise nearly anything
        raise OptionsError(f"{where}: not a usable zip archive: {type(error).__name__}: {error}") from error
    if not any(name.endswith(".py") for name in files):
        raise OptionsError(f"{where}: this archive has no Python files")
    return tuple(sorted(files.items()))


def _relative(where: str, name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or parts[0].endswith(":") or ".." in parts:
        raise OptionsError(f"{where}: the entry {name!r} lies outside the archive")
    return "/".join(part for part in parts if part not in ("", "."))


def _check_entry(where: str, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise OptionsError(f"{where}: the entry {info.filename!r} is encrypted; give an archive without a password")
    # bzip2 and lzma are decompressed without a bound by zipfile; Python itself does not import from such zips either.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise OptionsError(f"{where}: the entry {info.filename!r} is not deflated; zip it with the usual method")


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as stream:
        data = stream.read(info.file_size + 1)  # a bare read() would inflate 2 GiB at once before it looks at the size
    if len(data) != info.file_size:
        raise ValueError(f"the entry {info.filename!r} has not the size that the archive says")
    return data
