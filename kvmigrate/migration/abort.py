"""Stopping a blocked migration from another thread: an eventfd that every blocking call watches, and the reason."""

from __future__ import annotations

import os
import select
import threading

from ..errors import KvmigrateError


class Abort:
    """Fired at most once; whoever blocks on :attr:`fd` wakes up and raises the reason by :meth:`check`.

    :meth:`disarm` is the point of no return: whatever fires later is refused and wakes nobody.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._error: KvmigrateError | None = None
        self._armed = True

    def fire(self, error: KvmigrateError) -> bool:
        """Stop with ``error``; False when it is too late. A second reason changes nothing."""
        with self._lock:
            if not self._armed:
                return False
            if self._error is None:
                self._error = error
                os.eventfd_write(self.fd, 1)
            return True

    def check(self) -> None:
        """Raise the reason if there is one."""
        if self._error is not None:
            raise self._error

    def disarm(self) -> None:
        """Raise the reason if there is one; from here on :meth:`fire` is refused."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._armed = False

    def sleep(self, for_ms: float) -> None:
        """Wait ``for_ms``; raises the reason as soon as there is one."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(for_ms)
        self.check()

    def close(self) -> None:
        """Give the eventfd back; only when nobody blocks on it any more. Idempotent."""
        with self._lock:
            self._armed = False
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
