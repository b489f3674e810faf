"""isa-debug-exit: a port by which a test guest ends with an exit status of its own.

Ports 0xf4 to 0xf7, as test guests written for ``-device isa-debug-exit,iobase=0xf4,iosize=4`` use it. A write of 1, 2
or 4 bytes with the value ``code`` ends the guest with exit status ``(code << 1) | 1`` modulo 256; reads give zero.
"""

from __future__ import annotations

from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

PORT = 0xF4
NR_PORTS = 4


class DebugExit(Device):
    """Holds no state: its section is an empty map."""

    name = "debug-exit"
    max_access_bytes = 4

    def __init__(self, end: EndCallback) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._end(GuestEnd.debug_exit(value))

    def save(self) -> dict[str, Value]:
        return {}

    def load(self, body: Value) -> None:
        Fields(body, self.name).done()

    def reset(self) -> None:
        pass
