"""Pages that a socket sends by reference: what arrives from a guest that writes, and what limits and dead peers do."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES, MemoryBackend
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from .limits import can_have_own_network, drop_ipc_lock, enter_own_network, in_thread, lockable
from .tools import (
    Draining,
    contents,
    decode_stream,
    end_frame,
    fill,
    new_incoming,
    new_round,
    pages_of,
    stream_round,
)

NR_PAGES = 2048
CHUNK = lib.KMIG_CHUNK_PAGES
UNDER_WAY = 64
"""Pages that fit into a socket's buffer, most of which stay there while nobody reads."""
MADV_DONTNEED = 4


@pytest.fixture
def source() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


@pytest.fixture
def log(source: GuestMemory) -> DirtyLog:
    log = DirtyLog(source, LogMode.CLEAR)
    log.start()
    return log


@pytest.fixture
def destination() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


@dataclass
class Wire:
    """A TCP connection whose near end may send by reference."""

    ours: socket.socket
    theirs: socket.socket
    zerocopy: Any = field(default_factory=lambda: ffi.new("struct kmig_zerocopy *"))
    splice: Any = ffi.NULL
    sequence: Any = field(default_factory=lambda: ffi.new("uint32_t *"))
    incoming: Any = field(default_factory=new_incoming)

    def send(self, memory: GuestMemory, *, first: bool = True, **options: int) -> int:
        """One round."""
        round_ = new_round(first=first, **options)
        round_.zerocopy, round_.splice = self.zerocopy, self.splice
        return stream_round(memory.handle, round_, self.ours.fileno(), self.sequence)

    def receive(self, memory: GuestMemory) -> None:
        """All that was sent."""
        self.ours.sendall(end_frame(self.sequence[0]))
        self.sequence[0] += 1
        assert lib.kmig_stream_recv_pages(memory.handle, self.incoming, self.theirs.fileno()) == 1
        assert len(self.theirs.recv(self.incoming.length)) == self.incoming.length

    def reap(self) -> int:
        return lib.kmig_zerocopy_reap(self.zerocopy, self.ours.fileno())

    def reap_all(self) -> None:
        """The reports of sends may come some time after the last byte has arrived."""
        deadline = time.monotonic() + 10.0
        while self.zerocopy.reported < self.zerocopy.sends and time.monotonic() < deadline:
            # A few at a time.
            if self.reap() == 0:
                time.sleep(0.001)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.zerocopy.sends, self.zerocopy.copied, self.zerocopy.refused


@contextmanager
def wire(*, family: socket.AddressFamily = socket.AF_INET, window_bytes: int = 0) -> Iterator[Wire]:
    with socket.socket(family) as listener:
        if window_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname()[:2])
        theirs = listener.accept()[0]
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        assert lib.kmig_zerocopy_enable(ours.fileno()) == 0
        yield Wire(ours, theirs)


def gfns_of(stream: bytes) -> list[int]:
    return [gfn for _, runs, _ in decode_stream(stream) for gfn in pages_of(runs)]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_every_page_arrives_and_every_send_is_reported(source: GuestMemory, family: socket.AddressFamily) -> None:
    pages = fill(source, range(1200))
    with wire(family=family) as link:
        with Draining(link.theirs) as drained:
            rc = link.send(source)
            link.ours.shutdown(socket.SHUT_WR)
        assert rc == 0
        assert b"".join(data for _, _, data in decode_stream(drained.data)) == pages
        link.reap_all()
        sends, copied, refused = link.counts
        assert sends >= 1200 // CHUNK and refused == 0
        # Over the loopback the kernel copies in the end, as its documentation says; of reports that it joins it says of
        # all what it said of the first.
        assert 0 < copied <= sends == link.zerocopy.reported
        assert link.reap() == 0


def test_few_pages_go_as_a_copy(source: GuestMemory) -> None:
    fill(source, range(lib.KMIG_ZEROCOPY_PAGES - 1))
    with wire() as link:
        assert link.send(source) == 0
        assert link.counts == (0, 0, 0)


