"""Pages onto and off a migration's connection: uncompressed ones entirely in C, zstd runs through a bounce buffer."""

from __future__ import annotations

import struct
import time
from typing import Any

import zstandard

from .._core import ffi, lib
from ..config import PAGE_BYTES, Compression
from ..errors import BadField, TooLarge
from ..memory.region import GuestMemory
from ..precopy.ledger import RoundRecord
from ..precopy.rounds import Round, check_round
from ..state.frame import FLAG_MANDATORY, FrameHeader, FrameKind, encode_header
from . import wire
from .channel import Channel, expect

PAGES_HEAD = struct.Struct("<IIQ")
PAGES_ZSTD = 1
RUN_BYTES = 16
ANNOUNCED_PAGES = 8192
"""From 32 MiB on touching memory ahead is worth a thread."""
MAX_WINDOW_BYTES = 8 << 20
"""The most memory a zstd frame may ask of its reader for looking back; a chunk is 1 MiB."""


def announce_resident(channel: Channel, memory: GuestMemory) -> None:
    """Tell the destination where data is about to land, if there is much of it: it touches that memory meanwhile."""
    runs = memory.resident_runs(wire.MAX_RESIDENT_RUNS)
    if sum(nr_pages for _, nr_pages in runs) >= ANNOUNCED_PAGES:
        payload = wire.Resident(tuple(runs)).to_payload()
        channel.send_payloads([(FrameKind.RESIDENT, payload)], mandatory=False)


class StreamSink:
    """A :class:`PageSink` that writes to ``channel``, and counts what it wrote over all rounds."""

    def __init__(self, channel: Channel, compression: Compression) -> None:
        self._channel = channel
        self._compressor = None if compression.level is None else _Compressor(compression.level)
        self.pages_sent = 0
        self.pages_cleared = 0

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """Send everything that is pending. Raises what :meth:`Channel.check` raises."""
        if self._compressor is None:
            handle = round_.handle
            self._channel.check(
                lib.kmig_stream_send_round(memory.handle, handle, self._channel.fd, self._channel.sequence)
            )
        else:
            self._compressor.write_round(memory, round_, self._channel)
        self.pages_sent += round_.handle.pages_sent
        self.pages_cleared += round_.handle.pages_cleared

    def end_round(self, record: RoundRecord) -> None:
        """Tell the destination how far it is, and wait until it is there too.

        Megabytes of a round fit into the sockets' buffers. Were they still under way when the guest is paused, its
        state would queue behind them (measured: 5 to 20 ms of blackout for 1 GiB)."""
        zero = record.pages_zero + record.pages_cleared
        payload = wire.Round(record.round, record.pages_sent, zero, record.bytes_sent).to_payload()
        self._channel.send_payloads([(FrameKind.ROUND, payload)])
        self._channel.wait_while_draining()
        if expect(self._channel, FrameKind.ROUND).payload != payload:
            raise BadField(f"{self._channel.peer} answers for another round than {record.round}")


class _Compressor:
    """Chunks of up to 256 pages as one zstd frame each; a chunk that does not shrink goes as it is."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_content_size=True)
        self._bounce = bytearray(lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
        self._chunk: Any = ffi.new("struct kmig_chunk *")

    def write_round(self, memory: GuestMemory, round_: Round, channel: Channel) -> None:
        handle = round_.handle
        pacer = _Pacer(round_.bandwidth_bytes_s)
        bounce = ffi.from_buffer(self._bounce)
        lib.kmig_round_begin(memory.handle, handle)
        begin = time.monotonic_ns()
        while check_round(lib.kmig_round_next(memory.handle, handle, self._chunk, bounce), "reading guest memory"):
            try:
                frame = self._frame(channel.sequence[0])
                round_.work_ns += time.monotonic_ns() - begin
                pacer.wait(len(frame), channel)
                begin = time.monotonic_ns()
                channel.send_raw(frame)
            except BaseException:
                lib.kmig_round_put_back(memory.handle, handle, self._chunk)
                raise
            channel.sequence[0] += 1
            sent = time.monotonic_ns()
            handle.busy_ns += sent - begin
            handle.bytes_sent += len(frame)
            begin = sent

    def _frame(self, sequence: int) -> bytearray:
        chunk = self._chunk
        raw = memoryview(self._bounce)[: chunk.nr_data_pages * PAGE_BYTES]
        packed: bytes | memoryview = self._zstd.compress(raw) if raw else b""
        flags = PAGES_ZSTD if raw and len(packed) < len(raw) else 0
        data = packed if flags else raw
        head = PAGES_HEAD.pack(chunk.nr_runs, flags, len(data))
        head += bytes(ffi.buffer(chunk.run, chunk.nr_runs * RUN_BYTES))
        checksum = lib.kmig_hash(head, len(head))
        header = FrameHeader(FrameKind.PAGES, FLAG_MANDATORY, len(head) + len(data), checksum, sequence)
        frame = bytearray(encode_header(header))
        frame += head
        frame += data
        return frame


class _Pacer:
    """Holds sends back to ``bandwidth_bytes_s`` (0: not at all). Time that was not used is not saved up."""

    def __init__(self, bandwidth_bytes_s: int) -> None:
        self._bandwidth = bandwidth_bytes_s
        self._next = time.monotonic()

    def wait(self, size_bytes: int, channel: Channel) -> None:
        if not self._bandwidth:
            return
        channel.pause_until(self._next)
        self._next = max(self._next, time.monotonic()) + size_bytes / self._bandwidth


class Decompressor:
    """Compressed PAGES frames of one stream into memory."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def apply(self, memory: GuestMemory, channel: Channel) -> None:
        """Read the data of the frame whose table :meth:`Channel.recv_pages` has checked, and write it to its pages.

        Raises :class:`StreamError` unless it is one zstd frame that says it holds exactly the announced pages and does.
        """
        incoming = channel.incoming
        wanted = incoming.nr_data_pages * PAGE_BYTES
        if incoming.length >= wanted:
            raise TooLarge(f"a compressed PAGES frame of {incoming.length} bytes for {wanted} bytes of pages")
        data = self._expand(channel.recv_bytes(incoming.length), wanted)
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
