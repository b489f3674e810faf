"""The UART's saved state: what of it is taken, by the core and by the checks that say what is wrong, and its bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate._core import lib
from kvmigrate.devices.backends import Backend
from kvmigrate.devices.serial import Serial
from kvmigrate.errors import BadField, BadVersion, StreamError
from kvmigrate.state.section import Section, encode, pack, unpack

GOOD = Serial(lambda level: None, Backend()).save()
BAD = {
    "fifo too long": {"rx": b"x" * 17, "fcr": 0x01},
    "more than one byte without FIFO": {"rx": b"xy", "fcr": 0},
    "transmit queue too long": {"tx": b"x" * 4097},
    "trigger without FIFO": {"fcr": 0xC0},
    "a bit that is not kept": {"fcr": 0x03},
    "interrupt enable of five bits": {"ier": 0x10},
    "modem control of six bits": {"mcr": 0x20},
    "delta of five bits": {"msr_delta": 0x10},
    "divisor of 17 bits": {"divisor": 0x10000},
    "negative": {"lcr": -1},
    "a number for a truth": {"overrun": 1},
    "a truth for a number": {"scr": True},
    "text for bytes": {"rx": "x"},
    "empty transmitter with bytes in it": {"thre_pending": True, "tx": b"x"},
    "an unknown field": {"parity": 0},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_state_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    uart = Serial(lambda level: None, Backend())
    uart.load(GOOD | {"scr": 7})
    with pytest.raises(BadField, match="serial0"):
        uart.load(GOOD | change)
    assert uart.save() == GOOD | {"scr": 7}
    with pytest.raises(BadField, match="serial0"):
        uart.load_section(Section("serial0", 1, pack(GOOD | change)))
    assert uart.save() == GOOD | {"scr": 7}


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_field_is_refused(key: str) -> None:
    uart = Serial(lambda level: None, Backend())
    with pytest.raises(BadField, match=key):
        uart.load({name: value for name, value in GOOD.items() if name != key})


bytes_of_any_size = st.integers(0, 17) | st.sampled_from([255, 256, 4096, 4097])
rows = st.builds(lambda size, byte: bytes([byte]) * size, bytes_of_any_size, st.integers(0, 255))
near = st.integers(-1, 0x21) | st.sampled_from([0x80, 0xC1, 0xC9, 0xFF, 0x100, 0xFFFF, 0x10000, 2**64 - 1])
truths = st.booleans() | st.sampled_from([0, 1, None])
changes = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("divisor", "ier", "fcr", "lcr", "mcr", "msr_delta", "scr"), near)
    | dict.fromkeys(("overrun", "thre_pending"), truths)
    | dict.fromkeys(("rx", "tx"), rows),
)


@given(change=changes)
def test_the_core_takes_what_the_checks_take_and_nothing_else(change: dict[str, Any]) -> None:
    checked, taken = (Serial(lambda level: None, Backend()) for _ in range(2))
    packed = pack(GOOD | change)
    rc = lib.kmig_uart_load(taken.handle, packed, len(packed))
    try:
        checked.load(GOOD | change)
    except BadField:
        assert rc < 0 and taken.save() == GOOD
        return
    assert rc == 0 and taken.save() == checked.save() == GOOD | change
    assert taken.packed() == packed == pack(taken.save()), "byte for byte as the msgpack library has it"


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_section_is_refused_or_loads_as_the_library_reads_it(at: int, byte: int, cut: bool) -> None:
    uart = Serial(lambda level: None, Backend())
    packed = bytearray(pack(GOOD | {"fcr": 1, "rx": b"abc", "tx": b"waits", "scr": 200}))
    at %= len(packed)
    packed[at:] = b"" if cut else bytes([byte]) + packed[at + 1 :]
    try:
        uart.load_section(Section("serial0", 1, bytes(packed)))
    except StreamError:
        assert uart.save() == GOOD
        return
    assert uart.save() == unpack(bytes(packed), "a UART")


def test_the_wire_has_what_it_had_since_the_first_version() -> None:
    uart = Serial(lambda level: None, Backend())
    body: dict[str, Any] = {"divisor": 1, "ier": 5, "fcr": 0xC1, "lcr": 3, "mcr": 11, "msr_delta": 0, "scr": 7}
    body |= {"overrun": False, "thre_pending": True, "rx": b"ab", "tx": b""}
    text = (
        b"\x83\xa4name\xa7serial0\xa7version\x01\xa4body\x8b\xa7divisor\x01\xa3ier\x05\xa3fcr\xcc\xc1\xa3lcr\x03\xa3mcr\x0b"
        b"\xa9msr_delta\x00\xa3scr\x07\xa7overrun\xc2\xacthre_pending\xc3\xa2rx\xc4\x02ab\xa2tx\xc4\x00"
    )
    uart.load(body)
    assert encode(uart.section()) == text


def test_the_largest_state_has_room_in_a_section() -> None:
    most: dict[str, Any] = {"divisor": 0xFFFF, "fcr": 0xC9, "lcr": 0xFF, "scr": 0xFF}
    most |= {"rx": b"r" * 16, "tx": b"t" * 4096}
    uart = Serial(lambda level: None, Backend())
    uart.load_section(Section("serial0", 1, pack(GOOD | most)))
    assert uart.packed() == pack(GOOD | most)


def test_a_section_of_a_later_version_is_refused() -> None:
    uart = Serial(lambda level: None, Backend())
    with pytest.raises(BadVersion, match="serial0"):
        uart.load_section(Section("serial0", 2, GOOD | {"scr": 7}))
    assert uart.save() == GOOD