def change_before_it_is_read(link: Wire, source: GuestMemory, destination: GuestMemory) -> None:
    """Write to a page that is under way, and require that it comes again and both sides agree."""
    fill(source, range(UNDER_WAY))
    log = DirtyLog(source, LogMode.CLEAR)
    log.start()
    assert link.send(source) == 0
    last = (UNDER_WAY - 1) * PAGE_BYTES
    # As the guest does, behind everybody's back; and then the log tells of it.
    ffi.memmove(source.handle.slot[0].hva + last, b"later", 5)
    link.receive(destination)
    assert destination.read(last, 5) == b"later", "it went as a copy: this tests nothing"
    assert destination.digest != source.digest
    source.write(last, b"later")
    assert log.sync() == 1
    assert link.send(source, first=False) == 0
    link.receive(destination)
    assert contents(destination) == contents(source)
    assert (destination.digest, destination.nr_hashed) == (source.digest, source.nr_hashed)


@pytest.mark.parametrize("backend", [MemoryBackend.ANONYMOUS, MemoryBackend.MEMFD])
def test_a_page_that_changes_before_it_leaves_comes_again_and_both_sides_agree(
    destination: GuestMemory, backend: MemoryBackend
) -> None:
    with GuestMemory(NR_PAGES * PAGE_BYTES, backend) as source, wire(window_bytes=4096) as link:
        change_before_it_is_read(link, source, destination)


def test_a_page_that_changes_and_changes_back_comes_again(
    source: GuestMemory, log: DirtyLog, destination: GuestMemory
) -> None:
    """Its hash is the one that was sent before, and the other side holds something else."""
    fill(source, range(UNDER_WAY))
    last = (UNDER_WAY - 1) * PAGE_BYTES
    before = source.read(last, 5)
    with wire(window_bytes=4096) as link:
        assert link.send(source) == 0
        source.write(last, b"other")
        link.receive(destination)
        assert destination.read(last, 5) == b"other"
        source.write(last, before)
        assert log.sync() == 1
        assert link.send(source, first=False) == 0
        link.receive(destination)
    assert contents(destination) == contents(source)
    assert destination.digest == source.digest


def test_memory_that_is_given_back_arrives_as_it_was(
    source: GuestMemory, log: DirtyLog, destination: GuestMemory
) -> None:
    pages = fill(source, range(UNDER_WAY))
    with wire(window_bytes=4096) as link:
        assert link.send(source) == 0
        at = int(ffi.cast("uintptr_t", source.handle.slot[0].hva))
        libc = ctypes.CDLL(None)
        assert libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(UNDER_WAY * PAGE_BYTES), MADV_DONTNEED) == 0
        assert not any(source.read(0, UNDER_WAY * PAGE_BYTES))
        link.receive(destination)
    assert destination.read(0, len(pages)) == pages


def test_memory_that_is_unmapped_arrives_as_it_was(destination: GuestMemory) -> None:
    with wire(window_bytes=4096) as link:
        with GuestMemory(NR_PAGES * PAGE_BYTES) as source:
            pages = fill(source, range(UNDER_WAY))
            assert link.send(source) == 0
        link.receive(destination)
    assert destination.read(0, len(pages)) == pages


def test_what_is_beyond_the_bound_goes_as_a_copy(source: GuestMemory, destination: GuestMemory) -> None:
    pages = fill(source, range(UNDER_WAY))
    with wire() as link:
        link.zerocopy.sends = lib.KMIG_ZEROCOPY_SENDS
        assert link.send(source) == 0
        assert link.zerocopy.sends == lib.KMIG_ZEROCOPY_SENDS and link.zerocopy.refused > 0
        link.receive(destination)
    assert destination.read(0, len(pages)) == pages


def send_all_of_it(source: GuestMemory, *, first: bool = True) -> tuple[bytes, tuple[int, int, int]]:
    """What arrives, and the counts."""
    with wire() as link:
        with Draining(link.theirs) as drained:
            rc = link.send(source, first=first)
            link.ours.shutdown(socket.SHUT_WR)
        assert rc == 0
        return drained.data, link.counts


def test_where_too_little_may_be_locked_pages_go_as_a_copy(source: GuestMemory) -> None:
    fill(source, range(1200))

    def work() -> tuple[bytes, tuple[int, int, int]]:
        drop_ipc_lock()
        return send_all_of_it(source)

    # Even what is left of a page counts as two, so that nothing fits in here.
    with lockable(PAGE_BYTES):
        data, (sends, _, refused) = in_thread(work)
    assert sends == 0 and refused >= 1200 // CHUNK
    assert gfns_of(data) == list(range(1200))


