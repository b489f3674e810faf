"""The bench's tables, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .goals import Group, Verdict
from .samples import Series


def number(value: float) -> str:
    """A figure with as many digits as it deserves."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(row: Series, figure: str) -> str:
    values = [row.statistic(figure, name) for name in ("p50", "p90", "max")]
    return " / ".join(map(number, values)) if row.values(figure) else ""


def _ratio(group: Group, row: Series) -> str:
    rival = group.best(group.figures[0])
    if rival is None or not rival.samples:
        return ""
    mark = " (best)" if row is rival else ""
    return number(row.statistic(group.figures[0], "p50") / rival.statistic(group.figures[0], "p50")) + mark


def _runs(row: Series) -> str:
    return str(len(row.samples)) + (f", {len(row.failures)} failed" if row.failures else "")


def _figures(group: Group) -> tuple[list[str], list[str]]:
    """The names of the figures that every row has, and of those that only some have."""
    names = dict.fromkeys(name for row in group.rows for sample in row.samples for name in sample.figures)
    rows = [row for row in group.rows if row.samples]
    common = [name for name in names if all(row.values(name) for row in rows)]
    return common, [name for name in names if name not in common]


def _medians(row: Series, names: Iterable[str]) -> list[str]:
    return [number(row.statistic(name, "p50")) if row.values(name) else "" for name in names]


def table(group: Group) -> str:
    """One line per row: the spread of the group's figures, the ratio of the first, the median of all others."""
    common, special = _figures(group)
    others = [name for name in common if name not in group.figures]
    special = [name for name in special if name not in group.figures]
    compared = group.best(group.figures[0]) is not None
    headings = ["", "runs", *(f"{name}: p50 / p90 / max" for name in group.figures)]
    headings += [f"{group.figures[0]}: ratio"] if compared else []
    lines = []
    for row in group.rows:
        cells = [row.name, _runs(row), *(_spread(row, name) for name in group.figures)]
        cells += [_ratio(group, row)] if compared else []
        lines.append([*cells, *_medians(row, others)])
    texts = [markdown([*headings, *others], lines)]
    if special:
        rows = [row for row in group.rows if any(row.values(name) for name in special)]
        texts.append(markdown(["", *special], [[row.name, *_medians(row, special)] for row in rows]))
    return "\n\n".join(texts)


def section(group: Group, runs: int) -> str:
    """A group's part of the report: its title, its table, its failures and what there is to say."""
    texts = [f"### {group.title}", table(group)]
    failures = [f"- {row.name}: {failure}" for row in group.rows for failure in dict.fromkeys(row.failures)]
    texts += ["Failed runs count as endless:\n\n" + "\n".join(failures)] if failures else []
    texts += [group.note] if group.note else []
    texts += (
        [f"Kept beside this page: {', '.join(f'[{name}]({name})' for name in group.texts)}."] if group.texts else []
    )
    texts += [_sentence(verdict) for verdict in group.verdicts()]
    texts += [f"`make bench BENCH_ARGS='--only {group.name} --runs {runs}'`"]
    return "\n\n".join(texts) + "\n"


def _sentence(verdict: Verdict) -> str:
    goal = verdict.goal
    ours = f"{goal.text}: {verdict.ours.name} {number(verdict.value)}"
    if verdict.rival is None:
        return f"{ours}, goal ≤ {goal.at_most:g}: {_outcome(verdict)}."
    rival = f"{verdict.rival.name} {number(verdict.rival_value)}"
    return f"{ours}, {rival}: ratio {number(verdict.measured)}, goal ≤ {goal.at_most:g}: {_outcome(verdict)}."


def _outcome(verdict: Verdict) -> str:
    return "reached" if verdict.reached else "**not reached**"


def goals_table(verdicts: Iterable[Verdict]) -> str:
    """All goals in one table."""
    lines = []
    for verdict in verdicts:
        goal, rival = verdict.goal, verdict.rival
        limit = f"≤ {goal.at_most:g}" + ("" if rival is None else f" × {goal.against}")
        measured = (
            number(verdict.value) if rival is None else f"{number(verdict.value)} : {number(verdict.rival_value)}"
        )
        ratio = "" if rival is None else number(verdict.measured)
        row = verdict.ours.name if rival is None else f"{verdict.ours.name} : {rival.name}"
        unit = f"{goal.figure}, {goal.statistic}"
        lines.append([goal.text, unit, limit, measured, ratio, _outcome(verdict), row, f"`{verdict.group}`"])
    headings = ["goal", "figure", "limit", "measured", "ratio", "", "rows", "group"]
    return markdown(headings, lines)
