"""The next child, made ready while nobody waits: its launch is asked for when an isolator closes, taken by the next one.

Only a template that others still hold open keeps one, and only one: programs that open an isolator for each request
get a child that is there already, all others pay nothing. No thread is needed: the zygote works by itself.
"""

from __future__ import annotations

from pisupervisor.errors import IsolationError
from pisupervisor.launch.templates import Template
from pisupervisor.options import IsolationOptions
from pisupervisor.records import fields
from pisupervisor.supervise.child import Child

#: what makes no difference to a launch may differ between the one who asked and the one who takes
_NOT_OF_THE_LAUNCH = {
    "call_timeout", "start_timeout", "restart", "idle_timeout", "max_calls", "die_on_crash", "on_start",
    "callback_rate", "callback_bytes", "callback_depth", "types",
}  # fmt: skip
_OF_THE_LAUNCH = tuple(sorted({f.name for f in fields(IsolationOptions)} - _NOT_OF_THE_LAUNCH))


def prepare(template: Template, options: IsolationOptions) -> None:
    """Ask for a spare child, unless there is one. It is a favour: what goes wrong here goes wrong for nobody."""
    if options.debug or not template.zygote.alive():
        return
    child = Child(options, template)
    with template.lock:
        if template.spare is not None:
            return
        template.spare = child
    try:
        child.request()
    except (IsolationError, OSError):
        with template.lock:
            template.spare = None


def take(template: Template, options: IsolationOptions, deadline: float | None) -> Child | None:
    """The spare child, complete and read back, if there is one for equal options. A dead one is cleared away."""
    with template.lock:
        child = template.spare
        if not isinstance(child, Child) or child.requesting:
            return None
        template.spare = None
    if any(getattr(child.options, name) != getattr(options, name) for name in _OF_THE_LAUNCH):
        child.discard("other options were wanted")
        return None
    if not template.zygote.alive():
        child.discard("its zygote is gone")
        return None
    try:
        child.complete(deadline)
    except IsolationError:
        return None
    return child
