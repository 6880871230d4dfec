"""Every check of tests/escape with one layer off at a time, and what that shows of the layers: docs/containment.md."""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisupervisor import IsolationError, IsolationOptions, Limits, ProcessIsolator

TOP = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / "tests" / "escape"))
import box  # noqa: E402
from bench_walls import WALLS, WORK, measure  # noqa: E402
from present import absent  # noqa: E402

DOCUMENT = TOP / "docs" / "containment.md"
OUT, HELD, ODD = "out", "held", "?"

#: what is switched off: steps of the launch that are left out, and options that are changed
LAYERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "network namespace": ((), {"network": "host"}),
    "ipc namespace": (("ipc namespace",), {}),
    "uts namespace": (("uts namespace", "hostname"), {}),
    "cgroup namespace": (("cgroup namespace",), {}),
    "time namespace": (("time namespace",), {}),
    "detached root": (("mount table",), {}),
    "own /proc, /tmp, /dev/shm": (("mounts",), {}),
    "seccomp": (("seccomp",), {}),
    "landlock": (("landlock",), {}),
    "capabilities dropped": (("capabilities",), {}),
    "bounding set": (("bounding set",), {}),
    "ids changed": (("ids",), {}),
    "cgroup limits": (("limits",), {}),
    "rlimits": (("rlimits",), {}),
    "fds closed": (("close fds",), {}),
    "session": (("session",), {}),
    "clean environment": ((), {"inherit_environment": [box.SECRET]}),
}
#: nothing starts without these (Landlock wants no_new_privs): what they hold gets out of an ordinary process, and of no child
FIXED = "user, mount and pid namespace, private root, no_new_privs"
#: what a child has not because its zygote is exec'd and has let go of it; and because no id and no right of the host's is
#: left to it. Shown by what gets out of a process that has just that.
INHERITED = "a zygote of its own, without the host's groups, folders and terminal"
NOBODY = "user namespace: nothing of root's rights"
ALWAYS = (FIXED, INHERITED, NOBODY)
#: the verdict is not in the child's word (tests/escape/test_box.py judges it from outside), or it is a bomb that nothing
#: would bound any more
NOT_LET_LOOSE = {"R03", "R12", "R16", "R17", "R19", "K25", "K27", "F24"}
BOMBS = {"R01": ("5000", "300"), "R02": ("3000", "300"), "R14": ("5000", "300")}  # which 300 show as well as thousands


def verdict(lines: list[str]) -> str:
    words = [line.split()[0] for line in lines if line.strip()]
    if any(word.startswith("E") for word in words):
        return OUT
    return HELD if any(word.startswith("B") for word in words) else ODD


def try_one(check: str, layers: tuple[str, ...], around: box.Outside) -> str:
    """What comes of ``check`` in a child without ``layers``."""
    steps = tuple(step for layer in layers for step in LAYERS[layer][0])
    changes: dict[str, Any] = {"call_timeout": 20.0}
    for layer in layers:
        changes |= LAYERS[layer][1]
    try:
        with without(box.options(check, **changes), steps) as isolator:
            return verdict(box.run(isolator, check, around, BOMBS.get(check, ("", ""))))
    except IsolationError:
        return ODD  # the child died of it, or does not start like that


@contextmanager
def without(options: IsolationOptions, steps: tuple[str, ...]) -> Iterator[ProcessIsolator]:
    with box.isolator_without(options, *steps) if steps else ProcessIsolator.create(options) as made:
        yield made


