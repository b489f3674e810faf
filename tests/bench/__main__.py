"""``python -m tests.bench``: measure, print the tables, write them and every sample under build/."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from .plan import Group, groups
from .report import facts, table, verdict
from .runs import TMPFS, scratch
from .samples import interleave

OUT = Path("build")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of every row (default 5)")
    parser.add_argument("--blackout-runs", type=int, default=15, help="runs of the blackout's rows (default 15)")
    parser.add_argument("--only", default="", help="groups, with commas: full,empty,blackout,save,restore")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {PAGE}")
    return parser.parse_args()


def measure(group: Group, runs: int) -> str:
    """Run one group and return its table and what it says of the goal."""
    print(f"\n{group.title}", file=sys.stderr)
    interleave(group.rows, runs, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    return f"### {group.title}\n\n{table(group)}\n\n{verdict(group)}\n"


def write(texts: list[str], measured: list[Group], *, docs: bool) -> None:
    """Write what is known so far: a run takes long, and may be stopped."""
    OUT.mkdir(exist_ok=True)
    text = "\n".join(texts)
    (OUT / "bench.md").write_text(text)
    values = {group.name: {row.name: row.to_value() for row in group.rows} for group in measured}
    (OUT / "bench.json").write_text(json.dumps({"facts": facts(), "groups": values}, indent=1))
    if docs:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Measure what was asked for. Exit status 1 when a run failed; a missed goal is told, not failed."""
    asked = arguments()
    # So that what runs is ended and the files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = set(filter(None, asked.only.split(",")))
    texts, measured = [facts()], []
    with scratch(TMPFS) as files:
        for group in groups(files):
            if not wanted or group.name in wanted:
                texts.append(measure(group, asked.blackout_runs if group.name == "blackout" else asked.runs))
                measured.append(group)
                write(texts, measured, docs=asked.write_docs)
    print("\n".join(texts))
    return int(any(row.failures for group in measured for row in group.rows))


if __name__ == "__main__":
    sys.exit(main())
