"""Pages onto and off a migration's connection: uncompressed ones entirely in C, zstd runs through a bounce buffer."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Sequence
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
from .channel import Channel, Frame, require
from .codec import Auto, Fixed, Part, Sample, Sent
from .delta import DELTA, DeltaCache, Offer

PAGES_HEAD = struct.Struct("<IIQ")
BASES = struct.Struct("<Q")
PAGES_ZSTD = 1
PAGES_DELTA = 2
RUN_BYTES = 16
SAMPLE_PAGES = 64
"""Fewer pages than this tell nothing of the rest."""
ANNOUNCED_PAGES = 8192
"""From 32 MiB on touching memory ahead is worth a thread."""
MAX_WINDOW_BYTES = 8 << 20
"""The most memory a zstd frame may ask of its reader for looking back; a chunk is 1 MiB."""


def announce_resident(channel: Channel, runs: Sequence[tuple[int, int]]) -> None:
    """Tell the destination where data is about to land, if there is much of it: it touches that memory meanwhile."""
    if sum(nr_pages for _, nr_pages in runs) >= ANNOUNCED_PAGES:
        payload = wire.Resident(tuple(runs)).to_payload()
        channel.send_payloads([(FrameKind.RESIDENT, payload)], mandatory=False)


class StreamSink:
    """A :class:`PageSink` that writes to ``channel``, and counts what it wrote over all rounds."""

    def __init__(self, channel: Channel, compression: Compression, delta_cache_bytes: int = 0) -> None:
        self._channel = channel
        self._delta_cache_bytes = delta_cache_bytes if compression.may_pack else 0
        self._offered = False
        self._delta: DeltaCache | None = None
        self._packer = _Packer()
        self._codec: Fixed | Auto = Fixed(compression.level)
        if compression.auto:
            self._codec = Auto(len(os.sched_getaffinity(0)))
        self.pages_sent = 0
        self.pages_cleared = 0

    def write_round(self, memory: GuestMemory, round_: Round) -> None:
        """Send everything that is pending. Raises what :meth:`Channel.check` raises."""
        handle = round_.handle
        if self._delta_cache_bytes and round_.handle.first:
            self._channel.send_payloads([(FrameKind.OFFER, Offer((DELTA,)).to_payload())], mandatory=False)
            self._offered = True
        if self._delta is not None:
            handle.delta = self._delta.handle
        lib.kmig_round_begin(memory.handle, handle)
        more = True
        while more:
            part = self._codec.next(round_, lambda level: self._packer.sample(memory, level))
            more = self._write_part(memory, round_, part)
        self.pages_sent += handle.pages_sent
        self.pages_cleared += handle.pages_cleared

    def _write_part(self, memory: GuestMemory, round_: Round, part: Part) -> bool:
        """Send one part of the round; returns whether there may be more."""
        handle, channel = round_.handle, self._channel
        pages, sent, out, busy = handle.pages_done, handle.pages_sent, handle.bytes_sent, handle.busy_ns
        work, waiting, begin = round_.work_ns, channel.nr_unacknowledged(), time.monotonic_ns()
        if part.choice.level is None:
            limits = (part.most_pages, part.most_ns)
            more = channel.check(
                lib.kmig_stream_send_some(memory.handle, handle, channel.fd, channel.sequence, *limits)
            )
            # Under a cap the pacer's sleeps cannot be told from work.
            if not round_.bandwidth_bytes_s:
                round_.work_ns += max(time.monotonic_ns() - begin - (handle.busy_ns - busy), 0)
        else:
            more = self._packer.send_some(memory, round_, channel, part)
        out, queued = handle.bytes_sent - out, channel.nr_unacknowledged()
        did = Sent(
            page_bytes=(handle.pages_sent - sent) * PAGE_BYTES,
            out_bytes=out,
            left_bytes=out + waiting - queued,
            queued_bytes=queued,
            busy_s=(handle.busy_ns - busy) / 1e9,
            work_s=(round_.work_ns - work) / 1e9,
        )
        round_.went_as(str(part.choice), part.choice.why, handle.pages_done - pages)
        self._codec.sent(round_, part, did)
        return bool(more)

    def end_round(self, record: RoundRecord) -> None:
        """Tell the destination how far it is, and wait until it is there too.

        Megabytes of a round fit into the sockets' buffers. Were they still under way when the guest is paused, its
        state would queue behind them (measured: 5 to 20 ms of blackout for 1 GiB)."""
        zero = record.pages_zero + record.pages_cleared
        payload = wire.Round(record.round, record.pages_sent, zero, record.bytes_sent).to_payload()
        self._channel.send_payloads([(FrameKind.ROUND, payload)])
        if self._answer().payload != payload:
            raise BadField(f"{self._channel.peer} answers for another round than {record.round}")

    def _answer(self) -> Frame:
        """The ROUND that comes back, and what the destination made of an OFFER before it."""
        while True:
            self._channel.wait_while_draining()
            frame = self._channel.recv()
            if frame.kind != FrameKind.OFFER or not self._offered:
                return require(self._channel, frame, FrameKind.ROUND)
            self._offered = False
            if DELTA in Offer.from_payload(frame.payload).features:
                self._delta = DeltaCache(self._delta_cache_bytes)
                self._codec.delta = True


class _Packer:
    """Chunks of up to 256 pages as one zstd frame each; a chunk that does not shrink goes as it is."""

    def __init__(self) -> None:
        self._levels: dict[int, zstandard.ZstdCompressor] = {}
        self._bounce = bytearray(0)
        self._chunk: Any = None

    def sample(self, memory: GuestMemory, level: int) -> Sample | None:
        """Try ``level`` on pages that are still to be sent; None when there are too few to tell."""
        self._prepare()
        nr_pages = check_round(
            lib.kmig_memory_sample(memory.handle, ffi.from_buffer(self._bounce), lib.KMIG_CHUNK_PAGES),
            "looking at guest memory",
        )
        if nr_pages < SAMPLE_PAGES:
            return None
        raw = memoryview(self._bounce)[: nr_pages * PAGE_BYTES]
        zstd = self._zstd(level)
        # What the first use of a compressor takes for its tables is not its speed.
        zstd.compress(raw[:PAGE_BYTES])
        # On its own processor's clock: a few milliseconds of another's work in between would make it look hopeless.
        # What it really gets shows in the first part that it packs.
        begin = time.thread_time()
        packed = zstd.compress(raw)
        return Sample(min(len(packed) / len(raw), 1.0), len(raw) / max(time.thread_time() - begin, 1e-6))

    def send_some(self, memory: GuestMemory, round_: Round, channel: Channel, part: Part) -> bool:
        """The same as ``kmig_stream_send_some``, compressed; raises what :meth:`Channel.check` raises."""
        self._prepare()
        zstd = self._zstd(part.choice.level or 0)
        handle, bounce = round_.handle, ffi.from_buffer(self._bounce)
        first, since = handle.pages_done, time.monotonic_ns()
        begin = since
        while check_round(lib.kmig_round_next(memory.handle, handle, self._chunk, bounce), "reading guest memory"):
            try:
                frame = self._frame(zstd, channel.sequence[0])
                round_.work_ns += time.monotonic_ns() - begin
                self._pace(handle, len(frame), channel)
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
            if handle.pages_done - first >= part.most_pages or sent - since >= part.most_ns:
                return True
        return False

    def _prepare(self) -> None:
        """Room for a chunk, once it is needed."""
        if not self._bounce:
            self._bounce = bytearray(lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
            self._chunk = ffi.new("struct kmig_chunk *")

    def _zstd(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._levels:
            self._levels[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
        return self._levels[level]

    def _pace(self, handle: Any, size_bytes: int, channel: Channel) -> None:
        """Hold the send back until the cap allows it. Nothing of it has been sent, so the channel stays whole."""
        rc = lib.kmig_round_pace(handle, size_bytes)
        if rc == -errno.ECANCELED:
            channel.abort.check()
        check_round(rc, "waiting for the cap")

    def _frame(self, zstd: zstandard.ZstdCompressor, sequence: int) -> bytearray:
        chunk = self._chunk
        raw = memoryview(self._bounce)[: chunk.nr_data_pages * PAGE_BYTES]
        packed: bytes | memoryview = zstd.compress(raw) if raw else b""
        flags = PAGES_ZSTD if raw and len(packed) < len(raw) else 0
        data = packed if flags else raw
        if chunk.nr_delta_pages:
            flags |= PAGES_DELTA
        head = PAGES_HEAD.pack(chunk.nr_runs, flags, len(data))
        head += bytes(ffi.buffer(chunk.run, chunk.nr_runs * RUN_BYTES))
        head += BASES.pack(chunk.bases) if chunk.nr_delta_pages else b""
        checksum = lib.kmig_hash(head, len(head))
        header = FrameHeader(FrameKind.PAGES, FLAG_MANDATORY, len(head) + len(data), checksum, sequence)
        frame = bytearray(encode_header(header))
        frame += head
        frame += data
        return frame


class Decompressor:
    """PAGES frames of one stream that are compressed or hold changes, into memory."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def apply(self, memory: GuestMemory, channel: Channel) -> None:
        """Read the data of the frame whose table :meth:`Channel.recv_pages` has checked, and write it to its pages.

        Raises :class:`StreamError` unless compressed data is one zstd frame that says it holds exactly the announced
        pages and does.
        """
        incoming = channel.incoming
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
