"""Where RAM lies: the 32-bit hole stays free and no page is lost to it."""

from __future__ import annotations

import pytest

from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.layout import HOLE_END, HOLE_START, slots_for

GIB = 1 << 30


@pytest.mark.parametrize("memory_bytes", [PAGE_BYTES, 1 << 20, GIB, 3 * GIB, 3 * GIB + PAGE_BYTES, 7 * GIB, 1 << 40])
def test_slots_hold_exactly_the_memory_asked_for(memory_bytes: int) -> None:
    assert sum(nr_pages for _, _, nr_pages in slots_for(memory_bytes)) * PAGE_BYTES == memory_bytes


@pytest.mark.parametrize("memory_bytes", [GIB, 3 * GIB, 3 * GIB + PAGE_BYTES, 7 * GIB])
def test_no_slot_reaches_into_the_hole(memory_bytes: int) -> None:
    for _, base_gfn, nr_pages in slots_for(memory_bytes):
        start, end = base_gfn * PAGE_BYTES, (base_gfn + nr_pages) * PAGE_BYTES
        assert end <= HOLE_START or start >= HOLE_END


def test_one_page_over_3_gib_makes_a_second_slot() -> None:
    assert slots_for(3 * GIB) == [(0, 0, 0xC0000)]
    assert slots_for(3 * GIB + PAGE_BYTES) == [(0, 0, 0xC0000), (1, 0x100000, 1)]
