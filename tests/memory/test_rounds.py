"""Rounds: what is copied, what is not, and that nothing is forgotten when one fails. The writes are the host's."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.layout import HOLE_END
from kvmigrate.memory.region import GuestMemory

from .tools import (
    DATA,
    ZERO,
    chunk_runs,
    contents,
    copied_gfns,
    digest_of,
    new_round,
    page_hash,
    pages_of,
    take_round,
)

NR_PAGES = 4096 + 3
CHUNK = lib.KMIG_CHUNK_PAGES


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


@pytest.fixture
def log(memory: GuestMemory) -> DirtyLog:
    log = DirtyLog(memory, LogMode.GET)
    log.start()
    return log


def fill(memory: GuestMemory, gfns: list[int] | range, seed: int = 0) -> dict[int, bytes]:
    """Random pages at ``gfns``; returns them."""
    source = random.Random(seed)
    pages = {gfn: source.randbytes(PAGE_BYTES) for gfn in gfns}
    for gfn, page in pages.items():
        memory.write(gfn * PAGE_BYTES, page)
    return pages


def apply_round(source: GuestMemory, destination: GuestMemory, *, first: bool) -> None:
    """Carry one round over, as the compressed path does."""
    for runs, data in take_round(source, first=first):
        table = ffi.new("struct kmig_page_run[]", [{"gfn": g, "nr_pages": n, "kind": k} for g, n, k in runs])
        assert lib.kmig_table_check(destination.handle, table, len(runs), lib.KMIG_RUN_DELTA) == len(data) // PAGE_BYTES
        assert lib.kmig_table_apply(destination.handle, table, len(runs), data) == 0


def test_the_first_round_takes_every_page_that_is_not_zero(memory: GuestMemory, log: DirtyLog) -> None:
    gfns = [0, 1, 63, 64, 2047, NR_PAGES - 1]
    pages = fill(memory, gfns)
    chunks = list(take_round(memory, first=True))
    assert [gfn for runs, _ in chunks for gfn in pages_of(runs)] == gfns
    assert b"".join(data for _, data in chunks) == b"".join(pages.values())
    assert memory.nr_hashed == len(gfns)
    assert memory.digest == digest_of({gfn: page_hash(page) for gfn, page in pages.items()})


def test_counters_add_up(memory: GuestMemory, log: DirtyLog) -> None:
    memory.prefault(0, 1000)
    fill(memory, range(10, 310))
    round_, chunk = new_round(first=True), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(memory.handle, round_)
    while lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL) > 0:
        pass
    assert round_.pages_sent == 300 and round_.pages_cleared == 0
    assert round_.pages_total == round_.pages_done == round_.pages_sent + round_.pages_zero == memory.resident_pages()


def test_later_rounds_take_only_what_was_written_since(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(100))
    assert copied_gfns(memory, first=True) == list(range(100))
    fill(memory, [5, 70, 2000], seed=1)
    assert log.sync() == 3
    assert copied_gfns(memory, first=False) == [5, 70, 2000]
    assert log.sync() == 0 and copied_gfns(memory, first=False) == []


def test_a_page_that_turned_zero_is_announced_and_one_that_was_never_sent_is_not(
    memory: GuestMemory, log: DirtyLog
) -> None:
    fill(memory, [3])
    assert copied_gfns(memory, first=True) == [3]
    memory.write(3 * PAGE_BYTES, bytes(2 * PAGE_BYTES))
    assert log.sync() == 2
    assert list(take_round(memory, first=False)) == [([(3, 1, ZERO)], b"")]
    assert memory.digest == 0 and memory.nr_hashed == 0
    memory.write(3 * PAGE_BYTES, bytes(PAGE_BYTES))
    log.sync()
    assert list(take_round(memory, first=False)) == []


def test_chunks_are_full_and_their_runs_joined(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(7, 7 + 2 * CHUNK + 5))
    assert [runs for runs, _ in take_round(memory, first=True)] == [
        [(7, CHUNK, DATA)],
        [(7 + CHUNK, CHUNK, DATA)],
        [(7 + 2 * CHUNK, 5, DATA)],
    ]


def test_a_page_table_never_holds_more_runs_than_it_has_room_for(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(0, 4 * CHUNK, 2))
    chunks = list(take_round(memory, first=True))
    assert max(len(runs) for runs, _ in chunks) == CHUNK
    assert [g for runs, _ in chunks for g in pages_of(runs)] == list(range(0, 4 * CHUNK, 2))


def test_runs_do_not_go_on_over_the_hole() -> None:
    with GuestMemory((3 << 30) + (1 << 20)) as memory:
        end = (3 << 30) // PAGE_BYTES
        fill(memory, [end - 1, HOLE_END // PAGE_BYTES])
        runs = [run for runs, _ in take_round(memory, first=True) for run in runs]
        assert runs == [(end - 1, 1, DATA), (HOLE_END // PAGE_BYTES, 1, DATA)]


def test_pages_of_a_chunk_that_was_put_back_come_again(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(100))
    copied_gfns(memory, first=True)
    memory.write(40 * PAGE_BYTES, bytes(PAGE_BYTES))
    memory.write(41 * PAGE_BYTES, b"new")
    log.sync()
    round_, chunk = new_round(), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(memory.handle, round_)
    assert lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL) == 1
    lost = chunk_runs(chunk)
    assert lost == [(40, 1, ZERO), (41, 1, DATA)]
    lib.kmig_round_put_back(memory.handle, round_, chunk)
    assert (round_.pages_done, round_.pages_sent, round_.pages_cleared) == (0, 0, 0)
    assert log.sync() == 2
    assert [runs for runs, _ in take_round(memory, first=False)] == [lost]


def test_a_first_round_that_is_broken_off_leaves_the_rest_pending(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(0, 3000, 3))
    round_, chunk = new_round(first=True), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(memory.handle, round_)
    assert lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL) == 1
    taken = pages_of(chunk_runs(chunk))
    log.sync()
    assert sorted(taken + copied_gfns(memory, first=False)) == list(range(0, 3000, 3))


def test_an_abort_is_seen_between_windows(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(10))
    abort_fd = os.eventfd(1)
    try:
        round_ = new_round(first=True, abort_fd=abort_fd)
        lib.kmig_round_begin(memory.handle, round_)
        rc = lib.kmig_round_next(memory.handle, round_, ffi.new("struct kmig_chunk *"), ffi.NULL)
        assert rc == -errno.ECANCELED
    finally:
        os.close(abort_fd)
    log.sync()
    assert copied_gfns(memory, first=False) == list(range(10))


def test_a_second_transfer_starts_from_nothing(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(20))
    copied_gfns(memory, first=True)
    digest = memory.digest
    log.stop()
    log.start()
    assert copied_gfns(memory, first=True) == list(range(20))
    assert memory.digest == digest and memory.nr_hashed == 20


def test_a_host_write_before_its_page_is_copied_is_not_sent_twice(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(20))
    assert copied_gfns(memory, first=True) == list(range(20))
    assert log.sync() == 0


def test_a_host_write_while_the_chunk_is_on_its_way_comes_in_the_next_round(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(20))
    for _ in take_round(memory, first=True):
        memory.write(7 * PAGE_BYTES, b"late")
    assert log.sync() == 1
    assert copied_gfns(memory, first=False) == [7]


def test_stopping_forgets_what_is_pending(memory: GuestMemory, log: DirtyLog) -> None:
    fill(memory, range(20))
    log.sync()
    log.stop()
    log.stop()
    assert not log.active
    assert copied_gfns(memory, first=False) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 299), st.sampled_from([0, 1, 2, 255])), max_size=40), min_size=1, max_size=6
    )
)
def test_both_sides_are_equal_after_any_writes_in_any_rounds(rounds: list[list[tuple[int, int]]]) -> None:
    with GuestMemory(300 * PAGE_BYTES) as source, GuestMemory(300 * PAGE_BYTES) as destination:
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        for number, writes in enumerate(rounds):
            for gfn, value in writes:
                source.write(gfn * PAGE_BYTES, bytes([value]) * PAGE_BYTES)
            if number:
                log.sync()
            apply_round(source, destination, first=number == 0)
        assert contents(source) == contents(destination)
        assert (source.digest, source.nr_hashed) == (destination.digest, destination.nr_hashed)


WINDOW = lib.KMIG_WINDOW_PAGES
BORDERS = [window * WINDOW + offset for window in range(4) for offset in (0, 63, 64, WINDOW - 1)] + [4 * WINDOW + 69]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(BORDERS), st.sampled_from([0, 1, 2])), max_size=12), st.booleans()
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_window_is_skipped_that_was_written_in_or_put_back(rounds: list[tuple[list[tuple[int, int]], bool]]) -> None:
    """Some rounds are delivered, of others the first chunk is put back and the rest never looked at."""
    size_bytes = (BORDERS[-1] + 1) * PAGE_BYTES
    with GuestMemory(size_bytes) as source, GuestMemory(size_bytes) as destination:
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        apply_round(source, destination, first=True)
        for writes, broken in [*rounds, ([], False)]:
            for gfn, value in writes:
                source.write(gfn * PAGE_BYTES, bytes([value]) * PAGE_BYTES)
            log.sync()
            if not broken:
                apply_round(source, destination, first=False)
                continue
            round_, chunk = new_round(first=False), ffi.new("struct kmig_chunk *")
            lib.kmig_round_begin(source.handle, round_)
            if lib.kmig_round_next(source.handle, round_, chunk, ffi.NULL) == 1:
                lib.kmig_round_put_back(source.handle, round_, chunk)
        assert log.sync() == 0
        for gfn in BORDERS:
            assert source.read(gfn * PAGE_BYTES, PAGE_BYTES) == destination.read(gfn * PAGE_BYTES, PAGE_BYTES)
        assert (source.digest, source.nr_hashed) == (destination.digest, destination.nr_hashed)


@pytest.mark.parametrize("mode", LogMode)
def test_what_is_touched_first_in_an_empty_window_comes_in_the_next_round(mode: LogMode) -> None:
    with GuestMemory((3 * WINDOW + 5) * PAGE_BYTES) as memory:
        log = DirtyLog(memory, mode)
        log.start()
        fill(memory, [1])
        assert copied_gfns(memory, first=True) == [1]
        fill(memory, [WINDOW + 9, 3 * WINDOW + 4])
        # Pages of one huge page are one to the page map, so that there may seem to be more.
        assert 2 <= log.sync() <= 2 * 512
        fill(memory, [WINDOW + 4000])
        assert copied_gfns(memory, first=False) == [WINDOW + 9, WINDOW + 4000, 3 * WINDOW + 4]
        fill(memory, [WINDOW + 9], seed=1)
        assert log.sync() == 1, "its window is not empty any more"
        assert copied_gfns(memory, first=False) == [WINDOW + 9]
        assert log.sync() == 0


@pytest.mark.parametrize("scan", [True, False], ids=["PAGEMAP_SCAN", "pagemap"])
def test_a_first_round_is_the_same_however_residency_is_asked(scan: bool) -> None:
    with GuestMemory((3 * WINDOW + 5) * PAGE_BYTES) as memory:
        memory.handle.no_pagemap_scan = not scan
        log = DirtyLog(memory, LogMode.CLEAR)
        log.start()
        fill(memory, [1, WINDOW, 3 * WINDOW + 4])
        assert copied_gfns(memory, first=True) == [1, WINDOW, 3 * WINDOW + 4]
        assert log.sync() == 0
        fill(memory, [2 * WINDOW + 7])
        assert log.sync() >= 1
        assert copied_gfns(memory, first=False) == [2 * WINDOW + 7]


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 2, DATA), (1, 1, DATA)],
        [(5, 1, DATA), (4, 1, DATA)],
        [(5, 1, ZERO), (5, 1, DATA)],
        [(0, 0, DATA)],
        [(0, 1, 3)],
        [(NR_PAGES, 1, DATA)],
        [(NR_PAGES - 1, 2, DATA)],
        [(NR_PAGES - 1, 2, ZERO)],
        [(2**64 - 1, 1, DATA)],
        [(2**64 - 1, 2, DATA)],
        [(0, 2**32 - 1, ZERO)],
        [(0, CHUNK + 1, DATA)],
        [(0, CHUNK, DATA), (CHUNK, 1, ZERO)],
        [(2**52, 1, DATA)],
    ],
)
def test_a_page_table_that_cannot_be_is_refused(memory: GuestMemory, runs: list[tuple[int, int, int]]) -> None:
    table = ffi.new("struct kmig_page_run[]", [{"gfn": g, "nr_pages": n, "kind": k} for g, n, k in runs])
    assert lib.kmig_table_check(memory.handle, table, len(runs), lib.KMIG_RUN_DELTA) == -errno.EINVAL


def test_a_page_table_with_too_many_runs_is_refused_unread(memory: GuestMemory) -> None:
    assert lib.kmig_table_check(memory.handle, ffi.NULL, CHUNK + 1, lib.KMIG_RUN_DELTA) == -errno.EINVAL


def test_a_zero_run_does_not_allocate_what_is_zero_already(memory: GuestMemory) -> None:
    table = ffi.new("struct kmig_page_run[]", [{"gfn": 0, "nr_pages": CHUNK, "kind": ZERO}])
    assert lib.kmig_table_apply(memory.handle, table, 1, ffi.NULL) == 0
    assert memory.read(0, CHUNK * PAGE_BYTES) == bytes(CHUNK * PAGE_BYTES) and memory.nr_hashed == 0
