"""The bench's tables, as Markdown, and the facts of the machine they were made on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from .plan import Group
from .qemu import CPU, qemu_version
from .samples import Series, best

HEADINGS = {
    "total_ms": "total ms",
    "completed_ms": "completed ms",
    "blackout_ms": "blackout ms",
    "reported_total_ms": "own total ms",
    "reported_downtime_ms": "own downtime ms",
    "transferred_mib": "sent MiB",
    "beyond_guest_mib": "source beyond guest MiB",
    "allocated_mib": "on disk MiB",
    "first_heartbeat_ms": "first heartbeat ms",
}


def facts() -> str:
    """Which machine, kernel and versions."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    modules = sorted(path.name for path in Path("/sys/module").glob("kvm*"))
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    return (
        f"kvmigrate {version('kvmigrate')}, QEMU {qemu_version()} with `-accel kvm -cpu {CPU}`, "
        f"Linux {platform.release()}, {', '.join(modules)}, {os.cpu_count()} × {cpu[1] if cpu else 'unknown CPU'}, "
        f"transparent huge pages {huge}, load {os.getloadavg()[0]:.1f} when this was written.\n"
    )


def _cell(row: Series, what: str) -> str:
    values = row.values(what)
    if not values:
        return "failed"
    return f"{row.median(what):.1f} ({min(values):.1f}–{max(values):.1f})"


def table(group: Group) -> str:
    """Medians with least and most in parentheses, one line per row."""
    kind = next((type(row.samples[0]) for row in group.rows if row.samples), None)
    if kind is None:
        return "every run failed: " + "; ".join(failure for row in group.rows for failure in row.failures)
    names = [one.name for one in fields(kind)]
    lines = [f"| | runs | {' | '.join(HEADINGS[name] for name in names)} |", "|---" * (len(names) + 2) + "|"]
    for row in group.rows:
        lines.append(f"| {row.name} | {len(row.samples)} | {' | '.join(_cell(row, name) for name in names)} |")
    return "\n".join(lines)


def verdict(group: Group) -> str:
    """kvmigrate's figure beside QEMU's best row and beside the goal."""
    rival, ours = best(group.rows[:-1], group.figure), group.rows[-1]
    value, other = ours.median(group.figure), rival.median(group.figure)
    ratio = value / other
    reached = (value if group.absolute else ratio) <= group.at_most
    return (
        f"kvmigrate {value:.1f}, QEMU's best row {other:.1f} ({rival.name}): ratio {ratio:.2f}. "
        f"Goal: {group.goal()}: {'reached' if reached else 'MISSED'}."
    )
