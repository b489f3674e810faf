"""pvpanic (QEMU docs/specs/pvpanic.rst): the port by which a guest's kernel tells that it has panicked.

A read of port 0x505 gives the events that are understood, a write tells of them: bit 0 is a panic; bit 1, that the
guest goes on by itself to load a crash kernel, is not offered.
"""

from __future__ import annotations

from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

PORT, NR_PORTS = 0x505, 1
PANICKED = 1 << 0


class PvPanic(Device):
    """Holds no state: its section is an empty map."""

    name = "pvpanic"

    def __init__(self, end: EndCallback) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        return PANICKED

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PANICKED:
            self._end(GuestEnd.crashed("the guest's kernel panicked: its console says why"))

    def save(self) -> dict[str, Value]:
        return {}

    def load(self, body: Value) -> None:
        Fields(body, self.name).done()

    def reset(self) -> None:
        pass
