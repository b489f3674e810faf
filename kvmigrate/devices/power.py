"""What stands behind our ACPI tables (ACPI 6.5): the generic event device, sleep and reset, all by port I/O.

The machine is of the hardware-reduced kind (4.1): no PM timer, no SCI, no fixed power button. ::

    0x608  sleep control (4.8.3.7): SLP_EN (bit 5) with type 5 in bits 2 to 4 powers the guest off
    0x609  sleep status: reads zero, writes vanish, since the guest never sleeps
    0x60a  reset: any write asks for a reset
    0x60c  four bytes: the events that happened since the last read, which clears them; each raises interrupt 9

Events are the power button (bit 0) and a new generation of the machine (bit 1): see boot/acpi.py for the methods that
read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import BadField
from ..state.section import Fields, Value
from .bus import Device
from .end import EndCallback, GuestEnd

PORT, NR_PORTS = 0x608, 8
SLEEP_CONTROL, SLEEP_STATUS, RESET, EVENTS = 0, 1, 2, 4
EVENT_BYTES = 4
IRQ = 9
SLP_EN, SLP_TYP, SLP_TYP_SHIFT = 1 << 5, 7 << 2, 2
SLEEP_TYPE_OFF = 5
POWER_BUTTON, NEW_GENERATION = 1 << 0, 1 << 1
ALL_EVENTS = POWER_BUTTON | NEW_GENERATION


class Power(Device):
    """``irq`` sets the level of the interrupt line; ``end`` is told that the guest powered off or wants a reset."""

    name = "power"
    max_access_bytes = 4

    def __init__(self, end: EndCallback, irq: Callable[[bool], None]) -> None:
        self._end = end
        self._irq = irq
        self._lock = threading.Lock()
        self._events = 0

    def raise_event(self, event: int) -> None:
        """Let the guest know of ``event``: POWER_BUTTON or NEW_GENERATION. From any thread."""
        with self._lock:
            self._events |= event
            # An edge: the line goes down first in case that the last event has not been read yet.
            self._irq(False)
            self._irq(True)

    def read(self, offset: int, size: int) -> int:
        """The events, which are then over; everything else reads zero."""
        if offset != EVENTS or size != EVENT_BYTES:
            return 0
        with self._lock:
            events, self._events = self._events, 0
            self._irq(False)
        return events

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == RESET:
            self._end(GuestEnd.reset("ACPI reset register"))
        elif offset == SLEEP_CONTROL and value & SLP_EN and (value & SLP_TYP) >> SLP_TYP_SHIFT == SLEEP_TYPE_OFF:
            self._end(GuestEnd.powered_off())

    def resume(self) -> None:
        with self._lock:
            # As the serial port does: the chips were restored without knowing who drives their pins.
            self._irq(bool(self._events))

    def save(self) -> dict[str, Value]:
        with self._lock:
            return {"events": self._events}

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`."""
        fields = Fields(body, self.name)
        events = fields.integer("events", 0, 0xFFFFFFFF)
        fields.done()
        if events & ~ALL_EVENTS:
            raise BadField(f"{self.name}: events is {events:#x}: there are the bits {ALL_EVENTS:#x} only")
        with self._lock:
            self._events = events

    def reset(self) -> None:
        with self._lock:
            self._events = 0
            self._irq(False)
