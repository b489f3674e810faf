"""Frames in one piece: what C writes is what the specification says, and it takes nothing that is damaged."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.errors import BadChecksum, BadField, TooLarge
from kvmigrate.migration.abort import Abort
from kvmigrate.migration.batch import join, split_sections
from kvmigrate.migration.channel import Channel
from kvmigrate.state.frame import HEADER, MAX_PAYLOAD_BYTES, FrameKind, encode_frame
from kvmigrate.state.section import Section, encode

KINDS = st.sampled_from(sorted(FrameKind))
SECTIONS = [Section("vcpu0", 1, {"rip": 0xFFF0, "xsave": bytes(2048)}), Section("serial0", 2, {}), Section("x", 1, {})]
FIRST = 7


def frames_of(sections: list[Section], kind: FrameKind = FrameKind.SECTION) -> bytes:
    return bytes(join([(kind, encode(section)) for section in sections], FIRST)[0])


@given(st.lists(st.tuples(KINDS, st.binary(max_size=300))), st.integers(0, 2**32 - 40), st.booleans())
def test_frames_in_one_piece_are_those_of_the_specification(
    frames: list[tuple[FrameKind, bytes]], first: int, mandatory: bool
) -> None:
    alone = [encode_frame(*frame, first + at, mandatory=mandatory) for at, frame in enumerate(frames)]
    data, nr_frames = join(frames, first, mandatory=mandatory)
    assert (bytes(data), nr_frames) == (b"".join(alone), len(frames))


def test_a_payload_over_the_limit_is_no_frame() -> None:
    with pytest.raises(TooLarge, match="SECTION"):
        join([(FrameKind.SECTION, bytes(MAX_PAYLOAD_BYTES + 1))], 0)


def test_sections_come_out_as_they_went_in() -> None:
    assert split_sections(frames_of(SECTIONS), len(SECTIONS), FIRST) == SECTIONS
    assert split_sections(b"", 0, FIRST) == []


def test_not_a_bit_may_be_damaged() -> None:
    whole = frames_of(SECTIONS)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        assert split_sections(bytes(damaged), len(SECTIONS), FIRST) is None, at


def test_sections_are_neither_more_nor_fewer_nor_cut_nor_others() -> None:
    whole = frames_of(SECTIONS)
    assert not any(split_sections(whole[:end], len(SECTIONS), FIRST) for end in range(len(whole)))
    assert split_sections(whole + b"\0", len(SECTIONS), FIRST) is None
    assert split_sections(whole, len(SECTIONS) - 1, FIRST) is None
    assert split_sections(whole, len(SECTIONS) + 1, FIRST) is None
    assert split_sections(whole, len(SECTIONS), FIRST + 1) is None
    assert split_sections(frames_of(SECTIONS, FrameKind.CHECK), len(SECTIONS), FIRST) is None


def received(data: bytes, nr_frames: int) -> list[Section]:
    near, far = socket.socketpair()
    abort = Abort()
    channel = Channel(near, abort, 2000.0, "the peer")
    channel.incoming.sequence = FIRST
    try:
        far.sendall(data)
        return channel.recv_sections(nr_frames, len(data))
    finally:
        far.close()
        channel.close()
        abort.close()


def test_what_is_not_plain_is_left_to_a_decoder() -> None:
    odd = Section("vcpu0", 1, {"é": "in no state of ours"})
    data = frames_of([odd])
    assert split_sections(data, 1, FIRST) is None
    assert received(data, 1) == [odd]


def test_what_is_wrong_is_told_of_the_frame_that_it_is_in() -> None:
    data = bytearray(frames_of(SECTIONS))
    data[-1] ^= 1
    with pytest.raises(BadChecksum, match=f"frame {FIRST + 2} "):
        received(bytes(data), len(SECTIONS))
    with pytest.raises(BadField, match="bytes are left"):
        received(frames_of(SECTIONS), len(SECTIONS) - 1)


def test_a_header_says_how_long_a_payload_is_but_not_more_than_there_is() -> None:
    cut = frames_of(SECTIONS[:1])[: HEADER.size + 5]
    assert split_sections(cut, 1, FIRST) is None
    with pytest.raises(BadField, match="more bytes than were announced"):
        received(cut, 1)
