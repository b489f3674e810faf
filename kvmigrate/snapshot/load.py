"""Restore a snapshot: map its memory privately and be ready to run at once, or read a compressed one in.

::

    open the directory ─ read and check all of ``state`` ─ build an empty machine ─ memory ─ load sections ─ compare

An uncompressed memory file is mapped where the index says that data lies; no page of it is read here, so its chunk
hashes are not looked at: that is what ``verify`` is for. Of a compressed one every byte is read, and of any one where
memory is not anonymous: then what it makes of memory has to agree with the chunk hashes and the digest of the index
before a section is loaded.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .._core import ffi, lib
from ..config import MAX_MEMORY_BYTES, PAGE_BYTES, MemoryBackend
from ..contract import Builder, Migratable
from ..errors import BadChecksum, SnapshotError, StreamError, check
from ..memory.region import STEP_PAGES, GuestMemory
from ..record import dataclass
from ..state.fidelity import Fidelity
from ..state.section import Value
from .format import RAW_FILE, extents
from .statefile import SavedState, open_file, opened, read_state


@dataclass(frozen=True, slots=True)
class Restored:
    """A machine that holds what the snapshot held, not running yet.

    ``description`` is what it was built from; its ``autostart`` says whether the guest ran when it was saved.
    ``timings`` are milliseconds: read, build, memory, load, total.
    """

    machine: Migratable
    fidelity: Fidelity
    description: Mapping[str, Value]
    timings: Mapping[str, float]


def restore(directory: Path, builder: Builder) -> Restored:
    """Build the machine of the snapshot ``directory`` with ``builder``, give it the memory and load its state.

    An uncompressed snapshot is mapped, not read, when memory is anonymous: damage to its pages is for ``verify`` to
    find, and the directory's file must neither be changed nor cut short while the guest runs. Resuming is the caller's.

    Raises :class:`SnapshotError` (damaged, naming the file and where), :class:`RestoreRefused`, and what the builder
    and the machine raise; the machine is closed then.
    """
    clock = _Clock()
    with opened(directory) as directory_fd:
        saved = read_state(directory_fd, directory)
        with _memory_file(directory_fd, directory / saved.index.file, saved) as memory_fd:
            clock.lap("read")
            machine = builder(saved.description)
            try:
                clock.lap("build")
                _bring_memory(machine.memory, memory_fd, directory, saved)
                clock.lap("memory")
                # Memory comes first: loading some items makes KVM look at it.
                fidelity = _load_sections(machine, directory, saved)
                clock.lap("load")
            except BaseException:
                machine.close()
                raise
    return Restored(machine, fidelity, saved.description, clock.laps())


class _Clock:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def laps(self) -> dict[str, float]:
        return self._laps | {"total": (self._last - self._begin) * 1e3}


@contextmanager
def _memory_file(directory_fd: int, path: Path, saved: SavedState) -> Iterator[int]:
    """The memory file, open and of the size that the index says. A mapping outlives the descriptor."""
    fd = open_file(directory_fd, path)
    try:
        size = os.fstat(fd).st_size
        if size != saved.index.size_bytes:
            raise SnapshotError(
                f"{path} has {size} bytes, the index says {saved.index.size_bytes}: use another copy of the snapshot"
            )
        yield fd
    finally:
        os.close(fd)


def _bring_memory(memory: GuestMemory, fd: int, directory: Path, saved: SavedState) -> None:
    """Fill the empty ``memory`` from the open memory file."""
    path = directory / saved.index.file
    built = [(slot.id, slot.base_gfn, slot.nr_pages) for slot in memory.slots]
    if built != [(slot.id, slot.base_gfn, slot.nr_pages) for slot in saved.index.slots]:
        raise SnapshotError(f"{directory}: the machine that its description builds has other memory slots: {built}")
    if saved.index.file == RAW_FILE and memory.backend is MemoryBackend.ANONYMOUS:
        for gfn, nr_pages, offset in _extents(saved):
            check(lib.kmig_memory_map_file(memory.handle, gfn, nr_pages, fd, offset), str(path))
        return
    try:
        if saved.index.file == RAW_FILE:
            for gfn, nr_pages, offset in _extents(saved, STEP_PAGES):
                check(lib.kmig_file_load_range(memory.handle, gfn, nr_pages, fd, offset), str(path))
        else:
            # Loads what compresses, and what stands behind that: a file that is only mapped does not wait for it.
            from .frames import read_frames

            read_frames(memory, fd, saved.index)
        _compare_hashes(memory, saved)
    except OSError as error:
        raise SnapshotError(f"cannot read {path}: {error.strerror}: use another copy of the snapshot") from error
    except StreamError as error:
        raise SnapshotError(f"{path}: {error}: use another copy of the snapshot") from error


def _extents(saved: SavedState, most: int = MAX_MEMORY_BYTES // PAGE_BYTES) -> Iterator[tuple[int, int, int]]:
    """The first gfn, the number of pages and the file's offset of each extent with data, in pieces of up to ``most``
    pages, between which a signal can come through."""
    pages_before = 0
    for slot, hashes in zip(saved.index.slots, saved.hashes.of_slot, strict=True):
        for first, nr_pages in extents(hashes, slot.nr_pages):
            for at in range(first, first + nr_pages, most):
                yield slot.base_gfn + at, min(most, first + nr_pages - at), (pages_before + at) * PAGE_BYTES
        pages_before += slot.nr_pages


def _compare_hashes(memory: GuestMemory, saved: SavedState) -> None:
    """Raise :class:`BadChecksum` unless memory as it was read in is what the index says."""
    for position, (slot, wanted) in enumerate(zip(saved.index.slots, saved.hashes.of_slot, strict=True)):
        words = ffi.new("uint64_t[]", slot.nr_chunks)
        check(lib.kmig_file_chunk_hashes(memory.handle, position, words), "kmig_file_chunk_hashes")
        got = array("Q", bytes(ffi.buffer(words)))
        if got != wanted:
            chunk = next(n for n, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1])
            raise BadChecksum(f"what it makes of chunk {chunk} of slot {position} is not what was saved")
    if (memory.handle.digest, memory.handle.nr_hashed) != (saved.index.digest, saved.index.nr_hashed):
        raise BadChecksum("the digest of memory is not the one that was saved")


def _load_sections(machine: Migratable, directory: Path, saved: SavedState) -> Fidelity:
    """Load and judge: a refused item is an error here, before anything could run."""
    try:
        fidelity = machine.load(saved.sections)
    except StreamError as error:
        raise SnapshotError(f"{directory / 'state'}: {error}: use another copy of the snapshot") from error
    fidelity.require()
    return fidelity
