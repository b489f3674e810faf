"""Writes what was measured: index.md, bench.json, the plots."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .goals import Group
from .machine import facts, load
from .plots import plots
from .report import goals_table, section

INTRODUCTION = """# Benchmarks

kvmigrate beside QEMU on one machine, the runs of all rows of a table in turn (A B C, A B C, …). Made by `make bench`;
`bench.json` beside this page has each sample. [Performance](../performance.md) says how it is measured.

Where a table has more than a goal asks for, the goal is held against the *best* row of QEMU for that very figure. A row
of QEMU that takes half as much again as its best is not run again: the column `runs` tells.
"""


class Output:
    """A directory into which everything is written again after each group: a bench takes long, and may be stopped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self._facts = facts() | {"load before": load()}
        self.left_out: list[str] = []
        """Groups for which there was no time."""
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.svg"):
            old.unlink()

    def write(self, groups: Sequence[Group], runs: Mapping[str, int]) -> None:
        """All files, of the groups that there are so far."""
        values = {group.name: {row.name: row.to_value() for row in group.rows} for group in groups}
        head = {"date": self._began, "machine": self._facts}
        (self._directory / "bench.json").write_text(json.dumps(head | {"groups": values}, separators=(",", ":")) + "\n")
        for name, text in (item for group in groups for item in group.texts.items()):
            (self._directory / name).write_text(text)
        drawn = []
        for name, chart in plots(groups):
            (self._directory / name).write_text(chart.to_text())
            drawn.append((name, chart.title))
        (self._directory / "index.md").write_text(self._page(groups, runs, drawn))

    def _page(self, groups: Sequence[Group], runs: Mapping[str, int], drawn: Sequence[tuple[str, str]]) -> str:
        lines = [f"- date: {self._began}", *(f"- {name}: {value}" for name, value in self._facts.items())]
        texts = [INTRODUCTION, "## Machine\n\n" + "\n".join([*lines, "- command: `make bench`"]) + "\n"]
        texts += ["## Goals\n", goals_table(verdict for group in groups for verdict in group.verdicts()), ""]
        if self.left_out:
            names = ", ".join(f"`{name}`" for name in self.left_out)
            texts += [f"No time was left for {names}: `--only` measures them, or more `--minutes`.\n"]
        texts += ["## Plots\n", *(f"![{title}]({name})\n" for name, title in drawn)]
        texts += ["## Figures\n", *(section(group, runs.get(group.name, 1)) for group in groups)]
        return "\n".join(texts)
