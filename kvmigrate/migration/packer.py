"""Pages onto a connection as zstd frames, through a bounce buffer so that they do not change while they are packed."""

from __future__ import annotations

import errno
import struct
import time
from typing import Any

import zstandard

from .._core import ffi, lib
from ..config import PAGE_BYTES
from ..memory.region import GuestMemory
from ..precopy.rounds import Round, check_round
from ..state.frame import FLAG_MANDATORY, FrameHeader, FrameKind, encode_header
from .channel import Channel
from .codec import Part, Sample
from .pages import PAGES_DELTA, PAGES_ZSTD

PAGES_HEAD = struct.Struct("<IIQ")
BASES = struct.Struct("<Q")
RUN_BYTES = 16
SAMPLE_PAGES = 64
"""Fewer pages than this tell nothing of the rest."""


class Packer:
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
