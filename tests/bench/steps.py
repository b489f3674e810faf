"""What a page costs, step by step, in kvmigrate's C core; beside what the machine can do at most."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmigrate._core import ffi, lib
from kvmigrate.memory.region import GuestMemory
from tests.memory.tools import stream_round

from . import limits
from .goals import Group
from .limits import per_page, timed
from .samples import Sample, Series
from .stream import PAGE_BYTES, TIMEOUT_MS, connect, fill, first_round, piped_round, stream
from .warm import warm

SIZE_BYTES = 256 << 20
DISCARD = socket.MSG_TRUNC
"""To recv() on TCP: take the bytes and copy them nowhere (tcp(7))."""


def _touch(memory: GuestMemory) -> None:
    for slot in memory.slots:
        memory.prefault(slot.base_gfn, slot.nr_pages)


def _find(memory: GuestMemory) -> Sample:
    """Which pages are resident, by the kernel's page map."""
    return timed(SIZE_BYTES, lambda: [memory.resident_bitmap(index) for index in range(len(memory.slots))])


def _read(memory: GuestMemory) -> Sample:
    """Copy every page out."""
    block = ffi.new("uint8_t[]", 1 << 20)

    def read() -> None:
        for gpa in range(0, SIZE_BYTES, len(block)):
            lib.kmig_memory_read(memory.handle, gpa, block, len(block))

    return timed(SIZE_BYTES, read)


def _look(memory: GuestMemory) -> Sample:
    """A whole round that goes nowhere: find, test for zero, hash what is not zero, make up chunks."""
    round_, chunk = first_round(), ffi.new("struct kmig_chunk *")
    lib.kmig_round_begin(memory.handle, round_)

    def look() -> None:
        while lib.kmig_round_next(memory.handle, round_, chunk, ffi.NULL) > 0:
            pass

    return timed(SIZE_BYTES, look)


def _discard(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    while connection.recv(1 << 30, DISCARD):
        pass


def _discarded(memory: GuestMemory, work: Any) -> Sample:
    """The processor time that ``work(fd)`` needs to send all pages to a process that throws them away."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = multiprocessing.Process(target=_discard, args=(listener,))
        reader.start()
        with connect(listener.getsockname()[1]) as sender:
            began = time.process_time()
            work(sender.fileno())
            used = time.process_time() - began
        reader.kill()
        reader.join()
    return per_page(used, SIZE_BYTES)


def _send_round(memory: GuestMemory) -> Sample:
    def work(fd: int) -> None:
        stream_round(memory.handle, first_round(), fd, ffi.new("uint32_t *"))

    return _discarded(memory, work)


def _send_piped(memory: GuestMemory) -> Sample:
    def work(fd: int) -> None:
        with piped_round(fd) as round_:
            stream_round(memory.handle, round_, fd, ffi.new("uint32_t *"))

    return _discarded(memory, work)


def _send_only(memory: GuestMemory) -> Sample:
    def work(fd: int) -> None:
        for slot in range(memory.handle.nr_slots):
            view = memory.handle.slot[slot]
            lib.kmig_stream_send(fd, view.hva, view.nr_pages * PAGE_BYTES, -1, TIMEOUT_MS, ffi.NULL)

    return _discarded(memory, work)


def _fault() -> Sample:
    """Touch memory ahead, as a destination does."""
    warm(SIZE_BYTES >> 20)
    with GuestMemory(SIZE_BYTES) as memory:
        return timed(SIZE_BYTES, lambda: _touch(memory))


def _received(*, touched: bool) -> Sample:
    """The destination's processor time, and the whole time that the stream takes."""
    warm(SIZE_BYTES >> 20)
    run = stream(SIZE_BYTES, touched=touched)
    sample = per_page(run["destination_cpu_s"], SIZE_BYTES)
    return sample.joined(
        Sample({"whole stream ns per page": per_page(run["total_s"], SIZE_BYTES).figures["ns per page"]})
    )


@contextmanager
def steps(_: Path) -> Iterator[Group]:
    """Each step over 256 MiB, and the limits."""
    with GuestMemory(SIZE_BYTES) as data, GuestMemory(SIZE_BYTES) as zeros:
        fill(data)
        _touch(zeros)
        rows = [
            Series("find: kernel's page map", lambda: _find(data)),
            Series("read: copy out", lambda: _read(data)),
            Series("find, zero test of pages that are zero", lambda: _look(zeros)),
            Series("find, zero test, hash of pages with data", lambda: _look(data)),
            Series("send: source's processor, socket only", lambda: _send_only(data)),
            Series("send: source's processor, a whole round", lambda: _send_round(data)),
            Series("send: source's processor, a whole round through a pipe", lambda: _send_piped(data)),
            Series("receive, hash: destination's processor, touched memory", lambda: _received(touched=True)),
            Series("receive, hash, fault: destination's processor, new memory", lambda: _received(touched=False)),
            Series("fault: touch ahead", _fault),
        ]
        title = "What a page of 4 KiB costs by step, beside the machine's limits"
        yield Group(title, [*rows, *limits.rows()], ["ns per page"])
