"""Guest RAM as an object: bytes in and out by guest physical address, and what the C core knows of its pages."""

from __future__ import annotations

import errno
from typing import Any, Self

from .._core import ffi, lib
from ..config import PAGE_BYTES, MemoryBackend
from ..errors import ConfigError, StateError, check
from ..record import dataclass
from . import huge
from .layout import slots_for

HUGE_PAGES = 512
"""Pages in a huge page."""
STEP_PAGES = 64 * HUGE_PAGES
"""How many are touched or read at once."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One memory slot: KVM's number of it, its first page frame and how many pages it has."""

    id: int
    base_gfn: int
    nr_pages: int


class GuestMemory:
    """The RAM of one guest of ``size_bytes`` (a multiple of 4096), empty at first, made of what ``backend`` says.

    Every write by the VMM goes through :meth:`write`, which marks the pages for the dirty log: KVM logs only what
    the guest writes. Close it when no vCPU can run any more. Raises :class:`ConfigError` for a size that cannot be
    meant or huge pages that the host has too few of, :class:`HostError` when the host has no room.
    """

    def __init__(self, size_bytes: int, backend: MemoryBackend = MemoryBackend.ANONYMOUS) -> None:
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise ConfigError(f"{size_bytes} bytes of memory cannot be had: take a multiple of {PAGE_BYTES}")
        if backend is MemoryBackend.HUGETLBFS:
            # The kernel has the last word, and fewer of them.
            huge.require(size_bytes)
        self.size_bytes = size_bytes
        self.backend = backend
        self.slots = tuple(Slot(*slot) for slot in slots_for(size_bytes))
        created = ffi.new("struct kmig_memory **")
        rc = lib.kmig_memory_create(_C_BACKEND[backend], created)
        check(rc, "/proc/self/pagemap", "it tells which pages of the guest are in use")
        self._handle: Any = created[0]
        try:
            for slot in self.slots:
                rc = lib.kmig_memory_add(self._handle, slot.id, slot.base_gfn, slot.nr_pages)
                check(rc, f"reserving {slot.nr_pages * PAGE_BYTES >> 20} MiB of guest memory")
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> Any:
        """The ``struct kmig_memory *`` for calls into the C core. Raises :class:`StateError` once closed."""
        if self._handle is None:
            raise StateError("closed", "open")
        return self._handle

    @property
    def closed(self) -> bool:
        return self._handle is None

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """``size_bytes`` from guest physical address ``gpa`` on; :class:`HostError` (EFAULT) when any is not RAM."""
        self._check_range(gpa, size_bytes)
        data = bytearray(size_bytes)
        rc = lib.kmig_memory_read(self.handle, gpa, ffi.from_buffer(data), size_bytes)
        check(rc, f"reading {size_bytes} bytes of guest memory at {gpa:#x}")
        return bytes(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` from ``gpa`` on and mark its pages as dirty; :class:`HostError` (EFAULT) when any byte would
        lie outside of RAM, and then nothing was written."""
        buffer = ffi.from_buffer(data)
        self._check_range(gpa, len(buffer))
        rc = lib.kmig_memory_write(self.handle, gpa, buffer, len(buffer))
        check(rc, f"writing {len(buffer)} bytes of guest memory at {gpa:#x}")

    def _check_range(self, gpa: int, size_bytes: int) -> None:
        """Raise the error that C would, before Python makes room for a size or cuts off an address."""
        if size_bytes < 0 or size_bytes > self.size_bytes or not 0 <= gpa < 1 << 52:
            check(-errno.EFAULT, f"{size_bytes} bytes of guest memory at {gpa:#x}")

    def attach(self, vm_fd: int) -> None:
        """Make this the RAM of the VM behind ``vm_fd`` (KVM_SET_USER_MEMORY_REGION for every slot)."""
        check(lib.kmig_memory_attach(self.handle, vm_fd), "KVM_SET_USER_MEMORY_REGION")

    def map_file(self, gfn: int, nr_pages: int, fd: int, offset: int) -> None:
        """Let ``nr_pages`` from ``gfn`` on show the file ``fd`` from byte ``offset`` on, privately: what the guest
        writes stays here. The file must not change or shrink from then on. Only for anonymous memory. Raises
        :class:`HostError`."""
        rc = lib.kmig_memory_map_file(self.handle, gfn, nr_pages, fd, offset)
        check(rc, f"mapping {nr_pages} pages of the memory file at {offset:#x} to gfn {gfn:#x}")

    def prefault(self, gfn: int, nr_pages: int) -> None:
        """Touch ``nr_pages`` from ``gfn`` on, so that they take no fault later. Raises :class:`HostError`."""
        check(lib.kmig_memory_prefault(self.handle, gfn, nr_pages), f"touching {nr_pages} pages at gfn {gfn:#x}")

    def want_huge(self, wanted: bool) -> None:
        """Whether memory that is touched from now on becomes huge pages, as it does at first where the host has them
        for the asking (madvise(2), MADV_HUGEPAGE). The first touch of a page then takes the kernel 2 MiB to clear."""
        lib.kmig_memory_want_huge(self.handle, wanted)

    def clear(self) -> None:
        """Make all of it zero and mark what held anything as dirty. Nothing may write meanwhile; copying may go on.
        Raises :class:`HostError`, with some of it cleared."""
        check(lib.kmig_memory_clear(self.handle), "giving guest memory back")

    def resident_bitmap(self, slot_index: int) -> bytearray:
        """Bit n is set when page n of the slot may hold anything but zeros; found without reading a page."""
        nr_pages = self.slots[slot_index].nr_pages
        bitmap = bytearray((nr_pages + 63) // 64 * 8)
        words = ffi.cast("uint64_t *", ffi.from_buffer(bitmap))
        check(lib.kmig_memory_resident(self.handle, slot_index, 0, nr_pages, words), "reading /proc/self/pagemap")
        return bitmap

    def resident_runs(self, most: int) -> list[tuple[int, int]]:
        """Where :meth:`resident_bitmap` has bits, as runs of whole huge pages (first gfn, number of pages) by rising
        gfn, at most the first ``most`` of them."""
        words = ffi.new("uint64_t[]", 2 * most)
        nr_runs = check(lib.kmig_memory_resident_runs(self.handle, words, most), "reading /proc/self/pagemap")
        found = ffi.unpack(words, 2 * nr_runs) if nr_runs else []
        return list(zip(found[::2], found[1::2], strict=True))

    def resident_pages(self) -> int:
        """How many pages may hold anything but zeros."""
        return sum(int.from_bytes(self.resident_bitmap(i), "little").bit_count() for i in range(len(self.slots)))

    def hash_all(self) -> list[bytes]:
        """Of each slot the XXH3-64 of every page as it is now, as little-endian words, 0 for a zero page.

        Reads all resident memory: for tests and proofs, not for a blackout. Keep the guest paused meanwhile.
        """
        hashes = []
        for index, slot in enumerate(self.slots):
            words = ffi.new("uint64_t[]", slot.nr_pages)
            check(lib.kmig_memory_hash_all(self.handle, index, words), "hashing guest memory")
            hashes.append(bytes(ffi.buffer(words)))
        return hashes

    @property
    def digest(self) -> int:
        """The sum over all pages as last copied out or in (see csrc/hash.h): equal on both sides of a transfer."""
        return int(self.handle.digest)

    @property
    def nr_hashed(self) -> int:
        """How many pages were not zero when they were last copied out or in."""
        return int(self.handle.nr_hashed)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            lib.kmig_memory_destroy(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_C_BACKEND = {
    MemoryBackend.ANONYMOUS: lib.KMIG_BACKEND_ANONYMOUS,
    MemoryBackend.MEMFD: lib.KMIG_BACKEND_MEMFD,
    MemoryBackend.HUGETLBFS: lib.KMIG_BACKEND_HUGETLBFS,
}
