"""Power-off by the ACPI control register PM1a_CNT (ACPI 6.5, 4.8.3.2.1), at port 0x604 where QEMU's q35 has it.

A write that sets SLP_EN (bit 13), such as ``outw(0x2000, 0x604)``, powers the guest off. The sleep type (bits 10 to 12)
is not looked at: this machine has no other sleep state than S5, whose type is 0. Bit 0, SCI_EN, reads as one: there is
no system management mode to hand the hardware over from.
"""

from __future__ import annotations

from ..errors import BadField
from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

PORT = 0x604
NR_PORTS = 2
SCI_EN = 1 << 0
SLP_TYP = 7 << 10
SLP_EN = 1 << 13
KEPT = 0xFFFF & ~SLP_EN


class PowerOff(Device):
    """``control`` is the register as it reads: SLP_EN is write-only and SCI_EN always set."""

    name = "poweroff"
    max_access_bytes = 2

    def __init__(self, end: EndCallback) -> None:
        self._end = end
        self._control = SCI_EN

    def read(self, offset: int, size: int) -> int:
        return self._control >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        mask = ((1 << 8 * size) - 1) << 8 * offset & 0xFFFF
        written = self._control & ~mask | value << 8 * offset & mask
        self._control = written & KEPT | SCI_EN
        if written & SLP_EN:
            self._end(GuestEnd.powered_off())

    def save(self) -> dict[str, Value]:
        return {"control": self._control}

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`."""
        fields = Fields(body, self.name)
        control = fields.integer("control", 0, 0xFFFF)
        fields.done()
        if control & SLP_EN or not control & SCI_EN:
            raise BadField(f"{self.name}: control is {control:#x}, but SLP_EN never reads as one, SCI_EN always")
        self._control = control

    def reset(self) -> None:
        self._control = SCI_EN
