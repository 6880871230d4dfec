"""Handles to what lives in a child: objects, and methods of classes."""

from __future__ import annotations

import os
from typing import Any

from pisupervisor.checks import merged
from pisupervisor.errors import ObjectReleased, OptionsError
from pisupervisor.supervise.call import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pisupervisor.isolator import ProcessIsolator
    from pisupervisor.link.calls import StreamTypes
    from pisupervisor.link.connection import Connection
    from pisupervisor.link.sources import Code


_OWN = frozenset(("_isolator", "_connection", "_number", "_owner", "_handle"))


def check_call(method: Any, isolator: Any, handles: tuple[type, ...]) -> None:
    """Raises OptionsError for what is no call into a child: it would run here, with all that the application may do."""
    owner = getattr(method, "__self__", method)
    if owner is not isolator and not isinstance(owner, handles) and getattr(owner, "isolator", None) is not isolator:
        raise OptionsError(
            f"submit_call: expected one of the isolator's calls or a handle, not {method!r:.200}, which would run in this "
            "process; submit() runs a function in the child"
        )


class BoundMethod:
    """A method of an object in the child, as something to call here; sent there, it is the method itself."""

    def __init__(self, obj: Any, name: str) -> None:
        self._object = obj
        self.__name__ = self.__qualname__ = name

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        return self._object.invoke(self.__name__, *args, **keywords)

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self._object, self.__name__)

    def __repr__(self) -> str:
        return f"<method {self.__name__!r} of {self._object!r}>"


