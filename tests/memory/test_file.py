"""Rounds into a snapshot's memory file and back: sparse, exact, and honest about a disk that is full."""

from __future__ import annotations

import errno
import os
import resource
import struct
import tempfile
from collections.abc import Iterator

import pytest
import xxhash

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.layout import HOLE_END
from kvmigrate.memory.region import GuestMemory

from .tools import contents, copied_gfns, fill, new_round, page_hash

MIB, GIB = 1 << 20, 1 << 30
NR_PAGES = 4096 + 3
LARGE_BYTES = 3 * GIB + 3 * PAGE_BYTES


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def save_round(memory: GuestMemory, fd: int, *, first: bool) -> int:
    return lib.kmig_file_save_round(memory.handle, new_round(first=first), fd)


def load(memory: GuestMemory, fd: int, pages: set[int]) -> int:
    """Load ``pages``, numbered through all slots."""
    nr_words = (memory.size_bytes // PAGE_BYTES + 63) // 64
    bits = sum(1 << page for page in pages)
    bitmap = ffi.new("uint64_t[]", list(struct.unpack(f"<{nr_words}Q", bits.to_bytes(8 * nr_words, "little"))))
    return lib.kmig_file_load(memory.handle, fd, bitmap)


def test_a_page_lies_in_the_file_where_it_lies_in_ram(memory: GuestMemory, fd: int) -> None:
    gfns = [0, 1, 700, NR_PAGES - 1]
    pages = fill(memory, gfns)
    assert save_round(memory, fd, first=True) == 0
    assert b"".join(os.pread(fd, PAGE_BYTES, gfn * PAGE_BYTES) for gfn in gfns) == pages
    assert os.fstat(fd).st_blocks * 512 < 20 * PAGE_BYTES, "untouched pages take no room"


def test_the_second_slot_follows_the_first_without_the_hole(fd: int) -> None:
    with GuestMemory(LARGE_BYTES) as memory, GuestMemory(LARGE_BYTES) as other:
        gfns = [3 * GIB // PAGE_BYTES - 1, HOLE_END // PAGE_BYTES + 2]
        pages = fill(memory, gfns)
        assert save_round(memory, fd, first=True) == 0
        assert os.fstat(fd).st_size == LARGE_BYTES
        assert os.pread(fd, PAGE_BYTES, LARGE_BYTES - PAGE_BYTES) == pages[PAGE_BYTES:]
        assert load(other, fd, {3 * GIB // PAGE_BYTES - 1, LARGE_BYTES // PAGE_BYTES - 1}) == 0
        assert contents(memory) == contents(other) and memory.digest == other.digest


def test_later_rounds_overwrite_and_punch_out(memory: GuestMemory, fd: int) -> None:
    log = DirtyLog(memory, LogMode.GET)
    log.start()
    fill(memory, range(100))
    assert save_round(memory, fd, first=True) == 0
    blocks = os.fstat(fd).st_blocks
    memory.write(10 * PAGE_BYTES, bytes(50 * PAGE_BYTES))
    memory.write(5, b"changed")
    log.sync()
    assert save_round(memory, fd, first=False) == 0
    assert os.pread(fd, 100 * PAGE_BYTES, 0) == memory.read(0, 100 * PAGE_BYTES)
    assert os.fstat(fd).st_blocks <= blocks - 49 * PAGE_BYTES // 512


def test_what_was_saved_is_loaded_page_by_page(memory: GuestMemory, fd: int) -> None:
    gfns = [*range(3, 600), 1000, NR_PAGES - 1]
    fill(memory, gfns)
    save_round(memory, fd, first=True)
    with GuestMemory(NR_PAGES * PAGE_BYTES) as other:
        assert load(other, fd, set(gfns)) == 0
        assert contents(memory) == contents(other)
        assert (memory.digest, memory.nr_hashed) == (other.digest, other.nr_hashed)


def test_a_file_that_ends_early_is_refused(memory: GuestMemory, fd: int) -> None:
    os.ftruncate(fd, 10 * PAGE_BYTES - 1)
    assert load(memory, fd, {0, 8}) == 0
    assert load(memory, fd, {9}) == -errno.ENODATA
    assert load(memory, fd, {NR_PAGES - 1}) == -errno.ENODATA


def test_a_full_disk_is_an_error_and_forgets_no_page(memory: GuestMemory, fd: int) -> None:
    log = DirtyLog(memory, LogMode.GET)
    log.start()
    fill(memory, range(1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so that a file over the limit is EFBIG, as a full disk is ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB + 100, hard))
    try:
        assert save_round(memory, fd, first=True) == -errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.sync()
    again = copied_gfns(memory, first=False)
    assert again == list(range(again[0], 1000)) and 0 < again[0] <= 2 * MIB // PAGE_BYTES


def test_a_device_that_takes_nothing_is_an_error(memory: GuestMemory) -> None:
    fill(memory, range(10))
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        assert save_round(memory, full, first=True) == -errno.ENOSPC
    finally:
        os.close(full)


def test_chunk_hashes_fold_64_page_hashes_each(memory: GuestMemory, fd: int) -> None:
    gfns = [0, 5, 64 * 3 + 7, NR_PAGES - 1]
    pages = fill(memory, gfns)
    save_round(memory, fd, first=True)
    hashes = [0] * ((NR_PAGES + 63) // 64 * 64)
    for at, gfn in enumerate(gfns):
        hashes[gfn] = page_hash(pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
    words = ffi.new("uint64_t[]", len(hashes) // 64)
    assert lib.kmig_file_chunk_hashes(memory.handle, 0, words) == 0
    for chunk, word in enumerate(words):
        of_chunk = hashes[chunk * 64 : chunk * 64 + 64]
        assert word == (xxhash.xxh3_64_intdigest(struct.pack("<64Q", *of_chunk)) if any(of_chunk) else 0)


def test_a_slot_that_is_not_there_is_refused(memory: GuestMemory) -> None:
    assert lib.kmig_file_chunk_hashes(memory.handle, 1, ffi.new("uint64_t *")) == -errno.EINVAL
    assert lib.kmig_memory_hash_all(memory.handle, 1, ffi.new("uint64_t *")) == -errno.EINVAL
    assert lib.kmig_memory_resident(memory.handle, 1, 0, 1, ffi.new("uint64_t *")) == -errno.EINVAL
    assert lib.kmig_memory_resident(memory.handle, 0, 64, NR_PAGES, ffi.new("uint64_t *")) == -errno.EINVAL
