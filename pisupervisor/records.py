"""``dataclass`` and ``NamedTuple`` as this library writes them, without the price: the standard library's import inspect,
re, ast and typing and compile each class's methods, together a fifth of the way from an empty process to a first result.

Type checkers see the real ones, and so does whoever asks: ``dataclasses.fields``, ``replace``, ``asdict`` and
``inspect.signature`` find what the real decorator would have left. Only frozen, keyword-only classes are made here.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass, field as field, fields as fields, replace as replace
    from typing import Any, NamedTuple as NamedTuple, Protocol as Protocol
else:
    from collections import namedtuple

    def dataclass(*, frozen: bool, kw_only: bool):
        if not (frozen and kw_only):
            raise TypeError("only frozen, keyword-only classes are made here")
        return _complete

    def field(**options: Any) -> Field:
        return Field(**options)

    def fields(record: Any) -> tuple[Field, ...]:
        return tuple(record._fields.values())

    def replace(record: Any, /, **changes: Any) -> Any:
        return type(record)(**{**record.__dict__, **changes})

    class _NamedTupleMeta(type):
        """Turns the body of ``class Name(NamedTuple)`` into a named tuple with its methods."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, body)
            names = body.get("__annotations__", {})
            base = namedtuple(name, names, defaults=[body.pop(each) for each in names if each in body])
            return type(name, (base,), {**body, "__slots__": ()})

    class NamedTuple(metaclass=_NamedTupleMeta):
        pass

    Protocol = object


class FrozenDict(dict[str, str]):
    """A mapping in a record: not to be changed, and hashed, copied and pickled like the rest of it."""

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be changed")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


_MISSING = object()


class Field:
    """One field: its default, or how to make it."""

    def __init__(self, *, default: Any = _MISSING, default_factory: Any = None, repr: bool = True) -> None:  # noqa: A002
        self.name = ""
        self.default, self.default_factory, self.repr = default, default_factory, repr

    @property
    def required(self) -> bool:
        return self.default is _MISSING and self.default_factory is None

    def standard(self) -> Any:
        """The same for the standard library."""
        import dataclasses

        if self.default_factory is not None:
            return dataclasses.field(default_factory=self.default_factory, repr=self.repr)
        return dataclasses.field(default=dataclasses.MISSING if self.required else self.default, repr=self.repr)


class _Standard:
    """An attribute that the real decorator would have made: made when somebody asks for it."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self.name = name

    def __get__(self, _instance: object, owner: type[_Record]) -> Any:
        import dataclasses
        import inspect

        records = [base for base in owner.__mro__ if "_fields" in vars(base)]
        if not records or (self.name == "__signature__" and records[0] is not owner):
            raise AttributeError(self.name)  # a subclass has a signature of its own
        owner = records[0]
        body = {"__annotations__": owner.__annotations__, "__module__": owner.__module__, "__doc__": owner.__doc__}
        body.update((name, field.standard()) for name, field in owner._fields.items())
        real: Any = dataclasses.dataclass(frozen=True, kw_only=True)(type(owner.__name__, (), body))
        return inspect.signature(real) if self.name == "__signature__" else getattr(real, self.name)


class _Record:
    """The methods that every record gets."""

    _fields: dict[str, Field]
    _defaults: dict[str, Any]
    _required: frozenset[str]
    _made: tuple[tuple[str, Any], ...]
    __dataclass_fields__, __dataclass_params__, __signature__ = _Standard(), _Standard(), _Standard()
    __match_args__ = ()

    def __init__(self, **values: Any) -> None:
        own = self.__dict__
        own.update(self._defaults)  # all of them, so that the order is that of the fields
        own.update(values)
        if len(own) > len(self._defaults) or not self._required <= values.keys():
            self._refuse(values)
        for name, make in self._made:
            if name not in values:
                own[name] = make()
        self.__post_init__()

    def _refuse(self, values: dict[str, Any]) -> None:
        if odd := [name for name in values if name not in self._fields]:
            what = f"got an unexpected keyword argument {odd[0]!r}; {self._meant(odd[0])}"
        else:
            missing = ", ".join(name for name in self._fields if name in self._required and name not in values)
            what = f"missing required keyword-only arguments: {missing}"
        from pisupervisor.errors import WrongKeyword

        raise WrongKeyword(f"{type(self).__name__}.__init__() {what}")

    def _meant(self, odd: str) -> str:
        for name, field in self._fields.items():
            if odd in getattr(field.default_factory, "_fields", ()):
                return f"write {name}={field.default_factory.__name__}({odd}=...)"
        import difflib

        close = [
            name for name in self._fields if name.endswith(f"_{odd}")
        ]  # "timeout" is not nearer to one than another
        close = close or difflib.get_close_matches(odd, self._fields, 1)
        return f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(self._fields)}"

    def __post_init__(self) -> None:
        pass

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name, field in self._fields.items() if field.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __setattr__(self, name: str, _value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __replace__(self, /, **changes: Any) -> Any:
        return type(self)(**{**self.__dict__, **changes})


def _complete(cls: type) -> type:
    """The class with the methods of a record, and with its fields."""
    found = {}
    for name in cls.__annotations__:
        value = cls.__dict__.get(name, _MISSING)
        found[name] = value if isinstance(value, Field) else Field(default=value)
        found[name].name = name
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", *found)}
    body.update((name, field.default) for name, field in found.items() if field.default is not _MISSING)
    body["__qualname__"] = cls.__qualname__
    body["_fields"] = found
    body["_defaults"] = {name: field.default for name, field in found.items()}
    body["_required"] = frozenset(name for name, field in found.items() if field.required)
    body["_made"] = tuple((name, field.default_factory) for name, field in found.items() if field.default_factory)
    return type(cls.__name__, (_Record,), body)
