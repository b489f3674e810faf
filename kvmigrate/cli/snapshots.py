"""The verbs that look at a snapshot without running it: inspect and verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import show

MAX_INLINE = 16
"""A map of so many plain fields is shown on one line, as a segment or a CPUID leaf is."""


def verify(directory: Path, *, as_json: bool) -> int:
    """Check all of ``directory``. Returns 0 for a good snapshot, 1 for one that has something wrong."""
    from ..snapshot.verify import verify as check

    report = check(directory)
    if as_json:
        show.print_json(report.to_value())
        return 0 if report.ok else 1
    for finding in report.findings:
        print(f"{finding.file}, byte {finding.offset}: {finding.what}")
    seen = f"{report.nr_frames} frames, {report.nr_pages} pages, {show.size(report.nr_bytes)} read"
    print(f"{directory}: {'good' if report.ok else 'DAMAGED'} ({seen})")
    return 0 if report.ok else 1


def inspect(directory: Path, *, as_json: bool) -> int:
    """Print what ``directory`` holds."""
    from ..snapshot.inspect import inspect as read

    value = read(directory)
    if as_json:
        show.print_json(value)
        return 0
    for line in _lines(value, ""):
        print(line)
    return 0


def _lines(value: Any, indent: str) -> Iterator[str]:
    """A nested value as indented text: maps of scalars one field a line, integers in hexadecimal."""
    items = value.items() if isinstance(value, Mapping) else ((f"[{i}]", item) for i, item in enumerate(value))
    for key, item in items:
        if isinstance(item, Mapping) and len(item) <= MAX_INLINE and not any(map(_nested, item.values())):
            yield f"{indent}{key}: " + " ".join(f"{name}={_cell(cell)}" for name, cell in item.items())
        elif isinstance(item, Mapping) or (isinstance(item, list | tuple) and not _flat(item)):
            yield f"{indent}{key}:"
            yield from _lines(item, indent + "  ")
        else:
            yield f"{indent}{key}: {_cell(item)}"


def _flat(value: list[Any] | tuple[Any, ...]) -> bool:
    return len(value) <= 16 and not any(map(_nested, value))


def _nested(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_cell(item) for item in value) + "]"
    if isinstance(value, bytes):
        return value[:64].hex() + (f"… ({len(value)} bytes)" if len(value) > 64 else "")
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value) if value > 9 else str(value)
    return str(value)
