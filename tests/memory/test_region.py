"""Guest RAM: bounds, host writes, residency and hashes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.errors import ConfigError, HostError, StateError
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.layout import HOLE_END, HOLE_START
from kvmigrate.memory.region import GuestMemory
from tests.backends import ANONYMOUS, MEMFD

from .tools import copied_gfns, page_hash, pages_of, take_round

LIBC = ctypes.CDLL(None)
MIB, GIB = 1 << 20, 1 << 30
ODD_BYTES = 16 * MIB + 3 * PAGE_BYTES
"""A size that is no multiple of 64 pages."""


@pytest.fixture(params=[ANONYMOUS, MEMFD])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    with GuestMemory(ODD_BYTES, request.param) as memory:
        yield memory


@pytest.fixture
def anonymous() -> Iterator[GuestMemory]:
    """For what only anonymous memory can: take pages from a file, or lose some by madvise."""
    with GuestMemory(ODD_BYTES) as memory:
        yield memory


@pytest.fixture(params=[ANONYMOUS, MEMFD])
def large(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    """3.5 GiB, sparse: two slots with the hole between them."""
    with GuestMemory(7 * GIB // 2, request.param) as memory:
        yield memory


def resident_kib() -> int:
    """How much memory this process has in use."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.parametrize("size_bytes", [0, -PAGE_BYTES, PAGE_BYTES - 1, MIB + 1])
def test_a_size_that_is_no_whole_number_of_pages_is_refused(size_bytes: int) -> None:
    with pytest.raises(ConfigError):
        GuestMemory(size_bytes)


def test_what_is_written_is_read_back_across_pages(memory: GuestMemory) -> None:
    data = os.urandom(3 * PAGE_BYTES + 77)
    memory.write(5 * PAGE_BYTES - 33, data)
    assert memory.read(5 * PAGE_BYTES - 33, len(data)) == data
    assert memory.read(5 * PAGE_BYTES - 35, 2) == bytes(2)


@pytest.mark.parametrize(
    ("gpa", "size_bytes"),
    [
        (ODD_BYTES, 1),
        (ODD_BYTES - 1, 2),
        (0, ODD_BYTES + 1),
        (2**52, 1),
        (2**64 - 1, 1),
        (2**64, 1),
        (-1, 1),
        (ODD_BYTES - PAGE_BYTES, 2 * PAGE_BYTES),
    ],
)
def test_access_outside_of_ram_is_refused_and_writes_nothing(memory: GuestMemory, gpa: int, size_bytes: int) -> None:
    with pytest.raises(HostError):
        memory.read(gpa, size_bytes)
    with pytest.raises(HostError):
        memory.write(gpa, b"\xff" * size_bytes)
    assert memory.resident_pages() == 0


def test_a_read_of_absurd_size_is_refused_before_room_is_made(memory: GuestMemory) -> None:
    with pytest.raises(HostError):
        memory.read(0, 1 << 60)


def test_the_last_byte_of_ram_is_ram(memory: GuestMemory) -> None:
    memory.write(ODD_BYTES - 1, b"z")
    assert memory.read(ODD_BYTES - 1, 1) == b"z"


def test_nothing_is_written_next_to_the_hole(large: GuestMemory) -> None:
    large.write(HOLE_START - 4, b"last")
    large.write(HOLE_END, b"first")
    assert large.read(HOLE_START - 4, 4) + large.read(HOLE_END, 5) == b"lastfirst"
    for gpa in (HOLE_START, HOLE_END - 1, HOLE_START - 2):
        with pytest.raises(HostError):
            large.write(gpa, b"xxxx")
    assert large.read(HOLE_START - 4, 4) == b"last"


