"""What the memory tests share: rounds driven from Python, the wire format written a second time, hashes by xxhash."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import xxhash

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.frame import (
    FLAG_MANDATORY,
    HEADER,
    FrameHeader,
    FrameKind,
    decode_header,
    encode_frame,
    encode_header,
)

MASK = 2**64 - 1
DATA, ZERO, DELTA = lib.KMIG_RUN_DATA, lib.KMIG_RUN_ZERO, lib.KMIG_RUN_DELTA
Run = tuple[int, int, int]
"""gfn, nr_pages, kind."""


def page_hash(page: bytes) -> int:
    """The hash of one page as csrc/hash.h defines it."""
    return (xxhash.xxh3_64_intdigest(page) or 1) if any(page) else 0


def digest_of(hashes: dict[int, int]) -> int:
    """The digest of pages that hash to ``hashes`` (by gfn), as csrc/hash.h defines it."""
    total = 0
    for gfn, value in hashes.items():
        if value:
            x = value ^ (gfn + 1) * 0x9E3779B97F4A7C15 & MASK
            x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & MASK
            x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & MASK
            total += x ^ x >> 33
    return total & MASK


def contents(memory: GuestMemory) -> list[bytes]:
    """The hash of every page of every slot: two memories with equal ones hold the same."""
    return memory.hash_all()


def new_round(*, first: bool = False, abort_fd: int = -1, timeout_ms: int = 5000, bandwidth: int = 0) -> Any:
    """A ``struct kmig_round *``."""
    values = {"first": int(first), "abort_fd": abort_fd, "timeout_ms": timeout_ms, "bandwidth": bandwidth}
    return ffi.new("struct kmig_round *", values)


def new_incoming(*, abort_fd: int = -1, timeout_ms: int = 5000) -> Any:
    """A ``struct kmig_incoming *``."""
    return ffi.new("struct kmig_incoming *", {"abort_fd": abort_fd, "timeout_ms": timeout_ms})


def chunk_runs(chunk: Any) -> list[Run]:
    """The page table of a chunk."""
    return [(run.gfn, run.nr_pages, run.kind) for run in chunk.run[0 : chunk.nr_runs]]


def take_round(memory: GuestMemory, *, first: bool) -> Iterator[tuple[list[Run], bytes]]:
    """One round through the bounce buffer, chunk by chunk: the page table and the bytes of its data pages."""
    round_, chunk = new_round(first=first), ffi.new("struct kmig_chunk *")
    bounce = ffi.new("uint8_t[]", lib.KMIG_CHUNK_PAGES * PAGE_BYTES)
    lib.kmig_round_begin(memory.handle, round_)
    while (rc := lib.kmig_round_next(memory.handle, round_, chunk, bounce)) > 0:
        yield chunk_runs(chunk), bytes(ffi.buffer(bounce, chunk.nr_data_pages * PAGE_BYTES))
    assert rc == 0


def pages_of(runs: Sequence[Run]) -> list[int]:
    """The gfns of a page table."""
    return [gfn + i for gfn, nr_pages, _ in runs for i in range(nr_pages)]


def copied_gfns(memory: GuestMemory, *, first: bool) -> list[int]:
    """The gfns that one round copies or announces."""
    return [gfn for runs, _ in take_round(memory, first=first) for gfn in pages_of(runs)]


def encode_pages(
    runs: Sequence[Run], data: bytes, sequence: int = 0, *, flags: int = 0, bases: int | None = None
) -> bytes:
    """A PAGES frame as the docstring of state/frame.py specifies it."""
    table = struct.pack("<IIQ", len(runs), flags, len(data)) + b"".join(struct.pack("<QII", *run) for run in runs)
    table += b"" if bases is None else struct.pack("<Q", bases)
    checksum = xxhash.xxh3_64_intdigest(table)
    header = FrameHeader(FrameKind.PAGES, FLAG_MANDATORY, len(table) + len(data), checksum, sequence)
    return encode_header(header) + table + data


def decode_stream(stream: bytes) -> Iterator[tuple[FrameHeader, list[Run], bytes]]:
    """The PAGES frames of ``stream``, each with its page table and data, all of it checked."""
    at = 0
    while at < len(stream):
        header = decode_header(stream[at : at + HEADER.size])
        payload = stream[at + HEADER.size : at + HEADER.size + header.length]
        assert len(payload) == header.length
        nr_runs, flags, data_bytes = struct.unpack_from("<IIQ", payload)
        table = payload[: 16 + 16 * nr_runs]
        assert header.kind == FrameKind.PAGES and header.mandatory and flags == 0
        assert header.checksum == xxhash.xxh3_64_intdigest(table) and len(table) + data_bytes == header.length
        yield header, list(struct.iter_unpack("<QII", table[16:])), payload[len(table) :]
        at += HEADER.size + header.length


def end_frame(sequence: int) -> bytes:
    """A frame that ends a stream of pages."""
    return encode_frame(FrameKind.END, b"", sequence)


def receive_bytes(memory: GuestMemory, stream: bytes, *, incoming: Any = None) -> int:
    """What kmig_stream_recv_pages makes of ``stream`` and then the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Sending(ours, stream):
        rc = lib.kmig_stream_recv_pages(memory.handle, incoming or new_incoming(), theirs.fileno())
        theirs.shutdown(socket.SHUT_RDWR)
        return rc


class Sending:
    """Sends bytes from a thread of its own and then shuts the connection down for writing."""

    def __init__(self, sock: socket.socket, data: bytes) -> None:
        self._thread = threading.Thread(target=self._send, args=(sock, data))

    def _send(self, sock: socket.socket, data: bytes) -> None:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the receiver refused the stream and hung up, which is for the test to judge

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.join()


class Draining:
    """Reads everything that comes, from a thread of its own; ``data`` holds it after the block."""

    def __init__(self, sock: socket.socket) -> None:
        self.data = b""
        self._thread = threading.Thread(target=self._drain, args=(sock,))

    def _drain(self, sock: socket.socket) -> None:
        pieces = []
        while piece := sock.recv(1 << 20):
            pieces.append(piece)
        self.data = b"".join(pieces)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def fill(memory: GuestMemory, gfns: list[int] | range) -> bytes:
    """Write random pages at ``gfns``; returns them in a row."""
    pages = random.Random(1).randbytes(PAGE_BYTES * len(gfns))
    for at, gfn in enumerate(gfns):
        memory.write(gfn * PAGE_BYTES, pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
    return pages


def stream_round(memory: Any, round_: Any, fd: int, sequence: Any) -> int:
    """All of a round at once; returns as ``kmig_stream_send_some``."""
    lib.kmig_round_begin(memory, round_)
    return lib.kmig_stream_send_some(memory, round_, fd, sequence, MASK, MASK)


def send_round(memory: GuestMemory, *, first: bool, sequence: int = 0) -> tuple[bytes, Any]:
    """One round over a socket pair: the bytes that came out, and the round."""
    round_, counter = new_round(first=first), ffi.new("uint32_t *", sequence)
    ours, theirs = socket.socketpair()
    with theirs, Draining(theirs) as draining, ours:
        rc = stream_round(memory.handle, round_, ours.fileno(), counter)
    assert rc == 0
    return draining.data, round_
