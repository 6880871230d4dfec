"""From a path to the whole block device below it, as blkio names it."""

from __future__ import annotations

import os
import stat

from pisupervisor.errors import OptionsError
from pisupervisor.limits import directories

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.options import IoLimit

RATES = ("read_bps", "write_bps", "read_iops", "write_iops")


def block_device(path: str) -> str:
    """``"254:0"`` for a device node, or for the file system on which ``path`` lies; the whole disk, not a partition.

    Raises OptionsError where there is none.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise OptionsError(f"io: cannot look at the device {path!r}: {error}") from None
    device = found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev
    link = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not os.path.exists(link):
        raise OptionsError(f"io: {path!r} lies on no single block device (tmpfs, overlay?); name the device node")
    if os.path.exists(f"{link}/partition"):  # throttling works on request queues, which partitions share
        link = os.path.dirname(os.path.realpath(link))
    return directories.read(f"{link}/dev").strip().decode()


def rates(limit: IoLimit) -> dict[str, int]:
    """The rates that were asked for, per second. Raises OptionsError for 0, which the kernel takes as "no limit"."""
    asked = {name: int(value) for name in RATES if (value := getattr(limit, name)) is not None}
    for name, value in asked.items():
        if value == 0:
            raise OptionsError(f"io.{name}: 0 would mean no limit to the kernel; give at least 1 per second")
    return asked