def test_slots_that_touch_are_one_range() -> None:
    with GuestMemory(MIB) as memory:
        assert lib.kmig_memory_add(memory.handle, 7, MIB // PAGE_BYTES, 4) == 0
        data = os.urandom(2 * PAGE_BYTES)
        assert lib.kmig_memory_write(memory.handle, MIB - PAGE_BYTES, data, len(data)) == 0
        assert memory.read(MIB - PAGE_BYTES, PAGE_BYTES) == data[:PAGE_BYTES]
        assert bytes(ffi.buffer(memory.handle.slot[1].hva, PAGE_BYTES)) == data[PAGE_BYTES:]


@pytest.mark.parametrize(
    ("slot_id", "base_gfn", "nr_pages", "error"),
    [
        (0, 0x1000, 1, errno.EEXIST),
        (1, 0, 1, errno.EEXIST),
        (1, 255, 9, errno.EEXIST),
        (1, 256, 0, errno.EINVAL),
        (1, 1 << 40, 1, errno.EINVAL),
    ],
)
def test_slots_that_cannot_be_are_refused(slot_id: int, base_gfn: int, nr_pages: int, error: int) -> None:
    with GuestMemory(MIB) as memory:
        assert lib.kmig_memory_add(memory.handle, slot_id, base_gfn, nr_pages) == -error


def test_a_closed_memory_says_so(memory: GuestMemory) -> None:
    memory.close()
    memory.close()
    with pytest.raises(StateError):
        memory.read(0, 1)


def test_untouched_memory_is_neither_resident_nor_read(large: GuestMemory) -> None:
    large.write(123 * PAGE_BYTES, b"a")
    large.write(HOLE_END + 77 * PAGE_BYTES, b"b")
    before_kib = resident_kib()
    assert copied_gfns(large, first=True) == [123, HOLE_END // PAGE_BYTES + 77]
    large.hash_all()
    # Reading each of its pages would have mapped page tables alone of 7 MiB, and touching them 3.5 GiB.
    assert resident_kib() - before_kib < 24 * 1024


def test_residency_is_found_without_touching(memory: GuestMemory) -> None:
    for _ in range(2):
        assert memory.resident_pages() == 0
    memory.write(3 * PAGE_BYTES, b"x")
    resident = int.from_bytes(memory.resident_bitmap(0), "little")
    assert resident >> 3 & 1 and memory.resident_pages() == resident.bit_count()


def test_both_ways_to_ask_the_kernel_for_residency_agree(anonymous: GuestMemory) -> None:
    """PAGEMAP_SCAN, and the pagemap read page by page, which is all that there is before Linux 6.7."""
    anonymous.prefault(0, 3000)
    # More ranges than one call of PAGEMAP_SCAN reports, with huge pages on both sides.
    dropped = range(1024, 1424, 2)
    for gfn in dropped:
        at = int(ffi.cast("uintptr_t", anonymous.handle.slot[0].hva)) + gfn * PAGE_BYTES
        assert LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_BYTES), mmap.MADV_DONTNEED) == 0
    scanned = anonymous.resident_bitmap(0)
    anonymous.handle.no_pagemap_scan = 1
    assert anonymous.resident_bitmap(0) == scanned
    resident = int.from_bytes(scanned, "little")
    assert resident.bit_count() >= 2800 and not any(resident >> gfn & 1 for gfn in dropped)


def test_prefaulted_pages_are_resident(memory: GuestMemory) -> None:
    memory.prefault(8, 4)
    assert memory.resident_pages() >= 4


