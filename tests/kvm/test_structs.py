"""Structs as dicts: what the compiler saw, exactly, and nothing else is taken."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate._core import ffi
from kvmigrate.errors import BadField
from kvmigrate.kvm.structs import layout

NAMES = ["regs", "sregs", "sregs2", "fpu", "xcrs", "debugregs", "lapic_state", "mp_state", "vcpu_events"]
NAMES += ["clock_data", "pit_state2", "pic_state", "ioapic_state", "cpuid_entry2", "msr_entry", "translation"]


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_as_large_as_the_struct(name: str) -> None:
    assert layout(name).size_bytes == ffi.sizeof(f"struct kvm_{name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_field_lies_where_the_compiler_put_it(name: str) -> None:
    """Setting each field through cffi changes that key of the dict alone."""
    cdata = ffi.new(f"struct kvm_{name} *")
    empty = layout(name).unpack(ffi.buffer(cdata))
    for field, info in ffi.typeof(f"struct kvm_{name}").fields:
        if info.type.kind != "primitive" or field.startswith(("pad", "reserved")):
            continue
        setattr(cdata, field, 0x5A)
        changed = layout(name).unpack(ffi.buffer(cdata))
        assert {key for key in empty if changed[key] != empty[key]} == {field} and changed[field] == 0x5A
        setattr(cdata, field, 0)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack_but_for_padding(name: str, data: st.DataObject) -> None:
    size = layout(name).size_bytes
    seed = data.draw(st.binary(min_size=1, max_size=64))
    raw = (seed * (size // len(seed) + 1))[:size]
    once = layout(name).unpack(raw)
    packed = layout(name).pack(once, name)
    assert layout(name).unpack(packed) == once and len(packed) == size


def test_nested_structs_and_arrays_keep_the_kernels_names() -> None:
    sregs = layout("sregs").unpack(bytes(layout("sregs").size_bytes))
    assert set(sregs["cs"]) >= {"base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl"}
    assert sregs["interrupt_bitmap"] == [0, 0, 0, 0] and "padding" not in sregs["gdt"]
    fpu = layout("fpu").unpack(bytes(layout("fpu").size_bytes))
    assert fpu["xmm"] == [bytes(16)] * 16
    assert layout("ioapic_state").unpack(bytes(216))["redirtbl"][23] == {"bits": 0}


GOOD = {"fpr": [bytes(16)] * 8, "fcw": 0, "fsw": 0, "ftwx": 0, "last_opcode": 0, "last_ip": 0, "last_dp": 0}
GOOD |= {"xmm": [bytes(16)] * 16, "mxcsr": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"xmm": [bytes(16)] * 15},
        {"xmm": [bytes(16)] * 15 + [bytes(15)]},
        {"xmm": [bytes(16)] * 15 + [bytes(17)]},
        {"xmm": [bytes(16)] * 15 + [0]},
        {"xmm": bytes(256)},
        {"fcw": 1 << 16},
        {"fcw": -1},
        {"fcw": False},
        {"fcw": None},
        {"fcw": b"\0"},
        {"extra": 0},
        {1: 2},
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused(change: dict[Any, Any]) -> None:
    assert layout("fpu").pack(GOOD, "fpu") == bytes(layout("fpu").size_bytes)
    with pytest.raises(BadField, match="fpu"):
        layout("fpu").pack(GOOD | change, "fpu")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadField, match="'mxcsr' is missing"):
        layout("fpu").pack({key: value for key, value in GOOD.items() if key != "mxcsr"}, "fpu")
