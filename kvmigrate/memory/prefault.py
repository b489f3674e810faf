"""Touching guest memory ahead of the pages that are about to arrive, by a thread of its own.

The first touch of memory is what a destination spends most of its time on: the kernel has to clear each huge page, and
a virtual host has to be given it by its own. Pages arrive from the lowest gfn up; this goes from the highest down, so
that both share the work and meet somewhere in the middle.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..errors import HostError
from .region import HUGE_PAGES, GuestMemory


class Prefault:
    """Touches ``runs`` (first gfn, number of pages) of ``memory`` until it is done or stopped. It changes no byte, so
    that others may write to the same pages meanwhile. :meth:`stop` it before the memory is closed."""

    def __init__(self, memory: GuestMemory, runs: Sequence[tuple[int, int]]) -> None:
        self._memory = memory
        self._runs = runs
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Come to an end within about a millisecond, and wait for it. Idempotent."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            for gfn, nr_pages in reversed(self._runs):
                for first in reversed(range(gfn, gfn + nr_pages, HUGE_PAGES)):
                    if self._stopped:
                        return
                    self._memory.prefault(first, min(HUGE_PAGES, gfn + nr_pages - first))
        except HostError:
            # A kernel before 5.14 cannot do it, or there is no room: pages are then touched when they arrive.
            return
