"""The registers behind the ACPI tables: sleep, reset, and the events of which the guest is told by an interrupt."""

from __future__ import annotations

import pytest

from kvmigrate.devices.end import CRASH, GuestEnd
from kvmigrate.devices.power import NEW_GENERATION, POWER_BUTTON, Power
from kvmigrate.devices.pvpanic import PvPanic
from kvmigrate.errors import BadField


@pytest.fixture
def ends() -> list[GuestEnd]:
    return []


@pytest.fixture
def levels() -> list[bool]:
    return []


@pytest.fixture
def power(ends: list[GuestEnd], levels: list[bool]) -> Power:
    return Power(ends.append, levels.append)


def test_sleep_enable_with_type_5_powers_off(power: Power, ends: list[GuestEnd]) -> None:
    power.write(0, 1, 1 << 5 | 5 << 2)
    assert ends == [GuestEnd.powered_off()]


@pytest.mark.parametrize("value", [0, 5 << 2, 1 << 5, 1 << 5 | 3 << 2])
def test_another_sleep_type_does_nothing(power: Power, ends: list[GuestEnd], value: int) -> None:
    power.write(0, 1, value)
    assert ends == []


def test_the_reset_register_asks_for_a_reset(power: Power, ends: list[GuestEnd]) -> None:
    power.write(2, 1, 1)
    assert [end.kind for end in ends] == ["reset"]


def test_an_event_makes_an_edge_and_is_read_once(power: Power, levels: list[bool]) -> None:
    power.raise_event(POWER_BUTTON)
    assert levels == [False, True]
    power.raise_event(NEW_GENERATION)
    assert levels == [False, True, False, True], "an edge of its own, though the first event was not read yet"
    assert power.read(4, 4) == POWER_BUTTON | NEW_GENERATION
    assert power.read(4, 4) == 0 and not levels[-1]


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 1), (7, 1)])
def test_other_reads_are_zero_and_take_no_event(power: Power, offset: int, size: int) -> None:
    power.raise_event(POWER_BUTTON)
    assert power.read(offset, size) == 0
    assert power.read(4, 4) == POWER_BUTTON


def test_an_unread_event_arrives_with_its_interrupt(power: Power, ends: list[GuestEnd]) -> None:
    power.raise_event(POWER_BUTTON)
    there: list[bool] = []
    moved = Power(ends.append, there.append)
    moved.load(power.save())
    moved.resume()
    assert there == [True]
    assert moved.read(4, 4) == POWER_BUTTON


def test_an_event_that_there_is_not_is_refused(power: Power) -> None:
    power.raise_event(NEW_GENERATION)
    with pytest.raises(BadField, match="events is 0x4"):
        power.load({"events": 4})
    assert power.save() == {"events": NEW_GENERATION}


def test_a_reset_forgets_events(power: Power, levels: list[bool]) -> None:
    power.raise_event(POWER_BUTTON)
    power.reset()
    assert power.save() == {"events": 0} and not levels[-1]


def test_a_panic_ends_the_guest_as_a_crash(ends: list[GuestEnd]) -> None:
    panic = PvPanic(ends.append)
    assert panic.read(0, 1) == 1
    panic.write(0, 1, 2)
    assert ends == []
    panic.write(0, 1, 1)
    assert [(end.kind, end.exit_status) for end in ends] == [(CRASH, 4)]
