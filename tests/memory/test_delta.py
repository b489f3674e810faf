"""Pages that are sent again as what changed in them: the cache of the sender, and what the receiver refuses."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from .tools import (
    DATA,
    DELTA,
    ZERO,
    Draining,
    Run,
    chunk_runs,
    contents,
    digest_of,
    encode_pages,
    fill,
    new_incoming,
    new_round,
    page_hash,
    pages_of,
)

NR_PAGES = 4096
CACHE_PAGES = 1024
SAME = 0


@dataclass
class Sent:
    """One chunk of a round: its table, its data and the sum of what its delta runs build upon."""

    runs: list[Run]
    data: bytes
    bases: int
    nr_delta: int


class Link:
    """A source with a cache and a destination, with every chunk of every round in view."""

    def __init__(self, cache_bytes: int) -> None:
        self.source = GuestMemory(NR_PAGES * PAGE_BYTES)
        self.destination = GuestMemory(NR_PAGES * PAGE_BYTES)
        self.log = DirtyLog(self.source, LogMode.GET)
        self.log.start()
        created = ffi.new("struct kmig_delta **")
        assert lib.kmig_delta_create(cache_bytes, created) == 0
        self.cache: Any = ffi.gc(created[0], lib.kmig_delta_destroy)
        self._first = True

    def round(self) -> Any:
        """A new round's struct, begun."""
        self.log.sync()
        round_ = new_round(first=self._first)
        round_.delta = self.cache
        self._first = False
        lib.kmig_round_begin(self.source.handle, round_)
        return round_

    def chunks(self, round_: Any) -> Iterator[Sent]:
        chunk = ffi.new("struct kmig_chunk *")
        bounce = ffi.new("uint8_t[]", lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
        while (rc := lib.kmig_round_next(self.source.handle, round_, chunk, bounce)) > 0:
            data = bytes(ffi.buffer(bounce, chunk.nr_data_pages * PAGE_BYTES))
            yield Sent(chunk_runs(chunk), data, chunk.bases, chunk.nr_delta_pages)
        assert rc == 0

    def copy(self) -> list[Sent]:
        """One round to the destination."""
        sent = list(self.chunks(self.round()))
        for one in sent:
            assert deliver(self.destination, one) == 0
        return sent

    def raw_round(self) -> None:
        """One round that is sent from where the guest writes, and arrives."""
        ours, theirs = socket.socketpair()
        with theirs, Draining(theirs) as drained, ours:
            assert (
                lib.kmig_stream_send_some(
                    self.source.handle, self.round(), ours.fileno(), ffi.new("uint32_t *"), 2**64 - 1, 2**64 - 1
                )
                == 0
            )
        receive(self.destination, drained.data)

    def close(self) -> None:
        self.source.close()
        self.destination.close()


def receive(memory: GuestMemory, stream: bytes) -> tuple[int, Any]:
    """What kmig_stream_recv_pages makes of ``stream``."""
    ours, theirs = socket.socketpair()
    incoming = new_incoming()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        ours.sendall(stream)
        ours.shutdown(socket.SHUT_WR)
        return lib.kmig_stream_recv_pages(memory.handle, incoming, theirs.fileno()), incoming


def deliver(memory: GuestMemory, sent: Sent) -> int:
    """Through a frame, its checks and the writing of it; 0, or the error of the checks."""
    if not sent.nr_delta:
        table = ffi.new("struct kmig_page_run[]", [{"gfn": g, "nr_pages": n, "kind": k} for g, n, k in sent.runs])
        return int(lib.kmig_table_apply(memory.handle, table, len(sent.runs), sent.data))
    # Data that is announced and not read keeps the frame small enough for a socket's buffer.
    frame = encode_pages(sent.runs, sent.data, flags=2, bases=sent.bases)
    rc, incoming = receive(memory, frame[: len(frame) - len(sent.data)])
    if rc != 1:
        return rc
    assert incoming.frame_flags == 2 and incoming.length == len(sent.data)
    return int(lib.kmig_table_apply(memory.handle, incoming.run, incoming.nr_runs, sent.data))


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link(CACHE_PAGES * (PAGE_BYTES + 24))
    yield made
    made.close()


def touch(link: Link, gfns: range, value: int) -> None:
    """Change one word of each page."""
    for gfn in gfns:
        link.source.write(gfn * PAGE_BYTES + 8 * (gfn % 512), value.to_bytes(8, "little"))


def deltas(sent: list[Sent]) -> list[int]:
    return [gfn for one in sent for gfn in pages_of([run for run in one.runs if run[2] == DELTA])]


def equal(link: Link) -> bool:
    same = (link.source.digest, link.source.nr_hashed) == (link.destination.digest, link.destination.nr_hashed)
    return same and contents(link.source) == contents(link.destination)


def test_a_page_that_is_sent_a_third_time_goes_as_what_changed(link: Link) -> None:
    fill(link.source, range(600))
    assert deltas(link.copy()) == []
    touch(link, range(100, 400), 1)
    assert deltas(link.copy()) == []
    touch(link, range(200, 500), 2)
    sent = link.copy()
    assert deltas(sent) == list(range(200, 400))
    assert equal(link)
    assert sum(data != 0 for data in sent[0].data[:PAGE_BYTES]) <= 8, "only what changed is in the data"
    old_hash = {gfn: page_hash(link.destination.read(gfn * PAGE_BYTES, PAGE_BYTES)) for gfn in range(200, 400)}
    touch(link, range(200, 400), 3)
    assert sum(one.bases for one in link.copy()) % 2**64 == digest_of(old_hash)
    assert equal(link)


def test_a_page_that_changed_throughout_goes_whole(link: Link) -> None:
    fill(link.source, range(4))
    link.copy()
    for seed in range(2):
        link.source.write(0, random.Random(seed).randbytes(4 * PAGE_BYTES))
        assert deltas(link.copy()) == []
    touch(link, range(4), 9)
    assert deltas(link.copy()) == [0, 1, 2, 3]
    assert equal(link)


def warm(link: Link, gfns: range) -> None:
    """Have ``gfns`` in the cache, as both sides hold them."""
    fill(link.source, gfns)
    link.copy()
    touch(link, gfns, 1)
    link.copy()


def test_a_page_that_was_zero_in_between_goes_whole(link: Link) -> None:
    warm(link, range(8))
    link.source.write(3 * PAGE_BYTES, bytes(PAGE_BYTES))
    link.copy()
    touch(link, range(8), 2)
    assert 3 not in deltas(link.copy())
    assert equal(link)


def test_a_page_that_went_from_where_the_guest_writes_is_no_base(link: Link) -> None:
    """It may have torn on its way, so nobody knows what arrived, even if it is the same again."""
    warm(link, range(8))
    touch(link, range(4), 1)
    link.raw_round()
    touch(link, range(8), 2)
    assert deltas(link.copy()) == [4, 5, 6, 7]
    assert equal(link)


def test_a_page_that_was_put_back_is_no_base(link: Link) -> None:
    warm(link, range(8))
    touch(link, range(4), 2)
    round_, chunk = link.round(), ffi.new("struct kmig_chunk *")
    bounce = ffi.new("uint8_t[]", lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
    assert lib.kmig_round_next(link.source.handle, round_, chunk, bounce) == 1
    assert (round_.pages_delta, round_.pages_sent) == (4, 4)
    lib.kmig_round_put_back(link.source.handle, round_, chunk)
    assert (round_.pages_delta, round_.pages_sent) == (0, 0)
    touch(link, range(8), 3)
    assert deltas(link.copy()) == [4, 5, 6, 7]
    assert equal(link)


def test_a_new_first_round_builds_upon_nothing(link: Link) -> None:
    warm(link, range(8))
    link._first = True
    assert deltas(link.copy()) == []
    touch(link, range(8), 2)
    assert deltas(link.copy()) == []


def test_more_hot_pages_than_room_keep_their_places(link: Link) -> None:
    """Were the newest page always kept, a set larger than the cache would find none of its pages in it."""
    hot = range(2 * CACHE_PAGES)
    warm(link, hot)
    for value in range(2, 5):
        touch(link, hot, value)
        assert 0.9 * CACHE_PAGES <= len(deltas(link.copy())) <= CACHE_PAGES
    others = range(3000, 3000 + CACHE_PAGES)
    for value in range(1, 6):
        touch(link, others, value)
        found = deltas(link.copy())
    assert len(found) > 0.9 * CACHE_PAGES, "what is not sent any more makes room"
    assert equal(link)


@pytest.mark.parametrize("change", [0, 1, 4095])
def test_another_base_than_the_source_built_upon_is_refused_before_anything_is_written(link: Link, change: int) -> None:
    warm(link, range(8))
    touch(link, range(8), 2)
    (sent,) = link.chunks(link.round())
    before = bytearray(link.destination.read(5 * PAGE_BYTES, PAGE_BYTES))
    before[change] ^= 1
    link.destination.write(5 * PAGE_BYTES, before)
    everything = contents(link.destination)
    assert deliver(link.destination, sent) == -errno.ESTALE
    assert contents(link.destination) == everything


def test_bases_that_changed_places_are_refused(link: Link) -> None:
    warm(link, range(8))
    touch(link, range(8), 2)
    (sent,) = link.chunks(link.round())
    pages = [link.destination.read(gfn * PAGE_BYTES, PAGE_BYTES) for gfn in (2, 3)]
    link.destination.write(2 * PAGE_BYTES, pages[1] + pages[0])
    assert deliver(link.destination, sent) == -errno.ESTALE


HOSTILE: list[tuple[list[Run], int, int, int | None, int]] = [
    ([(0, 1, DELTA)], PAGE_BYTES, 0, None, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES, 2, None, errno.EPROTO),
    ([(0, 1, DATA)], PAGE_BYTES, 2, SAME, errno.EPROTO),
    ([(0, 1, ZERO)], 0, 2, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES, 0, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES, 2, 1, errno.ESTALE),
    ([(0, 1, DELTA)], PAGE_BYTES - 8, 2, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES + 8, 2, SAME, errno.EPROTO),
    ([(0, 2, DELTA)], PAGE_BYTES, 2, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], 0, 3, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], 2 << 20, 3, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES, 4, SAME, errno.EPROTO),
    ([(0, 1, DELTA)], PAGE_BYTES, 6, SAME, errno.EPROTO),
    ([(NR_PAGES, 1, DELTA)], PAGE_BYTES, 2, SAME, errno.EINVAL),
    ([(NR_PAGES - 1, 2, DELTA)], 2 * PAGE_BYTES, 2, SAME, errno.EINVAL),
    ([(2**64 - 1, 2, DELTA)], 2 * PAGE_BYTES, 2, SAME, errno.EINVAL),
    ([(5, 1, DELTA), (5, 1, DELTA)], 2 * PAGE_BYTES, 2, SAME, errno.EINVAL),
    ([(5, 1, DELTA), (4, 1, DATA)], 2 * PAGE_BYTES, 2, SAME, errno.EINVAL),
    ([(0, 257, DELTA)], 257 * PAGE_BYTES, 3, SAME, errno.EINVAL),
    ([(2 * i, 1, DELTA) for i in range(257)], 0, 3, SAME, errno.EPROTO),
]


