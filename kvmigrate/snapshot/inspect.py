"""What is in a snapshot, as plain values for a person or a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..state.section import Value


def inspect(directory: Path, msr_name: Callable[[int], str] = hex) -> dict[str, Value]:
    """Registers, MSRs, devices and memory ranges of the snapshot ``directory``, under the kernel's field names.

    Reads ``state`` alone, no memory. ``msr_name`` names an MSR by its index. Raises :class:`SnapshotError`.
    """
    raise NotImplementedError
