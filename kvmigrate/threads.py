"""Threads of the machine's parts, whose start nobody waits for.

``threading.Thread.start`` returns when the new thread has run: until then both take turns at the interpreter and at the
processors, which took three threads of a restored machine as long as making its VM. Nothing here needs that: a part's
thread looks at what is wanted of it under a lock of the part, whenever it comes to that.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable


class Thread:
    """Runs ``body``, which raises nothing, once :meth:`start` is called; the process does not wait for it to end."""

    def __init__(self, body: Callable[[], object]) -> None:
        self._body = body
        self._native_id = 0
        self._begun = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()
        """Each is held until that has happened."""

    def start(self) -> None:
        """Start it, once. Raises :class:`RuntimeError` when the host gives no more threads: then it has ended."""
        self._begun.acquire()
        self._ended.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except BaseException:
            self._begun.release()
            self._ended.release()
            raise

    @property
    def native_id(self) -> int:
        """The kernel's id of it; waits until it runs."""
        with self._begun:
            return self._native_id

    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._ended.locked()

    def join(self, timeout_s: float = -1) -> None:
        """Wait until it is not alive, or for ``timeout_s``."""
        if self._ended.acquire(timeout=timeout_s):
            self._ended.release()

    def _run(self) -> None:
        try:
            self._native_id = _thread.get_native_id()
            self._begun.release()
            self._body()
        finally:
            self._ended.release()
