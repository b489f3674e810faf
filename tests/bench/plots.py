"""The plots: blackouts as distributions, time against memory size, rounds over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .goals import Group
from .samples import Sample, Series
from .svg import Axis, Chart, Point

PAGE_MIB = 4096 / (1 << 20)
BLACKOUT = "blackout ms"
TOTAL = "total ms"
ROUND_ROWS = 4


def distribution(group: Group) -> Chart:
    """How many of a row's blackouts are no longer than so many milliseconds."""
    rows = [row for row in group.rows if row.values(BLACKOUT)]
    x = Axis.around("blackout, ms (log scale)", [value for row in rows for value in row.values(BLACKOUT)], log=True)
    chart = Chart(f"Blackout: {group.title}", x, Axis("share of the runs", 0, 1))
    for row in rows:
        values = sorted(row.values(BLACKOUT))
        points = [(x.least, 0.0), *((value, (at + 1) / len(values)) for at, value in enumerate(values)), (x.most, 1.0)]
        chart.line(f"{row.name} ({len(values)} runs)", points, steps=True, dots=False)
    return chart


def typical(row: Series) -> Sample | None:
    """The run whose total time is the row's median."""
    wanted = row.statistic(TOTAL, "p50")
    return next((sample for sample in row.samples if sample.figures[TOTAL] == wanted), None)


def rounds(group: Group) -> Chart | None:
    """When each pass over memory began, until the end; kvmigrate's row and the rivals that were fastest."""
    ours = [row for row in group.rows if row.ours]
    rivals = sorted((row for row in group.rows if not row.ours), key=lambda row: row.statistic(TOTAL, "p50"))
    chosen = [(row, sample) for row in (*ours, *rivals[:ROUND_ROWS]) if (sample := typical(row)) and sample.passes]
    if not chosen:
        return None
    lines = [(row.name, _stairs(sample)) for row, sample in chosen]
    points = [point for _, line in lines for point in line]
    x = Axis.around("ms since the command", [x for x, _ in points])
    chart = Chart(f"Rounds: {group.title}", x, Axis.around("round (pass over memory)", [y for _, y in points]))
    for name, line in lines:
        chart.line(name, line, steps=True)
    return chart


def _stairs(sample: Sample) -> list[Point]:
    """When each round began, until the end. Rounds that the program timed lie where their second one was announced."""
    times = [one["time"] for one in sample.rounds]
    begins = [sum(times[:at]) for at in range(len(times))] or sample.passes
    shift = sample.passes[0] - begins[1] if len(times) > 1 and sample.passes else 0.0
    points = [(began + shift, float(number)) for number, began in enumerate(begins, 1)]
    return [*points, (sample.figures[TOTAL], points[-1][1])]


def round_sizes(groups: Sequence[Group]) -> Chart | None:
    """What each of kvmigrate's rounds had to look at, over time, for every kind of guest."""
    lines = [
        (group.title, _sizes(sample)) for group in groups for row in group.rows if row.ours and (sample := typical(row))
    ]
    lines = [(title, points) for title, points in lines if points]
    if not lines:
        return None
    points = [point for _, line in lines for point in line]
    x = Axis.around("ms since the first round began", [x for x, _ in points])
    y = Axis.around("MiB to look at in the round (log scale)", [y for _, y in points], log=True)
    chart = Chart("kvmigrate's rounds: what each had to look at, over time", x, y)
    for title, line in lines:
        chart.line(title, line, steps=True)
    return chart


def _sizes(sample: Sample) -> list[Point]:
    points, at = [], 0.0
    for one in sample.rounds:
        points.append((at, max(one["pages-dirty"] * PAGE_MIB, PAGE_MIB)))
        at += one["time"]
        points.append((at, points[-1][1]))
    return points


def growth(groups: Sequence[Group]) -> Chart | None:
    """Time against memory size; the groups are named growth-1, growth-2, … GiB."""
    lines: dict[str, list[Point]] = {}
    for group in groups:
        if group.name.startswith("growth-"):
            for row in group.rows:
                if row.values(TOTAL):
                    lines.setdefault(row.name, []).append((float(group.name[7:]), row.statistic(TOTAL, "p50")))
    if not lines:
        return None
    points = [point for line in lines.values() for point in line]
    x = Axis.around("GiB of incompressible data", [x for x, _ in points])
    chart = Chart("Total time against memory size", x, Axis.around("total, ms", [y for _, y in points]))
    for name, line in lines.items():
        chart.line(name, line)
    return chart


def plots(groups: Sequence[Group]) -> Iterator[tuple[str, Chart]]:
    """Every plot that the groups have data for, with the name of its file."""
    for group in groups:
        if group.name.startswith("growth-"):
            continue
        if BLACKOUT in group.figures and any(row.values(BLACKOUT) for row in group.rows):
            yield f"blackout-{group.name}.svg", distribution(group)
        if TOTAL in group.figures and (chart := rounds(group)):
            yield f"rounds-{group.name}.svg", chart
    moved = [group for group in groups if TOTAL in group.figures]
    for name, drawn in (("rounds.svg", round_sizes(moved)), ("growth.svg", growth(groups))):
        if drawn:
            yield name, drawn