def test_prefault_outside_of_ram_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(HostError):
        memory.prefault(ODD_BYTES // PAGE_BYTES - 1, 2)


def test_hashes_are_xxh3_of_each_page_and_0_for_zeros(memory: GuestMemory) -> None:
    pages = {0: os.urandom(PAGE_BYTES), 9: bytes(PAGE_BYTES - 1) + b"\x01", 4098: b"\x01" + bytes(PAGE_BYTES - 1)}
    for gfn, page in pages.items():
        memory.write(gfn * PAGE_BYTES, page)
    memory.write(20 * PAGE_BYTES, bytes(PAGE_BYTES))
    (words,) = memory.hash_all()
    hashes = struct.unpack(f"<{ODD_BYTES // PAGE_BYTES}Q", words)
    assert {gfn: value for gfn, value in enumerate(hashes) if value} == {g: page_hash(p) for g, p in pages.items()}


@pytest.mark.parametrize("at", [1, 63, 64, 255, 256, 511, 512, 2040, 4087])
def test_one_byte_that_is_set_makes_a_page_not_zero(memory: GuestMemory, at: int) -> None:
    memory.write(at, b"\x80")
    assert copied_gfns(memory, first=True) == [0]


class TestMappedFile:
    """A snapshot's memory file under the guest's pages."""

    @pytest.fixture
    def file(self) -> Iterator[int]:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(PAGE_BYTES) + os.urandom(63 * PAGE_BYTES))
            file.flush()
            yield file.fileno()

    def test_the_guest_sees_the_file_and_the_file_stays_as_it_is(self, anonymous: GuestMemory, file: int) -> None:
        anonymous.map_file(100, 10, file, 2 * PAGE_BYTES)
        assert anonymous.read(100 * PAGE_BYTES, 10 * PAGE_BYTES) == os.pread(file, 10 * PAGE_BYTES, 2 * PAGE_BYTES)
        before = os.pread(file, 64 * PAGE_BYTES, 0)
        anonymous.write(101 * PAGE_BYTES, b"guest")
        assert os.pread(file, 64 * PAGE_BYTES, 0) == before and anonymous.read(101 * PAGE_BYTES, 5) == b"guest"

    def test_pages_of_the_file_that_nobody_touched_are_copied_all_the_same(
        self, anonymous: GuestMemory, file: int
    ) -> None:
        anonymous.map_file(100, 64, file, 0)
        chunks = list(take_round(anonymous, first=True))
        assert [g for runs, _ in chunks for g in pages_of(runs)] == list(range(101, 164))
        assert b"".join(data for _, data in chunks) == os.pread(file, 63 * PAGE_BYTES, PAGE_BYTES)

    @pytest.mark.parametrize(
        ("gfn", "nr_pages", "offset"),
        [
            (100, 65, 0),
            (100, 1, 64 * PAGE_BYTES),
            (100, 1, 100),
            (ODD_BYTES // PAGE_BYTES - 1, 2, 0),
            (1 << 50, 1, 0),
            (100, 0, 0),
            (100, 1, 2**64 - PAGE_BYTES),
        ],
    )
    def test_a_mapping_that_cannot_be_is_refused(
        self, anonymous: GuestMemory, file: int, gfn: int, nr_pages: int, offset: int
    ) -> None:
        with pytest.raises(HostError):
            anonymous.map_file(gfn, nr_pages, file, offset)
        assert anonymous.resident_pages() == 0


def test_every_host_write_is_in_the_log_once(memory: GuestMemory) -> None:
    log = DirtyLog(memory, LogMode.GET)
    memory.write(0, b"in use")
    log.start()
    assert copied_gfns(memory, first=True) == [0]
    memory.write(7 * PAGE_BYTES - 1, b"xy")
    memory.write(ODD_BYTES - 1, b"z")
    assert log.sync() == 3
    assert copied_gfns(memory, first=False) == [6, 7, ODD_BYTES // PAGE_BYTES - 1]
    assert log.sync() == 0


class TestClear:
    """What a reset makes of memory."""

    def test_it_is_all_zero_and_given_back(self, large: GuestMemory) -> None:
        for gpa in (0, HOLE_START - PAGE_BYTES, HOLE_END, 7 * GIB // 2 + HOLE_END - HOLE_START - PAGE_BYTES):
            large.write(gpa, b"guest")
        large.clear()
        assert large.resident_pages() == 0
        assert not any(any(words) for words in large.hash_all())

    def test_a_mapped_file_is_gone_too_and_unharmed(self, anonymous: GuestMemory) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(b"f" * 4 * PAGE_BYTES)
            file.flush()
            anonymous.map_file(100, 4, file.fileno(), 0)
            anonymous.write(99 * PAGE_BYTES, b"guest")
            anonymous.clear()
            assert anonymous.resident_pages() == 0
            assert anonymous.read(99 * PAGE_BYTES, 5 * PAGE_BYTES) == bytes(5 * PAGE_BYTES)
            assert os.pread(file.fileno(), PAGE_BYTES, 0) == b"f" * PAGE_BYTES

    def test_rounds_under_way_copy_each_page_that_held_anything_as_zeros(self, memory: GuestMemory) -> None:
        log = DirtyLog(memory, LogMode.GET)
        log.start()
        last = ODD_BYTES // PAGE_BYTES - 1
        for gfn in (3, last):
            memory.write(gfn * PAGE_BYTES, b"x")
        assert copied_gfns(memory, first=True) == [3, last]
        memory.clear()
        assert log.sync() > 0
        runs = [run for chunk, _ in take_round(memory, first=False) for run in chunk]
        assert runs == [(3, 1, lib.KMIG_RUN_ZERO), (last, 1, lib.KMIG_RUN_ZERO)]
        assert (memory.digest, memory.nr_hashed) == (0, 0)

    def test_what_is_written_afterwards_is_copied(self, memory: GuestMemory) -> None:
        log = DirtyLog(memory, LogMode.GET)
        log.start()
        memory.write(5 * PAGE_BYTES, b"before")
        assert copied_gfns(memory, first=True) == [5]
        memory.clear()
        memory.write(5 * PAGE_BYTES, b"after")
        log.sync()
        assert copied_gfns(memory, first=False) == [5]
        assert memory.read(5 * PAGE_BYTES, 6) == b"after\0"
