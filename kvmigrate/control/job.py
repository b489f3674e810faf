"""The one long job that a VM may have under way: a migration out, a migration in, or a snapshot, in a thread."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SnapshotParameters
from ..contract import Migratable
from ..errors import Cancelled, KvmigrateError, StateError
from ..record import asdict

if TYPE_CHECKING:
    from ..precopy.converge import Decision
    from ..precopy.ledger import RoundRecord
    from ..precopy.progress import Progress, ProgressView
    from ..snapshot.save import SnapshotResult

ACTIVE, COMPLETED, FAILED, CANCELLING, CANCELLED = "active", "completed", "failed", "cancelling", "cancelled"

Emit = Callable[[str, Mapping[str, Any]], None]
"""Sends an event; may be called from any thread and never blocks."""


class Job:
    """Work in a thread of its own, with a status in QEMU's words, from its start to long after its end."""

    kind = ""

    def __init__(self, target: str) -> None:
        self.target = target
        self.error: BaseException | None = None
        self._status = ACTIVE
        self._over = threading.Event()

    def start(self, ended: Callable[[Job], None]) -> None:
        """Begin; ``ended`` is called from the job's thread when it is over."""
        # A daemon: a job that hangs must not keep the process from ending.
        threading.Thread(target=self._run, args=(ended,), name=self.kind, daemon=True).start()

    def _run(self, ended: Callable[[Job], None]) -> None:
        try:
            self.work()
            self._status = COMPLETED
        except BaseException as error:
            self.error = error
            self._status = CANCELLED if isinstance(error, Cancelled) else FAILED
            if not isinstance(error, KvmigrateError) and os.environ.get("KVMIGRATE_TRACEBACK"):
                traceback.print_exc(file=sys.stderr)
        # Over comes before anybody is told: who hears of the end may start the next job at once.
        self._over.set()
        self.tell_end()
        ended(self)

    def tell_end(self) -> None:
        """Send the event of the end."""

    def work(self) -> None:
        """Do it all. An exception is its failure."""
        raise NotImplementedError

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """Ask it to end early, for ``reason`` or because the operator wants it. Raises :class:`StateError` when it is
        too late for that."""
        raise NotImplementedError

    def resolve(self, *, run_here: bool) -> None:
        """The operator's word on who owns the guest. Raises :class:`StateError` when that is not in doubt."""
        raise StateError(f"not in doubt ({self.kind} {self.status})", "commit-unknown")

    def close(self) -> None:
        """The process ends: give back what outlived the work."""

    @property
    def status(self) -> str:
        return self._status

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over within ``timeout_s``."""
        return self._over.wait(timeout_s)

    def progress(self) -> ProgressView | None:
        """How far it is; None before there is anything to see."""
        return None

    def result(self) -> Mapping[str, Any] | None:
        """The figures once it has completed, or so far as they are known."""
        return None

    def info(self) -> dict[str, Any]:
        """All of the above for ``x-kvmigrate-job``."""
        value: dict[str, Any] = {"kind": self.kind, "target": self.target, "status": self.status}
        view = self.progress()
        if view is not None:
            value["progress"] = {key.replace("_", "-"): found for key, found in asdict(view).items()}
        if self.error is not None:
            value["error"] = {"class": type(self.error).__name__, "desc": describe(self.error)}
        result = self.result()
        if result is not None:
            value["result"] = dict(result)
        return value


def describe(error: BaseException) -> str:
    """``error`` in one line for a person."""
    if isinstance(error, KvmigrateError):
        return str(error)
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (KVMIGRATE_TRACEBACK=1 shows where)"


class SnapshotJob(Job):
    """A snapshot of the guest while it runs."""

    kind = "snapshot"

    def __init__(self, machine: Migratable, directory: Path, parameters: SnapshotParameters, emit: Emit) -> None:
        super().__init__(str(directory))
        self._machine = machine
        self._directory = directory
        self._parameters = parameters
        self._emit = emit
        self._abort_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._progress: Progress | None = None
        self._result: SnapshotResult | None = None

    def work(self) -> None:
        """Take the snapshot; see :func:`save.take`."""
        from ..snapshot import save

        self._emit("X_KVMIGRATE_SNAPSHOT", {"status": ACTIVE})
        self._result = save.take(self._machine, self._directory, self._parameters, self, self._abort_fd)

    def tell_end(self) -> None:
        """See :meth:`Job.tell_end`."""
        why = {} if self.error is None else {"error-desc": describe(self.error)}
        self._emit("X_KVMIGRATE_SNAPSHOT", {"status": self.status, **why})

    def cancel(self, reason: KvmigrateError | None = None) -> None:
        """See :meth:`Job.cancel`."""
        if self._status == ACTIVE:
            self._status = CANCELLING
            os.eventfd_write(self._abort_fd, 1)

    def progress(self) -> ProgressView | None:
        return self._progress.view() if self._progress is not None else None

    def result(self) -> Mapping[str, Any] | None:
        return self._result.to_value() if self._result is not None else None

    def started(self, progress: Progress) -> None:
        """The observer's part: copying begins."""
        self._progress = progress

    def round_ended(self, record: RoundRecord, decision: Decision | None) -> None:
        """The observer's part: nothing to tell."""
