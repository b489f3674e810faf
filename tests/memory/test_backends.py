"""Guest RAM of a memory file and of huge pages: what is known of its pages, how it is emptied, what the host gives."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES, MemoryBackend
from kvmigrate.errors import ConfigError, HostError
from kvmigrate.memory import huge
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.prefault import SpareMemory
from kvmigrate.memory.region import HUGE_PAGES, GuestMemory
from tests.backends import ANONYMOUS, HUGETLBFS, MEMFD, SHARED, memory_of, pool, room_for

from .tools import contents, copied_gfns, fill, receive_bytes, send_round

LIBC = ctypes.CDLL(None)
MIB = 1 << 20
SIZE_BYTES = 72 * MIB
"""More than two windows of a round."""
PAGES_OF_WINDOW = lib.KMIG_WINDOW_PAGES


@pytest.fixture(params=SHARED)
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    with memory_of(request.param, SIZE_BYTES) as memory:
        yield memory


@pytest.fixture
def memfd() -> Iterator[GuestMemory]:
    with GuestMemory(SIZE_BYTES, MEMFD) as memory:
        yield memory


@pytest.fixture
def hugetlbfs() -> Iterator[GuestMemory]:
    with memory_of(HUGETLBFS, SIZE_BYTES) as memory:
        yield memory


def unmap(memory: GuestMemory, gfn: int, nr_pages: int) -> None:
    """Take pages out of the page tables, as the kernel does when it swaps them out or joins them to a huge page: the
    file of their memory keeps them."""
    at = int(ffi.cast("uintptr_t", memory.handle.slot[0].hva)) + gfn * PAGE_BYTES
    size_bytes = ctypes.c_size_t(nr_pages * PAGE_BYTES)
    assert LIBC.madvise(ctypes.c_void_p(at), size_bytes, mmap.MADV_DONTNEED) == 0


def flags_of_mapping(at: int) -> set[str]:
    """The VmFlags of the mapping that begins at ``at``."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{at:x}-") for line in lines)
    return set(next(line for line in lines if line.startswith("VmFlags:")).split()[1:])


def held_bytes(memory: GuestMemory) -> int:
    """What the memory file takes of the host."""
    return os.fstat(memory.handle.slot[0].fd).st_blocks * 512


@pytest.mark.parametrize("backend", MemoryBackend)
def test_core_dumps_and_children_do_without_guest_memory_and_kvm_can_map_huge_pages(backend: MemoryBackend) -> None:
    with memory_of(backend, SIZE_BYTES) as memory:
        at = int(ffi.cast("uintptr_t", memory.handle.slot[0].hva))
        assert at % huge.HUGE_BYTES == 0
        assert {"dd", "dc", "hg"} <= flags_of_mapping(at)


@pytest.mark.parametrize("backend", MemoryBackend)
def test_whether_new_memory_becomes_huge_pages_can_be_changed_and_changed_back(backend: MemoryBackend) -> None:
    with memory_of(backend, SIZE_BYTES) as memory:
        at = int(ffi.cast("uintptr_t", memory.handle.slot[0].hva))
        for wanted in (False, True):
            memory.want_huge(wanted)
            assert ("hg" in flags_of_mapping(at), "nh" in flags_of_mapping(at)) == (wanted, not wanted)


def test_nobody_can_cut_memory_off_under_its_guest(memory: GuestMemory) -> None:
    fd = memory.handle.slot[0].fd
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 7 == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    for size_bytes in (SIZE_BYTES - 2 * MIB, SIZE_BYTES + 2 * MIB):
        with pytest.raises(PermissionError):
            os.truncate(fd, size_bytes)
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("backend", SHARED)
def test_closing_gives_back_every_descriptor_and_page(backend: MemoryBackend) -> None:
    with room_for(backend, SIZE_BYTES):

        def held() -> tuple[int, int, int]:
            return len(list(Path("/proc/self/fd").iterdir())), pool("free_hugepages"), pool("resv_hugepages")

        before = held()
        for _ in range(2):
            with GuestMemory(SIZE_BYTES, backend) as memory:
                memory.write(5, b"x")
        assert lib.kmig_memory_create(7, ffi.new("struct kmig_memory **")) == -errno.EINVAL
        assert held() == before


