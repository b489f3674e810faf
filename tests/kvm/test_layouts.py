"""Structs into msgpack and back in C: the same as the msgpack library makes of them, and nothing hostile is taken."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate._core import ffi, lib
from kvmigrate.errors import BadField
from kvmigrate.kvm.structs import Field, Layout, layout

U64, S32, NAMES, BYTES, ROW = 8, 4, 3, 5, 16
INNER = Layout(16, [Field("wide", lib.KMIG_FIELD_UNSIGNED, 0, 8), Field("narrow", lib.KMIG_FIELD_SIGNED, 8, 1)])
OUTER = Layout(
    128,
    [
        Field("u64", lib.KMIG_FIELD_UNSIGNED, 0, U64),
        Field("s32", lib.KMIG_FIELD_SIGNED, 8, S32),
        Field("bytes", lib.KMIG_FIELD_BYTES, 12, BYTES),
        Field("numbers", lib.KMIG_FIELD_UNSIGNED, 18, 2, count=3),
        Field("inner", lib.KMIG_FIELD_STRUCT, 24, 16, count=2, of=INNER),
        Field("blob", lib.KMIG_FIELD_BLOB, 64, 32, length_at=64),
        Field("none", lib.KMIG_FIELD_UNSIGNED, 100, 1, count=0),
        Field("a_name_that_is_longer_than_thirty_one_bytes", lib.KMIG_FIELD_UNSIGNED, 104, 1),
        Field("truth", lib.KMIG_FIELD_TRUTH, 105, 1),
        Field("row", lib.KMIG_FIELD_ROW, 112, ROW, length_at=108),
    ],
)
LAST = "a_name_that_is_longer_than_thirty_one_bytes"

inner_values = st.builds(
    lambda wide, narrow: {"wide": wide, "narrow": narrow}, st.integers(0, 2**64 - 1), st.integers(-128, 127)
)
values = st.fixed_dictionaries(
    {
        "u64": st.integers(0, 2**64 - 1) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32]),
        "s32": st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-1, -32, -33, -128, -129, -32768, -32769]),
        "bytes": st.binary(min_size=BYTES, max_size=BYTES),
        "numbers": st.lists(st.integers(0, 65535), min_size=3, max_size=3),
        "inner": st.lists(inner_values, min_size=2, max_size=2),
        "blob": st.binary(min_size=0, max_size=28).map(lambda data: (len(data) + 4).to_bytes(4, "little") + data),
        "none": st.just([]),
        LAST: st.integers(0, 255),
        "truth": st.booleans(),
        "row": st.binary(max_size=ROW),
    }
).map(lambda value: {field.name: value[field.name] for field in OUTER.fields})


def decoded(packed: bytes) -> bytes:
    data = bytearray(OUTER.size_bytes)
    OUTER.decode(packed, ffi.from_buffer(data), "here")
    return bytes(data)


@given(value=values)
def test_the_map_is_byte_for_byte_that_of_the_msgpack_library(value: dict[str, Any]) -> None:
    data = decoded(msgpack.packb(value))
    assert OUTER.encode(ffi.from_buffer(data)) == msgpack.packb(value)


@given(value=values, data=st.data())
def test_keys_may_come_in_any_order(value: dict[str, Any], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations([*value.items()])))
    assert decoded(msgpack.packb(shuffled)) == decoded(msgpack.packb(value))


@given(value=values)
def test_a_map_that_is_cut_anywhere_is_refused(value: dict[str, Any]) -> None:
    packed = msgpack.packb(value)
    for size_bytes in range(len(packed)):
        with pytest.raises(BadField, match="here"):
            decoded(packed[:size_bytes])
    with pytest.raises(BadField, match="here"):
        decoded(packed + b"\0")


@given(packed=st.binary(max_size=200))
def test_noise_is_refused(packed: bytes) -> None:
    with pytest.raises(BadField, match="here"):
        decoded(packed)


@given(value=values, at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_map_is_refused_or_reads_as_the_library_reads_it(value: dict[str, Any], at: int, byte: int) -> None:
    packed = bytearray(msgpack.packb(value))
    packed[at % len(packed)] = byte
    try:
        data = decoded(bytes(packed))
    except BadField:
        return
    assert msgpack.unpackb(OUTER.encode(ffi.from_buffer(data))) == msgpack.unpackb(bytes(packed))


GOOD: dict[str, Any] = {
    "u64": 1,
    "s32": -1,
    "bytes": b"12345",
    "numbers": [1, 2, 3],
    "inner": [{"wide": 1, "narrow": 1}] * 2,
    "blob": b"\4\0\0\0",
    "none": [],
    LAST: 0,
    "truth": True,
    "row": b"abc",
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"u64": -1}, r"here\.u64: a value that its type cannot hold"),
        ({"u64": 1.0}, r"here\.u64: a value of the wrong type"),
        ({"u64": True}, r"here\.u64: a value of the wrong type"),
        ({"s32": 2**31}, r"here\.s32: a value that its type cannot hold"),
        ({"s32": 2**63}, r"here\.s32: a value that its type cannot hold"),
        ({"s32": -(2**31) - 1}, r"here\.s32: a value that its type cannot hold"),
        ({"bytes": b"1234"}, r"here\.bytes: the wrong length"),
        ({"bytes": b"123456"}, r"here\.bytes: the wrong length"),
        ({"bytes": "12345"}, r"here\.bytes: a value of the wrong type"),
        ({"numbers": [1, 2]}, r"here\.numbers: the wrong length"),
        ({"numbers": [1, 2, 65536]}, r"here\.numbers\[2\]: a value that its type cannot hold"),
        ({"inner": [{"wide": 1, "narrow": 1}, {"wide": 1}]}, r"here\.inner\[1\]: field 'narrow' is missing"),
        ({"inner": [{"wide": 1, "narrow": 128}] * 2}, r"here\.inner\[0\]\.narrow: a value that its type cannot hold"),
        ({"inner": [{"wide": 1, "narrow": 1, "more": 1}] * 2}, r"here\.inner\[0\]: unknown field 'more'"),
        ({"blob": b"\5\0\0\0"}, r"here\.blob: the wrong length"),
        ({"blob": b"\41\0\0\0" + bytes(29)}, r"here\.blob: the wrong length"),
        ({"truth": 1}, r"here\.truth: a value of the wrong type"),
        ({"row": bytes(ROW + 1)}, r"here\.row: the wrong length"),
        ({"row": "abc"}, r"here\.row: a value of the wrong type"),
        ({"none": [1]}, r"here\.none: the wrong length"),
        ({"extra": 1}, r"here: unknown field 'extra'"),
        ({3: 1}, r"here: unknown field ''"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(change: dict[Any, Any], says: str) -> None:
    assert decoded(msgpack.packb(GOOD))
    with pytest.raises(BadField, match=says):
        decoded(msgpack.packb(GOOD | change))


def test_a_key_that_comes_twice_is_refused() -> None:
    twice = b"\x88" + b"".join(msgpack.packb(part) for part in ("u64", 1)) * 8
    with pytest.raises(BadField, match="unknown field 'u64', or it comes twice"):
        decoded(twice)


def test_a_blob_that_says_it_is_longer_than_its_room_is_not_written() -> None:
    data = bytearray(decoded(msgpack.packb(GOOD)))
    data[64:68] = (33).to_bytes(4, "little")
    assert lib.kmig_layout_encode(OUTER.handle, ffi.from_buffer(data), ffi.new("char[]", 4096), 4096) < 0


def test_a_rows_length_lies_apart_from_its_bytes() -> None:
    data = bytearray(decoded(msgpack.packb(GOOD)))
    assert data[108:] == (3).to_bytes(4, "little") + b"abc" + bytes(ROW - 3)
    data[108] = ROW + 1
    assert lib.kmig_layout_encode(OUTER.handle, ffi.from_buffer(data), ffi.new("char[]", 4096), 4096) < 0


def test_a_struct_of_more_fields_than_there_is_room_for_is_refused() -> None:
    for nr_fields, fits in ((lib.KMIG_MAX_FIELDS, True), (lib.KMIG_MAX_FIELDS + 1, False)):
        of = Layout(nr_fields, [Field(f"f{n}", lib.KMIG_FIELD_UNSIGNED, n, 1) for n in range(nr_fields)])
        packed, data = of.encode(ffi.from_buffer(bytes(nr_fields))), bytearray(nr_fields)
        with nullcontext() if fits else pytest.raises(BadField, match="here: the wrong length"):
            of.decode(packed, ffi.from_buffer(data), "here")


@given(room=st.integers(0, 200))
def test_nothing_is_written_behind_the_room_there_is(room: int) -> None:
    data, out = decoded(msgpack.packb(GOOD)), bytearray(b"\xee" * 400)
    rc = lib.kmig_layout_encode(OUTER.handle, ffi.from_buffer(data), ffi.from_buffer(out), room)
    assert (rc < 0) == (room < len(msgpack.packb(GOOD))) and out[room:] == b"\xee" * (400 - room)


@pytest.mark.parametrize("name", ["regs", "sregs2", "vcpu_events", "ioapic_state", "pit_state2", "lapic_state", "fpu"])
@pytest.mark.parametrize("byte", [0, 0x7F, 0xFF])
def test_no_struct_of_the_kernel_takes_more_than_its_most(name: str, byte: int) -> None:
    of = layout(name)
    packed = of.encode(ffi.from_buffer(bytes([byte]) * of.size_bytes))
    assert len(packed) <= of.most_bytes and msgpack.packb(msgpack.unpackb(packed)) == packed
