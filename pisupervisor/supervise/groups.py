"""The group of a dead child, kept for the next one. On cgroup v1 a group is six directories: 0.85 ms to make and remove
them, of a launch of six; 0.1 to pass them on.

As with the spare child, only a template that others still hold open keeps one, and only one.
"""

from __future__ import annotations

from pisupervisor.launch.templates import Template
from pisupervisor.limits.cgroups import ChildGroup, GroupLimits


def take(template: Template, limits: GroupLimits) -> ChildGroup | None:
    """The one that is free, its attach fds open, if its limits are these."""
    with template.lock:
        if template.free_group is None or template.free_group[0] != limits:
            return None
        (_limits, group), template.free_group = template.free_group, None
    try:
        group.open_attach_fds()
    except OSError:  # somebody else has removed it; or there are no descriptors, which a new one will tell
        group.remove()
        return None
    return group


def keep(template: Template, limits: GroupLimits, group: ChildGroup) -> bool:
    """Whether ``group``, whose child is dead, is kept for another; else it is to be removed."""
    if template.users < 2 or template.closed or (template.free_group and template.free_group[0] == limits):
        return False

    def receive(heir: ChildGroup) -> None:
        surplus: ChildGroup | None = heir
        with template.lock:
            if not template.closed:
                surplus = template.free_group and template.free_group[1]
                template.free_group = limits, heir
        if surplus is not None:
            surplus.remove()

    return group.pass_on(receive)
