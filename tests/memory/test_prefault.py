"""Touching memory ahead: where data is about to land, without changing a byte."""

from __future__ import annotations

import time

import pytest

from kvmigrate.memory.prefault import Prefault, SpareMemory
from kvmigrate.memory.region import HUGE_PAGES, GuestMemory

MIB = 1 << 20


def test_resident_runs_are_whole_huge_pages_by_rising_gfn() -> None:
    with GuestMemory(20 * MIB + 3 * 4096) as memory:
        memory.write(2 * MIB + 5, b"x")
        memory.write(4 * MIB, b"x")
        memory.write(12 * MIB, b"x")
        memory.write(20 * MIB + 2 * 4096, b"x")
        assert memory.resident_runs(9) == [(512, 2 * HUGE_PAGES), (3072, HUGE_PAGES), (5120, 3)]
        assert memory.resident_runs(2) == [(512, 2 * HUGE_PAGES), (3072, HUGE_PAGES)]


def test_prefault_makes_exactly_the_runs_resident_and_keeps_their_bytes() -> None:
    with GuestMemory(32 * MIB) as memory:
        memory.write(8 * MIB, b"kept")
        prefault = Prefault(memory, [(2048, 1024), (6144, 512)])
        deadline = time.monotonic() + 20
        while memory.resident_pages() < 1536 and time.monotonic() < deadline:
            time.sleep(0.01)
        prefault.stop()
        assert memory.resident_runs(9) == [(2048, 1024), (6144, 512)]
        assert memory.read(8 * MIB, 4) == b"kept"


def test_a_stopped_prefault_touches_nothing_more() -> None:
    with GuestMemory(1024 * MIB) as memory:
        prefault = Prefault(memory, [(0, 256 * 1024)])
        prefault.stop()
        before = memory.resident_pages()
        time.sleep(0.05)
        assert memory.resident_pages() == before < 256 * 1024


def test_spare_memory_goes_touched_to_a_guest_of_its_size_and_to_no_other() -> None:
    spare = SpareMemory(32 * MIB)
    with spare.take(32 * MIB) as memory, spare.take(32 * MIB) as second:
        assert memory.resident_pages() == 8192
        assert second.resident_pages() == 0, "it was taken already"
        assert spare.touched_bytes == 32 * MIB
    spare = SpareMemory(32 * MIB)
    with spare.take(16 * MIB) as other:
        assert (other.size_bytes, other.resident_pages(), spare.touched_bytes) == (16 * MIB, 0, 0)
    spare.close()


@pytest.mark.parametrize("run", [(1 << 40, 512), (8191, 2)])
def test_a_run_outside_of_ram_touches_nothing(run: tuple[int, int]) -> None:
    with GuestMemory(32 * MIB) as memory:
        Prefault(memory, [run]).stop()
        assert memory.resident_pages() == 0
