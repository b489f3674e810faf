"""How figures look to a person, and the tables and the JSON that verbs print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nr_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in _UNITS:
        if abs(nr_bytes) < 1024 or unit == _UNITS[-1]:
            return f"{_three_digits(nr_bytes)} {unit}"
        nr_bytes /= 1024
    raise AssertionError("the last unit takes all")


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def rate(bytes_s: float) -> str:
    """Bytes per second, or a dash when there is no rate."""
    return f"{size(bytes_s)}/s" if bytes_s else "–"


def duration(ms: float) -> str:
    """``0.25`` as ``0.25 ms``, ``1234`` as ``1.23 s``."""
    if ms < 1000:
        return f"{_three_digits(ms)} ms"
    return f"{ms / 1000:.3g} s" if ms < 60_000 else f"{int(ms // 60_000)} min {ms % 60_000 / 1000:.0f} s"


def print_json(value: Any) -> None:
    """One JSON object on one line, the last and only one of standard output."""
    print(json.dumps(value, default=_plain), flush=True)


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)


def console(*, stderr: bool = False) -> Console:
    """A console for tables: on standard output, or for progress on standard error."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[int] = (),
    stderr: bool = False,
) -> None:
    """Print a table; ``right`` are the indices of the columns that hold figures. Cells are shown as they are."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title or None,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_edge=False,
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i in right else "left", overflow="fold", no_wrap=i in right)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    out = console(stderr=stderr)
    if not out.is_terminal:
        out.width = 200
    out.print(grid)


def note(text: str) -> None:
    """One line for a person, on standard error."""
    print(f"kvmigrate: {text}", file=sys.stderr, flush=True)
