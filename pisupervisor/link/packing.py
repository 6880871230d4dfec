"""Arguments and functions on their way to one isolator's children: what those can import decides how they travel."""

from __future__ import annotations

import sys

from pisupervisor.errors import OptionsError, SerializationError
from pisupervisor.options import IsolationOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.launch.templates import Template
    from pisupervisor.modules import Modules


class Packer:
    """``template()`` tells which interpreter the children run on; it raises IsolatorClosed when there will be none."""

    def __init__(
        self, options: IsolationOptions, template: Callable[[], Template], modules: Modules | None = None
    ) -> None:
        self._options, self._template, self._modules = options, template, modules
        self._known_importable: Callable[[str], bool] | None = None

    def arguments(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
        """Raises SerializationError."""
        from pisupervisor.link.arguments import dump_call

        same = self._template().interpreter.version == sys.version_info[:2]
        payload, needs_cloudpickle = dump_call(args, keywords, importable=self._importable(), python_minor_matches=same)
        if needs_cloudpickle:
            self._need_cloudpickle()
        return payload

    def value(self, value: Any) -> bytes:
        """One value, as arguments of which it is the only one."""
        return self.arguments((value,), {})

    def plain_value(self, value: Any) -> bytes:
        """The same without code: what the child can import travels by name, and nothing of the application's by value."""
        from pisupervisor.link.arguments import dump_call

        return dump_call((value,), {}, importable=self._importable(), python_minor_matches=False)[0]

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
        """Raises OptionsError for what is no function, SerializationError for what cannot travel."""
        from pisupervisor.link.arguments import dump_function

        if not callable(function):
            raise OptionsError(f"expected a function, not {function!r}; for a file use invoke_method(path, target)")
        self._need_cloudpickle()
        return dump_function(function, args, keywords, self._importable())

    def _importable(self) -> Callable[[str], bool]:
        """Whether the child can import a module by name; what it cannot travels by value."""
        if self._known_importable is None:
            from pisupervisor.launch.planning import import_paths
            from pisupervisor.link.arguments import child_importable

            known = child_importable(import_paths(self._options, self._template().interpreter))
            modules = self._modules
            self._known_importable = known if modules is None else lambda name: known(name) or modules.has(name)
        return self._known_importable

    def _need_cloudpickle(self) -> None:
        template = self._template()
        if template.cloudpickle is None:
            version = ".".join(map(str, template.interpreter.version))
            raise SerializationError(
                f"functions cannot be sent to Python {version} from {sys.version_info[0]}.{sys.version_info[1]}: their byte"
                " code differs; use invoke_method with a file", direction="to child",
            )  # fmt: skip
        template.warm_cloudpickle()
