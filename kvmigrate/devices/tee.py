"""A back-end with a listener beside it: who attaches to a running guest's serial port hears what its back-end gets.

The back-end sets the pace, as it does alone. The listener may not: it takes each byte at once, and what it does with it
is in nobody's way. Input may come from both. A guest does not wait for its listener: what it says before there is one
is kept.
"""

from __future__ import annotations

import threading
from typing import Protocol

from .backends import Backend, Uart

KEPT_BYTES = 1 << 16
"""How much at least of the newest output is kept for a listener that comes late."""


class Listener(Protocol):
    """Who hears along. Both are called by any thread, most with the UART's lock held, and must return at once."""

    def heard(self, data: bytes) -> None: ...
    def wake(self) -> None: ...


class Tee(Backend):
    """``backend``, and whoever listens."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._listener: Listener | None = None
        self._unheard = bytearray()
        self._lock = threading.Lock()
        self.uart: Uart | None = None

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` the newest of what was said so far, and everything from now on."""
        with self._lock:
            listener.heard(bytes(self._unheard))
            self._unheard.clear()
            self._listener = listener

    def attach(self, uart: Uart) -> None:
        """See :meth:`Backend.attach`."""
        self.uart = uart
        self._backend.attach(uart)

    def write(self, data: bytes) -> int:
        """See :meth:`Backend.write`; what the back-end takes, the listener hears, once."""
        taken = self._backend.write(data)
        if taken:
            self._tell(data[:taken])
        return taken

    @property
    def socket_fd(self) -> int:
        return self._backend.socket_fd

    def was_sent(self, data: bytes) -> None:
        """See :meth:`Backend.was_sent`."""
        self._tell(data)

    def _tell(self, data: bytes) -> None:
        with self._lock:
            if self._listener is not None:
                self._listener.heard(data)
                return
            self._unheard += data
            if len(self._unheard) > 2 * KEPT_BYTES:
                del self._unheard[:-KEPT_BYTES]

    def wake(self) -> None:
        self._backend.wake()
        if self._listener is not None:
            self._listener.wake()

    def close(self) -> None:
        """See :meth:`Backend.close`; the listener has heard all of it then."""
        if self.uart is not None:
            self.uart.finish()
        self._backend.close()
