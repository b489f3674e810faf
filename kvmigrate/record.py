"""The standard library's data classes, for a tenth of their start-up time.

``dataclasses`` compiles eight functions for every class while its module is imported, which takes a millisecond on a
slow machine, and loads ``inspect``: together a quarter of what a restore took until its guest ran. Here all classes
have their methods in common but ``__init__``. There is as much of it as kvmigrate uses. Type checkers see the standard
library's own, whose functions work with these classes, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import attrgetter
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any


class _Factory:
    """A default that is made anew for each object."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def _field(*, default_factory: Callable[[], Any]) -> Any:
    return _Factory(default_factory)


def _dataclass(plain: Any = None, /, *, frozen: bool = False, slots: bool = False) -> Any:
    if plain is None:
        return lambda plain: _dataclass(plain, frozen=frozen, slots=slots)
    body = {name: value for name, value in vars(plain).items() if name not in ("__dict__", "__weakref__")}
    names = tuple(plain.__annotations__)
    defaults = {name: body.pop(name) for name in names if name in body}
    own = {
        "__slots__": names if slots else (*names, "__dict__", "__weakref__"),
        "__match_args__": names,
        "__dataclass_fields__": _Fields(),
        "_key": attrgetter(*names),
    }
    # Made anew, since slots can be added to no class that exists.
    made = type(plain)(plain.__name__, plain.__bases__, _METHODS | (_FROZEN if frozen else {}) | own | body)
    made.__init__ = _init_of(made, defaults)
    return made


def _init_of(made: Any, defaults: dict[str, Any]) -> Any:
    names = made.__match_args__
    # By the slots' own setters: all else of a frozen object refuses.
    scope = {f"set{i}": getattr(made, name).__set__ for i, name in enumerate(names)} | {"_Factory": _Factory}
    factories = tuple(isinstance(defaults.get(name), _Factory) for name in names)
    code = _init_code(factories, hasattr(made, "__post_init__")).replace(
        co_varnames=("self", *names), co_qualname=f"{made.__qualname__}.__init__"
    )
    return FunctionType(code, scope, "__init__", tuple(defaults.values()))


@cache
def _init_code(factories: tuple[bool, ...], post_init: bool) -> CodeType:
    """The code of ``__init__`` for fields v0, v1 and so on: classes of one shape differ by names alone."""
    lines = []
    for i, factory in enumerate(factories):
        if factory:
            lines.append(f"if type(v{i}) is _Factory: v{i} = v{i}.make()")
        lines.append(f"set{i}(self, v{i})")
    if post_init:
        lines.append("self.__post_init__()")
    parameters = ", ".join(f"v{i}" for i in range(len(factories)))
    scope: dict[str, Any] = {}
    exec(f"def __init__(self, {parameters}):\n " + "\n ".join(lines), scope)
    code: CodeType = scope["__init__"].__code__
    return code


def _eq(self: Any, other: Any) -> Any:
    return self._key(self) == self._key(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(self._key(self))


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in _values(self).items())})"


def _refuse_to(change: str) -> Callable[..., None]:
    def refuse(self: object, name: str, *_: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot {change} field {name!r}")

    return refuse


def _reduce(self: Any) -> tuple[Any, ...]:
    return type(self), tuple(_values(self).values())


class _Fields:
    """What makes a class a data class to the standard library's functions: what it would have given it itself."""

    def __get__(self, record: object, made: Any) -> Any:
        from dataclasses import make_dataclass

        types = [(name, made.__annotations__[name]) for name in made.__match_args__]
        return vars(make_dataclass(made.__name__, types))["__dataclass_fields__"]


_METHODS: dict[str, Any] = {"__eq__": _eq, "__hash__": None, "__repr__": _repr}
_FROZEN: dict[str, Any] = {
    "__hash__": _hash,
    "__setattr__": _refuse_to("assign to"),
    "__delattr__": _refuse_to("delete"),
    "__reduce__": _reduce,
}


_PLAIN = frozenset({bool, bytes, float, int, str, type(None)})
"""Most of what there is, and no record."""


def _values(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__match_args__}


def _replace(record: Any, /, **changes: Any) -> Any:
    return type(record)(**_values(record) | changes)


def _asdict(value: Any) -> Any:
    """``value``, of which every record is a dictionary; lists, tuples and dictionaries are copied on the way."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        return type(value)(map(_asdict, value))
    if isinstance(value, dict):
        return {key: _asdict(item) for key, item in value.items()}
    return _asdict(_values(value)) if isinstance(vars(type(value)).get("__dataclass_fields__"), _Fields) else value


if TYPE_CHECKING:
    from dataclasses import asdict as asdict
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:
    dataclass, field, replace, asdict = _dataclass, _field, _replace, _asdict
