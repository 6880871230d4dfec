"""Options as they are chosen, and a zygote that is kept for them."""

from __future__ import annotations

import os
import sys

from pisupervisor.errors import OptionsError
from pisupervisor.launch import templates
from pisupervisor.options import IsolationOptions
from pisupervisor.records import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.isolator import ProcessIsolator

_defaults: dict[str | None, IsolationOptions] = {}


class Template:
    """Keeps the zygote for ``options`` warm while it is open, whether or not an isolator is, and a child of it ready.

    Without one, the zygote lives from the first isolator with equal options to the last; a program that creates and
    closes isolators one after another pays its start (about 30 ms) each time. A template lets go by ``close()``, as a
    context manager, and when it is forgotten.
    """

    _template: templates.Template | None = None

    def __init__(self, options: IsolationOptions | None = None, **changes: Any) -> None:
        self.options = chosen(options, changes)
        template = self._template = templates.acquire(self.options)
        from pisupervisor.supervise import spare

        spare.prepare(template, self.options)

    def create(self) -> ProcessIsolator:
        """A new isolator from this template."""
        from pisupervisor.isolator import ProcessIsolator

        return ProcessIsolator.create(self.options)

    def close(self) -> None:
        """Let go; the zygote ends with its last user. Idempotent."""
        template, self._template = self._template, None
        if template is not None:
            templates.release(template)

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        template = self._template
        if template is not None and template.zygote.owner == os.getpid() and not sys.is_finalizing():
            self.close()  # the last net, as of an isolator


def chosen(options: IsolationOptions | None, changes: dict[str, Any]) -> IsolationOptions:
    """``options``, or the default ones, with single ones replaced. Raises OptionsError."""
    if options is not None and not isinstance(options, IsolationOptions):
        raise OptionsError(f"options: expected IsolationOptions(...), not {options!r}"[:300])
    if options is None:
        return IsolationOptions(**changes) if changes else _default_options(os.environ.get("PISUPERVISOR_LOG_LEVEL"))
    return replace(options, **changes) if changes else options


def _default_options(log_level: str | None) -> IsolationOptions:
    """Frozen, like all of them: checked once (0.1 ms) for what the environment says."""
    if log_level not in _defaults:
        _defaults[log_level] = IsolationOptions()
    return _defaults[log_level]
