"""What one run yields, what many of them amount to, and how rows take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One run: named figures, and what the program told of its rounds (plots are drawn from these)."""

    figures: dict[str, float]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    """When each pass over memory began, in milliseconds from the command on."""

    def joined(self, other: Sample) -> Sample:
        """Both in one."""
        return Sample({**self.figures, **other.figures}, self.rounds + other.rounds, self.passes + other.passes)

    def to_value(self) -> dict[str, Any]:
        """For JSON."""
        value: dict[str, Any] = {name: round(figure, 4) for name, figure in self.figures.items()}
        if self.rounds:
            value["rounds"] = self.rounds
        if self.passes:
            value["pass times"] = [round(one, 2) for one in self.passes]
        return value


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest of the values that ``share`` of them do not exceed; infinity when there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.inf


STATISTICS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Series:
    """The runs of one row of a table; ``most_runs`` limits a row that takes long."""

    name: str
    run: Callable[[], Sample]
    ours: bool = False
    most_runs: int | None = None
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """One figure of every sample."""
        return [sample.figures[figure] for sample in self.samples if figure in sample.figures]

    def statistic(self, figure: str, name: str) -> float:
        """p50, p90, p99 or max. A run that failed counts as one that never ended."""
        values = self.values(figure)
        return quantile(values + [math.inf] * len(self.failures), STATISTICS[name]) if values else math.inf

    def to_value(self) -> dict[str, Any]:
        """For JSON: every sample, so that other statistics can be made of them later."""
        return {"samples": [sample.to_value() for sample in self.samples], "failures": self.failures}


def interleave(
    series: Iterable[Series],
    runs: int,
    until: float,
    say: Callable[[str], None],
    is_over: Callable[[Series], bool] = lambda _: False,
) -> None:
    """Run all of them ``runs`` times in turn (A B C, A B C, …), so that what changes over time hits each alike, but for
    those that ``is_over`` says need not run again. Past ``until`` on the monotonic clock no second turn begins.
    """
    rows = list(series)
    for number in range(runs):
        if number and time.monotonic() > until:
            say(f"the time is over after {number} of {runs} turns")
            return
        for row in rows:
            if (row.most_runs is not None and number >= row.most_runs) or is_over(row):
                continue
            began = time.monotonic()
            try:
                row.samples.append(row.run())
                outcome = ", ".join(f"{name} {value:.1f}" for name, value in list(row.samples[-1].figures.items())[:2])
            except (OSError, TimeoutError, RuntimeError) as error:
                row.failures.append(f"{type(error).__name__}: {error}")
                outcome = row.failures[-1]
            say(f"{number + 1}/{runs} {row.name}: {outcome} ({time.monotonic() - began:.1f} s)")
