"""Running one catalogue check in a child: the checks, the words to fill in, and what the verdict is."""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_checks import OWN

from pisupervisor import IsolationOptions, Limits, ProcessIsolator, Security

_DATA = json.loads((Path(__file__).parent / "box_checks.json").read_text())
PRELUDE: str = _DATA["prelude"]
CATALOGUE: dict[str, dict[str, Any]] = {check["id"]: check for check in _DATA["checks"]}
CHECKS: dict[str, dict[str, Any]] = {**CATALOGUE, **OWN}
STRICT_ONLY = ("F20", "O09")  # locks: sqlite needs them under "default"; watches: so do servers that reload
PROBE = "pis_probe"
SECRET = "PIC_SECRET"


@dataclass
class Outside:
    """What a check looks for and must not reach: it all exists, on the host, while the check runs."""

    port: int
    folder: Path
    user: str

    def fill_in(self, code: str) -> str:
        words = {
            "HOSTPID": str(os.getpid()), "HOSTPORT": str(self.port), "HOSTDIR": str(self.folder).lstrip("/"),
            "HOSTUSER_STR": repr(self.user), "BOXCGROUP": "pisupervisor", "HOSTNAME_STR": repr(Security().hostname),
        }  # fmt: skip
        for word, value in words.items():
            code = code.replace(word, value)
        return code


@contextmanager
def outside(folder: Path) -> Iterator[Outside]:
    """Makes the ``pis_probe`` objects and a listening port; takes them away again."""
    libc = ctypes.CDLL(None, use_errno=True)
    path, memory = Path(f"/run/{PROBE}.sock"), Path(f"/dev/shm/{PROBE}")
    user = next(entry.pw_name for entry in pwd.getpwall() if entry.pw_name not in ("root", "user"))
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for address in (f"\0{PROBE}", str(path)):
            path.unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        stack.callback(path.unlink, missing_ok=True)
        memory.write_text("host")
        stack.callback(memory.unlink)
        queue = libc.mq_open(f"/{PROBE}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        if queue >= 0:
            stack.callback(os.close, queue)
            stack.callback(libc.mq_unlink, f"/{PROBE}".encode())
        shared = libc.shmget(0x70697370, 4096, 0o1666)
        if shared >= 0:
            stack.callback(libc.shmctl, shared, 0, None)
        yield Outside(server.getsockname()[1], folder, user)


def options(check: str = "", **changes: object) -> IsolationOptions:
    profile = "strict" if check in STRICT_ONLY else "default"
    settings: dict[str, object] = {
        "limits": Limits(memory="128M", cpus=0.5, pids=64), "security": Security(seccomp=profile), "call_timeout": 30.0,
        "network": CHECKS[check].get("network", "none") if check else "none",
    }  # fmt: skip
    return IsolationOptions(**(settings | changes))  # type: ignore[arg-type]


@contextmanager
def isolator_without(wanted: IsolationOptions, *layers: str) -> Iterator[ProcessIsolator]:
    """An isolator that lacks some steps of its launch."""
    made = ProcessIsolator(wanted, without=layers)
    try:
        made._start()
        yield made
    finally:
        made.close()


# A copy of the payload runs the check, so that one which ends its process still leaves its output to be read.
_IN_COPY = """
import os, sys
_p = os.fork()
if _p == 0:
    try:
        sys.stdout.reconfigure(line_buffering=True)
        exec(compile({code!r}, "<check>", "exec"), {{"__name__": "__main__"}})
    except BaseException as error:
        print("?", type(error).__name__, error)
    finally:
        sys.stdout.flush()
        os._exit(0)
os.waitpid(_p, 0)[1]
"""


def run(isolator: ProcessIsolator, check: str, around: Outside, instead: tuple[str, str] = ("", "")) -> list[str]:
    """The lines that the check printed in the child; ``instead``: a word of it to change, and to what."""
    code = PRELUDE + around.fill_in(CHECKS[check]["code"].replace(*instead) if instead[0] else CHECKS[check]["code"])
    if check == "R02":
        code = _IN_COPY.format(code=code)
    return isolator.run_source(code).stdout.splitlines()


def blocked(lines: list[str]) -> bool:
    """The verdict: it said B at least once, and E never."""
    words = [line.split()[0] for line in lines if line.strip()]
    return any(word.startswith("B") for word in words) and not any(word.startswith("E") for word in words)
