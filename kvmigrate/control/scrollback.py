"""The last output of a serial port, for any number of readers, each at a place of its own."""

from __future__ import annotations

import threading

KEPT_BYTES = 1 << 16


class Scrollback:
    """Keeps the last ``KEPT_BYTES`` at least, at most twice as many. Places count the bytes since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._start = 0

    def append(self, data: bytes) -> None:
        """Add ``data``; a bounded moment, whoever reads."""
        with self._lock:
            self._kept += data
            if len(self._kept) > 2 * KEPT_BYTES:
                surplus = len(self._kept) - KEPT_BYTES
                del self._kept[:surplus]
                self._start += surplus

    @property
    def end(self) -> int:
        """The place behind the last byte."""
        with self._lock:
            return self._start + len(self._kept)

    @property
    def replay(self) -> int:
        """The place at which somebody who comes now begins: ``KEPT_BYTES`` back, or all there was."""
        with self._lock:
            return self._start + max(len(self._kept) - KEPT_BYTES, 0)

    def read(self, place: int, most: int) -> tuple[int, bytes]:
        """How many bytes from ``place`` on are not kept any more, and at most ``most`` of those after them."""
        with self._lock:
            lost = max(self._start - place, 0)
            at = place + lost - self._start
            return lost, bytes(self._kept[at : at + most])