@pytest.mark.parametrize(("runs", "data_bytes", "flags", "bases", "error"), HOSTILE)
def test_a_hostile_delta_frame_is_refused_before_anything_is_written(
    runs: list[Run], data_bytes: int, flags: int, bases: int | None, error: int
) -> None:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        frame = encode_pages(runs, b"\xff" * data_bytes, flags=flags, bases=bases)
        assert receive(memory, frame[: 64 << 10])[0] == -error
        assert memory.nr_hashed == 0 and not any(any(page) for page in contents(memory))


def test_the_largest_table_has_room_for_its_bases() -> None:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        frame = encode_pages([(2 * i, 1, DELTA) for i in range(256)], bytes(256 * PAGE_BYTES), flags=2, bases=0)
        rc, incoming = receive(memory, frame[: len(frame) - 256 * PAGE_BYTES])
        assert (rc, incoming.nr_runs, incoming.nr_data_pages) == (1, 256, 256)


def test_every_flipped_bit_and_every_cut_of_a_delta_head_is_noticed() -> None:
    frame = encode_pages([(0, 1, DELTA), (3, 2, ZERO)], bytes(PAGE_BYTES), flags=2, bases=0)[:-PAGE_BYTES]
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            assert receive(memory, bytes(damaged))[0] in (-errno.EPROTO, -errno.EBADMSG), bit
        for cut in range(len(frame)):
            assert receive(memory, frame[:cut])[0] == -errno.ECONNRESET, cut
        assert memory.resident_pages() == 0


@pytest.mark.parametrize("size_bytes", [0, 1, 65535])
def test_a_cache_without_room_is_refused(size_bytes: int) -> None:
    assert lib.kmig_delta_create(size_bytes, ffi.new("struct kmig_delta **")) == -errno.EINVAL


def test_the_smallest_cache_keeps_what_fits() -> None:
    link = Link(65536)
    warm(link, range(64))
    touch(link, range(64), 2)
    assert 0 < len(deltas(link.copy())) <= 65536 // PAGE_BYTES
    assert equal(link)
    link.close()
