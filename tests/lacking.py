"""What tests do without on an old kernel, as an application would there: ``degrade=("landlock",)`` (Linux 5.13)."""

from __future__ import annotations

from pihost import syscalls
from pisupervisor import IsolationOptions

LACKING = () if syscalls.landlock_abi() else ("landlock",)


def adapt() -> None:
    """From now on all options leave out what this kernel lacks, but where a test switches that off by name."""
    if not LACKING:
        return
    check = IsolationOptions.__post_init__

    def check_adapted(options: IsolationOptions) -> None:
        own = options.__dict__
        if isinstance(own["degrade"], (tuple, list)):
            own["degrade"] = (*own["degrade"], *(name for name in LACKING if name not in own["degrade"]))
        check(options)

    IsolationOptions.__post_init__ = check_adapted  # type: ignore[method-assign]