class Handle:
    """Of an object in a child, whose methods are called by ``invoke``; whatever else it is asked for is one of them."""

    def find_method(self, name: str) -> BoundMethod:
        """A method of this object as something to call."""
        return BoundMethod(self, name)

    def __getattr__(self, name: str) -> BoundMethod:
        # What Python, and tools such as IPython (``_repr_html_``), look for on any object.
        if name.startswith("__") or (name.startswith("_") and name.endswith("_")):
            raise AttributeError(f"{name!r}: call what is special with invoke({name!r}, ...)")
        return self.find_method(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:  # meant for the object, it would be seen here alone, and nobody would say so
            raise AttributeError(
                f"{name!r} of an object in the child: set it there, isolator.invoke(setattr, obj, {name!r}, ...)"
            )
        object.__setattr__(self, name, value)


class IsolatedObject(Handle):
    """An object in the child. ``obj.add(2)`` or ``obj.invoke("add", 2)`` call its methods; special ones (``__len__``), and
    those whose names this class has itself, only the second way. It can be an argument of calls into its child.

    It ends with ``release()``, as a context manager, when it is forgotten, and with its child.
    """

    def __init__(self, isolator: ProcessIsolator, connection: Connection, number: int) -> None:
        self._isolator, self._connection = isolator, connection
        self._number: int | None = number
        self._owner = os.getpid()

    def invoke(
        self, name: str, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False,  # noqa: ARG002
        kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call the method ``name``, private ones too. Raises what ``invoke_method`` raises, and ObjectReleased.
        ``idempotent`` changes nothing here: an object ends with its child, and no call on it can be repeated.
        """
        if not isinstance(name, str):
            raise OptionsError(f"expected the name of a method, not {name!r}"[:300])
        number = self._live()
        if kwargs is not None:
            keywords = merged(keywords, kwargs)
        arguments = self._isolator._packer.arguments(args, keywords)
        return self._isolator._invoke(
            ("on object", number, name, arguments), None, None, timeout, returns, only_on=self._connection
        )

    def release(self) -> None:
        """Let go of the object in the child. Idempotent."""
        number, self._number = self._number, None
        if number is not None and os.getpid() == self._owner:
            self._connection.streams.discard(number)
            self._connection.released.append(number)  # told with the next call: nothing is sent from a collector

    def _live(self) -> int:
        if self._number is None:
            raise ObjectReleased("the object was released")
        if self._connection is not self._isolator._keeper.connection:
            self._isolator._keeper.check_open()
            raise ObjectReleased("the child in which the object lived has ended")
        return self._number

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        from pihost.inside.objects import find  # by name: the child has the other end

        return find, (self._live(),)

    def __copy__(self) -> IsolatedObject:
        raise TypeError("a handle cannot be copied: it stands for one object in the child")

    def __deepcopy__(self, _memo: object) -> IsolatedObject:
        return self.__copy__()

    def __enter__(self) -> IsolatedObject:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def __del__(self) -> None:
        if "_number" in self.__dict__:
            self.release()

    def __repr__(self) -> str:
        return (
            f"<IsolatedObject {'released' if self._number is None else self._number} of isolator {self._isolator.id}>"
        )


def _is_step(value: Any) -> bool:
    """[whether the generator is over, the item or what it returned]"""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], bool)


class IsolatedStream:
    """The items of a generator in the child (an async one too), fetched one by one: it runs only as far as it is asked to.

    An iterator and a context manager. ``timeout`` is for each item; ``value`` is what the generator returned at its end.
    An item that is not what ``returns=`` says is a SerializationError; the next one may be.
    """

    def __init__(
        self, isolator: ProcessIsolator, connection: Connection, number: int, timeout: float | None, types: StreamTypes
    ) -> None:
        self._object = IsolatedObject(isolator, connection, number)
        self._head = isolator._pack_head("next", False, number)
        self._timeout, self._types = timeout, types
        self.value: Any = None

    def __iter__(self) -> IsolatedStream:
        return self

    def __next__(self) -> Any:
        if self._object._number is None:
            raise StopIteration
        try:
            step = self.ask(timeout=self._timeout)
        except BaseException:
            self.close()  # a generator that has raised is over
            raise
        return self.take(step)

    def ask(self, *, timeout: float | None) -> Any:
        """One step of the generator: whether it is over, and the item or what it returned."""
        isolator, number, where = self._object._isolator, self._object._live(), self._object._connection
        done = isolator._session.call_plain(
            ("next", number), self._head, b"", timeout=timeout, only_on=where, check=_is_step, streams=False
        )
        return done.value if type(done) is Outcome else done

    def take(self, step: list[Any]) -> Any:
        """The item. Raises StopIteration where there are no more."""
        over, item = step
        if over is True:
            self.close()
            self.value = _built(item, self._types.value)
            raise StopIteration
        return _built(item, self._types.item)

    def close(self) -> None:
        """Let go of the generator, which ends it. Idempotent. Nothing is sent for that: what its ``finally`` does comes right
        before the next call, in the time of that one; ``isolator.object_count()`` is such a call, which waits for it.
        """
        self._object.release()

    def __enter__(self) -> IsolatedStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _built(value: Any, returns: Any) -> Any:
    if returns is None:
        return value
    from pisupervisor.link.returns import build

    return build(value, returns)


class IsolatedMethod:
    """A function or method of code in the child: call it, or ``invoke`` it on objects of its class."""

    def __init__(self, isolator: ProcessIsolator, code: Code, path: Any, target: str) -> None:
        self._isolator, self._code, self._path, self._target = isolator, code, path, target
        self._head = isolator._pack_head("method", False, code.key, target)

    def __call__(
        self, /, *args: Any, timeout: float | None = None, returns: Any = None, idempotent: bool = False,
        kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """As ``isolator.invoke_method(path, target, ...)``."""
        isolator, code = self._isolator, self._code
        if kwargs is not None:  # asked here, and not there: a call less on the way of the commonest
            keywords = merged(keywords, kwargs)
        arguments = isolator._packer.arguments(args, keywords)
        call = ("method", code.key, self._target, arguments)
        if returns is None:
            done = isolator._session.call_plain(call, self._head, arguments, code, timeout, idempotent)
            return isolator._result(done, timeout) if type(done) is Outcome else done
        return isolator._invoke(call, self._head, code, timeout, returns, idempotent)

    def invoke(
        self, obj: IsolatedObject, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False,  # noqa: ARG002
        kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call it with an object of the child as its first argument; see ``IsolatedObject.invoke``."""
        if not isinstance(obj, IsolatedObject):
            raise OptionsError(f"expected an IsolatedObject, not {obj!r}; call the method itself for anything else")
        isolator = self._isolator
        if obj._isolator is not isolator:
            raise OptionsError(f"{obj!r} lives in the child of another isolator than {self!r}")
        code = self._code
        arguments = isolator._packer.arguments(args, merged(keywords, kwargs))
        call = ("apply", code.key, self._target, obj._live(), arguments)
        return isolator._invoke(call, None, code, timeout, returns, only_on=obj._connection)

    def __reduce__(self) -> Any:
        text = f"{self._path}:{self._target}"
        raise TypeError(f"a handle is called here, by itself or by submit_call; map and execute take the text {text!r}")

    def __repr__(self) -> str:
        return f"<IsolatedMethod {self._path}:{self._target} of isolator {self._isolator.id}>"
