"""What both ends know of PAGES frames beyond what C does: where data is about to land, and packed ones into memory."""

from __future__ import annotations

from collections.abc import Sequence

import zstandard

from .._core import ffi, lib
from ..config import PAGE_BYTES
from ..errors import BadField, TooLarge
from ..memory.region import GuestMemory
from ..precopy.rounds import check_round
from ..state.frame import FrameKind
from . import wire
from .channel import Channel

PAGES_ZSTD = 1
PAGES_DELTA = 2
ANNOUNCED_PAGES = 8192
"""From 32 MiB on touching memory ahead is worth a thread."""
MAX_WINDOW_BYTES = 8 << 20
"""The most memory a zstd frame may ask of its reader for looking back; a chunk is 1 MiB."""


def announce_resident(channel: Channel, runs: Sequence[tuple[int, int]]) -> None:
    """Tell the destination where data is about to land, if there is much of it: it touches that memory meanwhile."""
    if sum(nr_pages for _, nr_pages in runs) >= ANNOUNCED_PAGES:
        payload = wire.Resident(tuple(runs)).to_payload()
        channel.send_payloads([(FrameKind.RESIDENT, payload)], mandatory=False)


class Decompressor:
    """PAGES frames of one stream that are compressed or hold changes, into memory."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def apply(self, memory: GuestMemory, channel: Channel, allowed: int) -> None:
        """Read the data of the frame whose table :meth:`Channel.recv_pages` has checked, and write it to its pages.

        Raises :class:`StreamError` for a flag that is not ``allowed``, and unless compressed data is one zstd frame
        that says it holds exactly the announced pages and does.
        """
        incoming = channel.incoming
        if incoming.frame_flags & PAGES_ZSTD & ~allowed:
            raise BadField("PAGES: compressed, but HELLO did not announce zstd")
        if incoming.frame_flags & PAGES_DELTA & ~allowed:
            raise BadField("PAGES: as changes, which nobody has agreed on")
        wanted = incoming.nr_data_pages * PAGE_BYTES
        packed = incoming.frame_flags & PAGES_ZSTD
        if packed and incoming.length >= wanted:
            raise TooLarge(f"a compressed PAGES frame of {incoming.length} bytes for {wanted} bytes of pages")
        data = channel.recv_bytes(incoming.length)
        if packed:
            data = self._expand(data, wanted)
        check_round(
            lib.kmig_table_apply(memory.handle, incoming.run, incoming.nr_runs, ffi.from_buffer(data)),
            "writing received pages",
        )
        nr_pages = sum(incoming.run[i].nr_pages for i in range(incoming.nr_runs))
        incoming.bytes_received += incoming.length
        incoming.pages_received += incoming.nr_data_pages
        incoming.pages_cleared += nr_pages - incoming.nr_data_pages

    def _expand(self, packed: bytes, wanted: int) -> bytes:
        try:
            # The announced size is compared before anything is taken for it.
            if zstandard.frame_content_size(packed) != wanted:
                raise BadField(f"compressed pages announce another size than the {wanted} bytes of their table")
            data: bytes = self._zstd.decompress(packed, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BadField(f"compressed pages are damaged: {wire.one_line(str(error))}") from None
        if len(data) != wanted:
            raise BadField(f"compressed pages hold {len(data)} bytes, their table says {wanted}")
        return data
