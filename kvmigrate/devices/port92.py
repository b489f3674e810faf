"""System control port A (port 0x92) of the PS/2: a fast reset and the A20 gate.

Writing bit 0 as one when it was zero resets the machine. Bit 1, A20, is kept and read back, but does not mask
addresses: the guest starts with A20 on, and nothing written in this century turns it off.
"""

from __future__ import annotations

from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

PORT = 0x92
NR_PORTS = 1
RESET, A20 = 1 << 0, 1 << 1


class Port92(Device):
    """``control`` is the register as it was written last."""

    name = "port92"

    def __init__(self, end: EndCallback) -> None:
        self._end = end
        self._control = A20

    def read(self, offset: int, size: int) -> int:
        return self._control

    def write(self, offset: int, size: int, value: int) -> None:
        asked = value & ~self._control & RESET
        self._control = value & 0xFF
        if asked:
            self._end(GuestEnd.reset("port 0x92"))

    def save(self) -> dict[str, Value]:
        return {"control": self._control}

    def load(self, body: Value) -> None:
        fields = Fields(body, self.name)
        control = fields.integer("control", 0, 0xFF)
        fields.done()
        self._control = control

    def reset(self) -> None:
        self._control = A20
