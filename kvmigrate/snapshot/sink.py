"""Where the pages of a snapshot go: a sparse file of raw pages, or a file of compressed PAGES frames."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash
import zstandard

from .._core import ffi, lib
from ..config import PAGE_BYTES, Compression
from ..memory.region import GuestMemory
from ..precopy.ledger import RoundRecord
from ..precopy.rounds import Round, check_round
from ..state import frame
from ..state.frame import FLAG_MANDATORY, FrameHeader, FrameKind
from .format import FRAMES_FILE, RAW_FILE
from .staging import Staging, cannot_write

PAGES_HEAD = struct.Struct("<IIQ")
RUN = struct.Struct("<QII")
PAGES_ZSTD = 1


class MemorySink(Protocol):
    """A :class:`kvmigrate.precopy.rounds.PageSink` into a file of the snapshot."""

    name: str
    nr_frames: int

    def write_round(self, memory: GuestMemory, round_: Round) -> None: ...

    def end_round(self, record: RoundRecord) -> None: ...


def open_sink(staging: Staging, memory: GuestMemory, compression: Compression) -> MemorySink:
    """The sink that ``compression`` asks for, in a new file of ``staging``. Raises :class:`SnapshotError`."""
    if compression.level is None:
        return RawSink(staging, memory)
    return FrameSink(staging, compression.level)


class RawSink:
    """Every page at its own place in one sparse file of the size of guest RAM."""

    name = RAW_FILE
    nr_frames = 0

    def __init__(self, staging: Staging, memory: GuestMemory) -> None:
        self._path = staging.path(RAW_FILE)
        self._fd = staging.create(RAW_FILE)
        try:
            os.ftruncate(self._fd, memory.size_bytes)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """The whole round in one call; a page that turned zero becomes a hole again."""
        check_round(lib.kmig_file_save_round(memory.handle, round_.handle, self._fd), str(self._path))

    def end_round(self, record: RoundRecord) -> None:
        """Nothing to add: the file has no rounds."""


class FrameSink:
    """PAGES frames, one for each chunk of up to ``KMIG_CHUNK_PAGES`` pages, one after the other."""

    name = FRAMES_FILE

    def __init__(self, staging: Staging, level: int) -> None:
        self._path: Path = staging.path(FRAMES_FILE)
        self._fd = staging.create(FRAMES_FILE)
        self._zstd = zstandard.ZstdCompressor(level=level)
        self._chunk = ffi.new("struct kmig_chunk *")
        # The compressor must not see a page change under it, nor may the hash be of other bytes than it saw.
        self._bounce = ffi.new("uint8_t[]", lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
        self.nr_frames = 0

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """Chunk by chunk: copied aside and hashed in C, compressed, written. Raises :class:`OSError`."""
        lib.kmig_round_begin(memory.handle, round_.handle)
        while check_round(self._next(memory, round_), str(self._path)):
            try:
                self._write_chunk(round_)
            except BaseException:
                lib.kmig_round_put_back(memory.handle, round_.handle, self._chunk)
                raise

    def end_round(self, record: RoundRecord) -> None:
        """Nothing to add: the order of the frames is all that matters."""

    def _next(self, memory: GuestMemory, round_: Round) -> int:
        begin = time.monotonic_ns()
        rc = int(lib.kmig_round_next(memory.handle, round_.handle, self._chunk, self._bounce))
        round_.work_ns += time.monotonic_ns() - begin
        return rc

    def _write_chunk(self, round_: Round) -> None:
        begin = time.monotonic_ns()
        parts = self._encode()
        packed = time.monotonic_ns()
        written = write_all(self._fd, parts)
        self.nr_frames += 1
        round_.work_ns += packed - begin
        round_.handle.busy_ns += time.monotonic_ns() - packed
        round_.handle.bytes_sent += written

    def _encode(self) -> Sequence[bytes | memoryview]:
        """The chunk in hand as one frame: header, page table, and the data, compressed if that makes it smaller."""
        chunk = self._chunk
        pages = memoryview(ffi.buffer(self._bounce, chunk.nr_data_pages * PAGE_BYTES))
        packed: bytes | memoryview = self._zstd.compress(pages) if pages else b""
        flags = PAGES_ZSTD if pages and len(packed) < len(pages) else 0
        data = packed if flags else pages
        table = PAGES_HEAD.pack(chunk.nr_runs, flags, len(data)) + bytes(
            ffi.buffer(chunk.run, chunk.nr_runs * RUN.size)
        )
        header = FrameHeader(
            FrameKind.PAGES, FLAG_MANDATORY, len(table) + len(data), xxhash.xxh3_64_intdigest(table), self.nr_frames
        )
        return frame.encode_header(header), table, data


def write_all(fd: int, parts: Sequence[bytes | memoryview | Any]) -> int:
    """Write all of ``parts`` at the file's position and return the number of bytes. Raises :class:`OSError`."""
    left = [memoryview(part) for part in parts if len(part)]
    total = 0
    while left:
        written = os.writev(fd, left[:512])
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        total += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left and written:
            left[0] = left[0][written:]
    return total
