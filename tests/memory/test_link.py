"""The link under a round: peers that stall, die or are slow, cancelling, the cap, and counters that others read."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from kvmigrate._core import ffi, lib
from kvmigrate.config import PAGE_BYTES
from kvmigrate.memory.dirty import DirtyLog, LogMode
from kvmigrate.memory.region import GuestMemory
from kvmigrate.state.frame import HEADER, decode_header

from .tools import (
    Draining,
    Run,
    contents,
    decode_stream,
    end_frame,
    fill,
    new_incoming,
    new_round,
    pages_of,
    send_round,
    stream_round,
)

NR_PAGES = 4096 + 3


@pytest.fixture
def source() -> Iterator[GuestMemory]:
    with GuestMemory(NR_PAGES * PAGE_BYTES) as memory:
        yield memory


class TestFailingLink:
    """What a round makes of a link that fails: an error by name, and no page forgotten."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, theirs

    @pytest.fixture
    def log(self, source: GuestMemory) -> DirtyLog:
        log = DirtyLog(source, LogMode.CLEAR)
        log.start()
        return log

    def send(self, source: GuestMemory, sock: socket.socket, **options: Any) -> int:
        round_ = new_round(first=True, **options)
        return stream_round(source.handle, round_, sock.fileno(), ffi.new("uint32_t *"))

    def nothing_is_forgotten(self, source: GuestMemory, log: DirtyLog, received: bytes, gfns: range) -> None:
        """Every page was in a whole frame, or comes in the next round."""
        complete = {g for runs in whole_tables(received) for g in pages_of(runs)}
        log.sync()
        again = {g for _, runs, _ in decode_stream(send_round(source, first=False)[0]) for g in pages_of(runs)}
        assert complete | again == set(gfns)
        assert again, "the round failed, so something must have been left"

    def test_a_peer_that_takes_nothing_is_a_timeout(
        self, source: GuestMemory, log: DirtyLog, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        fill(source, range(2000))
        began = time.monotonic()
        assert self.send(source, pair[0], timeout_ms=200) == -errno.ETIMEDOUT
        assert 0.15 < time.monotonic() - began < 2
        self.nothing_is_forgotten(source, log, read_all(pair), range(2000))

    def test_a_peer_that_hangs_up_is_an_error_and_no_signal(
        self, source: GuestMemory, log: DirtyLog, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        fill(source, range(2000))
        pair[1].close()
        assert self.send(source, pair[0]) in (-errno.EPIPE, -errno.ECONNRESET)
        log.sync()
        assert sum(len(pages_of(runs)) for _, runs, _ in decode_stream(send_round(source, first=False)[0])) == 2000

    def test_cancelling_wakes_a_round_that_waits(
        self, source: GuestMemory, log: DirtyLog, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        fill(source, range(2000))
        abort_fd = os.eventfd(0)
        timer = threading.Timer(0.1, os.eventfd_write, (abort_fd, 1))
        timer.start()
        began = time.monotonic()
        try:
            assert self.send(source, pair[0], abort_fd=abort_fd, timeout_ms=20_000) == -errno.ECANCELED
        finally:
            timer.join()
            os.close(abort_fd)
        assert time.monotonic() - began < 5
        self.nothing_is_forgotten(source, log, read_all(pair), range(2000))

    def test_a_slow_peer_is_no_timeout_as_long_as_it_takes_something(
        self, source: GuestMemory, log: DirtyLog, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        fill(source, range(600))
        pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        def drain() -> None:
            while pair[1].recv(1 << 17):
                time.sleep(0.02)

        thread = threading.Thread(target=drain)
        thread.start()
        assert self.send(source, pair[0], timeout_ms=250) == 0
        pair[0].close()
        thread.join()

    @pytest.mark.parametrize("blocking", [True, False])
    def test_the_socket_may_be_blocking_or_not(
        self, source: GuestMemory, log: DirtyLog, pair: tuple[socket.socket, socket.socket], blocking: bool
    ) -> None:
        fill(source, range(2000))
        pair[0].setblocking(blocking)
        with Draining(pair[1]) as draining:
            assert self.send(source, pair[0]) == 0
            pair[0].close()
        assert sum(len(pages_of(runs)) for _, runs, _ in decode_stream(draining.data)) == 2000


def whole_tables(stream: bytes) -> list[list[Run]]:
    """The page tables of the frames that ``stream`` holds to their end."""
    at, tables = 0, []
    while at + HEADER.size <= len(stream):
        end = at + HEADER.size + decode_header(stream[at : at + HEADER.size]).length
        if end > len(stream):
            break
        tables += [runs for _, runs, _ in decode_stream(stream[at:end])]
        at = end
    return tables


def read_all(pair: tuple[socket.socket, socket.socket]) -> bytes:
    """Everything on its way in the pair."""
    pair[0].shutdown(socket.SHUT_WR)
    with Draining(pair[1]) as draining:
        pass
    return draining.data


def send(fd: int, data: Any, size_bytes: int, abort_fd: int, timeout_ms: int) -> int:
    return lib.kmig_stream_send(fd, data, size_bytes, abort_fd, timeout_ms, ffi.NULL)


def receive(fd: int, data: Any, size_bytes: int, abort_fd: int, timeout_ms: int, spin_us: int = 0) -> int:
    return lib.kmig_stream_recv(fd, data, size_bytes, abort_fd, timeout_ms, spin_us, ffi.NULL)


@pytest.mark.parametrize("transfer", [send, receive, partial(receive, spin_us=20_000)], ids=["send", "recv", "spin"])
def test_send_and_recv_keep_to_their_timeout_and_abort(transfer: Callable[..., int]) -> None:
    data = ffi.new("uint8_t[]", 8 << 20)
    ours, theirs = socket.socketpair()
    abort_fd = os.eventfd(0)
    with ours, theirs:
        assert transfer(ours.fileno(), data, len(data), abort_fd, 50) == -errno.ETIMEDOUT
        os.eventfd_write(abort_fd, 1)
        assert transfer(ours.fileno(), data, len(data), abort_fd, 50) == -errno.ECANCELED
    os.close(abort_fd)


def test_send_and_recv_carry_every_byte_once() -> None:
    data, ours_theirs = os.urandom(3_000_001), socket.socketpair()
    with ours_theirs[0], ours_theirs[1]:
        sent: list[int] = []
        thread = threading.Thread(target=lambda: sent.append(send(ours_theirs[0].fileno(), data, len(data), -1, 5000)))
        thread.start()
        buffer = ffi.new("uint8_t[]", len(data))
        assert receive(ours_theirs[1].fileno(), buffer, len(data), -1, 5000) == 0
        thread.join()
    assert sent == [0] and bytes(ffi.buffer(buffer)) == data


def trickle(sock: socket.socket, data: bytes) -> None:
    for at in range(0, len(data), 30_000):
        sock.sendall(data[at : at + 30_000])
        time.sleep(0.06)


def test_a_peer_that_trickles_is_no_timeout_for_the_receiver_of_pages(source: GuestMemory) -> None:
    """The receiver sleeps until a good part has come; what comes in small bits must count as progress all the same."""
    fill(source, range(80))
    stream = send_round(source, first=True)[0] + end_frame(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
    with ours, theirs, GuestMemory(NR_PAGES * PAGE_BYTES) as target:
        thread = threading.Thread(target=trickle, args=(ours, stream))
        thread.start()
        rc = lib.kmig_stream_recv_pages(target.handle, new_incoming(timeout_ms=200), theirs.fileno())
        thread.join()
        assert rc == 1 and contents(target) == contents(source)
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


def test_a_peer_that_trickles_does_not_hold_the_receiver_of_a_control_frame_for_ever() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=trickle, args=(ours, bytes(150_000)))
        thread.start()
        buffer = ffi.new("uint8_t[]", 300_000)
        began = time.monotonic()
        rc = receive(theirs.fileno(), buffer, len(buffer), -1, 100)
        took_s = time.monotonic() - began
        thread.join()
        assert rc == -errno.ETIMEDOUT and took_s < 0.25


def capped_rate(source: GuestMemory, bandwidth: int) -> float:
    """How many times ``bandwidth`` a capped first round really took."""
    ours, theirs = socket.socketpair()
    round_ = new_round(first=True, bandwidth=bandwidth)
    with theirs, Draining(theirs):
        began = time.monotonic()
        with ours:
            assert stream_round(source.handle, round_, ours.fileno(), ffi.new("uint32_t *")) == 0
        return float(round_.bytes_sent / (time.monotonic() - began) / bandwidth)


@pytest.mark.parametrize("bandwidth", [1 << 20, 20 << 20])
def test_the_bandwidth_cap_is_kept_within_five_percent(source: GuestMemory, bandwidth: int) -> None:
    """Never over it; and not under it either, unless the machine is too busy to wake the sender in time."""
    fill(source, range(min(bandwidth // 2 // PAGE_BYTES, NR_PAGES)))
    rates = [capped_rate(source, bandwidth) for _ in range(3)]
    assert max(rates) < 1.05 and max(rates) > 0.95


def test_a_capped_round_can_be_cancelled_while_it_sleeps(source: GuestMemory) -> None:
    fill(source, range(2000))
    abort_fd = os.eventfd(0)
    round_ = new_round(first=True, bandwidth=4096, abort_fd=abort_fd)
    timer = threading.Timer(0.1, os.eventfd_write, (abort_fd, 1))
    timer.start()
    ours, theirs = socket.socketpair()
    began = time.monotonic()
    with ours, theirs:
        rc = stream_round(source.handle, round_, ours.fileno(), ffi.new("uint32_t *"))
    timer.join()
    os.close(abort_fd)
    assert rc == -errno.ECANCELED and time.monotonic() - began < 5


def test_counters_can_be_read_while_the_round_runs_and_never_go_back(source: GuestMemory) -> None:
    fill(source, range(2000))
    round_ = new_round(first=True, bandwidth=32 << 20)
    ours, theirs = socket.socketpair()
    with theirs, Draining(theirs):
        thread = threading.Thread(
            target=stream_round, args=(source.handle, round_, ours.fileno(), ffi.new("uint32_t *"))
        )
        thread.start()
        seen = []
        while thread.is_alive():
            seen.append((round_.pages_done, round_.pages_sent, round_.bytes_sent))
            time.sleep(0.005)
        thread.join()
        ours.close()
    assert len(set(seen)) > 5
    assert all(a <= b for before, after in itertools.pairwise(seen) for a, b in zip(before, after, strict=True))
