"""Check a snapshot, all of it, with code that is not the loader's: what is wrong, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file, at which byte, and what."""

    file: str
    offset: int
    what: str


@dataclass(frozen=True)
class Report:
    """What :func:`verify` saw. ``findings`` is empty for a good snapshot."""

    directory: str
    findings: tuple[Finding, ...]
    nr_frames: int
    nr_pages: int
    nr_bytes: int

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_value(self) -> dict[str, Any]:
        """For JSON."""
        raise NotImplementedError


def verify(directory: Path) -> Report:
    """Read every byte of the snapshot ``directory``. Never raises for what is in it: that is what findings are."""
    raise NotImplementedError
