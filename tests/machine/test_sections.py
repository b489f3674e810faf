"""What is found of a device's section after its load: by its bytes where they are the same, else item by item."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.devices.backends import Backend
from kvmigrate.devices.bus import Device
from kvmigrate.devices.cmos import Cmos
from kvmigrate.devices.serial import Serial
from kvmigrate.machine.sections import try_sections
from kvmigrate.state.fidelity import Fidelity, Verdict, item_names
from kvmigrate.state.section import Section, Value, decode, encode, pack

CHANGED: dict[str, Value] = {"scr": 7, "fcr": 0x81, "rx": b"abc", "tx": b"waits"}


class Nested(Device):
    """A device of a later version, with a map in its state."""

    name = "nested"
    body: dict[str, Value]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.body = {"b": 1, "a": {"y": [{"in": 1}], "x": 1}, "none": {}}

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def save(self) -> dict[str, Value]:
        return self.body

    def load(self, body: Value) -> None:
        self.body = body


class Forgetful(Serial):
    """Loses what it is given for its scratch register."""

    def load_section(self, section: Section) -> None:
        super().load(section.body | {"scr": 0})  # type: ignore[operator]


def uart(kind: type[Serial] = Serial) -> Serial:
    return kind(lambda level: None, Backend())


def changed_uart() -> Serial:
    device = uart()
    device.load(device.save() | CHANGED)
    return device


def loaded(device: Device, section: Section) -> Fidelity:
    """``section``, as it arrives, in ``device``, which is all there is of a machine."""
    platform: Any = SimpleNamespace(vm=SimpleNamespace(vcpus=[]), devices={device.name: device})
    fidelity = try_sections(platform, [decode(encode(section))])
    assert [item.why for item in fidelity if item.name == "sections"] == ["section vm is missing"]
    return fidelity


def refused(fidelity: Fidelity) -> dict[str, tuple[Value, Value]]:
    found = {item.name: (item.saved, item.read_back) for item in fidelity if item.verdict is Verdict.REFUSED}
    del found["sections"]
    return found


def named(device: Device) -> list[str]:
    """The items as they are called when they are compared one by one."""
    fidelity = Fidelity()
    fidelity.compare(device.name, device.save(), device.save())
    return fidelity.exact_names()


def test_each_item_of_a_device_is_exact_by_its_name() -> None:
    source, target = changed_uart(), uart()
    fidelity = loaded(target, source.section())
    assert fidelity.exact_names() == named(source) and "serial0.thre_pending" in named(source)
    assert fidelity.counts()["exact"] == len(source.save()) and refused(fidelity) == {}
    assert target.save() == source.save()


def test_a_device_that_names_no_items_has_those_of_its_section() -> None:
    clock = Cmos(1 << 30)
    clock.write(0, 1, 0x40)
    assert loaded(Cmos(1 << 30), clock.section()).exact_names() == named(clock) != []
    device = Nested()
    device.body = device.body | {"b": 2}
    assert loaded(Nested(), device.section()).exact_names() == ["nested.a.x", "nested.a.y", "nested.b"] == named(device)


def test_a_device_as_after_power_on_is_one_item() -> None:
    for device in (uart(), Nested()):
        assert loaded(device, device.section()).exact_names() == [device.name]


def in_another_encoding(body: dict[str, Value]) -> bytes:
    """The keys the other way round, and the longest form of an integer."""
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(body))
    longest = (b"\xcf" + value.to_bytes(8, "big") if type(value) is int else pack(value) for value in body.values())
    return bytes(packer.bytes()) + b"".join([pack(k) + v for k, v in zip(body, longest, strict=True)][::-1])


def test_other_bytes_for_the_same_items_are_exact_too() -> None:
    source, target = changed_uart(), uart()
    packed = in_another_encoding(source.save())
    assert packed != source.packed()
    fidelity = loaded(target, Section("serial0", 1, packed))
    assert (fidelity.exact_names(), refused(fidelity)) == (named(source), {})
    assert target.save() == source.save()


@pytest.mark.parametrize("other_encoding", [False, True])
def test_what_a_device_holds_another_value_of_is_refused_by_name(other_encoding: bool) -> None:
    source = changed_uart()
    packed = in_another_encoding(source.save()) if other_encoding else source.packed()
    fidelity = loaded(uart(Forgetful), Section("serial0", 1, packed))
    assert refused(fidelity) == {"serial0.scr": (7, 0)}
    assert fidelity.exact_names() == [name for name in named(source) if name != "serial0.scr"]


leaves = st.integers() | st.binary() | st.lists(st.integers())
maps = st.recursive(leaves, lambda inner: st.dictionaries(st.text("abc.", max_size=2), inner, max_size=4))


@given(body=st.dictionaries(st.text("abc.", max_size=2), maps, max_size=4))
def test_the_items_of_any_map_are_called_what_a_comparison_calls_them(body: dict[str, Value]) -> None:
    one_by_one, at_once = Fidelity(), Fidelity()
    one_by_one.compare("here", body, body)
    at_once.all_exact("here", item_names(body))
    assert at_once.exact_names() == one_by_one.exact_names()
