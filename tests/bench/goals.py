"""Groups of rows that are compared, the goals they are held to, and what became of each goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from .samples import Series

BEST = "QEMU's best row"
BEATEN = 1.5


@dataclass(frozen=True)
class Goal:
    """One figure of kvmigrate's best row against a limit: a value, or a ratio to a rival's row."""

    text: str
    figure: str
    at_most: float
    statistic: str = "p50"
    against: str | None = BEST
    """None: the limit is a value. BEST: of all of QEMU's rows. Else: of the rivals whose name has it."""
    ours: str = ""
    """Part of the names of kvmigrate's rows that the goal is about."""


@dataclass(frozen=True)
class Verdict:
    """What was measured for one goal."""

    goal: Goal
    group: str
    ours: Series
    value: float
    rival: Series | None
    rival_value: float

    @property
    def measured(self) -> float:
        """What is held against the limit: the value, or the ratio."""
        return self.value if self.rival is None else self.value / self.rival_value

    @property
    def reached(self) -> bool:
        return not math.isnan(self.measured) and self.measured <= self.goal.at_most


@dataclass
class Group:
    """One scenario. Of all ``figures`` the table shows the spread, of the first one the ratio too."""

    title: str
    rows: list[Series]
    figures: list[str]
    goals: list[Goal] = field(default_factory=list)
    note: str = ""
    name: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    """Files that are kept beside the tables, by name."""

    def best(self, figure: str, statistic: str = "p50", *, rivals: str | None = BEST, ours: str = "") -> Series | None:
        """The row with the least value: of QEMU's, or of the rivals with that in their name; None: of kvmigrate's."""
        if rivals is None:
            rows = [row for row in self.rows if row.ours and ours in row.name]
        else:
            wanted = "QEMU" if rivals == BEST else rivals
            rows = [row for row in self.rows if not row.ours and wanted in row.name]
        return min(rows, key=lambda row: row.statistic(figure, statistic), default=None)

    def is_beaten(self, row: Series) -> bool:
        """Whether ``row`` is one of QEMU's and so far behind its best by now that it will not be that any more: what it
        is like has been seen, and the time is better spent on the others."""
        if row.ours or "QEMU" not in row.name or not (row.samples or row.failures):
            return False
        figures = {goal.figure for goal in self.goals if goal.against} or self.figures
        best = ((figure, self.best(figure)) for figure in figures)
        return all(
            rival is not None and row.statistic(figure, "p50") > BEATEN * rival.statistic(figure, "p50")
            for figure, rival in best
        )

    def verdicts(self) -> Iterator[Verdict]:
        """Each goal with what was measured for it."""
        for goal in self.goals:
            ours = self.best(goal.figure, goal.statistic, rivals=None, ours=goal.ours)
            rival = self.best(goal.figure, goal.statistic, rivals=goal.against) if goal.against else None
            if ours is None or (rival is None and goal.against):
                continue
            value = ours.statistic(goal.figure, goal.statistic)
            other = rival.statistic(goal.figure, goal.statistic) if rival else math.nan
            yield Verdict(goal, self.name, ours, value, rival, other)


@dataclass(frozen=True)
class Plan:
    """How to come by a group. ``files`` is a directory on tmpfs that all groups of one bench share."""

    name: str
    runs: int
    """How often each row is run when nothing else is asked for."""
    open: Callable[[Path], AbstractContextManager[Group]]
