"""What a check says on the wire: CHECK announces a guest's state that is only to be tried, CHECKED what came of it.

The feature ``check`` in HELLO says that CHECK comes after ACCEPT; ``only-check`` that nothing comes after CHECKED: the
guest stays where it is, and the destination waits on for another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from ..errors import BadField, MigrationError
from ..record import asdict, dataclass
from ..state.fidelity import Fidelity, Item, Verdict, show
from ..state.section import Fields, Value, pack, unpack
from .wire import MAX_SECTIONS, MAX_SECTIONS_BYTES, duration_ms, microseconds, one_line

CHECK, ONLY = "check", "only-check"
"""Features of HELLO."""
MAX_ITEMS = 512
MAX_TEXT = 160
"""Of each text of an item: all of them together stay within the limit of a CHECKED frame."""


@dataclass(frozen=True, slots=True)
class Check:
    """So many SECTION frames come next, which take ``sections_bytes`` with their headers; the guest has
    ``resident_bytes`` of memory in use."""

    sections: int
    sections_bytes: int
    resident_bytes: int

    def to_payload(self) -> bytes:
        """The frame's payload."""
        return pack(asdict(self))

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = Fields(unpack(payload, "a CHECK frame"), "CHECK")
        sections = fields.integer("sections", 1, MAX_SECTIONS)
        sections_bytes = fields.integer("sections_bytes", sections * 32, MAX_SECTIONS_BYTES)
        check = cls(sections, sections_bytes, fields.integer("resident_bytes"))
        fields.done()
        return check


@dataclass(frozen=True, slots=True)
class Row:
    """One item of state that is not exact at the destination, as text for a person."""

    item: str
    verdict: Verdict
    saved: str
    read_back: str
    why: str

    @classmethod
    def of(cls, item: Item) -> Self:
        texts = (one_line(text, MAX_TEXT) for text in (item.name, show(item.saved), show(item.read_back), item.why))
        name, saved, read_back, why = texts
        return cls(name, item.verdict, saved, read_back, why)

    def to_value(self) -> list[str]:
        """As :meth:`Fidelity.to_value` has it."""
        return [self.item, self.verdict.value, self.saved, self.read_back, self.why]

    @classmethod
    def from_value(cls, value: Value) -> Self:
        """Decode a hostile row. Raises :class:`BadField`."""
        if type(value) is not list or len(value) != 5 or {*map(type, value)} != {str}:
            raise BadField("CHECKED: field 'items' holds something that is no item")
        if value[1] not in {*Verdict} - {Verdict.EXACT}:
            raise BadField(f"CHECKED: field 'items' has the verdict {one_line(value[1], 40)!r}")
        name, saved, read_back, why = (one_line(value[at], MAX_TEXT) for at in (0, 2, 3, 4))
        return cls(name, Verdict(value[1]), saved, read_back, why)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the destination's host made of the state: how many items have each verdict, and those that are not exact,
    the refused ones first, as far as there is room."""

    counts: dict[str, int]
    rows: tuple[Row, ...]
    build_ms: float
    load_ms: float

    @classmethod
    def of(cls, fidelity: Fidelity, build_ms: float, load_ms: float) -> Self:
        rows = sorted(map(Row.of, fidelity), key=lambda row: row.verdict is not Verdict.REFUSED)
        return cls(fidelity.counts(), tuple(rows[:MAX_ITEMS]), build_ms, load_ms)

    @property
    def fits(self) -> bool:
        """Whether the guest could go on there: nothing was refused."""
        return not self.counts[Verdict.REFUSED]

    def to_payload(self) -> bytes:
        """The frame's payload."""
        value = {
            "counts": self.counts,
            "items": [row.to_value() for row in self.rows],
            "build_us": microseconds(self.build_ms),
            "load_us": microseconds(self.load_ms),
        }
        return pack(value)

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = Fields(unpack(payload, "a CHECKED frame"), "CHECKED")
        counting = Fields(fields.mapping("counts"), "CHECKED: counts")
        counts = {verdict.value: counting.integer(verdict.value, 0, 1 << 32) for verdict in Verdict}
        counting.done()
        rows = tuple(Row.from_value(row) for row in fields.sequence("items", MAX_ITEMS))
        checked = cls(counts, rows, duration_ms(fields, "build_us"), duration_ms(fields, "load_us"))
        fields.done()
        if any(_count(rows, verdict) > counts[verdict] for verdict in Verdict):
            raise BadField("CHECKED: field 'items' has more items of a verdict than 'counts' says")
        return checked

    def require(self, peer: str) -> None:
        """Raise :class:`MigrationError`, which names what is refused, unless the guest could go on at ``peer``."""
        if self.fits:
            return
        refused = [row for row in self.rows if row.verdict is Verdict.REFUSED]
        told = "; ".join(_sentence(row) for row in refused[:3]) or "it does not say what"
        more = self.counts[Verdict.REFUSED] - len(refused[:3])
        rest = f"; and {more} more items, which kvmigrate check lists" if more > 0 else ""
        raise MigrationError(f"{peer} cannot take the guest over, which runs on here: {told}{rest}")


def _count(rows: Iterable[Row], verdict: Verdict) -> int:
    return sum(row.verdict is verdict for row in rows)


def _sentence(row: Row) -> str:
    values = "" if (row.saved, row.read_back) == ("None", "None") else f" is {row.saved}, there {row.read_back}"
    return f"{row.item}{values}" + (f" ({row.why})" if row.why else "")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The answer, and the longest pause of the guest for the question."""

    checked: Checked
    pause_ms: float
    total_ms: float

    def to_value(self) -> dict[str, Value]:
        """As a map for JSON; times in milliseconds."""
        return {
            "fits": self.checked.fits,
            "counts": self.checked.counts,
            "items": [row.to_value() for row in self.checked.rows],
            "pause-time": round(self.pause_ms, 3),
            "build-time": round(self.checked.build_ms, 3),
            "load-time": round(self.checked.load_ms, 3),
            "total-time": round(self.total_ms, 3),
        }
