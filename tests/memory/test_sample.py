"""A sample of pages still to be sent: only such pages, spread over all of them, none twice; and parts of a round."""

from __future__ import annotations

import socket

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.region import GuestMemory

from .tools import Draining, decode_stream, fill, new_round, pages_of

WINDOW = 512
NONE = 2**64 - 1


def sample(memory: GuestMemory, nr_pages: int) -> list[bytes]:
    data = bytearray(nr_pages * PAGE_BYTES)
    taken = lib.kmig_memory_sample(memory.handle, ffi.from_buffer(data), nr_pages)
    assert 0 <= taken <= nr_pages
    assert not any(data[taken * PAGE_BYTES :])
    return [bytes(data[at : at + PAGE_BYTES]) for at in range(0, taken * PAGE_BYTES, PAGE_BYTES)]


def begin_first_round(memory: GuestMemory) -> None:
    lib.kmig_round_begin(memory.handle, new_round(first=True))


def test_only_pages_that_hold_something_are_looked_at_and_none_twice() -> None:
    with GuestMemory(20 * WINDOW * PAGE_BYTES) as memory:
        filled = fill(memory, [3, 4, 5, 2 * WINDOW, 19 * WINDOW + 7])
        begin_first_round(memory)
        found = sample(memory, 64)
        assert sorted(found) == sorted(filled[at : at + PAGE_BYTES] for at in range(0, len(filled), PAGE_BYTES))
        assert memory.resident_pages() < WINDOW * 4, "looking must not touch what is empty"


def test_a_full_sample_comes_from_all_over_memory() -> None:
    with GuestMemory(64 * WINDOW * PAGE_BYTES) as memory:
        for window in range(64):
            memory.write(window * WINDOW * PAGE_BYTES, bytes([window + 1]) * (32 * PAGE_BYTES))
        begin_first_round(memory)
        windows = [page[0] - 1 for page in sample(memory, 128)]
        assert len(set(windows)) == 8 and max(windows) >= 48 and min(windows) < 16


def test_nothing_pending_is_no_sample() -> None:
    with GuestMemory(1024 * PAGE_BYTES) as memory:
        fill(memory, range(100))
        assert sample(memory, 16) == []


def test_a_round_can_be_sent_in_parts() -> None:
    with GuestMemory(2048 * PAGE_BYTES) as memory:
        pages = fill(memory, range(0, 1200))
        round_, sequence, done = new_round(first=True), ffi.new("uint32_t *"), []
        ours, theirs = socket.socketpair()
        with theirs, Draining(theirs) as drained, ours:
            lib.kmig_round_begin(memory.handle, round_)
            for limits in ((500, NONE), (500, NONE), (NONE, 0), (NONE, NONE)):
                done.append(lib.kmig_stream_send_some(memory.handle, round_, ours.fileno(), sequence, *limits))
                done.append(round_.pages_sent)
        assert done == [1, 512, 1, 1024, 1, 1200, 0, 1200]
        frames = list(decode_stream(drained.data))
        assert [gfn for _, runs, _ in frames for gfn in pages_of(runs)] == list(range(1200))
        assert b"".join(data for _, _, data in frames) == pages
