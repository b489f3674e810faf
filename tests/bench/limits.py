"""What this machine can do at most, measured in the same run as all else: copying, first touch, loopback TCP."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable

from .samples import Sample, Series
from .stream import PAGE_BYTES, connect
from .warm import MADV_POPULATE_WRITE, warm

COPY_BYTES = 64 << 20
TOUCH_BYTES = 256 << 20
SEND_BYTES = 512 << 20
PIECE_BYTES = 1 << 20


def per_page(seconds: float, size_bytes: int) -> Sample:
    """Nanoseconds per page of 4 KiB, and the same as GiB/s."""
    return Sample({"ns per page": seconds * 1e9 / (size_bytes / PAGE_BYTES), "GiB/s": size_bytes / seconds / (1 << 30)})


def timed(size_bytes: int, work: Callable[[], object]) -> Sample:
    """``work``, which handles so many bytes."""
    began = time.monotonic()
    work()
    return per_page(time.monotonic() - began, size_bytes)


def copy() -> Sample:
    """memcpy between two buffers that are larger than the caches."""
    with mmap.mmap(-1, COPY_BYTES) as source, mmap.mmap(-1, COPY_BYTES) as target:
        for one in (source, target):
            one.madvise(MADV_POPULATE_WRITE)
        to, of = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (target, source)]
        return timed(COPY_BYTES, lambda: ctypes.memmove(to, of, COPY_BYTES))


def touch(*, huge: bool) -> Sample:
    """The first touch of anonymous memory, which was free a moment ago."""
    warm(TOUCH_BYTES >> 20)
    with mmap.mmap(-1, TOUCH_BYTES) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        return timed(TOUCH_BYTES, lambda: memory.madvise(MADV_POPULATE_WRITE))


def touch_shared() -> Sample:
    """The first touch of a memfd."""
    warm(TOUCH_BYTES >> 20)
    fd = os.memfd_create("bench")
    try:
        os.ftruncate(fd, TOUCH_BYTES)
        with mmap.mmap(fd, TOUCH_BYTES) as memory:
            return timed(TOUCH_BYTES, lambda: memory.madvise(MADV_POPULATE_WRITE))
    finally:
        os.close(fd)


def _drain(listener: socket.socket) -> None:
    piece = bytearray(PIECE_BYTES)
    connection, _ = listener.accept()
    with connection:
        while connection.recv_into(piece):
            pass


def loopback(*, paced: bool) -> Sample:
    """One TCP connection over the loopback, hot buffers on both sides; ``paced`` as the host is, or as kvmigrate's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = threading.Thread(target=_drain, args=(listener,))
        reader.start()
        piece = bytes(PIECE_BYTES)
        began = time.monotonic()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) if paced else connect(port) as sender:
            for _ in range(SEND_BYTES // PIECE_BYTES):
                sender.sendall(piece)
        reader.join()
        return per_page(time.monotonic() - began, SEND_BYTES)


def rows() -> list[Series]:
    """Each limit as a row."""
    return [
        Series("machine: memcpy", copy),
        Series("machine: first touch, 4 KiB pages", lambda: touch(huge=False)),
        Series("machine: first touch, huge pages", lambda: touch(huge=True)),
        Series("machine: first touch, memfd", touch_shared),
        Series("machine: loopback TCP, one connection", lambda: loopback(paced=True)),
        Series("machine: loopback TCP, one connection, Reno", lambda: loopback(paced=False)),
    ]
