"""A migration into this process, as a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contract import Builder, Examiner
from ..errors import KvmigrateError
from ..migration.address import Listener
from ..migration.destination import Arrived, Destination
from .job import Emit, Job
from .outgoing import MigrationEvents


class IncomingJob(Job):
    """Waits on ``listener`` for one guest; ``arrived`` is what came once it is over."""

    kind = "incoming migration"

    def __init__(
        self,
        listener: Listener,
        builder: Builder,
        examiner: Examiner,
        journal_dir: Path,
        name: str,
        emit: Emit,
        *,
        paused: bool,
    ) -> None:
        super().__init__(str(listener.address))
        self.arrived: Arrived | None = None
        self._events = MigrationEvents(emit)
        self._destination = Destination(
            listener, builder, examiner, journal_dir, name, self._events, autostart=not paused
        )

    def work(self) -> None:
        self.arrived = self._destination.run()

    def tell_end(self) -> None:
        """See :meth:`Job.tell_end`."""
        self._events.tell_end()

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """See :meth:`Job.cancel`."""
        self._destination.cancel()

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word; see :meth:`Destination.resolve`."""
        self._destination.resolve(run_here=run_here)

    def close(self) -> None:
        self._destination.close()

    @property
    def status(self) -> str:
        return str(self._destination.query()["status"])

    def result(self) -> Mapping[str, Any]:
        value = self._destination.query()
        if self.arrived is not None:
            value["fidelity"] = self.arrived.fidelity.to_value()
        return value
