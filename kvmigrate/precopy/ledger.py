"""What each round and the blackout did: plain numbers, put down once and never changed."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PAGE_BYTES
from ..record import asdict, dataclass
from ..state.section import Value


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One finished round. ``round`` 0 takes every resident page; the ``last`` one ran while the guest was paused."""

    round: int
    pages_dirty: int
    """Pages that the round had to look at: resident ones in round 0, later those written since the sync before."""
    pages_zero: int
    """Of these, all zero and not sent because the other side holds zeros there already."""
    pages_cleared: int
    """Of these, all zero now but not when sent before: announced without data."""
    pages_sent: int
    bytes_sent: int
    """Everything that left for this round, frame headers included."""
    time_ms: float
    busy_ms: float
    """The part of ``time_ms`` that was spent in the socket or the file, pacing sleeps not counted."""
    work_ms: float
    """The part that was spent on the pages themselves: zero test, hashing, compression. 0 where a bandwidth cap's
    sleeps cannot be told from it."""
    last: bool = False
    pages_delta: int = 0
    """Of ``pages_sent``, those that went as what had changed in them."""
    codec: str = ""
    """How most of its pages went: ``none``, ``zstd:LEVEL``, …; empty where there is no choice."""
    codec_why: str = ""
    """Why so, and which pages went another way."""
    connections: int = 1
    """Over how many it went; the times are then averages over them."""

    @property
    def rate_bytes_s(self) -> float:
        """``bytes_sent`` over the whole of ``time_ms``."""
        return self.bytes_sent / (self.time_ms / 1e3) if self.time_ms else 0.0

    def to_value(self) -> dict[str, Value]:
        """For JSON, under QEMU's kind of names; times in milliseconds, the rate in bytes per second."""
        return {
            "round": self.round,
            "pages-dirty": self.pages_dirty,
            "pages-zero": self.pages_zero,
            "pages-cleared": self.pages_cleared,
            "pages-sent": self.pages_sent,
            "pages-delta": self.pages_delta,
            "bytes": self.bytes_sent,
            "time": round(self.time_ms, 3),
            "busy-time": round(self.busy_ms, 3),
            "rate": round(self.rate_bytes_s),
            "last": self.last,
            "compression": self.codec,
            "compression-why": self.codec_why,
            "connections": self.connections,
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums over finished rounds. Bytes of the pages themselves are ``normal`` × 4096."""

    rounds: int = 0
    zero: int = 0
    normal: int = 0
    bytes_sent: int = 0
    time_ms: float = 0.0
    busy_ms: float = 0.0

    @classmethod
    def of(cls, records: Sequence[RoundRecord]) -> Totals:
        """The sums over ``records``."""
        return cls(
            rounds=len(records),
            zero=sum(r.pages_zero + r.pages_cleared for r in records),
            normal=sum(r.pages_sent for r in records),
            bytes_sent=sum(r.bytes_sent for r in records),
            time_ms=sum(r.time_ms for r in records),
            busy_ms=sum(r.busy_ms for r in records),
        )

    @property
    def normal_bytes(self) -> int:
        return self.normal * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Downtime:
    """The blackout in its parts, each in milliseconds on the clock of the side that did it.

    Source: ``stop`` (every vCPU parked), ``state`` (saved, packed and handed to the socket), ``last_pages`` (last sync
    and last round), ``send`` (what the source's clock saw that no other part explains: frames on their way, both
    one-way trips).
    Destination: ``load`` (sections set and read back, as far as it was not hidden behind the last pages), ``resume``.
    """

    stop: float = 0.0
    last_pages: float = 0.0
    state: float = 0.0
    send: float = 0.0
    load: float = 0.0
    resume: float = 0.0

    @property
    def total(self) -> float:
        return self.stop + self.last_pages + self.state + self.send + self.load + self.resume

    def to_value(self) -> dict[str, Value]:
        return {name.replace("_", "-"): round(ms, 3) for name, ms in asdict(self).items()}
