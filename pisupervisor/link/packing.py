"""Arguments and functions on their way to one isolator's children: what those can import decides how they travel."""

from __future__ import annotations

import _pickle as pickle  # the C part alone: pickle imports re, 4 ms in all
import sys

from pihost import wire
from pisupervisor.errors import OptionsError, SerializationError
from pisupervisor.options import IsolationOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.launch.templates import Template
    from pisupervisor.link.calls import Payload
    from pisupervisor.modules import Modules


PLAIN = frozenset((int, float, bool, str, type(None), complex))  # of which every pickle is safe to make and to load


class Packer:
    """``owner`` is the isolator's id. ``template()`` tells which interpreter the children run on; it raises IsolatorClosed
    when there will be none.
    """

    def __init__(
        self,
        options: IsolationOptions,
        template: Callable[[], Template],
        modules: Modules | None = None,
        owner: int = 0,
    ) -> None:
        self._options, self._template, self._modules, self._owner = options, template, modules, owner
        self._known_importable: Callable[[str], bool] | None = None
        self._new: Callable[[], Any] | None = None

    def arguments(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes | Payload:
        """Raises SerializationError."""
        if PLAIN.issuperset(map(type, args)) and (not keywords or PLAIN.issuperset(map(type, keywords.values()))):
            plain = pickle.dumps((args, keywords), 5)
            if len(plain) < wire.BIG:
                return plain
        payload: bytes | Payload = self._arguments(self._attachments(), args, keywords).payload()
        return payload

    def _arguments(self, new: Callable[[], Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        from pisupervisor.link.arguments import write_call

        same = self._template().interpreter.version == sys.version_info[:2]
        written, needs_cloudpickle = write_call(new, args, keywords, self._importable(), same)
        if needs_cloudpickle:
            self._need_cloudpickle()
        return written

    def value(self, value: Any) -> bytes | Payload:
        """One value, as arguments of which it is the only one."""
        return self.arguments((value,), {})

    def plain_value(self, value: Any) -> bytes | Payload:
        """The same without code: what the child can import travels by name, and nothing of the application's by value."""
        from pisupervisor.link.arguments import write_call
        from pisupervisor.link.attachments import check_count

        written, _needs_nothing = write_call(self._attachments(), (value,), {}, self._importable(), False)
        payload: bytes | Payload = written.payload()
        if not isinstance(payload, bytes):
            check_count(len(payload.files) + len(payload.shared))
        return payload

    def function(
        self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> bytes | Payload:
        """Raises OptionsError for what is no function, SerializationError for what cannot travel."""
        from pisupervisor.link.arguments import write_function

        check_function(function)
        self._need_cloudpickle()
        written = write_function(self._attachments(), function, args, keywords, self._importable())
        payload: bytes | Payload = written.payload()
        return payload

    def plain_arguments(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
        """Arguments as bytes, whatever is in them: for what every new child gets, whichever that is."""
        from pisupervisor.link.arguments import InBand

        payload: bytes = self._arguments(InBand, args, keywords).payload()
        return payload

    def plain_function(self, function: Callable[..., Any]) -> bytes:
        """A function without arguments likewise."""
        from pisupervisor.link.arguments import dump_function

        self._need_cloudpickle()
        return dump_function(function, (), {}, self._importable())

    def _importable(self) -> Callable[[str], bool]:
        """Whether the child can import a module by name; what it cannot travels by value."""
        if self._known_importable is None:
            from pisupervisor.launch.root import import_paths
            from pisupervisor.link.arguments import child_importable

            known = child_importable(import_paths(self._options, self._template().interpreter))
            modules = self._modules
            self._known_importable = known if modules is None else lambda name: known(name) or modules.has(name)
        return self._known_importable

    def _attachments(self) -> Callable[[], Any]:
        """Makes what takes the parts that do not travel in a pickle."""
        if self._new is None:
            from functools import partial

            from pisupervisor.link.attachments import Attachments

            arrow = "arrow" in self._options.types and self._importable()("pyarrow")
            self._new = partial(Attachments, self._owner, self._options.network == "host", arrow)
        return self._new

    def _need_cloudpickle(self) -> None:
        template = self._template()
        if template.cloudpickle is None:
            version = ".".join(map(str, template.interpreter.version))
            raise SerializationError(
                f"functions cannot be sent to Python {version} from {sys.version_info[0]}.{sys.version_info[1]}: their byte"
                " code differs; use invoke_method with a file", direction="to child",
            )  # fmt: skip
        template.warm_cloudpickle()


def check_function(function: Any) -> None:
    """Raises OptionsError for what is none."""
    if not callable(function):
        raise OptionsError(f"expected a function, not {function!r}; for a file use invoke_method(path, target)")
