"""Well-known libraries and what each needs; their work is that of work.py."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from pisupervisor import IsolationError, Limits, ProcessIsolator, Security

WORK = Path(__file__).parent / "work.py"
#: piece of work (a function of work.py) -> the module that it needs
NEEDS = {
    "numpy": "numpy", "pandas": "pandas", "scipy": "scipy", "pillow": "PIL", "lxml": "lxml", "cryptography": "cryptography",
    "requests": "requests", "matplotlib": "matplotlib", "scikit_learn": "sklearn", "sqlite": "sqlite3",
    "sqlite_wal": "sqlite3", "multiprocessing_pool": "multiprocessing", "asyncio_streams": "asyncio",
    "threads": "threading", "subprocesses": "subprocess", "tls": "ssl",
}  # fmt: skip
#: module -> distribution
PACKAGES = {
    "numpy": "numpy", "pandas": "pandas", "scipy": "scipy", "PIL": "pillow", "lxml": "lxml", "cryptography": "cryptography",
    "requests": "requests", "matplotlib": "matplotlib", "sklearn": "scikit-learn",
}  # fmt: skip


def attempt(name: str, profile: str) -> str:
    """``works``, or how that piece of work fails in a new child behind this profile."""
    with ProcessIsolator.create(
        security=Security(seccomp=profile), network="loopback", import_paths=[sysconfig.get_path("purelib")],
        limits=Limits(memory="1G", cpus=None),
    ) as isolator:  # fmt: skip
        try:
            return "works" if isolator.invoke_method(WORK, name, timeout=90.0) is True else "a wrong result"
        except IsolationError as error:
            return f"{getattr(error, 'type_name', type(error).__name__)}: {getattr(error, 'message', error)}"
