"""Read ``memory.frames``, which is hostile, into empty guest memory."""

from __future__ import annotations

import os

import xxhash
import zstandard

from .._core import ffi, lib
from ..config import PAGE_BYTES
from ..errors import BadChecksum, BadField, StreamError, TooLarge, UnexpectedFrame
from ..memory.region import GuestMemory
from ..record import dataclass
from ..state import frame
from ..state.frame import FrameHeader, FrameKind
from .format import MemoryIndex
from .sink import PAGES_HEAD, PAGES_ZSTD, RUN


@dataclass(frozen=True, slots=True)
class PagesTable:
    """The fixed part of a PAGES frame: how many runs, whether the data is zstd, how long it is."""

    nr_runs: int
    compressed: bool
    data_bytes: int


def read_frames(memory: GuestMemory, fd: int, index: MemoryIndex) -> None:
    """Read the whole file of ``index.size_bytes`` and ``index.nr_frames`` into ``memory``.

    Every size is checked before it is read, every range before it is written. Raises :class:`StreamError`
    with the offset.
    """
    reader = _FramesReader(memory, fd, index)
    while reader.at < index.size_bytes:
        start = reader.at
        try:
            reader.take_frame()
        except StreamError as error:
            text = str(error).removesuffix("; send again")
            raise type(error)(f"at byte {start}: {text}") from error
    if reader.sequence != index.nr_frames:
        raise BadField(f"it has {reader.sequence} frames, the index says {index.nr_frames}")


class _FramesReader:
    """Frame after frame into memory; ``at`` is the offset and ``sequence`` the number of the next one."""

    def __init__(self, memory: GuestMemory, fd: int, index: MemoryIndex) -> None:
        self._memory = memory
        self._fd = fd
        self._size = index.size_bytes
        self._zstd = zstandard.ZstdDecompressor(max_window_size=8 << 20)
        self.at = 0
        self.sequence = 0

    def take_frame(self) -> None:
        header = frame.decode_header(self._read(frame.HEADER.size))
        if header.kind != FrameKind.PAGES or header.sequence != self.sequence:
            raise UnexpectedFrame(
                f"frame {header.sequence} of kind {header.kind} where PAGES frame {self.sequence} has to be"
            )
        table, runs = self._table(header)
        # A snapshot has whole pages only: nothing lies in memory yet upon which a delta could go.
        nr_data = int(lib.kmig_table_check(self._memory.handle, runs, table.nr_runs, lib.KMIG_RUN_ZERO))
        if nr_data < 0:
            raise BadField("its page table names pages that are not RAM, or no table can name")
        data = self._data(table, nr_data * PAGE_BYTES)
        lib.kmig_table_apply(self._memory.handle, runs, table.nr_runs, ffi.from_buffer("uint8_t[]", data))
        self.sequence += 1

    def _table(self, header: FrameHeader) -> tuple[PagesTable, object]:
        """The checked table of the frame, and its runs as C sees them."""
        head = self._read(PAGES_HEAD.size)
        nr_runs, flags, data_bytes = PAGES_HEAD.unpack(head)
        if nr_runs > lib.KMIG_CHUNK_PAGES or data_bytes > lib.KMIG_CHUNK_PAGES * PAGE_BYTES:
            raise TooLarge(f"a PAGES frame of {nr_runs} runs and {data_bytes} bytes is over the limit")
        if header.length != PAGES_HEAD.size + nr_runs * RUN.size + data_bytes or flags & ~PAGES_ZSTD:
            raise BadField(f"{header.length} bytes, {nr_runs} runs, {data_bytes} of data, flags {flags}: they disagree")
        rows = self._read(nr_runs * RUN.size)
        if xxhash.xxh3_64_intdigest(head + rows) != header.checksum:
            raise BadChecksum("its page table is damaged")
        return PagesTable(nr_runs, bool(flags), data_bytes), ffi.from_buffer("struct kmig_page_run[]", rows)

    def _data(self, table: PagesTable, page_bytes: int) -> bytes:
        """The pages, exactly ``page_bytes`` of them."""
        data = self._read(table.data_bytes)
        if not table.compressed:
            if len(data) != page_bytes:
                raise BadField(f"{len(data)} bytes of data where its table names {page_bytes}")
            return data
        try:
            # The size is looked at before anything is allocated for it.
            if zstandard.frame_content_size(data) != page_bytes:
                raise BadField(f"its data does not unpack to the {page_bytes} bytes that its table names")
            return bytes(self._zstd.decompress(data, max_output_size=page_bytes, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise BadChecksum(f"its data does not unpack: {error}") from error

    def _read(self, length: int) -> bytes:
        if length > self._size - self.at:
            raise StreamError(f"the file ends {length - (self._size - self.at)} bytes too early")
        data = os.pread(self._fd, length, self.at)
        if len(data) != length:
            raise StreamError("the file became shorter while it was read")
        self.at += length
        return data
