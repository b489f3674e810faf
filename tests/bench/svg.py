"""Line charts as small SVG files, written by hand: axes, a grid, lines, a legend. Nothing but text is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
LEGEND_LINE = 16
COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#117a65", "#5d6d7e", "#a04000")
DASHES = ("6 3", "2 3")
STYLE = "font-family:sans-serif;font-size:12px;fill:#222"
Point = tuple[float, float]


@dataclass
class Axis:
    """One axis: its label, what it shows, and whether by powers of ten."""

    label: str
    least: float
    most: float
    log: bool = False

    @classmethod
    def around(cls, label: str, values: Iterable[float], *, log: bool = False) -> Axis:
        """An axis on which all of ``values`` have room; a linear one begins at 0."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        if log:
            least, most = 10 ** math.floor(math.log10(min(known))), 10 ** math.ceil(math.log10(max(known)))
            return cls(label, least, most if most > least else least * 10, log=True)
        return cls(label, 0.0, max(known) * 1.05 or 1.0)

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            value = max(value, self.least)
            return math.log10(value / self.least) / math.log10(self.most / self.least)
        return (value - self.least) / (self.most - self.least)

    def ticks(self) -> list[float]:
        """Where lines of the grid go: powers of ten, or four to ten round numbers."""
        if self.log:
            first, last = round(math.log10(self.least)), round(math.log10(self.most))
            return [10.0**power for power in range(first, last + 1)]
        step = 10 ** math.floor(math.log10(self.most - self.least))
        step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (self.most - self.least) / (step * part) <= 8)
        return [step * count for count in range(int(self.most / step) + 1)]


@dataclass
class Chart:
    """A chart to which lines are added, then taken as text."""

    title: str
    x: Axis
    y: Axis
    _parts: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def line(self, label: str, points: Sequence[Point], *, steps: bool = False, dots: bool = True) -> None:
        """Join ``points``; as stairs with ``steps``; with a mark on each with ``dots``."""
        again, number = divmod(len(self._legend), len(COLOURS))
        colour = COLOURS[number]
        stroke = f'fill="none" stroke="{colour}"' + (
            f' stroke-dasharray="{DASHES[again % len(DASHES)]}"' if again else ""
        )
        self._legend.append((label, stroke))
        at = [(self._x(x), self._y(y)) for x, y in points]
        if not at:
            return
        path = f"M{at[0][0]:.1f} {at[0][1]:.1f}"
        for x, y in at[1:]:
            path += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
        self._parts.append(f'<path d="{path}" {stroke} stroke-width="1.8"/>')
        if dots:
            self._parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in at]

    def _x(self, value: float) -> float:
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> list[str]:
        line = '<path d="{}" stroke="#ddd" stroke-width="1"/>'
        parts = []
        for value in self.x.ticks():
            at = self._x(value)
            parts.append(line.format(f"M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"))
            parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{value:g}", "middle"))
        for value in self.y.ticks():
            at = self._y(value)
            parts.append(line.format(f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}"))
            parts.append(_text(LEFT - 6, at + 4, f"{value:g}", "end"))
        frame = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
        return [*parts, f'<path d="{frame}" fill="none" stroke="#444" stroke-width="1.2"/>']

    def _labels(self) -> list[str]:
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, self.y.label, "middle")}</g>'
        return [
            f'<text x="{LEFT}" y="22" style="{STYLE};font-size:15px;font-weight:bold">{escape(self.title)}</text>',
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, self.x.label, "middle"),
            turned,
        ]

    def _keys(self) -> list[str]:
        parts = []
        for number, (label, stroke) in enumerate(self._legend):
            y = HEIGHT + 8 + number * LEGEND_LINE
            parts.append(f'<path d="M{LEFT} {y}h22" {stroke} stroke-width="3"/>')
            parts.append(_text(LEFT + 30, y + 4, label, "start"))
        return parts

    def to_text(self) -> str:
        """The SVG file. White behind it, so that it can be read on a dark page too."""
        height = HEIGHT + 10 + len(self._legend) * LEGEND_LINE
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
        back = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
        return "\n".join([head, back, *self._grid(), *self._labels(), *self._parts, *self._keys(), "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{STYLE}">{escape(text)}</text>'