def test_residency_is_found_without_touching(memory: GuestMemory) -> None:
    assert memory.resident_pages() == 0
    memory.write(3 * PAGE_BYTES, b"x")
    memory.write(SIZE_BYTES - 1, b"x")
    resident = int.from_bytes(memory.resident_bitmap(0), "little")
    assert resident >> 3 & 1 and resident >> SIZE_BYTES // PAGE_BYTES - 1
    assert resident.bit_count() <= 2 * HUGE_PAGES
    assert memory.resident_pages() == resident.bit_count()


@pytest.mark.parametrize("scans", [True, False], ids=["PAGEMAP_SCAN", "before Linux 6.7"])
def test_pages_that_the_page_tables_lost_are_found_in_the_file(memfd: GuestMemory, scans: bool) -> None:
    memfd.handle.no_pagemap_scan = int(not scans)
    gfns = [0, 7, 8, 63, 64, PAGES_OF_WINDOW - 1, PAGES_OF_WINDOW, SIZE_BYTES // PAGE_BYTES - 1]
    fill(memfd, gfns)
    hashes = memfd.hash_all()
    unmap(memfd, 0, 9)
    unmap(memfd, PAGES_OF_WINDOW - 1, PAGES_OF_WINDOW)
    resident = int.from_bytes(memfd.resident_bitmap(0), "little")
    assert all(resident >> gfn & 1 for gfn in gfns)
    assert copied_gfns(memfd, first=True) == gfns
    assert memfd.hash_all() == hashes


def test_a_page_in_an_empty_window_is_found_though_the_page_tables_lost_it(memfd: GuestMemory) -> None:
    log = DirtyLog(memfd, LogMode.GET)
    log.start()
    assert copied_gfns(memfd, first=True) == []
    for gfn in (PAGES_OF_WINDOW + 5, 2 * PAGES_OF_WINDOW + 9):
        # As a guest does: no mark by the VMM, and nobody's dirty log.
        ffi.memmove(memfd.handle.slot[0].hva + gfn * PAGE_BYTES, b"guest", 5)
    unmap(memfd, PAGES_OF_WINDOW, PAGES_OF_WINDOW)
    assert log.sync() >= 2
    assert copied_gfns(memfd, first=False) == [PAGES_OF_WINDOW + 5, 2 * PAGES_OF_WINDOW + 9]
    assert log.sync() == 0


def test_clearing_makes_every_page_zero(memory: GuestMemory) -> None:
    log = DirtyLog(memory, LogMode.GET)
    log.start()
    gfns = [0, 5, PAGES_OF_WINDOW, SIZE_BYTES // PAGE_BYTES - 1]
    fill(memory, gfns)
    assert copied_gfns(memory, first=True) == gfns
    memory.clear()
    log.sync()
    assert copied_gfns(memory, first=False) == gfns
    assert not any(memory.hash_all()[0])
    assert (memory.digest, memory.nr_hashed) == (0, 0)


def test_what_is_cleared_goes_back_to_the_host(memfd: GuestMemory) -> None:
    fill(memfd, range(1000))
    unmap(memfd, 0, 500)
    assert held_bytes(memfd) >= 1000 * PAGE_BYTES
    memfd.clear()
    assert held_bytes(memfd) == memfd.resident_pages() == 0


def test_huge_pages_are_the_guests_from_the_start_and_stay_so(hugetlbfs: GuestMemory) -> None:
    """One that could not be had when the guest touches it would kill it."""

    def others_could_have() -> int:
        return pool("free_hugepages") - pool("resv_hugepages")

    left = others_could_have()
    hugetlbfs.prefault(0, SIZE_BYTES // PAGE_BYTES)
    assert others_could_have() == left
    hugetlbfs.clear()
    assert others_could_have() == left
    hugetlbfs.write(0, b"again")
    hugetlbfs.close()
    assert others_could_have() == left + SIZE_BYTES // huge.HUGE_BYTES


def test_too_few_huge_pages_are_refused_in_one_line_that_says_how_many() -> None:
    before = pool("resv_hugepages")
    with pytest.raises(ConfigError) as raised:
        GuestMemory(1 << 39, HUGETLBFS)
    needed, free = 1 << 18, huge.free_bytes() // huge.HUGE_BYTES
    wanted = pool("nr_hugepages") + needed - free
    assert f"{needed} huge pages of 2 MiB are needed, {free} are free: sudo sysctl vm.nr_hugepages={wanted}" in str(
        raised.value
    )
    assert "\n" not in str(raised.value)
    assert pool("resv_hugepages") == before, "what the first slot had is not given back"


@pytest.mark.parametrize("size_bytes", [MIB, SIZE_BYTES + PAGE_BYTES])
def test_memory_that_is_no_whole_number_of_huge_pages_is_refused(size_bytes: int) -> None:
    with pytest.raises(ConfigError, match="take a multiple of 2M"):
        GuestMemory(size_bytes, HUGETLBFS)


def test_the_kernel_refuses_too_few_huge_pages_before_one_is_touched(hugetlbfs: GuestMemory) -> None:
    """Whatever was counted before: another may have been faster."""
    before = pool("resv_hugepages"), len(list(Path("/proc/self/fd").iterdir()))
    assert lib.kmig_memory_add(hugetlbfs.handle, 7, 1 << 20, (1 << 39) // PAGE_BYTES) == -errno.ENOMEM
    assert (pool("resv_hugepages"), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_a_slot_that_does_not_lie_on_a_huge_page_is_refused(hugetlbfs: GuestMemory) -> None:
    after = SIZE_BYTES // PAGE_BYTES
    for base_gfn, nr_pages in ((after + 1, HUGE_PAGES), (after, HUGE_PAGES - 1)):
        assert lib.kmig_memory_add(hugetlbfs.handle, 7, base_gfn, nr_pages) == -errno.EINVAL


def test_a_file_is_not_mapped_under_memory_that_is_shared(memory: GuestMemory) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * MIB)
        with pytest.raises(HostError) as raised:
            memory.map_file(0, 1024, file.fileno(), 0)
    assert raised.value.errno == errno.EOPNOTSUPP
    assert memory.resident_pages() == 0


def test_spare_memory_is_of_the_kind_that_was_asked_for(memory: GuestMemory) -> None:
    backend = memory.backend
    memory.close()
    spare = SpareMemory(32 * MIB, backend)
    with spare.take(32 * MIB) as first, spare.take(16 * MIB) as second:
        assert (first.backend, first.resident_pages()) == (backend, 32 * MIB // PAGE_BYTES)
        assert (second.backend, second.resident_pages()) == (backend, 0)


@pytest.mark.parametrize(("source", "destination"), [(ANONYMOUS, HUGETLBFS), (HUGETLBFS, MEMFD), (MEMFD, ANONYMOUS)])
def test_pages_arrive_whatever_they_are_kept_in(source: MemoryBackend, destination: MemoryBackend) -> None:
    with memory_of(source, SIZE_BYTES) as ours, memory_of(destination, SIZE_BYTES) as theirs:
        fill(ours, [*range(300), PAGES_OF_WINDOW + 1, SIZE_BYTES // PAGE_BYTES - 1])
        stream, _ = send_round(ours, first=True)
        assert receive_bytes(theirs, stream) == -errno.ECONNRESET
        assert contents(ours) == contents(theirs)
        assert ours.digest == theirs.digest != 0