#: a copy of the machine's files for who has nothing of ours around it: what it writes and mounts goes to a tmpfs of its own
_COPY = """
mount -t tmpfs none /mnt && mkdir /mnt/upper /mnt/work /mnt/root && mknod /mnt/upper/tmp c 0 0 &&
mount -t overlay none -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root &&
mkdir -m 1777 /mnt/root/tmp &&
for folder in proc dev sys run; do mount --rbind /$folder /mnt/root/$folder || exit 3; done && chroot /mnt/root "$@"; exit
"""
_ORDINARY = ("setpriv", "--reuid=65534", "--regid=65534")
#: whoever runs a check with nothing of ours around it, by what it shows when that gets out
CONTROLS = {FIXED: (*_ORDINARY, "--clear-groups"), INHERITED: (*_ORDINARY, "--groups", "4"), NOBODY: ()}
#: what no layer of ours is shown by, and why
NOT_SHOWN = {
    "F11": "true of every process that begins in its root",
    "F13": "nobody writes to a program that runs; and it is mounted read-only",
    "K17": "no attack: libraries fall back on this answer",
    "K23": "takes CAP_SYS_RESOURCE, with which it gets out (tests/escape/test_box.py, in a VM)",
    "P07": "takes CAP_SYS_RESOURCE, with which it gets out (tests/escape/test_box.py, in a VM)",
    "R22": "the host has fewer instances than it tries; a child has none: O19",
    "X01": "no attack: the profile is not too tight",
}
#: PID 1, or the machine, is what they are after: theirs is one of their own
OWN_PIDS = {"K08", "K10", "N16", "O15", "P08"}


def outside_of_all(check: str, around: box.Outside) -> str:
    """What always holds, by the first control that gets out; empty where none does."""
    if check in BOMBS:
        return ""
    return next((name for name in ALWAYS if try_bare(check, CONTROLS[name], name == INHERITED, around) == OUT), "")


