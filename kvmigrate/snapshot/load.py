"""Restore a snapshot: map its memory privately and be ready to run at once, or read a compressed one in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..contract import Builder, Migratable
from ..state.fidelity import Fidelity
from ..state.section import Value


@dataclass(frozen=True, slots=True)
class Restored:
    """A machine that holds what the snapshot held, not running yet.

    ``description`` is what it was built from; its ``autostart`` says whether the guest ran when it was saved.
    ``timings`` are milliseconds: read, build, memory, load, total.
    """

    machine: Migratable
    fidelity: Fidelity
    description: Mapping[str, Value]
    timings: Mapping[str, float]


def restore(directory: Path, builder: Builder, *, overrides: Mapping[str, Value] | None = None) -> Restored:
    """Build the machine of the snapshot ``directory`` with ``builder``, give it the memory and load its state.

    ``overrides`` are laid over the saved description before the builder sees it (``name``, ``serial``). An uncompressed
    snapshot is mapped, not read: damage to its pages is for ``verify`` to find, and the directory's file must neither
    be changed nor cut short while the guest runs. Resuming is the caller's.

    Raises :class:`SnapshotError` (damaged, naming the file and where), :class:`RestoreRefused`, and what the builder
    and the machine raise; the machine is closed then.
    """
    raise NotImplementedError
