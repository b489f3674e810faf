"""How far the rounds are, for another thread to read: each look is a consistent view whose fraction never falls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..config import PAGE_BYTES
from ..record import dataclass, field, replace
from .converge import FIXED_MS, Decision
from .ledger import RoundRecord, Totals

UNFINISHED = 0.97
"""The most that a run which has not ended shows: there may always be another round."""


@dataclass(frozen=True, slots=True)
class ProgressView:
    """One look. Bytes, pages, milliseconds and bytes per second as the names say."""

    round: int
    elapsed_ms: float
    total_bytes: int
    """Guest RAM as a whole."""
    remaining_bytes: int
    """Pages that this round still has to look at; grows when a round begins, since the guest goes on writing."""
    transferred_bytes: int
    duplicate_pages: int
    normal_pages: int
    dirty_sync_count: int
    rate_bytes_s: float
    """Sent bytes over the time of all rounds so far."""
    pages_per_second: float
    writes_pages_s: float
    """Pages the guest dirtied per second of the last finished round; 0 before one has finished."""
    expected_downtime_ms: float
    fraction: float
    """0 to 1, done of what is known to do; never falls, and is 1 only after the end."""
    eta_ms: float | None
    """Time for the rest of this round at the rate so far; None while nothing was looked at."""


@dataclass(frozen=True, slots=True)
class _Now:
    """What a view is made of, exchanged as one reference so that a reader never sees half a change."""

    totals: Totals = field(default_factory=Totals)
    looked_at: int = 0
    counter: Callable[[str], int] | None = None
    round: int = 0
    entered_ns: int = 0
    pages_left: int = 0
    sync_count: int = 0
    writes_pages_s: float = 0.0
    expected_ms: float = FIXED_MS


class Progress:
    """Written by the thread that copies, read by any other."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._begin_ns = time.monotonic_ns()
        self._now = _Now()
        self._records: tuple[RoundRecord, ...] = ()
        self._fraction = 0.0
        self._fraction_lock = threading.Lock()

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """The finished rounds."""
        return self._records

    def begin(self, resident_pages: int) -> None:
        """Before round 0, with the pages that it will find."""
        self._begin_ns = time.monotonic_ns()
        self._now = replace(self._now, pages_left=resident_pages, sync_count=1)

    def enter(self, counter: Callable[[str], int], number: int) -> None:
        """A round begins; ``counter`` says how far C has counted, by a counter's name in ``struct kmig_round``."""
        self._now = replace(self._now, counter=counter, round=number, entered_ns=time.monotonic_ns())

    def leave(self, record: RoundRecord) -> None:
        """The round is over: its counters move into the totals."""
        self._records = (*self._records, record)
        self._now = replace(
            self._now,
            counter=None,
            totals=Totals.of(self._records),
            looked_at=self._now.looked_at + record.pages_dirty,
            pages_left=0,
        )

    def decided(self, pages_left: int, decision: Decision) -> None:
        """A sync found ``pages_left``, and this is what was made of it."""
        self._now = replace(
            self._now,
            pages_left=pages_left,
            sync_count=self._now.sync_count + 1,
            writes_pages_s=decision.writes_bytes_s / PAGE_BYTES,
            expected_ms=decision.expected_downtime_ms,
        )

    def finish(self) -> None:
        """Everything is on the other side."""
        self._raise_fraction(1.0)

    def _raise_fraction(self, to: float) -> float:
        with self._fraction_lock:  # two readers may look at once
            self._fraction = max(self._fraction, to)
            return self._fraction

    def view(self) -> ProgressView:
        """How far it is at this moment."""
        now = self._now
        done, zero, sent, nr_bytes, time_ms = _counted(now.counter, now.entered_ns)
        left = max(now.pages_left - done, 0)
        looked_at = now.looked_at + done
        time_s = (now.totals.time_ms + time_ms) / 1e3
        pages_s = looked_at / time_s if time_s else 0.0
        return ProgressView(
            round=now.round,
            elapsed_ms=(time.monotonic_ns() - self._begin_ns) / 1e6,
            total_bytes=self._total_bytes,
            remaining_bytes=left * PAGE_BYTES,
            transferred_bytes=now.totals.bytes_sent + nr_bytes,
            duplicate_pages=now.totals.zero + zero,
            normal_pages=now.totals.normal + sent,
            dirty_sync_count=now.sync_count,
            rate_bytes_s=(now.totals.bytes_sent + nr_bytes) / time_s if time_s else 0.0,
            pages_per_second=pages_s,
            writes_pages_s=now.writes_pages_s,
            expected_downtime_ms=now.expected_ms,
            fraction=self._raise_fraction(looked_at / (looked_at + left) * UNFINISHED if looked_at else 0.0),
            eta_ms=left / pages_s * 1e3 if pages_s else None,
        )


def _counted(counter: Callable[[str], int] | None, entered_ns: int) -> tuple[int, int, int, int, float]:
    """Pages done, zero and sent, bytes sent and the milliseconds of the running round."""
    if counter is None:
        return 0, 0, 0, 0, 0.0
    return (
        counter("pages_done"),
        counter("pages_zero") + counter("pages_cleared"),
        counter("pages_sent"),
        counter("bytes_sent"),
        (time.monotonic_ns() - entered_ns) / 1e6,
    )
