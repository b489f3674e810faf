"""Take a snapshot while the guest runs: pre-copy to a file, and a pause for the last round alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..config import SnapshotParameters
from ..contract import Migratable
from ..precopy.converge import Decision
from ..precopy.ledger import RoundRecord
from ..precopy.progress import Progress
from ..state.section import Value


class Observer(Protocol):
    """Who wants to watch. Called from the thread that takes the snapshot; must not block and not raise."""

    def started(self, progress: Progress) -> None:
        """Copying begins; ``progress.view()`` may be asked by any thread from now on."""
        ...

    def round_ended(self, record: RoundRecord, decision: Decision | None) -> None:
        """A round is over, and what was decided after it (None after the last, which ran in the pause)."""
        ...


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """What taking the snapshot did. Times in milliseconds."""

    directory: Path
    rounds: tuple[RoundRecord, ...]
    pause_ms: float
    """From before the first vCPU was stopped until all were let go again; 0 when the guest was paused anyway."""
    total_ms: float
    """Until the snapshot was durable under its name."""
    state_bytes: int
    memory_bytes: int
    """Written to the memory file, pages written twice counted twice."""
    why: str
    """Why the guest was stopped for the last round just then."""

    def to_value(self) -> dict[str, Value]:
        """For JSON: directory, rounds, pause-time, total-time, bytes, pages, zero, why."""
        raise NotImplementedError


def take(
    machine: Migratable,
    directory: Path,
    parameters: SnapshotParameters,
    observer: Observer | None = None,
    abort_fd: int = -1,
) -> SnapshotResult:
    """Save ``machine`` as the snapshot ``directory``, which must not exist; its parent must.

    The machine is running, paused or not yet started, and is so again when this returns or raises, with logging
    off. ``abort_fd`` is an eventfd that cancels when it is readable (-1: none).

    Raises :class:`SnapshotError` (the directory exists or cannot be written), :class:`NotConverged`,
    :class:`Cancelled`, :class:`StateError`, :class:`HostError`. Nothing is left of the directory then.
    """
    raise NotImplementedError
