"""A migration out of this process, or a check whether there could be one, as a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Address, MigrationParameters
from ..contract import Migratable
from ..errors import KvmigrateError
from ..migration.checker import Checker
from ..migration.checks import CheckResult
from ..migration.source import Source
from ..migration.status import MigrationResult, Status
from ..precopy.ledger import RoundRecord
from ..precopy.progress import ProgressView
from ..state.section import Value
from .job import ACTIVE, Emit, Job, describe

ENDS = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class MigrationEvents:
    """Makes QEMU's events of what a migration tells its observer, in the migration's own thread.

    The word of its end is kept for :meth:`tell_end`: the source is still putting its things away when it says it.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._end = Status.NONE

    def status(self, word: Status) -> None:
        if word in ENDS:
            self._end = word
        else:
            self._emit("MIGRATION", {"status": word.value})

    def tell_end(self) -> None:
        """Now it is over."""
        if self._end is not Status.NONE:
            self._emit("MIGRATION", {"status": self._end.value})

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
        self._events = MigrationEvents(emit)
        self._source = Source(machine, address, parameters, journal_dir, self._events)
        self._last = MigrationResult(Status.SETUP)

    def work(self) -> None:
        self._source.run()

    def tell_end(self) -> None:
        """See :meth:`Job.tell_end`."""
        self._events.tell_end()

    def _query(self) -> MigrationResult:
        """How far it is; that it has ended is told only when the next one may begin."""
        found = self._source.query()
        if found.status not in ENDS or not self.alive:
            self._last = found
        return self._last

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """See :meth:`Job.cancel`."""
        self._source.cancel(reason)

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word; see :meth:`Source.resolve`."""
        self._source.resolve(run_here=run_here)

    @property
    def status(self) -> str:
        return self._query().status.value

    def progress(self) -> ProgressView | None:
        return self._query().view

    def result(self) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self._query().to_value()
        return value


class CheckJob(Job):
    """Has ``address`` try the state of ``machine``, which runs on."""

    kind = "check"

    def __init__(self, machine: Migratable, address: Address, timeout_ms: float, emit: Emit) -> None:
        super().__init__(str(address))
        self._emit = emit
        self._checker = Checker(machine, address, timeout_ms)
        self._result: CheckResult | None = None

    def work(self) -> None:
        self._emit("X_KVMIGRATE_CHECK", {"status": ACTIVE})
        self._result = self._checker.run()

    def tell_end(self) -> None:
        """See :meth:`Job.tell_end`."""
        why = {} if self.error is None else {"error-desc": describe(self.error)}
        self._emit("X_KVMIGRATE_CHECK", {"status": self.status, **why})

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """See :meth:`Job.cancel`."""
        self._checker.cancel(reason)

    def result(self) -> Mapping[str, Any] | None:
        return self._result.to_value() if self._result is not None else None
