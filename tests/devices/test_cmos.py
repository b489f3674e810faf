"""The real-time clock and the CMOS memory."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from kvmigrate.devices.cmos import Cmos
from kvmigrate.errors import BadField

NOON = datetime(2026, 2, 28, 23, 59, 58, tzinfo=UTC)
TIME = {"second": 0, "minute": 2, "hour": 4, "weekday": 6, "day": 7, "month": 8, "year": 9, "century": 0x32}


class Clock:
    """The host's clock, in a test's hand, and the CMOS that runs by it."""

    def __init__(self, start: datetime = NOON) -> None:
        self.ns = int(start.timestamp()) * 10**9
        self.cmos = Cmos(1 << 30, 4, lambda: self.ns)

    def wait(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)

    def get(self, index: int) -> int:
        self.cmos.write(0, 1, index)
        return self.cmos.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.cmos.write(0, 1, index)
        self.cmos.write(1, 1, value)

    def time(self) -> dict[str, int]:
        return {name: self.get(index) for name, index in TIME.items()}

    def set_time(self, control: int, **values: int) -> None:
        """As a driver does: stop the clock with SET, write, start it."""
        self.put(0x0B, control | 0x80)
        for name, value in values.items():
            self.put(TIME[name], value)
        self.put(0x0B, control)


def bcd(**values: int) -> dict[str, int]:
    return {name: int(str(value), 16) for name, value in values.items()}


def test_time_is_the_hosts_in_bcd_and_24_hours() -> None:
    clock = Clock()
    wanted = bcd(second=58, minute=59, hour=23, weekday=7, day=28, month=2, year=26, century=20)
    assert clock.time() == wanted
    clock.wait(2)
    assert clock.time() == bcd(second=0, minute=0, hour=0, weekday=1, day=1, month=3, year=26, century=20)


@pytest.mark.parametrize(("hour", "encoded"), [(0, 12), (1, 1), (11, 11), (12, 0x80 | 12), (13, 0x81), (23, 0x80 | 11)])
def test_binary_12_hours_have_their_pm_bit(hour: int, encoded: int) -> None:
    clock = Clock(NOON.replace(hour=hour))
    clock.put(0x0B, 0x04)
    assert clock.get(4) == encoded
    clock.put(0x0B, 0x00)
    assert clock.get(4) == (encoded & 0x80) | int(str(encoded & 0x7F), 16)


@pytest.mark.parametrize("control", [0x00, 0x02, 0x04, 0x06])
def test_a_time_that_is_set_goes_on_from_there_in_every_format(control: int) -> None:
    clock, reference = Clock(), Clock(datetime(2031, 12, 31, 22, 58, 59, tzinfo=UTC))
    reference.put(0x0B, control)
    clock.set_time(control, **reference.time())
    clock.wait(62)
    reference.wait(62)
    assert clock.time() == reference.time()


def test_the_offset_and_not_the_time_is_saved() -> None:
    clock = Clock()
    clock.set_time(0x02, **bcd(hour=12, minute=0, second=0))
    later = Clock()
    later.wait(3600)
    later.cmos.load(clock.cmos.save())
    assert (later.get(4), later.get(2), later.get(0)) == (0x13, 0, 0)


def test_set_holds_the_time_still() -> None:
    clock = Clock()
    clock.put(0x0B, 0x82)
    clock.wait(100)
    assert clock.get(0) == 0x58 and not clock.get(0x0A) & 0x80
    clock.put(0x0B, 0x02)
    assert clock.get(0) == 0x58, "and goes on from there"


def test_update_flag_is_up_only_just_before_the_second() -> None:
    clock = Clock()
    assert not clock.get(0x0A) & 0x80
    clock.wait(0.9997)
    assert not clock.get(0x0A) & 0x80
    clock.wait(0.0002)
    assert clock.get(0x0A) & 0x80
    clock.wait(0.0002)
    assert clock.get(0x0A) == 0x26 and clock.get(0) == 0x59


def test_status_d_says_that_the_battery_is_good() -> None:
    clock = Clock()
    clock.put(0x0D, 0)
    assert (clock.get(0x0C), clock.get(0x0D)) == (0, 0x80)


def test_nonsense_is_counted_on_as_a_date() -> None:
    clock = Clock()
    clock.set_time(0x06, month=99, day=255, hour=255, minute=255, second=255, year=255, century=255)
    clock.set_time(0x02, month=0, day=0, hour=0xFF, minute=0xFF, second=0xFF, year=0xFF, century=0)
    assert set(clock.time()) == set(TIME)


def test_memory_keeps_what_is_written() -> None:
    clock = Clock()
    clock.put(0x40, 0xA5)
    clock.put(0x80 | 0x41, 0x5A)
    assert (clock.get(0x40), clock.get(0x41)) == (0xA5, 0x5A), "bit 7 of the index masks NMI"


# What QEMU 7.2 -M pc -m SIZE has in these bytes, read through its monitor (o /b 0x70 INDEX; i /b 0x71).
SIZES = {
    1: (640, 0, 0, 0),
    16: (640, 15 * 1024, 0, 0),
    64: (640, 63 * 1024, 48 * 16, 0),
    1024: (640, 0xFFFF, 1008 * 16, 0),
    3072: (640, 0xFFFF, 3056 * 16, 0),
    4096: (640, 0xFFFF, 3056 * 16, 16 * 1024),
}


@pytest.mark.parametrize(("mib", "wanted"), SIZES.items())
def test_memory_size_is_where_firmware_looks_for_it(mib: int, wanted: tuple[int, int, int, int]) -> None:
    cmos = Cmos(mib << 20)

    def number(*indices: int) -> int:
        value = 0
        for at, index in enumerate(indices):
            cmos.write(0, 1, index)
            value |= cmos.read(1, 1) << 8 * at
        return value

    assert (number(0x15, 0x16), number(0x17, 0x18), number(0x34, 0x35), number(0x5B, 0x5C, 0x5D)) == wanted
    assert number(0x30, 0x31) == wanted[1]


def test_cpu_count_is_where_firmware_looks_for_it() -> None:
    assert Clock().get(0x5F) == 3


@pytest.mark.parametrize(
    "change",
    [{"index": 128}, {"ram": bytes(127)}, {"ram": b"\xff" * 128}, {"offset_s": 10**12}, {"offset_s": -(10**12)}],
)
def test_bad_state_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    clock = Clock()
    before = clock.cmos.save()
    with pytest.raises(BadField, match="cmos"):
        clock.cmos.load(before | change)
    assert clock.cmos.save() == before
