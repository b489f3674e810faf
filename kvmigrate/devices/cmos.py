"""The MC146818 real-time clock with its CMOS memory (Motorola MC146818A data sheet), at ports 0x70 and 0x71.

The clock shows the host's UTC plus an offset that the guest makes by setting it; the offset is what is saved, so time
goes on while a snapshot lies on disk and during a migration. BCD or binary and 12 or 24 hours are as register B says.
While its SET bit is on, the time stands still in the registers. There are no alarm, periodic or update interrupts:
their enable bits are kept, register C reads as zero.

The bytes that tell the size of memory are those that QEMU's PC firmware reads (hw/i386/pc.c): base memory in 0x15 and
0x16, extended memory in 0x17, 0x18, 0x30 and 0x31, memory over 16 MiB in 0x34 and 0x35, over 4 GiB in 0x5b to 0x5d.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ..errors import BadField
from ..memory.layout import HOLE_START
from ..state.section import Fields, Value
from .bus import Device

PORT = 0x70
NR_PORTS = 2
INDEX_OFFSET, DATA_OFFSET = 0, 1
RAM_BYTES = 128
NMI_DISABLED = 0x80
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
TIME_REGISTERS = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
A_UPDATING, A_KEPT, A_32KHZ_1024HZ = 0x80, 0x7F, 0x26
B_SET, B_BINARY, B_24_HOURS = 0x80, 0x04, 0x02
D_VALID = 0x80
HOURS_PM = 0x80
UPDATE_US = 244
MAX_OFFSET_S = 1100 * 366 * 86400
EARLIEST_S, LATEST_S = -62_000_000_000, 253_000_000_000
"""A little inside of what datetime can hold: the years 6 to 9987."""


def _host_time_ns() -> int:
    return time.time_ns()


class Cmos(Device):
    """``host_time_ns`` gives nanoseconds since 1970, UTC; a test may give another clock."""

    name = "cmos"

    def __init__(self, memory_bytes: int, nr_cpus: int = 1, host_time_ns: Callable[[], int] = _host_time_ns) -> None:
        self._host_time_ns = host_time_ns
        self._offset_s = 0
        self._index = REGISTER_D
        self._ram = bytearray(RAM_BYTES)
        self._ram[REGISTER_A] = A_32KHZ_1024HZ
        self._ram[REGISTER_B] = B_24_HOURS
        for index, value in memory_size_bytes(memory_bytes).items():
            self._ram[index] = value
        self._ram[0x5F] = nr_cpus - 1

    def read(self, offset: int, size: int) -> int:
        """The register that the index chose; the index itself cannot be read."""
        if offset == INDEX_OFFSET:
            return 0xFF
        index = self._index
        if index in TIME_REGISTERS and not self._standing():
            return self._encode(index, self._now())
        if index == REGISTER_A:
            return self._ram[REGISTER_A] | (A_UPDATING if self._updating() else 0)
        return {REGISTER_C: 0, REGISTER_D: D_VALID}.get(index, self._ram[index])

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the index, or the register that it chose."""
        if offset == INDEX_OFFSET:
            self._index = value & ~NMI_DISABLED & 0xFF
            return
        index, value = self._index, value & 0xFF
        if index in (REGISTER_C, REGISTER_D):
            return
        if index == REGISTER_B:
            self._write_control(value)
        elif index in TIME_REGISTERS and not self._standing():
            self._latch()
            self._ram[index] = value
            self._set_clock()
        else:
            self._ram[index] = value & A_KEPT if index == REGISTER_A else value

    def _write_control(self, value: int) -> None:
        was_standing = self._standing()
        if value & B_SET and not was_standing:
            self._latch()
        # The registers are in the format of the old control byte until the new one counts, and are set in that of
        # the new one: a guest that changes the format sets the time anew (data sheet, "Register B", DM).
        self._ram[REGISTER_B] = value
        if was_standing and not value & B_SET:
            self._set_clock()

    def _standing(self) -> bool:
        return bool(self._ram[REGISTER_B] & B_SET)

    def _time_ns(self) -> int:
        return self._host_time_ns() + self._offset_s * 1_000_000_000

    def _now(self) -> datetime:
        seconds = min(max(self._time_ns() // 1_000_000_000, EARLIEST_S), LATEST_S)
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)

    def _updating(self) -> bool:
        """UIP is on for the last 244 us before each second, so that a guest that sees it off has that long to read."""
        to_next_us = 1_000_000 - self._time_ns() % 1_000_000_000 // 1000
        return not self._standing() and to_next_us <= UPDATE_US

    def _latch(self) -> None:
        """Write the time into the registers."""
        now = self._now()
        for index in TIME_REGISTERS:
            self._ram[index] = self._encode(index, now)

    def _set_clock(self) -> None:
        """Make the registers the time. What is no date counts on from the month's first day, as far as there is one."""
        year = self._decode(CENTURY) * 100 + self._decode(YEAR)
        month = min(max(self._decode(MONTH), 1), 12)
        wanted = datetime(min(max(year, 1000), 2999), month, 1, tzinfo=UTC) + timedelta(
            days=self._decode(DAY) - 1,
            hours=self._decode_hours(),
            minutes=self._decode(MINUTES),
            seconds=self._decode(SECONDS),
        )
        wanted_s = (wanted - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
        offset_s = wanted_s - self._host_time_ns() // 1_000_000_000
        self._offset_s = min(max(offset_s, -MAX_OFFSET_S), MAX_OFFSET_S)

    def _encode(self, index: int, now: datetime) -> int:
        value = {
            SECONDS: now.second,
            MINUTES: now.minute,
            HOURS: now.hour,
            WEEKDAY: now.isoweekday() % 7 + 1,
            DAY: now.day,
            MONTH: now.month,
            YEAR: now.year % 100,
            CENTURY: now.year // 100,
        }[index]
        afternoon = index == HOURS and not self._ram[REGISTER_B] & B_24_HOURS and value >= 12
        if index == HOURS and not self._ram[REGISTER_B] & B_24_HOURS:
            value = (value - 1) % 12 + 1
        encoded = value if self._ram[REGISTER_B] & B_BINARY else value // 10 << 4 | value % 10
        return encoded | (HOURS_PM if afternoon else 0)

    def _decode(self, index: int, mask: int = 0xFF) -> int:
        value = self._ram[index] & mask
        return value if self._ram[REGISTER_B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _decode_hours(self) -> int:
        if self._ram[REGISTER_B] & B_24_HOURS:
            return self._decode(HOURS)
        afternoon = self._ram[HOURS] & HOURS_PM
        return self._decode(HOURS, ~HOURS_PM & 0xFF) % 12 + (12 if afternoon else 0)

    def save(self) -> dict[str, Value]:
        return {"index": self._index, "offset_s": self._offset_s, "ram": bytes(self._ram)}

    def load(self, body: Value) -> None:
        """See :meth:`Device.load`. The memory is the guest's own and may hold anything; only UIP is never stored."""
        fields = Fields(body, self.name)
        index = fields.integer("index", 0, RAM_BYTES - 1)
        offset_s = fields.integer("offset_s", -MAX_OFFSET_S, MAX_OFFSET_S)
        ram = fields.blob("ram", RAM_BYTES, exact=True)
        fields.done()
        if ram[REGISTER_A] & A_UPDATING:
            raise BadField(f"{self.name}: register A has UIP set, which is never stored")
        self._index, self._offset_s, self._ram = index, offset_s, bytearray(ram)

    def reset(self) -> None:
        """As RESET# does: the interrupt enables go off; time and memory stay, they have a battery."""
        self._ram[REGISTER_B] &= B_SET | B_BINARY | B_24_HOURS | 1
        self._index = REGISTER_D


def memory_size_bytes(memory_bytes: int) -> dict[int, int]:
    """CMOS index → value, of all bytes that tell the size of memory."""
    below_hole = min(memory_bytes, HOLE_START)
    base_kib = min(below_hole >> 10, 640)
    extended_kib = min(max(below_hole - (1 << 20), 0) >> 10, 0xFFFF)
    over_16m = min(max(below_hole - (16 << 20), 0) >> 16, 0xFFFF)
    over_4g = min((memory_bytes - below_hole) >> 16, 0xFFFFFF)
    words = {0x15: base_kib, 0x17: extended_kib, 0x30: extended_kib, 0x34: over_16m}
    found = {index + at: value >> 8 * at & 0xFF for index, value in words.items() for at in range(2)}
    return found | {0x5B + at: over_4g >> 8 * at & 0xFF for at in range(3)}
