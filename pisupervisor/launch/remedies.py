"""What helps against a failed launch, by its step and the kernel's word: never nothing. Imported only to explain a failure."""

from __future__ import annotations

import _signal as signal
from errno import EACCES, EAGAIN, EMFILE, ENFILE, ENOENT, ENOEXEC, ENOMEM, ENOSPC, ENOSYS, EPERM, EROFS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LOOK = "see what `pisupervisor doctor` finds here; log_level='DEBUG' has each step of a launch told on stderr"
FILTER = "the profile refuses what every launch needs: start from 'default', or have `pisupervisor learn` write one"
DESCRIPTORS = "raise ulimit -n, or close isolators"
STDIO = "if AppArmor confines the application: its profile must say attach_disconnected, as Docker's and Podman's do"
_PRELOAD_FOUND = "a preloaded module must be importable in the child: name its folder in import_paths"
_PRELOAD_IMPORTED = "it must be fit to be forked, in one thread and before there is a child: else import it in on_start"
_PLACE = "a place in the child must be there already where it lies in what is read-only; choose one outside of that"
_STEPS = {
    "clone": "raise user.max_user_namespaces and the other user.max_*_namespaces, or the pids limit of this session",
    "interpreter": "the interpreter must run from its own folder and /usr alone; try python='/usr/bin/python3'",
    "layer": "this kernel does not take that folder as a layer of an overlay: show it with read_only instead of frozen",
    "stdio": STDIO,
}
_AFTER_THE_FILTER = ("fork", "session", "payload fds")
_NUMBERS = {
    EAGAIN: "raise ulimit -u, or the pids limit of this session or container",
    ENOMEM: "the machine, or the group of this session or container, must have more memory to give",
    EMFILE: DESCRIPTORS,
    ENFILE: DESCRIPTORS,
    ENOSPC: "something is full that the kernel counts: see fs.mount-max and the user.max_*_namespaces",
}


def of_step(step: str, number: object, detail: str) -> str:
    """Against a step that the child's side has told of."""
    remedy = next((text for name, text in _STEPS.items() if step.startswith(name)), "")
    if step == "namespaces" or number in (EPERM, EACCES, ENOSYS):
        from pisupervisor.launch import userns

        remedy = userns.remedy_for(step, number, detail, userns.situation()) or remedy
        if step in _AFTER_THE_FILTER:
            remedy = remedy or FILTER
    if step.startswith("preload"):
        remedy = _PRELOAD_FOUND if "ModuleNotFoundError" in detail else _PRELOAD_IMPORTED
    if number == EROFS and step.startswith(("bind", "mounts")):
        remedy = _PLACE
    return remedy or of_errno(number)


def of_errno(number: object) -> str:
    if number in (EPERM, ENOSYS) and (filtered := _of_a_filter()):
        return filtered
    return (_NUMBERS.get(number) if isinstance(number, int) else None) or LOOK


def _of_a_filter() -> str:
    """Against a filter that this process was born with; empty where there is none."""
    from pisupervisor.launch import userns

    return userns.FILTER if userns.situation().filtered else ""


def of_start(python: str, number: int | None) -> str:
    """Against an interpreter that cannot be executed."""
    return _by_hand(python) if number in (ENOENT, EACCES, ENOEXEC) else of_errno(number)


def of_gone(python: str, preload: list[str]) -> str:
    """Against one that ended and did not say why in our way; what it wrote to stderr is on the application's."""
    ends = f"does one of {', '.join(preload)} end its process? import it in on_start; else " if preload else ""
    filtered = _of_a_filter()
    return f"{ends}{_by_hand(python)}{f'; or {filtered}' if filtered else ''}"


def _by_hand(python: str) -> str:
    return f"try it by hand: {python} -I -S -c pass; or name another: python='/usr/bin/python3'"


def of_end(status: dict[str, Any], profile: object) -> tuple[str, str]:
    """How a child ended before it was ready, and what helps. ``profile``: see ``Security.seccomp``."""
    from pisupervisor.results import signal_name

    code, number = status.get("exited") or (None, None)
    if code is number is None:
        how, told = status.get("gone") or (0, 0)  # of PID 1, which ended before it had a payload
        code, number = (told, None) if how == 1 else (None, told)  # CLD_EXITED
    words = f"exited with code {code}" if number is None else f"was killed by {signal_name(number)}"
    if number == signal.SIGSYS:
        return words, FILTER
    if number == signal.SIGKILL:
        return words, f"was it memory? raise Limits(memory=...); else {LOOK}"
    return words, LOOK if profile in (None, "default", "strict", "permissive") else f"{FILTER}; else {LOOK}"
