"""PAGES frames on a socket: as state/frame.py says in both directions, and whatever else is refused."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.frame import HEADER, FrameHeader, FrameKind, decode_header, encode_frame, encode_header

from .tools import (
    DATA,
    ZERO,
    Run,
    contents,
    decode_stream,
    encode_pages,
    end_frame,
    fill,
    new_incoming,
    pages_of,
    receive_bytes,
    send_round,
)

NR_PAGES = 4096 + 3
CHUNK = lib.KMIG_CHUNK_PAGES


@pytest.fixture
def source() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


@pytest.fixture
def destination() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


def test_frames_are_what_the_specification_says(source: GuestMemory) -> None:
    gfns = [*range(300), 400, 402, NR_PAGES - 1]
    pages = fill(source, gfns)
    stream, round_ = send_round(source, first=True, sequence=7)
    frames = list(decode_stream(stream))
    assert [header.sequence for header, _, _ in frames] == list(range(7, 7 + len(frames)))
    assert [gfn for _, runs, _ in frames for gfn in pages_of(runs)] == gfns
    assert b"".join(data for _, _, data in frames) == pages
    assert round_.bytes_sent == len(stream) and round_.pages_sent == len(gfns)


def test_a_page_that_turned_zero_is_a_zero_run(source: GuestMemory) -> None:
    log = DirtyLog(source, LogMode.GET)
    log.start()
    fill(source, range(10))
    send_round(source, first=True)
    source.write(3 * PAGE_BYTES, bytes(2 * PAGE_BYTES))
    source.write(5 * PAGE_BYTES, b"new")
    log.sync()
    stream, round_ = send_round(source, first=False)
    ((_, runs, data),) = decode_stream(stream)
    assert runs == [(3, 2, ZERO), (5, 1, DATA)] and data == source.read(5 * PAGE_BYTES, PAGE_BYTES)
    assert (round_.pages_cleared, round_.pages_sent) == (2, 1)


def test_frames_written_by_the_specification_are_received(destination: GuestMemory) -> None:
    data = random.Random(2).randbytes(4 * PAGE_BYTES)
    destination.write(50 * PAGE_BYTES, b"to be cleared")
    stream = encode_pages([(0, 2, DATA), (50, 1, ZERO), (NR_PAGES - 2, 2, DATA)], data, 5) + end_frame(6)
    incoming = new_incoming()
    incoming.sequence = 5
    assert receive_bytes(destination, stream, incoming=incoming) == 1
    assert (incoming.kind, incoming.sequence, incoming.length) == (FrameKind.END, 7, 0)
    assert (incoming.pages_received, incoming.pages_cleared) == (4, 1)
    assert incoming.bytes_received == len(stream)
    assert destination.read(0, 2 * PAGE_BYTES) + destination.read((NR_PAGES - 2) * PAGE_BYTES, 2 * PAGE_BYTES) == data
    assert destination.read(50 * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)


def test_both_sides_are_equal_after_a_round(source: GuestMemory, destination: GuestMemory) -> None:
    fill(source, range(0, 3000, 2))
    stream, _ = send_round(source, first=True)
    assert receive_bytes(destination, stream) == -errno.ECONNRESET
    assert contents(source) == contents(destination)
    assert (source.digest, source.nr_hashed) == (destination.digest, destination.nr_hashed)


def test_the_digest_differs_when_one_byte_of_a_page_was_damaged(source: GuestMemory, destination: GuestMemory) -> None:
    fill(source, range(100))
    stream = bytearray(send_round(source, first=True)[0])
    stream[-1000] ^= 1
    receive_bytes(destination, bytes(stream))
    assert source.digest != destination.digest


def test_the_digest_differs_when_two_pages_changed_places(source: GuestMemory, destination: GuestMemory) -> None:
    pages = fill(source, [0, 1])
    send_round(source, first=True)
    receive_bytes(destination, encode_pages([(0, 2, DATA)], pages[PAGE_BYTES:] + pages[:PAGE_BYTES]))
    assert source.digest != destination.digest


@pytest.fixture
def stream() -> bytes:
    data = random.Random(3).randbytes(2 * PAGE_BYTES)
    return encode_pages([(1, 1, DATA), (9, 3, ZERO), (70, 1, DATA)], data) + end_frame(1)


def test_a_stream_that_ends_at_any_byte_is_refused_and_pages_are_whole_or_not_counted(
    destination: GuestMemory, stream: bytes
) -> None:
    head_bytes = len(stream) - HEADER.size - 2 * PAGE_BYTES
    cuts = [*range(head_bytes + 3), *range(head_bytes + 3, len(stream), 509), *range(len(stream) - 35, len(stream))]
    for cut in cuts:
        incoming = new_incoming()
        assert receive_bytes(destination, stream[:cut], incoming=incoming) == -errno.ECONNRESET, cut
        assert incoming.pages_received == (2 if cut >= len(stream) - HEADER.size else 0), cut


def test_any_flipped_bit_of_header_or_table_is_noticed(destination: GuestMemory, stream: bytes) -> None:
    for bit in range(8 * (len(stream) - HEADER.size - 2 * PAGE_BYTES)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        rc = receive_bytes(destination, bytes(damaged))
        assert rc in (-errno.EPROTO, -errno.EBADMSG), bit
    assert destination.resident_pages() == 0


HOSTILE: list[tuple[list[Run], int, int, int]] = [
    ([(NR_PAGES, 1, DATA)], PAGE_BYTES, 0, errno.EINVAL),
    ([(NR_PAGES - 1, 2, DATA)], 2 * PAGE_BYTES, 0, errno.EINVAL),
    ([(2**64 - 1, 2, DATA)], 2 * PAGE_BYTES, 0, errno.EINVAL),
    ([(5, 1, DATA), (5, 1, DATA)], 2 * PAGE_BYTES, 0, errno.EINVAL),
    ([(5, 1, DATA), (4, 1, DATA)], 2 * PAGE_BYTES, 0, errno.EINVAL),
    ([(0, 1, 7)], 0, 0, errno.EINVAL),
    ([(0, 0, DATA)], 0, 0, errno.EINVAL),
    ([(0, CHUNK + 1, ZERO)], 0, 0, errno.EINVAL),
    ([(0, 1, DATA)], 0, 0, errno.EPROTO),
    ([(0, 1, DATA)], PAGE_BYTES - 1, 0, errno.EPROTO),
    ([(0, 1, DATA)], 2 * PAGE_BYTES, 0, errno.EPROTO),
    ([(0, 1, ZERO)], PAGE_BYTES, 0, errno.EPROTO),
    ([], 0, 0, errno.EPROTO),
    ([], PAGE_BYTES, 0, errno.EPROTO),
    ([(0, 1, DATA)], PAGE_BYTES, 2, errno.EPROTO),
    ([(0, 1, DATA)], 0, 1, errno.EPROTO),
    ([(0, 1, ZERO)], 10, 1, errno.EPROTO),
    ([(0, 1, DATA)], CHUNK * PAGE_BYTES * 2, 1, errno.EPROTO),
    ([(i, 1, ZERO) for i in range(CHUNK + 1)], 0, 0, errno.EPROTO),
]


@pytest.mark.parametrize(("runs", "data_bytes", "flags", "error"), HOSTILE)
def test_a_hostile_page_table_is_refused_before_anything_is_written(
    destination: GuestMemory, runs: list[Run], data_bytes: int, flags: int, error: int
) -> None:
    assert receive_bytes(destination, encode_pages(runs, b"\xff" * data_bytes, flags=flags)) == -error
    assert destination.resident_pages() == 0


@pytest.mark.parametrize("length", [0, 15, 16, 31, 2**31, 2**32 + 32, 2**63, 2**64 - 1])
def test_a_frame_whose_length_disagrees_with_its_table_is_refused(destination: GuestMemory, length: int) -> None:
    frame = encode_pages([(0, 1, DATA)], bytes(PAGE_BYTES))
    header = decode_header(frame[: HEADER.size])
    lying = encode_header(FrameHeader(header.kind, header.flags, length, header.checksum, 0))
    assert receive_bytes(destination, lying + frame[HEADER.size :]) == -errno.EPROTO


def test_a_frame_out_of_sequence_is_refused(destination: GuestMemory) -> None:
    page = bytes(PAGE_BYTES)
    assert receive_bytes(destination, encode_pages([(0, 1, DATA)], page, 1)) == -errno.EPROTO
    twice = encode_pages([(0, 1, DATA)], page, 0) * 2
    assert receive_bytes(destination, twice) == -errno.EPROTO


def test_a_foreign_protocol_is_refused(destination: GuestMemory) -> None:
    assert receive_bytes(destination, b"GET / HTTP/1.1\r\nHost: example\r\n\r\n") == -errno.EPROTO


@pytest.mark.parametrize("payload", [b"", b"payload", b"x" * lib.KMIG_SMALL_PAYLOAD_BYTES])
@pytest.mark.parametrize("pages_may_come", [True, False])
def test_another_frame_is_read_as_a_whole_if_it_is_small(
    destination: GuestMemory, payload: bytes, pages_may_come: bool
) -> None:
    incoming = received(destination, encode_frame(FrameKind.ROUND, payload, 0) + b"next", pages_may_come)[0]
    assert (incoming.kind, incoming.length, incoming.has_payload) == (FrameKind.ROUND, len(payload), 1)
    assert bytes(ffi.buffer(incoming.payload, len(payload))) == payload


@pytest.mark.parametrize("pages_may_come", [True, False])
def test_another_frame_that_is_large_is_left_unread(destination: GuestMemory, pages_may_come: bool) -> None:
    payload = b"x" * (lib.KMIG_SMALL_PAYLOAD_BYTES + 1)
    incoming, left = received(destination, encode_frame(FrameKind.CONFIG, payload, 0), pages_may_come)
    assert (incoming.kind, incoming.length, incoming.has_payload) == (FrameKind.CONFIG, len(payload), 0)
    assert left == payload


def received(destination: GuestMemory, data: bytes, pages_may_come: bool) -> tuple[Any, bytes]:
    """What becomes of the frame that ``data`` begins with, and what is left of ``data`` then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        incoming = new_incoming()
        if pages_may_come:
            assert lib.kmig_stream_recv_pages(destination.handle, incoming, theirs.fileno()) == 1
        else:
            assert lib.kmig_stream_recv_frame(incoming, theirs.fileno(), ffi.NULL) == 1
        return incoming, theirs.recv(1 << 16)


