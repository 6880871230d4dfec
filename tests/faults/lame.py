"""A zygote whose children do something wrong at one named step of their launch: a copy of pihost with that built in.

The host is the real one. What goes wrong is in the host name, "exit at mounts": the one text that goes through a plan
to every step and means nothing to the library.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pihost
from pihost import confine

#: every named step, in order
STEPS = [name for name, _act in confine.BEFORE_FORK] + ["seccomp"] + [name for name, _act in confine.PAYLOAD]
#: from here on the end of the zygote is felt wherever the child is
ARMED = STEPS.index("death signal") + 1

LAMENESS = '''

def _go_lame(plan, step):
    """What the host name says, if it says anything of this step."""
    what, at, where = plan.hostname.partition(" at ")
    if not at or where != step:
        return
    if what == "fail":
        raise OSError(5, "lame")
    if what == "exit":
        os._exit(0)
    if what == "crash":
        import ctypes
        ctypes.string_at(0)
    if what == "hang":
        while True:
            time.sleep(1000)
    if what == "slow":
        time.sleep(0.3)
'''
IN_CONFINE = """

_sound_run = run


def run(steps, plan, fds, kernel=syscalls, log=None):
    def lame(name, act):
        def step(*arguments):
            _go_lame(plan, name)
            act(*arguments)
        return step
    _sound_run([(name, lame(name, act)) for name, act in steps], plan, fds, kernel, log)
"""
IN_ZYGOTE = """

_sound_map_ids = map_ids


def map_ids(pid, plan):
    _go_lame(plan, "the zygote's id maps")
    _sound_map_ids(pid, plan)
    _go_lame(plan, "the zygote's report")
"""


def make(folder: Path) -> str:
    """The copy's path."""
    package = folder / "pihost"
    shutil.copytree(Path(pihost.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "confine.py").open("a") as confine_source:
        confine_source.write(LAMENESS + IN_CONFINE)
    with (package / "zygote.py").open("a") as zygote_source:
        zygote_source.write("\nimport time\n" + LAMENESS + IN_ZYGOTE)
    return str(package)
