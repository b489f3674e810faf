"""Pages that go to a peer on this host through a pipe: what arrives from a guest that writes, and when it cannot be."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES, MemoryBackend
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory

from .limits import forbid_vmsplice, in_thread
from .test_zerocopy import NR_PAGES, UNDER_WAY, Wire, change_before_it_is_read, gfns_of, wire
from .tools import Draining, decode_stream, fill


@pytest.fixture
def source() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


BACKENDS = [MemoryBackend.ANONYMOUS, MemoryBackend.MEMFD]


def piped(link: Wire) -> Wire:
    link.zerocopy, link.splice = ffi.NULL, ffi.new("struct kmig_splice *")
    assert lib.kmig_splice_open(link.splice, link.ours.fileno()) == 0
    return link


@contextmanager
def pipe_over(link: Wire) -> Iterator[Wire]:
    try:
        yield piped(link)
    finally:
        lib.kmig_splice_close(link.splice)


@contextmanager
def over_tcp() -> Iterator[Wire]:
    with wire(window_bytes=4096) as link, pipe_over(link):
        yield link


@contextmanager
def over_unix() -> Iterator[Wire]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with pipe_over(Wire(ours, theirs)) as link:
            yield link


LinkTo = Callable[[], AbstractContextManager[Wire]]
LINKS = pytest.mark.parametrize("link_to", [over_tcp, over_unix])


@pytest.mark.parametrize("backend", BACKENDS)
@LINKS
def test_every_page_arrives_through_the_pipe(link_to: LinkTo, backend: MemoryBackend) -> None:
    with GuestMemory(NR_PAGES * PAGE_BYTES, backend) as source, link_to() as link:
        # Runs of all lengths, so that frames end within the pipe's pages.
        pages = fill(source, [gfn for gfn in range(NR_PAGES) if gfn % 7 < 5])
        with Draining(link.theirs) as drained:
            rc = link.send(source)
            link.ours.shutdown(socket.SHUT_WR)
        assert rc == 0
        assert b"".join(data for _, _, data in decode_stream(drained.data)) == pages
        assert link.splice.sent_bytes == len(pages) and link.splice.held_bytes == 0


@pytest.mark.parametrize("backend", BACKENDS)
@LINKS
def test_a_page_that_changes_before_the_peer_reads_it_comes_again_and_both_sides_agree(
    link_to: LinkTo, backend: MemoryBackend
) -> None:
    with (
        GuestMemory(NR_PAGES * PAGE_BYTES, backend) as source,
        GuestMemory(NR_PAGES * PAGE_BYTES) as destination,
        link_to() as link,
    ):
        change_before_it_is_read(link, source, destination)


@LINKS
def test_memory_that_is_unmapped_arrives_as_it_was(link_to: LinkTo) -> None:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as destination, link_to() as link:
        with GuestMemory(NR_PAGES * PAGE_BYTES) as source:
            pages = fill(source, range(UNDER_WAY))
            assert link.send(source) == 0
        link.receive(destination)
        assert destination.read(0, len(pages)) == pages


def test_few_pages_go_as_a_copy(source: GuestMemory) -> None:
    fill(source, range(lib.KMIG_ZEROCOPY_PAGES - 1))
    with over_tcp() as link:
        assert link.send(source) == 0
        assert link.splice.sent_bytes == 0


def arrives_as_a_copy(source: GuestMemory, link: Wire, pages: bytes) -> None:
    with Draining(link.theirs) as drained:
        assert link.send(source) == 0
        link.ours.shutdown(socket.SHUT_WR)
    assert b"".join(data for _, _, data in decode_stream(drained.data)) == pages
    assert list(link.splice.fd) == [-1, -1] and link.splice.sent_bytes == 0


def test_where_a_process_may_not_splice_pages_go_as_a_copy(source: GuestMemory) -> None:
    pages = fill(source, range(1200))

    def work() -> None:
        forbid_vmsplice()
        with over_tcp() as link:
            arrives_as_a_copy(source, link, pages)

    in_thread(work)


def test_what_a_pipe_holds_that_leads_nowhere_goes_as_a_copy(source: GuestMemory) -> None:
    pages = fill(source, range(1200))
    with over_tcp() as link, Path(os.devnull).open("rb") as no_pipe:
        # Its reader lives on elsewhere.
        reader = os.dup(link.splice.fd[0])
        os.dup2(no_pipe.fileno(), link.splice.fd[0])
        arrives_as_a_copy(source, link, pages)
        os.close(reader)


def test_a_pipe_that_is_closed_is_closed_once(source: GuestMemory) -> None:
    with over_tcp() as link:
        lib.kmig_splice_close(link.splice)
        other = os.eventfd(0)
        lib.kmig_splice_close(link.splice)
        os.eventfd_write(other, 1)
        os.close(other)
        arrives_as_a_copy(source, link, fill(source, range(300)))


class TestFailingLink:
    """What becomes of pages under way when the link fails: an error by name, no page forgotten, no signal."""

    @pytest.fixture
    def log(self, source: GuestMemory) -> DirtyLog:
        fill(source, range(NR_PAGES))
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        return log

    def nothing_is_forgotten(self, source: GuestMemory, log: DirtyLog) -> None:
        log.sync()
        with over_tcp() as link:
            with Draining(link.theirs) as drained:
                assert link.send(source, first=False) == 0
                link.ours.shutdown(socket.SHUT_WR)
            again = gfns_of(drained.data)
        assert again and max(again) == NR_PAGES - 1

    def test_a_peer_that_takes_nothing_is_a_timeout(self, source: GuestMemory, log: DirtyLog) -> None:
        with over_tcp() as link:
            used = time.thread_time()
            assert link.send(source, timeout_ms=400) == -errno.ETIMEDOUT
            assert time.thread_time() - used < 0.2
            assert link.splice.held_bytes > 0
        self.nothing_is_forgotten(source, log)

    def test_a_peer_that_dies_is_an_error(self, source: GuestMemory, log: DirtyLog) -> None:
        with over_tcp() as link:
            reset(link)
            assert link.send(source) in (-errno.EPIPE, -errno.ECONNRESET)
        self.nothing_is_forgotten(source, log)

    def test_and_no_signal_where_python_does_not_ignore_it(self, source: GuestMemory, log: DirtyLog) -> None:
        before = signal.signal(signal.SIGPIPE, count_signal)
        try:
            with over_unix() as link:
                # Amid the pages of a frame: their head goes by a call that knows of no signal.
                link.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 300_000)
                timer = threading.Timer(0.2, link.theirs.close)
                timer.start()
                assert link.send(source) == -errno.EPIPE
                timer.join()
                assert link.splice.held_bytes > 0
            assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "it is let through afterwards"
        finally:
            signal.signal(signal.SIGPIPE, before)
        assert signals == []


signals: list[int] = []


def count_signal(number: int, _: object) -> None:
    signals.append(number)


def reset(link: Wire) -> None:
    link.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.theirs.close()
