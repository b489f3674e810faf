"""A bound on a phase of a migration: against a peer that is slow but not silent, which no timeout of one call sees."""

from __future__ import annotations

import threading
import time

from ..errors import KvmigrateError
from ..threads import Thread
from .abort import Abort

STEP_S = 0.1
"""How late it may be."""


class Watchdog:
    """Ends ``abort`` once the time of :meth:`bound` is over, unless :meth:`close` comes before.

    Its thread is there beforehand and looks at the clock now and then: one that is started or woken when the phase
    begins takes a processor and the interpreter just when a guest is to be paused (traced: 30 to 80 µs)."""

    def __init__(self, abort: Abort) -> None:
        self._abort = abort
        self._bound: tuple[float, KvmigrateError] | None = None
        self._closed = threading.Event()
        self._thread = Thread(self._run)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def bound(self, after_ms: float, error: KvmigrateError) -> None:
        """From now on it has so long."""
        self._bound = time.monotonic() + after_ms / 1e3, error

    def close(self) -> None:
        """The phase is over. Idempotent."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(STEP_S):
            if self._bound is not None and time.monotonic() >= self._bound[0]:
                self._abort.fire(self._bound[1])
                return
