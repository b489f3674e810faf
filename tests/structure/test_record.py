"""The data classes of kvmigrate.record are like the standard library's, and nothing in the package uses the latter."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from kvmigrate import record

from .sources import package_modules, parse


@record.dataclass(frozen=True, slots=True)
class Ours:
    """Has all that a data class can have here."""

    name: str
    parts: tuple[int, ...] = ()
    notes: list[str] = record.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")

    @property
    def first(self) -> int:
        return self.parts[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    """The same."""

    name: str
    parts: tuple[int, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")


@record.dataclass
class Loose:
    """Can be changed, and has room for more."""

    value: int
    inner: Ours | None = None


def outcome(call: Any) -> Any:
    """What ``call`` returns or raises, in words, by whichever class."""
    try:
        return repr(call()).replace("Theirs", "Ours")
    except Exception as error:
        return type(error), str(error).replace("Theirs", "Ours")


CALLS: dict[str, Callable[[Any], Any]] = {
    "all defaults": lambda kind: kind("a"),
    "by name": lambda kind: kind(parts=(1,), name="a"),
    "no name": lambda kind: kind(),
    "an unknown name": lambda kind: kind("a", other=1),
    "too many": lambda kind: kind("a", (), [], 4),
    "refused by itself": lambda kind: kind(""),
    "change": lambda kind: setattr(kind("a"), "name", "b"),
    "delete": lambda kind: delattr(kind("a"), "name"),
    "no dictionary": lambda kind: vars(kind("a")),
    "equal": lambda kind: kind("a", (1,)) == kind("a", (1,)),
    "not equal": lambda kind: kind("a", (1,)) == kind("a", (2,)),
    "like its tuple": lambda kind: kind("a") == ("a", (), []),
    "a hash of a list": lambda kind: hash(kind("a")),
    "a hash": lambda kind: hash(kind("a", (1,), ())) == hash(kind("a", (1,), ())),
    "not ordered": lambda kind: kind("a") < kind("b"),
    "a default of its own": lambda kind: kind("a").notes is kind("a").notes,
    "matched": lambda kind: kind.__match_args__,
    "copied": lambda kind: copy.deepcopy(kind("a", (1,), ["x"])),
    "pickled": lambda kind: pickle.loads(pickle.dumps(kind("a", (1,), ["x"]))),
    "replaced by them": lambda kind: dataclasses.replace(kind("a", (1,)), name="b"),
    "replaced by a wrong one": lambda kind: dataclasses.replace(kind("a"), name=""),
    "as a dictionary by them": lambda kind: dataclasses.asdict(kind("a", (1,), ["x"])),
    "fields": lambda kind: [(field.name, field.type) for field in dataclasses.fields(kind)],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_record_does_what_the_standard_library_s_does(name: str) -> None:
    call = CALLS[name]
    assert outcome(lambda: call(Ours)) == outcome(lambda: call(Theirs))


def test_replace_and_asdict_are_like_the_standard_library_s() -> None:
    one = Loose(1, Ours("a", (1,), ["x"]))
    assert record.replace(one, value=2) == dataclasses.replace(one, value=2) == Loose(2, one.inner)
    assert record.asdict(one) == dataclasses.asdict(one)
    assert one.inner is not None
    assert record.asdict(one)["inner"]["notes"] is not one.inner.notes
    unknown: dict[str, Any] = {"other": 2}
    with pytest.raises(TypeError):
        record.replace(one, **unknown)


def test_a_record_that_is_not_frozen_can_be_changed_and_has_no_hash() -> None:
    one = Loose(1)
    one.value = 2
    one.other = 3  # type: ignore[attr-defined]
    assert one == Loose(2)
    with pytest.raises(TypeError):
        hash(one)


# The checker of snapshots shares no code with what it checks.
EXCUSED = {"kvmigrate.record", "kvmigrate.snapshot.verify"}


def test_nothing_else_uses_the_module_that_record_stands_for() -> None:
    users = {
        module
        for module, path in package_modules().items()
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.ImportFrom) and node.module == "dataclasses")
        or (isinstance(node, ast.Import) and any(alias.name == "dataclasses" for alias in node.names))
    }
    assert {module.split("_")[0] for module in users} == EXCUSED