@pytest.mark.skipif(not can_have_own_network(), reason="a network namespace takes root and ip")
@pytest.mark.parametrize("optmem_bytes", [1, 3000])
def test_where_the_error_queue_is_full_pages_go_as_a_copy(source: GuestMemory, optmem_bytes: int) -> None:
    fill(source, range(1200))

    def work() -> tuple[bytes, tuple[int, int, int]] | None:
        return send_all_of_it(source) if enter_own_network(optmem_bytes) else None

    found = in_thread(work)
    if found is None:
        pytest.skip("this kernel has one net.core.optmem_max for all namespaces")
    data, (sends, _, refused) = found
    assert (sends > 0) == (optmem_bytes > 1)
    assert refused > 0 or optmem_bytes > 1
    assert gfns_of(data) == list(range(1200))


class TestFailingLink:
    """What becomes of sends under way when the link fails: an error by name, no page forgotten, nothing spun on."""

    def nothing_is_forgotten(self, source: GuestMemory, log: DirtyLog) -> None:
        log.sync()
        again = gfns_of(send_all_of_it(source, first=False)[0])
        # What did not fit into the buffers.
        assert again and max(again) == NR_PAGES - 1

    def test_a_peer_that_takes_nothing_is_a_timeout(self, source: GuestMemory, log: DirtyLog) -> None:
        fill(source, range(NR_PAGES))
        with wire() as link:
            used, began = time.thread_time(), time.monotonic()
            assert link.send(source, timeout_ms=400) == -errno.ETIMEDOUT
            assert 0.35 < time.monotonic() - began < 5
            assert time.thread_time() - used < 0.2
        self.nothing_is_forgotten(source, log)

    def test_a_peer_that_dies_is_an_error_and_no_signal(self, source: GuestMemory, log: DirtyLog) -> None:
        fill(source, range(NR_PAGES))
        with wire() as link:

            def die() -> None:
                link.theirs.recv(1)
                time.sleep(0.1)
                link.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.theirs.close()

            thread = threading.Thread(target=die)
            thread.start()
            assert link.send(source) in (-errno.EPIPE, -errno.ECONNRESET)
            thread.join()
            assert link.zerocopy.sends > 0
            # They are reported all the same, so that nobody waits for them.
            link.reap_all()
            assert link.zerocopy.reported == link.zerocopy.sends
        self.nothing_is_forgotten(source, log)

    def test_cancelling_wakes_a_round_that_waits(self, source: GuestMemory, log: DirtyLog) -> None:
        fill(source, range(NR_PAGES))
        abort_fd = os.eventfd(0)
        timer = threading.Timer(0.1, os.eventfd_write, (abort_fd, 1))
        with wire() as link:
            timer.start()
            began = time.monotonic()
            assert link.send(source, abort_fd=abort_fd, timeout_ms=20_000) == -errno.ECANCELED
            assert time.monotonic() - began < 5
        timer.join()
        os.close(abort_fd)
        self.nothing_is_forgotten(source, log)

    def test_a_report_does_not_keep_a_waiting_copy_awake(self, source: GuestMemory) -> None:
        """poll says POLLERR for as long as a report waits to be taken in."""
        fill(source, range(16))
        data, poll = bytes(16 << 20), select.poll()
        with wire() as link:
            assert link.send(source) == 0
            poll.register(link.ours.fileno(), 0)
            assert poll.poll(5000) == [(link.ours.fileno(), select.POLLERR)]
            timer = threading.Timer(2.0, link.ours.shutdown, (socket.SHUT_RDWR,))
            timer.start()
            used = time.thread_time()
            rc = lib.kmig_stream_send(link.ours.fileno(), data, len(data), -1, 400, link.zerocopy)
            timer.cancel()
            assert rc == -errno.ETIMEDOUT
            assert time.thread_time() - used < 0.2


def test_a_kind_of_socket_that_cannot_says_so() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert lib.kmig_zerocopy_enable(ours.fileno()) == -errno.EOPNOTSUPP
    assert lib.kmig_zerocopy_enable(-1) == -errno.EBADF
