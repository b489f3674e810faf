"""The table of planted faults for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

BEGIN, END = "<!-- planted faults: begin -->", "<!-- planted faults: end -->"


def write_table(path: Path, rows: Sequence[tuple[str, str, list[str]]], left_out: Mapping[str, str]) -> None:
    """Put the table between its two marks in ``path``."""
    caught = sum(bool(oracles) for _, _, oracles in rows)
    lines = [BEGIN, f"Caught **{caught} of {len(rows)}**.", ""]
    lines += ["| fault | what is broken | noticed by |", "|---|---|---|"]
    lines += [f"| `{name}` | {what} | {', '.join(oracles) or '**nobody**'} |" for name, what, oracles in rows]
    lines += [f"| `{name}` | not planted: {why} | |" for name, why in left_out.items()]
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + "\n".join([*lines, END]) + after)
