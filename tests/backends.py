"""Guest RAM of each kind, with room for it: huge pages are set aside for a test and given back after it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmigrate.config import MemoryBackend
from kvmigrate.memory.huge import HUGE_BYTES, POOL
from kvmigrate.memory.region import GuestMemory

EMULATED = "QEMU TCG CPU" in Path("/proc/cpuinfo").read_text()
"""Whether QEMU emulates this host, its virtualisation too (tests/emulated)."""
ALL_STATE = "" if EMULATED else "state=1 ymm=1"
"""What has the ledger guest use all registers that there are. In an emulated host QEMU 7.2 shows it AVX and refuses it
(#UD), and has ended itself while such a guest ran (an assertion in tcg_handle_interrupt)."""

ANONYMOUS, MEMFD, HUGETLBFS = MemoryBackend
SHARED = (MEMFD, HUGETLBFS)


def pool(name: str) -> int:
    """A number of the host's pool of huge pages."""
    return int((POOL / name).read_text())


def resize_pool(nr_pages: int) -> int:
    """Make the pool so many pages larger or smaller; returns by how many it became so."""
    # Several test runs may do so at once.
    with (POOL / "nr_hugepages").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = pool("nr_hugepages")
        file.write(str(before + nr_pages))
        file.flush()
        return pool("nr_hugepages") - before


@contextmanager
def room_for(backend: MemoryBackend, size_bytes: int) -> Iterator[None]:
    """Enough huge pages for ``size_bytes``, if that is what ``backend`` needs; else the test is skipped."""
    if backend is not HUGETLBFS:
        yield
        return
    wanted = size_bytes // HUGE_BYTES
    try:
        got = resize_pool(wanted)
    except OSError as error:
        pytest.skip(f"no huge pages can be set aside here: {error}")
    try:
        if got < wanted:
            pytest.skip(f"only {got} of {wanted} huge pages could be set aside here")
        yield
    finally:
        resize_pool(-got)


@contextmanager
def memory_of(backend: MemoryBackend, size_bytes: int) -> Iterator[GuestMemory]:
    with room_for(backend, size_bytes), GuestMemory(size_bytes, backend) as memory:
        yield memory
