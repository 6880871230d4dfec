"""A small root file system with this very Python: what its interpreter and extension modules need, and nothing else."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PREFIX = "usr/local"
_LEFT_OUT = shutil.ignore_patterns(
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "tkinter", "site-packages", "dist-packages", "config-*", "*.a",
)  # fmt: skip


def build(root: Path) -> Path:
    """At ``root``, which must not exist."""
    python = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (root / PREFIX / "bin").mkdir(parents=True)
    shutil.copy(python, root / PREFIX / "bin" / name)
    (root / PREFIX / "bin" / "python3").symlink_to(name)
    stdlib = Path(os.path.dirname(os.path.realpath(os.__file__)))
    shutil.copytree(
        stdlib, root / PREFIX / "lib" / name, ignore=_LEFT_OUT, symlinks=False, ignore_dangling_symlinks=True
    )
    copy_libraries(root, [python, *stdlib.glob("lib-dynload/*.so")])
    for folder in ("etc", "home/user", "var/lib/app", "tmp", "proc", "dev", "sys"):
        (root / folder).mkdir(parents=True)
    (root / "etc" / "hostname").write_text("of-the-rootfs\n")
    (root / "etc" / "passwd").write_text("app:x:1234:1234:app:/home/user:/bin/sh\n")
    (root / "var/lib/app/present").write_text("as it was")
    (root / "top-file").write_text("at the top")
    (root / "shortcut").symlink_to("var/lib/app")
    return root


def copy_libraries(root: Path, files: list[Path]) -> None:
    """The shared libraries that these need, where the loader of the system looks for them."""
    done = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False)
    for path in sorted(set(re.findall(r"(/\S+\.so\S*)(?= \()", done.stdout))):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(path, target)


@functools.cache
def shared() -> str:
    """One for all tests of a process, which do not write to it."""
    folder = tempfile.mkdtemp(prefix="pisupervisor-rootfs-")
    os.chmod(folder, 0o755)
    atexit.register(shutil.rmtree, folder)
    return str(build(Path(folder) / "root"))