def test_a_header_that_is_damaged_is_there_to_be_looked_at(destination: GuestMemory) -> None:
    damaged = bytearray(encode_frame(FrameKind.ROUND, b"payload", 0))
    damaged[5] ^= 1
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(damaged)
        incoming = new_incoming()
        assert lib.kmig_stream_recv_frame(incoming, theirs.fileno(), ffi.NULL) == 0
        assert bytes(ffi.buffer(incoming.payload, HEADER.size)) == damaged[: HEADER.size]
        assert incoming.sequence == 0


def test_a_compressed_frame_is_handed_over_with_its_table_checked(destination: GuestMemory) -> None:
    pages = random.Random(4).randbytes(PAGE_BYTES) + b"\x01" * PAGE_BYTES
    packed = zstandard.compress(pages)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_pages([(3, 2, DATA), (9, 1, ZERO)], packed, flags=1))
        incoming = new_incoming()
        assert lib.kmig_stream_recv_pages(destination.handle, incoming, theirs.fileno()) == 1
        assert (incoming.kind, incoming.frame_flags, incoming.nr_data_pages) == (FrameKind.PAGES, 1, 2)
        unpacked = zstandard.decompress(theirs.recv(incoming.length, socket.MSG_WAITALL))
    assert lib.kmig_table_apply(destination.handle, incoming.run, incoming.nr_runs, unpacked) == 0
    assert destination.read(3 * PAGE_BYTES, 2 * PAGE_BYTES) == pages
