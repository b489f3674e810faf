"""No guest, and no state that was accepted, makes a device raise, hang or answer out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmigrate.devices import serial
from kvmigrate.devices.backends import Backend
from kvmigrate.devices.bus import Device, PioBus
from kvmigrate.devices.cmos import Cmos
from kvmigrate.devices.debug_exit import DebugExit
from kvmigrate.devices.end import GuestEnd
from kvmigrate.devices.i8042 import I8042
from kvmigrate.devices.port92 import Port92
from kvmigrate.devices.poweroff import PowerOff
from kvmigrate.devices.serial import Serial
from kvmigrate.errors import BadField


class FitfulBackend(Backend):
    """A line that takes as much as it likes: nothing, some or all."""

    def __init__(self, takes: list[int]) -> None:
        self._takes = takes
        self.taken = b""

    def write(self, data: bytes) -> int:
        size = min(len(data), self._takes.pop()) if self._takes else len(data)
        self.taken += data[:size]
        return size


def ignore_end(end: GuestEnd) -> None:
    assert 0 <= end.exit_status <= 255 and end.text


def new_serial(takes: list[int]) -> Device:
    return Serial(lambda level: None, FitfulBackend(takes))


KINDS: dict[str, tuple[Callable[[list[int]], Device], int]] = {
    "serial": (new_serial, 8),
    "cmos": (lambda takes: Cmos(1 << 30), 2),
    "i8042": (lambda takes: I8042(ignore_end), 5),
    "port92": (lambda takes: Port92(ignore_end), 1),
    "debug-exit": (lambda takes: DebugExit(ignore_end), 4),
    "poweroff": (lambda takes: PowerOff(ignore_end), 2),
}
INTEGERS = st.one_of(st.integers(0, 255), st.integers(-(2**63), 2**64 - 1))
VALUES = st.one_of(INTEGERS, st.booleans(), st.binary(max_size=20), st.binary(min_size=128, max_size=128), st.none())
ACCESSES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=60
)
TAKES = st.lists(st.integers(0, 3), max_size=40)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "TX_WAIT_S", 0)


def use(device: Device, nr_ports: int, accesses: list[tuple[bool, int, int, int]]) -> None:
    """What a guest, and the threads beside it, can do to a device."""
    bus = PioBus()
    bus.add(device, 0x100, nr_ports)
    for is_write, offset, size, value in accesses:
        if is_write:
            bus.write(0x100 + offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= bus.read(0x100 + offset, size) < 1 << 8 * size
        if isinstance(device, Serial):
            device.drain()
            device.fill(lambda most: b"i" * most)


@pytest.mark.parametrize("kind", KINDS)
@given(accesses=ACCESSES, takes=TAKES)
@settings(max_examples=60, deadline=None)
def test_no_guest_access_raises_and_state_survives_a_move(
    kind: str, accesses: list[tuple[bool, int, int, int]], takes: list[int]
) -> None:
    make, nr_ports = KINDS[kind]
    device, other = make(takes), make([])
    device.resume()
    use(device, nr_ports, accesses)
    device.pause()
    body = device.save()
    other.load(body)
    assert other.save() == body


@given(text=st.binary(max_size=100), takes=TAKES, drains=st.sets(st.integers(0, 99)))
@settings(max_examples=100, deadline=None)
def test_output_is_whole_and_in_order_whatever_the_line_takes(text: bytes, takes: list[int], drains: set[int]) -> None:
    backend = FitfulBackend(takes)
    uart = Serial(lambda level: None, backend)
    uart.resume()
    for at, value in enumerate(text):
        uart.write(0, 1, value)
        if at in drains:
            uart.drain()
        assert bool(uart.read(5, 1) & 0x20) == (len(backend.taken) == at + 1), "THRE tells whether all is out"
    while uart.tx_waiting():
        uart.drain()
    assert backend.taken == text


def mutations(body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The saved body with some fields changed: by value, and sometimes by type."""
    keys = st.sampled_from(sorted(body)) if body else st.just("surprise")
    return st.dictionaries(keys, VALUES, max_size=4).map(lambda changes: body | changes)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_state_is_refused_by_name_or_works_ever_after(kind: str, data: st.DataObject) -> None:
    make, nr_ports = KINDS[kind]
    device = make(data.draw(TAKES))
    before = device.save()
    body = data.draw(mutations(before))
    try:
        device.load(body)
    except BadField as error:
        assert device.name in str(error) and "\n" not in str(error)
        assert device.save() == before
        return
    assert device.save() == body
    device.resume()
    use(device, nr_ports, data.draw(ACCESSES))
    device.pause()
    assert make([]).load(device.save()) is None
    device.reset()
    use(device, nr_ports, data.draw(ACCESSES))


@pytest.mark.parametrize("kind", KINDS)
@given(body=st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner)))
@settings(max_examples=40, deadline=None)
def test_a_body_that_is_no_body_is_refused(kind: str, body: object) -> None:
    device = KINDS[kind][0]([])
    if body != device.save():
        with pytest.raises(BadField):
            device.load(body)
