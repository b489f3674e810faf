"""Touching guest memory ahead of the pages that are about to arrive: by a thread of its own, or before a guest comes.

The first touch of memory is what a destination spends most of its time on: the kernel has to clear each huge page, and
a virtual host has to be given it by its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..config import MemoryBackend
from ..errors import HostError
from .region import HUGE_PAGES, STEP_PAGES, GuestMemory


class Prefault:
    """Touches ``runs`` (first gfn, number of pages) of ``memory`` until it is done or stopped. It changes no byte, so
    that others may write to the same pages meanwhile. :meth:`stop` it before the memory is closed.

    Pages arrive from the lowest gfn up; this goes from the highest down, so that both share the work and meet somewhere
    in the middle."""

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


class SpareMemory:
    """RAM of ``size_bytes`` that is touched before it is known whose it will be. Raises what :class:`GuestMemory`
    raises, and :class:`HostError` when the host has no room for it."""

    def __init__(self, size_bytes: int, backend: MemoryBackend = MemoryBackend.ANONYMOUS) -> None:
        self._backend = backend
        self._memory: GuestMemory | None = GuestMemory(size_bytes, backend)
        self.touched_bytes = size_bytes
        """What is in use for the guest already, whether it has come or not; 0 once that was given back."""
        try:
            for slot in self._memory.slots:
                # In pieces, so that a signal is not left waiting for all of it.
                for first in range(0, slot.nr_pages, STEP_PAGES):
                    self._memory.prefault(slot.base_gfn + first, min(STEP_PAGES, slot.nr_pages - first))
        except BaseException:
            self.close()
            raise

    def take(self, size_bytes: int) -> GuestMemory:
        """Memory for one guest: this, if it is as large and not taken yet; else new memory, and this is given back."""
        if self._memory is not None and self._memory.size_bytes == size_bytes:
            memory, self._memory = self._memory, None
            return memory
        self.close()
        return GuestMemory(size_bytes, self._backend)

    def close(self) -> None:
        """Give back what nobody took. Idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
            self.touched_bytes = 0
