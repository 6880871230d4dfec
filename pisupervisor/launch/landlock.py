"""Landlock: access rights, as its versions brought them, and what a child's ruleset is."""

from __future__ import annotations

import os

from pisupervisor.launch.root import SCRATCH
from pisupervisor.options import IsolationOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK, REFER, TRUNCATE, IOCTL_DEV = 1 << 6, 1 << 11, 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_READ = EXECUTE | READ_FILE | READ_DIR
TRUNCATE_SINCE, TCP_SINCE, SCOPES_SINCE = 3, 4, 6  # versions
_TCP, _SCOPES = 3, 3  # bind and connect; abstract sockets and signals


def ruleset(options: IsolationOptions, abi: int) -> dict[str, Any]:
    """The fields of a ``ChildPlan``, where the kernel has that version. With ``nesting`` there are no rules for files: nobody
    inside could mount then.
    """
    abi, nesting = abi if options.security.landlock else 0, options.security.nesting
    net = _TCP if abi >= TCP_SINCE and options.network == "none" else 0
    scopes = _SCOPES if abi >= SCOPES_SINCE else 0
    if nesting and not net and not scopes:
        abi = 0  # nothing is left for it to hold
    return {
        "landlock": [] if nesting else rules(options, abi), "landlock_abi": abi,
        "landlock_fs": 0 if nesting else file_rights(abi), "landlock_net": net, "landlock_scopes": scopes,
    }  # fmt: skip


def file_rights(abi: int) -> int:
    """Every file access that Landlock of this version can handle."""
    return max((rights for since, rights in _FILE_RIGHTS.items() if since <= abi), default=0)


def rules(options: IsolationOptions, abi: int) -> list[list[Any]]:
    """Read and execute everywhere (the root holds only what was given), write where scratch or a writable bind is."""
    if not abi:
        return []
    full = file_rights(abi) & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    found: list[list[Any]] = [
        ["/", _READ],
        ["/dev", READ_FILE | WRITE_FILE | (TRUNCATE if abi >= TRUNCATE_SINCE else 0)],
    ]
    found += [[place, full] for place in (*SCRATCH, *options.filesystem.overlay)]
    for source, target in options.filesystem.shown("writable"):
        rights = full if os.path.isdir(source) else full & (EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE)
        found.append([target, rights])
    return found
