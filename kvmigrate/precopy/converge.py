"""When to stop the guest: a pure function over the numbers of the rounds so far.

How each number comes about (all measured but one, which is named so)::

    bandwidth      bytes sent / time busy in the socket, over the newest rounds that together sent 16 MiB (all when
                   fewer); never above the cap. Scanning and pacing do not count: a busy CPU is no slow link.
    page_bytes     bytes sent / pages sent as data of those rounds, at most a page and its share of a frame: compression
                   makes it less. A page that is left is taken for data, though it may turn out zero. With nothing
                   sent yet: a whole page.
    work           time outside the socket per page of those rounds (hashing, compression)
    pages_ms       pages left × (page_bytes / bandwidth + work)
    expected       pages_ms + FIXED_MS: what a stop costs when nothing is left. FIXED_MS is the one assumed number.
    writes         pages left × 4096 / time of the round in which they were written
    shrink         pages_ms / time of the last round: what the next round leaves is to what is left now as the time in
                   which the guest can write it is to the time it had for this

The rule. SWITCH when what is left takes under TINY_MS to send, or when two rounds in a row would no longer have
shrunk it below SHRINK of itself (the knee: a further round costs time and wins nothing) and the expected downtime is
within the limit. CONTINUE else, until ``max_rounds``: then SWITCH if the limit allows it, or GIVE_UP.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ..config import PAGE_BYTES
from ..record import dataclass
from .ledger import RoundRecord

TINY_MS = 1.0
SHRINK = 0.75
GROWTH = 1.05
FIXED_MS = 3.0
"""Assumed cost of a stop with no page left: park, save, two one-way trips, load, resume."""
ASSUMED_BANDWIDTH = 125_000_000
"""Bytes per second taken for a link over which nothing was sent yet: 1 Gbit/s."""
SAMPLE_BYTES = 16 << 20
MAX_PAGE_BYTES = PAGE_BYTES + 16


class Action(Enum):
    """What a decision asks for."""

    CONTINUE = "continue"
    SWITCH = "switch"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows: times in milliseconds, the cap in bytes per second (0: none)."""

    downtime_limit_ms: float
    max_rounds: int
    bandwidth_bytes_s: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """What is known after a sync: the finished rounds, oldest first and at least one, and the pages pending now."""

    rounds: Sequence[RoundRecord]
    pages_left: int
    limits: Limits
    knees: int = 0
    """How many decisions in a row before this one saw that a further round would not shrink what is left."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next and why, in words with numbers. Rates in bytes per second."""

    action: Action
    why: str
    expected_downtime_ms: float
    bandwidth_bytes_s: float
    writes_bytes_s: float
    knees: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The numbers of the module's docstring."""

    bandwidth: float
    pages_ms: float
    writes: float
    shrink: float

    @property
    def expected_ms(self) -> float:
        return self.pages_ms + FIXED_MS


def sample(rounds: Sequence[RoundRecord]) -> Sequence[RoundRecord]:
    """The newest rounds that together sent ``SAMPLE_BYTES``, or all."""
    sent = 0
    for at in range(len(rounds) - 1, -1, -1):
        sent += rounds[at].bytes_sent
        if sent >= SAMPLE_BYTES:
            return rounds[at:]
    return rounds


def measured_bandwidth(rounds: Sequence[RoundRecord], cap_bytes_s: int) -> float:
    """Bytes per second, as the module's docstring says."""
    sent = sum(r.bytes_sent for r in rounds)
    busy_s = sum(r.busy_ms for r in rounds) / 1e3
    measured = sent / busy_s if sent and busy_s else float(ASSUMED_BANDWIDTH)
    return min(measured, cap_bytes_s) if cap_bytes_s else measured


def estimate(stats: Stats) -> Estimate:
    """Every number that :func:`decide` looks at."""
    newest = sample(stats.rounds)
    looked_at = sum(r.pages_dirty for r in newest)
    sent = sum(r.bytes_sent for r in newest)
    bandwidth = measured_bandwidth(newest, stats.limits.bandwidth_bytes_s)
    data_pages = sum(r.pages_sent for r in newest)
    page_bytes = min(sent / data_pages, MAX_PAGE_BYTES) if data_pages else PAGE_BYTES
    work_ms = sum(r.work_ms for r in newest) / looked_at if looked_at else 0.0
    pages_ms = stats.pages_left * (page_bytes / bandwidth * 1e3 + work_ms)
    last_ms = max(stats.rounds[-1].time_ms, 1e-3)
    return Estimate(bandwidth, pages_ms, stats.pages_left * PAGE_BYTES / last_ms * 1e3, pages_ms / last_ms)


def decide(stats: Stats) -> Decision:
    """CONTINUE, SWITCH or GIVE_UP. Pure: the same stats give the same decision."""
    e = estimate(stats)
    # A limit below what a stop costs with no page left cannot be met by copying more: the floor is taken instead.
    limit_ms = max(stats.limits.downtime_limit_ms, FIXED_MS + TINY_MS)
    fits = e.expected_ms <= limit_ms
    knees = stats.knees + 1 if e.shrink > SHRINK else 0
    left = f"{stats.pages_left} pages are left ({e.pages_ms:.1f} ms)"
    action, why = Action.CONTINUE, f"{left} and a further round shrinks them"
    if e.pages_ms < TINY_MS:
        action, why = Action.SWITCH, left
    elif fits and knees >= 2:
        action, why = Action.SWITCH, f"{left} and further rounds do not shrink them"
    elif len(stats.rounds) >= stats.limits.max_rounds:
        action = Action.SWITCH if fits else Action.GIVE_UP
        why = f"{left} after {len(stats.rounds)} rounds" if fits else _hopeless(stats, e)
    elif knees:
        why = f"{left}, not shrinking now, {'within' if fits else 'over'} the limit of {limit_ms:g} ms"
    return Decision(action, why, e.expected_ms, e.bandwidth, e.writes, knees)


def _hopeless(stats: Stats, e: Estimate) -> str:
    """Why it was given up, with the two ways out: a longer downtime, or a faster link."""
    faster = e.pages_ms / max(stats.limits.downtime_limit_ms - FIXED_MS, TINY_MS)
    # While rounds still grow, the guest writes as fast as it seems to, and a link that is faster than that makes them
    # shrink. Once they stay equal it rewrites one working set, and only a link that carries that in time will do.
    if stats.pages_left > GROWTH * stats.rounds[-1].pages_dirty:
        faster = min(faster, e.shrink / SHRINK)
    return (
        f"the guest writes {show_rate(e.writes)}, the link carries {show_rate(e.bandwidth)}: "
        f"after {len(stats.rounds)} rounds this needs a downtime limit of {_round_up(e.expected_ms)} ms "
        f"or {max(faster, 1.1):.1f} × the bandwidth"
    )


def _round_up(ms: float) -> int:
    return int(-(-ms * 1.1 // 10) * 10)


def show_rate(bytes_s: float) -> str:
    """``1.9 GiB/s``: a rate in bytes per second for a person."""
    for unit in ("B", "KiB", "MiB"):
        if bytes_s < 1024:
            return f"{bytes_s:.{0 if unit == 'B' else 1}f} {unit}/s"
        bytes_s /= 1024
    return f"{bytes_s:.1f} GiB/s"
