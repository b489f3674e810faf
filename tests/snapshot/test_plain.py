"""The quick look at a section's msgpack: it takes nothing that msgpack itself refuses, and all that is plain."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.errors import StreamError
from kvmigrate.snapshot.statefile import _is_plain
from kvmigrate.state import section
from kvmigrate.state.section import Section, Value

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=300)
NAMES = st.text(st.characters(max_codepoint=127), max_size=300)
VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS | NAMES, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(NAMES, inner, max_size=20)
)


def is_taken(data: bytes) -> bool:
    try:
        section.unpack(data, "test")
    except StreamError:
        return False
    return True


@given(VALUES)
def test_what_is_plain_is_found_to_be(value: Value) -> None:
    assert _is_plain(section.pack(value))


@given(VALUES, st.integers(0), st.integers(0, 255))
def test_what_was_damaged_and_is_taken_msgpack_takes_too(value: Value, at: int, byte: int) -> None:
    damaged = bytearray(section.pack(value))
    damaged[at % len(damaged)] = byte
    assert not _is_plain(bytes(damaged)) or is_taken(bytes(damaged))


@given(st.binary(max_size=64))
def test_what_is_taken_of_anything_msgpack_takes_too(data: bytes) -> None:
    assert not _is_plain(data) or is_taken(data)


@given(VALUES)
def test_one_value_is_neither_shorter_nor_longer(value: Value) -> None:
    data = section.pack(value)
    assert not _is_plain(data + b"\xc0")
    assert not any(_is_plain(data[:end]) for end in range(len(data)))


@pytest.mark.parametrize(
    "value",
    [
        b"x" * section.MAX_BIN_BYTES,
        "x" * section.MAX_STR_BYTES,
        [None] * section.MAX_ITEMS,
        {str(n): n for n in range(section.MAX_ITEMS)},
    ],
)
def test_at_its_limit_a_value_is_plain_and_beyond_it_is_not(value: Value) -> None:
    assert _is_plain(section.pack(value))
    beyond = value | {"one": "more"} if isinstance(value, dict) else value + value[:1]
    data = section.pack(beyond)
    assert not _is_plain(data) and not is_taken(data)


@pytest.mark.parametrize(
    "data",
    [
        section.pack("é"),
        b"\xa1\xff",
        b"\xc1",
        b"\x81\x01\x02",
        b"\x81\xc4\x01x\x02",
        msgpack.packb(msgpack.ExtType(1, b"x")),
        b"\x91" * 40 + b"\xc0",
        b"\x91" * 100_000,
        b"",
    ],
    ids=["not ASCII", "not UTF-8", "no form", "number as key", "bytes as key", "ext", "deep", "deeper", "empty"],
)
def test_what_only_a_decoder_can_judge_is_left_to_it(data: bytes) -> None:
    assert not _is_plain(data)


def outcome(decode: Callable[[bytes], Section], payload: bytes) -> tuple[object, ...]:
    try:
        found = decode(payload)
    except StreamError as error:
        return type(error), str(error)
    return found.name, found.version, found.packed


@given(
    st.permutations(["name", "version", "body"]),
    st.text(max_size=70) | st.integers(),
    st.sampled_from([-1, 0, 1, 127, 128, 0xFFFF, 0x10000, "1"]),
    st.dictionaries(NAMES, SCALARS, max_size=20) | SCALARS,
    st.dictionaries(NAMES, SCALARS, max_size=1),
)
def test_a_well_formed_section_is_decoded_as_any_is(
    order: list[str], name: Value, version: Value, body: Value, more: dict[str, Value]
) -> None:
    fields = {"name": name, "version": version, "body": body}
    try:
        payload = section.pack({key: fields[key] for key in order} | more)
    except OverflowError:
        return
    assert outcome(section.decode_well_formed, payload) == outcome(section.decode, payload)


@pytest.mark.parametrize(
    "head",
    [
        b"\x83\xa4name\xd9\x02vm\xa7version\x01\xa4body",
        b"\x83\xa4name\xa2vm\xa7version\xcc\x01\xa4body",
        b"\x83\xa4name\xa3vm\x80\xa7version\x01\xa4body",
        b"\x83\xa4name\xa0\xa7version\x01\xa4body",
    ],
    ids=["long form of a str", "long form of an int", "not ASCII", "no name"],
)
def test_a_section_that_nobody_here_writes_is_decoded_as_any_is(head: bytes) -> None:
    payload = head + section.pack({"a": 1})
    assert outcome(section.decode_well_formed, payload) == outcome(section.decode, payload)


def test_a_section_that_is_written_here_needs_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Section("vcpu0", 1, {"regs": {"rip": 0xFFF0}})
    payload = section.encode(written)
    monkeypatch.setattr(section, "_without_body", None)
    assert section.decode_well_formed(payload).packed == written.packed
    with pytest.raises(TypeError):
        section.decode(payload)