def try_bare(check: str, who: tuple[str, ...], inherits: bool, around: box.Outside) -> str:
    """What comes of it in a process of its own, with a fresh Python; ``inherits``: with an open folder and a terminal."""
    pids = ("--pid", "--fork", "--mount-proc") if check in OWN_PIDS else ()
    copy = _COPY.replace(" chroot", " mount --bind /mnt/root/usr /mnt/root/usr && chroot") if check == "F05" else _COPY
    private = ("unshare", "--mount", "--propagation", "private", *pids, "sh", "-c", copy, "sh")
    code = box.PRELUDE + around.fill_in(box.CHECKS[check]["code"])
    held, terminal = os.open("/", os.O_RDONLY), os.openpty()
    try:
        done = subprocess.run(
            [*private, *who, "/usr/bin/python3", "-c", code], capture_output=True, text=True, timeout=20, cwd="/",
            start_new_session=True, pass_fds=[held, terminal[1]] if inherits else [],
            preexec_fn=(lambda: fcntl.ioctl(terminal[1], termios.TIOCSCTTY, 0)) if inherits else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ODD
    finally:
        for fd in (held, *terminal):
            os.close(fd)
    return verdict(done.stdout.splitlines())


def smallest(check: str, around: box.Outside) -> tuple[str, ...]:
    """Layers that hold it together: it gets out without them, and no more when one of them is there. Empty: none do."""
    off = tuple(LAYERS)
    # A layer that is off may also hold: ids that nothing maps make no user namespace.
    if try_one(check, off, around) != OUT:
        pairs = [("seccomp", layer) for layer in off if layer != "seccomp"]
        return next((pair for pair in pairs if try_one(check, pair, around) == OUT), ())
    for layer in LAYERS:
        fewer = tuple(name for name in off if name != layer)
        if try_one(check, fewer, around) == OUT:
            off = fewer
    return off


class Row:
    """One check: without which single layers it gets out, which hold it together, or who else holds it."""

    def __init__(self, check: str, around: box.Outside) -> None:
        self.check, self.title = check, box.CHECKS[check]["title"]
        self.alone: list[str] = []
        self.together: tuple[str, ...] = ()
        self.note = ""
        if reason := absent(check):
            self.note = f"skipped: {reason}"
        elif check in NOT_LET_LOOSE:
            self.note = "judged from outside: tests/escape/test_box.py"
        else:
            self.measure(around)

    def measure(self, around: box.Outside) -> None:
        if (got := try_one(self.check, (), around)) != HELD:
            self.note = f"NOT HELD ({got})"
            return
        self.alone = [layer for layer in LAYERS if try_one(self.check, (layer,), around) == OUT]
        if self.alone:
            return
        self.together = smallest(self.check, around)
        if not self.together:
            why = NOT_SHOWN.get(self.check)
            self.note = outside_of_all(self.check, around) or "root cannot do it here either" + (
                f": {why}" if why else ""
            )

    def cells(self) -> str:
        held = self.note or ", ".join(self.alone) or " + ".join(self.together)
        return f"| {self.check} | {self.title} | {'each of: ' if len(self.alone) > 1 else ''}{held} |"


def layer_lines(rows: list[Row]) -> Iterator[str]:
    for layer in LAYERS:
        alone = [row.check for row in rows if layer in row.alone]
        shared = [row.check for row in rows if layer in row.together]
        yield f"| {layer} | {' '.join(alone) or '-'} | {' '.join(shared) or '-'} |"
    for name in ALWAYS:
        yield f"| {name} | {' '.join(row.check for row in rows if row.note == name) or '-'} | - |"


COSTLY = {"all of them": WALLS, "cgroup limits": ("limits",), "landlock": ("landlock",), "seccomp": ("seccomp",)}


def cost_lines() -> Iterator[str]:
    """How many times as long calls take with these walls as without: see bench_walls."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    for name, steps in COSTLY.items():
        ratios = " | ".join(f"{row['ratio']:.3f}" for row in measure(40, steps).values())
        yield f"| {name} | {ratios} |"
    os.sched_setaffinity(0, allowed)


def document(rows: list[Row], seconds: float) -> str:
    skipped = sum(row.note.startswith("skipped") for row in rows)
    head = f"""# Which layer holds what

Made by `scripts/ablate` on Linux {platform.release()} ({time.strftime("%Y-%m-%d")}, {seconds:.0f} s): every check of
`tests/escape` in a fresh child with one layer off at a time. A check that gets out without one layer proves that layer.
Where none alone lets it out, layers are switched on again one by one as long as it still gets out: those that remain hold
it together, and any one of them is enough. What gets out of no child is tried without one: by an ordinary process, by one
with groups, an open folder and a terminal, and by root, which writes and mounts in a copy of the machine's files.
{len(rows)} checks, {skipped} skipped.

## Layers

| layer | it alone holds | it holds together with others |
|---|---|---|
"""
    table = "\n".join(row.cells() for row in rows)
    costs = f"""## What they cost a call

How many times as long a call takes with them as in a child of the same zygote without, on one core (`scripts/bench walls`).
The kernel takes 40 ns more for a system call behind any filter, looks at each folder above a file that is opened, and keeps
other accounts when it goes from a process of one group to one of another: twice a call, some 1.5 us.

| layer | {" | ".join(said for _name, _given, said in WORK.values())} |
|---|{"---|" * len(WORK)}
{chr(10).join(cost_lines())}
"""
    layers = "\n".join(layer_lines(rows))
    return f"{head}{layers}\n\n{costs}\n## Checks\n\n| check | tries | what holds it |\n|---|---|---|\n{table}\n"


def unproved(rows: list[Row]) -> list[str]:
    """Layers that no check shows to matter, and checks that are not held."""
    shown = {layer for row in rows for layer in (*row.alone, *row.together)}
    return [*(layer for layer in LAYERS if layer not in shown), *(row.check for row in rows if "NOT HELD" in row.note)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/ablate", description=__doc__)
    parser.add_argument("--check", action="append", metavar="ID", help="only these checks; nothing is written then")
    arguments = parser.parse_args()
    os.environ[box.SECRET] = "of the host"
    started, rows = time.monotonic(), []
    keep = IsolationOptions(limits=Limits(memory="128M", cpus=0.5, pids=64))
    with (
        tempfile.TemporaryDirectory(prefix="pisupervisor-ablate-", dir="/var/tmp") as folder,
        box.outside(Path(folder)) as around,
        ProcessIsolator.create(keep),  # keeps the zygote warm
    ):
        for check in arguments.check or box.CHECKS:
            rows.append(Row(check, around))
            print(rows[-1].cells(), flush=True)
    if not arguments.check:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(rows, time.monotonic() - started))
        for name in (missing := unproved(rows)):
            print(f"not proved: {name}", file=sys.stderr)
        return 1 if missing else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
