"""A back-end with a listener beside it: who attaches to a running guest's serial port hears what its back-end gets.

The back-end sets the pace, as it does alone. The listener may not: it takes each byte at once, and what it does with it
is in nobody's way. Input may come from both.
"""

from __future__ import annotations

from typing import Protocol

from .backends import Backend, Uart


class Listener(Protocol):
    """Who hears along. Both are called with the UART's lock held, by any thread, and must return at once."""

    def heard(self, data: bytes) -> None: ...
    def wake(self) -> None: ...


class Tee(Backend):
    """``backend``, and whoever listens."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._listener: Listener | None = None
        self.uart: Uart | None = None

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` everything from now on."""
        self._listener = listener

    def attach(self, uart: Uart) -> None:
        """See :meth:`Backend.attach`."""
        self.uart = uart
        self._backend.attach(uart)

    def write(self, data: bytes) -> int:
        """See :meth:`Backend.write`; what the back-end takes, the listener hears, once."""
        taken = self._backend.write(data)
        if taken and self._listener is not None:
            self._listener.heard(data[:taken])
        return taken

    def wake(self) -> None:
        self._backend.wake()
        if self._listener is not None:
            self._listener.wake()

    def close(self) -> None:
        """See :meth:`Backend.close`; the listener has heard all of it then."""
        if self.uart is not None:
            self.uart.finish()
        self._backend.close()
