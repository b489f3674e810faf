"""``python -m tests.bench``: measure, print the tables, write them with every sample and the plots."""

from __future__ import annotations

import argparse
import compileall
import signal
import sys
import time
from functools import partial
from pathlib import Path

from .goals import Group, Plan
from .output import Output
from .plan import PLANS
from .report import section
from .samples import interleave
from .scratch import TMPFS, scratch
from .sizes import make_small

DOCS = Path("docs/benchmarks")
PARTIAL = Path("build/bench")


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    names = ",".join(plan.name for plan in PLANS)
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, help="runs of every row (default: by group)")
    parser.add_argument("--only", default="", metavar="GROUPS", help=f"some groups, with commas: {names}")
    parser.add_argument("--out", type=Path, help=f"where to write (default {DOCS}, with --only {PARTIAL})")
    parser.add_argument(
        "--minutes", type=float, default=17, help="after that no row has a second run, and no group begins (default 17)"
    )
    parser.add_argument("--small", action="store_true", help="small guests, to try the bench itself")
    asked = parser.parse_args()
    asked.only = list(filter(None, asked.only.split(",")))
    if unknown := set(asked.only) - {plan.name for plan in PLANS}:
        parser.error(f"there is no group {', '.join(sorted(unknown))}: take some of {names}")
    asked.out = asked.out or (PARTIAL if asked.only or asked.small else DOCS)
    return asked


def measure(plan: Plan, runs: int, files: Path, until: float) -> Group:
    """Run one group. One that cannot be opened on this machine is a group without rows that says so."""
    began = time.monotonic()
    try:
        with plan.open(files) as group:
            print(f"\n{plan.name}: {group.title}", file=sys.stderr)
            say = partial(print, " ", file=sys.stderr, flush=True)
            interleave(group.rows, runs, until, say, group.is_beaten)
    except OSError as error:
        group = Group(f"{plan.name}: not measured here", [], [], note=f"{type(error).__name__}: {error}")
    group.name = plan.name
    print(f"{plan.name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return group


def main() -> int:
    """Measure what was asked for. Exit status 1 when a run of kvmigrate failed; a missed goal is told."""
    asked = arguments()
    # So that what runs is ended and the files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # As an installed package is; where PYTHONDONTWRITEBYTECODE is set, every start would compile the sources anew.
    compileall.compile_dir("kvmigrate", quiet=1)
    sys.setswitchinterval(1e-4)  # the threads that listen to heartbeats must not wait for each other
    if asked.small:
        make_small()
    until = time.monotonic() + asked.minutes * 60
    output = Output(asked.out)
    groups = []
    with scratch(TMPFS) as files:
        for plan in PLANS:
            if asked.only and plan.name not in asked.only:
                continue
            if time.monotonic() > until and not asked.only:
                output.left_out.append(plan.name)
                continue
            runs = asked.runs or plan.runs
            groups.append(measure(plan, runs, files, until))
            print(section(groups[-1], runs), flush=True)
            output.write(groups, runs={one.name: asked.runs or one.runs for one in PLANS})
        # Once more, with what was left out.
        output.write(groups, runs={one.name: asked.runs or one.runs for one in PLANS})
    return int(any(row.failures for group in groups for row in group.rows if row.ours))


if __name__ == "__main__":
    sys.exit(main())
