"""The next child, made ready while nobody waits, and taken by the next isolator.

It is asked for when a ``Template`` is made, when an isolator closes, and when a second one opens with none closed between
(the zygote then waits for a moment in which nobody wants anything). Only a template that others still hold open keeps
one, and only one: programs that open isolators again and again get a child that is there already, all others pay nothing.
No thread is needed: the zygote works by itself.
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
    "callback_rate", "callback_bytes", "callback_depth", "types", "zero_copy",
}  # fmt: skip
_OF_THE_LAUNCH = tuple(sorted({f.name for f in fields(IsolationOptions)} - _NOT_OF_THE_LAUNCH))


def opened(template: Template, options: IsolationOptions) -> None:
    """An isolator has its child. Who opens one after the other and closes none shall find the next one ready."""
    again, template.opened_last = template.opened_last, True
    if again and template.users > 1:
        prepare(template, options, when_idle=True)


def closing(template: Template, options: IsolationOptions) -> None:
    """An isolator closes: the next child is launched while the old one dies."""
    template.opened_last = False
    if template.users > 1:
        prepare(template, options)


def prepare(template: Template, options: IsolationOptions, *, when_idle: bool = False) -> None:
    """Ask for a spare child, unless there is one. It is a favour: what goes wrong here goes wrong for nobody.
    There is none where calls are listened to: nobody would answer it.
    """
    if options.debug or template.answers is not None or not template.zygote.alive():
        return
    child = Child(options, template)
    with template.lock:
        present = template.spare
        if present is None:
            template.spare = child
    if isinstance(present, Child):
        if not when_idle and not present.requesting:
            present.hurry()
        return
    try:
        child.request(when_idle=when_idle, deadline=0.0)
        if template.closed:  # by another thread, meanwhile
            child.discard("its template was closed")
    except BaseException as error:
        with template.lock:
            template.spare = None
        if not isinstance(error, (IsolationError, OSError)):
            raise  # by a signal's handler


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
        child.hurry()
        child.complete(deadline)
    except IsolationError:
        return None
    return child
