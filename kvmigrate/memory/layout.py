"""Where a guest's RAM lies in its physical address space."""

from __future__ import annotations

from ..config import PAGE_BYTES

HOLE_START = 0xC000_0000
HOLE_END = 1 << 32
"""Between both are the devices of every PC (IOAPIC at 0xFEC00000, LAPIC at 0xFEE00000) and KVM's own pages."""


def slots_for(memory_bytes: int) -> list[tuple[int, int, int]]:
    """The memory slots of a guest with ``memory_bytes`` of RAM, as (id, base_gfn, nr_pages) by rising gfn.

    RAM begins at 0; what does not fit below 0xC0000000 goes on at 4 GiB.
    """
    nr_pages = memory_bytes // PAGE_BYTES
    low = min(nr_pages, HOLE_START // PAGE_BYTES)
    slots = [(0, 0, low)]
    if nr_pages > low:
        slots.append((1, HOLE_END // PAGE_BYTES, nr_pages - low))
    return slots
