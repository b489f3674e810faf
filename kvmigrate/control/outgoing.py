"""A migration out of this process, as a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Address, MigrationParameters
from ..contract import Migratable
from ..errors import KvmigrateError
from ..migration.source import Source
from ..migration.status import Status
from ..precopy.ledger import RoundRecord
from ..precopy.progress import ProgressView
from ..state.section import Value
from .job import Emit, Job


class MigrationEvents:
    """Makes QEMU's events of what a migration tells its observer, in the migration's own thread."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def status(self, word: Status) -> None:
        self._emit("MIGRATION", {"status": word.value})

    def round_done(self, record: RoundRecord) -> None:
        self._emit("MIGRATION_PASS", {"pass": record.round + 1})

    def event(self, name: str, data: Value) -> None:
        self._emit(name, data)


class MigrationJob(Job):
    """Moves ``machine`` to ``address``."""

    kind = "migration"

    def __init__(
        self,
        machine: Migratable,
        address: Address,
        parameters: MigrationParameters,
        journal_dir: Path,
        emit: Emit,
    ) -> None:
        super().__init__(str(address))
        self._source = Source(machine, address, parameters, journal_dir, MigrationEvents(emit))

    def work(self) -> None:
        self._source.run()

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """See :meth:`Job.cancel`."""
        self._source.cancel(reason)

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word; see :meth:`Source.resolve`."""
        self._source.resolve(run_here=run_here)

    @property
    def status(self) -> str:
        return self._source.query().status.value

    def progress(self) -> ProgressView | None:
        return self._source.query().view

    def result(self) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self._source.query().to_value()
        return value
