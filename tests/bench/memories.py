"""What each memory back-end costs: the first touch, the rounds of a move, and whole moves of a guest."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvmigrate.config import MemoryBackend
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.huge import HUGE_BYTES
from kvmigrate.memory.region import HUGE_PAGES, GuestMemory
from tests.backends import resize_pool
from tests.memory.guest import SWEEP, Guest, assemble

from .goals import Group
from .moves import moves
from .ours import OurVariant
from .samples import Sample, Series
from .sizes import filled, scaled
from .slots import take_round
from .stream import fill
from .warm import warm

SIZE_MIB = 1024
WINDOW = [0x400 + at * 500 for at in range(512)]
"""Pages all over 1 GiB, most of them in a huge page of their own."""
FIGURES = [
    "ms to touch",
    "ms to find pages",
    "ms of the first round",
    "ms to write 512 pages",
    "ms of a round of 512",
    "ms to clear",
]


def costs(backend: MemoryBackend) -> Sample:
    """1 GiB of new memory: touched, filled, logged, taken in rounds while a guest writes, and emptied."""
    warm(SIZE_MIB)
    with tempfile.TemporaryDirectory() as directory:
        code = assemble(SWEEP, Path(directory))
    with GuestMemory(SIZE_MIB << 20, backend) as memory:
        figures = {"ms to touch": _ms(lambda: _touch(memory))}
        fill(memory)
        figures["ms to find pages"] = _ms(lambda: memory.resident_bitmap(0))
        with Guest(memory, code, WINDOW) as guest:
            log = DirtyLog(memory, LogMode.CLEAR)
            log.start()
            figures["ms of the first round"] = take_round(memory, first=True)
            figures["ms to write 512 pages"] = _ms(lambda: guest.sweep(7))
            figures["ms of a round of 512"] = _ms(log.sync) + take_round(memory, first=False)
            log.stop()
        figures["ms to clear"] = _ms(memory.clear)
    return Sample(figures)


def _touch(memory: GuestMemory) -> None:
    for first in range(0, memory.slots[0].nr_pages, HUGE_PAGES):
        memory.prefault(first, HUGE_PAGES)


def _ms(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return (time.monotonic() - began) * 1e3


@contextmanager
def _room(mib: int) -> Iterator[list[MemoryBackend]]:
    """The back-ends for which there is room: for all but huge pages there is."""
    wanted = (mib << 20) // HUGE_BYTES
    try:
        got = resize_pool(wanted)
    except OSError:
        got = 0
    try:
        yield [one for one in MemoryBackend if one is not MemoryBackend.HUGETLBFS or got == wanted]
    finally:
        if got:
            resize_pool(-got)


@contextmanager
def memory(_: Path) -> Iterator[Group]:
    """Rows by back-end."""
    with _room(SIZE_MIB) as backends:
        rows = [Series(backend, partial(costs, backend), ours=True) for backend in backends]
        yield Group("Memory back-ends: 1 GiB, and a guest that writes 512 pages of it", rows, FIGURES)


@contextmanager
def memory_moves(_: Path) -> Iterator[Group]:
    """The idle guest between two processes with memory of one kind."""
    with _room(2 * scaled(SIZE_MIB)) as backends:
        variants = [
            OurVariant(f"{backend}{', prefault' if prefault else ''}", prefault=prefault, backend=backend)
            for backend in backends
            for prefault in (False, True)
        ]
        title = "Memory back-ends: idle guest with 1 GiB of incompressible data, loopback"
        with moves(title, filled(SIZE_MIB), variants) as group:
            yield group
