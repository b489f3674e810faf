"""One round shared out among connections: every page goes once, and none is forgotten when one of them fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from .tools import DATA, chunk_runs, contents, copied_gfns, fill, new_round, pages_of, take_round

WINDOW = lib.KMIG_WINDOW_PAGES
CHUNK = lib.KMIG_CHUNK_PAGES


class Part:
    """One connection's part of a round, and what it took: by gfn the bytes that were there."""

    def __init__(self, memory: GuestMemory, *, first: bool, joins: bool) -> None:
        self.memory = memory
        self.round = new_round(first=first)
        self.chunk: Any = ffi.new("struct kmig_chunk *")
        self.bounce = ffi.new("uint8_t[]", CHUNK * PAGE_BYTES)
        self.taken: list[tuple[list[tuple[int, int, int]], bytes]] = []
        begin = lib.kmig_round_join if joins else lib.kmig_round_begin
        begin(memory.handle, self.round)

    def step(self) -> bool:
        """Take a chunk; False when none is left."""
        rc = lib.kmig_round_next(self.memory.handle, self.round, self.chunk, self.bounce)
        assert rc >= 0
        if rc:
            data = bytes(ffi.buffer(self.bounce, self.chunk.nr_data_pages * PAGE_BYTES))
            self.taken.append((chunk_runs(self.chunk), data))
        return bool(rc)

    def lose(self) -> None:
        """The chunk that was taken last did not go."""
        lib.kmig_round_put_back(self.memory.handle, self.round, self.chunk)
        self.taken.pop()

    @property
    def gfns(self) -> list[int]:
        return [gfn for runs, _ in self.taken for gfn in pages_of(runs)]

    def apply(self, destination: GuestMemory) -> None:
        for runs, data in self.taken:
            table = ffi.new("struct kmig_page_run[]", runs)
            lib.kmig_table_apply(destination.handle, table, len(runs), ffi.from_buffer(data))


def parts_of(memory: GuestMemory, nr_parts: int, *, first: bool) -> list[Part]:
    return [Part(memory, first=first, joins=number > 0) for number in range(nr_parts)]


def in_threads(parts: list[Part]) -> None:
    def run(part: Part) -> None:
        while part.step():
            continue

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("nr_parts", [2, 7])
def test_every_page_goes_once_and_both_sides_are_equal(nr_parts: int) -> None:
    with GuestMemory((2 * WINDOW + 77) * PAGE_BYTES) as source, GuestMemory(source.size_bytes) as destination:
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        gfns = [*range(5000), *range(6000, 9000, 2), *range(2 * WINDOW, 2 * WINDOW + 77)]
        fill(source, gfns)
        for first in (True, False):
            parts = parts_of(source, nr_parts, first=first)
            in_threads(parts)
            assert sorted(gfn for part in parts for gfn in part.gfns) == gfns
            assert sum(part.round.pages_sent for part in parts) == len(gfns)
            for part in parts:
                part.apply(destination)
            assert contents(source) == contents(destination)
            assert (source.digest, source.nr_hashed) == (destination.digest, destination.nr_hashed)
            assert log.sync() == 0
            gfns = gfns[::3]
            for gfn in gfns:
                source.write(gfn * PAGE_BYTES, b"again")
            log.sync()


def test_a_part_may_take_nothing() -> None:
    with GuestMemory(64 * PAGE_BYTES) as memory:
        fill(memory, [3])
        one, other = parts_of(memory, 2, first=True)
        assert one.step()
        assert not other.step()
        assert not one.step()
        assert (one.gfns, other.gfns) == ([3], [])


def test_pages_of_a_part_that_is_broken_off_come_again_and_those_of_the_other_do_not() -> None:
    with GuestMemory(2 * WINDOW * PAGE_BYTES) as memory:
        log = DirtyLog(memory, LogMode.CLEAR)
        log.start()
        fill(memory, range(4 * CHUNK))
        failing, other = parts_of(memory, 2, first=True)
        assert failing.step()
        while other.step():
            continue
        failing.lose()
        log.sync()
        assert copied_gfns(memory, first=False) == list(range(CHUNK))
        assert sorted([*range(CHUNK), *other.gfns]) == list(range(4 * CHUNK))


def test_pages_that_a_part_took_and_never_looked_at_come_again() -> None:
    with GuestMemory(2 * WINDOW * PAGE_BYTES) as memory:
        log = DirtyLog(memory, LogMode.CLEAR)
        log.start()
        fill(memory, range(4 * CHUNK))
        failing, other = parts_of(memory, 2, first=True)
        # Under this cap a chunk is one page: the rest of the piece stays with the one who took it.
        failing.round.bandwidth = PAGE_BYTES
        assert failing.step()
        while other.step():
            continue
        log.sync()
        again = copied_gfns(memory, first=False)
        assert sorted([*failing.gfns, *other.gfns, *again]) == list(range(4 * CHUNK))
        assert len(again) == CHUNK - 1


BORDERS = [window * WINDOW + offset for window in range(3) for offset in (0, 1, 63, 64, 300, WINDOW - 1)]
Steps = list[tuple[int, bool]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(BORDERS), st.sampled_from([0, 1, 2])), max_size=12),
            st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=8),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_in_whatever_order_parts_go_on_and_fail_nothing_is_forgotten(
    rounds: list[tuple[list[tuple[int, int]], Steps]],
) -> None:
    size_bytes = 3 * WINDOW * PAGE_BYTES
    with GuestMemory(size_bytes) as source, GuestMemory(size_bytes) as destination:
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        for runs, data in take_round(source, first=True):
            raise AssertionError(f"{runs} of an empty memory: {data!r}")
        for writes, steps in [*rounds, ([], [(0, False)] * 40)]:
            for gfn, value in writes:
                source.write(gfn * PAGE_BYTES, bytes([value]) * PAGE_BYTES)
            log.sync()
            parts = parts_of(source, 3, first=False)
            # Some go on, some lose what they took, and some are never heard of again.
            for number, loses in steps:
                if parts[number].step() and loses:
                    parts[number].lose()
            for part in parts:
                part.apply(destination)
        log.sync()
        assert log.sync() == 0
        assert contents(source) == contents(destination)
        assert (source.digest, source.nr_hashed) == (destination.digest, destination.nr_hashed)


def test_a_piece_is_whole_words_of_the_bitmap() -> None:
    """So that no two connections, each in its thread, write to one word."""
    with GuestMemory(WINDOW * PAGE_BYTES) as memory:
        fill(memory, range(10, 2000))
        one, other = parts_of(memory, 2, first=True)
        while one.step() | other.step():
            continue
        words = [{gfn // 64 for gfn in part.gfns} for part in (one, other)]
        assert words[0] and words[1]
        assert not words[0] & words[1]
        assert {kind for runs, _ in [*one.taken, *other.taken] for _, _, kind in runs} == {DATA}
