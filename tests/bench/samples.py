"""What one run yields, and what many of them amount to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Move:
    """One live migration, all times in milliseconds; the first three are the bench's own clock."""

    total_ms: float
    """From the command until the source says completed and the destination's guest was heard."""
    completed_ms: float
    """From the command until the source says completed."""
    blackout_ms: float
    """From the last heartbeat of the source to the first of the destination."""
    reported_total_ms: float
    reported_downtime_ms: float
    transferred_mib: float
    beyond_guest_mib: float
    """The source's peak resident size less its guest RAM."""


@dataclass(frozen=True)
class Save:
    """One snapshot, in milliseconds from the command until it is complete, and its size on the file system."""

    total_ms: float
    blackout_ms: float
    allocated_mib: float


@dataclass(frozen=True)
class Restore:
    """One restore: from the start of the process to the guest's first heartbeat."""

    first_heartbeat_ms: float


@dataclass
class Series:
    """The runs of one row of a table."""

    name: str
    run: Callable[[], Any]
    samples: list[Any] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def values(self, what: str) -> list[float]:
        """One field of every sample."""
        return [float(getattr(sample, what)) for sample in self.samples]

    def median(self, what: str) -> float:
        """The median of one field; infinity when no run succeeded."""
        return statistics.median(self.values(what)) if self.samples else float("inf")

    def to_value(self) -> dict[str, Any]:
        """For JSON: every sample, so that other statistics can be made of them later."""
        return {"samples": [asdict(sample) for sample in self.samples], "failures": self.failures}


def interleave(series: Iterable[Series], runs: int, say: Callable[[str], None]) -> None:
    """Run all of them ``runs`` times in turn (A B C, A B C, …), so that what changes over time hits each alike."""
    rows = list(series)
    for number in range(runs):
        for row in rows:
            say(f"run {number + 1} of {runs}: {row.name}")
            try:
                row.samples.append(row.run())
            except (OSError, TimeoutError, RuntimeError) as error:
                row.failures.append(f"{type(error).__name__}: {error}")
                say(f"  failed: {row.failures[-1]}")


def best(series: Iterable[Series], what: str) -> Series:
    """The row with the smallest median."""
    return min(series, key=lambda row: row.median(what))
