"""What a restore made of every item of state: the evidence that a return code alone cannot give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum

from ..errors import RestoreRefused
from ..record import dataclass
from .section import Value


class Verdict(StrEnum):
    """What became of one item."""

    EXACT = "exact"
    ADJUSTED = "adjusted"
    """Read back different from what was set, in a way that is known, named and harmless."""
    DROPPED = "dropped"
    """Not set, for a reason that is named: this host has no such item and the guest cannot tell."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Item:
    """One restored item: its dotted name (``vcpu0.sregs.cr0``), the saved value, the value read back, and why."""

    name: str
    verdict: Verdict
    saved: Value
    read_back: Value
    why: str = ""


class Fidelity:
    """The table of all items of one restore. Exact items are kept by name only, since they carry no news."""

    def __init__(self) -> None:
        self._exact: list[str] = []
        self._groups: list[tuple[str, Collection[str]]] = []
        self._other: list[Item] = []

    def exact(self, name: str) -> None:
        self._exact.append(name)

    def all_exact(self, where: str, names: Collection[str]) -> None:
        """The items ``names`` of ``where``: their whole names are made when somebody asks for them, since a vCPU has
        two hundred and a guest waits."""
        self._groups.append((where, names))

    def adjusted(self, name: str, saved: Value, read_back: Value, why: str) -> None:
        self._other.append(Item(name, Verdict.ADJUSTED, saved, read_back, why))

    def dropped(self, name: str, saved: Value, why: str) -> None:
        self._other.append(Item(name, Verdict.DROPPED, saved, None, why))

    def refused(self, name: str, saved: Value, read_back: Value, why: str) -> None:
        self._other.append(Item(name, Verdict.REFUSED, saved, read_back, why))

    def compare(self, name: str, saved: Value, read_back: Value) -> None:
        """Exact when both are equal, refused otherwise; maps are compared key by key."""
        if isinstance(saved, dict) and isinstance(read_back, dict):
            for key in sorted(saved.keys() | read_back.keys()):
                self.compare(f"{name}.{key}", saved.get(key), read_back.get(key))
        elif saved == read_back:
            self.exact(name)
        else:
            self.refused(name, saved, read_back, "the host took the value and holds another")

    def merge(self, other: Fidelity) -> None:
        self._exact += other._exact
        self._groups += other._groups
        self._other += other._other

    def __iter__(self) -> Iterator[Item]:
        """The items that are not exact, in the order in which they were restored."""
        return iter(self._other)

    def counts(self) -> dict[str, int]:
        """How many items have each verdict, all four keys always there."""
        found = Counter(item.verdict for item in self._other)
        nr_exact = len(self._exact) + sum(len(names) for _, names in self._groups)
        return {Verdict.EXACT.value: nr_exact} | {
            verdict.value: found[verdict] for verdict in Verdict if verdict is not Verdict.EXACT
        }

    def exact_names(self) -> list[str]:
        return [*self._exact, *(f"{where}.{name}" for where, names in self._groups for name in names)]

    def require(self) -> None:
        """Raise :class:`RestoreRefused` for the first refused item: nothing may run then."""
        for item in self._other:
            if item.verdict is Verdict.REFUSED:
                raise RestoreRefused(item.name, show(item.saved), show(item.read_back), item.why)

    def to_value(self) -> Value:
        """As a value for msgpack and JSON: ``{"counts": …, "items": [[name, verdict, saved, read_back, why], …]}``."""
        items = [[i.name, i.verdict.value, show(i.saved), show(i.read_back), i.why] for i in self._other]
        return {"counts": self.counts(), "items": items}


def item_names(body: Mapping[str, Value]) -> list[str]:
    """What :meth:`Fidelity.compare` calls the items of a map, in its order: those of a map inside have its name too."""
    names: list[str] = []
    for key in sorted(body):
        value = body[key]
        names += [f"{key}.{name}" for name in item_names(value)] if isinstance(value, dict) else [key]
    return names


def show(value: Value) -> str:
    """``value`` as short text for a person: integers in hexadecimal, long bytes cut."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, bytes):
        return value[:16].hex() + (f"… ({len(value)} bytes)" if len(value) > 16 else "")
    return str(value)


def first_difference(saved: bytes, read_back: bytes) -> int:
    """The offset of the first byte that differs, or the shorter length."""
    pairs: Iterable[tuple[int, int]] = zip(saved, read_back, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(saved), len(read_back)))
